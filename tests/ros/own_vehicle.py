# SPDX-License-Identifier: Apache-2.0
"""A bag of a vehicle that nobody tuned to nuScenes, with everything in it known in closed form.

It drives a circle; odometry moves ``base_footprint`` in ``odom`` at 50 Hz and nothing else. The front camera sends raw
images through a lens with distortion, the rear one PNGs without; the LiDAR's clouds are organised, padded, hold points
without return, a class per point and each point's time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from scipy.spatial.transform import Rotation

from occflownet_ros.nuscenes_messages import typestore

START_NS = 1_700_000_000_000_000_000
SECONDS = 3.0
SPEED_MPS, YAW_RATE_RADPS = 6.0, 0.4
WIDTH_PX, HEIGHT_PX = 64, 48
MATRIX = np.array([[60.0, 0, 31.0], [0, 61.0, 23.0], [0, 0, 1]])
DISTORTION = (-0.2, 0.05, 0.001, -0.002, 0.0)
OPTICAL = np.array([[0, 0, 1.0], [-1, 0, 0], [0, -1, 0]])
"""Columns: the optical frame's axes in a frame that looks along x."""

ROWS, COLUMNS = 4, 25
LABELS = {0: "noise", 3: "vehicle.car", 7: "flat.driveable_surface"}
TOPICS_YAML = """
cameras:
  CAM_FRONT: {image: /front/image_raw, camera_info: /front/camera_info}
  CAM_BACK: {image: /rear/image_raw/compressed, camera_info: /rear/camera_info}
lidar: {topic: /points, label_field: class, label_names: {0: noise, 3: vehicle.car, 7: flat.driveable_surface}}
ego_motion: {odometry: /odom}
"""


def rigid(rotation: np.ndarray, translation_m: tuple[float, float, float]) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, translation_m
    return pose


def odom_from_footprint(stamp_ns: int) -> np.ndarray:
    """A circle of radius v / w from the origin, heading x."""
    yaw, radius_m = YAW_RATE_RADPS * (stamp_ns - START_NS) / 1e9, SPEED_MPS / YAW_RATE_RADPS
    place = (radius_m * np.sin(yaw), radius_m * (1 - np.cos(yaw)), 0.1)
    return rigid(Rotation.from_euler("z", yaw).as_matrix(), place)


STATIC = {
    ("base_footprint", "base_link"): rigid(np.eye(3), (0.1, 0, 0.3)),
    ("base_link", "roof"): rigid(Rotation.from_euler("ZYX", [0.02, 0.01, -0.01]).as_matrix(), (1.0, 0, 1.6)),
    ("roof", "front_camera"): rigid(np.eye(3), (0.5, 0.1, -0.1)),
    ("front_camera", "front_optical"): rigid(OPTICAL, (0, 0, 0)),
    ("roof", "rear_optical"): rigid(Rotation.from_euler("z", np.pi).as_matrix() @ OPTICAL, (-0.5, 0, 0)),
    ("roof", "velodyne"): rigid(Rotation.from_euler("z", 0.5).as_matrix(), (0, 0, 0.2)),
}


def base_from(frame: str) -> np.ndarray:
    """A sensor's mount in base_link, by hand along the chain above."""
    chain = {"front_optical": ["roof", "front_camera"], "rear_optical": ["roof"], "velodyne": ["roof"]}[frame]
    pose, parent = np.eye(4), "base_link"
    for child in (*chain, frame):
        pose, parent = pose @ STATIC[parent, child], child
    return pose


def odom_from_base(stamp_ns: int) -> np.ndarray:
    return odom_from_footprint(stamp_ns) @ STATIC["base_footprint", "base_link"]


def new(name: str, *values: object) -> object:
    return typestore().types[name](*values)


def header(stamp_ns: int, frame: str) -> object:
    return new("std_msgs/msg/Header", new("builtin_interfaces/msg/Time", *divmod(stamp_ns, 10**9)), frame)


