# SPDX-License-Identifier: Apache-2.0
"""Buildings: walls with windows, ground floors, cornices and roofs, on a rectangle whose front looks along -y."""

from __future__ import annotations

import numpy as np

from training.data.minicity.mesh import Mesh, block, concatenate, frustum, prism
from training.data.minicity.palette import Material, Palette, varied

_GLASS = [(0.03, 0.04, 0.05), (0.05, 0.07, 0.08), (0.02, 0.025, 0.03)]


def building(rng: np.random.Generator, palette: Palette, width_m: float, depth_m: float) -> Mesh:
    """A house, a block of flats, an office tower or a hall; x in +-width/2, y from 0 (front) to depth."""
    style = str(rng.choice(["brick", "plaster", "office", "hall", "house"], p=[0.32, 0.26, 0.22, 0.08, 0.12]))
    if style == "office":
        return _office(rng, palette, width_m, depth_m)
    if style == "hall":
        return _hall(rng, palette, width_m, depth_m)
    return _flats(rng, palette, width_m, depth_m, brick=style == "brick", house=style == "house")


def skyline_block(rng: np.random.Generator, palette: Palette, width_m: float, height_m: float) -> Mesh:
    """A distant tower."""
    material = _facade(
        rng, palette, varied(rng, (0.32, 0.32, 0.33), 0.4), (rng.uniform(2.5, 5), 3.4), (0.6, 0.55), None
    )
    return block((-width_m / 2, width_m / 2), (-width_m / 2, width_m / 2), (0, height_m), material)


def _facade(
    rng: np.random.Generator,
    palette: Palette,
    rgb: tuple,
    cell_m: tuple,
    fill: tuple,
    brick: bool | None,
    from_m: float = 0.3,
) -> int:
    """A wall with rows of windows; ``brick`` True: courses of brick, False: plaster, None: large slabs."""
    course = {True: ((0.25, 0.08), 0.012, 0.3), False: ((0.0, 0.0), 0.0, 0.0), None: ((1.5, 1.7), 0.02, 0.3)}[brick]
    return palette.add(
        Material(
            rgb, grain=0.10, grain_m=0.04, stain=0.06, stain_m=2.5,
            cell_m=tuple(round(float(v), 3) for v in cell_m), cell_fill=fill, cell_rgb=_GLASS[rng.integers(3)], cell_jitter=0.7,
            cell_gloss=0.35, cell_from_m=from_m, course_m=course[0], course_gap_m=course[1], course_dark=course[2], echo=35,
        )
    )  # fmt: skip


