# SPDX-License-Identifier: Apache-2.0
"""The ground: carriageway with paint, patches and manholes, kerbs, pavements, grass and islands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from shapely import contains_xy, prepare, segmentize
from shapely.geometry import LineString, MultiPolygon, Point, Polygon
from shapely.ops import unary_union

from training.data.minicity.mesh import concatenate, flat, strip
from training.data.minicity.palette import Material, varied
from training.data.minicity.site import KERB_M, LAWN_M, OTHER_FLAT, ROAD, SIDEWALK, TERRAIN, Site

_KERB_STONE_M = 0.16


def lay_ground(site: Site) -> None:
    """Put all level surfaces and kerbs of the plan down."""
    rng, add, plan = site.rng, site.palette.add, site.plan
    dark = rng.uniform(0.055, 0.12)
    asphalt = add(
        Material(
            varied(rng, (dark, dark, 1.03 * dark), 0.08), grain=0.30, grain_m=0.035, stain=0.16, stain_m=3.5, echo=8
        )
    )
    patch = add(
        Material(
            varied(rng, (0.7 * dark, 0.7 * dark, 0.7 * dark), 0.1),
            grain=0.3,
            grain_m=0.035,
            stain=0.1,
            stain_m=2.0,
            echo=7,
        )
    )
    iron = add(
        Material((0.05, 0.05, 0.05), course_m=(0.09, 0.09), course_gap_m=0.02, course_dark=0.5, gloss=0.1, echo=25)
    )
    stone = add(
        Material(
            varied(rng, (0.40, 0.39, 0.37), 0.15),
            grain=0.2,
            grain_m=0.03,
            stain=0.15,
            stain_m=1.0,
            course_m=(1.0, 9.0),
            course_gap_m=0.015,
            course_dark=0.4,
            echo=28,
        )
    )
    paving = add(
        [
            Material(
                varied(rng, (0.33, 0.32, 0.30), 0.2),
                grain=0.15,
                grain_m=0.04,
                stain=0.18,
                stain_m=1.5,
                course_m=(0.6, 0.6),
                course_gap_m=0.014,
                course_dark=0.35,
                echo=22,
            ),
            Material(
                varied(rng, (0.38, 0.37, 0.35), 0.15),
                grain=0.15,
                grain_m=0.05,
                stain=0.15,
                stain_m=2.5,
                course_m=(1.8, 1.8),
                course_gap_m=0.02,
                course_dark=0.35,
                echo=24,
            ),
            Material(
                varied(rng, (0.30, 0.17, 0.13), 0.15),
                grain=0.15,
                grain_m=0.04,
                stain=0.2,
                stain_m=1.2,
                course_m=(0.22, 0.11),
                course_gap_m=0.01,
                course_dark=0.3,
                echo=22,
            ),
        ][rng.integers(3)]
    )
    grass = add(
        Material(
            varied(rng, [(0.10, 0.15, 0.035), (0.15, 0.16, 0.06), (0.07, 0.12, 0.03)][rng.integers(3)], 0.15),
            grain=0.45,
            grain_m=0.07,
            stain=0.16,
            stain_m=1.1,
            echo=18,
        )
    )
    setts = add(
        Material(
            varied(rng, (0.24, 0.23, 0.22), 0.2),
            grain=0.3,
            grain_m=0.03,
            course_m=(0.16, 0.16),
            course_gap_m=0.02,
            course_dark=0.5,
            echo=20,
        )
    )
    white, yellow = (
        add(Material(c, grain=0.25, grain_m=0.05, stain=0.25, stain_m=0.7, echo=95))
        for c in ((0.62, 0.62, 0.60), (0.55, 0.36, 0.05))
    )

    def lay(shape: Polygon | MultiPolygon, z: float, material: int, category: int) -> None:
        site.ground.append(flat(shape, z, material).labelled(category))

    lay(plan.road, 0.0, asphalt, ROAD)
    lay(_patches(site), 0.003, patch, ROAD)
    lay(_manholes(site), 0.005, iron, ROAD)
    lay(plan.paint["white"], 0.007, white, ROAD)
    lay(plan.paint["yellow"], 0.007, yellow, ROAD)
    lay(plan.sidewalk, KERB_M, paving, SIDEWALK)
    lay(plan.verge, LAWN_M, grass, TERRAIN)
    lay(plan.terrain, LAWN_M, grass, TERRAIN)
    lay(plan.islands, KERB_M, setts, OTHER_FLAT)
    _kerbs(site, stone)


def _kerbs(site: Site, stone: int) -> None:
    """Kerb stones: each counts as the surface that it borders."""
    plan = site.plan
    islands = unary_union(plan.islands)
    carriageway = unary_union([plan.road, plan.islands])
    tops = _polygons(carriageway.buffer(_KERB_STONE_M, quad_segs=4).difference(carriageway))
    top = flat(tops, KERB_M + 0.003, stone)
    rings = [
        np.array(segmentize(ring, 1.0).coords)
        for p in getattr(carriageway, "geoms", [carriageway])
        for ring in (p.exterior, *p.interiors)
    ]
    face = concatenate(strip(ring, (0.0, KERB_M + 0.003), stone) for ring in rings)
    green = unary_union([plan.verge, plan.terrain]).buffer(0.05)
    prepare(green)
    for part in (top, face):
        x, y = part.corners[..., :2].mean(axis=1).T
        site.ground.append(
            replace(part, category=np.where(contains_xy(green, x, y), TERRAIN, SIDEWALK).astype(np.uint8))
        )
    site.ground.append(
        flat(islands.difference(islands.buffer(-_KERB_STONE_M)), KERB_M + 0.003, stone).labelled(OTHER_FLAT)
    )
    for island in plan.islands.geoms:
        ring = np.array(segmentize(island.exterior, 1.0).coords)
        site.ground.append(strip(ring, (0.0, KERB_M + 0.003), stone).labelled(OTHER_FLAT))


def _patches(site: Site) -> MultiPolygon:
    """Mended pieces of carriageway."""
    main, shapes = site.plan.main, []
    for _ in range(int(main.axis.length_m / 28)):
        position, heading = main.axis.offset(site.rng.uniform(-1, 1) * (main.half_m - 1.5)).at(
            site.rng.uniform(0, main.axis.length_m)
        )
        forward = np.array([np.cos(heading), np.sin(heading)]) * site.rng.uniform(0.6, 6)
        shapes.append(
            LineString([position - forward, position + forward]).buffer(site.rng.uniform(0.3, 0.9), cap_style="flat")
        )
    return _polygons(unary_union(shapes).intersection(site.plan.road))


def _manholes(site: Site) -> MultiPolygon:
    main = site.plan.main
    at = [
        main.axis.offset(site.rng.uniform(-1, 1) * (main.half_m - 1)).at(s)[0]
        for s in np.arange(10, main.axis.length_m, 24)
    ]
    return _polygons(unary_union([Point(p).buffer(0.33, quad_segs=4) for p in at]).intersection(site.plan.road))


def _polygons(shape) -> MultiPolygon:
    return MultiPolygon([p for p in getattr(shape, "geoms", [shape]) if p.geom_type == "Polygon" and p.area > 1e-3])
