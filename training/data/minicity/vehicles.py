# SPDX-License-Identifier: Apache-2.0
"""Vehicles and riders built of a few convex parts; x forward, y left, z up, standing on z = 0, centred in x and y."""

from __future__ import annotations

import numpy as np

from training.data.minicity.mesh import Mesh, block, concatenate, cylinder, ellipsoid, frustum, hull, prism
from training.data.minicity.palette import Material, Palette, varied

CAR_PAINTS = [
    (0.60, 0.60, 0.60), (0.72, 0.72, 0.71), (0.66, 0.66, 0.65), (0.03, 0.03, 0.035), (0.025, 0.025, 0.03), (0.10, 0.11, 0.12),
    (0.24, 0.25, 0.26), (0.36, 0.37, 0.38), (0.30, 0.03, 0.03), (0.04, 0.07, 0.20), (0.06, 0.12, 0.22), (0.06, 0.12, 0.09),
    (0.36, 0.30, 0.20), (0.42, 0.20, 0.05),
]  # fmt: skip
LOAD_PAINTS = [
    (0.72, 0.72, 0.70), (0.62, 0.62, 0.60), (0.45, 0.46, 0.47), (0.42, 0.08, 0.06), (0.07, 0.16, 0.34), (0.52, 0.42, 0.14),
    (0.18, 0.27, 0.18),
]  # fmt: skip
BUS_PAINTS = [(0.55, 0.10, 0.07), (0.60, 0.48, 0.10), (0.12, 0.28, 0.45), (0.68, 0.68, 0.66), (0.14, 0.36, 0.22)]


def _paint(rng: np.random.Generator, palette: Palette, choices: list, gloss: float = 0.25) -> int:
    rgb = varied(rng, choices[rng.integers(len(choices))], 0.1)
    return palette.add(Material(rgb, stain=0.05, stain_m=1.0, gloss=gloss, echo=30))


def _sheet(rng: np.random.Generator, palette: Palette) -> int:
    """The panelled, a little dirty side of a lorry's box."""
    rgb = varied(rng, LOAD_PAINTS[rng.integers(len(LOAD_PAINTS))], 0.1)
    panel = (round(float(rng.uniform(0.6, 1.3)), 2), 20.0)
    return palette.add(
        Material(rgb, stain=0.09, stain_m=0.8, course_m=panel, course_gap_m=0.03, course_dark=0.22, gloss=0.05, echo=30)
    )


def _glass(palette: Palette) -> int:
    return palette.add(Material((0.012, 0.015, 0.018), gloss=0.55, echo=6))


def _rubber(palette: Palette) -> int:
    return palette.add(Material((0.012, 0.012, 0.013), grain=0.2, grain_m=0.05, echo=4))


def _wheels(
    palette: Palette, axles_m: list[float], half_width_m: float, radius_m: float, width_m: float = 0.22
) -> Mesh:
    rubber, rim = _rubber(palette), palette.plain((0.32, 0.33, 0.34), gloss=0.3)
    parts = []
    for x in axles_m:
        for side in (-1, 1):
            outer, inner = side * (half_width_m + 0.02), side * (half_width_m - width_m)
            parts.append(cylinder((x, inner, radius_m), (x, outer, radius_m), radius_m, rubber, sides=14))
            parts.append(
                cylinder((x, outer - side * 0.05, radius_m), (x, outer, radius_m), 0.6 * radius_m, rim, sides=10).moved(
                    y=side * 0.004
                )
            )
    return concatenate(parts)


