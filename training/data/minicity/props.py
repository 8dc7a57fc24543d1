# SPDX-License-Identifier: Apache-2.0
"""Street furniture: lamps, signs, signals, shelters, fences, and the small things that are annotated with boxes."""

from __future__ import annotations

import numpy as np

from training.data.minicity.mesh import Mesh, block, concatenate, cylinder, ellipsoid, frustum, hull, prism
from training.data.minicity.palette import Material, Palette, varied


def _metal(palette: Palette) -> int:
    return palette.add(Material((0.16, 0.17, 0.17), stain=0.15, stain_m=0.5, gloss=0.1, echo=35))


def street_lamp(rng: np.random.Generator, palette: Palette) -> Mesh:
    """A pole whose arm reaches forward (x) over the road."""
    metal, lamp = _metal(palette), palette.plain((0.8, 0.8, 0.75), 0.3)
    height, reach = rng.uniform(7.5, 9.0), rng.uniform(1.6, 2.4)
    return concatenate(
        [
            cylinder((0, 0, 0), (0, 0, 0.9), 0.13, metal),
            cylinder((0, 0, 0.9), (0, 0, height), 0.085, metal, 0.06),
            cylinder((0, 0, height - 0.05), (reach, 0, height + 0.35), 0.05, metal, sides=6),
            block((reach - 0.1, reach + 0.6), (-0.14, 0.14), (height + 0.27, height + 0.4), lamp),
        ]
    )


def sign(rng: np.random.Generator, palette: Palette) -> Mesh:
    """A traffic sign whose face looks along -x."""
    metal, height = _metal(palette), rng.uniform(2.2, 2.7)
    style = rng.integers(4)
    face = palette.plain(
        [(0.65, 0.04, 0.04), (0.03, 0.12, 0.50), (0.75, 0.75, 0.72), (0.70, 0.50, 0.03)][style], 0.1, 220
    )
    inner = palette.plain((0.75, 0.75, 0.72), 0.0, 220)
    parts = [cylinder((0, 0, 0), (0, 0, height), 0.04, metal, sides=8)]
    if style < 2:
        parts.append(cylinder((-0.05, 0, height - 0.35), (-0.08, 0, height - 0.35), 0.33, face, sides=18))
        parts.append(cylinder((-0.081, 0, height - 0.35), (-0.09, 0, height - 0.35), 0.22, inner, sides=18))
    else:
        parts.append(block((-0.08, -0.05), (-0.3, 0.3), (height - 0.9, height), face))
        parts.append(
            block((-0.09, -0.08), (-0.24, 0.24), (height - 0.6, height - 0.45), palette.plain((0.05, 0.05, 0.05)))
        )
    return concatenate(parts)


def traffic_light(rng: np.random.Generator, palette: Palette, reach_m: float) -> Mesh:
    """A signal on a mast, with a second one on an arm reaching ``reach_m`` to the left (y); it looks along -x."""
    metal, case = _metal(palette), palette.plain((0.03, 0.03, 0.03))
    lamps = [palette.plain(c, 0.2) for c in ((0.25, 0.01, 0.01), (0.22, 0.14, 0.01), (0.03, 0.85, 0.35))]
    parts = [
        cylinder((0, 0, 0), (0, 0, 5.9), 0.1, metal, 0.08),
        cylinder((0, 0, 5.7), (0, reach_m, 5.9), 0.06, metal, 0.045),
    ]
    for y, z in ((0.0, 2.9), (reach_m - 0.3, 5.75)):
        parts.append(block((-0.3, -0.09), (y - 0.17, y + 0.17), (z - 0.5, z + 0.5), case))
        for i, lamp in enumerate(lamps):
            at = z + 0.32 - 0.32 * i
            parts.append(cylinder((-0.29, y, at), (-0.32, y, at), 0.12, lamp, sides=10))
    return concatenate(parts)


def bus_shelter(rng: np.random.Generator, palette: Palette) -> Mesh:
    """A shelter open towards -y, four metres long."""
    metal, roof = _metal(palette), palette.plain(varied(rng, (0.2, 0.22, 0.24), 0.3), 0.1)
    glass = palette.add(
        Material((0.10, 0.12, 0.12), gloss=0.4, cell_m=(1.3, 0), cell_fill=(0.04, 1), cell_rgb=(0.2, 0.2, 0.2), echo=10)
    )
    poster = palette.plain(varied(rng, (0.5, 0.3, 0.3), 0.7), 0.1)
    parts = [
        block((-2.1, 2.1), (-0.8, 0.75), (2.45, 2.58), roof),
        block((-2.0, 2.0), (0.66, 0.7), (0.25, 2.45), glass),
        block((1.96, 2.0), (-0.6, 0.7), (0.3, 2.2), poster),
        block((-1.6, 1.2), (0.25, 0.6), (0.42, 0.48), metal),
    ]
    parts += [cylinder((x, y, 0), (x, y, 2.45), 0.05, metal, sides=6) for x in (-1.98, 1.98) for y in (-0.6, 0.68)]
    return concatenate(parts)


