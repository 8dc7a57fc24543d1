# SPDX-License-Identifier: Apache-2.0
"""sensor_msgs/PointCloud2 as nuScenes stores a sweep: float32 x, y, z, intensity, ring; and classes and times per point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from occflownet_core.errors import BagError, ConfigError
from occflownet_core.labels import LIDARSEG_NAMES
from occflownet_ros.topic_map import LidarTopic

_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}  # sensor_msgs/PointField
_INTENSITY = ("intensity", "reflectivity", "reflectance", "i")
_RING = ("ring", "channel", "line", "laser_id")
_ABSOLUTE_FROM_S = 86_400.0
_DESKEW_STEP_NS = 1_000_000
_LONGEST_POINT = 1 << 16
_NOISE = LIDARSEG_NAMES.index("noise")


@dataclass(frozen=True, eq=False)
class Sweep:
    """The returns of a point cloud.

    Attributes:
        points: float32 [n, 5]: x, y, z in the LiDAR's frame (metres), intensity, ring; the latter two zero where the
            cloud has no such field.
        raw_label: uint8 [n] nuScenes-lidarseg index, or None.
        time_ns: int64 [n] when each was measured, or None.
        dropped: points left out because they are no return: not finite, or at the origin.
    """

    points: np.ndarray
    raw_label: np.ndarray | None
    time_ns: np.ndarray | None
    dropped: int


def sweep_of_cloud(message: object, stamp_ns: int, lidar: LidarTopic) -> Sweep:
    """The returns of a decoded sensor_msgs/PointCloud2.

    Args:
        message: of any field layout, byte order and padding.
        stamp_ns: of its header.
        lidar: names of the fields for labels and times.

    Raises:
        BagError: it has no x, y, z or not the fields that the mapping names, or fewer bytes than it says.
        ConfigError: see ``raw_labels``.
    """
    table = _table(message, lidar.topic)
    columns = [_column(table, names) for names in (("x",), ("y",), ("z",), _INTENSITY, _RING)]
    if any(column is None for column in columns[:3]):
        raise BagError(f"the clouds on {lidar.topic} have no x, y and z but {', '.join(table.dtype.names)}")
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large for float32 is no return
        points = np.stack([np.zeros(len(table)) if c is None else c for c in columns], axis=1).astype(np.float32)
    kept = np.isfinite(points[:, :3]).all(axis=1) & points[:, :3].any(axis=1)
    labels = _require(table, lidar.label_field, lidar.topic)[kept] if lidar.label_field else None
    times = _require(table, lidar.time_field, lidar.topic)[kept] if lidar.time_field else None
    return Sweep(
        points[kept],
        None if labels is None else raw_labels(labels, lidar),
        None if times is None else _times_ns(times, stamp_ns, lidar.time_unit_s),
        int(len(kept) - kept.sum()),
    )


def field_names(message: object) -> list[str]:
    """Names of a cloud's fields."""
    return [field.name for field in message.fields]


def raw_labels(values: np.ndarray, lidar: LidarTopic) -> np.ndarray:
    """nuScenes-lidarseg index uint8 [n] of the label field's values [n]; of a value without a name, noise.

    Raises:
        ConfigError: values are taken as lidarseg's own and one is not 0..31.
    """
    values = values.astype(np.int64)
    if not lidar.label_names:
        wrong = values[(values < 0) | (values >= len(LIDARSEG_NAMES))]
        if wrong.size:
            raise ConfigError(
                f"field '{lidar.label_field}' on {lidar.topic} holds {wrong[0]}, which is no nuScenes-lidarseg index "
                f"(0..{len(LIDARSEG_NAMES) - 1}); say what its values mean with lidar.label_names in --map"
            )
        return values.astype(np.uint8)
    found, place = np.unique(values, return_inverse=True)
    names = [lidar.label_names.get(int(value)) for value in found]
    return np.array([LIDARSEG_NAMES.index(name) if name else _NOISE for name in names], dtype=np.uint8)[place.ravel()]


