# SPDX-License-Identifier: Apache-2.0
"""Materials: how a surface looks to a camera and how strongly it returns a laser pulse, one table row each."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class Material:
    """One look. Lengths are metres on the surface; colours are linear reflectance 0..1.

    Attributes:
        rgb: main colour.
        grain, grain_m: strength and wavelength of fine noise.
        stain, stain_m: strength and wavelength of coarse noise.
        cell_m, cell_fill: period (u, v) and filled part (u, v) of a lattice of patches (windows, stripes, tiles);
            a period of 0 means one patch without end in that direction.
        cell_rgb, cell_jitter, cell_gloss: the patches' colour, how much it varies from patch to patch, how they mirror.
        cell_from_m: height (v) below which no patch appears.
        course_m, course_gap_m, course_dark: bricks or slabs: period (u, v), joint width, how dark joints are; odd
            courses are shifted by half a brick.
        gloss: how much of the sky the surface mirrors at right angles (rises towards grazing view).
        soft: light that passes through (leaves): lit from behind as well.
        echo: LiDAR intensity at right angles, 0..255.
    """

    rgb: Rgb
    grain: float = 0.0
    grain_m: float = 0.05
    stain: float = 0.0
    stain_m: float = 2.0
    cell_m: tuple[float, float] = (0.0, 0.0)
    cell_fill: tuple[float, float] = (0.0, 0.0)
    cell_rgb: Rgb = (0.0, 0.0, 0.0)
    cell_jitter: float = 0.0
    cell_gloss: float = 0.0
    cell_from_m: float = -1e3
    course_m: tuple[float, float] = (0.0, 0.0)
    course_gap_m: float = 0.0
    course_dark: float = 0.0
    gloss: float = 0.0
    soft: float = 0.0
    echo: float = 20.0


class Palette:
    """The materials of one world; a material's row number is what triangles carry."""

    def __init__(self) -> None:
        self._rows: list[Material] = []
        self._index: dict[Material, int] = {}

    def add(self, material: Material) -> int:
        """The material's row (the same for equal materials)."""
        if material not in self._index:
            self._index[material] = len(self._rows)
            self._rows.append(material)
        return self._index[material]

    def plain(self, rgb: Rgb, gloss: float = 0.0, echo: float = 20.0) -> int:
        """A uniform surface with a little dirt."""
        return self.add(Material(tuple(rgb), stain=0.08, stain_m=0.6, gloss=gloss, echo=echo))

    def columns(self) -> dict[str, np.ndarray]:
        """Every attribute as a float32 array [rows] or [rows, k]."""
        names = list(Material.__dataclass_fields__)
        values = [astuple(m) for m in self._rows]
        return {name: np.array([v[i] for v in values], dtype=np.float32) for i, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self._rows)


def varied(rng: np.random.Generator, rgb: Rgb, amount: float = 0.12) -> Rgb:
    """A colour near the given one, rounded so that equal looks share a row."""
    brightness = 1 + amount * rng.uniform(-1, 1)
    tint = 1 + 0.4 * amount * rng.uniform(-1, 1, 3)
    return tuple(np.round(np.clip(np.array(rgb) * brightness * tint, 0, 1), 3).tolist())