def parts(pose: np.ndarray) -> tuple[list[float], list[float]]:
    return pose[:3, 3].tolist(), Rotation.from_matrix(pose[:3, :3]).as_quat().tolist()


def transforms(stamp_ns: int, poses: dict[tuple[str, str], np.ndarray]) -> object:
    stamped = []
    for (parent, child), pose in poses.items():
        translation, rotation = parts(pose)
        transform = new(
            "geometry_msgs/msg/Transform",
            new("geometry_msgs/msg/Vector3", *translation),
            new("geometry_msgs/msg/Quaternion", *rotation),
        )
        stamped.append(new("geometry_msgs/msg/TransformStamped", header(stamp_ns, parent), child, transform))
    return new("tf2_msgs/msg/TFMessage", stamped)


def odometry(stamp_ns: int, pose: np.ndarray, child: str = "base_footprint") -> object:
    position, rotation = parts(pose)
    zero = new("geometry_msgs/msg/Vector3", 0.0, 0.0, 0.0)
    pose_message = new(
        "geometry_msgs/msg/Pose",
        new("geometry_msgs/msg/Point", *position),
        new("geometry_msgs/msg/Quaternion", *rotation),
    )
    return new(
        "nav_msgs/msg/Odometry",
        header(stamp_ns, "odom"),
        child,
        new("geometry_msgs/msg/PoseWithCovariance", pose_message, np.zeros(36)),
        new("geometry_msgs/msg/TwistWithCovariance", new("geometry_msgs/msg/Twist", zero, zero), np.zeros(36)),
    )


def camera_info(
    stamp_ns: int, frame: str, model: str = "plumb_bob", distortion: tuple = DISTORTION, width_px: int = WIDTH_PX
) -> object:
    projection = np.hstack([MATRIX, np.zeros((3, 1))])
    region = new("sensor_msgs/msg/RegionOfInterest", 0, 0, 0, 0, False)
    return new(
        "sensor_msgs/msg/CameraInfo",
        *(header(stamp_ns, frame), HEIGHT_PX, width_px, model, np.array(distortion, dtype=float)),
        *(MATRIX.ravel(), np.eye(3).ravel(), projection.ravel(), 0, 0, region),
    )


