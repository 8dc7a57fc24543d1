# SPDX-License-Identifier: Apache-2.0
"""One keyframe: every sensor's data and every label, written to disk; what the tables must know of it is returned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from occflownet_core import poses
from occflownet_core.labels import FREE, LIDARSEG_NAMES, PANOPTIC_DIVISOR
from training.data.minicity import calibration
from training.data.minicity.images import Rendering, global_from_camera_at, render
from training.data.minicity.lidar import Sweep, sweep
from training.data.minicity.naming import VERSION, Naming
from training.data.minicity.voxels import occupancy
from training.data.minicity.world import World, keyframe_time_s

_ANNOTATED_WITHIN_M = 100.0
_JPEG_QUALITY = 80
_ON_SURFACE_M = 0.05
DEPTH_UNIT_M = 0.01
"""Metres per count of the depth PNGs that ``write_semantics`` adds; 0 is sky or beyond 655 m."""


@dataclass(frozen=True)
class Annotation:
    """One box at one keyframe, in the global frame (size: length, width, height)."""

    actor: int
    translation_m: list[float]
    rotation_wxyz: list[float]
    points: int
    visibility: int


@dataclass(frozen=True)
class Keyframe:
    """What the tables say about one keyframe: ego poses by channel, and boxes."""

    scene: int
    number: int
    ego: dict[str, tuple[list[float], list[float]]]
    annotations: list[Annotation]


def write_keyframe(
    root: Path, world: World, naming: Naming, number: int, size_px: tuple[int, int], write_semantics: bool
) -> Keyframe:
    """Render, scan, label and write keyframe ``number`` of a world."""
    time_s = keyframe_time_s(number)
    scan = sweep(world, time_s, world.noise(number, 0))
    near = world.nearby(time_s, _ANNOTATED_WITHIN_M)
    shown = np.zeros((len(world.actors), 2), dtype=int)
    for stream, name in enumerate(calibration.CAMERAS, start=1):
        image = render(world, name, time_s, *size_px, world.noise(number, stream))
        _write_image(root, naming.camera_file(number, name), image, write_semantics)
        shown += visible_samples(world, name, time_s, near)
    _write_lidar(root, naming, number, world, scan)
    cameras = [(calibration.camera(n, *size_px), global_from_camera_at(world, n, time_s)) for n in calibration.CAMERAS]
    truth = occupancy(world, time_s, scan, cameras)
    target = root / naming.occupancy_file(number)
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target, semantics=truth.semantics, mask_lidar=truth.mask_lidar, mask_camera=truth.mask_camera)
    return Keyframe(world.index, number, _ego_poses(world, time_s), _annotations(world, time_s, scan, near, shown))


def _write_image(root: Path, name: str, image: Rendering, write_semantics: bool) -> None:
    bgr = np.ascontiguousarray(image.rgb[..., ::-1])
    cv2.imwrite(str(root / name), bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if write_semantics:
        stem = root / "semantics" / Path(name).relative_to("samples").with_suffix("")
        counts = np.where(image.label == FREE, 0, np.round(image.depth_m / DEPTH_UNIT_M))
        cv2.imwrite(f"{stem}_label.png", image.label)
        cv2.imwrite(f"{stem}_depth.png", np.where(counts > 65535, 0, counts).astype(np.uint16))


def _write_lidar(root: Path, naming: Naming, number: int, world: World, scan: Sweep) -> None:
    scan.points.tofile(root / naming.lidar_file(number))
    token = naming.sample_data(number, calibration.LIDAR_CHANNEL)
    scan.category.tofile(root / "lidarseg" / VERSION / f"{token}_lidarseg.bin")
    panoptic = scan.category.astype(np.uint16) * PANOPTIC_DIVISOR + panoptic_ids(world)[scan.instance]
    np.savez_compressed(root / "panoptic" / VERSION / f"{token}_panoptic.npz", data=panoptic.astype(np.uint16))


def panoptic_ids(world: World) -> np.ndarray:
    """[actors + 1] number of each instance within its category, from 1; 0 for static surfaces."""
    ids, seen = [0], dict.fromkeys(LIDARSEG_NAMES, 0)
    for actor in world.actors:
        seen[actor.category] += 1
        ids.append(seen[actor.category])
    return np.array(ids, dtype=np.uint16)


def _ego_poses(world: World, time_s: float) -> dict[str, tuple[list[float], list[float]]]:
    offsets = {name: c.offset_us * 1e-6 for name, c in calibration.CAMERAS.items()} | {calibration.LIDAR_CHANNEL: 0.0}
    result = {}
    for channel, offset_s in offsets.items():
        pose = world.global_from_ego(time_s + offset_s)
        result[channel] = (pose[:3, 3].tolist(), poses.quaternion_from_rotation(pose[:3, :3]).tolist())
    return result


def _annotations(world: World, time_s: float, scan: Sweep, near: list[int], shown: np.ndarray) -> list[Annotation]:
    """Boxes of the actors near the vehicle at the keyframe's timestamp; ``shown`` [actors, 2] as ``visible_samples``."""
    points = np.bincount(scan.instance, minlength=len(world.actors) + 1)
    result = []
    for index in near:
        pose = world.actors[index].global_from_box(time_s)
        share = shown[index, 0] / max(1, shown[index, 1])
        level = 1 + int(np.digitize(share, (0.4, 0.6, 0.8)))
        rotation = poses.quaternion_from_rotation(pose[:3, :3]).tolist()
        result.append(Annotation(index, pose[:3, 3].tolist(), rotation, int(points[index + 1]), level))
    return result


def visible_samples(world: World, name: str, keyframe_time_s: float, actors: list[int]) -> np.ndarray:
    """[all actors, 2]: how many surface samples of each actor a camera sees, and how many face it within its view."""
    counts = np.zeros((len(world.actors), 2), dtype=int)
    if not actors:
        return counts
    time_s = keyframe_time_s + calibration.CAMERAS[name].offset_us * 1e-6
    camera = calibration.camera(name, *calibration.FULL_SIZE_PX)
    eye = (world.global_from_ego(time_s) @ camera.ego_from_camera)[:3, 3]
    samples = [world.visibility_samples(i) for i in actors]
    placed = [
        poses.transform_points(world.actors[i].global_from_box(time_s), s) for i, s in zip(actors, samples, strict=True)
    ]
    points, owner = np.concatenate(placed), np.repeat(actors, [len(s) for s in samples])
    in_view = camera.sees(*camera.project(poses.transform_points(poses.inverse(world.global_from_ego(time_s)), points)))
    points, owner = points[in_view], owner[in_view]
    rays = points - eye
    range_m = np.linalg.norm(rays, axis=1)
    snapshot = world.snapshot(time_s)
    hits = snapshot.first_hits(np.broadcast_to(eye, rays.shape), rays / range_m[:, None])
    struck = np.full(len(owner), -1)
    struck[hits.hit] = snapshot.of_faces("instance", hits.face[hits.hit]) - 1
    # A sample behind the actor's own front does not face the camera and counts for nothing.
    seen = (struck == owner) & (range_m - hits.range_m < _ON_SURFACE_M)
    faces = seen | (struck != owner)
    counts[:, 0] = np.bincount(owner[seen], minlength=len(counts))
    counts[:, 1] = np.bincount(owner[faces], minlength=len(counts))
    return counts
