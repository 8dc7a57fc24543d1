# SPDX-License-Identifier: Apache-2.0
"""What a camera_info says, and images made into what training and the vehicle work with: rectified JPEGs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from occflownet_core.errors import CalibrationError, ImageError
from occflownet_core.preprocess import ImageTransform, decoded, encoded_size_px, require_complete_jpeg
from occflownet_ros.image_encodings import bgr_image

_PINHOLE_MODELS = {"plumb_bob": (4, 5), "rational_polynomial": (8,), "thin_prism": (12,), "": (0,)}
_ROTATION_TOLERANCE = 1e-4
_FISHEYE_MODELS = {"equidistant": (4,), "fisheye": (4,)}


@dataclass(frozen=True)
class CameraModel:
    """A sensor_msgs/CameraInfo (see its definition for D, K, R and P), comparable by value.

    Attributes:
        frame_id: optical frame: of the rectified camera, as image_geometry and stereo_image_proc take it (they project
            points of this frame by P alone). R turns the sensor behind it.
        width_px, height_px: image size.
        distortion_model, distortion: name and D.
        matrix: K, row by row.
        rectification: R, row by row; all zero stands for none.
        projection: P, row by row; all zero stands for [K | 0].
    """

    frame_id: str
    width_px: int
    height_px: int
    distortion_model: str
    distortion: tuple[float, ...]
    matrix: tuple[float, ...]
    rectification: tuple[float, ...]
    projection: tuple[float, ...]

    @classmethod
    def from_message(cls, message: object) -> CameraModel:
        """Of a decoded camera_info.

        Raises:
            CalibrationError: it is of a binned image or of a part of one.
        """
        region = message.roi
        if max(message.binning_x, message.binning_y) > 1 or (region.width and region.width != message.width):
            raise CalibrationError(
                f"the camera_info of {message.header.frame_id} is for binned images or a region of interest; "
                "record full images, or give the intrinsics in a calibration_file"
            )
        numbers = (tuple(np.asarray(values, dtype=float).tolist()) for values in (message.d, message.k, message.r))
        distortion, matrix, rectification = numbers
        return cls(
            message.header.frame_id,
            int(message.width),
            int(message.height),
            message.distortion_model,
            distortion,
            matrix,
            rectification,
            tuple(np.asarray(message.p, dtype=float).tolist()),
        )

    @cached_property
    def intrinsic(self) -> np.ndarray:
        """[3, 3] of the rectified image, pixels."""
        projection = np.array(self.projection).reshape(3, 4)[:, :3]
        return projection if projection.any() else np.array(self.matrix).reshape(3, 3)

    @cached_property
    def rectified_from_camera(self) -> np.ndarray:
        """Rotation [3, 3] from the sensor to the rectified camera: the identity but for stereo pairs."""
        rotation = np.array(self.rectification).reshape(3, 3)
        return rotation if rotation.any() else np.eye(3)

    @property
    def changes_images(self) -> bool:
        """Whether a rectified image differs from what the sensor saw."""
        same_matrix = np.array_equal(self.intrinsic.ravel(), self.matrix)
        return any(self.distortion) or not same_matrix or not np.array_equal(self.rectified_from_camera, np.eye(3))

    @cached_property
    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """For ``cv2.remap``: where each rectified pixel is in the sensor's image. Raises as ``require_usable``."""
        return self._maps(self.intrinsic, self.width_px, self.height_px)

    def network_maps(self, transform: ImageTransform) -> tuple[np.ndarray, np.ndarray]:
        """For ``cv2.remap``: where each pixel of the network's image is in the sensor's, reduced by ``decoding_factor``.

        Rectifying, resizing and cropping in one lookup. Raises as ``require_usable``.
        """
        scale_x = transform.resized_width_px / transform.source_width_px
        scale_y = transform.resized_height_px / transform.source_height_px
        # OpenCV counts from the middle of the first pixel, sizes from its edge: hence the halves.
        network_from_rectified = np.array(
            [
                [scale_x, 0, 0.5 * scale_x - 0.5 - transform.left_px],
                [0, scale_y, 0.5 * scale_y - 0.5 - transform.top_px],
                [0, 0, 1],
            ]
        )
        x, y = self._maps(network_from_rectified @ self.intrinsic, transform.width_px, transform.height_px)
        factor = transform.decoding_factor
        return cv2.convertMaps((x + 0.5) / factor - 0.5, (y + 0.5) / factor - 0.5, cv2.CV_16SC2)

    def require_usable(self) -> None:
        """Check that images can be rectified.

        Raises:
            CalibrationError: a focal length of K is not positive and finite, R is no rotation, or the distortion model is
                not known, has another number of coefficients, or one that is not finite.
        """
        focal_px = self.matrix[0], self.matrix[4]
        if not (np.isfinite(self.matrix).all() and min(focal_px) > 0):
            raise CalibrationError(
                f"the camera_info of {self.frame_id} has fx = {focal_px[0]:g}, fy = {focal_px[1]:g} px in K and must have "
                "positive ones to rectify its images: calibrate the camera"
            )
        turn = self.rectified_from_camera
        if not np.abs(turn @ turn.T - np.eye(3)).max() < _ROTATION_TOLERANCE or np.linalg.det(turn) < 0:
            raise CalibrationError(
                f"the camera_info of {self.frame_id} has an R that is no rotation, {np.round(turn, 4).tolist()}; "
                "give a rotation, or all zero for none"
            )
        if not np.isfinite(self.distortion).all():
            raise CalibrationError(
                f"the camera_info of {self.frame_id} has distortion coefficients {list(self.distortion)}; "
                "all must be finite: calibrate the camera"
            )
        counts = (_PINHOLE_MODELS | _FISHEYE_MODELS).get(self.distortion_model)
        if counts is None or (len(self.distortion) not in counts and any(self.distortion)):
            known = ", ".join(name for name in (*_PINHOLE_MODELS, *_FISHEYE_MODELS) if name)
            raise CalibrationError(
                f"the camera_info of {self.frame_id} has distortion model '{self.distortion_model}' with "
                f"{len(self.distortion)} coefficients; known are {known}: rectify the images before recording"
            )

    def _maps(self, intrinsic: np.ndarray, width_px: int, height_px: int) -> tuple[np.ndarray, np.ndarray]:
        self.require_usable()
        make = cv2.fisheye.initUndistortRectifyMap
        if self.distortion_model not in _FISHEYE_MODELS:
            make = cv2.initUndistortRectifyMap
        return make(
            np.array(self.matrix).reshape(3, 3),
            np.array(self.distortion if any(self.distortion) else (0.0,) * 4),  # zeros may come in any number
            self.rectified_from_camera,
            intrinsic,
            (width_px, height_px),
            cv2.CV_32FC1,
        )


