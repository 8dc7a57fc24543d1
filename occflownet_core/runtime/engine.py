# SPDX-License-Identifier: Apache-2.0
"""The inference engine: what every backend does alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import CalibrationError, EngineError
from occflownet_core.lift_tables import LiftTables, build_lift_tables
from occflownet_core.runtime.bundle import FIELD_FEATURES, Bundle

SINGLE, HALF = "fp32", "fp16"
PRECISIONS = (SINGLE, HALF)


@dataclass(frozen=True)
class Prediction:
    """What one inference yields.

    Attributes:
        labels: uint8 [X, Y, Z] on the bundle's grid.
        probability: float [X, Y, Z], probability of being occupied, or None where the graph has no such output.
        velocity_mps: float [X, Y, Z, 3] in the ego frame, or None.
        field_features: float [1, Z, Y, X, C], what ``FieldQuery.field`` reads; None unless the engine keeps the field.
    """

    labels: np.ndarray
    probability: np.ndarray | None = None
    velocity_mps: np.ndarray | None = None
    field_features: np.ndarray | None = None

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, np.ndarray]) -> Prediction:
        """Of a graph's outputs by name; of those that are no part of a prediction, nothing."""
        names = ("labels", "occupancy_probability", "velocity", FIELD_FEATURES)
        return cls(*(outputs.get(name) for name in names))


