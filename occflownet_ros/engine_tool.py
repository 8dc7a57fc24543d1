# SPDX-License-Identifier: Apache-2.0
"""``occflownet-engine``: engines of a model bundle, compared on recorded data, built ahead of time, or brought to eight bits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from occflownet_core.command_line import exit_status
from occflownet_core.errors import DatasetError, EngineError
from occflownet_core.runtime.bundle import Bundle, load_bundle
from occflownet_core.runtime.comparison import (
    EIGHT_BITS,
    HALF_PRECISION,
    SINGLE_PRECISION,
    EngineRecord,
    Parity,
    compare_engines,
    require_same_sizes,
)
from occflownet_core.runtime.engine import HALF, PRECISIONS, SINGLE, Engine
from occflownet_core.runtime.factory import BACKENDS, create_engine, engine_cache_folder
from occflownet_ros.drive_arguments import add_drive, image_sets, require_one_kind
from occflownet_ros.quantise_tool import add_quantise, quantise

PROGRAM = "occflownet-engine"
DIVERGED = 1
"""Exit status of ``compare`` where engines differ by more than is allowed; 2 is a user's mistake, as everywhere."""

_COMPARE_HELP = f"""
engines are named BACKEND or BACKEND:PRECISION; the first is the one that the others are compared with.
  backends: {", ".join(BACKENDS)}; precisions: {", ".join(PRECISIONS)} (default {SINGLE}, the graph as it was exported)

allowed without --labels and --error: {SINGLE_PRECISION.label_agreement:.1%} of labels alike and probabilities (and velocities) within {SINGLE_PRECISION.probability_error:g}; where an
engine is {HALF}, {HALF_PRECISION.label_agreement:.0%} and {HALF_PRECISION.probability_error:g}; where a bundle is quantised, {EIGHT_BITS.label_agreement:.0%} and {EIGHT_BITS.probability_error:g}. Each frame must keep to it.

with --reference-bundle the first engine runs that bundle, the others --bundle; then one engine may be named twice.

exit status: 0 the engines agree, {DIVERGED} they do not, 2 something was wrong with what was given.

examples:
  occflownet-engine compare --bundle models/mine --engines onnxruntime,torch --bag scene-0061
  occflownet-engine compare --bundle models/mine --engines onnxruntime,tensorrt:fp16 --dataroot /data/nuscenes --version v1.0-mini
  occflownet-engine compare --bundle models/mine_int8 --reference-bundle models/mine --engines onnxruntime,onnxruntime --bag scene-0061
"""
_BUILD_HELP = """
TensorRT makes an engine for one GPU, one version of itself and one precision; that takes minutes, and the result is kept
in a folder. A node that is configured with the same bundle, precision and folder then starts at once.

example:
  occflownet-engine build --bundle models/mine --precision fp16
"""

console = Console(highlight=False)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Compare, build and quantise the engines that run a model bundle."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_compare(commands)
    _add_build(commands)
    add_quantise(commands)
    arguments = parser.parse_args(argv)
    if arguments.command != "build":
        if arguments.frames is not None and arguments.frames < 1:
            parser.error(f"--frames is {arguments.frames}; give 1 or more")
        if arguments.threads is not None and arguments.threads < 1:
            parser.error(f"--threads is {arguments.threads}; give 1 or more")
        require_one_kind(parser, arguments)
    return arguments


def _add_compare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compare",
        help="run engines side by side over a recorded drive and say how far they differ",
        description="Run engines side by side over a recorded drive, each with a memory of its own: differences by output, "
        "the share of labels alike, mIoU of each where there is ground truth, and the first frame that differs too much.",
        epilog=_COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="model bundle")
    parser.add_argument(
        "--reference-bundle", type=Path, metavar="DIR", help="the first engine's bundle, e.g. the one not quantised"
    )
    parser.add_argument("--engines", required=True, metavar="A,B", help="two or more engines, see below")
    add_drive(parser)
    parser.add_argument("--gt", type=Path, metavar="DIR", help="root with Occ3D's gts/ (default: the bag's own truth)")
    parser.add_argument("--frames", type=int, metavar="N", help="only the first N frames")
    parser.add_argument("--labels", type=float, metavar="SHARE", help="least share of labels alike, 0 to 1")
    parser.add_argument("--error", type=float, metavar="E", help="largest difference of probability and velocity")
    parser.add_argument("--threads", type=int, help="CPU threads of each engine (default: all cores)")
    parser.add_argument("--engine-cache", type=Path, metavar="DIR", help=_CACHE_HELP)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for every number, frame by frame")