def _lamps(palette: Palette, length_m: float, width_m: float, z: float, size: float = 0.16) -> Mesh:
    head, tail = palette.plain((0.9, 0.9, 0.85), 0.5, 90), palette.plain((0.55, 0.02, 0.02), 0.3, 120)
    plate = palette.plain((0.75, 0.75, 0.72), 0.0, 200)
    half, w = length_m / 2, width_m / 2
    parts = [block((-half - 0.001, -half + 0.02), (-0.26, 0.26), (z - 0.25, z - 0.13), plate)]
    for side in (-1, 1):
        y = sorted((side * (w - 0.08), side * (w - 0.45)))
        parts.append(block((half - 0.06, half), tuple(y), (z - size / 2, z + size / 2), head))
        parts.append(block((-half, -half + 0.06), tuple(y), (z - size / 2, z + size / 2), tail))
    return concatenate(parts)


def car(rng: np.random.Generator, palette: Palette) -> Mesh:
    """A saloon, hatchback, estate or van."""
    style = str(rng.choice(["saloon", "hatch", "suv", "van"], p=[0.35, 0.25, 0.28, 0.12]))
    length, width, height = {
        "saloon": (4.65, 1.82, 1.46), "hatch": (4.10, 1.76, 1.50), "suv": (4.70, 1.92, 1.72), "van": (5.10, 1.96, 2.05),
    }[style]  # fmt: skip
    length, width, height = (round(float(v * rng.uniform(0.96, 1.05)), 3) for v in (length, width, height))
    paint, glass, dark = _paint(rng, palette, CAR_PAINTS), _glass(palette), palette.plain((0.03, 0.03, 0.03), 0.05, 8)
    half, w = length / 2, width / 2
    waist = {"saloon": 0.64, "hatch": 0.64, "suv": 0.62, "van": 0.58}[style] * height
    hood = 0.92 * waist
    floor = 0.2 if style != "suv" else 0.28
    front, back = {"saloon": (0.22, -0.33), "hatch": (0.22, -0.47), "suv": (0.2, -0.47), "van": (0.34, -0.49)}[style]
    f, b = front * length, back * length
    body = hull(
        [(x, y * w, z) for y in (-1, 1) for x, z in ((-half + 0.06, floor), (half - 0.08, floor))]
        + [(x, y * w, z) for y in (-1, 1) for x, z in ((-half + 0.02, 0.55 * waist), (half - 0.02, 0.55 * waist))]
        + [
            (x, 0.94 * y * w, z)
            for y in (-1, 1)
            for x, z in ((-half + 0.1, waist), (f + 0.1, waist), (half - 0.25, hood - 0.12))
        ],
        paint,
    )
    rake_front = 0.55 if style != "van" else 0.45
    rake_back = 0.75 if style == "saloon" else 0.22
    roof_w = 0.78 * w
    cabin = frustum(
        (b, f, -0.92 * w, 0.92 * w),
        (b + rake_back, f - rake_front, -roof_w, roof_w),
        (waist - 0.02, height - 0.05),
        glass,
    )
    roof = frustum(
        (b + rake_back - 0.03, f - rake_front + 0.03, -roof_w - 0.02, roof_w + 0.02),
        (b + rake_back + 0.15, f - rake_front - 0.15, -0.85 * roof_w, 0.85 * roof_w),
        (height - 0.06, height),
        paint,
    )
    parts = [body, cabin, roof, _wheels(palette, [-0.30 * length, 0.31 * length], w, 0.33 if style != "suv" else 0.37)]
    for x0, x1 in ((b + 0.02, b + rake_back + 0.02), (f - 0.02, f - rake_front), ((b + f) / 2, (b + f) / 2)):
        for side in (-1, 1):  # pillars in body colour break the glass up
            parts.append(
                hull(
                    [(x0 + d, side * (0.92 * w + e), waist - 0.02) for d in (-0.05, 0.05) for e in (-0.02, 0.012)]
                    + [(x1 + d, side * (roof_w + e), height - 0.05) for d in (-0.05, 0.05) for e in (-0.02, 0.012)],
                    paint,
                )
            )
    parts.append(block((-half, half - 0.01), (-0.97 * w, 0.97 * w), (floor + 0.02, floor + 0.16), dark))
    parts.append(block((half - 0.1, half - 0.005), (-0.5 * w, 0.5 * w), (0.42 * waist, 0.62 * waist), dark))
    parts.append(_lamps(palette, length, width, 0.78 * waist))
    return concatenate(parts)


