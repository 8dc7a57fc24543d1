# SPDX-License-Identifier: Apache-2.0
"""``occflownet-query``: what a model knows about points of a recorded moment, or that moment's surface as a mesh."""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from occflownet_core.command_line import exit_status
from occflownet_core.errors import DatasetError, OccflownetError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import CLASS_NAMES, FREE
from occflownet_core.mesh import Mesh, extract_mesh, require_format, save_mesh
from occflownet_core.mise import levels_to
from occflownet_core.query import FieldSamples
from occflownet_core.runtime.bundle import Bundle, load_bundle
from occflownet_core.runtime.drive import EngineInput, predictions
from occflownet_core.runtime.factory import create_engine
from occflownet_core.runtime.field_query import FieldQuery, FrameField
from occflownet_ros.drive_arguments import add_drive, image_sets, require_one_kind

PROGRAM = "occflownet-query"
_STANDARD_INPUT = Path("-")
_AXES = ("x", "y", "z")

_HELP = """
points are metres in the ego frame (base_link: x forward, y left, z up), as CSV: x,y,z in each line, or any columns whose
names in the first line include x, y and z. The answer is CSV too, on standard output or in --out:
  x, y, z, inside (0 where the model's box ends), probability (of being occupied), label (0 to 17), class (its name)
and with --gradient gx, gy, gz: the slope of the probability in 1/m. A point counts as its likeliest class where the
probability is above the threshold, else as free.

examples:
  echo 12.5,0.3,0.8 | occflownet-query --bundle models/mine --bag scene-0061 --points -
  occflownet-query --bundle models/mine --bag scene-0061 --frame 7 --lattice 0.4 --out around.csv
  occflownet-query --bundle models/mine --dataroot /data/nuscenes --frame 3 --mesh scene.glb --resolution 0.1
"""

console = Console(stderr=True, highlight=False)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Ask a model about points of a recorded moment, anywhere between its voxels, or write that moment's "
        "surface as a mesh. Runs from a bundle, without PyTorch.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--bundle", type=Path, required=True, metavar="DIR", help="model bundle, exported with its field"
    )
    add_drive(parser)
    parser.add_argument(
        "--frame", default="0", metavar="N", help="image set: its place from 0, or its token (default: 0)"
    )
    parser.add_argument("--points", type=Path, metavar="FILE", help="CSV file of points, - for standard input")
    parser.add_argument(
        "--lattice", type=float, metavar="M", help="ask at the centres of cells of this size in the box"
    )
    parser.add_argument("--gradient", action="store_true", help="add the probability's gradient")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV file of the answers (default: standard output)")
    parser.add_argument("--mesh", type=Path, metavar="FILE", help="write the surface: *.glb, or *.ply in the ego frame")
    parser.add_argument(
        "--resolution", type=float, default=0.2, metavar="M", help="of the mesh, at most (default: 0.2)"
    )
    parser.add_argument("--closed", action="store_true", help="close the mesh where the box ends")
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="what is occupied is above (default: the bundle's)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    arguments = parser.parse_args(argv)
    require_one_kind(parser, arguments)
    if arguments.points and arguments.lattice:
        parser.error("--points and --lattice are two ways of naming points; give one of them")
    if not (arguments.points or arguments.lattice or arguments.mesh):
        parser.error("there is nothing to do; give --points FILE, --lattice M or --mesh FILE")
    return arguments


def query(arguments: argparse.Namespace) -> None:
    """Carry out the command.

    Raises:
        OccflownetError: with one sentence for the user.
    """
    bundle = load_bundle(arguments.bundle)
    threads = arguments.threads or len(os.sched_getaffinity(0))
    queries = FieldQuery(bundle, threads)
    threshold = bundle.occupancy_threshold if arguments.threshold is None else arguments.threshold
    points_m = _points(arguments, bundle)
    if arguments.mesh:
        require_format(arguments.mesh)
    levels = levels_to(bundle.lift.grid, arguments.resolution)
    name, features = _features(arguments, bundle, threads)
    field = queries.field(features)
    if points_m is not None:
        samples = field.samples(points_m, arguments.gradient)
        _write(points_m, samples, threshold, arguments.out)
        occupied = float((samples.probability > threshold).mean()) if len(points_m) else 0.0
        console.print(f"{name}: {len(points_m):,} points, {occupied:.1%} of them occupied")
    if arguments.mesh:
        _write_mesh(field, bundle, threshold, levels, arguments, name)


