# SPDX-License-Identifier: Apache-2.0
"""PyTorch, ONNX Runtime and half precision over ten frames: one network, three ways to compute it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from occflownet_core.model import OccFlowNet
from occflownet_core.runtime.comparison import (
    HALF_PRECISION,
    SINGLE_PRECISION,
    EngineInput,
    Parity,
    compare_engines,
)
from occflownet_core.runtime.factory import create_engine
from tests.training import full_networks
from tests.training.full_networks import PAPER, REAL_TIME
from training.export import export, load_model
from training.parity import drive, ring_rig
from training.settings import CONFIG_FOLDER, TrainingConfig

FRAMES = 10
UNTRAINED = Parity(HALF_PRECISION.label_agreement, 0.6)
"""For a network whose loud random weights PyTorch's own half precision differs by 0.5 on."""
ENGINES = {
    "torch": ("torch", "fp32", SINGLE_PRECISION),
    "onnxruntime": ("onnxruntime", "fp32", SINGLE_PRECISION),
    "torch:fp16": ("torch", "fp16", HALF_PRECISION),
    "onnxruntime:fp16": ("onnxruntime", "fp16", HALF_PRECISION),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(name: str, velocity: bool) -> OccFlowNet:
    """A shipped configuration on a small grid and small images, its parts as they are."""
    if name in (PAPER, REAL_TIME):
        config = full_networks.reduced(name)
    else:
        config = TrainingConfig.from_yaml(CONFIG_FOLDER / f"{name}.yaml").model
        grid = dataclasses.replace(config.grid, lower_m=(-8.0, -8.0, -1.0), upper_m=(8.0, 8.0, 5.4))
        config = dataclasses.replace(config, image_width_px=96, image_height_px=64, grid=grid)
    config = dataclasses.replace(config, field=dataclasses.replace(config.field, velocity=velocity))
    model = load_model(config, None, seed=3)
    with torch.no_grad():  # loud enough that probabilities reach from 0 to 1
        model.decoder.density_head[-1].weight *= 4
        model.decoder.semantic_head[-1].weight *= 4
    return model


@pytest.mark.parametrize(
    ("name", "velocity"), [("minicity_tiny", False), ("nuscenes_tiny", True), (REAL_TIME, False), (PAPER, False)]
)
def test_engines_agree_over_ten_frames(name, velocity, tmp_path):
    model = small(name, velocity)
    config = model.config
    bundle, _ = export(model, tmp_path, {"training": "none"}, with_weights=True)
    engines = {label: create_engine(bundle, kind, 1, precision) for label, (kind, precision, _) in ENGINES.items()}
    rig = ring_rig(config)
    inputs = [
        EngineInput(str(i), images, motion if i else None, rig)
        for i, (images, motion) in enumerate(drive(config, FRAMES))
    ]
    threshold = next(iter(compare_engines({"a": engines["torch"]}, inputs[:1])))["a"].largest_magnitude
    for engine in engines.values():
        engine.occupancy_threshold = 0.5 * threshold["occupancy_probability"]
        engine.reset()
    *_, records = compare_engines(engines, inputs)
    for label, (_, precision, tolerance) in ENGINES.items():
        record = records[label]
        if name == REAL_TIME and precision == "fp16":
            tolerance = UNTRAINED
        assert record.first_diverging(tolerance) is None, (label, record.parity)
        assert record.overflow_warnings() == []
        assert len(record.frames) == (0 if label == "torch" else FRAMES)
        if precision == "fp16":
            assert record.parity.probability_error > 1e-5  # it is in half precision indeed
        if velocity and label != "torch":
            assert "velocity" in record.frames[0].largest
