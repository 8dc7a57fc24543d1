# SPDX-License-Identifier: Apache-2.0
"""Where 2D supervision comes from: rays of one keyframe out of LiDAR labels or pseudo-label images, and their union
over the keyframes around the current one (temporal rendering, OccFlowNet, arXiv 2402.12792, section 3.2).

A source gives a keyframe's rays in that keyframe's *own* ego frame, where they depend on nothing else and can be
cached; ``temporal_rays`` moves them into the current one, six origins and one rotation per keyframe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch

from occflownet_core import poses
from occflownet_core.errors import DatasetError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE, LIDARSEG_NAMES, PANOPTIC_DIVISOR, labels_from_lidarseg
from occflownet_core.renderer.rays import Rays
from training.data.lidar_holes import BLIND_RANGE_M, directions_without_return
from training.data.nuscenes import Keyframe, load_points, read_bytes

NO_CAMERA = -1
UNLABELLED = 255
"""Something is seen whose class nobody knows: depth supervision only."""

# Dust and reflections are no content of the scene, and the vehicle's own body is none of its surroundings.
_NOT_SCENE = tuple(LIDARSEG_NAMES.index(name) for name in ("noise", "vehicle.ego"))


@dataclass(frozen=True, eq=False)
class FrameRays:
    """Everything that the cameras of one keyframe are known to see, in that keyframe's ego frame; not yet limited to
    any box or range.

    Attributes:
        sensor_origin_m: [N + 1, 3] float32, centre of every camera and, last (index -1), of the LiDAR.
        camera_index: [R] int64, ``NO_CAMERA`` for the LiDAR's own directions.
        direction: [R, 3] float32 unit vectors.
        range_m: [R] float32, +inf without return.
        label: [R] uint8; ``FREE`` without return; ``UNLABELLED`` where the class is unknown.
        pixel: [R, 2] float32, continuous, in the image on disk; NaN without camera.
        depth_m: [R] float32 along the camera's axis; +inf without return, NaN without camera.
    """

    sensor_origin_m: np.ndarray
    camera_index: np.ndarray
    direction: np.ndarray
    range_m: np.ndarray
    label: np.ndarray
    pixel: np.ndarray
    depth_m: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


class RaySource(Protocol):
    """Anything that knows depth and class along some lines of sight of a keyframe."""

    def frame_rays(self, keyframe: Keyframe) -> FrameRays:
        """What the keyframe's cameras see.

        Raises:
            DatasetError: a file that this source needs is missing or damaged.
        """
        ...


class LidarRays:
    """Rays from the camera centres to labelled LiDAR points, each sensor at its own ego pose.

    Args:
        labels: ``lidarseg``, or ``panoptic`` (whose labels // 1000 are lidarseg's).
        no_return: also give the directions in which the LiDAR got no echo, from the LiDAR's own centre
            (``lidar_holes``). The published method has none of them.
        keep_noise: keep points labelled as noise or as the ego vehicle, which become class ``others``.
        half_pixel_offset: see ``RenderConfig.half_pixel_offset``.
    """

    def __init__(
        self,
        labels: Literal["lidarseg", "panoptic"] = "lidarseg",
        no_return: bool = False,
        keep_noise: bool = False,
        half_pixel_offset: bool = False,
    ) -> None:
        if labels not in ("lidarseg", "panoptic"):
            raise DatasetError(f"LiDAR labels '{labels}' are unknown; choose lidarseg or panoptic")
        self.labels, self.no_return, self.keep_noise = labels, no_return, keep_noise
        self.half_pixel_offset = half_pixel_offset

    def frame_rays(self, keyframe: Keyframe) -> FrameRays:
        """See ``RaySource``; points outside every image are dropped."""
        points = load_points(keyframe)
        raw, label = load_point_labels(keyframe, self.labels, len(points))
        in_lidar_m = points[:, :3]
        if not self.keep_noise:
            scene = ~np.isin(raw, _NOT_SCENE)
            in_lidar_m, label = in_lidar_m[scene], label[scene]
        lidar_ray = lidar_to_camera_rays(keyframe, in_lidar_m, label)
        if self.half_pixel_offset:
            lidar_ray = half_a_pixel_off(lidar_ray, keyframe)
        return _with_holes(lidar_ray, keyframe, points) if self.no_return else lidar_ray


class SweepRays:
    """Rays from the LiDAR's own centre to all its points: what the beams really passed, whether a camera saw it or not.

    Args:
        labels: ``lidarseg``, ``panoptic``, or ``none``: every return is then of class ``others``.
    """

    def __init__(self, labels: Literal["lidarseg", "panoptic", "none"] = "lidarseg") -> None:
        if labels not in ("lidarseg", "panoptic", "none"):
            raise DatasetError(f"LiDAR labels '{labels}' are unknown; choose lidarseg, panoptic or none")
        self.labels = labels

    def frame_rays(self, keyframe: Keyframe) -> FrameRays:
        """See ``RaySource``; echoes of the vehicle itself are dropped, directions without echo are rays too."""
        points = load_points(keyframe)
        ego_from_lidar = poses.inverse(keyframe.global_from_ego) @ keyframe.lidar.global_from_sensor
        in_ego_m = poses.transform_points(ego_from_lidar, points[:, :3])
        if self.labels == "none":
            label, scene = np.zeros(len(points), dtype=np.uint8), ~_on_ego_vehicle(in_ego_m)
        else:
            raw, label = load_point_labels(keyframe, self.labels, len(points))
            scene = ~np.isin(raw, _NOT_SCENE)
        scene &= np.einsum("pc,pc->p", points[:, :3], points[:, :3]) > BLIND_RANGE_M**2
        sight_m = in_ego_m[scene] - ego_from_lidar[:3, 3]
        range_m = np.linalg.norm(sight_m, axis=1)
        count = len(range_m)
        rays = FrameRays(
            sensor_origins(keyframe),
            np.full(count, NO_CAMERA),
            (sight_m / range_m[:, None]).astype(np.float32),
            range_m.astype(np.float32),
            label[scene],
            np.full((count, 2), np.nan, dtype=np.float32),
            np.full(count, np.nan, dtype=np.float32),
        )
        return _with_holes(rays, keyframe, points)


def _on_ego_vehicle(points_m: np.ndarray) -> np.ndarray:
    """True [N] for points [N, 3], ego frame, within a passenger car around the rear axle.

    nuScenes' Renault Zoe is 4.08 m long, 1.73 m wide and 1.56 m high (maker's data), its LiDAR stands on a rack.
    """
    lower_m, upper_m = np.array([-0.9, -1.0, -0.2]), np.array([3.5, 1.0, 2.0])
    return ((points_m > lower_m) & (points_m < upper_m)).all(axis=1)


def load_point_labels(keyframe: Keyframe, kind: str, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw lidarseg index [N] and class [N] uint8 of every LiDAR point.

    Raises:
        DatasetError: the tables list no such labels, or the file is missing, damaged, or for another number of points.
    """
    path = keyframe.lidarseg_path if kind == "lidarseg" else keyframe.panoptic_path
    if path is None:
        raise DatasetError(
            f"the data root has no {kind} labels for {keyframe.lidar.path.name} (split '{keyframe.split}'): "
            f"unpack nuScenes-{kind} into the root, or choose another source of rays"
        )
    data = read_bytes(path, f"{kind} labels", keyframe)
    if kind == "lidarseg":
        raw = np.frombuffer(data, dtype=np.uint8)
    else:
        try:
            with np.load(path) as content:
                raw = content["data"].ravel() // PANOPTIC_DIVISOR
        except Exception as error:  # zip, NumPy and key errors alike mean a damaged file
            raise DatasetError(
                f"panoptic labels {path} (split '{keyframe.split}') are damaged ({error}); copy them again"
            ) from None
    if len(raw) != points:
        raise DatasetError(
            f"{kind} labels {path} (split '{keyframe.split}') are for {len(raw)} points, "
            f"the point cloud has {points}; one of the two files was cut short: copy both again"
        )
    try:
        return raw, labels_from_lidarseg(raw)
    except DatasetError as error:
        raise DatasetError(f"{kind} labels {path} (split '{keyframe.split}'): {error}") from None


