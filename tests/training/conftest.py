# SPDX-License-Identifier: Apache-2.0
"""A data root in nuScenes' format that takes milliseconds to write, with everything in it known in closed form.

The world is a cloud of labelled points that stands still while the vehicle drives a curve; every sensor fires at its
own time, with its own ego pose. Nothing hides anything, so each sweep holds every point.
"""

import copy
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

CHANNELS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
YAW_DEG = {"CAM_FRONT": 0, "CAM_FRONT_RIGHT": -56, "CAM_BACK_RIGHT": -111}
YAW_DEG |= {"CAM_BACK": 180, "CAM_BACK_LEFT": 108, "CAM_FRONT_LEFT": 55}
OFFSET_US = dict(zip(CHANNELS, (-35_000, -27_000, -20_000, -10_000, -500, -43_000), strict=True)) | {"LIDAR_TOP": 0}
WIDTH_PX, HEIGHT_PX, FOCAL_PX = 320, 180, 250.0
SCENES = {"tiny-0001": 5, "tiny-0002": 2}
CATEGORIES = ("vehicle.car", "vehicle.truck", "human.pedestrian.adult", "movable_object.barrier")
VERSION = "v1.0-tiny"


def global_from_ego(seconds: float) -> np.ndarray:
    """The drive: about 8 m/s on a curve, with a little roll and heave."""
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("ZYX", [0.3 + 0.1 * seconds, 0.01, 0.02]).as_matrix()
    pose[:3, 3] = 400 + 8 * seconds, 1100 + 0.4 * seconds**2, 0.1 * seconds
    return pose


def ego_from_sensor(channel: str) -> np.ndarray:
    """Where the sensors sit; the LiDAR is turned by a quarter, as on nuScenes' cars."""
    pose = np.eye(4)
    if channel == "LIDAR_TOP":
        pose[:3, :3] = Rotation.from_euler("ZYX", [-np.pi / 2, 0.01, 0.005]).as_matrix()
        pose[:3, 3] = 0.94, 0, 1.84
    else:
        yaw = np.radians(YAW_DEG[channel])
        optical = np.array([[0, 0, 1.0], [-1, 0, 0], [0, -1, 0]])
        pose[:3, :3] = Rotation.from_euler("ZYX", [yaw, 0.02, 0]).as_matrix() @ optical
        pose[:3, 3] = 0.8 + 0.6 * np.cos(yaw), 0.5 * np.sin(yaw), 1.5
    return pose


def global_from_car(seconds: float) -> np.ndarray:
    """A car ahead that drives and turns."""
    pose = global_from_ego(0).copy()
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("Z", 0.2 * seconds).as_matrix()
    turn[:3, 3] = 12 + 6 * seconds, 2 - seconds, 0.8
    return pose @ turn


@dataclass
class TinyRoot:
    """Where it lies, and what it was made of.

    Attributes:
        path: the data root.
        points_global_m: [P, 3], the world.
        raw: uint8 [P], their lidarseg indices.
    """

    path: Path
    points_global_m: np.ndarray
    raw: np.ndarray
    tables: dict[str, list] = field(default_factory=dict)

    def write_tables(self) -> None:
        for name, rows in self.tables.items():
            (self.path / VERSION / f"{name}.json").write_text(json.dumps(rows))


def make_tiny_root(path: Path, seed: int = 0) -> TinyRoot:
    rng = np.random.default_rng(seed)
    near_m = np.concatenate([rng.uniform((-45, -45, -1.5), (45, 45, 6), (1500, 3)), rng.normal(0, 2, (60, 3))])
    points = near_m @ global_from_ego(0)[:3, :3].T + global_from_ego(0)[:3, 3]
    root = TinyRoot(path, points, rng.integers(0, 32, len(points)).astype(np.uint8))
    (path / VERSION).mkdir(parents=True)
    for folder in ("lidarseg", "panoptic"):
        (path / folder / VERSION).mkdir(parents=True)
    tables = {name: [] for name in ("sample", "sample_data", "ego_pose", "sample_annotation", "instance", "scene")}
    tables |= {"lidarseg": [], "panoptic": [], "visibility": [{"token": "v", "level": "all", "description": ""}]}
    tables |= {"attribute": [], "log": [{"token": "log", "map_token": "map", "logfile": "", "location": "nowhere"}]}
    tables["map"] = [{"token": "map", "log_tokens": ["log"], "filename": "map.png", "category": "semantic_prior"}]
    tables["category"] = [{"token": c, "name": c, "description": "", "index": i} for i, c in enumerate(CATEGORIES)]
    tables["sensor"] = [
        {"token": c, "channel": c, "modality": "lidar" if c == "LIDAR_TOP" else "camera"} for c in OFFSET_US
    ]
    tables["calibrated_sensor"] = [
        {"token": c, "sensor_token": c, **_pose_fields(ego_from_sensor(c)), "camera_intrinsic": _intrinsic(c)}
        for c in OFFSET_US
    ]
    cv2.imwrite(str(path / "map.png"), np.zeros((2, 2), np.uint8))
    root.tables = tables
    for scene, count in SCENES.items():
        _write_scene(root, scene, count, rng)
    (path / VERSION / "splits.json").write_text(json.dumps({"train": ["tiny-0001"], "val": ["tiny-0002"]}))
    root.write_tables()
    return root


