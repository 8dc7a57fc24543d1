# SPDX-License-Identifier: Apache-2.0
"""A configuration at its full size with random weights, exported: PyTorch against ONNX Runtime over frames with memory.

Minutes and gigabytes, so it is no part of ``make bench``: `python -m benchmarks.full_size_parity --config NAME`.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console

from benchmarks.encoder import model_config
from benchmarks.report import machine
from occflownet_core.errors import OccflownetError
from training.export import export, load_model


def measure(name: str, frames: int) -> dict:
    """Export a configuration and compare.

    Args:
        name: of the configuration.
        frames: of the made-up drive.

    Raises:
        ConfigError, ExportError: there is no such configuration, or graph and network disagree.
    """
    started_s = time.monotonic()
    model = load_model(model_config(name), None)
    with tempfile.TemporaryDirectory() as folder:
        bundle, parity = export(model, Path(folder) / "bundle", {"training": "none"}, parity_frames=frames)
        graph_mb = bundle.graph_path.stat().st_size / 1e6
    return {
        "network": name,
        "frames": frames,
        "labels_alike": parity.label_agreement,
        "largest_error": parity.probability_error,
        "graph_mb": graph_mb,
        "seconds": time.monotonic() - started_s,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,  # kilobytes on Linux
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.full_size_parity", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="NAME", help="name in training/configs")
    parser.add_argument("--frames", type=int, default=6, help="frames of the drive (default: 6)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for JSON (default: out/bench)")
    options = parser.parse_args(arguments)
    if options.frames < 1 or options.threads < 1:
        parser.error(f"--frames is {options.frames} and --threads {options.threads}; give 1 or more")
    torch.set_num_threads(options.threads)
    try:
        result = measure(options.config, options.frames)
    except OccflownetError as error:
        print(f"benchmarks.full_size_parity: {error}", file=sys.stderr)
        return 2
    Console(highlight=False).print(
        f"{options.config}, {result['frames']} frames: {result['labels_alike']:.4%} of labels alike (the worst frame), "
        f"probabilities within {result['largest_error']:.1e}; graph {result['graph_mb']:.0f} MB; {result['seconds']:.0f} s, "
        f"peak memory {result['peak_memory_gb']:.1f} GB",
        soft_wrap=True,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    content = {"machine": machine() | {"threads": options.threads}, "versions": versions, **result}
    (options.out / f"full_size_parity_{options.config}.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