def lidar_to_camera_rays(keyframe: Keyframe, points_m: np.ndarray, label: np.ndarray) -> FrameRays:
    """Rays from every camera to every LiDAR point in its image.

    Args:
        points_m: [N, 3] float32, LiDAR frame.
        label: [N] uint8.
    """
    global_from_lidar = keyframe.lidar.global_from_sensor
    ego_from_lidar = poses.inverse(keyframe.global_from_ego) @ global_from_lidar
    # Transforms are composed in float64 and applied to local coordinates in float32: 100 m are exact to 1e-5 m.
    projections = [
        c.intrinsic @ (poses.inverse(c.global_from_sensor) @ global_from_lidar)[:3] for c in keyframe.cameras
    ]
    matrix = np.concatenate(projections).astype(np.float32)  # [3 N_cameras, 4]
    homogeneous = (matrix[:, :3] @ points_m.T + matrix[:, 3:]).reshape(len(keyframe.cameras), 3, -1)  # [N, 3, P]
    camera_index, point, pixel, depth_m = _seen(homogeneous, keyframe)

    origin_m = sensor_origins(keyframe)
    in_ego_m = points_m @ ego_from_lidar[:3, :3].T.astype(np.float32) + ego_from_lidar[:3, 3].astype(np.float32)
    sight_m = in_ego_m[point] - origin_m[camera_index]
    range_m = np.sqrt(np.einsum("rc,rc->r", sight_m, sight_m))
    return FrameRays(origin_m, camera_index, sight_m / range_m[:, None], range_m, label[point], pixel, depth_m)


