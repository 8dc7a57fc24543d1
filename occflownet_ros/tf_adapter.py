# SPDX-License-Identifier: Apache-2.0
"""The one place that knows tf2: /tf_static and /tf of a ROS installation, kept in tf2_ros's buffer or in our own."""

from __future__ import annotations

from collections.abc import Callable

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.time import Time

from occflownet_core.errors import CalibrationError, GeometryError
from occflownet_core.poses import RecordedPose
from occflownet_ros.diagnostics import Complaints
from occflownet_ros.live_transforms import LiveTransforms, PlainTransforms
from occflownet_ros.transform_tree import bare

_DEPTH = 100
_AUTHORITY = "occflownet"


def require_tf(purpose: str, instead: str) -> None:
    """Check that /tf can be subscribed to; PyPI carries no tf2_msgs.

    Raises:
        CalibrationError: tf2_msgs is not installed; the sentence says what for, and what to do instead.
    """
    try:
        import tf2_msgs.msg  # noqa: F401
    except ImportError:
        raise CalibrationError(
            f"{purpose}, but tf2_msgs is not installed; {instead}, "
            "or run in a ROS installation (ros-<distribution>-tf2-ros-py)"
        ) from None


class Tf2Transforms(LiveTransforms):
    """Transforms kept by tf2_ros's buffer.

    Raises:
        ImportError: tf2_ros is not installed.
    """

    keeper = "tf2_ros"

    def __init__(self) -> None:
        from tf2_ros import Buffer, TransformException

        super().__init__()
        self._buffer = Buffer()
        self._unknown = TransformException

    def newest(self, target: str, source: str) -> tuple[int, RecordedPose] | None:
        try:
            found = self._buffer.lookup_transform(bare(target), bare(source), Time())
        except self._unknown:
            return None
        stamp, t, q = found.header.stamp, found.transform.translation, found.transform.rotation
        return stamp.sec * 10**9 + stamp.nanosec, RecordedPose((t.x, t.y, t.z), (q.w, q.x, q.y, q.z))

    def _take(
        self, message: object, parent: str, child: str, stamp_ns: int, pose: RecordedPose, is_static: bool
    ) -> None:
        (self._buffer.set_transform_static if is_static else self._buffer.set_transform)(message, _AUTHORITY)

    def _forget_motion(self) -> None:
        self._buffer.clear()  # keeps static transforms


def make_transforms() -> LiveTransforms:
    """tf2_ros's, where it is installed."""
    try:
        return Tf2Transforms()
    except ImportError:
        return PlainTransforms()


class TfListener:
    """Subscribes to /tf_static, and to /tf if asked: at its rate every transform costs Python some microseconds.

    Args:
        node: to subscribe with.
        on_static: called without arguments after static transforms came in.
        on_moving: likewise for /tf; None leaves /tf alone.
        reliability: QoS of the subscription to /tf.
        complain: takes (subject, sentence) about transforms that are none.

    Attributes:
        transforms: what was received.
        topic: what is listened to, for sentences.
    """

    def __init__(
        self,
        node: Node,
        on_static: Callable[[], None],
        on_moving: Callable[[], None] | None,
        reliability: ReliabilityPolicy,
        complain: Complaints,
    ) -> None:
        from tf2_msgs.msg import TFMessage

        self.transforms = make_transforms()
        self.topic = "/tf_static" if on_moving is None else "/tf or /tf_static"
        self._node = node
        self._complain = complain
        latched = QoSProfile(depth=_DEPTH, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        topics = [("/tf_static", True, on_static, latched)]
        if on_moving is not None:
            topics.append(("/tf", False, on_moving, QoSProfile(depth=_DEPTH, reliability=reliability)))
        self._subscriptions = [
            node.create_subscription(TFMessage, topic, self._receiver(is_static, on_change), qos)
            for topic, is_static, on_change, qos in topics
        ]

    def close(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _receiver(self, is_static: bool, on_change: Callable[[], None]) -> Callable[[object], None]:
        def receive(message) -> None:
            for transform in message.transforms:
                try:
                    self.transforms.add(transform, is_static)
                except GeometryError as error:
                    self._complain(f"tf {transform.child_frame_id}", str(error))
            on_change()

        return receive
