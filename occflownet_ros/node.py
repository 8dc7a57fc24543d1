# SPDX-License-Identifier: Apache-2.0
"""The lifecycle node ``occflownet``: configure loads and warms the engine, activate subscribes and publishes.

Data flows one way: Inputs (subscriptions) -> Pipeline (assembler, decoding, engine) -> Outputs (publishers).
"""

from __future__ import annotations

import functools
import signal
import time
import traceback
from collections.abc import Callable

import cv2
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecyclePublisher, LifecycleState, TransitionCallbackReturn
from rclpy.qos import QoSProfile
from rclpy.subscription import Subscription

from occflownet_core.camera import Camera
from occflownet_core.errors import OccflownetError
from occflownet_core.rig_file import load_rig
from occflownet_core.runtime.bundle import Bundle, load_bundle
from occflownet_core.runtime.engine import Engine, warm_up
from occflownet_core.runtime.factory import create_engine, engine_cache_folder
from occflownet_ros.calibration_source import anchor_index, cameras_of_file
from occflownet_ros.core_log import core_messages
from occflownet_ros.diagnostics import Complaints
from occflownet_ros.inputs import Inputs, camera_namespaces, needs_tf
from occflownet_ros.node_parameters import NodeParameters
from occflownet_ros.parameters import ParameterError, Settings
from occflownet_ros.pipeline import Pipeline
from occflownet_ros.publishers import Outputs
from occflownet_ros.reporter import Reporter
from occflownet_ros.tf_adapter import require_tf

_SUCCESS, _FAILURE, _ERROR = (
    TransitionCallbackReturn.SUCCESS,
    TransitionCallbackReturn.FAILURE,
    TransitionCallbackReturn.ERROR,
)

_ANSWERED_S = 0.5


def _transition(step: Callable) -> Callable:
    """Log what goes wrong in a transition: a user's mistake as one sentence and FAILURE, anything else as ERROR."""

    @functools.wraps(step)
    def run(self: OccflownetNode, state: LifecycleState) -> TransitionCallbackReturn:
        before = self.entities()
        try:
            return step(self, state)
        except Exception as error:
            is_mistake = isinstance(error, OccflownetError)
            if self.context.ok():  # an import that SIGINT interrupts, say, fails with an error of its own
                self.get_logger().error(str(error) if is_mistake else traceback.format_exc())
            self.release() if step.__name__ == "on_configure" else self._stop()
            self.destroy(self.entities() - before)
            return _FAILURE if is_mistake else _ERROR

    return run


