# SPDX-License-Identifier: Apache-2.0
"""Export a network as a model bundle: the deployment graph in ONNX, checked against the network itself."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table

from occflownet_core import poses
from occflownet_core.camera import Camera, CameraRig
from occflownet_core.encoder.lift import LiftTensors
from occflownet_core.errors import ExportError, OccflownetError
from occflownet_core.lift_tables import build_lift_tables
from occflownet_core.model import DeployedModel, ModelConfig, OccFlowNet
from occflownet_core.runtime.bundle import GRAPH, WEIGHTS, Bundle, RecurrentState, load_bundle, write_bundle
from occflownet_core.runtime.engine import Prediction
from occflownet_core.runtime.onnx_engine import OnnxEngine
from training.checkpoint import load_checkpoint

OPSET = 18
TRAINING_CHECKPOINT = ".ckpt"
PARITY_FRAMES = 6
LABEL_AGREEMENT = 0.999
PROBABILITY_TOLERANCE = 1e-3

_FOREIGN_OPERATORS = ("Scatter", "Loop", "If", "Scan", "NonZero", "Unique", "NonMaxSuppression", "Sequence", "Optional")


@dataclass(frozen=True)
class Parity:
    """How well the exported graph agrees with the network over a drive.

    Attributes:
        label_agreement: share of voxels with the same label, the worst frame's.
        probability_error: largest difference of occupancy probability, and of velocity (m/s) where there is one.
    """

    label_agreement: float
    probability_error: float


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


def export_graph(model: OccFlowNet) -> onnx.ModelProto:
    """The deployment graph of a network.

    Raises:
        ExportError: it needs an operator that a runtime lacks.
    """
    deployed = DeployedModel(model).eval()
    inputs = _example_inputs(model)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            deployed,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(DeployedModel.INPUTS),
            output_names=list(deployed.outputs),
            verbose=False,
        )
        path = Path(folder) / GRAPH
        program.save(path, external_data=False)
        graph = onnx.load(path)
    _strip_notes(graph)
    require_native_operators(graph)
    return graph


def require_native_operators(graph: onnx.ModelProto) -> None:
    """Refuse operators that ONNX Runtime or TensorRT runs late, slowly or not at all (DESIGN: graph boundary).

    Raises:
        ExportError: a scatter, a data-dependent shape, control flow, a function, or a GridSample of more than 2D.
    """
    inferred = onnx.shape_inference.infer_shapes(graph)
    values = [*inferred.graph.input, *inferred.graph.value_info]
    rank = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    for node in inferred.graph.node:
        if node.op_type.startswith(_FOREIGN_OPERATORS) or node.domain not in ("", "ai.onnx"):
            raise ExportError(f"the graph uses {node.op_type}, which not every runtime has; write the model without it")
        if node.op_type == "GridSample" and rank.get(node.input[0]) != 4:
            raise ExportError("the graph uses GridSample on other than 2D maps, which TensorRT lacks; fold axes first")


def check_parity(model: OccFlowNet, bundle: Bundle, frames: int = PARITY_FRAMES) -> Parity:
    """Run the network and its bundle side by side over frames with changing images and ego motion.

    The threshold is the first frame's mean probability, so that occupied and free voxels are both put to the test.

    Raises:
        ExportError: they disagree by more than ``LABEL_AGREEMENT`` or ``PROBABILITY_TOLERANCE`` allow.
    """
    rig = ring_rig(model.config)
    engine = OnnxEngine(bundle, threads=torch.get_num_threads())
    engine.calibrate(rig)
    images, _ = next(drive(model.config, 1))
    engine.occupancy_threshold = float(engine.infer(images, None).probability.mean())
    engine.reset()

    deployed = DeployedModel(model).eval()
    tables = _table_tensors(rig, model)
    threshold, state = torch.tensor(engine.occupancy_threshold), model.empty_state()
    agreement, error = [], []
    for images, previous_from_current in drive(model.config, frames):
        ours = engine.infer(images, previous_from_current)
        motion = torch.from_numpy(previous_from_current).float()
        with torch.no_grad():
            *results, state = deployed(torch.from_numpy(images), *tables, motion, threshold, state)
        theirs = Prediction(*(result.numpy() for result in results))
        agreement.append(float((theirs.labels == ours.labels).mean()))
        error.append(float(np.abs(theirs.probability - ours.probability).max()))
        if theirs.velocity_mps is not None:
            error.append(float(np.abs(theirs.velocity_mps - ours.velocity_mps).max()))
    parity = Parity(min(agreement), max(error))
    if not (parity.label_agreement >= LABEL_AGREEMENT and parity.probability_error <= PROBABILITY_TOLERANCE):
        raise ExportError(
            f"the exported graph is not the network: {parity.label_agreement:.4%} of labels agree, probabilities "
            f"or velocities differ by up to {parity.probability_error:.2g}; nothing was written"
        )
    return parity


def export(
    model: OccFlowNet, out: Path, provenance: dict, metrics: dict | None = None, with_weights: bool = False
) -> tuple[Bundle, Parity]:
    """Write a network's bundle, if its graph does what the network does.

    Args:
        model: the network, on the CPU.
        out: the bundle's folder; an older bundle there is replaced.
        provenance, metrics: plain values for ``bundle.yaml``.
        with_weights: add the weights, for the torch engine.

    Raises:
        ExportError: the graph uses foreign operators or fails the parity check.
        BundleError: the folder cannot be written.
    """
    model = model.eval()
    config = model.config
    files = {GRAPH: export_graph(model).SerializeToString()}
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
        recurrent=(RecurrentState("state", "next_state", tuple(model.empty_state().shape)),),
        outputs=DeployedModel(model).outputs[:-1],
        model=config.to_dict(),
        provenance=provenance,
        metrics=metrics or {},
    )
    with tempfile.TemporaryDirectory() as folder:
        trial = dataclasses.replace(bundle, directory=Path(folder))
        write_bundle(trial, files)
        parity = check_parity(model, load_bundle(folder))
    write_bundle(bundle, files)
    return load_bundle(out), parity


def ring_rig(config: ModelConfig) -> CameraRig:
    """Cameras at 1.6 m height that look outwards at equal angles, with the network's own image size."""
    width, height = config.image_width_px, config.image_height_px
    focal_px = config.depth.reference_focal_px or 0.8 * width
    intrinsic = np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]])
    cameras = []
    for name, yaw in zip(config.cameras, np.linspace(0, 2 * np.pi, len(config.cameras), endpoint=False), strict=True):
        ego_from_camera = np.eye(4)
        right, down = (np.sin(yaw), -np.cos(yaw), 0), (0, 0, -1)
        ego_from_camera[:3, :3] = np.stack([right, down, (np.cos(yaw), np.sin(yaw), 0)], axis=1)
        ego_from_camera[2, 3] = 1.6
        cameras.append(Camera(name, width, height, intrinsic, ego_from_camera))
    return CameraRig(tuple(cameras))