def truck(rng: np.random.Generator, palette: Palette) -> Mesh:
    """A lorry with a cab and a box, a flat bed or a tipper."""
    length, width, height = float(rng.uniform(6.5, 9.0)), float(rng.uniform(2.3, 2.5)), float(rng.uniform(2.9, 3.5))
    length, width, height = round(length, 3), round(width, 3), round(height, 3)
    half, w = length / 2, width / 2
    cab_m = 1.9
    paint, load, glass = _paint(rng, palette, LOAD_PAINTS), _sheet(rng, palette), _glass(palette)
    dark = palette.plain((0.04, 0.04, 0.04))
    cab_top = min(2.7, height)
    parts = [
        frustum((half - cab_m, half, -w, w), (half - cab_m, half - 0.05, -w, w), (0.45, 1.35), paint),
        frustum((half - cab_m, half - 0.05, -w, w), (half - cab_m, half - 0.35, -w, w), (1.35, cab_top), paint),
        hull(
            [
                (half - 0.03 - dx, y * 0.86 * w, z)
                for dx, z in ((0, 1.45), (0.27, cab_top - 0.25), (0.1, 1.45), (0.37, cab_top - 0.25))
                for y in (-1, 1)
            ],
            glass,
        ),
        block((half - 1.35, half - 0.55), (-w - 0.004, w + 0.004), (1.45, cab_top - 0.45), glass),
        block((-half, half - cab_m), (-0.45 * w, 0.45 * w), (0.55, 0.95), dark),
        block((half - 0.15, half), (-0.9 * w, 0.9 * w), (0.4, 0.62), dark),
        _wheels(palette, [half - 0.95, -half + 1.2, -half + 2.3], w, 0.48, 0.3),
        _lamps(palette, length, width, 0.9),
    ]
    if rng.random() < 0.7:
        stripe = _paint(rng, palette, LOAD_PAINTS, 0.05)
        parts.append(block((-half, half - cab_m - 0.15), (-w, w), (0.95, height), load))
        parts.append(block((-half + 0.6, half - cab_m - 0.8), (-w - 0.004, w + 0.004), (1.6, 1.95), stripe))
    else:
        parts.append(
            frustum(
                (-half + 0.2, half - cab_m - 0.3, -0.85 * w, 0.85 * w),
                (-half, half - cab_m - 0.1, -w, w),
                (0.95, 2.2),
                load,
            )
        )
        parts.append(
            ellipsoid(
                ((-cab_m) / 2, 0, 2.1),
                ((length - cab_m) / 2 - 0.3, 0.85 * w, min(0.6, height - 2.15)),
                palette.add(Material((0.22, 0.17, 0.11), grain=0.4, grain_m=0.15, echo=20)),
                2,
            )
        )
        parts.append(block((half - cab_m - 0.12, half - cab_m - 0.02), (-w, w), (0.95, height), load))
    return concatenate(parts)


def trailer(rng: np.random.Generator, palette: Palette) -> Mesh:
    """A box trailer, drawn by a truck."""
    length, width, height = round(float(rng.uniform(7.5, 11.0)), 3), 2.5, round(float(rng.uniform(3.3, 3.8)), 3)
    half, w = length / 2, width / 2
    load, dark = _sheet(rng, palette), palette.plain((0.05, 0.05, 0.05))
    ribs = palette.add(
        Material((0.55, 0.55, 0.53), cell_m=(1.2, 0), cell_fill=(0.06, 1), cell_rgb=(0.25, 0.25, 0.25), echo=30)
    )
    parts = [
        block((-half, half), (-w, w), (1.05, height), load),
        block((-half + 0.1, half - 0.1), (-w - 0.004, w + 0.004), (1.1, 1.35), ribs),
        block((-half, half), (-0.4 * w, 0.4 * w), (0.75, 1.05), dark),
        block((half - 2.2, half - 2.0), (-0.7 * w, -0.55 * w), (0.0, 0.9), dark),
        block((half - 2.2, half - 2.0), (0.55 * w, 0.7 * w), (0.0, 0.9), dark),
        block((-half, -half + 0.05), (-w + 0.1, w - 0.1), (0.4, 0.55), dark),
        _wheels(palette, [-half + 1.1, -half + 2.2, -half + 3.3], w, 0.46, 0.32),
        _lamps(palette, length, width, 0.95),
    ]
    return concatenate(parts)


