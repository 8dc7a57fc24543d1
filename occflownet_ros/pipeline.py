# SPDX-License-Identifier: Apache-2.0
"""From arriving images to published voxels: assembler, decoding threads, engine thread. No ROS calls but publishing."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import ImageError
from occflownet_core.occupancy_frame import OccupancyFrame
from occflownet_core.preprocess import ImageTransform
from occflownet_core.runtime.engine import Engine
from occflownet_ros import conversions
from occflownet_ros.cadence import Cadence, CameraStamps
from occflownet_ros.camera_model import CameraModel
from occflownet_ros.diagnostics import Complaints, LatencyWindow, traced
from occflownet_ros.ego_motion import EgoMotion, PoseBuffer
from occflownet_ros.frame_assembler import DROP, FrameAssembler, ImageSet
from occflownet_ros.parameters import Settings
from occflownet_ros.publishers import Outputs

_STOP_TIMEOUT_S = 10.0
_SHORTEST_WAIT_S = 1e-3
_PERIODS_AHEAD = 2


@dataclass
class _Arrival:
    """An image message on its way through a set.

    Attributes:
        message: as received.
        arrived_s: monotonic clock.
        decoded: result of decoding for ``view``, once begun.
    """

    message: object
    arrived_s: float
    view: _View | None = None
    decoded: Future | None = None

    def give_up(self) -> None:
        """Nobody will ask for it: what waits to be decoded before it must not wait for it."""
        if self.decoded is not None:
            self.decoded.cancel()


@dataclass(frozen=True)
class _View:
    """How one camera's images become the network's.

    Attributes:
        size_px: width and height that its calibration says.
        model: what to rectify them with, None where they are rectified.
    """

    size_px: tuple[int, int]
    model: CameraModel | None


@dataclass(frozen=True)
class PipelineReport:
    """Counters at one moment.

    Attributes:
        images: per camera: the assembler's outcomes, plus ``undecodable``.
        sets: the assembler's counters, plus processed, undecodable, failed.
        poses: the pose buffer's.
        resets: of the memory, by cause.
        reset_reason: of the latest reset, empty while there was none.
        calibration_problem: why the engine refuses the rig, empty if it does not.
        last_image_s: arrival of each camera's last image on the monotonic clock, None before the first.
        cadences: what each camera's stamps say about images that never came.
        last_pose_s: arrival of the last pose on the monotonic clock, None before the first.
    """

    images: list[Counter[str]]
    sets: Counter[str]
    poses: Counter[str]
    resets: Counter[str]
    reset_reason: str
    calibration_problem: str
    last_image_s: list[float | None]
    cadences: list[Cadence]
    last_pose_s: float | None


class Pipeline:
    """Everything between the callbacks and the publishers. One per activation.

    Args:
        engine: warmed up; used from this pipeline's thread alone while it runs.
        settings: as configured.
        anchor: index of the anchor camera.
        outputs: where frames go.
        complain: takes (subject, sentence) about trouble.
        clock_s: what ``deadline_ms`` is counted on; bag time, where a bag gives the time.

    Attributes:
        latency: of the last sets, per stage.
        anchor: as given.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        anchor: int,
        outputs: Outputs,
        complain: Complaints,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.latency = LatencyWindow()
        self.anchor = anchor
        self._engine = engine
        self._outputs = outputs
        self._complain = complain
        self._cameras = engine.bundle.cameras
        self._assembler: FrameAssembler[_Arrival] = FrameAssembler(
            len(self._cameras),
            anchor,
            settings.max_camera_time_diff_ms,
            settings.deadline_ms,
            settings.missing_cameras,
            clock_s,
            on_unused=_Arrival.give_up,
        )
        self._clock_s = clock_s
        self._poses = PoseBuffer(settings.odom_max_gap_ms)
        self._ego_motion = EgoMotion(settings.memory_max_gap_s, settings.max_speed_mps, settings.max_yaw_rate_rps)
        self._rig: CameraRig | None = None
        self._models: tuple[CameraModel | None, ...] = (None,) * len(self._cameras)
        self._rectifications: dict[_View, conversions.RemapTables] = {}
        self._engine_rig: CameraRig | None = None
        self._calibration_problem = ""
        self._undecodable = [Counter() for _ in self._cameras]
        self._last_image_s: list[float | None] = [None] * len(self._cameras)
        self._stamps = [CameraStamps() for _ in self._cameras]
        self._last_pose_s: float | None = None
        self._waited_in_vain_after: int | None = None
        self._sets: Counter[str] = Counter()
        self._is_stopping = False
        self._busy_until_s = 0.0
        # One condition guards all of the above; it is never held while decoding, inferring or publishing.
        self._changed = threading.Condition()
        self._decoders = ThreadPoolExecutor(settings.decode_threads or os.cpu_count() or 1, "decode")
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self.apply(settings)

    # Fed by the callbacks

    def add_image(self, camera: int, stamp_ns: int, message: object) -> None:
        """An image arrived: begin to decode it if it may be used, and see whether it completes a set."""
        arrival = _Arrival(message, time.monotonic())
        with self._changed:
            self._last_image_s[camera] = arrival.arrived_s
            self._stamps[camera].add(stamp_ns)
            if self._rig is not None and self._may_be_used(arrival.arrived_s):
                self._begin_decoding(camera, arrival, self._rig[camera], self._models[camera])
            self._assembler.add(camera, stamp_ns, arrival)
            self._changed.notify()

    def add_pose(self, stamp_ns: int, position_m: np.ndarray, quaternion_wxyz: np.ndarray) -> None:
        """A pose of the vehicle arrived, from odometry or from tf.

        Raises:
            GeometryError: it holds no pose.
        """
        with self._changed:
            self._poses.add(stamp_ns, position_m, quaternion_wxyz)
            self._last_pose_s = time.monotonic()
            self._changed.notify()

    def set_rig(self, rig: CameraRig | None, models: Sequence[CameraModel | None] | None = None) -> None:
        """The calibration became known, changed, or was lost (None: sets wait).

        Args:
            rig: of rectified images.
            models: what to rectify each camera's images with; None where all are rectified.
        """
        with self._changed:
            self._rig, self._models = rig, tuple(models or (None,) * len(self._cameras))
            self._rectifications = {
                view: maps for view, maps in self._rectifications.items() if view.model in self._models
            }
            self._changed.notify()

    def apply(self, settings: Settings) -> None:
        """Take over the parameters that may change while running."""
        with self._changed:
            self._settings = settings
            self._assembler.max_diff_ms = settings.max_camera_time_diff_ms
            self._assembler.deadline_ms = settings.deadline_ms
            self._assembler.missing_cameras = settings.missing_cameras
            self._poses.max_gap_ms = settings.odom_max_gap_ms
            self._ego_motion.max_gap_s = settings.memory_max_gap_s
            self._ego_motion.max_speed_mps = settings.max_speed_mps
            self._ego_motion.max_yaw_rate_rps = settings.max_yaw_rate_rps
            self._engine.occupancy_threshold = settings.threshold(self._engine.bundle.occupancy_threshold)
            self._changed.notify_all()  # what waits, waits by the new values

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop after the set at hand."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT_S)

    def report(self) -> PipelineReport:
        with self._changed:
            return PipelineReport(
                [a + b for a, b in zip(self._assembler.images, self._undecodable, strict=True)],
                self._assembler.sets + self._sets,
                self._poses.counters.copy(),
                self._ego_motion.resets.copy(),
                self._ego_motion.last_reason,
                self._calibration_problem,
                list(self._last_image_s),
                [stamps.cadence() for stamps in self._stamps],
                self._last_pose_s,
            )

    # The inference thread, top to bottom

    def _run(self) -> None:
        while not self._is_stopping:
            free_s = time.monotonic()
            try:
                if (image_set := self._next_set()) is not None:
                    self._process(image_set, free_s)
            except Exception as error:
                if self._is_stopping or not self._outputs.is_alive:
                    return
                self._fail(error)

    def _next_set(self) -> ImageSet[_Arrival] | None:
        """Wait for the newest set; None when stopping, or after a new rig's tables were built instead."""
        with self._changed:
            while not self._is_stopping and (self._rig is None or self._rig is self._engine_rig):
                is_ready = self._rig is not None and not self._calibration_problem
                if is_ready and (image_set := self._assembler.take()) is not None:
                    return image_set
                deadline_s = self._assembler.next_deadline_s() if is_ready else None
                # A set that is due is closed by take(). Bag time may be slower than the wait, or stand still.
                self._changed.wait(None if deadline_s is None else max(deadline_s - self._clock_s(), _SHORTEST_WAIT_S))
            rig = self._rig
        if not self._is_stopping:
            self._calibrate(rig)
        return None

    def _calibrate(self, rig: CameraRig) -> None:
        """Rebuild the engine's tables; a rig that it refuses stops the output until there is another."""
        problem = ""
        try:
            self._engine.calibrate(rig)
        except Exception as error:  # were it passed on, the same rig would be tried again at once, without end
            problem = str(error)
            self._complain("calibration", f"{problem}{traced(error)}")
        with self._changed:
            self._engine_rig, self._calibration_problem = rig, problem

    def _process(self, image_set: ImageSet[_Arrival], free_s: float) -> None:
        """From a set to its outputs; ``free_s`` is when the set before was done."""
        taken_s = time.monotonic()
        rig = self._engine_rig
        images, missing, decoded_s = self._decoded(image_set, rig)
        if len(missing) == len(self._cameras) or (missing and self._settings.missing_cameras == DROP):
            self._count("undecodable")
            return
        previous_from_current = self._motion_to(image_set.stamp_ns)
        started_s = time.monotonic()
        self._busy_until_s = started_s + self.latency.median_ms("engine") / 1e3
        self._engine.keep_field = self._outputs.wants_field()
        prediction = self._engine.infer(images, previous_from_current, missing)
        inferred_s = time.monotonic()
        self._busy_until_s = 0.0
        arrivals_s = [arrival.arrived_s for arrival in image_set.images if arrival is not None]
        arrived_s, begun_s = max(arrivals_s), max(decoded_s, taken_s)
        busy_s = max(free_s - arrived_s, 0.0)
        latency_ms = {
            "receive": 1e3 * (arrived_s - min(arrivals_s)),
            "busy": 1e3 * busy_s,
            "decode": 1e3 * (begun_s - taken_s),
            "wait": 1e3 * (taken_s - arrived_s - busy_s + started_s - begun_s),
            "engine": 1e3 * (inferred_s - started_s),
        }
        frame = OccupancyFrame(
            image_set.stamp_ns,
            self._settings.base_frame,
            self._engine.bundle.grid,
            prediction.labels,
            prediction.probability,
            prediction.velocity_mps,
            prediction.field_features,
            latency_ms,
        )
        self._outputs.publish(frame)
        published_s = time.monotonic()
        latency_ms["publish"] = 1e3 * (published_s - inferred_s)
        latency_ms["total"] = 1e3 * (published_s - arrived_s)
        self._outputs.publish_latency(latency_ms)
        with self._changed:
            self._sets["processed"] += 1
            self.latency.add(latency_ms)

    def _decoded(self, image_set: ImageSet[_Arrival], rig: CameraRig) -> tuple[np.ndarray, list[int], float]:
        """The set's images [N, H, W, 3], the cameras without a usable one, and when the last was decoded."""
        bundle = self._engine.bundle
        images = np.zeros((len(rig), bundle.image_height_px, bundle.image_width_px, 3), dtype=np.uint8)
        missing, finished_s = [], 0.0
        models = self._models
        for camera, arrival in enumerate(image_set.images):
            if arrival is not None:
                self._begin_decoding(camera, arrival, rig[camera], models[camera])
        for camera, arrival in enumerate(image_set.images):
            pixels, at_s = arrival.decoded.result() if arrival is not None else (None, 0.0)
            finished_s = max(finished_s, at_s, arrival.arrived_s if arrival is not None else 0.0)
            if pixels is None:
                missing.append(camera)
            else:
                images[camera] = pixels
        return images, missing, finished_s

    def _motion_to(self, stamp_ns: int) -> np.ndarray | None:
        """``previous_from_current`` at the stamp, after a short wait for odometry that is about to reach it."""
        with self._changed:
            # Odometry that does not come, or has stopped, is waited for once and not again until some comes.
            if self._settings.follows != "none" and self._poses.counters["received"] != self._waited_in_vain_after:
                wait_s = self._settings.odom_wait_ms / 1e3
                if not self._changed.wait_for(lambda: self._is_stopping or self._poses.reaches(stamp_ns), wait_s):
                    self._waited_in_vain_after = self._poses.counters["received"]
            return self._ego_motion.step(stamp_ns, *self._poses.look_up(stamp_ns))

    # Decoding threads

    def _may_be_used(self, arrived_s: float) -> bool:
        """Whether the set of an image that arrived now may be the one that the engine takes next.

        While the engine works, every new set replaces the one before. Its cameras' images arrive within a period, and a
        set that began two periods before the engine is free will have a successor by then: its images would be decoded
        for nothing, and take the cores from the engine. If the guess was wrong they are decoded when the set is taken.
        """
        period_s = self._assembler.anchor_period_s
        return period_s is None or self._busy_until_s - arrived_s < _PERIODS_AHEAD * period_s

    def _begin_decoding(self, camera: int, arrival: _Arrival, calibrated: Camera, model: CameraModel | None) -> None:
        """Decode for this calibration, unless that is under way."""
        view = _View((calibrated.width_px, calibrated.height_px), model)
        if arrival.view != view:
            arrival.view = view
            arrival.decoded = self._decoders.submit(self._decode, camera, arrival.message, view)

    def _decode(self, camera: int, message: object, view: _View) -> tuple[np.ndarray | None, float]:
        """The network's image and when it was ready; no image if the message holds none."""
        transform = self._engine.bundle.image_transform(*view.size_px)
        try:
            return conversions.network_image(message, transform, self._rectification(view, transform)), time.monotonic()
        except (ImageError, cv2.error) as error:
            with self._changed:
                self._undecodable[camera]["undecodable"] += 1
            self._complain(f"image {camera}", f"{self._cameras[camera]}: {error}")
            return None, time.monotonic()

    def _rectification(self, view: _View, transform: ImageTransform) -> conversions.RemapTables | None:
        """A view's tables, made once; two threads may make the same."""
        if view.model is None:
            return None
        tables = self._rectifications.get(view)
        if tables is None:
            tables = self._rectifications[view] = view.model.network_maps(transform)
        return tables

    # Trouble

    def _count(self, outcome: str) -> None:
        with self._changed:
            self._sets[outcome] += 1

    def _fail(self, error: Exception) -> None:
        """A set could not be processed: say so, forget the memory, go on with the next."""
        self._count("failed")
        with self._changed:
            self._ego_motion.forget("engine", f"memory forgotten after a failure: {error}")
        self._complain("engine", f"a set could not be processed: {error}{traced(error)}")
