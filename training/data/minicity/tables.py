# SPDX-License-Identifier: Apache-2.0
"""The nuScenes tables of a generated data set, lidarseg and panoptic included."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from occflownet_core.labels import LIDARSEG_NAMES
from training.data.minicity import calibration
from training.data.minicity.keyframe import Keyframe
from training.data.minicity.naming import VERSION, Naming, token

ATTRIBUTES = {
    "vehicle.moving": "Vehicle is moving.",
    "vehicle.stopped": "Vehicle is standing in traffic.",
    "vehicle.parked": "Vehicle is parked.",
    "cycle.with_rider": "There is a rider on the bicycle or motorcycle.",
    "cycle.without_rider": "There is no rider on the bicycle or motorcycle.",
    "pedestrian.sitting_lying_down": "The person is sitting or lying down.",
    "pedestrian.standing": "The person is standing.",
    "pedestrian.moving": "The person is moving.",
}
VISIBILITIES = {"1": (0, 40), "2": (40, 60), "3": (60, 80), "4": (80, 100)}
MAP_FILE = "maps/minicity.png"
Table = list[dict]


@dataclass(frozen=True)
class Scene:
    """What the tables need to know of a scene.

    Attributes:
        naming: its names and tokens.
        actors: (category, size length-width-height, attribute) of each actor.
        keyframes: by number.
        description: one line about it.
    """

    naming: Naming
    actors: list[tuple[str, list[float], str]]
    keyframes: dict[int, Keyframe]
    description: str

    def in_order(self) -> list[Keyframe]:
        return [self.keyframes[number] for number in sorted(self.keyframes)]


def write_tables(root: Path, seed: int, scenes: list[Scene], width_px: int, height_px: int) -> None:
    """Write every table of ``v1.0-mini/``."""
    tables = _fixed_tables(width_px, height_px)
    logs = [s.naming for s in scenes]
    tables["log"] = [
        {
            "token": token(n.name, "log"),
            "logfile": n.name,
            "vehicle": "minicity",
            "date_captured": "2020-09-13",
            "location": "minicity",
        }
        for n in logs
    ]
    tables["map"] = [
        {
            "token": token(seed, "map"),
            "category": "semantic_prior",
            "filename": MAP_FILE,
            "log_tokens": [token(n.name, "log") for n in logs],
        }
    ]
    for name in ("scene", "sample", "sample_data", "ego_pose", "instance", "sample_annotation", "lidarseg", "panoptic"):
        tables[name] = []
    for scene in scenes:
        _add_scene(tables, scene, width_px, height_px)
    folder = root / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")


def _fixed_tables(width_px: int, height_px: int) -> dict[str, Table]:
    cameras = {name: calibration.camera(name, width_px, height_px) for name in calibration.CAMERAS}
    sensors = [{"token": token("sensor", n), "channel": n, "modality": "camera"} for n in cameras]
    sensors.append(
        {"token": token("sensor", calibration.LIDAR_CHANNEL), "channel": calibration.LIDAR_CHANNEL, "modality": "lidar"}
    )
    calibrated = [
        {
            "token": token("calibrated_sensor", name),
            "sensor_token": token("sensor", name),
            "translation": list(c.translation_m),
            "rotation": list(c.rotation_wxyz),
            "camera_intrinsic": cameras[name].intrinsic.tolist(),
        }
        for name, c in calibration.CAMERAS.items()
    ]
    calibrated.append(
        {
            "token": token("calibrated_sensor", calibration.LIDAR_CHANNEL),
            "sensor_token": token("sensor", calibration.LIDAR_CHANNEL),
            "translation": list(calibration.LIDAR_TRANSLATION_M),
            "rotation": list(calibration.LIDAR_ROTATION_WXYZ),
            "camera_intrinsic": [],
        }
    )
    return {
        "category": [
            {"token": token("category", n), "name": n, "description": "", "index": i}
            for i, n in enumerate(LIDARSEG_NAMES)
        ],
        "attribute": [{"token": token("attribute", n), "name": n, "description": d} for n, d in ATTRIBUTES.items()],
        "visibility": [
            {"token": t, "level": f"v{a}-{b}", "description": f"visibility of whole object is between {a} and {b}%"}
            for t, (a, b) in VISIBILITIES.items()
        ],
        "sensor": sensors,
        "calibrated_sensor": calibrated,
    }


def _add_scene(tables: dict[str, Table], scene: Scene, width_px: int, height_px: int) -> None:
    naming, count = scene.naming, len(scene.keyframes)
    tables["scene"].append(
        {
            "token": token(naming.name, "scene"),
            "log_token": token(naming.name, "log"),
            "nbr_samples": count,
            "first_sample_token": naming.sample(0),
            "last_sample_token": naming.sample(count - 1),
            "name": naming.name,
            "description": scene.description,
        }
    )
    for k, keyframe in enumerate(scene.in_order()):
        tables["sample"].append(
            {
                "token": naming.sample(k),
                "timestamp": naming.timestamp_us(k),
                "prev": naming.sample(k - 1) if k else "",
                "next": naming.sample(k + 1) if k + 1 < count else "",
                "scene_token": token(naming.name, "scene"),
            }
        )
        for channel, (translation, rotation) in keyframe.ego.items():
            _add_sample_data(tables, naming, k, count, channel, (width_px, height_px))
            tables["ego_pose"].append(
                {
                    "token": naming.sample_data(k, channel),
                    "timestamp": naming.timestamp_us(k, channel),
                    "rotation": rotation,
                    "translation": translation,
                }
            )
        lidar = naming.sample_data(k, calibration.LIDAR_CHANNEL)
        for kind, suffix in (("lidarseg", "bin"), ("panoptic", "npz")):
            tables[kind].append(
                {"token": lidar, "sample_data_token": lidar, "filename": f"{kind}/{VERSION}/{lidar}_{kind}.{suffix}"}
            )
    _add_annotations(tables, scene)


def _add_sample_data(
    tables: dict[str, Table], naming: Naming, k: int, count: int, channel: str, size_px: tuple[int, int]
) -> None:
    is_camera = channel != calibration.LIDAR_CHANNEL
    tables["sample_data"].append(
        {
            "token": naming.sample_data(k, channel),
            "sample_token": naming.sample(k),
            "ego_pose_token": naming.sample_data(k, channel),
            "calibrated_sensor_token": token("calibrated_sensor", channel),
            "timestamp": naming.timestamp_us(k, channel),
            "fileformat": "jpg" if is_camera else "pcd",
            "is_key_frame": True,
            "height": size_px[1] if is_camera else 0,
            "width": size_px[0] if is_camera else 0,
            "filename": naming.camera_file(k, channel) if is_camera else naming.lidar_file(k),
            "prev": naming.sample_data(k - 1, channel) if k else "",
            "next": naming.sample_data(k + 1, channel) if k + 1 < count else "",
        }
    )


def _add_annotations(tables: dict[str, Table], scene: Scene) -> None:
    naming = scene.naming
    shown: dict[int, list[int]] = {}
    for keyframe in scene.in_order():
        for annotation in keyframe.annotations:
            shown.setdefault(annotation.actor, []).append(keyframe.number)
    for actor, keyframes in sorted(shown.items()):
        tables["instance"].append(
            {
                "token": naming.instance(actor),
                "category_token": token("category", scene.actors[actor][0]),
                "nbr_annotations": len(keyframes),
                "first_annotation_token": naming.annotation(keyframes[0], actor),
                "last_annotation_token": naming.annotation(keyframes[-1], actor),
            }
        )
    for keyframe in scene.in_order():
        for a in keyframe.annotations:
            _, (length, width, height), attribute = scene.actors[a.actor]
            at = shown[a.actor].index(keyframe.number)
            before, after = shown[a.actor][:at], shown[a.actor][at + 1 :]
            tables["sample_annotation"].append(
                {
                    "token": naming.annotation(keyframe.number, a.actor),
                    "sample_token": naming.sample(keyframe.number),
                    "instance_token": naming.instance(a.actor),
                    "visibility_token": str(a.visibility),
                    "attribute_tokens": [token("attribute", attribute)] if attribute else [],
                    "translation": a.translation_m,
                    "size": [width, length, height],
                    "rotation": a.rotation_wxyz,
                    "prev": naming.annotation(before[-1], a.actor) if before else "",
                    "next": naming.annotation(after[0], a.actor) if after else "",
                    "num_lidar_pts": a.points,
                    "num_radar_pts": 0,
                }
            )