class OccflownetNode(LifecycleNode):
    """Cameras in, semantic voxels out; see docs/topics_and_parameters.md."""

    def __init__(self, **kwargs) -> None:
        super().__init__("occflownet", **kwargs)
        self._complain = Complaints(self.get_logger().warning, time.monotonic)
        self._bundle: Bundle | None = None
        self._file_cameras: tuple[Camera, ...] | None = None
        self._engine: Engine | None = None
        self._outputs: Outputs | None = None
        self._diagnostics = None
        self._pipeline: Pipeline | None = None
        self._inputs: Inputs | None = None
        self._reporter: Reporter | None = None
        self._parameters_in_force = NodeParameters(self, self._apply)

    @property
    def _settings(self) -> Settings | None:
        return self._parameters_in_force.settings

    # Transitions

    @_transition
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        settings = self._parameters_in_force.read()
        cv2.setNumThreads(1)  # images are decoded side by side; each on its own thread
        if not settings.bundle:
            raise ParameterError("the parameter bundle is empty; give the folder of a model bundle")
        self._bundle = load_bundle(settings.bundle)
        anchor_index(self._bundle.cameras, settings.anchor_camera)
        self._file_cameras = self._load_calibration_file()
        _require_tf(settings)
        if settings.build_only:
            return self._build_and_end(settings)
        with core_messages(self.get_logger()):
            self._engine = create_engine(
                self._bundle, settings.backend, settings.threads or None, settings.precision, settings.engine_folder
            )
            warm_up(self._engine)
        self._outputs = Outputs(self, settings, self._bundle, self._complain)
        self._diagnostics = self.create_lifecycle_publisher(DiagnosticArray, "/diagnostics", QoSProfile(depth=10))
        self.get_logger().info(
            f"configured: model '{self._bundle.name}' on {self._engine.name}, {len(self._bundle.cameras)} cameras"
        )
        return super().on_configure(state)

    @_transition
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        result = super().on_activate(state)
        settings, cameras, complain = self._settings, self._bundle.cameras, self._complain
        self._outputs.restart()
        anchor = anchor_index(cameras, settings.anchor_camera)
        clock_s = self._bag_time_s if self.get_parameter("use_sim_time").value else time.monotonic
        self._pipeline = Pipeline(self._engine, settings, anchor, self._outputs, complain, clock_s)
        self._pipeline.start()
        self._inputs = Inputs(self, settings, cameras, self._file_cameras, self._pipeline, self._outputs, complain)
        self._reporter = Reporter(
            self, self._diagnostics, settings, self._engine, self._inputs, self._pipeline, self._outputs, complain
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

    def release(self) -> None:
        """Undo activation and configuration; harmless in any state."""
        self._stop()
        if self._outputs is not None:
            self._outputs.close()
        if self._diagnostics is not None:
            self.destroy_lifecycle_publisher(self._diagnostics)
        if self._engine is not None:
            self._engine.close()
        self._outputs = self._diagnostics = self._engine = self._bundle = None
        self._parameters_in_force.release()

    def entities(self) -> set:
        """What the node has made on the graph."""
        return {*self.publishers, *self.subscriptions, *self.timers}

    def destroy(self, entities: set) -> None:
        """Of a part that failed half made, and that nobody holds."""
        for entity in entities:
            if isinstance(entity, LifecyclePublisher):
                self.destroy_lifecycle_publisher(entity)
            elif isinstance(entity, Subscription):
                self.destroy_subscription(entity)
            else:
                self.destroy_timer(entity)

    def _stop(self) -> None:
        """Undo activation; harmless when not active."""
        for part in (self._reporter, self._inputs):
            if part is not None:
                part.close()
        if self._pipeline is not None:
            self._pipeline.stop()
        if self._outputs is not None:
            self._outputs.stop()
        self._reporter = self._inputs = self._pipeline = None

    # Details

    def _build_and_end(self, settings: Settings) -> TransitionCallbackReturn:
        """Build the engine file, and end the process once the transition has been answered."""
        from occflownet_core.runtime.tensorrt_build import prepare_engine

        with core_messages(self.get_logger()):
            path, built_s = prepare_engine(
                self._bundle, settings.precision, settings.engine_folder or engine_cache_folder()
            )
        how = "was there already" if built_s is None else f"was built in {built_s:.0f} s"
        self.get_logger().info(f"engine {path} {how}; build_only is true, so the node ends")
        self.release()
        self.create_timer(_ANSWERED_S, lambda: rclpy.try_shutdown(context=self.context))
        return _FAILURE

    def _apply(self, settings: Settings) -> None:
        """Parameters that may change while running did."""
        if self._outputs is not None:
            self._outputs.settings = settings
        if self._pipeline is not None:
            self._pipeline.apply(settings)

    def _load_calibration_file(self) -> tuple[Camera, ...] | None:
        names, namespaces = self._bundle.cameras, camera_namespaces(self._settings, self._bundle.cameras)
        if len(namespaces) != len(names):
            raise ParameterError(
                f"camera_namespaces names {len(namespaces)} cameras, the bundle has {len(names)} ({', '.join(names)}); "
                "give one namespace for each, in that order"
            )
        path = self._settings.calibration_file
        return cameras_of_file(load_rig(path), names, namespaces) if path else None

    def _bag_time_s(self) -> float:
        return self.get_clock().now().nanoseconds / 1e9


def _require_tf(settings: Settings) -> None:
    if settings.follows == "tf":
        require_tf("ego_motion is tf", "set it to odometry or none")
    if needs_tf(settings):
        require_tf("calibration_file is empty, so extrinsics would come from /tf_static", "set calibration_file")


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM."""
    _interrupt_once()
    rclpy.init(args=args)
    executor, node = SingleThreadedExecutor(), None
    try:
        node = OccflownetNode()
        executor.add_node(node)
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except Exception:
        # A callback that was publishing when the signal came fails too; that is no fault to report.
        if rclpy.ok():
            raise
    finally:
        if node is not None:
            node.release()
        executor.shutdown()
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # or it would kill the interpreter while that ends


def _interrupt_once() -> None:
    """Let the first SIGINT raise KeyboardInterrupt and any later one do nothing, so that tidying up is not interrupted.

    To be called before ``rclpy.init``, whose own handler goes on top of this one and passes the signal on.
    """
    was_interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal was_interrupted
        if not was_interrupted:
            was_interrupted = True
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


if __name__ == "__main__":
    main()
