# SPDX-License-Identifier: Apache-2.0
"""Image messages of every encoding, and what rectifying a recorded image does to it."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from occflownet_core.errors import CalibrationError, ImageError
from occflownet_ros.camera_model import CameraModel, rectified_jpeg
from occflownet_ros.image_encodings import ENCODINGS, bgr_image


def test_every_encoding_gives_the_same_picture():
    """Pixels come back as they were, whatever the encoding's order, width and rows' padding."""
    rng = np.random.default_rng(1)
    bgr = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    grey = np.repeat(bgr[..., :1], 3, axis=2)
    alpha = np.full((4, 6, 1), 9, np.uint8)
    sent = {
        "bgr8": bgr,
        "8UC3": bgr,
        "rgb8": bgr[..., ::-1],
        "bgra8": np.concatenate([bgr, alpha], axis=2),
        "8UC4": np.concatenate([bgr, alpha], axis=2),
        "rgba8": np.concatenate([bgr[..., ::-1], alpha], axis=2),
        "mono8": grey[..., :1],
        "8UC1": grey[..., :1],
    }
    wide = {name[:-1] + "16": name for name in ("bgr8", "rgb8", "bgra8", "rgba8", "mono8")}
    for encoding in [*sent, *wide]:
        pixels = sent[wide.get(encoding, encoding)]
        for big in (False, True):
            if encoding in wide:
                pixels16 = pixels.astype(np.uint16) * 256 + 77
                rows = pixels16.astype(">u2" if big else "<u2").reshape(4, -1).view(np.uint8)
            else:
                rows = pixels.reshape(4, -1)
            data = np.pad(rows, ((0, 0), (0, 3)))
            image = bgr_image(data.ravel(), encoding, 6, 4, data.shape[1], big)
            np.testing.assert_array_equal(image, grey if "mono" in encoding or encoding == "8UC1" else bgr, encoding)


@pytest.mark.parametrize("depth", ["8", "16"])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns_name_their_first_two_rows(pattern, depth):
    """A picture of one colour gives each filter its own value; away from the edges that colour comes back."""
    color = {"r": 200, "g": 120, "b": 40}
    tile = np.array([[color[pattern[0]], color[pattern[1]]], [color[pattern[2]], color[pattern[3]]]], dtype=np.uint8)
    mosaic = np.tile(tile, (4, 4))
    data = mosaic if depth == "8" else (mosaic.astype("<u2") * 256).view(np.uint8)
    image = bgr_image(np.ascontiguousarray(data).ravel(), f"bayer_{pattern}{depth}", 8, 8, data.shape[1])
    np.testing.assert_array_equal(image[2:-2, 2:-2], np.broadcast_to([40, 120, 200], (4, 4, 3)))


@pytest.mark.parametrize(
    ("encoding", "bytes_of_two_pixels"),
    [
        ("yuv422", (90, 100, 240, 100)),
        ("uyvy", (90, 100, 240, 100)),
        ("yuv422_yuy2", (100, 90, 100, 240)),
        ("yuyv", (100, 90, 100, 240)),
    ],
)
def test_yuv_is_that_of_itu_r_bt_601(encoding, bytes_of_two_pixels):
    """Y = 100, U = 90, V = 240: R = 1.164 (Y - 16) + 1.596 (V - 128) and so on."""
    data = np.tile(np.array(bytes_of_two_pixels, dtype=np.uint8), 8)
    image = bgr_image(data, encoding, 4, 4, 8)
    red = 1.164 * (100 - 16) + 1.596 * (240 - 128)
    green = 1.164 * (100 - 16) - 0.813 * (240 - 128) - 0.391 * (90 - 128)
    blue = 1.164 * (100 - 16) + 2.018 * (90 - 128)
    np.testing.assert_allclose(image[1, 1], np.clip([blue, green, red], 0, 255), atol=2)


@given(st.sampled_from([*ENCODINGS, "32FC1", ""]), st.binary(max_size=64), *[st.integers(0, 9)] * 3)
def test_wrong_image_messages_raise_one_error(encoding, data, width, height, step):
    try:
        image = bgr_image(data, encoding, width, height, step)
    except ImageError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert image.shape == (height, width, 3)


def model(**changes: object) -> CameraModel:
    values = {
        "frame_id": "optical",
        "width_px": 160,
        "height_px": 120,
        "distortion_model": "plumb_bob",
        "distortion": (0.0,) * 5,
        "matrix": (120.0, 0, 80, 0, 121.0, 60, 0, 0, 1),
        "rectification": (1.0, 0, 0, 0, 1, 0, 0, 0, 1),
        "projection": (110.0, 0, 78, 0, 0, 112.0, 61, 0, 0, 0, 1, 0),
    }
    return CameraModel(**(values | changes))


LENSES = {
    "plumb_bob": (-0.25, 0.08, 0.001, -0.002, -0.01),
    "rational_polynomial": (0.3, 0.1, 0.001, -0.001, 0.02, 0.5, 0.2, 0.03),
    "equidistant": (-0.02, 0.01, -0.003, 0.001),
}


@pytest.mark.parametrize("lens", LENSES)
def test_a_dot_goes_where_the_pinhole_sees_it(lens):
    """A point projected through the lens makes a dot; after rectification it is where P projects the point."""
    camera = model(distortion_model=lens, distortion=LENSES[lens])
    matrix, coefficients = np.array(camera.matrix).reshape(3, 3), np.array(LENSES[lens])
    for point in [(0.1, -0.05, 1.0), (-0.4, 0.3, 1.0), (0.45, 0.2, 1.0), (0.0, 0.0, 1.0)]:
        project = cv2.fisheye.projectPoints if lens == "equidistant" else cv2.projectPoints
        ray = np.array([[point]])
        if lens == "equidistant":
            pixel, _ = project(ray, np.zeros(3), np.zeros(3), matrix, coefficients)
        else:
            pixel, _ = project(ray, np.zeros(3), np.zeros(3), matrix, coefficients)
        u, v = pixel.ravel()
        grid_v, grid_u = np.mgrid[:120, :160]
        dot = 255 * np.exp(-((grid_u - u) ** 2 + (grid_v - v) ** 2) / (2 * 2.0**2))
        image = np.repeat(dot[..., None], 3, axis=2).round().astype(np.uint8)
        message = SimpleNamespace(
            encoding="bgr8", width=160, height=120, step=480, is_bigendian=0, data=np.ascontiguousarray(image).ravel()
        )
        data, unchanged = rectified_jpeg(message, camera, is_rectified=False, quality=100)
        assert not unchanged
        seen = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE).astype(float)
        seen[seen < 40] = 0
        centre = np.array([(seen * grid_u).sum(), (seen * grid_v).sum()]) / seen.sum()
        np.testing.assert_allclose(centre, [110 * point[0] + 78, 112 * point[1] + 61], atol=0.35)


def test_jpegs_are_kept_unless_they_need_rectification():
    data = cv2.imencode(".jpg", np.zeros((120, 160, 3), np.uint8))[1].ravel()
    message = SimpleNamespace(format="rgb8; jpeg compressed bgr8", data=data)
    plain = model(projection=(0.0,) * 12)
    assert rectified_jpeg(message, plain, is_rectified=False, quality=90) == (data.tobytes(), True)
    np.testing.assert_array_equal(plain.intrinsic.ravel(), plain.matrix)
    curved = model(distortion=LENSES["plumb_bob"])
    assert rectified_jpeg(message, curved, is_rectified=True, quality=90) == (data.tobytes(), True)
    assert not rectified_jpeg(message, curved, is_rectified=False, quality=90)[1]
    assert not rectified_jpeg(message, model(), is_rectified=False, quality=90)[1]  # P differs from K
    with pytest.raises(ImageError, match="cut short"):
        rectified_jpeg(SimpleNamespace(format="jpeg", data=data[:-20]), plain, False, 90)
    with pytest.raises(ImageError, match="160 x 120 px and the camera_info of optical says 161 x 120"):
        rectified_jpeg(message, model(width_px=161, projection=(0.0,) * 12), False, 90)


def test_binned_images_are_refused():
    region = SimpleNamespace(width=0)
    header = SimpleNamespace(frame_id="f")
    with pytest.raises(CalibrationError, match="binned"):
        CameraModel.from_message(SimpleNamespace(header=header, roi=region, binning_x=2, binning_y=2, width=8))
