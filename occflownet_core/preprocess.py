# SPDX-License-Identifier: Apache-2.0
"""The one image pipeline, used by training and on the vehicle alike: decode, resize, crop."""

from __future__ import annotations

import io
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image as PillowImage

from occflownet_core.camera import Camera
from occflownet_core.errors import ImageError

# A calibration is of the pixels as they are stored, whichever way up a viewer would show them.
_REDUCED_DECODING = {
    1: cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION,
    2: cv2.IMREAD_REDUCED_COLOR_2 | cv2.IMREAD_IGNORE_ORIENTATION,
    4: cv2.IMREAD_REDUCED_COLOR_4 | cv2.IMREAD_IGNORE_ORIENTATION,
    8: cv2.IMREAD_REDUCED_COLOR_8 | cv2.IMREAD_IGNORE_ORIENTATION,
}
_MOST_RESIZED_PX = 1 << 25


@dataclass(frozen=True)
class ImageTransform:
    """Resize a source image, then cut a window out of it; acts on images and on cameras alike.

    Attributes:
        source_width_px, source_height_px: size of the images that come in.
        resized_width_px, resized_height_px: size after resizing.
        left_px, top_px: the window's corner in the resized image; outside of it is black.
        width_px, height_px: the window's size, which the network sees.
    """

    source_width_px: int
    source_height_px: int
    resized_width_px: int
    resized_height_px: int
    left_px: int
    top_px: int
    width_px: int
    height_px: int

    @classmethod
    def fit(cls, source_width_px: int, source_height_px: int, width_px: int, height_px: int) -> ImageTransform:
        """The least shrinking that still covers the window; the rest is cut off left and right alike, or at the top.

        Cutting at the top (sky) keeps the road, as BEVDet and its descendants do.

        Raises:
            ImageError: a size is not positive, or the source is so narrow that it would have to be blown up without
                measure.
        """
        if min(source_width_px, source_height_px, width_px, height_px) <= 0:
            raise ImageError(
                f"cannot fit an image of {source_width_px} x {source_height_px} into {width_px} x {height_px}; sizes must be positive"
            )
        scale = max(width_px / source_width_px, height_px / source_height_px)
        resized_width_px = max(width_px, round(source_width_px * scale))
        resized_height_px = max(height_px, round(source_height_px * scale))
        if resized_width_px * resized_height_px > _MOST_RESIZED_PX:
            raise ImageError(
                f"an image of {source_width_px} x {source_height_px} would have to grow to {resized_width_px} x "
                f"{resized_height_px} px to cover {width_px} x {height_px}; check the size in camera_info"
            )
        return cls(
            source_width_px,
            source_height_px,
            resized_width_px,
            resized_height_px,
            (resized_width_px - width_px) // 2,
            resized_height_px - height_px,
            width_px,
            height_px,
        )

    def camera(self, camera: Camera) -> Camera:
        """The camera that took the image which comes out.

        Raises:
            ImageError: the camera's image has another size than this transform's source.
        """
        self._require_source(camera.width_px, camera.height_px, camera.name)
        resized = camera.resized(self.resized_width_px, self.resized_height_px)
        return resized.cropped(self.left_px, self.top_px, self.width_px, self.height_px)

    def image(self, image_rgb: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3] from a full-size uint8 [source_height, source_width, 3]; colour order is kept.

        Raises:
            ImageError: the image has another size than this transform's source.
        """
        self._require_source(image_rgb.shape[1], image_rgb.shape[0], "the image")
        return self._resize_and_crop(image_rgb)

    def jpeg(self, data: bytes | np.ndarray) -> np.ndarray:
        """uint8 RGB [height, width, 3] from an encoded image (JPEG, PNG).

        A JPEG is decoded at the smallest of 1, 1/2, 1/4, 1/8 size that is not below the resized one: libjpeg then
        skips most of the inverse transform, and the averaging it does is the anti-aliasing that resizing needs.

        Raises:
            ImageError: the data is no decodable image, is cut short, or has another size than this transform's source.
        """
        return cv2.cvtColor(self._resize_and_crop(self.reduced(data)), cv2.COLOR_BGR2RGB)

    def reduced(self, data: bytes | np.ndarray) -> np.ndarray:
        """uint8 BGR of 1/``decoding_factor`` of the source's size (rounded up), from an encoded image. Raises as ``jpeg``."""
        data = np.frombuffer(data, dtype=np.uint8)
        self._require_source(*encoded_size_px(data), "the image")
        return decoded(data, _REDUCED_DECODING[self.decoding_factor])

    @property
    def decoding_factor(self) -> int:
        """1, 2, 4 or 8: how much smaller an image may be decoded without being smaller than the resized one."""
        fits = [
            f
            for f in _REDUCED_DECODING
            if f * self.resized_width_px <= self.source_width_px and f * self.resized_height_px <= self.source_height_px
        ]
        return max(fits, default=1)

    def _resize_and_crop(self, image: np.ndarray) -> np.ndarray:
        size = (self.resized_width_px, self.resized_height_px)
        if image.shape[1::-1] != size:
            shrinks = size[0] <= image.shape[1] and size[1] <= image.shape[0]
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        return crop(image, self.left_px, self.top_px, self.width_px, self.height_px)

    def _require_source(self, width_px: int, height_px: int, what: str) -> None:
        if (width_px, height_px) != (self.source_width_px, self.source_height_px):
            raise ImageError(
                f"{what} is {width_px} x {height_px} but {self.source_width_px} x {self.source_height_px} was announced; "
                "make camera_info and images agree"
            )