def _flats(
    rng: np.random.Generator, palette: Palette, width_m: float, depth_m: float, brick: bool, house: bool
) -> Mesh:
    rgb = (
        [(0.33, 0.15, 0.10), (0.42, 0.27, 0.18), (0.25, 0.12, 0.09), (0.38, 0.33, 0.27)]
        if brick
        else [(0.58, 0.53, 0.44), (0.48, 0.50, 0.50), (0.55, 0.42, 0.30), (0.62, 0.60, 0.56), (0.40, 0.46, 0.42)]
    )
    rgb = varied(rng, rgb[rng.integers(len(rgb))], 0.15)
    floor_m = float(rng.uniform(3.0, 3.5))
    floors = int(rng.integers(2, 4)) if house else int(rng.integers(3, 9))
    base_m = 0.3 if house else float(rng.uniform(3.6, 4.4))
    height = base_m + floors * floor_m
    bays = max(2, round(width_m / rng.uniform(2.4, 3.4)))
    bay_m = width_m / bays
    trim = palette.plain(varied(rng, (0.55, 0.53, 0.48), 0.2))
    plain = palette.add(
        Material(
            rgb,
            grain=0.1,
            grain_m=0.04,
            stain=0.06,
            stain_m=2.5,
            course_m=(0.25, 0.08) if brick else (0, 0),
            course_gap_m=0.012 if brick else 0.0,
            course_dark=0.3 if brick else 0.0,
            echo=35,
        )
    )
    half = width_m / 2
    parts = [block((-half, half), (0, depth_m), (0, height), plain)]
    # Front windows are real panes with sills, set a little proud of the wall so that rays see them.
    glass = palette.add(
        Material(
            _GLASS[rng.integers(3)],
            cell_m=(bay_m * 0.48, 1.6),
            cell_fill=(0.08, 0.05),
            cell_rgb=(0.5, 0.5, 0.48),
            gloss=0.4,
            echo=8,
        )
    )
    blind = palette.add(
        Material((0.35, 0.33, 0.30), course_m=(9, 0.12), course_gap_m=0.02, course_dark=0.3, gloss=0.2, echo=12)
    )
    win_h = floor_m * rng.uniform(0.45, 0.6)
    for i in range(bays):
        x = -half + (i + 0.5) * bay_m
        for k in range(floors):
            z = base_m + k * floor_m + 0.85
            w = bay_m * 0.25
            pane = glass if rng.random() < 0.8 else blind
            parts.append(block((x - w, x + w), (-0.02, 0.3), (z, z + win_h), pane))
            parts.append(block((x - w - 0.1, x + w + 0.1), (-0.13, 0.02), (z - 0.12, z), trim))
            parts.append(block((x - w - 0.06, x + w + 0.06), (-0.06, 0.02), (z + win_h, z + win_h + 0.16), trim))
    side = _facade(rng, palette, rgb, (bay_m, floor_m), (0.34, 0.42), brick or False, base_m)
    parts += [
        block((s * half - 0.015, s * half + 0.015), (0.3, depth_m - 0.3), (base_m, height - 0.4), side) for s in (-1, 1)
    ]
    if not house:
        parts.append(_shopfront(rng, palette, width_m, base_m))
    parts.append(
        block((-half - 0.15, half + 0.15), (-0.2, depth_m + 0.1), (base_m - 0.18, base_m), trim)
        if not house
        else _door(rng, palette)
    )
    if house or rng.random() < 0.25:
        tiles = palette.add(
            Material(
                varied(rng, (0.20, 0.09, 0.06), 0.4),
                stain=0.2,
                stain_m=1.0,
                course_m=(0.3, 0.35),
                course_gap_m=0.03,
                course_dark=0.4,
            )
        )
        ridge = height + 0.35 * depth_m * rng.uniform(0.7, 1.1)
        roof = prism([(-0.5, height), (depth_m + 0.5, height), (depth_m / 2, ridge)], (-half - 0.3, half + 0.3), tiles)
        parts.append(roof.moved(yaw=np.pi / 2))
    else:
        parts.append(block((-half - 0.25, half + 0.25), (-0.3, depth_m + 0.2), (height, height + 0.35), trim))
        parts.append(block((-half - 0.05, half + 0.05), (-0.05, depth_m), (height + 0.35, height + 0.9), plain))
    if rng.random() < 0.4 and floors > 2:
        parts.append(_balconies(rng, palette, half, bay_m, bays, base_m, floor_m, floors))
    return concatenate(parts)


def _door(rng: np.random.Generator, palette: Palette) -> Mesh:
    leaf, step = palette.plain(varied(rng, (0.15, 0.08, 0.05), 0.8), 0.1), palette.plain((0.4, 0.4, 0.38))
    return concatenate(
        [block((-0.55, 0.55), (-0.03, 0.2), (0.1, 2.3), leaf), block((-0.8, 0.8), (-0.7, 0.0), (0, 0.12), step)]
    )


def _shopfront(rng: np.random.Generator, palette: Palette, width_m: float, base_m: float) -> Mesh:
    half, shops = width_m / 2, max(1, round(width_m / 7))
    span = width_m / shops
    pier = palette.plain(varied(rng, (0.30, 0.29, 0.27), 0.4))
    parts = []
    for i in range(shops):
        x = -half + (i + 0.5) * span
        glass = palette.add(
            Material(
                varied(rng, (0.06, 0.07, 0.07), 0.8),
                cell_m=(1.7, 0),
                cell_fill=(0.05, 1),
                cell_rgb=(0.15, 0.15, 0.15),
                stain=0.5,
                stain_m=0.8,
                gloss=0.4,
                echo=9,
            )
        )
        board = palette.plain(
            varied(
                rng,
                [(0.35, 0.05, 0.04), (0.05, 0.12, 0.3), (0.05, 0.2, 0.1), (0.5, 0.45, 0.35), (0.06, 0.06, 0.06)][
                    rng.integers(5)
                ],
                0.2,
            )
        )
        parts.append(block((x - span / 2 + 0.35, x + span / 2 - 0.35), (-0.02, 0.1), (0.35, 2.75), glass))
        parts.append(block((x - span / 2 + 0.2, x + span / 2 - 0.2), (-0.12, 0.05), (2.85, 3.4), board))
        parts.append(block((x - 0.55, x + 0.55), (-0.04, 0.1), (0.02, 2.3), board))
        if rng.random() < 0.45:
            awning = palette.add(
                Material(
                    varied(rng, (0.5, 0.1, 0.08), 0.8), cell_m=(0.6, 0), cell_fill=(0.5, 1), cell_rgb=(0.65, 0.62, 0.55)
                )
            )
            parts.append(
                prism(
                    [(-1.3, 2.45), (0, 2.85), (0, 2.8), (-1.3, 2.4)], (-x - span * 0.4, -x + span * 0.4), awning
                ).moved(yaw=np.pi / 2)
            )
    parts += [
        block((x - 0.2, x + 0.2), (-0.08, 0.1), (0, base_m - 0.15), pier)
        for x in np.linspace(-half + 0.2, half - 0.2, shops + 1)
    ]
    return concatenate(parts)


