# SPDX-License-Identifier: Apache-2.0
"""Meshes of a frame's field: MISE against evaluating the whole lattice, in evaluations, time and surface.

Both march over the same field, of the demo model on a keyframe of the demo drive, at the same resolution. The reference is
what anyone would write first: every lattice point, and scikit-image's marching cubes over all of them. The limit: dense work
grows eightfold with each halving of the cells, the surface's own cells fourfold.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from benchmarks.report import Figure, publish
from occflownet_core.command_line import exit_status
from occflownet_core.grid import VoxelGrid
from occflownet_core.mesh import march
from occflownet_core.mise import SurfaceCells, levels_to, surface_cells
from occflownet_core.query import POINTS_AT_A_TIME, batches
from occflownet_core.runtime.bundle import Bundle, load_bundle
from occflownet_core.runtime.drive import predictions
from occflownet_core.runtime.factory import create_engine
from occflownet_core.runtime.field_query import FieldQuery, FrameField
from occflownet_ros.engine_inputs import bag_inputs
from occflownet_ros.share import share_path

FEWER_EVALUATIONS = 10.0
FASTER = 5.0


@dataclass(frozen=True)
class Clock:
    """How long something took, on the wall and on the processor."""

    wall_s: float
    cpu_s: float


class Stopwatch:
    """``with Stopwatch() as watch: ...; watch.clock``."""

    def __enter__(self) -> Stopwatch:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.clock = Clock(time.perf_counter() - self._began[0], time.process_time() - self._began[1])


def demo_field(bag: Path, bundle: Bundle, frame: int, threads: int) -> FrameField:
    """The field of a drive's keyframe, with the memory of those before it."""
    engine = create_engine(bundle, "onnxruntime", threads)
    engine.keep_field = True
    *_, (_, prediction) = predictions(engine, bag_inputs(bag, bundle, most=frame + 1))
    return FieldQuery(bundle, threads).field(prediction.field_features)


def dense_lattice(field: FrameField, grid: VoxelGrid, console: Console) -> np.ndarray:
    """The field at every corner of a grid's cells, float32 [X + 1, Y + 1, Z + 1]."""
    shape = tuple(n + 1 for n in grid.shape)
    values = np.empty(math.prod(shape), dtype=np.float32)
    last_m = np.nextafter(np.float32(grid.upper_m), np.float32(-np.inf))
    parts = list(batches(values.size, POINTS_AT_A_TIME))
    for part in track(parts, "every lattice point", console=console, transient=True):
        nodes = np.stack(np.unravel_index(np.arange(part.start, part.stop), shape), axis=-1)
        values[part] = field.probability(np.minimum(grid.metric_from_index(nodes).astype(np.float32), last_m))
    return values.reshape(shape)


def dense_vertices(values: np.ndarray, threshold: float) -> np.ndarray:
    """Vertices [V, 3], in cells, of scikit-image's marching cubes over the log odds of a whole lattice."""
    bounded = np.clip(values, 1e-6, 1 - 1e-6)
    log_odds = np.log(bounded / (1 - bounded)) - math.log(threshold / (1 - threshold))
    vertices, _, _, _ = marching_cubes(log_odds, 0.0, method="lorensen")
    return vertices


def missed_cells(values: np.ndarray, threshold: float, found: SurfaceCells) -> tuple[int, np.ndarray]:
    """How many cells of the whole lattice are cut; and those of them [n, 3] that were not found."""
    occupied = values > np.float32(threshold)
    low, high = occupied, occupied
    for axis in range(3):
        size = low.shape[axis]
        near, far = np.arange(size - 1), np.arange(1, size)
        low = np.take(low, near, axis) & np.take(low, far, axis)
        high = np.take(high, near, axis) | np.take(high, far, axis)
    cut = high & ~low
    total = int(cut.sum())
    cut[tuple(found.cells.T)] = False
    return total, np.argwhere(cut)


