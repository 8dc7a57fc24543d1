# SPDX-License-Identifier: Apache-2.0
"""A mapping for a bag that comes without one: guessed from the types and names of its topics."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from occflownet_ros.bag import BagTopic
from occflownet_ros.topic_map import CameraTopics, EgoMotion, LidarTopic, TopicMap, is_rectified

COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
IMAGE = "sensor_msgs/msg/Image"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
POINT_CLOUD = "sensor_msgs/msg/PointCloud2"
ODOMETRY = "nav_msgs/msg/Odometry"
TRANSFORMS = "tf2_msgs/msg/TFMessage"
HEADER = "std_msgs/msg/Header"

_NO_CAMERA_IMAGE = re.compile(
    r"depth|dispar|mask|label|seman|segment|confidence|debug|annotat|costmap|occflownet", re.I
)
_NO_LIDAR = re.compile(r"occflownet|radar|depth|stereo|obstacle|ground|filter|cluster|map|debug", re.I)
_LIDAR_NAMES = (
    re.compile(r"lidar_?top", re.I),
    re.compile(r"concat|merged|fused|top", re.I),
    re.compile(r"lidar|velodyne|ouster|hesai|livox|rslidar|scan|points", re.I),
)
_ODOMETRY_NAMES = re.compile(r"^/odom$"), re.compile(r"local|filter|fused|ekf", re.I), re.compile(r"odom", re.I)
_FRONT, _BACK = re.compile(r"front|forward|fwd"), re.compile(r"back|rear")
_LEFT, _RIGHT = re.compile(r"left"), re.compile(r"right")
_ENDINGS = re.compile(r"(/(image\w*|compressed|color|rgb))+$", re.I)


def guess_topic_map(topics: Iterable[BagTopic], frames: Collection[str] = ()) -> TopicMap:
    """What each topic most likely is. ``--list`` shows it, and a mapping file overrules it.

    Args:
        topics: of the bag.
        frames: that /tf connects: the pose comes from there where no odometry is.
    """
    by_type: dict[str, list[BagTopic]] = {}
    for topic in topics:
        if topic.message_count:
            by_type.setdefault(topic.msgtype, []).append(topic)
    lidar = _best(by_type.get(POINT_CLOUD, ()), _LIDAR_NAMES, _NO_LIDAR)
    odometry = _best(by_type.get(ODOMETRY, ()), _ODOMETRY_NAMES)
    markers = [topic.name for topic in by_type.get(HEADER, ()) if topic.name == "/keyframe"]
    return TopicMap(
        cameras=_cameras(by_type),
        ego_motion=EgoMotion(odometry=odometry.name) if odometry else EgoMotion(tf=_fixed_frame(frames)),
        lidar=LidarTopic(lidar.name) if lidar else None,
        keyframes=markers[0] if markers else "",
    )


def _fixed_frame(frames: Collection[str]) -> str:
    """Smooth ``odom`` before ``map``, which jumps when the localisation corrects itself (REP-105)."""
    return next((frame for frame in ("odom", "map", "world") if frame in frames), "odom")


def _best(
    topics: Iterable[BagTopic], likely: tuple[re.Pattern, ...], unlikely: re.Pattern | None = None
) -> BagTopic | None:
    """The topic whose name fits the earliest pattern; among equals the one with most messages."""
    candidates = [topic for topic in topics if not (unlikely and unlikely.search(topic.name))]

    def rank(topic: BagTopic) -> tuple[int, int, str]:
        fits = [i for i, pattern in enumerate(likely) if pattern.search(topic.name)]
        return (min(fits, default=len(likely)), -topic.message_count, topic.name)

    return min(candidates, key=rank, default=None)


def _cameras(by_type: Mapping[str, list[BagTopic]]) -> dict[str, CameraTopics]:
    """One camera per namespace that has images; a camera_info beside them belongs to it."""
    infos = {topic.name for topic in by_type.get(CAMERA_INFO, ())}
    by_namespace: dict[str, list[BagTopic]] = {}
    for topic in (*by_type.get(COMPRESSED_IMAGE, ()), *by_type.get(IMAGE, ())):
        if not _NO_CAMERA_IMAGE.search(topic.name):
            by_namespace.setdefault(_ENDINGS.sub("", topic.name), []).append(topic)
    channels = _channels(sorted(by_namespace))
    cameras = {}
    for namespace, images in sorted(by_namespace.items(), key=lambda item: channels[item[0]]):
        image = min(images, key=lambda topic: (not is_rectified(topic.name), topic.msgtype != COMPRESSED_IMAGE))
        info = _camera_info(image.name, namespace, infos)
        cameras[channels[namespace]] = CameraTopics(image.name, info)
    return cameras


def _camera_info(image: str, namespace: str, infos: set[str]) -> str:
    """The camera_info of the nearest namespace around the image."""
    parts = image.split("/")
    beside = ("/".join(parts[:end]) + "/camera_info" for end in range(len(parts) - 1, 0, -1))
    return next((name for name in beside if name in infos and name.startswith(namespace.rsplit("/", 1)[0])), "")


def _channels(namespaces: list[str]) -> dict[str, str]:
    """A channel for each camera: nuScenes' own where the name says which side it looks to."""
    named = {namespace: _channel(namespace) for namespace in namespaces}
    taken = list(named.values())
    return {
        namespace: channel if taken.count(channel) == 1 else _from_words(namespace)
        for namespace, channel in named.items()
    }


def _channel(namespace: str) -> str:
    last = namespace.rsplit("/", 1)[-1]
    if last.upper().startswith("CAM_") and last.isupper():
        return last
    words = namespace.lower()
    along = "FRONT" if _FRONT.search(words) else "BACK" if _BACK.search(words) else ""
    across = "LEFT" if _LEFT.search(words) else "RIGHT" if _RIGHT.search(words) else ""
    return "_".join(("CAM", *filter(None, (along, across)))) if along else _from_words(namespace)


def _from_words(namespace: str) -> str:
    words = re.sub(r"\W+", "_", namespace.strip("/")).upper()
    return words if words.startswith("CAM") else f"CAM_{words}"