def bus(rng: np.random.Generator, palette: Palette) -> Mesh:
    """A city bus with a band of windows."""
    length, width, height = round(float(rng.uniform(10.0, 12.3)), 3), 2.55, round(float(rng.uniform(3.0, 3.3)), 3)
    half, w = length / 2, width / 2
    rgb = varied(rng, BUS_PAINTS[rng.integers(len(BUS_PAINTS))], 0.1)
    paint = palette.add(Material(rgb, stain=0.05, stain_m=1.0, gloss=0.2, echo=35))
    band = palette.add(
        Material(
            (0.015, 0.018, 0.02), gloss=0.5, cell_m=(1.45, 0), cell_fill=(0.07, 1), cell_rgb=(0.06, 0.06, 0.06), echo=8
        )
    )
    white, dark, glass = palette.plain((0.7, 0.7, 0.68), 0.2), palette.plain((0.03, 0.03, 0.03)), _glass(palette)
    sign = palette.plain((0.75, 0.35, 0.02))
    parts = [
        block((-half, half), (-w, w), (0.32, 1.15), paint),
        block((-half + 0.01, half - 0.01), (-w + 0.01, w - 0.01), (1.15, 2.45), band),
        frustum(
            (-half, half, -w, w),
            (-half + 0.1, half - 0.1, -0.93 * w, 0.93 * w),
            (2.45, height),
            white if rng.random() < 0.5 else paint,
        ),
        block((half - 0.02, half), (-0.9 * w, 0.9 * w), (1.0, 2.42), glass),
        block((half - 0.03, half), (-0.6 * w, 0.6 * w), (2.5, 2.75), sign),
        block((-half, half), (-0.96 * w, 0.96 * w), (0.22, 0.34), dark),
        block((half - 1.6, half - 0.5), (-w - 0.004, -w + 0.02), (0.4, 2.4), glass),
        _wheels(palette, [half - 2.6, -half + 3.1], w, 0.48, 0.3),
        _lamps(palette, length, width, 0.75, 0.2),
    ]
    return concatenate(parts)


