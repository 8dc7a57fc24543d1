# SPDX-License-Identifier: Apache-2.0
"""Camera images: rays through every pixel, anti-aliased where surfaces meet, with class, depth and instance maps."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from occflownet_core import poses
from occflownet_core.camera import Camera
from occflownet_core.labels import FREE, LABEL_FROM_LIDARSEG
from training.data.minicity import calibration
from training.data.minicity.raycast import NO_INSTANCE, Hits
from training.data.minicity.shading import Lit, Shader
from training.data.minicity.world import World

_EXTRA_SAMPLES = np.array([[0.25, 0.125], [-0.25, 0.375], [0.375, -0.25], [-0.125, -0.375]])
_WIDE_PX = 1000
"""From this image width on, pixels are fine enough for fewer samples each."""

_NOISE_LEVELS = 1.6  # standard deviation of the sensor noise, grey levels


@dataclass(frozen=True)
class Rendering:
    """One camera image with what lies behind its pixel centres.

    Attributes:
        rgb: [H, W, 3] uint8.
        label: [H, W] uint8, Occ3D class; ``FREE`` is sky.
        depth_m: [H, W] float32 along the optical axis, infinite for sky.
        instance: [H, W] int32, index of the actor + 1, 0 for static surfaces and sky.
    """

    rgb: np.ndarray
    label: np.ndarray
    depth_m: np.ndarray
    instance: np.ndarray


def render(
    world: World, name: str, keyframe_time_s: float, width_px: int, height_px: int, noise: np.random.Generator
) -> Rendering:
    """What the named camera sees at its own moment of the keyframe."""
    camera = calibration.camera(name, width_px, height_px)
    time_s = keyframe_time_s + calibration.CAMERAS[name].offset_us * 1e-6
    global_from_camera = world.global_from_ego(time_s) @ camera.ego_from_camera
    snapshot = world.snapshot(time_s)
    shader = Shader(snapshot, world.material_columns, world.light, 1 / camera.intrinsic[0, 0])
    origin = global_from_camera[:3, 3]
    columns, rows = (a.ravel() for a in np.meshgrid(np.arange(width_px), np.arange(height_px)))
    directions, axial = pixel_rays(camera, global_from_camera, columns + 0.5, rows + 0.5)
    hits = snapshot.first_hits(_repeat(origin, len(directions)), directions)
    found = hits.hit
    category = np.zeros(len(found), dtype=np.uint8)
    category[found] = snapshot.of_faces("category", hits.face[found])
    instance = np.full(len(found), NO_INSTANCE, dtype=np.int32)
    instance[found] = snapshot.of_faces("instance", hits.face[found])
    shape = (height_px, width_px)
    sky_light = _ambient(shader, hits, origin, directions, shape)
    color = _colors(shader, hits, origin, directions, sky_light.ravel())
    depth_m = np.where(found, hits.range_m * axial, np.inf).astype(np.float32)
    edges = np.flatnonzero(_edges(snapshot, hits, depth_m, shape))
    extra = _EXTRA_SAMPLES[:3] if width_px >= _WIDE_PX else _EXTRA_SAMPLES
    color[edges] /= len(extra) + 1
    for dx, dy in extra:
        around, _ = pixel_rays(camera, global_from_camera, columns[edges] + 0.5 + dx, rows[edges] + 0.5 + dy)
        more = snapshot.first_hits(_repeat(origin, len(edges)), around)
        color[edges] += _colors(shader, more, origin, around, sky_light.ravel()[edges]) / (len(extra) + 1)
    label = np.where(found, LABEL_FROM_LIDARSEG[category], FREE).astype(np.uint8)
    return Rendering(
        _sensor(color.reshape(*shape, 3), noise), label.reshape(shape), depth_m.reshape(shape), instance.reshape(shape)
    )


def pixel_rays(
    camera: Camera, global_from_camera: np.ndarray, u: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions [N, 3] float32 in the global frame through pixels [N], and their share along the optical axis [N]."""
    k = camera.intrinsic
    x, y = (u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1]
    axial = 1 / np.sqrt(x * x + y * y + 1)
    r = global_from_camera[:3, :3]
    directions = np.stack([(r[i, 0] * x + r[i, 1] * y + r[i, 2]) * axial for i in range(3)], axis=-1)
    return directions.astype(np.float32), axial.astype(np.float32)


def _repeat(origin: np.ndarray, n: int) -> np.ndarray:
    return np.broadcast_to(origin.astype(np.float32), (n, 3))


