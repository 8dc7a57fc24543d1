# SPDX-License-Identifier: Apache-2.0
"""The whole network, small: what goes in and out, that memory and calibration count, and that it can learn."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.encoder.backbone import BackboneConfig
from occflownet_core.encoder.lift import LiftTensors
from occflownet_core.errors import ConfigError
from occflownet_core.field import FieldConfig
from occflownet_core.grid import VoxelGrid
from occflownet_core.lift_tables import LiftTables, build_lift_tables
from occflownet_core.model import DeployedModel, ModelConfig, OccFlowNet

SMALL = {
    "name": "small",
    "cameras": ["front", "back"],
    "image_width_px": 64,
    "image_height_px": 32,
    "grid": {"lower_m": [-6.4, -4.8, -0.8], "upper_m": [6.4, 4.8, 0.8], "voxel_size_m": 0.4},
    "backbone": {"name": "mobilenetv4_conv_small_050", "pretrained": False, "out_indices": [2, 3, 4], "channels": 16},
    "depth": {"bins": {"min_m": 0.5, "max_m": 8.5, "step_m": 1.0}, "context_channels": 6},
    "volume": {"memory_channels": 5, "widths": [12, 16], "blocks": [1, 1]},
    "field": {"channels": 7, "hidden": 8, "layers": 1},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small lose more by waiting for a second thread than they gain, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tables(model: OccFlowNet, height_m: float = 0.5) -> LiftTables:
    cameras = []
    for name, sign in (("front", 1), ("back", -1)):
        ego_from_camera = np.eye(4)
        ego_from_camera[:3, :3] = [[0, 0, sign], [-sign, 0, 0], [0, -1, 0]]
        ego_from_camera[2, 3] = height_m
        cameras.append(Camera(name, 64, 32, np.array([[32.0, 0, 32], [0, 32, 16], [0, 0, 1]]), ego_from_camera))
    return build_lift_tables(CameraRig(tuple(cameras)), model.lift_spec)


def images(batch: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 2, 32, 64, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def model():
    """Random weights whose batch norms have seen a few images."""
    torch.manual_seed(0)
    model = OccFlowNet(ModelConfig.from_dict(SMALL))
    seen = LiftTensors.from_tables([tables(model)] * 4)
    for seed in range(5):
        model(images(4, 100 + seed), seen, torch.eye(4).repeat(4, 1, 1), torch.randn(4, 10, 12, 16).relu())
    return model.eval()


def test_shapes_and_types(model):
    output = model(
        images(2, 0), LiftTensors.from_tables([tables(model)] * 2), torch.eye(4).repeat(2, 1, 1), model.empty_state(2)
    )
    assert output.field.features.shape == (2, 7, 2, 12, 16)
    assert output.field.grid == VoxelGrid((-6.4, -4.8, -0.8), (6.4, 4.8, 0.8), 0.8)
    assert output.seen.depth_logits.shape == (2, 2, 8, 4, 8)
    assert output.seen.class_logits.shape == (2, 2, 17, 4, 8)
    assert output.seen.volume.shape == model.empty_state(2).shape == (2, 5 * 2, 12, 16)
    density, logits = output.field.lattice(model.config.grid)
    assert density.shape == (2, 4, 24, 32)
    assert logits.shape == (2, 17, 4, 24, 32)


@torch.no_grad()
def test_a_batch_is_its_samples_side_by_side(model):
    two = [tables(model, 0.5), tables(model, 0.1)]
    motion = torch.eye(4).repeat(2, 1, 1)
    motion[1, 0, 3] = 1.3
    state = torch.rand(2, 10, 12, 16)
    both = model(images(2, 1), LiftTensors.from_tables(two), motion, state)
    for b in range(2):
        one = model(
            images(2, 1)[b : b + 1], LiftTensors.from_tables(two[b : b + 1]), motion[b : b + 1], state[b : b + 1]
        )
        torch.testing.assert_close(both.field.features[b], one.field.features[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(both.seen.depth_logits[b], one.seen.depth_logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(both.seen.volume[b], one.seen.volume[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_memory_is_the_last_frame_alone(model):
    """The next state does not depend on the state that came in; the field does."""
    calibration = LiftTensors.from_tables([tables(model)])
    fresh = model(images(1, 2), calibration, torch.eye(4)[None], model.empty_state())
    remembering = model(images(1, 2), calibration, torch.eye(4)[None], torch.rand(1, 10, 12, 16))
    torch.testing.assert_close(fresh.seen.volume, remembering.seen.volume)
    torch.testing.assert_close(fresh.seen.volume, model.observe(images(1, 2), calibration).volume)
    assert (fresh.field.features - remembering.field.features).abs().max() > 0.01


@torch.no_grad()
def test_ego_motion_and_calibration_count(model):
    calibration = LiftTensors.from_tables([tables(model)])
    motion = torch.eye(4)[None].clone()
    motion[0, 0, 3] = 1.6
    state = torch.rand(1, 10, 12, 16)
    still = model(images(1, 2), calibration, torch.eye(4)[None], state).field.features
    assert (still - model(images(1, 2), calibration, motion, state).field.features).abs().max() > 0.01
    higher = LiftTensors.from_tables([tables(model, 0.1)])
    assert (still - model(images(1, 2), higher, torch.eye(4)[None], state).field.features).abs().max() > 1e-4


def test_every_weight_gets_a_gradient(model):
    model.train()
    model.zero_grad()
    calibration = LiftTensors.from_tables([tables(model)] * 2)
    output = model(images(2, 3), calibration, torch.eye(4).repeat(2, 1, 1), torch.rand(2, 10, 12, 16))
    density, logits = output.field.lattice()
    results = (density, logits, output.seen.depth_logits, output.seen.class_logits)
    sum(result.square().mean() for result in results).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.eval()
    assert without == []


def test_it_learns_a_scene_by_heart():
    torch.manual_seed(0)
    model = OccFlowNet(ModelConfig.from_dict(SMALL))
    calibration = LiftTensors.from_tables([tables(model)] * 2)
    wanted = torch.zeros(2, 2, 12, 16)
    wanted[0, 0, :, 10:] = 1  # one sample has a wall ahead, the other one behind
    wanted[1, 0, :, :6] = 1
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(100):
        field = model(images(2, 4), calibration, torch.eye(4).repeat(2, 1, 1), model.empty_state(2)).field
        probability = 1 - torch.exp(-0.8 * field.lattice()[0])
        loss = torch.nn.functional.binary_cross_entropy(probability, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@torch.no_grad()
def test_mixed_precision_is_close(model):
    calibration = LiftTensors.from_tables([tables(model)])
    arguments = images(1, 6), calibration, torch.eye(4)[None], torch.rand(1, 10, 12, 16)
    points, batch_index = torch.rand(50, 3) * 4 - 2, torch.zeros(50, dtype=torch.long)
    exact = model(*arguments).field
    expected = exact.lattice()[0], exact.density(points, batch_index)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*arguments).field
        found = mixed.lattice()[0].float(), mixed.density(points, batch_index).float()
    assert mixed.features.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.05)


@torch.no_grad()
def test_the_deployed_form_gives_labels_of_the_lattice(model):
    table = tables(model)
    arrays = [torch.from_numpy(t) for t in (table.pixel_index, table.depth_index, table.depth_weight)]
    field = model(images(1, 5), LiftTensors.from_tables([table]), torch.eye(4)[None], model.empty_state()).field
    density, logits = (t[0].numpy() for t in field.lattice(model.config.grid))
    expected = 1 - np.exp(-0.4 * density)  # [Z, Y, X]
    threshold = float(np.median(expected))
    labels, probability, features, state = DeployedModel(model)(
        images(1, 5)[0], *arrays, torch.eye(4), torch.tensor(threshold), model.empty_state()
    )
    assert labels.dtype == torch.uint8
    assert labels.shape == probability.shape == model.config.grid.shape
    assert state.shape == (1, 10, 12, 16)
    torch.testing.assert_close(features, field.features.movedim(1, -1))  # what queries read
    np.testing.assert_allclose(probability.numpy(), expected.transpose(2, 1, 0), atol=1e-6)
    occupied = (labels != 17).numpy()
    assert 0.4 < occupied.mean() < 0.6
    np.testing.assert_array_equal(occupied, probability.numpy() > np.float32(threshold))
    np.testing.assert_array_equal(labels.numpy()[occupied], logits.argmax(0).transpose(2, 1, 0)[occupied])


def test_configurations_read_back():
    config = ModelConfig.from_dict(SMALL)
    assert config.cameras == ("front", "back")
    assert config.field == FieldConfig(7, 8, 1)
    assert config.backbone == BackboneConfig("mobilenetv4_conv_small_050", False, (2, 3, 4), 16)
    assert config.working_grid.shape == (16, 12, 2)
    plain = yaml.safe_load(yaml.safe_dump(config.to_dict()))
    assert ModelConfig.from_dict(plain) == config
    assert dataclasses.replace(config, backbone=BackboneConfig()).without_download().backbone.pretrained is False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nam": "x"}, "'nam'"),
        ({"depth": {"bin": 1}}, "depth.bin"),
        ({"image_width_px": "wide"}, "image_width_px"),
        ({"field": {"density": "relu"}}, "field.density"),
        ({"grid": {"lower_m": [0, 0, 0], "upper_m": [1, 1, 1], "voxel_size_m": 0.3}}, "choose a size that divides"),
    ],
)
def test_wrong_configurations_are_refused_in_one_sentence(changes, words):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(SMALL | changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "- 1", "data: {}", "model: 3"])
def test_files_without_a_model_section_are_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        ModelConfig.from_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelConfig.from_yaml(tmp_path / "missing.yaml")


def test_image_sizes_that_the_backbone_cannot_halve_are_refused():
    with pytest.raises(ConfigError, match="make both sizes multiples of 32"):
        OccFlowNet(ModelConfig.from_dict(SMALL | {"image_width_px": 80}))
