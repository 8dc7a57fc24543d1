# SPDX-License-Identifier: Apache-2.0
"""Images as the sensor saw them: rectified, resized and cropped in one lookup, against doing it step by step."""

from __future__ import annotations

import array

import cv2
import numpy as np
import pytest
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import CalibrationError
from occflownet_core.preprocess import ImageTransform
from occflownet_ros import conversions
from occflownet_ros.calibration_source import CalibrationSource
from occflownet_ros.camera_model import CameraModel

WIDTH_PX, HEIGHT_PX = 640, 360
TRANSFORM = ImageTransform.fit(WIDTH_PX, HEIGHT_PX, 160, 64)  # a quarter, 26 rows cut off at the top
DISTORTIONS = {
    "thin_prism": [0.2, -0.1, 0.001, 0.002, 0.01, 0.5, -0.05, 0.02, 0.003, -0.001, 0.002, 0.001],
    "plumb_bob": [-0.3, 0.1, 0.001, -0.002, -0.01],
    "rational_polynomial": [0.2, -0.1, 0.001, 0.002, 0.01, 0.5, -0.05, 0.02],
    "equidistant": [0.05, -0.01, 0.004, -0.001],
}


def info(model: str = "plumb_bob", distortion: list[float] | None = None) -> CameraInfo:
    message = CameraInfo(width=WIDTH_PX, height=HEIGHT_PX, distortion_model=model)
    message.header.frame_id = "optical"
    message.d = DISTORTIONS[model] if distortion is None else distortion
    message.k = [400.0, 0, 322.0, 0, 405.0, 177.0, 0, 0, 1]
    message.p = [380.0, 0, 318.0, 0, 0, 382.0, 181.0, 0, 0, 0, 1, 0]
    return message


def scene() -> np.ndarray:
    """Smooth in colour, so that the order of averaging and looking up hardly matters; uint8 RGB."""
    y, x = np.mgrid[:HEIGHT_PX, :WIDTH_PX]
    waves = [np.sin(x / 45.0 + 1), np.cos(y / 38.0), np.sin((x + 2 * y) / 70.0)]
    return np.stack([(127 + 100 * wave).astype(np.uint8) for wave in waves], axis=-1)


def step_by_step(model: CameraModel) -> np.ndarray:
    return TRANSFORM.image(cv2.remap(scene(), *model.maps, cv2.INTER_LINEAR))


def seen_at(message: CameraInfo, u: float, v: float) -> tuple[float, float]:
    """Where a rectified pixel is in the sensor's image, by the formulas of OpenCV's documentation, for one point."""
    k, p = np.reshape(message.k, (3, 3)), np.reshape(message.p, (3, 4))[:, :3]
    x, y, z = np.reshape(message.r, (3, 3)).T @ np.linalg.solve(p, (u, v, 1.0))
    x, y = x / z, y / z
    r2 = x * x + y * y
    if message.distortion_model == "equidistant":
        angle = np.arctan(np.sqrt(r2))
        bent = angle * (1 + sum(k_i * angle ** (2 * i + 2) for i, k_i in enumerate(message.d)))
        x, y = x * bent / np.sqrt(r2), y * bent / np.sqrt(r2)
    else:
        k1, k2, p1, p2, k3, k4, k5, k6, s1, s2, s3, s4 = (*message.d, *[0.0] * (12 - len(message.d)))
        radial = (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3) / (1 + k4 * r2 + k5 * r2**2 + k6 * r2**3)
        x, y = (
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x) + s1 * r2 + s2 * r2**2,
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y + s3 * r2 + s4 * r2**2,
        )
    return tuple((k @ (x, y, 1.0))[:2])


