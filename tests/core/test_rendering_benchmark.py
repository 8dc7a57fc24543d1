# SPDX-License-Identifier: Apache-2.0
"""The rendering benchmark's own parts: its street, its twin, its measurement, and what it refuses."""

import json

import numpy as np
import pytest
import torch

from benchmarks import rendering
from occflownet_core.labels import label_of
from occflownet_core.renderer import RenderConfig, render
from occflownet_core.voxel_field import VoxelField


@pytest.fixture(scope="module")
def street_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("street") / "field.npz"
    density, logits = rendering.street()
    np.savez(path, density=density, logits=logits)
    return path


def test_the_street_has_a_road_that_rays_end_on(street_file):
    density, logits = rendering.load_field(street_file)
    road = (density[2, :, :] > 5) & (logits[:, 2].argmax(axis=0) == label_of("driveable_surface"))
    assert road[100].mean() > 0.9  # along the vehicle's own lane, 0.2 m below the ground
    assert density[12, 100, 100] < 0.02


def test_twin_and_traversal_agree(street_file):
    density, logits = (torch.from_numpy(a)[None] for a in rendering.load_field(street_file))
    rays = rendering.lidar_rays(3)
    seen = render(VoxelField(density, logits, rendering.GRID), rays, rendering.GRID, config=RenderConfig())
    twin = rendering.twin_range_m(density[0].numpy(), rays, "nearest")
    torch.testing.assert_close(seen.range_m.double(), twin, atol=0.01, rtol=0)


def test_a_variant_is_measured(street_file):
    result = rendering.measure("traversal", street_file, count=500, repeats=1, threads=1)
    assert result["seconds"] > 0 and result["peak_mb"] > 0 and result["samples"] > 500
    assert len(result["range_m"]) == rendering.TWIN_RAYS
    json.dumps(result)


def test_the_floor_by_hand():
    # 1 million crossings x 4 x 68 bytes + 640,000 cells x 6 x 68 bytes = 0.53312 GB, at 10 GB/s.
    assert rendering.floor_seconds(1_000_000, rendering.GRID, 10.0) == pytest.approx(0.053312)


def test_a_wrong_field_is_refused_in_one_sentence(tmp_path, capsys):
    assert rendering.main(["--field", str(tmp_path / "none.npz")]) == 2
    assert "cannot read a field from" in capsys.readouterr().err
    np.savez(tmp_path / "small.npz", density=np.zeros((2, 2, 2)), logits=np.zeros((17, 2, 2, 2)))
    assert rendering.main(["--field", str(tmp_path / "small.npz")]) == 2
    assert "expected (16, 200, 200)" in capsys.readouterr().err