class Engine(ABC):
    """Runs a bundle's model and keeps its recurrent memory between calls.

    Used from one thread at a time. ``calibrate`` comes first and again whenever, and only when, a calibration changes.

    Attributes:
        bundle: what it runs.
        name: the backend, for logs and diagnostics.
        precision: ``fp32`` (as exported) or ``fp16``.
    """

    name: str
    precision: str = SINGLE

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.occupancy_threshold = bundle.occupancy_threshold
        self._tables: LiftTables | None = None
        self._missing: frozenset[int] = frozenset()
        self._keep_field = False

    @property
    def keep_field(self) -> bool:
        """Whether predictions bring the features that queries read (megabytes a frame); may be set between runs.

        Raises:
            EngineError: (on setting) the bundle has no graph for queries.
        """
        return self._keep_field

    @keep_field.setter
    def keep_field(self, value: bool) -> None:
        if value and not self.bundle.field_channels:
            raise EngineError(
                f"model '{self.bundle.name}' was exported without its field, so it cannot be queried; export it again"
            )
        self._keep_field = value

    @property
    def delivered(self) -> tuple[str, ...]:
        """Names of the graph's outputs that a prediction is made of."""
        return (*self.bundle.outputs, *((FIELD_FEATURES,) if self._keep_field else ()))

    @property
    def occupancy_threshold(self) -> float:
        """Probability above which a voxel is occupied; may be set between runs.

        Raises:
            EngineError: (on setting) the value is not in 0..1.
        """
        return self._occupancy_threshold

    @occupancy_threshold.setter
    def occupancy_threshold(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise EngineError(f"occupancy_threshold is {value}; give a probability from 0 to 1")
        self._occupancy_threshold = float(value)

    def calibrate(self, rig: CameraRig) -> None:
        """Build the calibration tables. The memory is kept: it lies in the ego frame.

        Args:
            rig: the vehicle's cameras as their images arrive (before resizing), at least the bundle's by name or,
                if no name agrees, as many as the bundle has, in its order.

        Raises:
            CalibrationError: the number of cameras differs from the bundle's, or a camera cannot be used.
        """
        bundle = self.bundle
        if set(rig.names) & set(bundle.cameras):
            rig = rig.ordered(bundle.cameras)
        elif len(rig) != len(bundle.cameras):
            raise CalibrationError(
                f"model '{bundle.name}' takes {len(bundle.cameras)} cameras ({', '.join(bundle.cameras)}), "
                f"the vehicle has {len(rig)} ({', '.join(rig.names)}); choose a model for that many, or name them alike"
            )
        seen = [bundle.image_transform(camera.width_px, camera.height_px).camera(camera) for camera in rig]
        self._tables = build_lift_tables(CameraRig(tuple(seen)), bundle.lift)
        self._missing = frozenset()
        self._load_tables(self._tables)

    def infer(
        self,
        images: np.ndarray,
        previous_from_current: np.ndarray | None,
        missing_cameras: Collection[int] = (),
    ) -> Prediction:
        """Run the model on one set of images and advance the memory.

        Args:
            images: uint8 RGB [N, H, W, 3] at the bundle's image size, in the bundle's camera order.
            previous_from_current: [4, 4], pose of the current ego frame in the ego frame of the previous call;
                None forgets the memory first (first frame, time jump, pose jump, no odometry).
            missing_cameras: indices whose images are absent (their content is ignored).

        Raises:
            EngineError: ``calibrate`` was not called, the images have another shape, or the backend failed.
        """
        self._require_images(images)
        self._leave_out(frozenset(missing_cameras))
        if previous_from_current is None:
            self.reset()
            previous_from_current = np.eye(4)
        return self._forward(np.ascontiguousarray(images), np.ascontiguousarray(previous_from_current, np.float32))

    @abstractmethod
    def reset(self) -> None:
        """Forget the memory."""

    def memory(self) -> dict[str, np.ndarray]:
        """A copy of what the next run would remember, by the name of the graph's output; for comparing engines.

        An engine may have none to show.
        """
        return {}

    def close(self) -> None:
        """Give back what the engine holds beyond its own memory; nothing may be asked of it afterwards."""
        return

    @abstractmethod
    def _load_tables(self, tables: LiftTables) -> None:
        """Take over calibration tables for the runs to come."""

    @abstractmethod
    def _forward(self, images: np.ndarray, previous_from_current: np.ndarray) -> Prediction:
        """One run on checked inputs: uint8 [N, H, W, 3] and float32 [4, 4], both contiguous."""

    def _require_images(self, images: np.ndarray) -> None:
        if self._tables is None:
            raise EngineError("the engine has no calibration yet; call calibrate(rig) before infer(...)")
        expected = (len(self.bundle.cameras), self.bundle.image_height_px, self.bundle.image_width_px, 3)
        if images.shape != expected or images.dtype != np.uint8:
            raise EngineError(
                f"images are {images.dtype} {images.shape}, model '{self.bundle.name}' takes uint8 {expected}; "
                "prepare them with bundle.image_transform"
            )

    def _leave_out(self, missing: frozenset[int]) -> None:
        if missing == self._missing:
            return
        if not missing <= set(range(len(self.bundle.cameras))):
            raise EngineError(f"missing_cameras is {sorted(missing)}; indices run to {len(self.bundle.cameras) - 1}")
        self._load_tables(self._tables.without(missing))
        self._missing = missing


def warm_up(engine: Engine) -> None:
    """Run the engine on black images of a made-up rig, so that the first real set is not the slow one."""
    bundle = engine.bundle
    width_px, height_px = bundle.image_width_px, bundle.image_height_px
    intrinsic = np.array([[width_px / 2, 0, width_px / 2], [0, width_px / 2, height_px / 2], [0, 0, 1]])
    forward = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])  # optical axis along x
    cameras = []
    for k, name in enumerate(bundle.cameras):
        half_rad = np.pi * k / len(bundle.cameras)
        turned = poses.pose(np.zeros(3), np.array([np.cos(half_rad), 0, 0, np.sin(half_rad)]))
        cameras.append(Camera(name, width_px, height_px, intrinsic, turned @ forward))
    engine.calibrate(CameraRig(tuple(cameras)))
    images = np.zeros((len(cameras), height_px, width_px, 3), dtype=np.uint8)
    for _ in range(2):  # ONNX Runtime plans its memory after the first run
        engine.infer(images, None)
    engine.reset()
