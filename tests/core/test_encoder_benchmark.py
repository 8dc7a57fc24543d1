# SPDX-License-Identifier: Apache-2.0
"""The counts of full-size networks: by hand where it can be done, and what must add up."""

import pytest
import torch
from torch import nn

from benchmarks.encoder import PARTS, KeptBytes, count, model_config, parameters_of_parts
from occflownet_core.model import OccFlowNet


@pytest.fixture(scope="module")
def fast():
    """The real-time network; the published one takes longer and is counted alike."""
    return count(model_config("nuscenes_r50_256x704"))


def test_every_parameter_is_in_one_part(fast):
    with torch.device("meta"):
        model = OccFlowNet(model_config("nuscenes_r50_256x704").without_download())
    assert sum(fast.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert parameters_of_parts(model) == fast.parameters


def test_resnet_50_has_its_published_size(fast):
    """23.5 M parameters without its classifier; 4.1 G multiplications at 224 x 224 px, here six images of 3.59 times that."""
    assert fast.parameters["backbone"] == 25_557_032 - 2048 * 1000 - 1000
    assert fast.gflop["backbone"] == pytest.approx(2 * 4.09 * 6 * (256 * 704) / 224**2, rel=0.01)


def test_the_frame_block_is_one_convolution(fast):
    """3 x 3, from 16 heights x 16 channels to 16 x 8, over 200 x 200 cells: 2 x 9 x 256 x 128 x 40,000."""
    assert fast.gflop["frame block"] == pytest.approx(2 * 9 * 256 * 128 * 40_000 / 1e9)


def test_memory_between_frames_is_one_volume(fast):
    assert fast.memory_mb == pytest.approx(8 * 16 * 200 * 200 * 4 / 1e6)


def test_all_parts_together_are_the_whole(fast):
    assert set(fast.gflop) == set(PARTS)
    assert 2 * sum(fast.gflop.values()) == pytest.approx(fast.backward_gflop, rel=0.02)
    assert fast.kept_checkpointed_gb < 0.6 * fast.kept_gb


def test_kept_bytes_are_those_of_storages_once():
    """Of relu(x W) summed, W's product keeps x, relu its result: 4 x (100 + 50) bytes; views of them are nothing new."""
    with torch.device("meta"):
        layer, x = nn.Linear(10, 5, bias=False), torch.zeros(10, 10)
    kept = KeptBytes(layer.parameters())
    with kept:
        result = layer(x).relu()
        result.view(-1).square().sum()
    assert kept.total == 4 * (100 + 50)
