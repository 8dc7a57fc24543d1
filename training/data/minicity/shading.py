# SPDX-License-Identifier: Apache-2.0
"""Shading: the colour that a camera sees at a hit, from material, sun, sky and haze; and the sky itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.data.minicity.raycast import Hits, Snapshot
from training.data.minicity.texture import cell_hash, fade, noise, pulse
from training.data.minicity.world import Light

_LIFT_M = 0.004  # secondary rays start this far off the surface


@dataclass(frozen=True)
class Lit:
    """Light that reaches hits: sun [N] and open sky [N], both 0..1."""

    sun: np.ndarray
    sky: np.ndarray


class Shader:
    """Colours for one snapshot under one light.

    Args:
        snapshot: the world at the camera's time.
        columns: the palette as arrays.
        light: the scene's weather.
        pixel_rad: angle that a pixel covers.
    """

    def __init__(self, snapshot: Snapshot, columns: dict[str, np.ndarray], light: Light, pixel_rad: float) -> None:
        self._snapshot, self._columns, self._light, self._pixel_rad = snapshot, columns, light, pixel_rad

    def facing_normals(self, hits: Hits, directions: np.ndarray) -> np.ndarray:
        """Unit normals [N, 3] on the viewer's side."""
        normal = self._snapshot.of_faces("normal", hits.face)
        return np.where(_dot(normal, directions)[:, None] > 0, -normal, normal)

    def sunlit(self, points_m: np.ndarray, normal: np.ndarray) -> np.ndarray:
        """1 [N] where the sun reaches a point [N, 3], 0 in shadow."""
        towards = self._light.towards_sun.astype(np.float32)
        result = np.zeros(len(points_m), dtype=np.float32)
        facing = np.flatnonzero(normal @ towards > -0.3)
        origins = points_m[facing] + _LIFT_M * normal[facing] + _LIFT_M * towards
        rays = np.broadcast_to(towards, origins.shape)
        result[facing] = ~self._snapshot.blocked(origins, rays, np.full(len(facing), 150.0))
        return result

    def open_sky(self, points_m: np.ndarray, normal: np.ndarray, pattern: np.ndarray, rays: int = 4) -> np.ndarray:
        """Share [N] of short rays over the hemisphere that nothing blocks (ambient occlusion).

        Args:
            pattern: [N] int, position in a 16-phase dither, so that neighbours look in different directions.
        """
        tangent = np.cross(normal, np.where(np.abs(normal[:, :1]) < 0.7, [[1.0, 0, 0]], [[0, 1.0, 0]])).astype(
            np.float32
        )
        tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
        bitangent = np.cross(normal, tangent)
        origins = points_m + _LIFT_M * normal
        clear = np.zeros(len(points_m), dtype=np.float32)
        for k in range(rays):
            phase = (pattern * rays + k) % 64
            angle, lift = (2.39996 * phase).astype(np.float32), np.sqrt((phase + 0.5) / 64).astype(np.float32)
            out = np.sqrt(1 - lift**2)
            direction = (
                (out * np.cos(angle))[:, None] * tangent
                + (out * np.sin(angle))[:, None] * bitangent
                + lift[:, None] * normal
            )
            limit = np.array([0.5, 1.2, 2.5, 6.0], dtype=np.float32)[(k + pattern) % 4]
            clear += ~self._snapshot.blocked(origins, direction, limit)
        return clear / rays

    def radiance(self, hits: Hits, directions: np.ndarray, normal: np.ndarray, lit: Lit) -> np.ndarray:
        """Linear radiance [N, 3] of hits (all of them hits) seen along directions [N, 3]."""
        light = self._light
        material = self._snapshot.of_faces("material", hits.face)
        facing = np.maximum(-_dot(normal, directions), 0.02)
        footprint = hits.range_m * self._pixel_rad / np.sqrt(facing)
        albedo, mirror = self._surface(material, self._snapshot.uv(hits), footprint)
        soft = self._columns["soft"][material]
        cosine = normal @ light.towards_sun.astype(np.float32)
        # Leaves take light from both sides and scatter it, so that single facets stand out less.
        direct = np.maximum(cosine, 0) * (1 - soft) + soft * (0.35 + 0.6 * np.abs(cosine))
        sun = lit.sun * direct
        upward = 0.5 + 0.5 * normal[:, 2]
        bounce = 0.16 * (1 - upward) * (0.35 + light.sun_rgb.mean() * 0.25)
        ambient = (upward * (0.25 + 0.75 * lit.sky))[:, None] * self._dome() + (bounce * (0.3 + 0.7 * lit.sky))[:, None]
        result = albedo * (sun[:, None] * light.sun_rgb.astype(np.float32) + ambient)
        shiny = np.flatnonzero(mirror > 0.01)
        if len(shiny):
            n, d = normal[shiny], directions[shiny]
            reflected = d - 2 * _dot(n, d)[:, None] * n
            fresnel = mirror[shiny] * (0.25 + 0.75 * (1 - facing[shiny]) ** 3)
            result[shiny] += fresnel[:, None] * (0.4 + 0.6 * lit.sky[shiny])[:, None] * self._reflected(reflected)
        return self._hazy(result, hits.range_m)

    def _dome(self) -> np.ndarray:
        """Mean radiance of the sky that lights upward surfaces."""
        return (0.65 * self._light.sky_rgb + 0.35 * self._light.horizon_rgb).astype(np.float32)

    def _surface(self, material: np.ndarray, uv: np.ndarray, footprint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Albedo [N, 3] and mirror strength [N] of points on materials [N]."""
        column = self._columns
        albedo, mirror = column["rgb"][material], column["gloss"][material]
        rows = np.flatnonzero(column["cell_fill"][material, 0] > 0)
        if len(rows):
            self._cells(material[rows], uv[rows], footprint[rows], rows, albedo, mirror)
        rows = np.flatnonzero(column["course_gap_m"][material] > 0)
        if len(rows):
            albedo[rows] *= self._courses(material[rows], uv[rows], footprint[rows])[:, None]
        for strength, wavelength in (("grain", "grain_m"), ("stain", "stain_m")):
            rows = np.flatnonzero(column[strength][material] > 0)
            m, w = material[rows], column[wavelength][material[rows]]
            amount = column[strength][m] * fade(w, footprint[rows])
            visible = amount > 0.004
            rows, w, amount = rows[visible], w[visible], amount[visible]
            albedo[rows] *= np.clip(1 + amount * noise(uv[rows, 0] / w, uv[rows, 1] / w), 0.2, 2.5)[:, None]
        return albedo, mirror

    def _cells(
        self,
        m: np.ndarray,
        uv: np.ndarray,
        footprint: np.ndarray,
        rows: np.ndarray,
        albedo: np.ndarray,
        mirror: np.ndarray,
    ) -> None:
        """Lay the lattice of patches over albedo and mirror, in place."""
        column = self._columns
        period, fill = column["cell_m"][m], column["cell_fill"][m]
        # Patches sit in the middle of their cells.
        at = uv + 0.5 * fill * period
        at[:, 1] -= column["cell_from_m"][m] * (column["cell_from_m"][m] > -100) + 0.5 * period[:, 1]
        share = pulse(at[:, 0], period[:, 0], fill[:, 0], footprint) * pulse(
            at[:, 1], period[:, 1], fill[:, 1], footprint
        )
        share *= uv[:, 1] > column["cell_from_m"][m]
        safe = np.where(period > 0, period, 1e6)
        vary = cell_hash(np.floor(at[:, 0] / safe[:, 0]), np.floor(at[:, 1] / safe[:, 1]), m)
        patch = column["cell_rgb"][m] * (1 + column["cell_jitter"][m] * vary * fade(safe[:, 0], footprint))[:, None]
        albedo[rows] += share[:, None] * (patch - albedo[rows])
        mirror[rows] += share * (column["cell_gloss"][m] - mirror[rows])

    def _courses(self, m: np.ndarray, uv: np.ndarray, footprint: np.ndarray) -> np.ndarray:
        """Brightness [N] of bricks and slabs with darker joints."""
        period, gap = self._columns["course_m"][m], self._columns["course_gap_m"][m]
        row = np.floor(uv[:, 1] / period[:, 1])
        shifted = uv[:, 0] + 0.5 * period[:, 0] * np.mod(row, 2)
        brick = pulse(shifted, period[:, 0], 1 - gap / period[:, 0], footprint) * pulse(
            uv[:, 1], period[:, 1], 1 - gap / period[:, 1], footprint
        )
        vary = 0.08 * cell_hash(np.floor(shifted / period[:, 0]), row, m) * fade(period.min(axis=1), footprint)
        return (1 - self._columns["course_dark"][m] * (1 - brick)) * (1 + vary)

    def sky(self, directions: np.ndarray) -> np.ndarray:
        """Linear radiance [N, 3] of the sky along directions [N, 3]."""
        light = self._light
        up = np.maximum(directions[:, 2], 0.0)
        blend = (1 - np.exp(-up * 4.5))[:, None]
        result = light.horizon_rgb.astype(np.float32) * (1 - blend) + light.sky_rgb.astype(np.float32) * blend
        plane = directions[:, :2] / (up + 0.12)[:, None]
        billow = (
            noise(plane[:, 0] * 1.1 + 7, plane[:, 1] * 1.1)
            + 0.5 * noise(plane[:, 0] * 2.7, plane[:, 1] * 2.7)
            + 0.25 * noise(plane[:, 0] * 6.1, plane[:, 1] * 6.1)
        )
        cloud = np.clip(0.5 * billow + 2.2 * light.clouds - 1.1, 0, 1) * np.clip(up * 9, 0, 1)
        shade = 1.12 - 0.22 * np.clip(billow, -1, 2) * light.clouds
        result += (cloud * 0.85)[:, None] * (light.horizon_rgb.astype(np.float32) * shade[:, None] - result)
        glow = np.maximum(directions @ light.towards_sun.astype(np.float32), 0) ** 24
        return result + (0.25 * glow)[:, None] * light.sun_rgb.astype(np.float32)

    def _reflected(self, directions: np.ndarray) -> np.ndarray:
        """The sky as a mirror shows it: dark street below the horizon."""
        light = self._light
        blend = (1 - np.exp(-np.maximum(directions[:, 2], 0) * 4.5))[:, None]
        sky = light.horizon_rgb.astype(np.float32) * (1 - blend) + light.sky_rgb.astype(np.float32) * blend
        # Below 20 degrees a street canyon mirrors facades rather than the sky.
        open_view = np.clip((directions[:, 2] + 0.02) * 3.5, 0.12, 1)
        return sky * open_view[:, None]

    def _hazy(self, radiance: np.ndarray, range_m: np.ndarray) -> np.ndarray:
        left = np.exp(-range_m / self._light.haze_m)[:, None]
        return radiance * left + self._light.horizon_rgb.astype(np.float32) * (1 - left)

    def develop(self, radiance: np.ndarray) -> np.ndarray:
        """Film response: float32 [N, 3] in 0..255 of linear radiance."""
        exposed = 1 - np.exp(-self._light.exposure * radiance)
        return 255 * np.sqrt(exposed)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]