def _write_scene(root: TinyRoot, scene: str, count: int, rng: np.random.Generator) -> None:
    tokens = [f"{scene}-{k}" for k in range(count)]
    first, last = tokens[0], tokens[-1]
    root.tables["scene"].append(
        {"token": scene, "name": scene, "log_token": "log", "nbr_samples": count, "description": ""}
        | {"first_sample_token": first, "last_sample_token": last}
    )
    for k, token in enumerate(tokens):
        near = {"prev": tokens[k - 1] if k else "", "next": tokens[k + 1] if k + 1 < count else ""}
        stamp_us = 1_600_000_000_000_000 + 500_000 * k
        root.tables["sample"].append({"token": token, "timestamp": stamp_us, "scene_token": scene, **near})
        for channel in OFFSET_US:
            _write_recording(root, token, channel, stamp_us, 0.5 * k, rng)
        gts = root.path / "gts" / scene / token
        gts.mkdir(parents=True)
        labels = np.full((200, 200, 16), 17, np.uint8)
        labels[110:120, 90:95, 2:5] = 4
        mask = np.zeros(labels.shape, np.uint8)
        mask[60:130, 80:150] = 1
        np.savez_compressed(gts / "labels.npz", semantics=labels, mask_camera=mask, mask_lidar=mask)
    _write_boxes(root, scene, tokens)


def _write_recording(
    root: TinyRoot, token: str, channel: str, stamp_us: int, seconds: float, rng: np.random.Generator
) -> None:
    seconds += OFFSET_US[channel] * 1e-6
    pose = global_from_ego(seconds)
    name = f"{token}-{channel}"
    is_lidar = channel == "LIDAR_TOP"
    filename = f"samples/{channel}/{name}.{'pcd.bin' if is_lidar else 'jpg'}"
    path = root.path / filename
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_lidar:
        lidar_from_global = np.linalg.inv(pose @ ego_from_sensor(channel))
        points = root.points_global_m @ lidar_from_global[:3, :3].T + lidar_from_global[:3, 3]
        np.concatenate([points, np.zeros((len(points), 2))], axis=1).astype(np.float32).tofile(path)
        root.raw.tofile(root.path / "lidarseg" / VERSION / f"{name}_lidarseg.bin")
        panoptic = root.raw.astype(np.uint16) * 1000 + np.arange(len(root.raw)) % 7
        np.savez_compressed(root.path / "panoptic" / VERSION / f"{name}_panoptic.npz", data=panoptic)
        for table, end in (("lidarseg", "bin"), ("panoptic", "npz")):
            row = {"token": name, "sample_data_token": name, "filename": f"{table}/{VERSION}/{name}_{table}.{end}"}
            root.tables[table].append(row)
    else:
        noise = rng.integers(0, 256, (HEIGHT_PX // 10, WIDTH_PX // 10, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(noise, (WIDTH_PX, HEIGHT_PX)))
    root.tables["ego_pose"].append({"token": name, "timestamp": stamp_us + OFFSET_US[channel], **_pose_fields(pose)})
    root.tables["sample_data"].append(
        {"token": name, "sample_token": token, "ego_pose_token": name, "calibrated_sensor_token": channel}
        | {"timestamp": stamp_us + OFFSET_US[channel], "fileformat": path.suffix, "is_key_frame": True}
        | {"height": 0 if is_lidar else HEIGHT_PX, "width": 0 if is_lidar else WIDTH_PX, "filename": filename}
        | {"prev": "", "next": ""}
    )


def _write_boxes(root: TinyRoot, scene: str, tokens: list[str]) -> None:
    """A moving car in every keyframe, a truck in the first only, a person in all but the first, a barrier, and a box
    without volume."""
    still = global_from_car(1.0)
    seen = [
        ("vehicle.car", (1.8, 4.5, 1.6), lambda k: global_from_car(0.5 * k)),
        ("vehicle.truck", (2.5, 8.0, 3.0), lambda k: still if k == 0 else None),
        ("human.pedestrian.adult", (0.6, 0.7, 1.8), lambda k: still if k else None),
        ("movable_object.barrier", (2.0, 0.5, 1.0), lambda k: still),
        ("vehicle.car", (0.0, 4.0, 1.5), lambda k: still),
    ]
    for i, (category, size, pose_at) in enumerate(seen):
        instance = f"{scene}-object-{i}"
        root.tables["instance"].append(
            {"token": instance, "category_token": category, "nbr_annotations": 1}
            | {"first_annotation_token": "", "last_annotation_token": ""}
        )
        for k, token in enumerate(tokens):
            pose = pose_at(k)
            if pose is not None:
                root.tables["sample_annotation"].append(
                    {"token": f"{instance}-{k}", "sample_token": token, "instance_token": instance}
                    | {"visibility_token": "v", "attribute_tokens": [], "size": list(size), "prev": "", "next": ""}
                    | {"num_lidar_pts": 1, "num_radar_pts": 0, **_pose_fields(pose)}
                )


def _pose_fields(pose: np.ndarray) -> dict:
    quaternion = np.roll(Rotation.from_matrix(pose[:3, :3]).as_quat(), 1)
    return {"translation": pose[:3, 3].tolist(), "rotation": quaternion.tolist()}


def _intrinsic(channel: str) -> list:
    if channel == "LIDAR_TOP":
        return []
    return [[FOCAL_PX, 0, WIDTH_PX / 2 + 3.25], [0, FOCAL_PX, HEIGHT_PX / 2 - 1.5], [0, 0, 1]]


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> TinyRoot:
    """Shared: do not change its files."""
    return make_tiny_root(tmp_path_factory.mktemp("tiny") / "root")


@pytest.fixture
def own_tiny_root(tiny_root, tmp_path) -> TinyRoot:
    """A copy to damage."""
    shutil.copytree(tiny_root.path, tmp_path / "root")
    return replace(tiny_root, path=tmp_path / "root", tables=copy.deepcopy(tiny_root.tables))
