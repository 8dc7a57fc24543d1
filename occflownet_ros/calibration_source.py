# SPDX-License-Identifier: Apache-2.0
"""The camera rig, put together from what arrives: intrinsics per camera_info, extrinsics from a file or from tf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import CalibrationError, OccflownetError
from occflownet_ros.camera_model import CameraModel
from occflownet_ros.live_transforms import TfExtrinsics


@dataclass(frozen=True)
class Intrinsics:
    """What a camera_info says of a rectified image.

    Attributes:
        frame_id: the camera's optical frame.
        width_px, height_px: image size.
        matrix: row-major 3 x 3, pixels.
        model: the camera behind it, where its images are yet to be rectified.
    """

    frame_id: str
    width_px: int
    height_px: int
    matrix: tuple[float, ...]
    model: CameraModel | None = None

    def array(self) -> np.ndarray:
        """[3, 3] float64."""
        return np.array(self.matrix, dtype=np.float64).reshape(3, 3)


def anchor_index(cameras: tuple[str, ...], anchor_camera: str) -> int:
    """Index of the anchor camera; the first where none is named.

    Raises:
        CalibrationError: the bundle has no such camera.
    """
    if not anchor_camera:
        return 0
    if anchor_camera not in cameras:
        raise CalibrationError(
            f"anchor_camera is '{anchor_camera}', but the bundle's cameras are {', '.join(cameras)}; choose one of them"
        )
    return cameras.index(anchor_camera)


def cameras_of_file(rig: CameraRig, names: Sequence[str], namespaces: Sequence[str]) -> tuple[Camera, ...]:
    """The file's camera for each of the network's: the one named as the namespace ends, else as the bundle says.

    Raises:
        CalibrationError: the file has neither for a camera.
    """
    by_name = {camera.name: camera for camera in rig}
    found = []
    for name, namespace in zip(names, namespaces, strict=True):
        camera = by_name.get(namespace.rstrip("/").rsplit("/", 1)[-1]) or by_name.get(name)
        if camera is None:
            raise CalibrationError(
                f"the calibration file has no camera for {namespace} ({name}); it has {', '.join(rig.names)}"
            )
        found.append(camera)
    return tuple(found)


class CalibrationSource:
    """Collects calibration until the rig is whole, and notices when it changes.

    Args:
        names: the network's cameras, in its order.
        info_topics: where each camera's intrinsics are awaited (for the sentence that names what is missing).
        file_cameras: cameras of a calibration file in the same order, or None.
        tf: extrinsics by frame where no file gives them, else None.
        use_file_intrinsics: take intrinsics from the file and wait for no camera_info.

    Attributes:
        rig: the vehicle's cameras under the network's names, None while something is missing or wrong.
        problem: one sentence about what is missing or wrong; empty while there is a rig.
        models: what to rectify each camera's images with, as the rig asks; None where they are rectified already.
        changes: how often a new rig was made.
    """

    def __init__(
        self,
        names: Sequence[str],
        info_topics: Sequence[str],
        file_cameras: Sequence[Camera] | None,
        tf: TfExtrinsics | None,
        use_file_intrinsics: bool,
    ) -> None:
        self.rig: CameraRig | None = None
        self.models: tuple[CameraModel | None, ...] = (None,) * len(names)
        self.problem = ""
        self.changes = 0
        self._names = tuple(names)
        self._info_topics = tuple(info_topics)
        self._file_cameras = file_cameras
        self._tf = tf
        self._intrinsics: list[Intrinsics | None] = [None] * len(self._names)
        self._refusals: dict[int, str] = {}
        if use_file_intrinsics:
            self._intrinsics = [
                Intrinsics(camera.name, camera.width_px, camera.height_px, tuple(camera.intrinsic.ravel().tolist()))
                for camera in file_cameras
            ]
        self.refresh()

    @property
    def frame_ids(self) -> tuple[str, ...]:
        """Optical frame of each camera of the rig; nothing while there is none."""
        return () if self.rig is None else tuple(intrinsics.frame_id for intrinsics in self._intrinsics)

    def set_intrinsics(self, camera: int, intrinsics: Intrinsics) -> bool:
        """Take over a camera_info; True if the rig changed."""
        if intrinsics == self._intrinsics[camera] and camera not in self._refusals:
            return False
        self._intrinsics[camera] = intrinsics
        self._refusals.pop(camera, None)
        return self.refresh()

    def refuse_intrinsics(self, camera: int, reason: str) -> bool:
        """A camera_info came that cannot be used: there is no rig until there is a better one. True if there was."""
        self._refusals[camera] = reason
        return self.refresh()

    def refresh(self) -> bool:
        """Try to put the rig together again (after extrinsics arrived); True if it changed."""
        before, models_before = self.rig, self.models
        try:
            self.rig, self.models = self._build(), self._models()
            self.problem = ""
        except OccflownetError as error:
            self.rig = None
            self.problem = str(error)
        changed = self.rig != before or self.models != models_before
        if not changed:
            self.rig = before
        self.changes += changed and self.rig is not None
        return changed

    def _build(self) -> CameraRig:
        if self._refusals:
            raise CalibrationError(next(iter(self._refusals.values())))
        silent = [topic for topic, i in zip(self._info_topics, self._intrinsics, strict=True) if i is None]
        if silent:
            raise CalibrationError(f"no camera_info yet on {', '.join(silent)}; publish it, or check the namespaces")
        extrinsics = [self._extrinsic(camera) for camera in range(len(self._names))]
        unknown = [i.frame_id for i, e in zip(self._intrinsics, extrinsics, strict=True) if e is None]
        if unknown:
            raise CalibrationError(self._tf.problem(unknown))
        return CameraRig(
            tuple(
                Camera(name, i.width_px, i.height_px, i.array(), extrinsic)
                for name, i, extrinsic in zip(self._names, self._intrinsics, extrinsics, strict=True)
            )
        )

    def _models(self) -> tuple[CameraModel | None, ...]:
        models = tuple(i.model if i.model is not None and i.model.changes_images else None for i in self._intrinsics)
        for model in models:
            if model is not None:
                model.require_usable()
        return models

    def _extrinsic(self, camera: int) -> np.ndarray | None:
        if self._file_cameras is not None:
            return self._file_cameras[camera].ego_from_camera
        return self._tf.of(self._intrinsics[camera].frame_id)