def _select(hits: Hits, rows: np.ndarray) -> Hits:
    return Hits(hits.range_m[rows], hits.face[rows], hits.barycentric[rows])


def _colors(
    shader: Shader, hits: Hits, origin: np.ndarray, directions: np.ndarray, sky_light: np.ndarray
) -> np.ndarray:
    """Developed colours [N, 3] of rays."""
    result = np.empty((len(directions), 3), dtype=np.float32)
    sky, rows = np.flatnonzero(~hits.hit), np.flatnonzero(hits.hit)
    result[sky] = shader.sky(directions[sky])
    seen, d = _select(hits, rows), directions[rows]
    normal = shader.facing_normals(seen, d)
    points = origin.astype(np.float32) + seen.range_m[:, None] * d
    result[rows] = shader.radiance(seen, d, normal, Lit(shader.sunlit(points, normal), sky_light[rows]))
    return shader.develop(result)


def _ambient(
    shader: Shader, hits: Hits, origin: np.ndarray, directions: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Open sky [H, W] at every pixel, from a coarser lattice, smoothed over surfaces of like distance."""
    stride = 4 if shape[1] >= _WIDE_PX else 2
    index = np.arange(shape[0] * shape[1]).reshape(shape)[::stride, ::stride]
    row, column = np.indices(index.shape)
    pattern = ((row % 4) * 4 + column % 4).ravel()
    order = np.array([0, 8, 2, 10, 12, 4, 14, 6, 3, 11, 1, 9, 15, 7, 13, 5])
    pick = index.ravel()
    found = hits.hit[pick]
    rows = pick[found]
    seen, d = _select(hits, rows), directions[rows]
    normal = shader.facing_normals(seen, d)
    points = origin.astype(np.float32) + seen.range_m[:, None] * d
    clear = np.ones(len(pick), dtype=np.float32)
    clear[found] = shader.open_sky(points, normal, order[pattern[found]])
    clear = clear.reshape(index.shape)
    inverse = (
        np.where(hits.hit[pick], 1 / np.maximum(hits.range_m[pick], 0.1), 0).astype(np.float32).reshape(index.shape)
    )
    total, weight = np.zeros_like(clear), np.zeros_like(clear)
    for dy in range(-2, 2):
        for dx in range(-2, 2):
            near = np.exp(-60 * np.abs(np.roll(inverse, (dy, dx), (0, 1)) - inverse) / np.maximum(inverse, 1e-3))
            total += near * np.roll(clear, (dy, dx), (0, 1))
            weight += near
    return cv2.resize(total / weight, shape[::-1], interpolation=cv2.INTER_LINEAR)


def _edges(snapshot, hits: Hits, depth_m: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """True [H * W] where a pixel's neighbour shows another material or another depth."""
    key = np.full(len(hits.face), -1, dtype=np.int64)
    found = hits.hit
    material = snapshot.of_faces("material", hits.face[found]).astype(np.int64)
    key[found] = material * 4096 + snapshot.of_faces("instance", hits.face[found])
    key = key.reshape(shape)
    nearness = np.where(np.isfinite(depth_m), 1 / np.maximum(depth_m, 1e-3), 0).reshape(shape)
    edge = np.zeros(shape, dtype=bool)
    for axis in (0, 1):
        a = tuple(slice(1, None) if i == axis else slice(None) for i in range(2))
        b = tuple(slice(None, -1) if i == axis else slice(None) for i in range(2))
        differs = (key[a] != key[b]) | (np.abs(nearness[a] - nearness[b]) > 0.05 * np.maximum(nearness[a], nearness[b]))
        edge[a] |= differs
        edge[b] |= differs
    return edge.ravel()


def _sensor(color: np.ndarray, noise: np.random.Generator) -> np.ndarray:
    """uint8 image of developed colours [H, W, 3], with lens fall-off and sensor noise."""
    height, width = color.shape[:2]
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    fall_off = (1 - 0.10 * (x * x + y * y)).astype(np.float32)
    grain = noise.standard_normal((height, width), dtype=np.float32) * _NOISE_LEVELS
    return np.clip(color * fall_off[..., None] + grain[..., None] + 0.5, 0, 255).astype(np.uint8)


def global_from_camera_at(world: World, name: str, keyframe_time_s: float) -> np.ndarray:
    """[4, 4] pose of a camera at its own moment of a keyframe."""
    time_s = keyframe_time_s + calibration.CAMERAS[name].offset_us * 1e-6
    return poses.require_rigid(world.global_from_ego(time_s) @ calibration.camera(name, 16, 9).ego_from_camera, name)
