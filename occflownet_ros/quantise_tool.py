# SPDX-License-Identifier: Apache-2.0
"""``occflownet-engine quantise``: a bundle brought to eight bits with what it computes on a recorded drive."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import track

from occflownet_core.errors import EngineError
from occflownet_core.runtime.bundle import CPU, TARGETS, load_bundle
from occflownet_ros.drive_arguments import add_drive, image_sets

FRAMES = 64

_HELP = """
target cpu: as ONNX Runtime's kernels compute fastest (x86-64 with VNNI); TensorRT refuses such a graph. target tensorrt:
symmetric int8 as TensorRT wants it; ONNX Runtime runs it too, more slowly. Quantise with data like that to come, and not with
the data that the result is then judged on.

example:
  occflownet-engine quantise --bundle models/mine --out models/mine_int8 --target tensorrt --bag scene-0061
  occflownet-engine compare --bundle models/mine_int8 --reference-bundle models/mine --engines onnxruntime,onnxruntime --bag scene-0062
"""


def add_quantise(commands: argparse._SubParsersAction) -> None:
    """The command and its arguments."""
    parser = commands.add_parser(
        "quantise",
        help="write a bundle that computes in eight bits",
        description="Run a bundle over a recorded drive, note the range of every activation, and write a bundle whose "
        "convolutions and matrix products compute in eight bits (explicit QuantizeLinear and DequantizeLinear).",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="model bundle")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the new bundle; must not exist"
    )
    add_drive(parser)
    parser.add_argument("--target", choices=TARGETS, default=CPU, help="what will run it, see below (default: cpu)")
    parser.add_argument("--frames", type=int, default=FRAMES, metavar="N", help=f"at most N frames (default: {FRAMES})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


def quantise(arguments: argparse.Namespace, console: Console) -> None:
    """Write the quantised bundle and say what it is.

    Raises:
        OccflownetError: with one sentence for the user.
    """
    try:
        from occflownet_core.runtime.quantisation import quantise_bundle
    except ImportError as error:
        raise EngineError(f"quantising needs the package {error.name}, which is missing: pip install onnx") from None
    bundle = load_bundle(arguments.bundle)
    frames = islice(image_sets(arguments, bundle), arguments.frames)
    watched = track(frames, "frames", total=None, console=console, transient=True)
    result = quantise_bundle(bundle, watched, arguments.target, arguments.out, _data(arguments), arguments.threads)
    before, after = (b.graph_path.stat().st_size / 1e6 for b in (bundle, result))
    console.print(
        f"{result.directory}: {result.name} in eight bits for {arguments.target}, by {result.quantisation['frames']} frames "
        f"of {result.quantisation['data']}; graph {before:.1f} -> {after:.1f} MB",
        soft_wrap=True,
    )


def _data(arguments: argparse.Namespace) -> str:
    """The drive in words, without the folders it lies in."""
    if arguments.bag:
        return f"bag {arguments.bag.resolve().name}"
    return " ".join(
        ["data root", arguments.dataroot.resolve().name, arguments.version or "", *arguments.scenes]
    ).strip()
