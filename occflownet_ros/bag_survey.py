# SPDX-License-Identifier: Apache-2.0
"""What a bag offers a conversion, found without reading all of it: frames, extrinsics, fields, and what is missing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property

from occflownet_core.errors import CalibrationError, GeometryError
from occflownet_core.poses import RecordedPose
from occflownet_core.rig_file import load_rig
from occflownet_ros.bag import Bag
from occflownet_ros.bag_decoding import decode
from occflownet_ros.camera_model import CameraModel
from occflownet_ros.nuscenes_messages import LIDARSEG_FIELD
from occflownet_ros.point_cloud import field_names
from occflownet_ros.topic_guess import (
    CAMERA_INFO,
    COMPRESSED_IMAGE,
    HEADER,
    IMAGE,
    ODOMETRY,
    POINT_CLOUD,
    TRANSFORMS,
    guess_topic_map,
)
from occflownet_ros.topic_map import CameraTopics, TopicMap
from occflownet_ros.transform_tree import FramePath, PoseTrack, TransformTree, recorded

LIDAR = "LIDAR_TOP"
_FRAMES_SHOWN = 12


def nanoseconds(stamp: object) -> int:
    """Of a decoded builtin_interfaces/Time."""
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def recorded_pose(translation: object, rotation: object) -> RecordedPose:
    """Of a decoded Vector3 or Point and a Quaternion.

    Raises:
        GeometryError: they are no pose.
    """
    return RecordedPose((translation.x, translation.y, translation.z), (rotation.w, rotation.x, rotation.y, rotation.z))


def require_usable(model: CameraModel, topics: CameraTopics) -> None:
    """Raises CalibrationError if the camera's images need to be rectified and the model's distortion is not known."""
    if model.changes_images and not topics.are_rectified:
        _ = model.maps


class Survey:
    """A bag seen through a mapping.

    Args:
        bag: open.
        topic_map: None guesses one.
        wants_lidar: whether a bag without LiDAR is found wanting.

    Attributes:
        bag: as given.
        topic_map: as given, or guessed.
        tree: every frame of /tf and /tf_static.
        refused: transforms and odometry messages that are no pose, by topic.

    Raises:
        BagError, CalibrationError: a message or the calibration file cannot be read.
    """

    def __init__(self, bag: Bag, topic_map: TopicMap | None = None, wants_lidar: bool = True) -> None:
        self.bag, self.wants_lidar = bag, wants_lidar
        self.refused: Counter[str] = Counter()
        self._unusable: dict[str, str] = {}
        gap_ms = topic_map.max_pose_gap_ms if topic_map else TopicMap.max_pose_gap_ms
        self.tree = self._transforms(round(gap_ms * 1e6))
        self.topic_map = topic_map or guess_topic_map(bag.topics.values(), self.tree.frames)
        if topic_map is None and self.topic_map.lidar and LIDARSEG_FIELD in self.cloud_fields():
            self.topic_map = self.topic_map.with_label_field(LIDARSEG_FIELD)

    # What the mapping's topics say first

    def first(self, name: str, *types: str) -> object | None:
        """The topic's first message, decoded; None where there is none of such a type."""
        topic = self.bag.topics.get(name)
        message = next(self.bag.messages({name}), None) if topic and topic.msgtype in types else None
        return None if message is None else decode(message)

    @cached_property
    def models(self) -> dict[str, CameraModel]:
        """The first camera_info of each camera, or what the calibration file says where no topic is named."""
        models = {}
        for channel, topics in self.topic_map.cameras.items():
            message = self.first(topics.camera_info, CAMERA_INFO)
            try:
                if message is not None:
                    model = CameraModel.from_message(message)
                    require_usable(model, topics)
                    models[channel] = model
                elif not topics.camera_info and channel in self.rig_mounts:
                    models[channel] = self._model_of_file(channel)
            except CalibrationError as error:
                self._unusable[channel] = f"{channel}: {error}"
        return models

    @cached_property
    def rig_mounts(self) -> dict[str, RecordedPose]:
        """Extrinsics of the calibration file by channel; empty without one."""
        return {camera.name: recorded(camera.ego_from_camera) for camera in self._rig}

    @cached_property
    def lidar_frame(self) -> str | None:
        """The clouds' frame; None without clouds."""
        return None if self._first_cloud is None else self._first_cloud.header.frame_id

    def cloud_fields(self) -> list[str]:
        """Names of the clouds' fields; none without clouds."""
        return [] if self._first_cloud is None else field_names(self._first_cloud)

    def camera_path(self, channel: str) -> FramePath | None:
        """Base frame from the camera's optical frame; the calibration file's word goes before /tf_static."""
        if channel in self.rig_mounts:
            return FramePath.fixed(self.rig_mounts[channel])
        model = self.models.get(channel)
        return self.tree.path(self.topic_map.base_frame, model.frame_id) if model else None

    def lidar_path(self) -> FramePath | None:
        """Base frame from the LiDAR's."""
        return self.tree.path(self.topic_map.base_frame, self.lidar_frame) if self.lidar_frame else None

    @cached_property
    def ego_path(self) -> FramePath | None:
        """Global frame from the base frame: the tracked pose of the odometry's child, then what is fixed to it."""
        motion = self.topic_map.ego_motion
        if motion.tf:
            path = self.tree.path(motion.tf, self.topic_map.base_frame)
            return path if path and not path.is_static else None
        first = self.first(motion.odometry, ODOMETRY)
        if first is None:
            return None
        rest = self.tree.path(first.child_frame_id, self.topic_map.base_frame)
        return rest and rest.then_up(self._odometry_track())

    # What is missing

    def problems(self) -> Iterator[str]:
        """One sentence for everything that stands in the way of a conversion."""
        yield from self._camera_problems()
        yield from self._lidar_problems()
        yield from self._ego_problems()
        if self.topic_map.keyframes:
            yield from self._topic_problems(self.topic_map.keyframes, "the keyframes' topic", (HEADER,))

    def _camera_problems(self) -> Iterator[str]:
        if not self.topic_map.cameras:
            yield f"bag {self.bag.path} has no camera images ({COMPRESSED_IMAGE} or {IMAGE}); record the cameras"
        for channel, topics in self.topic_map.cameras.items():
            missing = list(self._topic_problems(topics.image, channel, (COMPRESSED_IMAGE, IMAGE)))
            missing += self._intrinsics_problems(channel, topics)
            yield from missing
            if not missing and channel not in self.models:
                yield self._unusable[channel]
            elif not missing and self.camera_path(channel) is None:
                yield self._no_transform(channel, self.models[channel].frame_id, "or name a calibration_file in --map")

    def _intrinsics_problems(self, channel: str, topics: CameraTopics) -> Iterator[str]:
        if topics.camera_info:
            yield from self._topic_problems(topics.camera_info, f"{channel}'s camera_info", (CAMERA_INFO,))
        elif channel not in self.rig_mounts:
            yield (
                f"camera {channel} ({topics.image}) has no camera_info beside it; record it, "
                "name its topic or a calibration_file in --map, or leave the camera out there"
            )

    def _lidar_problems(self) -> Iterator[str]:
        lidar = self.topic_map.lidar
        if not self.wants_lidar:
            return
        if lidar is None:
            yield (
                f"bag {self.bag.path} has no LiDAR ({POINT_CLOUD}); record it, or pass --no-lidar to take keyframes "
                "from a camera and labels from pseudo-label images"
            )
            return
        missing = list(self._topic_problems(lidar.topic, "the LiDAR", (POINT_CLOUD,)))
        yield from missing
        if missing:
            return
        if self.lidar_path() is None:
            yield self._no_transform("the LiDAR", self.lidar_frame, "with the LiDAR's mount in it")
        fields = self.cloud_fields()
        for name in filter(None, (lidar.label_field, lidar.time_field)):
            if name not in fields:
                yield f"the clouds on {lidar.topic} have no field '{name}'; they have {', '.join(fields)}: correct --map"

    def _ego_problems(self) -> Iterator[str]:
        motion, base = self.topic_map.ego_motion, self.topic_map.base_frame
        if motion.odometry:
            missing = list(self._topic_problems(motion.odometry, "the odometry", (ODOMETRY,)))
            yield from missing
            if not missing and self.ego_path is None:
                child = self.first(motion.odometry, ODOMETRY).child_frame_id
                yield self._no_transform(f"the odometry on {motion.odometry}", child, "or set base_frame in --map")
        elif self.ego_path is None:
            yield (
                f"bag {self.bag.path} has no odometry ({ODOMETRY}) and /tf does not move {base} in {motion.tf}; "
                f"record one of them, or name the fixed frame or base_frame in --map ({self._frames()})"
            )

    def _topic_problems(self, name: str, role: str, types: tuple[str, ...]) -> Iterator[str]:
        topic = self.bag.topics.get(name)
        if topic is None or not topic.message_count:
            yield f"bag {self.bag.path} has no messages on {name}, {role} of the mapping; --list shows what it has"
        elif topic.msgtype not in types:
            yield f"{name} is of type {topic.msgtype}; {role} must be {' or '.join(types)}: correct --map"
        elif name != self.topic_map.keyframes and not nanoseconds(self.first(name, *types).header.stamp):
            yield f"the messages on {name} have no stamp (it is 0); make {role} stamp what it sends, and record again"

    def _no_transform(self, what: str, frame: str, otherwise: str) -> str:
        base = self.topic_map.base_frame
        return (
            f"no transform from {base} to '{frame}', the frame of {what} ({self._frames()}); "
            f"record /tf_static, {otherwise}"
        )

    def _frames(self) -> str:
        frames = sorted(self.tree.frames)
        if not frames:
            return "the bag has no transforms at all"
        more = f" and {len(frames) - _FRAMES_SHOWN} more" if len(frames) > _FRAMES_SHOWN else ""
        return f"tf has {', '.join(frames[:_FRAMES_SHOWN])}{more}"

    # Reading

    @cached_property
    def _rig(self) -> list:
        return list(load_rig(self.topic_map.calibration_file)) if self.topic_map.calibration_file else []

    def _model_of_file(self, channel: str) -> CameraModel:
        camera = next(camera for camera in self._rig if camera.name == channel)
        matrix = tuple(camera.intrinsic.ravel().tolist())
        zeros = (0.0,) * 12
        return CameraModel(channel, camera.width_px, camera.height_px, "", (), matrix, zeros[:9], zeros)

    @cached_property
    def _first_cloud(self) -> object | None:
        return self.first(self.topic_map.lidar.topic, POINT_CLOUD) if self.topic_map.lidar else None

    def _transforms(self, max_gap_ns: int) -> TransformTree:
        """Static transforms as last recorded; moving ones as tracks. Of a child's parents the busiest counts."""
        names = {topic.name for topic in self.bag.topics.values() if topic.msgtype == TRANSFORMS}
        moving: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
        static = {}
        for message in self.bag.messages(names) if names else ():
            for transform in decode(message).transforms:
                parent, child = transform.header.frame_id, transform.child_frame_id
                try:
                    pose = recorded_pose(transform.transform.translation, transform.transform.rotation)
                except GeometryError:
                    self.refused[message.topic] += 1
                    continue
                if message.topic.endswith("tf_static"):
                    static[child] = parent, pose
                else:
                    moving[child][parent].append((nanoseconds(transform.header.stamp), pose))
        tree = TransformTree()
        for child, by_parent in moving.items():
            parent, poses = max(by_parent.items(), key=lambda item: len(item[1]))
            tree.add(parent, child, PoseTrack(poses, max_gap_ns))
        for child, (parent, pose) in static.items():
            tree.add(parent, child, pose)
        return tree

    def _odometry_track(self) -> PoseTrack:
        poses, topic = [], self.topic_map.ego_motion.odometry
        for message in self.bag.messages({topic}):
            content = decode(message)
            try:
                pose = recorded_pose(content.pose.pose.position, content.pose.pose.orientation)
            except GeometryError:
                self.refused[topic] += 1
                continue
            poses.append((nanoseconds(content.header.stamp), pose))
        return PoseTrack(poses, round(self.topic_map.max_pose_gap_ms * 1e6))