def deskewed(sweep: Sweep, stamp_ns: int, global_from_lidar: Callable[[int], np.ndarray | None]) -> np.ndarray:
    """The points [n, 5] where the LiDAR would have seen them, all at once, at the cloud's stamp.

    Every point moves by what the vehicle drove between its own time (to the millisecond) and the stamp; what moves in
    the scene by itself stays smeared. A point outside the recorded motion stays where it is.

    Args:
        sweep: with times.
        stamp_ns: of the cloud.
        global_from_lidar: the LiDAR's pose [4, 4] at a time in nanoseconds, or None.
    """
    points = sweep.points.copy()
    steps = np.round((sweep.time_ns - stamp_ns) / _DESKEW_STEP_NS).astype(np.int64)
    at_stamp = global_from_lidar(stamp_ns)
    for step in np.unique(steps):
        then = global_from_lidar(stamp_ns + int(step) * _DESKEW_STEP_NS)
        if step and then is not None and at_stamp is not None:
            mine = steps == step
            now_from_then = np.linalg.solve(at_stamp, then)
            points[mine, :3] = sweep.points[mine, :3] @ now_from_then[:3, :3].T + now_from_then[:3, 3]
    return points


def _table(message: object, topic: str) -> np.ndarray:
    """The points as a structured array [n]."""
    layout = _layout(message, topic)
    data, used = np.asarray(message.data, dtype=np.uint8), message.width * message.point_step
    if data.size < message.row_step * message.height or message.row_step < used:
        raise BagError(
            f"a cloud on {topic} of {message.width} x {message.height} points of {message.point_step} bytes holds "
            f"{data.size} bytes; it was cut short or mislabelled"
        )
    rows = data[: message.row_step * message.height].reshape(message.height, message.row_step)[:, :used]
    return np.frombuffer(np.ascontiguousarray(rows).tobytes(), dtype=layout)


def _layout(message: object, topic: str) -> np.dtype:
    """What a point's bytes mean; of fields with one name the first counts."""
    order = ">" if message.is_bigendian else "<"
    fields = {}
    for field in message.fields:
        if field.datatype in _DTYPES and field.name:
            fields.setdefault(field.name, (np.dtype(order + _DTYPES[field.datatype]), field.offset))
    ends = [kind.itemsize + offset for kind, offset in fields.values()]
    if not max(ends, default=1) <= message.point_step <= _LONGEST_POINT:
        raise BagError(
            f"a cloud on {topic} has fields that end at byte {max(ends, default=0)} of points of {message.point_step} "
            "bytes; its field offsets or its point_step are wrong: correct its driver"
        )
    return np.dtype(
        {
            "names": list(fields),
            "formats": [kind for kind, _ in fields.values()],
            "offsets": [offset for _, offset in fields.values()],
            "itemsize": message.point_step,
        }
    )


def _column(table: np.ndarray, names: tuple[str, ...]) -> np.ndarray | None:
    return next((table[name] for name in names if name in table.dtype.names), None)


def _require(table: Mapping, name: str, topic: str) -> np.ndarray:
    if name not in table.dtype.names:
        raise BagError(
            f"the clouds on {topic} have no field '{name}'; they have {', '.join(table.dtype.names)}: correct --map"
        )
    return table[name]


def _times_ns(times: np.ndarray, stamp_ns: int, unit_s: float) -> np.ndarray:
    if not times.size:
        return np.zeros(0, dtype=np.int64)
    offsets_ns = times.astype(np.float64) * (unit_s * 1e9)
    is_relative = np.median(np.abs(offsets_ns)) < _ABSOLUTE_FROM_S * 1e9  # whatever a few damaged points say
    damaged = ~(np.abs(offsets_ns) < np.iinfo(np.int64).max // 2)
    offsets_ns[damaged] = 0 if is_relative else stamp_ns
    return offsets_ns.astype(np.int64) + (stamp_ns if is_relative else 0)