def _balconies(
    rng: np.random.Generator,
    palette: Palette,
    half: float,
    bay_m: float,
    bays: int,
    base_m: float,
    floor_m: float,
    floors: int,
) -> Mesh:
    slab, rail = (
        palette.plain((0.5, 0.49, 0.46)),
        palette.add(Material((0.07, 0.07, 0.07), cell_m=(0.14, 0), cell_fill=(0.5, 1), cell_rgb=(0.3, 0.28, 0.25))),
    )
    parts = []
    for i in range(int(rng.integers(2)), bays, int(rng.integers(2, 4))):
        x = -half + (i + 0.5) * bay_m
        for k in range(1, floors):
            z = base_m + k * floor_m
            parts.append(block((x - 0.44 * bay_m, x + 0.44 * bay_m), (-1.1, 0.0), (z - 0.1, z + 0.08), slab))
            parts.append(block((x - 0.44 * bay_m, x + 0.44 * bay_m), (-1.1, -1.06), (z + 0.08, z + 1.05), rail))
    return concatenate(parts)


def _office(rng: np.random.Generator, palette: Palette, width_m: float, depth_m: float) -> Mesh:
    floors, floor_m = int(rng.integers(5, 14)), 3.7
    height, half = 4.5 + floors * floor_m, width_m / 2
    rgb = varied(rng, [(0.42, 0.43, 0.44), (0.20, 0.24, 0.27), (0.52, 0.50, 0.46)][rng.integers(3)], 0.15)
    fill = (0.88, 0.86) if rng.random() < 0.4 else (1.0, 0.52) if rng.random() < 0.5 else (0.6, 0.62)
    wall = _facade(rng, palette, rgb, (rng.choice([1.5, 2.0, 3.0]), floor_m), fill, None, 4.5)
    lobby = palette.add(
        Material(
            (0.05, 0.06, 0.065), cell_m=(1.5, 0), cell_fill=(0.05, 1), cell_rgb=(0.3, 0.3, 0.3), gloss=0.45, echo=10
        )
    )
    stone = palette.add(
        Material(
            varied(rng, (0.36, 0.35, 0.33), 0.2),
            grain=0.1,
            grain_m=0.03,
            course_m=(1.2, 0.6),
            course_gap_m=0.015,
            course_dark=0.35,
        )
    )
    parts = [
        block((-half, half), (0, depth_m), (4.5, height), wall),
        block((-half + 0.6, half - 0.6), (0.5, depth_m - 0.5), (0, 4.5), lobby),
        block((-half - 0.1, half + 0.1), (-0.15, depth_m), (4.2, 4.75), stone),
        block((-half, half), (-0.05, depth_m), (height, height + 0.9), stone),
    ]
    columns = max(2, round(width_m / 5))
    parts += [
        block((x - 0.3, x + 0.3), (0, 0.6), (0, 4.3), stone) for x in np.linspace(-half + 0.3, half - 0.3, columns + 1)
    ]
    if rng.random() < 0.5:
        parts += [
            block((x - 0.1, x + 0.1), (-0.25, 0), (4.5, height), stone)
            for x in np.linspace(-half + 0.1, half - 0.1, 2 * columns + 1)
        ]
    return concatenate(parts)


def _hall(rng: np.random.Generator, palette: Palette, width_m: float, depth_m: float) -> Mesh:
    height, half = float(rng.uniform(5.5, 8.0)), width_m / 2
    sheet = palette.add(
        Material(
            varied(rng, (0.38, 0.40, 0.42), 0.3),
            stain=0.15,
            stain_m=3.0,
            course_m=(0.3, 30.0),
            course_gap_m=0.05,
            course_dark=0.3,
            echo=45,
        )
    )
    gate = palette.add(
        Material(varied(rng, (0.3, 0.12, 0.08), 0.6), course_m=(30.0, 0.4), course_gap_m=0.04, course_dark=0.4)
    )
    board = palette.plain(varied(rng, (0.1, 0.2, 0.45), 0.8))
    parts = [
        frustum(
            (-half, half, 0, depth_m), (-half, half, 0, depth_m), (0, height), sheet, palette.plain((0.2, 0.2, 0.2))
        )
    ]
    for x in np.arange(-half + 3, half - 2, 7.0):
        parts.append(block((x - 1.7, x + 1.7), (-0.04, 0.1), (0.05, 3.6), gate))
    parts.append(block((-half * 0.4, half * 0.4), (-0.1, 0.05), (height - 1.7, height - 0.6), board))
    return concatenate(parts)