def bollard(rng: np.random.Generator, palette: Palette) -> Mesh:
    metal = _metal(palette)
    return concatenate(
        [cylinder((0, 0, 0), (0, 0, 0.95), 0.08, metal, sides=8), ellipsoid((0, 0, 0.95), (0.08, 0.08, 0.05), metal, 1)]
    )


def hydrant(rng: np.random.Generator, palette: Palette) -> Mesh:
    red = palette.plain((0.5, 0.04, 0.03), 0.15)
    return concatenate(
        [
            cylinder((0, 0, 0), (0, 0, 0.6), 0.12, red),
            ellipsoid((0, 0, 0.62), (0.13, 0.13, 0.1), red, 1),
            cylinder((0, -0.2, 0.45), (0, 0.2, 0.45), 0.06, red, sides=6),
        ]
    )


def bench(rng: np.random.Generator, palette: Palette) -> Mesh:
    wood, metal = palette.add(Material((0.25, 0.15, 0.07), grain=0.3, grain_m=0.08, echo=20)), _metal(palette)
    return concatenate(
        [
            block((-0.8, 0.8), (-0.25, 0.2), (0.42, 0.48), wood),
            hull([(x, y, z) for x in (-0.8, 0.8) for y, z in ((0.2, 0.5), (0.3, 0.9), (0.24, 0.5), (0.34, 0.9))], wood),
        ]
        + [block((x - 0.04, x + 0.04), (-0.2, 0.25), (0, 0.45), metal) for x in (-0.65, 0.65)]
    )


def kiosk(rng: np.random.Generator, palette: Palette) -> Mesh:
    """An advertising column."""
    post = palette.add(
        Material(
            varied(rng, (0.35, 0.35, 0.3), 0.4),
            cell_m=(0.9, 1.3),
            cell_fill=(0.85, 0.85),
            cell_rgb=(0.45, 0.3, 0.25),
            cell_jitter=0.8,
        )
    )
    cap = palette.plain((0.08, 0.12, 0.10), 0.1)
    return concatenate(
        [cylinder((0, 0, 0), (0, 0, 2.7), 0.6, post, sides=16), cylinder((0, 0, 2.7), (0, 0, 3.1), 0.75, cap, 0.2, 16)]
    )


def fence(length_m: float, palette: Palette, rng: np.random.Generator) -> Mesh:
    """Rails and posts along x from 0."""
    metal = palette.plain(varied(rng, (0.1, 0.12, 0.11), 0.4), 0.1)
    posts = [cylinder((x, 0, 0), (x, 0, 1.25), 0.035, metal, sides=5) for x in np.arange(0, length_m + 0.1, 1.6)]
    rails = [block((0, length_m), (-0.02, 0.02), (z, z + 0.05), metal) for z in (0.2, 0.65, 1.15)]
    bars = [block((x - 0.012, x + 0.012), (-0.01, 0.01), (0.2, 1.15), metal) for x in np.arange(0.2, length_m, 0.2)]
    return concatenate([*posts, *rails, *bars])


def wall(length_m: float, palette: Palette, rng: np.random.Generator) -> Mesh:
    """A low garden wall along x from 0."""
    brick = palette.add(
        Material(
            varied(rng, (0.36, 0.20, 0.14), 0.25),
            grain=0.15,
            grain_m=0.03,
            stain=0.2,
            stain_m=1.5,
            course_m=(0.26, 0.085),
            course_gap_m=0.012,
            course_dark=0.35,
        )
    )
    cap = palette.plain((0.45, 0.43, 0.40))
    height = float(rng.uniform(0.7, 1.5))
    return concatenate(
        [
            block((0, length_m), (-0.13, 0.13), (0, height), brick),
            block((0, length_m), (-0.17, 0.17), (height, height + 0.08), cap),
        ]
    )


def hoarding(length_m: float, palette: Palette, rng: np.random.Generator) -> Mesh:
    """A building site's wooden wall along x from 0."""
    board = palette.add(
        Material(
            varied(rng, (0.12, 0.25, 0.4), 0.4),
            stain=0.15,
            stain_m=0.8,
            course_m=(1.2, 2.2),
            course_gap_m=0.03,
            course_dark=0.5,
        )
    )
    return block((0, length_m), (-0.06, 0.06), (0, 2.2), board)


