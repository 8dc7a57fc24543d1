# SPDX-License-Identifier: Apache-2.0
"""The published network and the real-time one, reduced in size: they learn, remember, match, and export."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
from full_networks import PAPER, REAL_TIME, inputs, network  # noqa: E402

from occflownet_core.encoder.lift import LiftTensors, SplatTensors  # noqa: E402
from occflownet_core.encoder.stereo import StereoView  # noqa: E402
from occflownet_core.encoder.volume3d import VolumeEncoder3d  # noqa: E402
from occflownet_core.labels import FREE  # noqa: E402
from occflownet_core.model import OccFlowNet  # noqa: E402
from occflownet_core.runtime.factory import create_engine  # noqa: E402
from training.export import _with_activation_statistics, export  # noqa: E402
from training.parity import drive, ring_rig  # noqa: E402


def loss_of(model: OccFlowNet, images, tables, motion) -> torch.Tensor:
    """Goes through everything: memory, the previous view, both decoders and the image heads."""
    with torch.no_grad():
        before = model.observe(images.flip(3), tables)
    output = model(images, tables, motion, before.volume, before.view)
    results = (*output.field.lattice(), output.seen.depth_logits, output.seen.class_logits)
    return sum(result.square().mean() for result in results)


@pytest.mark.parametrize("name", [PAPER, REAL_TIME])
def test_every_weight_gets_a_gradient_and_checkpointing_changes_none(name):
    gradients = []
    for checkpointing in (False, True):
        model = network(name)
        model.set_checkpointing(checkpointing)
        if name == PAPER:
            model.image_encoder.backbone.apply(without_drop_path)
        loss_of(model, *inputs(model)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert [n for n, g in gradients[0].items() if g is None or not g.abs().sum() > 0] == []
    for n, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], g, atol=1e-5, rtol=1e-3)


def without_drop_path(module: torch.nn.Module) -> None:
    """Drawn anew when a block is computed again, unless torch replays the random state; not what is compared here."""
    if type(module).__name__ == "DropPath":
        module.drop_prob = 0.0


def test_the_configurations_are_what_they_say():
    paper, fast = network(PAPER), network(REAL_TIME)
    assert isinstance(inputs(paper)[1], SplatTensors)
    assert isinstance(paper.volume_encoder, VolumeEncoder3d)
    assert paper.image_encoder.stride == 16
    assert paper.stereo.level_stride == 4
    assert isinstance(inputs(fast)[1], LiftTensors)
    assert fast.stereo is None
    assert not any(isinstance(m, torch.nn.Conv3d) for m in fast.modules())


@torch.no_grad()
def test_stereo_reads_the_previous_view_and_its_motion():
    model = network(PAPER)
    images, tables, motion = inputs(model)
    for seed in range(3):
        loss_of(model, *inputs(model, seed=seed))  # statistics of batch norms
    model.eval()
    before = model.view(images.roll(4, dims=3), tables)
    depth = model.observe(images, tables, motion, before).depth_logits
    alone = model.observe(images, tables).depth_logits
    assert (depth - alone).abs().max() > 1e-4
    farther = motion.clone()
    farther[:, 0, 3] = 3.0
    assert (model.observe(images, tables, farther, before).depth_logits - depth).abs().max() > 1e-5
    forgotten = StereoView(before.features, torch.zeros_like(before.image_from_ego))
    torch.testing.assert_close(model.observe(images, tables, motion, forgotten).depth_logits, alone)
    torch.testing.assert_close(model.observe(images, tables, motion, model.empty_view()).depth_logits, alone)
    torch.testing.assert_close(model.observe(images, tables).view, model.view(images, tables))


@torch.no_grad()
def test_the_memory_is_the_last_frames_volume_and_view():
    model = network(PAPER).eval()
    images, tables, motion = inputs(model)
    seen = model(images, tables, motion, model.empty_state(), model.empty_view()).seen
    assert seen.volume.shape == model.empty_state().shape
    assert seen.view.features.shape == model.empty_view().features.shape
    torch.testing.assert_close(seen.view.image_from_ego, tables.cameras.image_from_ego)


def loud(name: str) -> OccFlowNet:
    """Random weights that give probabilities from 0 to 1."""
    torch.manual_seed(1)
    model = _with_activation_statistics(network(name, seed=1))
    with torch.no_grad():
        model.decoder.density_head[-1].weight *= 12
        model.decoder.semantic_head[-1].weight *= 12
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Networks and their bundles by name, each made once."""
    made = {}

    def get(name: str):
        if name not in made:
            model = loud(name)
            made[name] = model, export(model, tmp_path_factory.mktemp(name), {"training": "none"}, with_weights=True)[0]
        return made[name]

    return get


@pytest.mark.parametrize("name", [PAPER, REAL_TIME])
def test_network_and_graph_agree_over_ten_frames(name, exported):
    """ONNX Runtime against PyTorch, with ego motion, memory and, in the published network, stereo; then a reset."""
    model, bundle = exported(name)
    names = [state.input for state in bundle.recurrent]
    assert names == (["state", "stereo_features", "stereo_image_from_ego"] if name == PAPER else ["state"])
    frames = list(drive(model.config, 10))
    engines = [create_engine(bundle, backend, threads=1) for backend in ("onnxruntime-cpu", "torch")]
    for engine in engines:
        engine.calibrate(ring_rig(model.config))
    first = engines[0].infer(frames[0][0], None)
    for engine in engines:
        engine.occupancy_threshold = float(first.probability.mean())
        engine.reset()
    for frame, (images, motion) in enumerate([*frames, frames[0]]):
        missing = (1,) if frame == 5 else ()
        motion = None if frame == len(frames) else motion
        graph, net = (engine.infer(images, motion, missing) for engine in engines)
        assert (graph.labels == net.labels).mean() >= 0.999
        np.testing.assert_allclose(graph.probability, net.probability, atol=1e-3)
        assert np.ptp(graph.probability) > 0.3
        assert 0.01 < (graph.labels != FREE).mean() < 0.99
    np.testing.assert_allclose(graph.probability, first.probability, atol=1e-5)


def test_no_graph_scatters(exported):
    """Splatting is exported as running sums over points sorted by voxel."""
    operators = {node.op_type for node in onnx.load(exported(PAPER)[1].graph_path).graph.node}
    assert "CumSum" in operators
    assert not any(operator.startswith("Scatter") for operator in operators)
