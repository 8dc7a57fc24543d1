# SPDX-License-Identifier: Apache-2.0
"""Which topic of a bag is which sensor: the typed content of a topics.yaml, read and written.

    cameras:
      CAM_FRONT: {image: /front/image_raw/compressed, camera_info: /front/camera_info}
      CAM_BACK: {image: /rear/image_rect, camera_info: /rear/camera_info, rectified: true}
    lidar: {topic: /velodyne_points, label_field: label}
    ego_motion: {odometry: /odom}

Every key is an attribute of ``TopicMap`` or of what it holds.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from occflownet_core.errors import ConfigError
from occflownet_core.labels import LIDARSEG_NAMES


@dataclass(frozen=True)
class CameraTopics:
    """One camera.

    Attributes:
        image: topic of sensor_msgs/CompressedImage or sensor_msgs/Image.
        camera_info: topic of its sensor_msgs/CameraInfo; empty takes the intrinsics from ``calibration_file``.
        rectified: whether lens distortion has been taken out of the images; null takes it from the topic's name
            (``image_rect...`` is rectified). Other images are rectified as the camera_info says.
        offset_ms: how much later than the LiDAR's stamp the camera's image of a keyframe is expected.
    """

    image: str
    camera_info: str = ""
    rectified: bool | None = None
    offset_ms: float = 0.0

    @property
    def are_rectified(self) -> bool:
        """Whether the images are rectified, by word or by the topic's name."""
        return is_rectified(self.image) if self.rectified is None else self.rectified


@dataclass(frozen=True)
class LidarTopic:
    """The LiDAR, which becomes LIDAR_TOP.

    Attributes:
        topic: of sensor_msgs/PointCloud2.
        label_field: field with a class per point; empty for none.
        label_names: nuScenes-lidarseg category of each value of that field, e.g. ``{10: vehicle.car}``; empty where the
            values are lidarseg's own indices (0..31). Values without a name become ``noise``, which trains nothing.
        time_field: field with each point's own time, by which the cloud is freed of the distortion that driving causes
            during a sweep; empty where the driver has done so already.
        time_unit_s: unit of that field, e.g. 1e-9. Times are relative to the cloud's stamp or, from a day on, absolute.
    """

    topic: str
    label_field: str = ""
    label_names: dict[int, str] = field(default_factory=dict)
    time_field: str = ""
    time_unit_s: float = 1.0


@dataclass(frozen=True)
class EgoMotion:
    """Where the vehicle's pose comes from: one of the two.

    Attributes:
        odometry: topic of nav_msgs/Odometry.
        tf: fixed frame of /tf, e.g. ``odom`` or ``map``, in which the base frame moves.
    """

    odometry: str = ""
    tf: str = ""


@dataclass(frozen=True)
class TopicMap:
    """What a conversion reads from a bag.

    Attributes:
        cameras: by the channel that each becomes. A network is trained for channels by name: nuScenes' are CAM_FRONT,
            CAM_FRONT_RIGHT, CAM_BACK_RIGHT, CAM_BACK, CAM_BACK_LEFT, CAM_FRONT_LEFT.
        ego_motion: the vehicle's pose over time.
        lidar: null for a vehicle without; it is then left out with --no-lidar.
        base_frame: the ego frame: middle of the rear axle on the ground, x forward, y left, z up.
        keyframes: topic of std_msgs/Header that marks keyframes (``nuscenes_to_bag`` writes it); empty chooses them.
        calibration_file: extrinsics of the cameras (``occflownet_core.rig_file``), relative to the topics.yaml; empty
            takes them from /tf_static.
        max_camera_time_diff_ms: an image further from where the keyframe expects it is not the keyframe's.
        max_pose_gap_ms: poses further apart are not interpolated between.
    """

    cameras: dict[str, CameraTopics]
    ego_motion: EgoMotion
    lidar: LidarTopic | None = None
    base_frame: str = "base_link"
    keyframes: str = ""
    calibration_file: str = ""
    max_camera_time_diff_ms: float = 60.0
    max_pose_gap_ms: float = 200.0

    def __post_init__(self) -> None:
        if bool(self.ego_motion.odometry) == bool(self.ego_motion.tf):
            raise ConfigError("ego_motion names neither or both of odometry and tf; give one of them")
        if min(self.max_camera_time_diff_ms, self.max_pose_gap_ms) <= 0:
            raise ConfigError(
                f"max_camera_time_diff_ms is {self.max_camera_time_diff_ms:g} and max_pose_gap_ms "
                f"{self.max_pose_gap_ms:g}; both must be positive"
            )
        for channel in self.cameras:
            if not channel.replace("_", "").replace("-", "").isalnum():
                raise ConfigError(f"camera '{channel}' becomes the name of a folder; use letters, digits, - and _")
        wrong = [name for name in self.lidar.label_names.values() if name not in LIDARSEG_NAMES] if self.lidar else []
        if wrong:
            raise ConfigError(
                f"lidar.label_names has '{wrong[0]}', which is no nuScenes-lidarseg category; they are "
                + ", ".join(LIDARSEG_NAMES)
            )

    def with_label_field(self, name: str) -> TopicMap:
        """The same, with the classes of the LiDAR's points in the given field."""
        return dataclasses.replace(self, lidar=dataclasses.replace(self.lidar, label_field=name))