def _add_build(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "build",
        help="build a bundle's TensorRT engine ahead of time",
        description="Build a bundle's TensorRT engine for this machine's GPU, so that no vehicle waits for it.",
        epilog=_BUILD_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="model bundle")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=SINGLE, help=f"default {SINGLE}, the graph as it was exported"
    )
    parser.add_argument("--engine-cache", type=Path, metavar="DIR", help=_CACHE_HELP)
    parser.add_argument("--rebuild", action="store_true", help="build even if a valid engine is there")


_CACHE_HELP = "folder of TensorRT engines (default: $OCCFLOWNET_ENGINE_CACHE, else ~/.cache/occflownet/engines)"


def compare(arguments: argparse.Namespace) -> bool:
    """Run the comparison and print it; True where the engines agree.

    Raises:
        OccflownetError: with one sentence for the user.
    """
    bundle = load_bundle(arguments.bundle)
    reference = load_bundle(arguments.reference_bundle) if arguments.reference_bundle else bundle
    require_same_sizes(reference, bundle)
    first, *others = engine_names(arguments.engines, again=reference is not bundle)
    tolerance = _tolerance(arguments, [first, *others], [reference, bundle])
    label = f"{first} of {arguments.reference_bundle.name}" if reference is not bundle else first
    engines = {label: _engine(reference, first, arguments)}
    engines |= {name: _engine(bundle, name, arguments) for name in others}
    for engine in engines.values():
        engine.keep_field = bool(bundle.field_channels)  # compared like every other output
    frames = islice(image_sets(arguments, bundle, arguments.gt), arguments.frames)
    records: dict[str, EngineRecord] = {}
    for so_far in track(compare_engines(engines, frames), "frames", console=console, transient=True):
        records = so_far
    if not records:
        raise DatasetError("there is no frame to compare on; give a drive with at least one complete image set")
    _print(bundle, records, tolerance)
    if arguments.out:
        _write(arguments.out, bundle, records, tolerance)
    return all(record.first_diverging(tolerance) is None for record in records.values())


