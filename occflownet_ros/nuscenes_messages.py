# SPDX-License-Identifier: Apache-2.0
"""nuScenes measurements as serialised ROS 2 messages (CDR), made by rosbags: no ROS installation takes part."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.store import Typestore

from occflownet_core import poses
from occflownet_core.camera import Camera
from occflownet_core.poses import RecordedPose

_TWIST_WINDOW_NS = 50_000_000
_UINT8, _FLOAT32 = 2, 7  # sensor_msgs/msg/PointField
LIDARSEG_FIELD = "lidarseg"
"""Name of the field of a point cloud that holds each point's nuScenes-lidarseg index."""


@cache
def typestore() -> Typestore:
    """Message definitions; the ones used here are the same from Humble to Kilted."""
    return get_typestore(Stores.ROS2_JAZZY)


def _new(name: str, *values: object) -> object:
    return typestore().types[name](*values)


def _cdr(message: object) -> bytes:
    return bytes(typestore().serialize_cdr(message, message.__msgtype__))


def _header(stamp_ns: int, frame_id: str) -> object:
    stamp = _new("builtin_interfaces/msg/Time", *divmod(stamp_ns, 1_000_000_000))
    return _new("std_msgs/msg/Header", stamp, frame_id)


def header(stamp_ns: int, frame_id: str) -> bytes:
    """std_msgs/msg/Header."""
    return _cdr(_header(stamp_ns, frame_id))


def compressed_image(stamp_ns: int, frame_id: str, jpeg: bytes) -> bytes:
    """sensor_msgs/msg/CompressedImage with the JPEG as it is."""
    data = np.frombuffer(jpeg, dtype=np.uint8)
    return _cdr(_new("sensor_msgs/msg/CompressedImage", _header(stamp_ns, frame_id), "jpeg", data))


def camera_info(stamp_ns: int, camera: Camera) -> bytes:
    """sensor_msgs/msg/CameraInfo of a rectified camera: no distortion, R = identity, P = [K | 0]."""
    projection = np.hstack([camera.intrinsic, np.zeros((3, 1))])
    region = _new("sensor_msgs/msg/RegionOfInterest", 0, 0, 0, 0, False)
    return _cdr(
        _new(
            "sensor_msgs/msg/CameraInfo",
            _header(stamp_ns, camera.name),
            camera.height_px,
            camera.width_px,
            "plumb_bob",
            np.zeros(5),
            camera.intrinsic.ravel(),
            np.eye(3).ravel(),
            projection.ravel(),
            0,
            0,
            region,
        )
    )


def point_cloud(stamp_ns: int, frame_id: str, points: np.ndarray, lidarseg: np.ndarray | None = None) -> bytes:
    """sensor_msgs/msg/PointCloud2 of float32 [n, 5]: x, y, z, intensity, ring, all float32 as nuScenes stores them.

    With nuScenes-lidarseg indices uint8 [n], those are one more field, ``lidarseg``.
    """
    names = ("x", "y", "z", "intensity", "ring")
    fields = [_new("sensor_msgs/msg/PointField", name, 4 * i, _FLOAT32, 1) for i, name in enumerate(names)]
    data = np.ascontiguousarray(points, dtype="<f4").view(np.uint8)  # [n, 20]
    if lidarseg is not None:
        fields.append(_new("sensor_msgs/msg/PointField", LIDARSEG_FIELD, data.shape[1], _UINT8, 1))
        data = np.pad(data, ((0, 0), (0, 4)))  # points stay aligned to four bytes
        data[:, -4] = lidarseg
    (count, step), data = data.shape, data.ravel()
    return _cdr(
        _new(
            "sensor_msgs/msg/PointCloud2",
            _header(stamp_ns, frame_id),
            1,
            count,
            fields,
            False,
            step,
            step * count,
            data,
            True,
        )
    )