def is_rectified(image_topic: str) -> bool:
    """Whether the topic's name says that its images are rectified (image_proc's ``image_rect``, ``image_rect_color``)."""
    return bool(re.search(r"(^|[/_])rect", image_topic.rsplit("/image", 1)[-1]))


def load_topic_map(path: Path) -> TopicMap:
    """Read a mapping file; ``calibration_file`` becomes relative to the working directory.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or of a wrong type.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"mapping {path} cannot be read ({reason}); bag_to_nuscenes --list --write-map makes one to edit"
        ) from None
    try:
        topic_map = _typed(TopicMap, content, "")
    except ConfigError as error:
        raise ConfigError(f"mapping {path}: {error}") from None
    if not topic_map.calibration_file:
        return topic_map
    return dataclasses.replace(topic_map, calibration_file=str(path.parent / topic_map.calibration_file))


def topic_map_yaml(topic_map: TopicMap) -> str:
    """The mapping as a file that ``load_topic_map`` reads; what is as by default is left out."""
    text = yaml.safe_dump(_plain(topic_map), sort_keys=False, default_flow_style=False, width=120)
    return "# What bag_to_nuscenes --map takes; bag_to_nuscenes --help explains it.\n" + text


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        changed = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if not _is_default(f, value))
        return {name: _plain(content) for name, content in changed}
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _is_default(f: dataclasses.Field, owner: object) -> bool:
    default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    return getattr(owner, f.name) == default


def _typed(kind: object, value: object, where: str) -> object:
    """A plain value as the given type: a dataclass, a dict, an optional or a simple type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
        return None if value is None else _typed(kind, value, where)
    if dataclasses.is_dataclass(kind):
        return _typed_dataclass(kind, value, where)
    if typing.get_origin(kind) is dict:
        key_kind, item_kind = typing.get_args(kind)
        _require(isinstance(value, dict), where, "a table", value)
        return {
            _typed(key_kind, key, f"{where}'s key"): _typed(item_kind, item, f"{where}.{key}")
            for key, item in value.items()
        }
    accepts, wanted = _SIMPLE[kind]
    _require(accepts(value), where, wanted, value)
    return kind(value)


_SIMPLE: dict[type, tuple[Callable[[object], bool], str]] = {
    str: (lambda value: isinstance(value, str), "text"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    float: (lambda value: isinstance(value, (int, float)) and not isinstance(value, bool), "a number"),
}


def _typed_dataclass(kind: type, value: object, where: str) -> object:
    _require(isinstance(value, dict), where or "the file", "a table", value)
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    prefix = f"{where}." if where else ""
    known = [f.name for f in fields]
    unknown = [str(key) for key in value if key not in known]
    if unknown:
        raise ConfigError(f"unknown key {prefix}{unknown[0]}; the keys there are {', '.join(known)}")
    missing = [
        f.name
        for f in fields
        if f.name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} is missing; add it")
    return kind(**{name: _typed(hints[name], item, f"{prefix}{name}") for name, item in value.items()})


def _require(good: bool, where: str, wanted: str, value: object) -> None:
    if not good:
        raise ConfigError(f"{where} is {value!r}; give {wanted}")
