# SPDX-License-Identifier: Apache-2.0
"""The training step and its objective, on a world of two walls."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
from windows import FAR_M, FAR_WALL, NEAR_M, WALL, Walls, small_config  # noqa: E402

from occflownet_core.boxes import MovingBoxes  # noqa: E402
from occflownet_core.errors import ConfigError, DatasetError, TrainingError  # noqa: E402
from occflownet_core.motion import BoxFlow, DynamicFilter, LearnedFlow, StaticWorld  # noqa: E402
from occflownet_core.renderer import Rays, render  # noqa: E402
from training.data.batch import collate  # noqa: E402
from training.module import OccupancyLearner, learning_rate_factor  # noqa: E402
from training.objective import TimedMotion, draw_rays, make_motion  # noqa: E402
from training.settings import MotionSettings, OptimizerSettings  # noqa: E402


def learner_and_window(tmp_path, **sections):
    torch.manual_seed(0)
    learner = OccupancyLearner(small_config(tmp_path, **sections))
    walls = Walls(learner.model.lift_spec)
    return learner, collate([walls[0], walls[1]])


@pytest.mark.parametrize(
    ("kind", "terms"),
    [
        ("2d", {"range", "semantic", "depth"}),
        ("3d", {"occupancy", "voxel_semantic", "depth"}),
        ("2d3d", {"range", "semantic", "occupancy", "voxel_semantic", "depth"}),
    ],
)
def test_supervision_chooses_the_terms(tmp_path, kind, terms):
    learner, window = learner_and_window(tmp_path, supervision={"kind": kind})
    losses = learner.objective(learner(window), window[-1], learner.step_generator(0))
    assert set(losses) == terms
    assert all(loss.requires_grad and loss > 0 for loss in losses.values())


@pytest.mark.parametrize("kind", ["2d", "3d", "2d3d"])
def test_learns_how_far_the_walls_are_and_what_they_are(tmp_path, kind):
    learner, window = learner_and_window(tmp_path, supervision={"kind": kind})
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    for step in range(60):
        losses = learner.objective(learner(window), window[-1], learner.step_generator(step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    ahead = torch.tensor([[1.0, 0.0, 0.0]])
    for sample, (distance_m, label) in enumerate([(NEAR_M, WALL), (FAR_M, FAR_WALL)]):
        ray = Rays.from_numpy([[0.0, 0.0, 0.0]], ahead.numpy(), [distance_m], [label], batch_index=sample)
        seen = render(learner(window).field, ray, learner.config.model.grid)
        assert seen.range_m.item() == pytest.approx(distance_m, abs=0.8)
        assert seen.logits.argmax().item() == label


VELOCITY = {
    "model": {"field": {"channels": 8, "hidden": 16, "layers": 1, "velocity": True}},
    "motion": {"kind": "learned"},
    "losses": {"flow_smoothness_weight": 0.1, "static_flow_weight": 0.1, "box_velocity_weight": 0.1},
}


def test_velocity_learns_from_neighbour_frames_and_boxes(tmp_path):
    """The near wall's left half is in a box that does 2 m/s to the left: its cells learn that, the far wall rests."""
    learner, window = learner_and_window(tmp_path, **VELOCITY)
    now, then = np.eye(4), np.eye(4)
    now[:3, 3], then[:3, 3] = (NEAR_M, 2, 0), (NEAR_M, 3, 0)
    box = MovingBoxes.from_numpy(now[None], then[None], np.array([[2.0, 2.0, 2.0]]), np.array([4]), np.array([1]))
    rays = window[-1].rays
    batch = dataclasses.replace(window[-1], boxes=box, rays=dataclasses.replace(rays, time_index=rays.time_index + 1))
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    first = None
    for step in range(40):
        output = learner([window[0], batch])
        losses = learner.objective(output, batch, learner.step_generator(step))
        first = first or {name: loss.item() for name, loss in losses.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert {"flow_smoothness", "static_flow", "box_velocity", "range"} <= set(losses)
    # At rest the error is that of 2 m/s.
    assert first["box_velocity"] == pytest.approx(0.1 * ((4 + 0.01) ** 0.5 - 0.1), rel=1e-4)
    assert losses["box_velocity"] < 0.5 * first["box_velocity"] and losses["range"] < first["range"]
    assert all(p.grad.abs().sum() > 0 for p in learner.model.decoder.velocity_head.parameters())


def test_learned_flow_without_velocity_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"set model\.field\.velocity: true"):
        small_config(tmp_path, motion={"kind": "learned"})


def test_memory_is_dropped_where_it_should_be(tmp_path):
    learner, window = learner_and_window(tmp_path)
    learner.eval()
    both = learner(window)
    none = learner(window, torch.tensor([False, False]))
    first = learner(window, torch.tensor([True, False]))
    assert torch.equal(none.field.features, learner(window[-1:]).field.features)
    assert torch.allclose(first.field.features[0], both.field.features[0], atol=1e-5)
    assert torch.allclose(first.field.features[1], none.field.features[1], atol=1e-5)
    assert not torch.allclose(both.field.features[1], none.field.features[1], atol=1e-3)