def construction_vehicle(rng: np.random.Generator, palette: Palette) -> Mesh:
    """An excavator with a bent arm, or a wheel loader with a raised bucket."""
    paint = palette.plain(varied(rng, (0.70, 0.40, 0.02), 0.15), 0.1, 35)
    dark, glass, rubber = palette.plain((0.05, 0.05, 0.05)), _glass(palette), _rubber(palette)
    if rng.random() < 0.55:
        length = 6.8
        h = length / 2
        parts = [
            *(
                prism(
                    [(-h, 0.35), (-h + 0.3, 0), (-h + 3.2, 0), (-h + 3.5, 0.35), (-h + 3.2, 0.75), (-h + 0.3, 0.75)],
                    tuple(sorted((s * 1.25, s * 0.75))),
                    rubber,
                )
                for s in (-1, 1)
            ),
            block((-h, -h + 3.3), (-1.2, 1.2), (0.85, 1.9), paint),
            block((-h + 1.9, -h + 3.4), (0.1, 1.15), (1.0, 2.95), glass),
            block((-h + 1.85, -h + 3.45), (0.05, 1.2), (2.9, 3.0), paint),
            block((-h - 0.03, -h + 0.7), (-1.1, 1.1), (1.3, 2.05), dark),
            hull(
                [
                    (x, y, z)
                    for y in (-0.55, -0.2)
                    for x, z in ((-h + 3.0, 1.3), (-h + 3.3, 1.2), (-h + 4.6, 3.1), (-h + 4.9, 2.8))
                ],
                paint,
            ),
            hull(
                [
                    (x, y, z)
                    for y in (-0.5, -0.25)
                    for x, z in ((-h + 4.6, 3.1), (-h + 4.4, 2.85), (h - 0.75, 0.9), (h - 0.5, 1.0))
                ],
                paint,
            ),
            hull(
                [
                    (x, y, z)
                    for y in (-0.9, 0.15)
                    for x, z in ((h - 0.9, 1.05), (h, 0.9), (h - 0.3, 0.15), (h - 1.1, 0.3))
                ],
                dark,
            ),
        ]
    else:
        length = 7.2
        h = length / 2
        parts = [
            block((-h, -0.2), (-0.95, 0.95), (0.9, 2.0), paint),
            frustum((-1.3, 0.3, -0.75, 0.75), (-1.15, 0.1, -0.7, 0.7), (1.9, 3.1), glass),
            block((-1.3, 0.25), (-0.8, 0.8), (3.1, 3.2), paint),
            block((-0.2, 1.6), (-0.7, 0.7), (0.7, 1.4), paint),
            *(
                hull(
                    [
                        (x, s * y, z)
                        for y in (0.5, 0.7)
                        for x, z in ((0.3, 1.5), (0.6, 1.9), (h - 0.9, 0.7), (h - 1.1, 0.4))
                    ],
                    paint,
                )
                for s in (-1, 1)
            ),
            hull(
                [
                    (x, y, z)
                    for y in (-1.3, 1.3)
                    for x, z in ((h - 1.1, 0.2), (h, 0.1), (h - 0.95, 1.1), (h - 1.2, 1.0))
                ],
                dark,
            ),
            _wheels(palette, [-h + 1.3, h - 2.2], 1.25, 0.75, 0.55),
        ]
    return concatenate(parts)


def rider(rng: np.random.Generator, palette: Palette, seat: float, reach: float, lean: float) -> list[Mesh]:
    """A seated human figure above a two-wheeler; its hips are at x = -0.2, its hands at x = reach."""
    shirt = palette.plain(varied(rng, (rng.uniform(0.05, 0.6), rng.uniform(0.05, 0.5), rng.uniform(0.05, 0.5))))
    trousers, skin = palette.plain(varied(rng, (0.05, 0.06, 0.1), 0.5)), palette.plain((0.42, 0.26, 0.18))
    helmet = palette.plain(varied(rng, (0.3, 0.3, 0.32), 0.9), 0.3)
    shoulder = np.array([-0.2 + lean, 0, seat + 0.55])
    parts = [
        hull([(-0.33, y, seat) for y in (-0.16, 0.16)] + [(-0.07, y, seat) for y in (-0.16, 0.16)]
             + [tuple(shoulder + np.array([dx, y, 0])) for dx in (-0.11, 0.1) for y in (-0.2, 0.2)], shirt),
        ellipsoid(shoulder + np.array([0.06, 0, 0.22]), (0.11, 0.1, 0.14), skin, 1),
        ellipsoid(shoulder + np.array([0.04, 0, 0.27]), (0.14, 0.12, 0.11), helmet, 1),
    ]  # fmt: skip
    for side in (-1, 1):
        parts.append(
            cylinder(
                shoulder + np.array([0.02, side * 0.2, -0.05]), (reach, side * 0.24, seat + 0.14), 0.05, shirt, sides=6
            )
        )
        parts.append(cylinder((-0.16, side * 0.11, seat), (0.2, side * 0.14, seat - 0.3), 0.08, trousers, 0.06, 6))
        parts.append(
            cylinder(
                (0.2, side * 0.14, seat - 0.3), (0.05, side * 0.13, max(0.22, seat - 0.72)), 0.06, trousers, 0.05, 6
            )
        )
    return parts