def hausdorff_m(ours_m: np.ndarray, theirs: np.ndarray, missed: np.ndarray, grid: VoxelGrid) -> float:
    """Largest distance from a vertex of either mesh to the other, outside of the cells that were missed.

    Args:
        ours_m: [V, 3], metres.
        theirs: [W, 3], in cells.
        missed: [n, 3], cells.
        grid: of the cells.
    """
    is_missed = np.zeros(grid.shape, dtype=bool)
    is_missed[tuple(missed.T)] = True
    cell = np.minimum(theirs.astype(int), np.array(grid.shape) - 1)  # one of those around the vertex: all are, or none
    theirs_m = grid.metric_from_index(theirs)
    shared_m = theirs_m[~is_missed[tuple(cell.T)]]
    there, back = (
        cKDTree(b).query(a, distance_upper_bound=grid.voxel_size_m)[0].max(initial=0.0)
        for a, b in ((ours_m, theirs_m), (shared_m, ours_m))
    )
    return float(max(there, back))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.mesh", description=__doc__.splitlines()[0])
    parser.add_argument("--bag", type=Path, help="drive (default: the demo's)")
    parser.add_argument("--bundle", type=Path, help="model bundle (default: the demo model)")
    parser.add_argument("--frame", type=int, default=3, metavar="N", help="keyframe, from 0 (default: 3)")
    parser.add_argument("--resolution", type=float, default=0.1, metavar="M", help="finest cells (default: 0.1)")
    parser.add_argument("--threads", type=int, default=1, help="of the queries (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON (default: out/bench)")
    return exit_status("benchmarks.mesh", lambda: _run(parser.parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    console = Console()
    bundle = load_bundle(options.bundle or share_path("demo", "bundle"))
    field = demo_field(options.bag or share_path("demo", "bag"), bundle, options.frame, options.threads)
    coarse, threshold = bundle.lift.grid, bundle.occupancy_threshold
    levels = levels_to(coarse, options.resolution)
    evaluations = []
    for level in range(levels + 1):
        with console.status(f"MISE, level {level}"), Stopwatch() as ours:
            found = surface_cells(field.probability, coarse, threshold, level)
            vertices_m, _ = march(found, threshold)
        evaluations.append(found.evaluations)
    with Stopwatch() as dense:
        values = dense_lattice(field, found.grid, console)
        theirs = dense_vertices(values, threshold)
    cut, missed = missed_cells(values, threshold, found)
    finest = found.grid.voxel_size_m
    growth = math.log2((evaluations[-1] - evaluations[-2]) / (evaluations[-2] - evaluations[-3])) if levels > 1 else 0.0
    figures = [
        Figure("evaluations", found.evaluations, values.size, "", "the whole lattice"),
        Figure("fewer by", values.size / found.evaluations, FEWER_EVALUATIONS, "x", "at least", more_is_better=True),
        Figure("processor time", ours.clock.cpu_s, dense.clock.cpu_s, "s", "the whole lattice"),
        Figure("faster by", dense.clock.cpu_s / ours.clock.cpu_s, FASTER, "x", "at least", more_is_better=True),
        Figure("faster by, on the wall", dense.clock.wall_s / ours.clock.wall_s, FASTER, "x", "at least", True),
        Figure("evaluations grow with 1 / size to the power", growth, 3.0, "", "the whole lattice"),
        Figure(
            "Hausdorff", hausdorff_m(vertices_m, theirs, missed, found.grid), finest / 2, "m", "at most half a cell"
        ),
        Figure("cut cells missed", len(missed) / cut, 0.01, "of all", "at most"),
    ]
    details = {
        "finest_cells_m": finest,
        "threshold": threshold,
        "evaluations_by_level": evaluations,
        "vertices": len(vertices_m),
        "ours": vars(ours.clock),
        "dense": vars(dense.clock),
    }
    publish(f"mesh of a frame at {finest:g} m", figures, options.out / "mesh.json", details)


if __name__ == "__main__":
    sys.exit(main())
