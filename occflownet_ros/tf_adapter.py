# SPDX-License-Identifier: Apache-2.0
"""The one place that knows tf2_ros: static transforms to the base frame, where a ROS installation has it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from occflownet_core import poses
from occflownet_core.errors import CalibrationError

_DEPTH = 100


class TfExtrinsics:
    """Looks up ``base_from_frame`` among the transforms of /tf_static.

    Only /tf_static is read: a camera is fixed to its vehicle, and /tf's rate would cost Python dearly.

    Args:
        node: the node to subscribe with.
        base_frame: frame that extrinsics are relative to.
        on_change: called without arguments after new static transforms came in.

    Raises:
        CalibrationError: tf2_ros is not installed.
    """

    def __init__(self, node, base_frame: str, on_change: Callable[[], None]) -> None:
        try:
            from rclpy.qos import DurabilityPolicy, QoSProfile
            from tf2_msgs.msg import TFMessage
            from tf2_ros import Buffer
        except ImportError as error:
            raise CalibrationError(
                f"extrinsics cannot be read from /tf_static because {error.name or 'tf2_ros'} is not installed; "
                "set the parameter calibration_file, or install tf2_ros (ros-<distribution>-tf2-ros-py)"
            ) from None
        self._node = node
        self._base_frame = base_frame
        self._on_change = on_change
        self._buffer = Buffer()
        qos = QoSProfile(depth=_DEPTH, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._subscription = node.create_subscription(TFMessage, "/tf_static", self._receive, qos)

    def __call__(self, frame_id: str) -> np.ndarray | None:
        """``base_from_frame`` [4, 4], None while it is not known."""
        from rclpy.time import Time
        from tf2_ros import TransformException

        try:
            transform = self._buffer.lookup_transform(self._base_frame, frame_id, Time()).transform
        except TransformException:
            return None
        t, q = transform.translation, transform.rotation
        return poses.pose(np.array([t.x, t.y, t.z]), np.array([q.w, q.x, q.y, q.z]))

    def close(self) -> None:
        self._node.destroy_subscription(self._subscription)

    def _receive(self, message) -> None:
        for transform in message.transforms:
            self._buffer.set_transform_static(transform, "occflownet")
        self._on_change()