def picture(stamp_ns: int) -> np.ndarray:
    """BGR; different at every moment, and smooth enough to survive resampling and JPEG."""
    coarse = np.random.default_rng(stamp_ns // 10**6).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (WIDTH_PX, HEIGHT_PX), interpolation=cv2.INTER_CUBIC)


def raw_image(stamp_ns: int, frame: str, encoding: str = "bgr8") -> object:
    """Rows are padded by five bytes."""
    rows = picture(stamp_ns).reshape(HEIGHT_PX, -1)
    data = np.pad(rows, ((0, 0), (0, 5))).ravel()
    return new(
        "sensor_msgs/msg/Image", header(stamp_ns, frame), HEIGHT_PX, WIDTH_PX, encoding, 0, WIDTH_PX * 3 + 5, data
    )


def compressed_image(stamp_ns: int, frame: str, suffix: str) -> object:
    data = cv2.imencode(suffix, picture(stamp_ns))[1].ravel()
    return new("sensor_msgs/msg/CompressedImage", header(stamp_ns, frame), suffix[1:], data)


CLOUD = np.dtype(
    {
        "names": ["t", "x", "y", "z", "intensity", "ring", "class"],
        "formats": ["<u4", "<f4", "<f4", "<f4", "<u2", "u1", "<i2"],
        "offsets": [0, 4, 8, 12, 16, 18, 20],
        "itemsize": 24,
    }
)


def cloud_points(stamp_ns: int, moving: bool) -> np.ndarray:
    """[ROWS, COLUMNS] records; points 5 and 6 of each row are no return. A world of fixed points, seen column by column
    within 50 ms if ``moving``, else all at the stamp."""
    rng = np.random.default_rng(9)
    in_odom_m = rng.uniform(-30, 30, (ROWS, COLUMNS, 3))
    points = np.zeros((ROWS, COLUMNS), dtype=CLOUD)
    for column in range(COLUMNS):
        offset_ns = 2_000_000 * column if moving else 0
        lidar_from_odom = np.linalg.inv(odom_from_base(stamp_ns + offset_ns) @ base_from("velodyne"))
        points["t"][:, column] = offset_ns
        seen_m = in_odom_m[:, column] @ lidar_from_odom[:3, :3].T + lidar_from_odom[:3, 3]
        for axis, name in enumerate("xyz"):
            points[name][:, column] = seen_m[:, axis]
    points["intensity"] = np.arange(COLUMNS)
    points["ring"] = np.arange(ROWS)[:, None]
    points["class"] = np.array([0, 3, 7, 99, 3])[np.arange(COLUMNS) % 5]
    points["x"][:, 5] = np.nan
    for name in "xyz":
        points[name][:, 6] = 0
    return points


def cloud(stamp_ns: int, frame: str, points: np.ndarray) -> object:
    """Rows are padded by eight bytes."""
    kinds = {"<u4": 6, "<f4": 7, "<u2": 4, "|u1": 2, "<i2": 3}
    fields = [
        new("sensor_msgs/msg/PointField", name, CLOUD.fields[name][1], kinds[CLOUD.fields[name][0].str], 1)
        for name in CLOUD.names
    ]
    rows, columns = points.shape
    data = np.pad(np.frombuffer(points.tobytes(), np.uint8).reshape(rows, -1), ((0, 0), (0, 8))).ravel()
    step = columns * CLOUD.itemsize + 8
    return new(
        "sensor_msgs/msg/PointCloud2",
        header(stamp_ns, frame),
        rows,
        columns,
        fields,
        False,
        CLOUD.itemsize,
        step,
        data,
        False,
    )


Messages = list[tuple[int, str, object]]
"""(bag time, topic, message)."""


def drive(moving_sweep: bool = False) -> Messages:
    """Every message: LiDAR at 10 Hz, cameras at 15 Hz out of step with it, odometry at 50 Hz."""
    messages: Messages = [(START_NS, "/tf_static", transforms(START_NS, STATIC))]
    for step in range(int(SECONDS * 50) + 1):
        stamp = START_NS + step * 20_000_000
        messages.append((stamp, "/odom", odometry(stamp, odom_from_footprint(stamp))))
    for step in range(int(SECONDS * 15)):
        front, rear = (START_NS + round(step * 1e9 / 15) + late for late in (7_000_000, 11_000_000))
        messages += [
            (front, "/front/camera_info", camera_info(front, "front_optical")),
            (front, "/front/image_raw", raw_image(front, "front_optical")),
            (rear, "/rear/camera_info", camera_info(rear, "rear_optical", distortion=(0.0,) * 5)),
            (rear, "/rear/image_raw/compressed", compressed_image(rear, "rear_optical", ".png")),
        ]
    for step in range(int(SECONDS * 10)):
        stamp = START_NS + 20_000_000 + step * 100_000_000
        points = cloud_points(stamp, moving_sweep)
        messages.append((stamp + 60_000_000, "/points", cloud(stamp, "velodyne", points)))  # a driver is late
    return messages


def write_bag(path: Path, messages: Messages, keep: Callable[[str], bool] = lambda topic: True) -> Path:
    """The messages of the topics to keep, as an sqlite3 bag."""
    with Writer(path, version=8, storage_plugin=StoragePlugin.SQLITE3) as writer:
        connections = {}
        for time_ns, topic, message in sorted(messages, key=lambda entry: entry[0]):
            if not keep(topic):
                continue
            kind = message.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=typestore())
            writer.write(connections[topic], time_ns, typestore().serialize_cdr(message, kind))
    return path