def jersey_barrier(rng: np.random.Generator, palette: Palette) -> Mesh:
    """One element, two metres long, in red or white plastic, or concrete."""
    rgb = [(0.60, 0.07, 0.03), (0.72, 0.72, 0.70), (0.42, 0.41, 0.39)][int(rng.choice(3, p=[0.4, 0.4, 0.2]))]
    skin = palette.add(Material(varied(rng, rgb, 0.1), stain=0.2, stain_m=0.5, echo=60))
    return prism(
        [(-0.3, 0), (0.3, 0), (0.26, 0.25), (0.12, 0.45), (0.09, 0.95), (-0.09, 0.95), (-0.12, 0.45), (-0.26, 0.25)],
        (-0.98, 0.98),
        skin,
    ).moved(yaw=np.pi / 2)


def traffic_cone(rng: np.random.Generator, palette: Palette) -> Mesh:
    orange, white = palette.plain((0.80, 0.18, 0.02), 0.0, 70), palette.plain((0.75, 0.75, 0.72), 0.0, 230)
    return concatenate(
        [
            block((-0.19, 0.19), (-0.19, 0.19), (0, 0.05), palette.plain((0.05, 0.05, 0.05))),
            cylinder((0, 0, 0.05), (0, 0, 0.3), 0.15, orange, 0.105, 12),
            cylinder((0, 0, 0.3), (0, 0, 0.48), 0.105, white, 0.07, 12),
            cylinder((0, 0, 0.48), (0, 0, 0.75), 0.07, orange, 0.02, 12),
        ]
    )


def rubbish_bin(rng: np.random.Generator, palette: Palette) -> Mesh:
    """A wheeled container (movable_object.pushable_pullable)."""
    body = palette.plain(
        varied(rng, [(0.06, 0.16, 0.08), (0.05, 0.05, 0.06), (0.35, 0.28, 0.03)][rng.integers(3)], 0.2), 0.1
    )
    rubber = palette.plain((0.02, 0.02, 0.02))
    wide = float(rng.choice([0.3, 0.65]))
    return concatenate(
        [
            frustum((-0.3, 0.28, -wide + 0.03, wide - 0.03), (-0.36, 0.36, -wide, wide), (0.08, 1.0), body),
            frustum((-0.37, 0.38, -wide, wide), (-0.33, 0.3, -wide + 0.05, wide - 0.05), (1.0, 1.1), body),
            *(
                cylinder((-0.25, s * (wide - 0.1), 0.1), (-0.25, s * (wide - 0.03), 0.1), 0.1, rubber, sides=8)
                for s in (-1, 1)
            ),
        ]
    )


def debris(rng: np.random.Generator, palette: Palette) -> Mesh:
    """A heap of bags and boxes (movable_object.debris)."""
    bag, box = palette.plain((0.04, 0.04, 0.05), 0.25), palette.plain((0.40, 0.28, 0.16))
    return concatenate(
        [
            ellipsoid((0.1, 0.1, 0.24), (0.36, 0.3, 0.24), bag, 2),
            ellipsoid((-0.4, -0.05, 0.2), (0.26, 0.3, 0.2), bag, 2),
            block((0.35, 0.85), (-0.4, 0.05), (0, 0.38), box),
        ]
    )


def bicycle_rack(rng: np.random.Generator, palette: Palette) -> Mesh:
    """A row of hoops (static_object.bicycle_rack)."""
    metal = _metal(palette)
    parts = []
    for x in np.arange(-1.8, 1.81, 0.72):
        parts += [cylinder((x, y, 0), (x, y, 0.8), 0.03, metal, sides=6) for y in (-0.35, 0.35)]
        parts.append(cylinder((x, -0.35, 0.8), (x, 0.35, 0.8), 0.03, metal, sides=6))
    parts.append(block((-1.9, 1.9), (-0.38, -0.32), (0.0, 0.04), metal))
    return concatenate(parts)


def dog(rng: np.random.Generator, palette: Palette) -> Mesh:
    """A dog (animal), facing x."""
    coat = palette.plain(varied(rng, (0.2, 0.13, 0.07), 0.6))
    parts = [
        ellipsoid((0, 0, 0.42), (0.34, 0.13, 0.14), coat, 2),
        ellipsoid((0.38, 0, 0.58), (0.15, 0.09, 0.1), coat, 2),
        cylinder((-0.3, 0, 0.48), (-0.5, 0, 0.65), 0.03, coat, sides=5),
    ]
    parts += [cylinder((x, y, 0), (x, y, 0.4), 0.04, coat, sides=5) for x in (-0.22, 0.22) for y in (-0.08, 0.08)]
    return concatenate(parts)
