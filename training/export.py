# SPDX-License-Identifier: Apache-2.0
"""Export a network as a model bundle: the deployment graph in ONNX, checked against the network itself."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table

from occflownet_core.encoder.lift import stacked_tables
from occflownet_core.errors import ExportError, OccflownetError
from occflownet_core.lift_tables import build_lift_tables
from occflownet_core.model import DeployedModel, ModelConfig, OccFlowNet
from occflownet_core.runtime.bundle import (
    FIELD_FEATURES,
    FIELD_GRAPH,
    GRAPH,
    WEIGHTS,
    Bundle,
    RecurrentState,
    load_bundle,
    write_bundle,
)
from occflownet_core.runtime.comparison import HALF_PRECISION, SINGLE_PRECISION, Parity, worst
from training.checkpoint import load_checkpoint
from training.graph import export_field_graph, export_graph, store_half
from training.parity import PARITY_FRAMES, check_parity, drive, ring_rig

TRAINING_CHECKPOINT = ".ckpt"


def load_model(config: ModelConfig, checkpoint: Path | None, seed: int = 0) -> OccFlowNet:
    """The network with a checkpoint's weights, or with seeded random ones.

    Args:
        config: what to build.
        checkpoint: ``.safetensors`` file of an ``OccFlowNet.state_dict()``.
        seed: of the random weights.

    Raises:
        ExportError: the checkpoint cannot be read or is another network's.
    """
    torch.manual_seed(seed)
    model = OccFlowNet(config.without_download())
    if checkpoint is None:
        return _with_activation_statistics(model)
    if checkpoint.suffix != ".safetensors":
        raise ExportError(f"checkpoint {checkpoint} is not a .safetensors file; give one")
    try:
        model.load_state_dict(safetensors.torch.load_file(checkpoint))
        return model.eval()
    except (OSError, safetensors.SafetensorError) as error:
        raise ExportError(f"checkpoint {checkpoint} cannot be read ({error})") from None
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise ExportError(
            f"checkpoint {checkpoint} is not of this configuration ({first} ...); give the one it was trained with"
        ) from None


def export(
    model: OccFlowNet,
    out: Path,
    provenance: dict,
    metrics: dict | None = None,
    with_weights: bool = False,
    half_size: bool = False,
    parity_frames: int = PARITY_FRAMES,
) -> tuple[Bundle, Parity]:
    """Write a network's bundle, if its graph does what the network does.

    Args:
        model: the network, on the CPU.
        out: the bundle's folder; an older bundle there is replaced.
        provenance, metrics: plain values for ``bundle.yaml``.
        with_weights: add the weights, for the torch engine.
        half_size: store the graph's weights in half precision; it still computes in single precision.
        parity_frames: of the made-up drive on which graph and network are compared; 0 leaves that to the caller.

    Raises:
        ExportError: the graph uses foreign operators or fails the parity check.
        BundleError: the folder cannot be written.
    """
    model = model.eval()
    config, deployed = model.config, DeployedModel(model)
    graph = export_graph(model)
    if half_size:
        store_half(graph)
    files = {GRAPH: graph.SerializeToString(), FIELD_GRAPH: export_field_graph(model).SerializeToString()}
    if with_weights:
        files[WEIGHTS] = safetensors.torch.save({k: v.contiguous() for k, v in model.state_dict().items()})
    bundle = Bundle(
        directory=out,
        name=config.name,
        cameras=config.cameras,
        image_width_px=config.image_width_px,
        image_height_px=config.image_height_px,
        grid=config.grid,
        lift=model.lift_spec,
        occupancy_threshold=config.occupancy_threshold,
        recurrent=tuple(
            RecurrentState(name, result, tuple(memory.shape))
            for (name, result), memory in zip(deployed.recurrent.items(), deployed.empty_memory(), strict=True)
        ),
        outputs=tuple(o for o in deployed.outputs if o not in (FIELD_FEATURES, *deployed.recurrent.values())),
        field_channels=config.field.channels,
        model=config.to_dict(),
        provenance=provenance,
        metrics=metrics or {},
    )
    with tempfile.TemporaryDirectory() as folder:
        trial = dataclasses.replace(bundle, directory=Path(folder))
        write_bundle(trial, files)
        required = HALF_PRECISION if half_size else SINGLE_PRECISION
        parity = check_parity(model, load_bundle(folder), required, parity_frames) if parity_frames else worst([])
    write_bundle(bundle, files)
    return load_bundle(out), parity


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with console.status("building the network"):
            metrics = measured(options.metrics) if options.metrics else None
            model, provenance = _network(options)
        with console.status("exporting, then driving network and graph side by side"):
            bundle, parity = export(
                model, options.out, provenance, metrics, with_weights=options.with_weights, half_size=options.half_size
            )
    except OccflownetError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    _report(console, bundle, parity)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.export",
        description="Write a network as a model bundle: the folder that `ros2 launch occflownet_ros occ.launch.py bundle:=DIR` runs.",
        epilog="Before anything is written, network and graph run side by side over "
        f"{PARITY_FRAMES} frames; the export is refused if less than {SINGLE_PRECISION.label_agreement:.1%} of labels agree. "
        "Example: python -m training.export --checkpoint out/tiny/best.ckpt --out models/tiny",
    )
    parser.add_argument(
        "--config", type=Path, help="training configuration; its 'model:' section counts (a .ckpt brings its own)"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="last.ckpt or best.ckpt of training.fit (its averaged weights, and the threshold of its validation), or "
        "weights as .safetensors; without it the network is untrained",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle; an older bundle is replaced")
    parser.add_argument("--occupancy-threshold", type=float, help="instead of the configuration's, probability 0..1")
    parser.add_argument("--with-weights", action="store_true", help="add the weights, for the engine 'torch'")
    parser.add_argument("--half-size", action="store_true", help="store the graph's weights in half precision")
    parser.add_argument(
        "--metrics", type=Path, metavar="FILE", help="JSON of training.evaluate; its totals are kept in bundle.yaml"
    )
    parser.add_argument("--note", help="a sentence for people about this model; kept in bundle.yaml, shown by the demo")
    parser.add_argument("--seed", type=int, default=0, help="of an untrained network's random weights (default 0)")
    return parser


def measured(path: Path) -> dict:
    """The totals of an evaluation's report, with the settings that they hold for.

    Raises:
        ExportError: the file cannot be read or is no such report.
    """
    try:
        report = json.loads(path.read_text())
        masked, data = report["camera_mask"], report["data"]
        totals = {name: masked[name] for name in ("miou_17", "dynamic_miou", "static_miou", "geometric_iou")}
        totals["ray_iou"] = report["rays"]["ray_iou"]
        evaluated = (
            f"{data['dataroot']}, {report['samples']} keyframes of {data['scenes']} scenes, camera mask, 17 classes"
        )
        threshold = report["settings"]["occupancy_threshold"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"metrics {path} cannot be read ({error}); give the JSON of training.evaluate") from None
    rounded = {name: None if value is None else round(value, 4) for name, value in totals.items()}
    return {"evaluated_on": evaluated, "occupancy_threshold": threshold, **rounded}


def _network(options: argparse.Namespace) -> tuple[OccFlowNet, dict]:
    """The network to export and where its weights come from."""
    path = options.checkpoint
    if path is not None and path.suffix == TRAINING_CHECKPOINT:
        checkpoint = load_checkpoint(path)
        model, provenance = checkpoint.model(), {**_file_notes(path), **checkpoint.provenance}
    elif options.config is None:
        raise ExportError(
            f"give --config too: only a {TRAINING_CHECKPOINT} of training.fit knows its own configuration"
        )
    else:
        model = load_model(ModelConfig.from_yaml(options.config), path, options.seed)
        provenance = _provenance(path, options.seed)
    if options.occupancy_threshold is not None:
        model.config = dataclasses.replace(model.config, occupancy_threshold=options.occupancy_threshold)
    return model, {**({"note": options.note} if options.note else {}), **provenance}


def _provenance(checkpoint: Path | None, seed: int) -> dict:
    """Where the weights come from; what the training noted in the file's header goes along."""
    if checkpoint is None:
        return {"training": f"untrained: random weights of seed {seed}; its labels mean nothing"}
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        return {**_file_notes(checkpoint), **(file.metadata() or {})}


