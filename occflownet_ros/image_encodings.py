# SPDX-License-Identifier: Apache-2.0
"""Pixels of raw images in the encodings of sensor_msgs (include/sensor_msgs/image_encodings.hpp), as OpenCV's BGR."""

from __future__ import annotations

import cv2
import numpy as np

from occflownet_core.errors import ImageError

# channels, and the conversion to BGR. OpenCV names a Bayer pattern by its second row's second and third pixel.
_EIGHT_BIT: dict[str, tuple[int, int | None]] = {
    "bgr8": (3, None),
    "8UC3": (3, None),
    "rgb8": (3, cv2.COLOR_RGB2BGR),
    "bgra8": (4, cv2.COLOR_BGRA2BGR),
    "8UC4": (4, cv2.COLOR_BGRA2BGR),
    "rgba8": (4, cv2.COLOR_RGBA2BGR),
    "mono8": (1, cv2.COLOR_GRAY2BGR),
    "8UC1": (1, cv2.COLOR_GRAY2BGR),
    "yuv422": (2, cv2.COLOR_YUV2BGR_UYVY),
    "uyvy": (2, cv2.COLOR_YUV2BGR_UYVY),
    "yuv422_yuy2": (2, cv2.COLOR_YUV2BGR_YUYV),
    "yuyv": (2, cv2.COLOR_YUV2BGR_YUYV),
    "bayer_rggb8": (1, cv2.COLOR_BayerBG2BGR),
    "bayer_bggr8": (1, cv2.COLOR_BayerRG2BGR),
    "bayer_gbrg8": (1, cv2.COLOR_BayerGR2BGR),
    "bayer_grbg8": (1, cv2.COLOR_BayerGB2BGR),
}
_SIXTEEN_BIT = {name: name[:-2] + "8" for name in ("mono16", "rgb16", "bgr16", "rgba16", "bgra16")} | {
    f"bayer_{pattern}16": f"bayer_{pattern}8" for pattern in ("rggb", "bggr", "gbrg", "grbg")
}

ENCODINGS: tuple[str, ...] = (*_EIGHT_BIT, *_SIXTEEN_BIT)


def bgr_image(
    data: np.ndarray | bytes, encoding: str, width_px: int, height_px: int, step: int, is_bigendian: bool = False
) -> np.ndarray:
    """uint8 [height, width, 3], blue first, of a sensor_msgs/Image; of 16-bit values the upper eight bits.

    Args:
        data: the message's bytes.
        encoding: one of ``ENCODINGS``.
        step: bytes per row, which may be padded.
        is_bigendian: order of the bytes of 16-bit values.

    Raises:
        ImageError: the encoding is not supported, or there are more or fewer bytes than rows ask for.
    """
    base = _SIXTEEN_BIT.get(encoding, encoding)
    pixels = raw_pixels(data, encoding, width_px, height_px, step)
    if encoding in _SIXTEEN_BIT:
        pixels = pixels.reshape(height_px, width_px, -1, 2)[..., 0 if is_bigendian else 1]
    conversion = _EIGHT_BIT[base][1]
    pixels = np.ascontiguousarray(pixels)
    try:
        return pixels if conversion is None else cv2.cvtColor(pixels, conversion)
    except cv2.error:  # patterns and pairs of pixels do not fit into the smallest sizes
        raise ImageError(f"an image of {width_px} x {height_px} px is too small for encoding {encoding}") from None


def raw_pixels(data: np.ndarray | bytes, encoding: str, width_px: int, height_px: int, step: int) -> np.ndarray:
    """A view uint8 [height, width, bytes per pixel] into a message's bytes, row padding left out.

    Raises:
        ImageError: as ``bgr_image`` does.
    """
    base = _SIXTEEN_BIT.get(encoding, encoding)
    if base not in _EIGHT_BIT:
        raise ImageError(f"raw images of encoding '{encoding}' are not supported; send one of {', '.join(ENCODINGS)}")
    channels = _EIGHT_BIT[base][0]
    depth_bytes = 2 if encoding in _SIXTEEN_BIT else 1
    row_bytes = width_px * channels * depth_bytes
    data = np.frombuffer(data, dtype=np.uint8)
    if step < row_bytes or data.size != step * height_px or min(width_px, height_px) < 1:
        raise ImageError(
            f"a raw {encoding} image of {width_px} x {height_px} px with rows of {step} bytes holds {data.size} bytes, "
            f"expected {step * height_px} with rows of at least {row_bytes}; it was cut short or mislabelled"
        )
    return data.reshape(height_px, step)[:, :row_bytes].reshape(height_px, width_px, channels * depth_bytes)