def rectified_jpeg(message: object, model: CameraModel, is_rectified: bool, quality: int) -> tuple[bytes, bool]:
    """An image message as a rectified JPEG, and whether its bytes are the camera's own.

    A JPEG that needs no rectification is kept byte for byte; anything else is encoded anew.

    Args:
        message: a decoded sensor_msgs/CompressedImage or sensor_msgs/Image.
        model: its camera.
        is_rectified: whether it is rectified already.
        quality: of a new encoding, 1..100.

    Raises:
        ImageError: it cannot be decoded, is cut short, or of another size than the camera_info says.
        CalibrationError: see ``CameraModel.maps``.
    """
    rectify = model.changes_images and not is_rectified
    data = np.asarray(message.data)
    is_compressed = hasattr(message, "format")
    size_px = encoded_size_px(data) if is_compressed else (message.width, message.height)
    _require_size(*size_px, model)
    if is_compressed and not rectify and data[:2].tobytes() == b"\xff\xd8":
        require_complete_jpeg(data)
        return data.tobytes(), True
    image = decoded(data) if is_compressed else _raw(message)
    if rectify:
        image = cv2.remap(image, *model.maps, interpolation=cv2.INTER_LINEAR)
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return encoded.tobytes(), False


def _raw(message: object) -> np.ndarray:
    return bgr_image(
        np.asarray(message.data),
        message.encoding,
        message.width,
        message.height,
        message.step,
        bool(message.is_bigendian),
    )


def _require_size(width_px: int, height_px: int, model: CameraModel) -> None:
    if (width_px, height_px) != (model.width_px, model.height_px):
        raise ImageError(
            f"the image is {width_px} x {height_px} px and the camera_info of {model.frame_id} says "
            f"{model.width_px} x {model.height_px}; make them agree"
        )