def engine_names(text: str, again: bool = False) -> list[str]:
    """``BACKEND`` and ``BACKEND:PRECISION``, separated by commas; ``again``: the first may come once more.

    Raises:
        EngineError: fewer than two, one twice, or an unknown one.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    different = names[1:] if again else names
    if len(names) < 2 or len(set(different)) < len(different):
        raise EngineError(f"--engines is '{text}'; name two or more different ones, e.g. onnxruntime,torch")
    for name in names:
        backend, _, precision = name.partition(":")
        if backend not in BACKENDS or (precision or SINGLE) not in PRECISIONS:
            raise EngineError(
                f"there is no engine '{name}'; a backend is one of {', '.join(BACKENDS)}, with a precision of "
                f"{', '.join(PRECISIONS)} behind a colon"
            )
    return names


def _engine(bundle: Bundle, name: str, arguments: argparse.Namespace) -> Engine:
    backend, _, precision = name.partition(":")
    return create_engine(bundle, backend, arguments.threads, precision or SINGLE, arguments.engine_cache)


def _tolerance(arguments: argparse.Namespace, names: Sequence[str], bundles: Sequence[Bundle]) -> Parity:
    usual = HALF_PRECISION if any(name.endswith(f":{HALF}") for name in names) else SINGLE_PRECISION
    usual = EIGHT_BITS if any(bundle.quantisation for bundle in bundles) else usual
    labels = usual.label_agreement if arguments.labels is None else arguments.labels
    error = usual.probability_error if arguments.error is None else arguments.error
    if not 0 <= labels <= 1 or not error >= 0:
        raise EngineError(f"--labels is {labels:g} and --error {error:g}; give a share from 0 to 1, and 0 or more")
    return Parity(labels, error)


def _print(bundle: Bundle, records: dict[str, EngineRecord], tolerance: Parity) -> None:
    reference, *others = records.values()
    console.print(_engine_table(bundle, records))
    for record in others:
        console.print(_difference_table(reference, record))
        diverging = record.first_diverging(tolerance)
        allowed = f"{tolerance.label_agreement:.2%} of labels alike, differences up to {tolerance.probability_error:g}"
        console.print(
            f"[green]{record.name} agrees with {reference.name}[/] on every frame ({allowed})"
            if diverging is None
            else f"[red]{record.name} differs from {reference.name}[/] from frame {diverging} on (allowed: {allowed})",
            soft_wrap=True,
        )
    for record in records.values():
        for warning in record.overflow_warnings():
            console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)


def _engine_table(bundle: Bundle, records: dict[str, EngineRecord]) -> Table:
    frames = len(next(iter(records.values())).engine_ms)
    table = Table(title=f"{bundle.name}, {frames} frames", title_justify="left")
    scored = any(record.scores.samples for record in records.values())
    for heading in ("engine", "precision", "median ms", *(("mIoU %", "occupied or free %") if scored else ())):
        table.add_column(heading, justify="left" if heading in ("engine", "precision") else "right")
    for record in records.values():
        cells = [record.name, record.precision, f"{record.median_ms:.1f}"]
        if scored:
            scores = record.scores.to_dict()["camera_mask"]
            cells += [_percent(scores["miou_17"]), _percent(scores["geometric_iou"])]
        table.add_row(*cells)
    if scored:
        table.caption = "17 classes, camera mask, bare extrinsics at the anchor camera's stamp"
    return table


def _difference_table(reference: EngineRecord, record: EngineRecord) -> Table:
    table = Table(title=f"{record.name} against {reference.name}", title_justify="left")
    for heading in ("output", "worst frame", "mean"):
        table.add_column(heading, justify="left" if heading == "output" else "right")
    frames = record.frames
    for title, values in (
        ("labels alike", [frame.label_agreement for frame in frames]),
        ("labels alike, occupied", [frame.occupied_agreement for frame in frames]),
    ):
        table.add_row(title, f"{min(values):.4%}", f"{sum(values) / len(values):.4%}")
    for output in frames[0].largest:
        largest = max(frame.largest[output] for frame in frames)
        mean = sum(frame.mean[output] for frame in frames) / len(frames)
        table.add_row(output.replace("_", " "), f"{largest:.2e}", f"{mean:.2e}")
    return table


def _write(out: Path, bundle: Bundle, records: dict[str, EngineRecord], tolerance: Parity) -> None:
    report = {
        "model": bundle.name,
        "allowed": vars(tolerance),
        "engines": {name: record.to_dict(tolerance) for name, record in records.items()},
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise DatasetError(f"--out {out} cannot be written ({error.strerror}); choose another file") from None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def build(arguments: argparse.Namespace) -> None:
    """Build (or find) a TensorRT engine and say where it is.

    Raises:
        OccflownetError: with one sentence for the user.
    """
    from occflownet_core.runtime.tensorrt_build import prepare_engine

    bundle = load_bundle(arguments.bundle)
    folder = arguments.engine_cache or engine_cache_folder()
    path, built_s = prepare_engine(bundle, arguments.precision, folder, arguments.rebuild, console)
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    console.print(f"{path} ({size}, {'was there already' if built_s is None else f'built in {built_s:.0f} s'})")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    agreed = True

    def run() -> None:
        nonlocal agreed
        if arguments.command == "compare":
            agreed = compare(arguments)
        elif arguments.command == "build":
            build(arguments)
        else:
            quantise(arguments, console)

    status = exit_status(PROGRAM, run)
    return status if status or agreed else DIVERGED


if __name__ == "__main__":
    sys.exit(main())