def half_a_pixel_off(rays: FrameRays, keyframe: Keyframe) -> FrameRays:
    """Rays through points half a pixel further right and down in the image on disk, at the same depth, as published."""
    ego_from_global = poses.inverse(keyframe.global_from_ego)
    per_depth = np.zeros((len(keyframe.cameras) + 1, 3), dtype=np.float32)  # the LiDAR, last, has no pixels
    for i, camera in enumerate(keyframe.cameras):
        in_camera = np.linalg.inv(camera.intrinsic) @ (0.5, 0.5, 0.0)
        per_depth[i] = poses.rotate_vectors(ego_from_global @ camera.global_from_sensor, in_camera[None])[0]
    shift_m = rays.depth_m[:, None] * per_depth[rays.camera_index]
    sight_m = rays.direction * rays.range_m[:, None] + shift_m
    range_m = np.linalg.norm(sight_m, axis=1)
    return replace(rays, direction=sight_m / range_m[:, None], range_m=range_m, pixel=rays.pixel + np.float32(0.5))


def _seen(homogeneous: np.ndarray, keyframe: Keyframe) -> tuple[np.ndarray, ...]:
    """Which camera sees which point, and where: camera [R], point [R], pixel [R, 2], depth [R]."""
    found = []
    for c, (u, v, depth_m) in enumerate(homogeneous):
        frame = keyframe.cameras[c]
        # 0 <= u / depth < width without the division, for points in front only.
        inside = (depth_m > 0) & (u >= 0) & (u < frame.width_px * depth_m) & (v >= 0) & (v < frame.height_px * depth_m)
        point = np.flatnonzero(inside)
        pixel = np.stack([u[point], v[point]], axis=1) / depth_m[point, None]
        found.append((np.full(len(point), c), point, pixel, depth_m[point]))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def sensor_origins(keyframe: Keyframe) -> np.ndarray:
    """Centres of the cameras and of the LiDAR (of the ego origin where there is none), [N + 1, 3] float32."""
    ego_from_global = poses.inverse(keyframe.global_from_ego)
    sensors = [*keyframe.cameras, *([keyframe.lidar] if keyframe.lidar else [])]
    origin_m = np.zeros((len(keyframe.cameras) + 1, 3), dtype=np.float32)
    for i, sensor in enumerate(sensors):
        origin_m[i] = (ego_from_global @ sensor.global_from_sensor)[:3, 3]
    return origin_m