def drive(config: ModelConfig, frames: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Made-up input: blocks of colour that drift through the images while the vehicle drives a wavy line.

    Yields:
        images uint8 [N, H, W, 3], previous_from_current float64 [4, 4] (identity at first).
    """
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (len(config.cameras), config.image_height_px // 8, config.image_width_px // 8, 3))
    images = blocks.repeat(8, axis=1).repeat(8, axis=2) + rng.integers(-20, 20, (1, 1, 1, 3))
    for frame in range(frames):
        drifted = np.roll(images, 5 * frame, axis=2) + rng.integers(-10, 10, images.shape)
        yaw = 0.1 * np.sin(frame) if frame else 0.0
        step_m = np.array([0.7 * frame, 0.1 * frame, 0.02]) if frame else np.zeros(3)
        yield np.clip(drifted, 0, 255).astype(np.uint8), poses.pose(step_m, (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with console.status("building the network"):
            model, provenance = _network(options)
        with console.status("exporting, then driving network and graph side by side"):
            bundle, parity = export(model, options.out, provenance, with_weights=options.with_weights)
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
        f"{PARITY_FRAMES} frames; the export is refused if less than {LABEL_AGREEMENT:.1%} of labels agree. "
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
    parser.add_argument("--note", help="a sentence for people about this model; kept in bundle.yaml, shown by the demo")
    parser.add_argument("--seed", type=int, default=0, help="of an untrained network's random weights (default 0)")
    return parser


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
    tables = LiftTensors.from_tables([build_lift_tables(ring_rig(model.config), model.lift_spec)])
    state = model.train().empty_state()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # torch's word for the mean over all batches
    with torch.no_grad():
        for images, motion in drive(model.config, PARITY_FRAMES):
            images, motion = torch.from_numpy(images)[None], torch.from_numpy(motion).float()[None]
            state = model(images, tables, motion, state).seen.volume
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return model.eval()


def _table_tensors(rig: CameraRig, model: OccFlowNet) -> tuple[torch.Tensor, ...]:
    tables = build_lift_tables(rig, model.lift_spec)
    return tuple(torch.from_numpy(t) for t in (tables.pixel_index, tables.depth_index, tables.depth_weight))


def _example_inputs(model: OccFlowNet) -> tuple[torch.Tensor, ...]:
    images, previous_from_current = next(drive(model.config, 1))
    return (
        torch.from_numpy(images),
        *_table_tensors(ring_rig(model.config), model),
        torch.from_numpy(previous_from_current).float(),
        torch.tensor(model.config.occupancy_threshold),
        model.empty_state(),
    )


def _strip_notes(graph: onnx.ModelProto) -> None:
    """Drop stack traces and names of source files, which the exporter leaves in every node."""
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    for entry in (
        *graph.graph.node,
        *graph.graph.value_info,
        *graph.graph.initializer,
        *graph.graph.input,
        *graph.graph.output,
    ):
        entry.doc_string = ""
        del entry.metadata_props[:]


if __name__ == "__main__":
    sys.exit(main())
