# SPDX-License-Identifier: Apache-2.0
"""A pipeline between an engine and outputs that write down what they are given."""

from __future__ import annotations

import array
import time

import cv2
import numpy as np
from sensor_msgs.msg import CompressedImage

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import CalibrationError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE
from occflownet_core.lift_tables import DepthBins, LiftSpec
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.engine import Engine, Prediction
from occflownet_ros.parameters import Settings
from occflownet_ros.pipeline import Pipeline

MS = 1_000_000
GRID = VoxelGrid((0, 0, 0), (4, 4, 4), 1.0)
WIDTH_PX, HEIGHT_PX = 64, 32


def bundle(folder) -> Bundle:
    lift = LiftSpec(GRID, DepthBins(1.0, 5.0, 1.0), feature_height=2, feature_width=4)
    return Bundle(
        folder,
        "written-down",
        ("LEFT", "RIGHT"),
        WIDTH_PX,
        HEIGHT_PX,
        GRID,
        lift,
        occupancy_threshold=0.4,
        field_channels=2,
    )


class WritingEngine(Engine):
    """Writes down its calls; fails where it is told to."""

    name = "writing"

    def __init__(self, described: Bundle) -> None:
        super().__init__(described)
        self.calls: list[tuple[np.ndarray, np.ndarray | None, tuple[int, ...]]] = []
        self.rigs: list[CameraRig] = []
        self.kept_field: list[bool] = []
        self.fail_with: Exception | None = None
        self.seconds = 0.0

    def calibrate(self, rig):
        self.rigs.append(rig)
        if rig[0].intrinsic[0, 0] == 666:
            raise CalibrationError("LEFT looks the wrong way")

    def infer(self, images, previous_from_current, missing_cameras=()):
        self.calls.append((images, previous_from_current, tuple(missing_cameras)))
        self.kept_field.append(self.keep_field)
        time.sleep(self.seconds)
        if self.fail_with is not None:
            failure, self.fail_with = self.fail_with, None
            raise failure
        features = np.zeros(self.bundle.field_features_shape) if self.keep_field else None
        return Prediction(np.full(GRID.shape, FREE, dtype=np.uint8), field_features=features)

    def reset(self):
        pass

    _load_tables = _forward = None  # calibrate and infer, which would ask them, are replaced whole


class WritingOutputs:
    is_alive = True

    def __init__(self) -> None:
        self.frames, self.latencies = [], []
        self.meshes_every: int | None = None
        self._asked = 0

    def wants_field(self) -> bool:
        self._asked += 1
        return self.meshes_every is not None and self._asked % self.meshes_every == 0

    def publish(self, frame) -> None:
        self.frames.append(frame)

    def publish_latency(self, latency_ms) -> None:
        self.latencies.append(dict(latency_ms))


def rig(fx_px: float = 50.0, width_px: int = WIDTH_PX) -> CameraRig:
    intrinsic = np.array([[fx_px, 0, 32], [0, 50.0, 16], [0, 0, 1]])
    return CameraRig(tuple(Camera(name, width_px, HEIGHT_PX, intrinsic, np.eye(4)) for name in ("LEFT", "RIGHT")))


def message(grey: int, width_px: int = WIDTH_PX) -> CompressedImage:
    data = cv2.imencode(".png", np.full((HEIGHT_PX, width_px, 3), grey, dtype=np.uint8))[1]
    return CompressedImage(format="png", data=array.array("B", data.tobytes()))


class Bench:
    def __init__(self, folder, clock_s=time.monotonic, **settings) -> None:
        self.said = []
        self.engine, self.outputs = WritingEngine(bundle(folder)), WritingOutputs()
        self.settings = Settings(**{"odom_wait_ms": 0.0, **settings})
        self.pipeline = Pipeline(self.engine, self.settings, 0, self.outputs, self.complain, clock_s)
        self.pipeline.start()

    def complain(self, subject: str, sentence: str) -> None:
        self.said.append((subject, sentence))

    def sweep(self, stamp_ms: int, *images: CompressedImage) -> None:
        for camera, image in enumerate(images or (message(10), message(20))):
            self.pipeline.add_image(camera, stamp_ms * MS, image)

    def until(self, condition, timeout_s: float = 5.0) -> None:
        until_s = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < until_s:
            time.sleep(0.002)
        assert condition()