def _with_holes(rays: FrameRays, keyframe: Keyframe, points: np.ndarray) -> FrameRays:
    """The rays, and one without return for every direction in which the LiDAR found nothing."""
    ego_from_lidar = poses.inverse(keyframe.global_from_ego) @ keyframe.lidar.global_from_sensor
    direction = poses.rotate_vectors(ego_from_lidar, directions_without_return(points)).astype(np.float32)
    count = len(direction)
    return FrameRays(
        rays.sensor_origin_m,
        np.concatenate([rays.camera_index, np.full(count, NO_CAMERA)]),
        np.concatenate([rays.direction, direction]),
        np.concatenate([rays.range_m, np.full(count, np.inf, dtype=np.float32)]),
        np.concatenate([rays.label, np.full(count, FREE, dtype=np.uint8)]),
        np.concatenate([rays.pixel, np.full((count, 2), np.nan, dtype=np.float32)]),
        np.concatenate([rays.depth_m, np.full(count, np.nan, dtype=np.float32)]),
    )


@dataclass(frozen=True)
class RayLimits:
    """Which rays are kept.

    Attributes:
        grid: returns must lie inside its box, and rays without return must start in it.
        near_m, far_m: least and greatest range of a return.
        beyond_is_free: a return outside the box is a ray without return inside it: everything up to the box's edge was
            passed. Otherwise such rays are dropped, as published, and little is known about the box's borders.
    """

    grid: VoxelGrid
    near_m: float = 0.05
    far_m: float = 39.0
    beyond_is_free: bool = False

    def holds(self, points_m: np.ndarray) -> np.ndarray:
        """True [N] for points [N, 3] inside the box."""
        lower, upper = np.float32(self.grid.lower_m), np.float32(self.grid.upper_m)
        return ((points_m >= lower) & (points_m < upper)).all(axis=1)


def temporal_rays(
    frames: Mapping[int, tuple[Keyframe, FrameRays]],
    limits: RayLimits,
    max_rays: int | None = None,
    rng: np.random.Generator | None = None,
) -> Rays:
    """Rays of all given keyframes, in the current ego frame.

    Args:
        frames: keyframe offset (0 = current, -1 = the one before) -> keyframe and its rays; offset 0 must be there.
        limits: what is kept.
        max_rays: more are thinned out at random, without replacement.
        rng: for thinning out.

    Returns:
        ``Rays`` with batch index 0.
    """
    ego_from_global = poses.inverse(frames[0][0].global_from_ego)
    parts = [
        _moved(rays, ego_from_global @ keyframe.global_from_ego, offset, limits)
        for offset, (keyframe, rays) in sorted(frames.items())
    ]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    count = len(columns[0])
    if max_rays is not None and count > max_rays:
        chosen = (rng or np.random.default_rng()).choice(count, max_rays, replace=False, shuffle=False)
        columns = [column[chosen] for column in columns]
    origin_m, direction, range_m, label, time_index, camera_index, axis_cosine = map(torch.from_numpy, columns)
    batch_index = torch.zeros_like(time_index)
    return Rays(
        origin_m, direction, range_m, label.long(), time_index, camera_index, batch_index, axis_cosine=axis_cosine
    )


def _moved(rays: FrameRays, current_from_frame: np.ndarray, offset: int, limits: RayLimits) -> tuple[np.ndarray, ...]:
    rotation = current_from_frame[:3, :3].T.astype(np.float32)
    sensor_origin_m = poses.transform_points(current_from_frame, rays.sensor_origin_m).astype(np.float32)
    direction = rays.direction @ rotation
    origin_m = sensor_origin_m[rays.camera_index]
    range_m, label, returned = rays.range_m, rays.label, np.isfinite(rays.range_m)
    inside = limits.holds(origin_m + direction * np.where(returned, range_m, 0)[:, None])
    kept = returned & inside & (label != UNLABELLED) & (range_m >= limits.near_m) & (range_m <= limits.far_m)
    # A ray without return must at least begin in the box to say something about it.
    kept |= ~returned & inside
    if limits.beyond_is_free:
        passes = returned & ~inside & limits.holds(origin_m)
        range_m, label = np.where(passes, np.float32(np.inf), range_m), np.where(passes, np.uint8(FREE), label)
        kept |= passes
    kept = np.flatnonzero(kept)
    range_m = range_m[kept]
    with np.errstate(invalid="ignore"):
        axis_cosine = np.where(np.isfinite(range_m), rays.depth_m[kept] / range_m, np.nan)
    return (
        origin_m[kept],
        direction[kept],
        range_m,
        label[kept],
        np.full(len(kept), offset),
        rays.camera_index[kept],
        np.nan_to_num(axis_cosine, nan=1.0),
    )
