# SPDX-License-Identifier: Apache-2.0
"""The image pipeline: sizes by hand, pixels where the camera says, bad data refused."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from occflownet_core.camera import Camera
from occflownet_core.errors import ImageError
from occflownet_core.preprocess import ImageTransform, crop

TINY = ImageTransform.fit(1600, 900, 352, 128)


def jpeg(image_rgb, quality=95):
    return cv2.imencode(".jpg", cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[
        1
    ].tobytes()


def smooth_image(width=1600, height=900):
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return (np.stack([x, y, 1 - x], axis=-1) * 255).astype(np.uint8)


def test_the_window_keeps_the_road():
    # 1600 x 900 shrinks by 0.22 to 352 x 198; the upper 70 rows (sky) go.
    assert (TINY.resized_width_px, TINY.resized_height_px) == (352, 198)
    assert (TINY.left_px, TINY.top_px) == (0, 70)


def test_a_narrow_image_is_cut_left_and_right():
    transform = ImageTransform.fit(1000, 250, 200, 100)
    assert (transform.resized_width_px, transform.resized_height_px) == (400, 100)
    assert (transform.left_px, transform.top_px) == (100, 0)


def test_a_bright_spot_lands_where_the_camera_projects_it():
    camera = Camera("CAM_FRONT", 1600, 900, np.array([[1266.0, 0, 816], [0, 1266.0, 491], [0, 0, 1]]), np.eye(4))
    point_m = camera.unproject(np.array([700.0, 600.0]), np.array(12.0))
    image = np.zeros((900, 1600, 3), np.uint8)
    image[590:610, 690:710] = 255  # a square centred on the point's pixel
    small = TINY.image(image)[..., 0].astype(float)
    rows, columns = np.indices(small.shape) + 0.5  # continuous coordinates of pixel centres
    centroid = np.array([(columns * small).sum(), (rows * small).sum()]) / small.sum()
    uv, _ = TINY.camera(camera).project(point_m)
    np.testing.assert_allclose(centroid, uv, atol=0.05)


def test_decoding_at_reduced_size_agrees_with_the_full_decode():
    image = smooth_image()
    fast = TINY.jpeg(jpeg(image))
    full = TINY.image(
        cv2.cvtColor(cv2.imdecode(np.frombuffer(jpeg(image), np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    )
    assert fast.shape == (128, 352, 3)
    assert np.abs(fast.astype(int) - full).max() <= 4


def test_colours_are_rgb():
    red = np.zeros((900, 1600, 3), np.uint8)
    red[..., 0] = 255
    assert (TINY.jpeg(jpeg(red))[64, 176] - np.array([254, 0, 0]) <= 2).all()


def test_sizes_that_do_not_divide_decode_too():
    transform = ImageTransform.fit(1001, 563, 250, 90)
    assert transform.jpeg(jpeg(smooth_image(1001, 563))).shape == (90, 250, 3)


def test_an_image_of_another_size_than_announced_is_refused():
    with pytest.raises(ImageError, match="800 x 450 but 1600 x 900 was announced"):
        TINY.jpeg(jpeg(smooth_image(800, 450)))
    with pytest.raises(ImageError, match="800 x 450 but 1600 x 900"):
        TINY.image(smooth_image(800, 450))


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0 broken", b"GIF89a" + bytes(60)])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ImageError, match=r"decode as an image|cut short"):
        TINY.jpeg(data)


def test_a_truncated_jpeg_is_refused_and_not_half_grey():
    whole = jpeg(smooth_image())
    with pytest.raises(ImageError, match="cut short"):
        TINY.jpeg(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("width_px", "height_px", "sentence"),
    [
        (10_000, 8_000, "10000 x 8000 but 1600 x 900 was announced"),
        (2**31 - 1, 2**31 - 1, "claims more pixels than any camera has"),
    ],
)
def test_an_image_is_judged_by_its_head_before_it_is_decoded(width_px, height_px, sentence):
    head = b"IHDR" + struct.pack(">2I", width_px, height_px) + b"\x08\x02\0\0\0"  # 240 MB of pixels, or more
    sums = struct.pack(">I", zlib.crc32(head))
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + sums + b"\0\0\0\x08IDAT" + bytes(20)
    with pytest.raises(ImageError, match=sentence):
        TINY.jpeg(bomb)


def test_a_sliver_is_not_blown_up():
    with pytest.raises(ImageError, match="1 x 100000 would have to grow to 352 x 35200000 px"):
        ImageTransform.fit(1, 100_000, 352, 128)


def test_pixels_are_taken_as_stored_whichever_way_up_a_viewer_shows_them():
    stored = smooth_image(352, 128)
    data = io.BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees"
    Image.fromarray(stored).save(data, "JPEG", quality=95, exif=turned)
    as_stored = ImageTransform.fit(352, 128, 352, 128).jpeg(data.getvalue())
    assert np.abs(as_stored.astype(int) - stored).max() <= 6


def test_a_window_that_reaches_outside_is_black_there():
    window = crop(np.full((4, 4, 3), 9, np.uint8), -1, 2, 3, 4)
    expected = np.zeros((4, 3), np.uint8)
    expected[:2, 1:] = 9
    assert window[..., 0].tolist() == expected.tolist()
