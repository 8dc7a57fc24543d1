# SPDX-License-Identifier: Apache-2.0
"""Pedestrians: walking or standing figures, adults, children and construction workers."""

from __future__ import annotations

import numpy as np

from training.data.minicity.mesh import Mesh, concatenate, cylinder, ellipsoid, hull
from training.data.minicity.palette import Palette, varied

_SHIRTS = [
    (0.55, 0.55, 0.52),
    (0.08, 0.14, 0.40),
    (0.40, 0.06, 0.06),
    (0.03, 0.03, 0.03),
    (0.12, 0.30, 0.18),
    (0.55, 0.40, 0.10),
]
_TROUSERS = [(0.03, 0.04, 0.09), (0.02, 0.02, 0.02), (0.25, 0.21, 0.15), (0.12, 0.12, 0.13)]
_SKIN = [(0.45, 0.28, 0.20), (0.30, 0.17, 0.11), (0.14, 0.08, 0.05), (0.50, 0.33, 0.25)]
_HAIR = [(0.02, 0.015, 0.01), (0.08, 0.05, 0.02), (0.25, 0.18, 0.10), (0.30, 0.30, 0.30)]


def pedestrian(rng: np.random.Generator, palette: Palette, category: str, walking: bool) -> Mesh:
    """A figure in mid-stride (x forward)."""
    height = rng.uniform(1.05, 1.4) if category.endswith("child") else rng.uniform(1.55, 1.9)
    scale = height / 1.75
    shirt = palette.plain(varied(rng, _SHIRTS[rng.integers(len(_SHIRTS))], 0.3))
    trousers = palette.plain(varied(rng, _TROUSERS[rng.integers(len(_TROUSERS))], 0.3))
    skin = palette.plain(_SKIN[rng.integers(len(_SKIN))])
    hair = palette.plain(_HAIR[rng.integers(len(_HAIR))])
    shoe = palette.plain((0.03, 0.03, 0.03))
    if category.endswith("construction_worker"):
        shirt, hair = palette.plain((0.80, 0.32, 0.02), 0.0, 160), palette.plain((0.75, 0.62, 0.05), 0.2)
    stride = rng.uniform(0.18, 0.3) if walking else 0.04
    parts = []
    for side in (-1, 1):
        foot = side * stride
        knee = (0.45 * foot + (0.06 if walking else 0.0), side * 0.1, 0.48)
        parts.append(cylinder((0, side * 0.09, 0.9), knee, 0.085, trousers, 0.065, 7))
        parts.append(cylinder(knee, (foot, side * 0.1, 0.07), 0.065, trousers, 0.05, 7))
        parts.append(
            hull(
                [
                    (foot + dx, side * 0.1 + dy, z)
                    for dx, z in ((-0.09, 0), (0.18, 0), (-0.09, 0.1), (0.08, 0.09))
                    for dy in (-0.045, 0.045)
                ],
                shoe,
            )
        )
        hand = (-0.9 * foot + 0.04, side * 0.27, 0.86)
        elbow = (-0.3 * foot - 0.04, side * 0.26, 1.13)
        parts.append(cylinder((0, side * 0.22, 1.42), elbow, 0.055, shirt, 0.05, 6))
        parts.append(cylinder(elbow, hand, 0.05, shirt if rng.random() < 0.6 else skin, 0.04, 6))
    parts += [
        hull(
            [
                (dx, y, z)
                for z, hx, hy in ((0.86, 0.11, 0.16), (1.15, 0.11, 0.15), (1.42, 0.12, 0.22), (1.48, 0.07, 0.12))
                for dx in (-hx, hx)
                for y in (-hy, hy)
            ],
            shirt,
        ),
        cylinder((0, 0, 1.46), (0.01, 0, 1.56), 0.06, skin, sides=6),
        ellipsoid((0.02, 0, 1.62), (0.1, 0.085, 0.125), skin, 1),
        ellipsoid((-0.015, 0, 1.66), (0.11, 0.095, 0.09), hair, 1),
    ]
    if rng.random() < 0.3 and not category.endswith("child"):
        bag = palette.plain(varied(rng, (0.12, 0.1, 0.08), 0.7))
        parts.append(hull([(dx, y, z) for dx in (-0.27, -0.1) for y in (-0.14, 0.14) for z in (0.98, 1.4)], bag))
    return concatenate(parts).moved(scale=scale)