def test_memory_gets_no_gradient(tmp_path):
    learner, window = learner_and_window(tmp_path)
    memory_images = window[0].images.float().requires_grad_()
    window[0] = dataclasses.replace(window[0], images=memory_images)
    learner(window).field.features.sum().backward()
    assert memory_images.grad is None


def test_nan_stops_with_the_tokens_saved(tmp_path):
    learner, window = learner_and_window(tmp_path)
    torch.nn.init.constant_(learner.model.depth_net.head.bias, math.nan)
    with pytest.raises(TrainingError, match=r"step 0: loss is not finite: .*depth = nan.*bad_batch.json"):
        learner.training_step(window, 0)
    notes = json.loads((tmp_path / "bad_batch.json").read_text())
    assert notes["tokens"] == ["token-0", "token-1"] and "depth" in notes["terms"]


def test_no_rays_at_all_is_no_error(tmp_path):
    learner, window = learner_and_window(tmp_path)
    window[-1] = dataclasses.replace(window[-1], rays=Rays.empty())
    losses = learner.objective(learner(window), window[-1], learner.step_generator(0))
    assert losses["range"].item() == 0 and losses["semantic"].item() == 0
    sum(losses.values()).backward()


def test_missing_rays_and_boxes_are_named(tmp_path):
    learner, window = learner_and_window(tmp_path)
    output = learner(window)
    for name, sentence in (("rays", "came without rays"), ("boxes", "came without boxes")):
        with pytest.raises(DatasetError, match=sentence):
            learner.objective(output, dataclasses.replace(window[-1], **{name: None}), learner.step_generator(0))


def test_motion_by_name(tmp_path):
    learner, window = learner_and_window(tmp_path, model=VELOCITY["model"])
    field = learner(window).field
    kinds = {"static": StaticWorld, "filter": DynamicFilter, "box_flow": BoxFlow, "learned": LearnedFlow}
    assert {
        k: type(make_motion(MotionSettings(kind=k), window[-1].boxes, field.grid, field.velocity_lattice()))
        for k in kinds
    } == kinds


def test_timed_motion_answers_as_the_motion_does():
    rays = Rays.from_numpy([[0.0, 0, 0]] * 2, [[1.0, 0, 0]] * 2, [2.0, 3.0], [4, 11], time_index=1)
    timed = TimedMotion(DynamicFilter())
    assert timed.keeps(rays, None).tolist() == [False, True]
    assert timed.seconds > 0


def test_drawn_rays_keep_the_share_of_the_current_keyframe():
    def rays(count, time_index):
        return Rays.from_numpy([[0.0, 0, 0]] * count, [[1.0, 0, 0]] * count, [2.0] * count, [4] * count, time_index)

    generator = torch.Generator().manual_seed(0)
    pool = Rays.cat([rays(100, 0), rays(300, 1), rays(300, -1)])
    drawn = draw_rays(pool, 80, 0.25, generator)
    assert len(drawn) == 80 and int((drawn.time_index == 0).sum()) == 20
    assert len(draw_rays(pool, 80, None, generator)) == 80
    assert len(draw_rays(pool, 10_000, 0.25, generator)) == 700
    # Too few current rays: the neighbours fill up.
    assert len(draw_rays(Rays.cat([rays(5, 0), rays(300, 1)]), 80, 0.5, generator)) == 80


def test_random_numbers_depend_on_seed_batch_and_process(tmp_path):
    learner, _ = learner_and_window(tmp_path)
    draws = [torch.rand(3, generator=learner.step_generator(step)).tolist() for step in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    constant = OptimizerSettings(warmup_steps=10)
    assert [learning_rate_factor(constant, step, 0) for step in (0, 4, 9, 500)] == pytest.approx([0.1, 0.5, 1, 1])
    cosine = OptimizerSettings(warmup_steps=10, schedule="cosine", final_fraction=0.1)
    # Half-way the cosine is at 0.1 + 0.9 / 2; a third of the way at 0.1 + 0.9 * 3 / 4.
    assert learning_rate_factor(cosine, 500, 0.5) == pytest.approx(0.55)
    assert learning_rate_factor(cosine, 500, 1 / 3) == pytest.approx(0.775)
    assert learning_rate_factor(cosine, 500, 1.0) == pytest.approx(0.1)
    assert math.isclose(learning_rate_factor(cosine, 4, 0.0), 0.5)


def test_biases_and_norms_do_not_decay(tmp_path):
    learner, _ = learner_and_window(tmp_path)
    learner._trainer = None
    matrices = sum(p.ndim > 1 for p in learner.model.parameters())
    groups = learner.parameter_groups()
    assert [group["weight_decay"] for group in groups] == [1e-2, 0.0]
    assert len(groups[0]["params"]) == matrices
    assert sum(len(group["params"]) for group in groups) == len(list(learner.model.parameters()))
