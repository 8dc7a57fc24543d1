# SPDX-License-Identifier: Apache-2.0
"""What the node hears while it is active: images, camera_info, transforms and odometry, handed to the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from nav_msgs.msg import Odometry
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from occflownet_core.camera import Camera
from occflownet_core.errors import CalibrationError, GeometryError
from occflownet_ros import conversions
from occflownet_ros.calibration_source import CalibrationSource
from occflownet_ros.diagnostics import Complaints
from occflownet_ros.live_transforms import TfExtrinsics
from occflownet_ros.parameters import Settings
from occflownet_ros.pipeline import Pipeline
from occflownet_ros.publishers import Outputs
from occflownet_ros.tf_adapter import TfListener

_ODOMETRY_DEPTH = 50
_IMAGE_TOPICS = {  # below a camera's namespace, by image_transport and rectify; named as image_proc names them
    ("compressed", False): "image_rect_compressed",
    ("raw", False): "image_rect",
    ("compressed", True): "image_raw/compressed",
    ("raw", True): "image_raw",
}
_CDR_STAMP_END = 12  # encapsulation header, then the header's stamp


def needs_tf(settings: Settings) -> bool:
    """Whether the node listens to transforms."""
    return not settings.calibration_file or settings.follows == "tf"


def camera_namespaces(settings: Settings, cameras: Sequence[str]) -> tuple[str, ...]:
    """Where each camera of a bundle publishes."""
    return settings.camera_namespaces or tuple(f"/{name}" for name in cameras)


class Inputs:
    """The subscriptions of an active node, and the calibration that comes together from them. One per activation.

    Args:
        node: to subscribe with.
        settings: as configured.
        cameras: the bundle's, in its order.
        file_cameras: cameras of the calibration file in the same order, None where extrinsics come from tf.
        pipeline: takes what arrives.
        outputs: are told of the calibration.
        complain: takes (subject, sentence) about trouble.

    Attributes:
        calibration: of all cameras.
        image_topics: of each camera.
        calibration_sources: where intrinsics and extrinsics come from.
        ego_motion_source: in words; empty where none is followed.
    """

    def __init__(
        self,
        node: Node,
        settings: Settings,
        cameras: Sequence[str],
        file_cameras: Sequence[Camera] | None,
        pipeline: Pipeline,
        outputs: Outputs,
        complain: Complaints,
    ) -> None:
        self._node = node
        self._settings = settings
        self._pipeline = pipeline
        self._outputs = outputs
        self._complain = complain
        namespaces = camera_namespaces(settings, cameras)
        self._info_topics = [f"{namespace}/camera_info" for namespace in namespaces]
        self._info_content: list[bytes | None] = [None] * len(namespaces)
        suffix = _IMAGE_TOPICS[settings.image_transport, settings.rectify]
        self.image_topics = [f"{namespace}/{suffix}" for namespace in namespaces]
        self.ego_motion_source = {
            "odometry": f"odometry on {settings.odom_topic}",
            "tf": f"tf from {settings.odom_frame} to {settings.base_frame}",
            "none": "",
        }[settings.follows]
        self._tf = self._make_tf() if needs_tf(settings) else None
        self._tf_pose_ns = 0
        self.calibration_sources = {
            "intrinsics": settings.intrinsics_source,
            "extrinsics": "calibration_file" if file_cameras else f"/tf_static, kept by {self._tf.transforms.keeper}",
        }
        self.calibration = CalibrationSource(
            cameras,
            self._info_topics,
            file_cameras,
            None if file_cameras else TfExtrinsics(self._tf.transforms, settings.base_frame, self._tf.topic),
            settings.intrinsics_source == "calibration_file",
        )
        self._hand_on_calibration()
        self._subscriptions: list = []
        self._subscribe()

    def close(self) -> None:
        """End every subscription."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()
        if self._tf is not None:
            self._tf.close()
            self._tf = None

    def ego_motion_trouble(self) -> str:
        """What is missing for as long as no pose has come."""
        settings = self._settings
        if settings.follows != "tf":
            return f"no {self.ego_motion_source} yet"
        why = self._tf.transforms.trouble(settings.odom_frame, [settings.base_frame], self._tf.topic, fixed=False)
        return f"no {self.ego_motion_source} yet: {why or 'it has not come'}"

    def _subscribe(self) -> None:
        settings = self._settings
        image_type = CompressedImage if settings.image_transport == "compressed" else Image
        reliability = ReliabilityPolicy[settings.image_reliability.upper()]
        image_qos = QoSProfile(depth=settings.image_depth, reliability=reliability)
        # Best effort matches any publisher; what is lost here is sent again with the next message.
        state_qos = QoSProfile(depth=_ODOMETRY_DEPTH, reliability=ReliabilityPolicy.BEST_EFFORT)
        odom_qos = QoSProfile(depth=_ODOMETRY_DEPTH, reliability=ReliabilityPolicy[settings.odom_reliability.upper()])
        subscribe = self._node.create_subscription
        if settings.follows == "odometry":
            self._subscriptions.append(subscribe(Odometry, settings.odom_topic, self._on_odometry, odom_qos))
        if settings.intrinsics_source == "camera_info":
            for camera, topic in enumerate(self._info_topics):
                on_info = partial(self._on_camera_info, camera)
                self._subscriptions.append(subscribe(CameraInfo, topic, on_info, state_qos, raw=True))
        for camera, topic in enumerate(self.image_topics):
            self._subscriptions.append(subscribe(image_type, topic, partial(self._on_image, camera), image_qos))

    def _make_tf(self) -> TfListener:
        settings = self._settings
        return TfListener(
            self._node,
            self._on_static_transforms,
            self._on_moving_transforms if settings.follows == "tf" else None,
            ReliabilityPolicy[settings.odom_reliability.upper()],
            self._complain,
        )

    def _on_image(self, camera: int, message: CompressedImage | Image) -> None:
        self._pipeline.add_image(camera, conversions.nanoseconds(message.header.stamp), message)

    def _on_camera_info(self, camera: int, serialised: bytes) -> None:
        content = serialised[_CDR_STAMP_END:]
        if content == self._info_content[camera]:
            return
        self._info_content[camera] = content
        try:
            message = conversions.camera_info_message(serialised, self._info_topics[camera])
            intrinsics = conversions.intrinsics_from_info(message, self._settings.rectify)
            changed = self.calibration.set_intrinsics(camera, intrinsics)
        except CalibrationError as error:
            self._complain(f"camera_info {camera}", str(error))
            changed = self.calibration.refuse_intrinsics(camera, str(error))
        if changed:
            self._calibration_changed()

    def _on_static_transforms(self) -> None:
        if self.calibration.refresh():
            self._calibration_changed()

    def _calibration_changed(self) -> None:
        self._hand_on_calibration()
        if self.calibration.rig is not None:
            first = self.calibration.changes == 1
            self._node.get_logger().info("calibration complete" if first else "calibration changed")

    def _on_moving_transforms(self) -> None:
        """Hand on the vehicle's latest pose, if what came has to do with it."""
        try:
            found = self._tf.transforms.newest(self._settings.odom_frame, self._settings.base_frame)
            if found is None or found[0] in (0, self._tf_pose_ns):
                return
            self._tf_pose_ns, pose = found
            self._pipeline.add_pose(self._tf_pose_ns, pose.translation_m, pose.quaternion_wxyz)
        except GeometryError as error:
            self._complain("odometry", f"{self.ego_motion_source} refused: {error}")

    def _hand_on_calibration(self) -> None:
        self._pipeline.set_rig(self.calibration.rig, self.calibration.models)
        self._outputs.set_cameras(self.calibration.rig, self.calibration.frame_ids)

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
