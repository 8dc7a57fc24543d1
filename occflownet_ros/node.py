# SPDX-License-Identifier: Apache-2.0
"""The lifecycle node ``occflownet``: configure loads and warms the engine, activate subscribes and publishes.

Data flows top to bottom: callbacks -> Pipeline (assembler, decoding, engine) -> Outputs (publishers).
"""

from __future__ import annotations

import functools
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry
from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import CalibrationError, GeometryError, OccflownetError
from occflownet_core.rig_file import load_rig
from occflownet_core.runtime.bundle import Bundle, load_bundle
from occflownet_core.runtime.engine import Engine, create_engine
from occflownet_ros import conversions, diagnostics, parameters
from occflownet_ros.calibration_source import CalibrationSource, anchor_index, cameras_of_file
from occflownet_ros.parameters import ParameterError, Settings
from occflownet_ros.pipeline import Pipeline, PipelineReport
from occflownet_ros.publishers import Outputs
from occflownet_ros.tf_adapter import TfExtrinsics

_SUCCESS, _FAILURE, _ERROR = (
    TransitionCallbackReturn.SUCCESS,
    TransitionCallbackReturn.FAILURE,
    TransitionCallbackReturn.ERROR,
)
_DIAGNOSTICS_PERIOD_S = 1.0
_ODOMETRY_DEPTH = 50
_IMAGE_TOPICS = {  # below a camera's namespace, by image_transport and rectify; named as image_proc names them
    ("compressed", False): "image_rect_compressed",
    ("raw", False): "image_rect",
    ("compressed", True): "image_raw/compressed",
    ("raw", True): "image_raw",
}
_CDR_STAMP_END = 12  # encapsulation header, then the header's stamp


