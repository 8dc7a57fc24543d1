# SPDX-License-Identifier: Apache-2.0
"""Trees, bushes and hedges: dark cores under many small leaves."""

from __future__ import annotations

import numpy as np

from training.data.minicity.mesh import Mesh, concatenate, cylinder, ellipsoid, triangles
from training.data.minicity.palette import Material, Palette, varied

LEAF_GREENS = [(0.10, 0.17, 0.035), (0.07, 0.14, 0.03), (0.14, 0.18, 0.05), (0.06, 0.11, 0.045), (0.16, 0.15, 0.03)]


def tree(rng: np.random.Generator, palette: Palette, height_m: float) -> Mesh:
    """A street tree: trunk, a few boughs and a crown of leaf clusters."""
    bark = palette.add(
        Material(varied(rng, (0.13, 0.095, 0.065), 0.25), grain=0.4, grain_m=0.06, stain=0.2, stain_m=0.5, echo=25)
    )
    clear_m = height_m * rng.uniform(0.28, 0.4)
    spread = height_m * rng.uniform(0.20, 0.30)
    lean = rng.uniform(-0.15, 0.15, 2)
    fork = np.array([*lean, clear_m])
    radius = 0.02 * height_m
    parts = [cylinder((0, 0, 0), fork, radius, bark, 0.75 * radius)]
    middle = np.array([*lean, clear_m + 0.5 * (height_m - clear_m)])
    clusters = []
    for i in range(int(rng.integers(6, 10))):
        angle = 2.4 * i + rng.uniform(-0.4, 0.4)
        level = rng.uniform(-0.62, 0.62)
        out = spread * np.sqrt(1 - level**2) * rng.uniform(0.5, 0.85)
        centre = middle + np.array([out * np.cos(angle), out * np.sin(angle), level * (height_m - clear_m) * 0.5])
        size = spread * rng.uniform(0.42, 0.62)
        clusters.append((centre, size * np.array([1, 1, rng.uniform(0.7, 0.95)])))
        parts.append(cylinder(fork, centre, 0.45 * radius, bark, 0.15 * radius, 5))
    clusters.append((middle, np.array([0.75, 0.75, 1.0]) * spread * 0.8))
    parts.append(_foliage(rng, palette, clusters, 0.17, 42))
    return concatenate(parts)


def distant_tree(rng: np.random.Generator, palette: Palette, height_m: float) -> Mesh:
    """A tree for the background: trunk and lumpy crown without leaves."""
    green = LEAF_GREENS[rng.integers(len(LEAF_GREENS))]
    bark = palette.plain((0.12, 0.09, 0.06))
    leaf = palette.add(Material(varied(rng, green, 0.2), grain=0.4, grain_m=0.6, stain=0.3, stain_m=2.0, echo=22))
    middle, spread = np.array([0, 0, 0.62 * height_m]), 0.27 * height_m
    parts = [cylinder((0, 0, 0), middle, 0.02 * height_m, bark, sides=5)]
    for _ in range(4):
        parts.append(_lumpy(rng, middle + rng.uniform(-0.5, 0.5, 3) * spread, spread * rng.uniform(0.6, 0.9, 3), leaf))
    return concatenate(parts)


def bush(rng: np.random.Generator, palette: Palette) -> Mesh:
    """A round shrub about a metre high."""
    clusters = []
    for _ in range(int(rng.integers(2, 5))):
        size = rng.uniform(0.35, 0.65)
        clusters.append((np.array([*rng.uniform(-0.5, 0.5, 2), size * 0.75]), size * np.array([1, 1, 0.85])))
    return _foliage(rng, palette, clusters, 0.11, 60)


def hedge(rng: np.random.Generator, palette: Palette, length_m: float) -> Mesh:
    """A clipped hedge along x from 0."""
    height, half = float(rng.uniform(0.8, 1.5)), 0.38
    at = np.arange(0.3, length_m, 0.55)
    clusters = [(np.array([x, 0, height * 0.52]), np.array([0.5, half, height * 0.5])) for x in at]
    return _foliage(rng, palette, clusters, 0.10, 75)


def _foliage(rng: np.random.Generator, palette: Palette, clusters: list, leaf_m: float, per_m2: float) -> Mesh:
    """Leaves scattered over ellipsoids (centre [3], radii [3]) around a darker core of each."""
    green = LEAF_GREENS[rng.integers(len(LEAF_GREENS))]
    greens = [
        palette.add(Material(varied(rng, green, 0.35), stain=0.3, stain_m=0.9, soft=0.45, echo=28)) for _ in range(4)
    ]
    core = palette.add(
        Material(tuple(0.45 * c for c in green), grain=0.6, grain_m=0.25, stain=0.3, stain_m=0.8, echo=22)
    )
    parts = []
    for centre, radii in clusters:
        parts.append(_lumpy(rng, centre, 0.86 * radii, core))
        count = int(per_m2 * 4 * np.pi * np.mean(radii) ** 2)
        outward = rng.normal(size=(count, 3))
        outward /= np.linalg.norm(outward, axis=1, keepdims=True)
        at = centre + outward * radii * rng.uniform(0.84, 1.06, (count, 1))
        tilt = outward + 0.75 * rng.normal(size=(count, 3))
        tilt /= np.linalg.norm(tilt, axis=1, keepdims=True)
        along = np.cross(tilt, rng.normal(size=(count, 3)))
        along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
        across = np.cross(tilt, along)
        size = leaf_m * rng.uniform(0.6, 1.3, (count, 1))
        corners = np.stack(
            [
                at - size * along,
                at + 0.55 * size * across + 0.2 * size * along,
                at + size * along - 0.3 * size * across,
            ],
            1,
        )
        parts.append(triangles(corners, np.array(greens)[rng.integers(len(greens), size=count)]))
    return concatenate(parts)


def _lumpy(rng: np.random.Generator, centre: np.ndarray, radii: np.ndarray, material: int) -> Mesh:
    """An ellipsoid whose surface is pushed in and out."""
    unit = ellipsoid((0, 0, 0), (1, 1, 1), material, 2)
    wave = rng.normal(size=(3, 3)) * 2.2
    swell = 1 + 0.09 * np.sin(unit.corners @ wave + rng.uniform(0, 6, 3)).sum(axis=-1, keepdims=True)
    return triangles(unit.corners * swell * radii + centre, material)
