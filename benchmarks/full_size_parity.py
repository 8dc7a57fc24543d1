# SPDX-License-Identifier: Apache-2.0
"""A configuration at its full size with random weights, exported: PyTorch against ONNX Runtime over frames with memory.

Minutes and gigabytes, so it is no part of ``make bench``: `python -m benchmarks.full_size_parity --config NAME`.
"""

from __future__ import annotations

import argparse
import gc
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
from occflownet_core.model import ModelConfig
from occflownet_core.runtime.comparison import EngineOutput, difference, worst
from occflownet_core.runtime.engine import Engine
from occflownet_core.runtime.onnx_engine import OnnxEngine
from occflownet_core.runtime.torch_engine import TorchEngine
from training.export import export, load_model
from training.parity import drive, ring_rig


def measure(name: str, frames: int, threads: int) -> dict:
    """Export a configuration, run one engine after the other, since both want gigabytes, and compare.

    The threshold is PyTorch's mean probability of the first frame, so that occupied and free voxels are both put to the test.

    Args:
        name: of the configuration.
        frames: of the made-up drive.
        threads: CPU threads.

    Raises:
        ConfigError, ExportError: there is no such configuration, or it cannot be exported.
        EngineError: an engine fails.
    """
    started_s = time.monotonic()
    config = model_config(name)
    with tempfile.TemporaryDirectory() as folder:
        bundle, _ = export(load_model(config, None), Path(folder), {"training": "none"}, None, True, parity_frames=0)
        gc.collect()
        first = run(TorchEngine(bundle, threads), config, 1, None)[0]
        threshold = float(first.prediction.probability.mean())
        outputs = [
            run(TorchEngine(bundle, threads), config, frames, threshold),
            run(OnnxEngine(bundle, threads, arena=False), config, frames, threshold),
        ]
        graph_mb = bundle.graph_path.stat().st_size / 1e6
    parity = worst([difference("", *pair).parity for pair in zip(*outputs, strict=True)])
    return {
        "network": name,
        "frames": frames,
        "labels_alike": parity.label_agreement,
        "largest_error": parity.probability_error,
        "graph_mb": graph_mb,
        "seconds": time.monotonic() - started_s,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,  # kilobytes on Linux
    }


def run(engine: Engine, config: ModelConfig, frames: int, threshold: float | None) -> list[EngineOutput]:
    """What an engine makes of the drive, its memory carried along and not kept."""
    engine.calibrate(ring_rig(config))
    if threshold is not None:
        engine.occupancy_threshold = threshold
    return [
        EngineOutput(engine.infer(images, motion if frame else None))
        for frame, (images, motion) in enumerate(drive(config, frames))
    ]


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
        result = measure(options.config, options.frames, options.threads)
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