def _transition(step: Callable) -> Callable:
    """Log what goes wrong in a transition: a user's mistake as one sentence and FAILURE, anything else as ERROR."""

    @functools.wraps(step)
    def run(self: OccflownetNode, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return step(self, state)
        except OccflownetError as error:
            self.get_logger().error(str(error))
            self.release() if step.__name__ == "on_configure" else self._stop()
            return _FAILURE
        except Exception:
            self.get_logger().error(traceback.format_exc())
            return _ERROR

    return run


class OccflownetNode(LifecycleNode):
    """Cameras in, semantic voxels out; see docs/topics_and_parameters.md."""

    def __init__(self, **kwargs) -> None:
        super().__init__("occflownet", **kwargs)
        self._complain = diagnostics.Complaints(self.get_logger().warning, time.monotonic)
        self._settings: Settings | None = None
        self._bundle: Bundle | None = None
        self._engine: Engine | None = None
        self._outputs: Outputs | None = None
        self._diagnostics = None
        self._calibration: CalibrationSource | None = None
        self._pipeline: Pipeline | None = None
        self._tf: TfExtrinsics | None = None
        self._active_subscriptions: list = []
        self._timer = None
        self._declare_parameters()

    # Transitions

    @_transition
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._settings = self._read_settings()
        cv2.setNumThreads(1)  # images are decoded side by side; each on its own thread
        if not self._settings.bundle:
            raise ParameterError("the parameter bundle is empty; give the folder of a model bundle")
        self._bundle = load_bundle(self._settings.bundle)
        anchor_index(self._bundle.cameras, self._settings.anchor_camera)
        self._file_cameras = self._load_calibration_file()
        self._engine = create_engine(self._bundle, self._settings.backend, self._settings.threads or None)
        warm_up(self._engine)
        self._outputs = Outputs(self, self._settings)
        self._diagnostics = self.create_lifecycle_publisher(DiagnosticArray, "/diagnostics", QoSProfile(depth=10))
        self.get_logger().info(
            f"configured: model '{self._bundle.name}' on {self._engine.name}, {len(self._bundle.cameras)} cameras"
        )
        return super().on_configure(state)

    @_transition
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        result = super().on_activate(state)
        self._outputs.restart()
        self._calibration = self._make_calibration()
        anchor = anchor_index(self._bundle.cameras, self._settings.anchor_camera)
        clock_s = self._bag_time_s if self.get_parameter("use_sim_time").value else time.monotonic
        self._pipeline = Pipeline(self._engine, self._settings, anchor, self._outputs, self._complain, clock_s)
        self._pipeline.set_rig(self._calibration.rig, self._calibration.models)
        self._pipeline.start()
        self._subscribe()
        self._activated_s = self._reported_s = time.monotonic()
        self._last_report = self._pipeline.report()
        self._timer = self.create_timer(
            _DIAGNOSTICS_PERIOD_S, self._report, clock=Clock(clock_type=ClockType.STEADY_TIME)
        )
        return result

    @_transition
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop()
        return super().on_deactivate(state)

    @_transition
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.release()
        return _SUCCESS

    @_transition
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.release()
        return _SUCCESS

    @_transition
    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.release()
        return _SUCCESS

    # Callbacks

    def _on_image(self, camera: int, message: CompressedImage | Image) -> None:
        self._pipeline.add_image(camera, conversions.nanoseconds(message.header.stamp), message)

    def _on_camera_info(self, camera: int, serialised: bytes) -> None:
        content = serialised[_CDR_STAMP_END:]
        if content == self._info_content[camera]:
            return
        self._info_content[camera] = content
        try:
            message = deserialize_message(serialised, CameraInfo)
            intrinsics = conversions.intrinsics_from_info(message, self._settings.rectify)
        except CalibrationError as error:
            self._complain(f"camera_info {camera}", str(error))
            return
        if self._calibration.set_intrinsics(camera, intrinsics):
            self._calibration_changed()

    def _on_static_transforms(self) -> None:
        if self._calibration is not None and self._calibration.refresh():
            self._calibration_changed()

    def _calibration_changed(self) -> None:
        self._pipeline.set_rig(self._calibration.rig, self._calibration.models)
        if self._calibration.rig is not None:
            self.get_logger().info("calibration complete" if self._calibration.changes == 1 else "calibration changed")

    def _on_odometry(self, message: Odometry) -> None:
        child = message.child_frame_id.lstrip("/")
        if child and child != self._settings.base_frame:
            self._complain(
                "odometry frame",
                f"odometry on {self._settings.odom_topic} is of frame '{child}', not of '{self._settings.base_frame}'; "
                "ego motion will be wrong unless they move alike",
            )
        try:
            self._pipeline.add_pose(
                conversions.nanoseconds(message.header.stamp), *conversions.pose_from_odometry(message)
            )
        except GeometryError as error:
            self._complain("odometry", f"odometry on {self._settings.odom_topic} refused: {error}")

    # Building

    def _subscribe(self) -> None:
        settings = self._settings
        image_type = CompressedImage if settings.image_transport == "compressed" else Image
        suffix = _IMAGE_TOPICS[settings.image_transport, settings.rectify]
        reliability = ReliabilityPolicy[settings.image_reliability.upper()]
        image_qos = QoSProfile(depth=settings.image_depth, reliability=reliability)
        # Best effort matches any publisher; what is lost here is sent again with the next message.
        state_qos = QoSProfile(depth=_ODOMETRY_DEPTH, reliability=ReliabilityPolicy.BEST_EFFORT)
        odom_qos = QoSProfile(depth=_ODOMETRY_DEPTH, reliability=ReliabilityPolicy[settings.odom_reliability.upper()])
        self._image_topics = [f"{namespace}/{suffix}" for namespace in self._namespaces()]
        self._info_content: list[bytes | None] = [None] * len(self._image_topics)
        subscribe = self.create_subscription
        if settings.odom_topic:
            self._active_subscriptions.append(subscribe(Odometry, settings.odom_topic, self._on_odometry, odom_qos))
        if settings.intrinsics_source == "camera_info":
            for camera, topic in enumerate(self._info_topics()):
                on_info = partial(self._on_camera_info, camera)
                self._active_subscriptions.append(subscribe(CameraInfo, topic, on_info, state_qos, raw=True))
        for camera, topic in enumerate(self._image_topics):
            on_image = partial(self._on_image, camera)
            self._active_subscriptions.append(subscribe(image_type, topic, on_image, image_qos))

    def _namespaces(self) -> tuple[str, ...]:
        return self._settings.camera_namespaces or tuple(f"/{name}" for name in self._bundle.cameras)

    def _info_topics(self) -> list[str]:
        return [f"{namespace}/camera_info" for namespace in self._namespaces()]

    def _load_calibration_file(self) -> tuple[Camera, ...] | None:
        names, namespaces = self._bundle.cameras, self._namespaces()
        if len(namespaces) != len(names):
            raise ParameterError(
                f"camera_namespaces names {len(namespaces)} cameras, the bundle has {len(names)} ({', '.join(names)}); "
                "give one namespace for each, in that order"
            )
        path = self._settings.calibration_file
        return cameras_of_file(load_rig(path), names, namespaces) if path else None

    def _make_calibration(self) -> CalibrationSource:
        if self._file_cameras is None:
            try:
                self._tf = TfExtrinsics(self, self._settings.base_frame, self._on_static_transforms)
            except CalibrationError as error:
                self._complain("tf", str(error))
        return CalibrationSource(
            self._bundle.cameras,
            self._info_topics(),
            self._settings.base_frame,
            self._file_cameras,
            self._tf,
            self._settings.intrinsics_source == "calibration_file",
        )

    def _bag_time_s(self) -> float:
        return self.get_clock().now().nanoseconds / 1e9

    def _stop(self) -> None:
        """Undo activation; harmless when not active."""
        for subscription in self._active_subscriptions:
            self.destroy_subscription(subscription)
        self._active_subscriptions.clear()
        if self._timer is not None:
            self.destroy_timer(self._timer)
        if self._tf is not None:
            self._tf.close()
        if self._pipeline is not None:
            self._pipeline.stop()
        self._timer = self._tf = self._pipeline = self._calibration = None

    def release(self) -> None:
        """Undo activation and configuration; harmless in any state."""
        self._stop()
        if self._outputs is not None:
            self._outputs.close()
        if self._diagnostics is not None:
            self.destroy_lifecycle_publisher(self._diagnostics)
        self._outputs = self._diagnostics = self._engine = self._bundle = self._settings = None

    # Parameters

    def _declare_parameters(self) -> None:
        for name, default in parameters.defaults().items():
            text, limits = parameters.describe(name)
            # Typed and checked by our own table at configure: rclpy would refuse with an exception at construction.
            descriptor = ParameterDescriptor(description=text, additional_constraints=limits, dynamic_typing=True)
            self.declare_parameter(name, default, descriptor)
        for name in self._parameter_overrides:
            if not self.has_parameter(name) and "." not in name:
                self.get_logger().warning(parameters.unknown_parameter(name))
        self.add_on_set_parameters_callback(self._on_set_parameters)

    def _read_settings(self, changed: dict[str, object] | None = None) -> Settings:
        current = {name: self.get_parameter(name).value for name in parameters.NAMES}
        return Settings.from_values({**current, **(changed or {})})

    def _on_set_parameters(self, changes: list) -> SetParametersResult:
        changed = {change.name: change.value for change in changes if change.name in parameters.NAMES}
        if self._settings is None or not changed:
            return SetParametersResult(successful=True)  # checked at configure
        fixed = sorted(set(changed) - parameters.LIVE)
        if fixed:
            reason = (
                f"{', '.join(fixed)} is fixed while the node is configured; clean it up, change it, configure again"
            )
            return SetParametersResult(successful=False, reason=reason)
        try:
            self._settings = self._read_settings(changed)
        except ParameterError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self._outputs.settings = self._settings
        if self._pipeline is not None:
            self._pipeline.apply(self._settings)
        return SetParametersResult(successful=True)

    # Diagnostics

    def _report(self) -> None:
        """Once a second: publish what the node knows about itself."""
        now_s, report = time.monotonic(), self._pipeline.report()
        calibration_problem = self._calibration.problem or report.calibration_problem
        if self._calibration.problem and now_s - self._activated_s > self._settings.calibration_timeout_s:
            self._complain("calibration", self._calibration.problem)
        last = self._last_report
        statuses = [
            diagnostics.engine_status(
                f"{self._bundle.name} on {self._engine.name}",
                report.sets,
                report.sets - last.sets,
                self._pipeline.latency,
            ),
            diagnostics.calibration_status(calibration_problem, self._calibration.changes),
            diagnostics.ego_motion_status(
                self._settings.odom_topic,
                report.poses,
                report.resets,
                report.resets - last.resets,
                report.reset_reason,
            ),
            *(diagnostics.camera_status(c) for c in self._camera_reports(now_s, report)),
        ]
        stamp = self.get_clock().now().to_msg()
        message = diagnostics.diagnostic_array(stamp, self.get_name(), self._bundle.name, statuses)
        self._diagnostics.publish(message)
        self._last_report, self._reported_s = report, now_s

    def _camera_reports(self, now_s: float, report: PipelineReport) -> list[diagnostics.CameraReport]:
        reports = []
        for camera, name in enumerate(self._bundle.cameras):
            last_s = report.last_image_s[camera]
            recent: Counter[str] = report.images[camera] - self._last_report.images[camera]
            reports.append(
                diagnostics.CameraReport(
                    name,
                    self._image_topics[camera],
                    None if last_s is None else now_s - last_s,
                    recent["received"] / (now_s - self._reported_s),
                    report.images[camera],
                    recent,
                )
            )
        return reports


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


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM."""
    rclpy.init(args=args)
    node = OccflownetNode()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except Exception:
        # A callback that was publishing when the signal came fails too; that is no fault to report.
        if rclpy.ok():
            raise
    finally:
        node.release()
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
