# SPDX-License-Identifier: Apache-2.0
"""Images as the sensor saw them: rectified, resized and cropped in one lookup, against doing it step by step."""

from __future__ import annotations

import array

import cv2
import numpy as np
import pytest
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import CalibrationError
from occflownet_core.preprocess import ImageTransform
from occflownet_ros import conversions
from occflownet_ros.calibration_source import CalibrationSource
from occflownet_ros.camera_model import CameraModel

WIDTH_PX, HEIGHT_PX = 640, 360
TRANSFORM = ImageTransform.fit(WIDTH_PX, HEIGHT_PX, 160, 64)  # a quarter, 26 rows cut off at the top
DISTORTIONS = {
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


def test_unknown_distortion_is_named():
    calibration = source()
    calibration.set_intrinsics(0, conversions.intrinsics_from_info(info(distortion=[0.1, 0.2]), rectify=True))
    assert calibration.rig is None
    assert "of optical has distortion model 'plumb_bob' with 2 coefficients" in calibration.problem
    binned = info()
    binned.binning_x = 2
    with pytest.raises(CalibrationError, match="is for binned images"):
        conversions.intrinsics_from_info(binned, rectify=True)