def bicycle(rng: np.random.Generator, palette: Palette, ridden: bool) -> Mesh:
    """A bicycle, with its rider or left standing."""
    frame, rubber = palette.plain(varied(rng, (0.3, 0.1, 0.1), 0.8), 0.2), _rubber(palette)
    axles = (-0.52, 0.52)
    parts = [_ring((x, 0, 0.34), 0.34, 0.028, rubber) for x in axles]
    for a, b in (((-0.52, 0.34), (-0.05, 0.3)), ((-0.05, 0.3), (-0.2, 0.85)), ((-0.2, 0.78), (0.36, 0.82)), ((-0.05, 0.3), (0.38, 0.75)),
                 ((0.52, 0.34), (0.36, 1.0)), ((-0.52, 0.34), (-0.18, 0.78))):  # fmt: skip
        parts.append(cylinder((a[0], 0, a[1]), (b[0], 0, b[1]), 0.025, frame, sides=5))
    parts.append(cylinder((0.34, -0.27, 1.02), (0.34, 0.27, 1.02), 0.02, rubber, sides=5))
    parts.append(ellipsoid((-0.22, 0, 0.9), (0.14, 0.08, 0.05), rubber, 1))
    if ridden:
        parts.extend(rider(rng, palette, 0.93, 0.34, 0.28))
    return concatenate(parts)


def motorcycle(rng: np.random.Generator, palette: Palette, ridden: bool) -> Mesh:
    """A motorcycle or scooter, with its rider or parked."""
    paint, rubber, metal = _paint(rng, palette, CAR_PAINTS), _rubber(palette), palette.plain((0.2, 0.2, 0.21), 0.4)
    parts = [cylinder((x, -0.07, 0.31), (x, 0.07, 0.31), 0.31, rubber, sides=14) for x in (-0.72, 0.72)]
    parts += [
        hull(
            [(x, y, z) for y in (-0.16, 0.16) for x, z in ((-0.45, 0.3), (0.35, 0.3), (0.4, 0.7), (-0.4, 0.65))], metal
        ),
        hull(
            [(x, y, z) for y in (-0.15, 0.15) for x, z in ((-0.1, 0.7), (0.42, 0.68), (0.36, 0.98), (0.0, 0.95))], paint
        ),
        hull(
            [(x, y, z) for y in (-0.13, 0.13) for x, z in ((-0.95, 0.75), (-0.05, 0.7), (-0.05, 0.83), (-0.98, 0.9))],
            rubber,
        ),
        hull([(x, y, z) for y in (-0.14, 0.14) for x, z in ((0.5, 0.75), (0.72, 0.85), (0.6, 1.2), (0.5, 1.1))], paint),
        cylinder((0.72, 0, 0.31), (0.48, 0, 1.05), 0.05, metal, sides=6),
        cylinder((0.45, -0.36, 1.06), (0.45, 0.36, 1.06), 0.025, rubber, sides=5),
        block((-1.03, -0.95), (-0.08, 0.08), (0.7, 0.8), palette.plain((0.5, 0.02, 0.02), 0.3, 120)),
    ]
    if ridden:
        parts.extend(rider(rng, palette, 0.84, 0.42, 0.16))
    return concatenate(parts)


def _ring(centre: tuple[float, float, float], radius: float, thickness: float, material: int, sides: int = 14) -> Mesh:
    """A wheel seen from the side: a polygon of bars in the x-z plane."""
    angle = 2 * np.pi * np.arange(sides) / sides
    points = np.array(centre) + (radius - thickness) * np.column_stack([np.cos(angle), np.zeros(sides), np.sin(angle)])
    return concatenate(cylinder(points[i], points[(i + 1) % sides], thickness, material, sides=4) for i in range(sides))