def crop(image: np.ndarray, left_px: int, top_px: int, width_px: int, height_px: int) -> np.ndarray:
    """The window [height, width, C] of an image [H, W, C]; what lies outside the image is black. Never a view."""
    result = np.zeros((height_px, width_px, *image.shape[2:]), dtype=image.dtype)
    top, left = max(top_px, 0), max(left_px, 0)
    bottom, right = min(top_px + height_px, image.shape[0]), min(left_px + width_px, image.shape[1])
    if bottom > top and right > left:
        result[top - top_px : bottom - top_px, left - left_px : right - left_px] = image[top:bottom, left:right]
    return result


def encoded_size_px(data: np.ndarray) -> tuple[int, int]:
    """Width and height that an encoded image announces.

    Read from its head alone: whatever size a damaged head claims, nothing of that size is allocated.

    Args:
        data: uint8 [n], a JPEG or PNG.

    Raises:
        ImageError: the data has no such head.
    """
    try:
        with PillowImage.open(io.BytesIO(data.data), formats=("JPEG", "PNG")) as image:
            return image.size
    except PillowImage.DecompressionBombError:
        raise ImageError(
            f"the head of an image of {data.size} bytes claims more pixels than any camera has; it is damaged"
        ) from None
    except Exception:  # Pillow's readers of damaged heads raise whatever comes
        raise ImageError(f"{data.size} bytes do not decode as an image; send JPEG or PNG") from None


def decoded(data: np.ndarray, flags: int = _REDUCED_DECODING[1]) -> np.ndarray:
    """uint8 BGR [H, W, 3] of an encoded image; see ``encoded_size_px`` for its size before decoding.

    Args:
        data: uint8 [n], a whole JPEG or PNG.
        flags: of ``cv2.imdecode``.

    Raises:
        ImageError: the data is no decodable image, or is cut short.
    """
    require_complete_jpeg(data)
    try:
        image = cv2.imdecode(data, flags) if data.size else None
    except cv2.error:
        image = None
    if image is None:
        raise ImageError(f"{data.size} bytes do not decode as an image; send JPEG or PNG")
    return image


def require_complete_jpeg(data: np.ndarray) -> None:
    """Refuse a JPEG whose end is missing: OpenCV would decode it and leave the rest grey without a word.

    Args:
        data: uint8 [n], an encoded image; other formats than JPEG pass.

    Raises:
        ImageError: the data starts as a JPEG and holds no end-of-image marker in its last bytes.
    """
    is_jpeg = data.size > 2 and data[0] == 0xFF and data[1] == 0xD8
    # Some writers pad the stream after the marker, so it is looked for near the end rather than at it.
    if is_jpeg and b"\xff\xd9" not in data[-64:].tobytes():
        raise ImageError(
            f"a JPEG of {data.size} bytes ends before its end-of-image marker; it was cut short on the way"
        )
