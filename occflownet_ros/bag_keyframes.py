# SPDX-License-Identifier: Apache-2.0
"""A bag's keyframes: which images belong to each, and what a node needs to hear of them. No ROS calls."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from occflownet_core.errors import BagError
from occflownet_ros.bag import Bag, BagMessage
from occflownet_ros.bag_decoding import decode, stamp_of

KEYFRAME_TOPIC = "/keyframe"

_IMAGE_TOPICS = (
    ("compressed", "image_rect_compressed", "sensor_msgs/msg/CompressedImage"),
    ("raw", "image_rect", "sensor_msgs/msg/Image"),
)
_ANCHOR_BEFORE_KEYFRAME_NS = 100_000_000
_POSE_PATIENCE_NS = 250_000_000


@dataclass(frozen=True)
class NodeInputs:
    """The topics of a bag that a node with a given bundle subscribes to.

    Attributes:
        images: of each camera, in the bundle's order.
        infos: their camera_info topics; empty where the bag lacks one of them.
        odometry: topic of nav_msgs/Odometry, or empty where the bag has none.
        image_transport: ``compressed`` or ``raw``.
    """

    images: tuple[str, ...]
    infos: tuple[str, ...]
    odometry: str
    image_transport: str

    @property
    def topics(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.images, *self.infos, *((self.odometry,) if self.odometry else ()))


def find_inputs(
    bag: Bag, cameras: Sequence[str], namespaces: Sequence[str] = (), odometry: str = "/odom"
) -> NodeInputs:
    """What of a bag a node listens to.

    Args:
        bag: an open bag.
        cameras: of the bundle.
        namespaces: of the cameras; empty means ``/<camera>``.
        odometry: topic of the ego motion.

    Raises:
        BagError: the bag lacks images of a camera.
    """
    namespaces = tuple(namespaces) or tuple(f"/{camera}" for camera in cameras)
    typed = {name: topic.msgtype for name, topic in bag.topics.items() if topic.message_count}
    for transport, suffix, msgtype in _IMAGE_TOPICS:
        images = tuple(f"{namespace}/{suffix}" for namespace in namespaces)
        if all(typed.get(topic) == msgtype for topic in images):
            infos = tuple(f"{namespace}/camera_info" for namespace in namespaces)
            has_infos = all(typed.get(topic) == "sensor_msgs/msg/CameraInfo" for topic in infos)
            has_odometry = typed.get(odometry) == "nav_msgs/msg/Odometry"
            return NodeInputs(images, infos if has_infos else (), odometry if has_odometry else "", transport)
    image_types = {msgtype for _, _, msgtype in _IMAGE_TOPICS}
    found = sorted(name for name, msgtype in typed.items() if msgtype in image_types)
    missing = [
        namespace
        for namespace in namespaces
        if not any(typed.get(f"{namespace}/{suffix}") == msgtype for _, suffix, msgtype in _IMAGE_TOPICS)
    ]
    raise BagError(
        f"bag {bag.path} has no images (image_rect_compressed or image_rect) in {', '.join(missing or namespaces)}, which "
        f"the bundle's cameras are; its images are {', '.join(found) or 'none'}: give a bundle for these cameras, or name "
        "their namespaces with --param camera_namespaces:=[...]"
    )


@dataclass(frozen=True)
class BagKeyframe:
    """One annotated moment of a bag.

    Attributes:
        token: the data set's name for it.
        stamp_ns: for which its labels hold (nuScenes: the LiDAR's).
        set_stamp_ns: the anchor image's, which the node's answer will carry; None where there is no such image.
        image_stamps_ns: of each camera's image, None where there is none within the window.
    """

    token: str
    stamp_ns: int
    set_stamp_ns: int | None
    image_stamps_ns: tuple[int | None, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every camera has its image."""
        return None not in self.image_stamps_ns


def keyframes_of(
    markers: Sequence[tuple[int, str]], image_stamps_ns: Sequence[Sequence[int]], anchor: int, max_diff_ms: float
) -> list[BagKeyframe]:
    """Which images belong to each keyframe, by the node's own rule: the anchor camera's image, and of every other
    camera the one nearest to it.

    nuScenes' LiDAR ends its sweep when the last camera has fired, so a keyframe's anchor image is the last one before
    its stamp, though the next may lie nearer. Only where there is none up to 0.1 s before is the nearest one taken.

    Args:
        markers: (stamp, token) of the keyframes.
        image_stamps_ns: per camera, ascending.
        anchor: index of the anchor camera.
        max_diff_ms: an image further from the anchor's does not belong to its set.
    """
    keyframes = []
    newest_ns = [-1] * len(image_stamps_ns)
    for stamp_ns, token in sorted(markers):
        set_stamp_ns = _anchor_stamp_ns(image_stamps_ns[anchor], stamp_ns)
        stamps_ns: list[int | None] = [None] * len(image_stamps_ns)
        if set_stamp_ns is not None:
            stamps_ns = [_nearest_ns(stamps, set_stamp_ns, max_diff_ms * 1e6) for stamps in image_stamps_ns]
        # An image is part of one set only, as in the node: what an earlier keyframe has, a later one lacks.
        stamps_ns = [s if s is not None and s > n else None for s, n in zip(stamps_ns, newest_ns, strict=True)]
        newest_ns = [n if s is None else s for s, n in zip(stamps_ns, newest_ns, strict=True)]
        keyframes.append(BagKeyframe(token, stamp_ns, stamps_ns[anchor], tuple(stamps_ns)))
    return keyframes


def _anchor_stamp_ns(stamps_ns: Sequence[int], keyframe_ns: int) -> int | None:
    before = bisect_right(stamps_ns, keyframe_ns) - 1
    if before >= 0 and keyframe_ns - stamps_ns[before] <= _ANCHOR_BEFORE_KEYFRAME_NS:
        return stamps_ns[before]
    return _nearest_ns(stamps_ns, keyframe_ns, _ANCHOR_BEFORE_KEYFRAME_NS)


def _nearest_ns(stamps_ns: Sequence[int], stamp_ns: int, limit_ns: float) -> int | None:
    after = bisect_left(stamps_ns, stamp_ns)
    near = [other for other in stamps_ns[max(after - 1, 0) : after + 1] if abs(other - stamp_ns) <= limit_ns]
    return min(near, key=lambda other: abs(other - stamp_ns), default=None)


def read_keyframes(bag: Bag, inputs: NodeInputs, anchor: int, max_diff_ms: float) -> list[BagKeyframe]:
    """The bag's keyframes, as ``/keyframe`` (std_msgs/Header) marks them, in order of time; none where it has none."""
    markers, stamps_ns = [], {topic: [] for topic in inputs.images}
    for message in bag.messages({KEYFRAME_TOPIC, *inputs.images}):
        stamp_ns = stamp_of(message)
        if message.topic == KEYFRAME_TOPIC:
            markers.append((stamp_ns, decode(message).frame_id))
        else:
            stamps_ns[message.topic].append(stamp_ns)
    return keyframes_of(markers, [sorted(set(stamps_ns[topic])) for topic in inputs.images], anchor, max_diff_ms)


def keyframe_messages(
    messages: Iterable[BagMessage], keyframes: Sequence[BagKeyframe], inputs: NodeInputs
) -> Iterator[tuple[BagKeyframe, list[BagMessage]]]:
    """What a node has to hear for each complete keyframe, in order: calibration, ego motion since the keyframe before,
    and then the keyframe's own images; no other image is ever among them.

    Args:
        messages: of the bag, on the inputs' topics, in order of time.
        keyframes: in order of time.
        inputs: the node's topics.
    """
    waiting = deque(keyframe for keyframe in keyframes if keyframe.is_complete)
    wanted = {key for keyframe in waiting for key in _image_keys(keyframe, inputs)}
    infos: dict[str, BagMessage] = {}
    images: dict[tuple[str, int], BagMessage] = {}
    odometry: list[BagMessage] = []
    pose_ns = None
    for message in messages:
        stamp_ns = stamp_of(message)
        if message.topic in inputs.infos:
            infos[message.topic] = message
        elif message.topic == inputs.odometry:
            odometry.append(message)
            pose_ns = stamp_ns
        elif (message.topic, stamp_ns) in wanted:
            images[message.topic, stamp_ns] = message
        while waiting and _is_due(waiting[0], inputs, images, pose_ns, message.time_ns):
            yield _taken(waiting.popleft(), inputs, infos, odometry, images)
    while waiting and all(key in images for key in _image_keys(waiting[0], inputs)):
        yield _taken(waiting.popleft(), inputs, infos, odometry, images)


def _image_keys(keyframe: BagKeyframe, inputs: NodeInputs) -> list[tuple[str, int]]:
    return list(zip(inputs.images, keyframe.image_stamps_ns, strict=True))


def _is_due(
    keyframe: BagKeyframe,
    inputs: NodeInputs,
    images: dict[tuple[str, int], BagMessage],
    pose_ns: int | None,
    now_ns: int,
) -> bool:
    """Whether all images are there, and so is a pose that is not older than the set; or no such pose can be expected."""
    keys = _image_keys(keyframe, inputs)
    if not all(key in images for key in keys):
        return False
    is_posed = not inputs.odometry or (pose_ns is not None and pose_ns >= keyframe.set_stamp_ns)
    return is_posed or now_ns - max(images[key].time_ns for key in keys) > _POSE_PATIENCE_NS


def _taken(
    keyframe: BagKeyframe,
    inputs: NodeInputs,
    infos: dict[str, BagMessage],
    odometry: list[BagMessage],
    images: dict[tuple[str, int], BagMessage],
) -> tuple[BagKeyframe, list[BagMessage]]:
    own = [images.pop(key) for key in _image_keys(keyframe, inputs)]
    messages = [*infos.values(), *odometry, *own]
    odometry.clear()
    return keyframe, messages
