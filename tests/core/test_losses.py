# SPDX-License-Identifier: Apache-2.0
"""Losses against numbers worked out by hand and slow twins."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from occflownet_core import losses
from occflownet_core.errors import ConfigError, GeometryError, OccflownetError
from occflownet_core.labels import FREE
from occflownet_core.lift_tables import DepthBins
from occflownet_core.losses import LossConfig
from occflownet_core.renderer import Rays, RenderConfig, RenderedRays, RenderSamples

NOTHING = LossConfig(range_weight=0, semantic_weight=0)


def samples(rays, start, length, weight) -> RenderSamples:
    real = (torch.tensor(v, dtype=torch.float64) for v in (start, length, weight))
    return RenderSamples(torch.tensor(rays, dtype=torch.long), *real)


def rendered(range_m, logits, opacity) -> RenderedRays:
    none = samples([], [], [], [])
    return RenderedRays(
        torch.tensor(range_m).requires_grad_(),
        torch.tensor(logits).requires_grad_(),
        torch.tensor(opacity).requires_grad_(),
        torch.tensor(range_m),
        none,
    )


def rays(range_m, label, **kwargs) -> Rays:
    return Rays.from_numpy([0, 0, 0], [1, 0, 0], range_m, label, **kwargs)


def test_class_weights_are_log_frequencies_of_mean_one():
    weight = losses.class_weights()
    assert weight.shape == (17,) and weight.mean().item() == pytest.approx(1.0)
    # N = 670,734,599: bicycle log(N / 188,743) = 8.17574, road log(N / 214,411,435) = 1.14048.
    assert (weight[2] / weight[11]).item() == pytest.approx(8.17574 / 1.14048, rel=1e-5)
    assert losses.class_weights((1, 1)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("error", "expected"),
    # Differences of 2 and -0.5 metres.
    [
        ("squared", (4 + 0.25) / 2),
        ("absolute", 1.25),
        ("huber", ((2 - 0.5) + 0.125) / 2),
        ("log", (math.log(2) + math.log(2)) / 2),
    ],
)
def test_range_errors(error, expected):
    found = losses.range_loss(torch.tensor([4.0, 0.5]), torch.tensor([2.0, 1.0]), error=error)
    assert found.item() == pytest.approx(expected)


def test_ray_terms_carry_their_weights_and_leave_out_rays_without_return():
    seen = rendered([3.0, 7.0, 50.0], [[0.0] * 17] * 3, [1.0, 1.0, 0.0])
    labelled = rays([2.0, 10.0, np.inf], [4, 11, FREE])
    terms = losses.ray_losses(seen, labelled, LossConfig(class_weighted=False))
    assert set(terms) == {"range", "semantic"}
    assert terms["range"].item() == pytest.approx(0.05 * (1 + 9) / 2)
    assert terms["semantic"].item() == pytest.approx(math.log(17))
    weight = losses.class_weights()
    weighted = losses.ray_losses(seen, labelled, LossConfig())
    assert weighted["range"].item() == pytest.approx(0.05 * (weight[4] + 9 * weight[11]).item() / 2, rel=1e-5)
    assert weighted["semantic"].item() == pytest.approx(math.log(17) * (weight[4] + weight[11]).item() / 2, rel=1e-5)


def test_range_target_follows_the_render_config():
    seen = rendered([3.0], [[0.0] * 17], [1.0])
    labelled = rays([4.0], [4], axis_cosine=[0.5])
    config = LossConfig(class_weighted=False)
    z = losses.ray_losses(seen, labelled, config, RenderConfig(range_target="camera_z"))
    assert z["range"].item() == pytest.approx(0.05 * (3 - 2) ** 2)


def test_opacity_knows_returns_from_none():
    found = losses.opacity_loss(torch.tensor([0.75, 0.5]), torch.tensor([True, False]))
    assert found.item() == pytest.approx((-math.log(0.75) - math.log(0.5)) / 2)
    sure = losses.opacity_loss(torch.tensor([0.0, 1.0]), torch.tensor([True, False]))
    assert sure.item() == pytest.approx(-math.log(1e-6), rel=1e-2)


def test_free_space_counts_weight_before_the_return():
    # Ray 0 returns at 3 m: middles 0.5, 1.5, 2.5 with a margin of 1 m: the first two; ray 1 never returns: all.
    spent = samples([0, 0, 0, 1], [0, 1, 2, 0], [1, 1, 1, 4], [0.1, 0.2, 0.3, 0.5])
    found = losses.free_space_loss(spent, torch.tensor([3.0, math.inf]).double(), 1.0)
    assert found.item() == pytest.approx((0.1 + 0.2 + 0.5) / 2)


def test_distortion_equals_its_double_sum_in_value_and_gradient():
    generator = torch.Generator().manual_seed(0)
    ray = torch.tensor([0] * 7 + [2] * 5)
    length = torch.rand(12, generator=generator, dtype=torch.float64)
    start = torch.cat([length[:7].cumsum(0) - length[:7], length[7:].cumsum(0) - length[7:]])
    weight = torch.rand(12, generator=generator, dtype=torch.float64).requires_grad_()
    twin = torch.zeros(()).double()
    middle = (start + length / 2) / 2.0
    for i in range(12):
        twin = twin + weight[i] ** 2 * length[i] / 2.0 / 3
        for j in range(12):
            if ray[i] == ray[j]:
                twin = twin + weight[i] * weight[j] * (middle[i] - middle[j]).abs()
    found = losses.distortion_loss(RenderSamples(ray, start, length, weight), rays=3, scale_m=2.0)
    torch.testing.assert_close(found, twin / 3)
    ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in (found, twin / 3))
    torch.testing.assert_close(ours, theirs)


def test_depth_distribution_is_compared_in_its_bins():
    # Bins of 0.5 m from 1 m: 1.6 m is bin 1. 0.9 m and 3 m are in no bin, NaN is no measurement.
    logits = torch.zeros(1, 4, 1, 4)
    logits[0, 1] = math.log(3)  # chance 3 / 6
    depth = torch.tensor([[[1.6, 0.9, 3.0, math.nan]]])
    bins = DepthBins(1.0, 3.0, 0.5)
    assert losses.depth_distribution_loss(logits, depth, bins).item() == pytest.approx(math.log(2))


def voxel_scene():
    """One sample of 2 x 1 x 2 cells: x = 0 holds a car below free, x = 1 road below free; only x = 0 is seen."""
    labels = torch.full((1, 2, 1, 2), FREE)
    labels[0, 0, 0, 0], labels[0, 1, 0, 0] = 4, 11
    mask = torch.zeros(1, 2, 1, 2)
    mask[0, 0] = 1
    density = torch.full((1, 2, 1, 2), math.log(2) / 0.4, requires_grad=True)  # each voxel opaque with chance 1/2
    logits = torch.zeros(1, 17, 2, 1, 2)
    logits[0, 4, 0, 0, 0] = math.log(16)  # chance 1/2 of car where the car is
    return density, logits, labels, mask


def test_voxel_terms_by_hand():
    density, logits, labels, mask = voxel_scene()
    config = LossConfig(class_weighted=False)
    masked = losses.voxel_losses(density, logits, labels, 0.4, mask, config)
    assert masked["occupancy"].item() == pytest.approx(math.log(2))
    assert masked["voxel_semantic"].item() == pytest.approx(math.log(2))
    everywhere = losses.voxel_losses(density, logits, labels, 0.4, None, replace(config, voxel_camera_mask=False))
    assert everywhere["voxel_semantic"].item() == pytest.approx((math.log(2) + math.log(17)) / 2)


def test_occupancy_of_nothing_and_of_everything_stays_finite():
    density = torch.tensor([0.0, 1e6], requires_grad=True)
    loss = losses.occupancy_loss(density, torch.tensor([True, True]), 0.4)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(density.grad).all()


def test_voxel_terms_refuse_what_does_not_fit():
    density, logits, labels, mask = voxel_scene()
    with pytest.raises(GeometryError, match="need mask_camera"):
        losses.voxel_losses(density, logits, labels, 0.4, None, LossConfig())
    with pytest.raises(GeometryError, match=r"3D labels have shape \(1, 2, 2, 1\)"):
        losses.voxel_losses(density, logits, labels.transpose(2, 3), 0.4, mask, LossConfig())


def test_nothing_to_compare_is_zero_with_a_graph():
    seen = rendered([1.0], [[0.0] * 17], [0.0])
    everything = LossConfig(opacity_weight=1, free_space_weight=1, distortion_weight=1)
    terms = losses.ray_losses(seen, rays([np.inf], [FREE]), everything)
    assert terms["range"].item() == 0 and terms["semantic"].item() == 0
    sum(terms.values()).backward()
    none = rendered([0.0], [[0.0] * 17], [0.0])
    none = RenderedRays(none.range_m[:0], none.logits[:0], none.opacity[:0], none.far_m[:0], none.samples)
    assert sum(losses.ray_losses(none, Rays.empty(), everything).values()).item() == 0
    assert losses.ray_losses(seen, rays([1.0], [0]), NOTHING) == {}


def test_flow_priors():
    velocity = torch.zeros(1, 3, 1, 1, 3)
    velocity[0, 0, 0, 0] = torch.tensor([0.0, 3.0, 3.0])
    # Only x has neighbours: differences 3, 0 in one of three components.
    assert losses.flow_smoothness_loss(velocity).item() == pytest.approx(3 / 6)
    logits = torch.zeros(1, 17, 1, 1, 3)
    logits[0, 15, ..., 1] = 50.0  # surely a wall, at 3 m/s
    logits[0, 4, ..., 2] = 50.0  # surely a car
    assert losses.static_flow_loss(velocity, logits).item() == pytest.approx(3 / 3, rel=1e-2)


def test_velocity_at_rest_has_a_finite_gradient():
    velocity = torch.zeros(1, 3, 1, 1, 3, requires_grad=True)
    losses.static_flow_loss(velocity, torch.zeros(1, 17, 1, 1, 3)).backward()
    assert torch.isfinite(velocity.grad).all()


def test_a_loss_that_is_no_number_is_named():
    fine = {"range": torch.tensor(1.0), "semantic": torch.tensor(2.0)}
    losses.require_finite(fine)
    losses.require_finite({})
    with pytest.raises(OccflownetError, match="semantic = nan") as caught:
        losses.require_finite({**fine, "semantic": torch.tensor(float("nan"))})
    assert caught.value.terms == ("semantic",)


def test_labels_without_logit_are_refused():
    with pytest.raises(GeometryError, match="label 17 has no logit among 17"):
        losses.semantic_loss(torch.zeros(1, 17), torch.tensor([17]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"range_error": "cubic"}, "loss.range_error is 'cubic'"),
        ({"range_weight": -1.0}, "loss.range_weight is -1.0"),
        ({"opacity_weight": float("nan")}, "loss.opacity_weight is nan"),
        ({"huber_m": 0.0}, "loss.huber_m is 0.0"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**changes)


def test_return_loss_is_the_likelihood_of_the_return():
    # Two rays with weights 0.2, 0.5, 0.3 in [0, 1), [1, 2), [2, 3), and one without a return.
    three = samples([0, 0, 0, 1, 1, 1, 2], [0, 1, 2, 0, 1, 2, 0], [1] * 7, [0.2, 0.5, 0.3, 0.2, 0.5, 0.3, 0.9])
    three.weight.requires_grad_()
    range_m = torch.tensor([1.5, 1.9, math.inf], dtype=torch.float64)
    # 0.2 m around 1.5 lies in the second interval; around 1.9, in the second and the third.
    loss = losses.return_loss(three, range_m, None, 0.2)
    assert loss.item() == pytest.approx((-math.log(0.5) - math.log(0.8)) / 2)
    loss.backward()
    assert three.weight.grad.tolist() == pytest.approx([0, -1 / 0.5 / 2, 0, 0, -1 / 0.8 / 2, -1 / 0.8 / 2, 0])
    weighted = losses.return_loss(three, range_m, torch.tensor([2.0, 1.0]), 0.2)
    assert weighted.item() == pytest.approx((-2 * math.log(0.5) - math.log(0.8)) / 2)


def test_return_loss_tells_a_wall_from_a_haze_of_the_same_range():
    # Half before, half behind: the range is right, the place is not.
    haze, wall = (samples([0, 0, 0], [0, 4, 8], [2, 2, 2], weight) for weight in ([0.5, 0, 0.5], [0, 1, 0]))
    at = torch.tensor([5.0], dtype=torch.float64)
    assert losses.return_loss(wall, at, None, 0.2).item() == 0
    assert losses.return_loss(haze, at, None, 0.2).item() == pytest.approx(math.log(1e4))


def test_return_loss_is_a_term_where_it_weighs_something():
    ray = rays([1.5], [4])
    seen = replace(rendered([1.5], [[0.0] * 17], [1.0]), samples=samples([0, 0], [0, 1], [1, 1], [0.5, 0.5]))
    config = replace(NOTHING, return_weight=2.0, class_weighted=False)
    assert losses.ray_losses(seen, ray, config)["return"].item() == pytest.approx(2 * math.log(2))
    assert "return" not in losses.ray_losses(seen, ray, NOTHING)