@pytest.mark.parametrize("name", DISTORTIONS)
def test_lookups_follow_the_formulas_of_each_model(name):
    message = info(name)
    half_rad = np.radians(3) / 2
    message.r = poses.rotation_from_quaternion((np.cos(half_rad), 0, np.sin(half_rad), 0)).ravel().tolist()
    model = CameraModel.from_message(message)
    x, y = model.maps
    for u, v in ((5, 7), (320, 180), (600, 40), (100, 350), (639, 359)):
        assert (x[v, u], y[v, u]) == pytest.approx(seen_at(message, u, v), abs=2e-3)
    # The network's pixel (i, j) has its middle at 4 i + 1.5, 4 (j + 26) + 1.5 of the rectified image.
    small_x, small_y = cv2.convertMaps(*model.network_maps(TRANSFORM), cv2.CV_32FC1)
    for i, j in ((3, 2), (80, 32), (150, 60)):
        expected = np.array(seen_at(message, 4 * i + 1.5, 4 * (j + 26) + 1.5))
        found = np.array((small_x[j, i], small_y[j, i])) * 4 + 1.5  # in the sensor's image before it was reduced by 4
        assert found == pytest.approx(expected, abs=0.1)  # a fixed-point table: steps of 1/32 of a reduced pixel


@pytest.mark.parametrize("name", DISTORTIONS)
def test_one_lookup_equals_rectifying_then_resizing_then_cropping(name):
    model = CameraModel.from_message(info(name))
    maps = model.network_maps(TRANSFORM)
    assert TRANSFORM.decoding_factor == 4
    expected = step_by_step(model).astype(int)
    raw = Image(height=HEIGHT_PX, width=WIDTH_PX, encoding="rgb8", step=3 * WIDTH_PX)
    raw.data = array.array("B", scene().tobytes())
    jpeg = cv2.imencode(".jpg", scene()[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1]
    compressed = CompressedImage(format="jpeg", data=array.array("B", jpeg.tobytes()))
    inner = (slice(2, -2), slice(2, -2))  # at the border one of the two averages black in
    inside = (expected[inner] > 0).any(axis=-1)
    for message in (raw, compressed):
        ours = conversions.network_image(message, TRANSFORM, maps)
        assert ours.shape == (64, 160, 3) and inside.mean() > 0.8
        error = np.abs(ours.astype(int) - expected)[inner][inside]
        assert np.percentile(error, 99) <= 3 and error.mean() < 1
    # Without rectification the image is another one.
    assert np.abs(conversions.network_image(raw, TRANSFORM).astype(int) - expected).mean() > 5


def test_without_distortion_the_lookup_is_the_plain_transform():
    message = info(distortion=[])
    message.p = [400.0, 0, 322.0, 0, 0, 405.0, 177.0, 0, 0, 0, 1, 0]
    model = CameraModel.from_message(message)
    assert not model.changes_images
    x, y = cv2.convertMaps(*model.network_maps(TRANSFORM), cv2.CV_32FC1)
    # Pixel (0, 0) of the window is pixel (0, 26) of the quarter-size image.
    assert x[0, :3] == pytest.approx([0, 1, 2], abs=0.05) and y[:3, 0] == pytest.approx([26, 27, 28], abs=0.05)


def source() -> CalibrationSource:
    mount = Camera("FRONT", WIDTH_PX, HEIGHT_PX, np.eye(3), np.eye(4))
    return CalibrationSource(("FRONT",), ("/FRONT/camera_info",), (mount,), None, False)


def test_recalibration_changes_what_images_are_rectified_with():
    calibration = source()
    assert calibration.set_intrinsics(0, conversions.intrinsics_from_info(info(), rectify=True))
    rig, (model,) = calibration.rig, calibration.models
    assert model.distortion == tuple(DISTORTIONS["plumb_bob"]) and rig[0].intrinsic[0, 0] == 380
    # The rectified camera stays the same, the sensor behind it does not.
    assert calibration.set_intrinsics(0, conversions.intrinsics_from_info(info(distortion=[-0.2, 0, 0, 0, 0]), True))
    assert calibration.rig == rig and calibration.models[0].distortion[0] == -0.2 and calibration.changes == 2
    assert not calibration.set_intrinsics(
        0, conversions.intrinsics_from_info(info(distortion=[-0.2, 0, 0, 0, 0]), True)
    )
    plain = source()
    plain.set_intrinsics(0, conversions.intrinsics_from_info(info()))
    assert plain.models == (None,) and plain.rig == CameraRig(
        (Camera("FRONT", WIDTH_PX, HEIGHT_PX, rig[0].intrinsic, np.eye(4)),)
    )


def test_a_stereo_pairs_rectification_turns_the_image_and_not_its_frame():
    """The optical frame is the rectified camera's: with R a quarter turn about the axis, its x looks along the sensor's -y."""
    turned = info(distortion=[])
    turned.r = [0.0, -1, 0, 1, 0, 0, 0, 0, 1]
    calibration = source()
    calibration.set_intrinsics(0, conversions.intrinsics_from_info(turned, rectify=True))
    assert calibration.rig[0].ego_from_camera.tolist() == np.eye(4).tolist()
    x, y = calibration.models[0].maps
    # Rectified pixel (318 + 38, 181) is the direction (0.1, 0, 1); R^T makes it (0, -0.1, 1); K makes it (322, 177 - 40.5).
    assert (x[181, 356], y[181, 356]) == pytest.approx((322, 136.5))


NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("k", [0.0] * 9, "the camera_info of optical has fx = 0, fy = 0 px in K and must have positive ones"),
        ("k", [400.0, 0, 322, 0, NAN, 177, 0, 0, 1], "fx = 400, fy = nan px in K"),
        ("k", [-400.0, 0, 322, 0, 405, 177, 0, 0, 1], "fx = -400, fy = 405 px in K"),
        ("p", [0.0, 0, 318, 0, 0, 382, 181, 0, 0, 0, 1, 0], "FRONT: focal lengths are fx = 0, fy = 382 px"),
        ("p", [380.0, 0, NAN, 0, 0, 382, 181, 0, 0, 0, 1, 0], "FRONT: the intrinsic matrix [[380.0, 0.0, nan], "),
        ("r", [1.0, 0, 0, 0, 0, 0, 0, 0, 0], "an R that is no rotation, [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]"),
        ("r", [1.0, 0, 0, 0, 1, 0, 0, 0, -1], "an R that is no rotation"),
        ("r", [NAN] * 9, "an R that is no rotation"),
        ("d", [NAN, 0.0, 0.0, 0.0, 0.0], "distortion coefficients [nan, 0.0, 0.0, 0.0, 0.0]; all must be finite"),
        ("width", 0, "FRONT: image size is 0 x 360; both must be positive"),
        ("distortion_model", "mei", "has distortion model 'mei' with 5 coefficients; known are plumb_bob, rational"),
    ],
)
def test_calibration_that_makes_no_sense_stops_until_it_does(field, value, says):
    calibration = source()
    good = conversions.intrinsics_from_info(info(), rectify=True)
    assert calibration.set_intrinsics(0, good)
    wrong = info()
    setattr(wrong, field, value)
    assert calibration.set_intrinsics(0, conversions.intrinsics_from_info(wrong, rectify=True))
    assert calibration.rig is None and says in calibration.problem and "\n" not in calibration.problem
    assert calibration.set_intrinsics(0, good)
    assert calibration.rig is not None and calibration.problem == "" and calibration.changes == 2


def test_unknown_distortion_is_named():
    calibration = source()
    calibration.set_intrinsics(0, conversions.intrinsics_from_info(info(distortion=[0.1, 0.2]), rectify=True))
    assert calibration.rig is None
    assert "of optical has distortion model 'plumb_bob' with 2 coefficients" in calibration.problem
    binned = info()
    binned.binning_x = 2
    with pytest.raises(CalibrationError, match="is for binned images"):
        conversions.intrinsics_from_info(binned, rectify=True)