def read_points(lines: Iterable[str], name: str) -> np.ndarray:
    """Points [N, 3] of CSV lines; columns are found by the names x, y and z in the first line, else the first three count.

    Args:
        lines: of the file.
        name: of the file, for people.

    Raises:
        DatasetError: a line holds no three numbers, or there is none.
    """
    columns, points = (0, 1, 2), []
    for number, row in enumerate(csv.reader(lines), start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if not points and set(_AXES) <= set(cells):
            columns = tuple(cells.index(axis) for axis in _AXES)
            continue
        try:
            points.append([float(cells[column]) for column in columns])
        except (ValueError, IndexError):
            raise DatasetError(
                f"line {number} of {name} is '{','.join(row)}'; give x,y,z in metres in each line"
            ) from None
    if not points:
        raise DatasetError(f"{name} holds no points; give x,y,z in metres in each line")
    return np.array(points, dtype=np.float64)


def _points(arguments: argparse.Namespace, bundle: Bundle) -> np.ndarray | None:
    if arguments.lattice is not None:
        grid = VoxelGrid(bundle.grid.lower_m, bundle.grid.upper_m, arguments.lattice)
        return grid.centres().reshape(-1, 3)
    if arguments.points is None:
        return None
    if arguments.points == _STANDARD_INPUT:
        return read_points(sys.stdin, "standard input")
    try:
        with arguments.points.open(newline="", encoding="utf-8") as file:
            return read_points(file, str(arguments.points))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{arguments.points} cannot be read ({error}); give a CSV file") from None


def _features(arguments: argparse.Namespace, bundle: Bundle, threads: int) -> tuple[str, np.ndarray]:
    """The image set's name and the field's features, with the memory of all sets before it, as on the vehicle."""
    engine = create_engine(bundle, "auto", threads)
    wanted, passed = arguments.frame, 0

    def frames() -> Iterator[EngineInput]:
        for frame in image_sets(arguments, bundle):
            engine.keep_field = wanted in (str(passed), frame.name)
            yield frame

    with console.status("reading the drive") as status:
        for frame, prediction in predictions(engine, frames()):
            if engine.keep_field:
                return frame.name, prediction.field_features
            passed += 1
            status.update(f"image set {passed}")
    raise DatasetError(
        f"the drive has {passed} complete image sets and none is '{wanted}'; give a place from 0, or a token"
    )


def _write(points_m: np.ndarray, samples: FieldSamples, threshold: float, out: Path | None) -> None:
    label = np.where(samples.probability > threshold, samples.logits.argmax(axis=1), FREE)
    columns = [
        *(points_m[:, axis].tolist() for axis in range(3)),
        samples.inside.astype(int).tolist(),
        [f"{p:.6f}" for p in samples.probability],
        label.tolist(),
        [CLASS_NAMES[k] for k in label],
    ]
    header = [*_AXES, "inside", "probability", "label", "class"]
    if samples.gradient_per_m is not None:
        columns += [[f"{g:.6g}" for g in samples.gradient_per_m[:, axis]] for axis in range(3)]
        header += [f"g{axis}" for axis in _AXES]
    try:
        with _opened(out) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(zip(*columns, strict=True))
    except OSError as error:
        raise OccflownetError(f"{out or 'standard output'} cannot be written: {error.strerror}") from None


def _opened(out: Path | None) -> contextlib.AbstractContextManager:
    if out is None:
        return contextlib.nullcontext(sys.stdout)
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.open("w", newline="", encoding="utf-8")


def _write_mesh(
    field: FrameField, bundle: Bundle, threshold: float, levels: int, arguments: argparse.Namespace, name: str
) -> None:
    started_s = time.monotonic()
    with console.status("looking for the surface") as status:

        def go_on(level: int, cells: int) -> bool:
            status.update(f"level {level} of {levels}: {cells:,} cells to halve")
            return True

        mesh = extract_mesh(field, bundle.lift.grid, threshold, levels, closed=arguments.closed, go_on=go_on)
        status.update(f"writing {arguments.mesh}")
        save_mesh(mesh, arguments.mesh)
    took_s = time.monotonic() - started_s
    console.print(f"{name}: {_described(mesh)}, {took_s:.1f} s -> {arguments.mesh}", soft_wrap=True)


def _described(mesh: Mesh) -> str:
    dense = math.prod(n + 1 for n in mesh.cells.grid.shape)
    return (
        f"{len(mesh.triangles):,} triangles at {mesh.cells.grid.voxel_size_m:g} m from {mesh.cells.evaluations:,} "
        f"evaluations (all of the lattice: {dense:,})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parse_arguments(argv)
    return exit_status(PROGRAM, lambda: query(arguments))


if __name__ == "__main__":
    sys.exit(main())
