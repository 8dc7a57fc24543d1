# SPDX-License-Identifier: Apache-2.0
"""Learning through surfaces: a network on two walls, a voxel field on one, the shipped configuration."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
from windows import FAR_M, FAR_WALL, NEAR_M, WALL, WallData, Walls, small_config  # noqa: E402

from benchmarks import surface  # noqa: E402
from occflownet_core.errors import ConfigError  # noqa: E402
from occflownet_core.grid import VoxelGrid  # noqa: E402
from occflownet_core.motion import StaticWorld  # noqa: E402
from occflownet_core.renderer import Rays, RenderConfig, render  # noqa: E402
from training import fit as fit_module  # noqa: E402
from training.data.batch import collate  # noqa: E402
from training.fit import fit  # noqa: E402
from training.module import OccupancyLearner  # noqa: E402
from training.settings import TrainingConfig  # noqa: E402
from training.voxel_fitting import SURFACE_RECIPE, FitSettings, fit_voxels  # noqa: E402

CONFIGS = Path(fit_module.__file__).parent / "configs"
SURFACE = RenderConfig(method="surface")
SECTIONS = {
    "rendering": {"method": "surface", "surface_steps": 64, "surface_first_steps": 16, "surface_length_m": 1.0},
    "losses": {"free_point_weight": 1.0, "occupied_point_weight": 1.0, "point_semantic_weight": 1.0},
}


def test_a_network_learns_how_far_the_walls_are_and_what_they_are(tmp_path):
    torch.manual_seed(0)
    learner = OccupancyLearner(small_config(tmp_path, **SECTIONS))
    walls = Walls(learner.model.lift_spec)
    window = collate([walls[0], walls[1]])
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    for step in range(60):
        learner.objective.done = step / 60
        losses = learner.objective(learner(window), window[-1], learner.step_generator(step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert set(losses) == {"range", "semantic", "free_point", "occupied_point", "point_semantic", "depth"}
    for sample, (distance_m, label) in enumerate([(NEAR_M, WALL), (FAR_M, FAR_WALL)]):
        ray = Rays.from_numpy([[0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]], [distance_m], [label], batch_index=sample)
        seen = render(learner(window).field, ray, learner.config.model.grid, config=learner.config.rendering)
        assert seen.range_m.item() == pytest.approx(distance_m, abs=0.5)
        assert seen.logits.argmax().item() == label


def test_a_run_makes_its_steps_finer(tmp_path, monkeypatch):
    asked = []
    config = small_config(tmp_path, **SECTIONS)
    monkeypatch.setattr(RenderConfig, "at", lambda self, done: asked.append(done) or self)
    fit(config, None, WallData)
    assert asked == [0.0, 0.25, 0.5, 0.75]


def test_a_voxel_field_ends_rays_where_they_returned():
    # Rays along x through 2 x 2 m meet a wall 6.3 m ahead: free before, so nothing may stop them earlier.
    random = np.random.default_rng(0)
    grid = VoxelGrid((0, 0, 0), (10, 4, 4), 0.4)
    origin = np.stack([np.full(600, 0.5), *random.uniform(1, 3, (2, 600))], axis=1)
    rays = Rays.from_numpy(origin, np.tile([1.0, 0, 0], (600, 1)), np.full(600, 6.3), np.full(600, 15))
    settings = FitSettings(steps=60, rays_per_step=400, current_share=None)
    fitted = fit_voxels(rays[:500], StaticWorld(), grid, settings, SURFACE_RECIPE, SURFACE)
    seen = render(fitted.field, rays[500:], grid, config=SURFACE)
    assert (seen.range_m - 6.3).abs().max() < 0.3
    assert (seen.logits.argmax(dim=1) == 15).all()


def test_the_shipped_configuration_trains_through_surfaces():
    config = TrainingConfig.from_yaml(CONFIGS / "minicity_tiny_surface.yaml")
    base = TrainingConfig.from_yaml(CONFIGS / "minicity_tiny.yaml")
    assert (config.model, config.optimizer, config.data) == (base.model, base.optimizer, base.data)
    assert config.rendering.method == "surface"
    # What it adds of its own is the network's: depth and class of pixels.
    assert replace(config.losses, depth_weight=0.05, image_semantic_weight=0.0) == SURFACE_RECIPE


def test_losses_that_surfaces_cannot_have_are_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"loss.opacity_weight is 0.2, and surfaces have no weights"):
        small_config(tmp_path, rendering={"method": "surface"}, losses={"opacity_weight": 0.2})


def test_errors_of_held_out_rays_by_hand():
    rays = Rays.from_numpy([0, 0, 0], [1, 0, 0], [2.0, 3.0, 4.0, 5.0, np.inf, np.inf], [4, 4, 4, 4, 17, 17])
    errors = surface.range_errors(torch.tensor([2.1, 3.3, 4.7, np.inf, 7.0, np.inf]), rays)
    # 0.1, 0.3, 0.7 and a miss; of two rays without return one hits something.
    assert errors["within"] == [0.25, 0.5, 0.75]
    assert errors["median_m"] == pytest.approx(0.7) and errors["p90_m"] == np.inf
    assert errors["missed"] == 0.25 and errors["hit_nothing"] == 0.5


def test_a_step_of_every_method_is_measured(tmp_path):
    density, logits = surface.street()
    np.savez(tmp_path / "field.npz", density=density, logits=logits)
    kept = {
        key: surface.measure_step(key, tmp_path / "field.npz", 300, 1, 1)["stored_mb"] for key in ("sampled", "surface")
    }
    assert 0 < kept["surface"] < kept["sampled"] / 4


def test_figures_are_ratios_to_volumes_and_of_fits_only_where_there_are_any(capsys):
    steps = {
        key: {"cpu_seconds": s, "peak_mb": mb, "stored_mb": mb / 2}
        for key, s, mb in (("sampled", 8.0, 1000.0), ("traversal", 0.4, 200.0), ("surface", 0.6, 100.0))
    }
    found = surface.figures({**steps, "points": {}})
    assert [(f.name, f.ratio) for f in found[:3]] == [
        ("share of peak memory", pytest.approx(0.1 / surface.MOST_MEMORY)),
        ("peak memory", pytest.approx(0.1)),
        ("peak memory", pytest.approx(0.5)),
    ]
    surface.show({**steps, "points": {}})
    said = capsys.readouterr().out
    assert "8,000" in said and "held-out" not in said
    errors = {"median_m": 0.1, "p90_m": 1.0, "within": [0.5, 0.6, 0.7], "missed": 0.0, "hit_nothing": 0.1}
    fits = {"surface": errors, "median": errors, "steps_per_cpu_second": 2.0}
    both = {key: {**steps.get(key, {}), **fits} for key in surface.METHODS}
    assert [f.name for f in surface.figures(both)[6:]] == ["median error", "within 0.4 m"]
    surface.show(both)
    assert "held-out" in capsys.readouterr().out


def test_the_benchmark_refuses_in_one_sentence(tmp_path, capsys):
    assert surface.main(["--measure", "surface", "--dataroot", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.surface: ") and len(error.splitlines()) == 1