def odometry(stamp_ns: int, ego: RecordedPose, linear_mps: np.ndarray, angular_radps: np.ndarray) -> bytes:
    """nav_msgs/msg/Odometry, ``base_link`` in ``map``; the twist is the child's, in the child's own axes (REP-105)."""
    translation, rotation = _parts(ego)
    position = _new("geometry_msgs/msg/Point", *translation)
    orientation = _new("geometry_msgs/msg/Quaternion", *rotation)
    linear, angular = (_new("geometry_msgs/msg/Vector3", *map(float, v)) for v in (linear_mps, angular_radps))
    pose = _new("geometry_msgs/msg/Pose", position, orientation)
    twist = _new("geometry_msgs/msg/Twist", linear, angular)
    return _cdr(
        _new(
            "nav_msgs/msg/Odometry",
            _header(stamp_ns, "map"),
            "base_link",
            _new("geometry_msgs/msg/PoseWithCovariance", pose, np.zeros(36)),
            _new("geometry_msgs/msg/TwistWithCovariance", twist, np.zeros(36)),
        )
    )


def transforms(stamp_ns: int, parent: str, children: Mapping[str, RecordedPose]) -> bytes:
    """tf2_msgs/msg/TFMessage: where each child frame is in the parent."""
    stamped = []
    for child, recorded in children.items():
        translation, rotation = _parts(recorded)
        transform = _new(
            "geometry_msgs/msg/Transform",
            _new("geometry_msgs/msg/Vector3", *translation),
            _new("geometry_msgs/msg/Quaternion", *rotation),
        )
        stamped.append(_new("geometry_msgs/msg/TransformStamped", _header(stamp_ns, parent), child, transform))
    return _cdr(_new("tf2_msgs/msg/TFMessage", stamped))


def label_array(labels: np.ndarray) -> bytes:
    """std_msgs/msg/UInt8MultiArray of uint8 [X, Y, Z], z running fastest; the message has no place for a stamp."""
    sizes = labels.shape
    strides = [int(np.prod(sizes[i:])) for i in range(3)]
    dims = [
        _new("std_msgs/msg/MultiArrayDimension", label, size, stride)
        for label, size, stride in zip("xyz", sizes, strides, strict=True)
    ]
    layout = _new("std_msgs/msg/MultiArrayLayout", dims, 0)
    return _cdr(_new("std_msgs/msg/UInt8MultiArray", layout, np.ascontiguousarray(labels, dtype=np.uint8).ravel()))


def twists(stamps_ns: np.ndarray, global_from_ego: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Velocity of the vehicle in its own axes, by differences over about 0.1 s around each stamp.

    Sensors fire only milliseconds apart: over so short a time the poses' rounding would drown the motion.

    Args:
        stamps_ns: [n] int64, ascending.
        global_from_ego: [n, 4, 4].

    Returns:
        linear_mps [n, 3] and angular_radps [n, 3]; zero where there is but one pose.
    """
    stamps_ns = np.asarray(stamps_ns, dtype=np.int64)
    last = len(stamps_ns) - 1
    # The poses at least the window away; at the ends of the scene, and in gaps, the nearest neighbour or none.
    before = np.maximum(np.searchsorted(stamps_ns, stamps_ns - _TWIST_WINDOW_NS, side="right") - 1, 0)
    after = np.minimum(np.searchsorted(stamps_ns, stamps_ns + _TWIST_WINDOW_NS, side="left"), last)
    seconds = (stamps_ns[after] - stamps_ns[before]) / 1e9
    rate = np.divide(1.0, seconds, out=np.zeros_like(seconds), where=seconds > 0)[:, None]

    moved_m = global_from_ego[after, :3, 3] - global_from_ego[before, :3, 3]  # [n, 3] in the global frame
    linear_mps = np.einsum("nji,nj->ni", global_from_ego[:, :3, :3], moved_m) * rate
    turns = poses.inverse(global_from_ego[before]) @ global_from_ego[after]  # [n, 4, 4]
    angular_radps = np.array([_rotation_vector(turn) for turn in turns]) * rate
    return linear_mps, angular_radps


def _rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle [3] of a rotation; the axis is the same in both frames that the rotation connects."""
    w, *axis = poses.quaternion_from_rotation(rotation)
    sine = np.linalg.norm(axis)
    return np.asarray(axis) * (2 * np.arctan2(sine, w) / sine if sine > 0 else 2)


def _parts(recorded: RecordedPose) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Translation (x, y, z) and quaternion (x, y, z, w), scalar last as ROS writes it; both as recorded."""
    w, x, y, z = recorded.quaternion_wxyz
    return recorded.translation_m, (x, y, z, w)
