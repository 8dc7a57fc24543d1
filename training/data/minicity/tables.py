# SPDX-License-Identifier: Apache-2.0
"""The nuScenes tables of a generated data set, lidarseg and panoptic included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from occflownet_core.nuscenes_tables import NuscenesTables
from training.data.minicity import calibration
from training.data.minicity.keyframe import Keyframe
from training.data.minicity.naming import VERSION, Naming, token

MAP_FILE = "maps/minicity.png"


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
    tables = NuscenesTables("minicity")
    for name in (scene.naming.name for scene in scenes):
        tables.add_log(token(name, "log"), name, "minicity", "2020-09-13", "minicity")
    tables.add_map(token(seed, "map"), MAP_FILE)
    _add_sensors(tables, width_px, height_px)
    for scene in scenes:
        _add_scene(tables, scene, width_px, height_px)
    tables.write(root, VERSION)


def _add_sensors(tables: NuscenesTables, width_px: int, height_px: int) -> None:
    for name, mount in calibration.CAMERAS.items():
        tables.add_sensor(token("sensor", name), name, "camera")
        tables.add_calibrated_sensor(
            token("calibrated_sensor", name),
            token("sensor", name),
            mount.translation_m,
            mount.rotation_wxyz,
            calibration.camera(name, width_px, height_px).intrinsic,
        )
    lidar = calibration.LIDAR_CHANNEL
    tables.add_sensor(token("sensor", lidar), lidar, "lidar")
    tables.add_calibrated_sensor(
        token("calibrated_sensor", lidar),
        token("sensor", lidar),
        calibration.LIDAR_TRANSLATION_M,
        calibration.LIDAR_ROTATION_WXYZ,
    )


def _add_scene(tables: NuscenesTables, scene: Scene, width_px: int, height_px: int) -> None:
    naming = scene.naming
    samples = [(naming.sample(k), naming.timestamp_us(k)) for k in range(len(scene.keyframes))]
    tables.add_scene(token(naming.name, "scene"), naming.name, token(naming.name, "log"), samples, scene.description)
    for k, keyframe in enumerate(scene.in_order()):
        for channel, (translation, rotation) in keyframe.ego.items():
            is_camera = channel != calibration.LIDAR_CHANNEL
            tables.add_measurement(
                naming.sample_data(k, channel),
                naming.sample(k),
                token("calibrated_sensor", channel),
                naming.timestamp_us(k, channel),
                naming.camera_file(k, channel) if is_camera else naming.lidar_file(k),
                translation,
                rotation,
                chain=(naming.name, channel),
                size_px=(width_px, height_px) if is_camera else (0, 0),
            )
        for table in ("lidarseg", "panoptic"):
            tables.add_point_labels(table, naming.sample_data(k, calibration.LIDAR_CHANNEL), VERSION)
    _add_annotations(tables, scene)


def _add_annotations(tables: NuscenesTables, scene: Scene) -> None:
    naming = scene.naming
    shown: dict[int, list[int]] = {}
    for keyframe in scene.in_order():
        for annotation in keyframe.annotations:
            shown.setdefault(annotation.actor, []).append(keyframe.number)
    for actor, keyframes in sorted(shown.items()):
        tables.rows["instance"].append(
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
            tables.rows["sample_annotation"].append(
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