def _file_notes(path: Path) -> dict:
    return {"checkpoint": path.name, "checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _report(console: Console, bundle: Bundle, parity: Parity) -> None:
    table = Table(title=f"bundle {bundle.directory}", show_header=False)
    for name, value in (
        ("model", bundle.name),
        ("training", bundle.provenance.get("training") or bundle.provenance.get("supervision", "")),
        (
            "graph",
            f"{bundle.graph_path.stat().st_size / 1e6:.1f} MB, {len(onnx.load(bundle.graph_path).graph.node)} nodes",
        ),
        ("labels that agree", f"{parity.label_agreement:.4%}"),
        ("probability error", f"{parity.probability_error:.1e}"),
    ):
        table.add_row(name, value)
    console.print(table)


def _with_activation_statistics(model: OccFlowNet) -> OccFlowNet:
    """Let batch norms see made-up input; otherwise activations of random weights fade to nothing on their way."""
    tables = stacked_tables([build_lift_tables(ring_rig(model.config), model.lift_spec)])
    state, view = model.train().empty_state(), None
    norms = [module for module in model.modules() if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d))]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # torch's word for the mean over all batches
    with torch.no_grad():
        for images, motion in drive(model.config, PARITY_FRAMES):
            images, motion = torch.from_numpy(images)[None], torch.from_numpy(motion).float()[None]
            seen = model(images, tables, motion, state, view).seen
            state, view = seen.volume, seen.view
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
