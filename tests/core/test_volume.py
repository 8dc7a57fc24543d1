# SPDX-License-Identifier: Apache-2.0
"""Rendering by samples: equations by hand, values and gradients against tiny steps, and the config's switches."""

import math
from dataclasses import replace

import pytest
import torch

from occflownet_core.errors import ConfigError
from occflownet_core.grid import VoxelGrid
from occflownet_core.interpolate import trilinear
from occflownet_core.renderer import Rays, RenderConfig, range_target, render
from occflownet_core.renderer.volume import alpha, transmittance, weights
from occflownet_core.voxel_field import VoxelField
from tests.core.rendering_twins import SMALL_GRID, exit_m, random_field, random_rays, render_by_tiny_steps

SAMPLED = RenderConfig(method="sampled")
FINE = replace(SAMPLED, proposal_samples=400, importance_samples=800)


def test_equations_by_hand():
    density, length = torch.tensor([math.log(2), math.log(2), 100.0]), torch.tensor([1.0, 1.0, 1.0])
    assert alpha(density, length).tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert transmittance(density, length).tolist() == pytest.approx([1.0, 0.5, 0.25])
    assert weights(density, length).tolist() == pytest.approx([0.5, 0.25, 0.25])


def row_field(density: list[float], **kwargs) -> VoxelField:
    grid = VoxelGrid((0, 0, 0), (4, 1, 1), 1.0)
    logits = torch.eye(4).double().view(1, 4, 1, 1, 4)
    return VoxelField(torch.tensor(density).double().view(1, 1, 1, 4), logits, grid, **kwargs)


def along_x(**kwargs) -> Rays:
    return Rays.from_numpy([[0, 0.5, 0.5]], [[1, 0, 0]], [2.0], [0], dtype=torch.float64, **kwargs)


def test_samples_by_hand():
    # Two samples at 1 and 3 m, 2 m each; the nearest cells have density ln 2 / 2 and nothing.
    field = row_field([0, math.log(2) / 2, 0, 0], interpolation="nearest")
    config = replace(SAMPLED, sampled_field="continuous", proposal_samples=2, importance_samples=0)
    seen = render(field, along_x(), field.grid, config=config)
    assert seen.opacity.item() == pytest.approx(0.5)
    assert seen.range_m.item() == pytest.approx(0.5 * 1 + 0.5 * 4)
    assert seen.logits.tolist() == [pytest.approx([0, 0.5, 0, 0])]
    dropped = render(field, along_x(), field.grid, config=replace(config, remainder="dropped"))
    assert dropped.range_m.item() == pytest.approx(0.5)


def loss_of(range_m, logits, opacity):
    mix = torch.arange(1.0, len(range_m) + 1).double()
    return (mix * range_m).sum() + (logits.square() * mix[:, None]).sum() + (mix * opacity.square()).sum()


def test_values_and_gradients_approach_the_tiny_step_twin():
    rays, field = random_rays(10, seed=3, reach_m=1.0), random_field(seed=3)
    parameters = (field.density_lattice, field.logits_lattice)
    zero = torch.zeros(20_000, dtype=torch.long)
    rows = [
        render_by_tiny_steps(
            lambda p: trilinear(field.density_lattice[:, None], SMALL_GRID, p, zero)[:, 0],
            lambda p: trilinear(field.logits_lattice, SMALL_GRID, p, zero),
            origin,
            direction,
            exit_m(origin, direction, SMALL_GRID),
        )
        for origin, direction in zip(rays.origin_m, rays.direction, strict=True)
    ]
    twin = [torch.stack(column) for column in zip(*rows, strict=True)]
    seen = render(field, rays, SMALL_GRID, config=FINE)
    for ours, theirs in zip((seen.range_m, seen.logits, seen.opacity), twin, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    ours = torch.autograd.grad(loss_of(seen.range_m, seen.logits, seen.opacity), parameters)
    for a, b in zip(ours, torch.autograd.grad(loss_of(*twin), parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


def test_more_samples_come_closer():
    rays, field = random_rays(100, seed=4), random_field(seed=4)
    fine = render(field, rays, SMALL_GRID, config=FINE).range_m
    few, published = (
        (render(field, rays, SMALL_GRID, config=config).range_m - fine).abs().mean()
        for config in (replace(SAMPLED, proposal_samples=6, importance_samples=6), SAMPLED)
    )
    assert published < 0.01 and few > 5 * published


def test_samples_of_the_constant_field_approach_traversal():
    rays, field = random_rays(100, seed=4), random_field(seed=4, interpolation="nearest")
    exact = render(field, rays, SMALL_GRID, config=RenderConfig(min_transmittance=0))
    seen = render(field, rays, SMALL_GRID, config=replace(FINE, sampled_field="continuous"))
    torch.testing.assert_close(seen.range_m, exact.range_m, atol=1e-2, rtol=0)
    torch.testing.assert_close(seen.logits, exact.logits, atol=2e-2, rtol=0)


def test_published_alignment_moves_what_is_seen_half_a_voxel_at_the_border():
    # The last cell's values lie at x = 3.5, or, stretched, at x = 4: the wall of density appears later.
    field = row_field([0, 0, 0, 1e3])
    centred, stretched = (
        render(field, along_x(), field.grid, config=replace(FINE, alignment=a)).range_m.item()
        for a in ("centres", "edges")
    )
    # Density rises from cell 2's value place, 2.5 m, or from 2/3 of 4 m.
    assert 2.5 < centred < 2.6 and 8 / 3 < stretched < 8 / 3 + 0.1


def test_importance_samples_alone():
    field = random_field()
    seen = render(field, random_rays(5), SMALL_GRID, config=replace(SAMPLED, keep_proposal_samples=False))
    assert len(seen.samples.ray) == 5 * 100
    assert len(render(field, random_rays(5), SMALL_GRID, config=SAMPLED).samples.ray) == 5 * 150


def test_stratified_samples_repeat_with_their_generator():
    field, rays, config = random_field(), random_rays(20), replace(SAMPLED, stratified=True)
    first, again, other = (
        render(field, rays, SMALL_GRID, config=config, generator=torch.Generator().manual_seed(s)).range_m
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_miss_sees_nothing_and_breaks_no_gradient():
    field = random_field()
    rays = Rays.from_numpy([[9, 9, 9]], [[1, 0, 0]], [1.0], [0], dtype=torch.float64)
    for chosen in (rays, rays[:0]):
        seen = render(field, chosen, SMALL_GRID, config=SAMPLED)
        assert (seen.range_m == 0).all() and (seen.opacity == 0).all()
        (seen.range_m.sum() + seen.logits.sum()).backward()
    assert torch.isfinite(field.density_lattice.grad).all()


def test_range_is_compared_with_range_unless_the_published_habit_is_asked_for():
    rays = along_x(axis_cosine=[0.5])
    assert range_target(rays, RenderConfig()).tolist() == [2.0]
    assert range_target(rays, RenderConfig(range_target="camera_z")).tolist() == [1.0]
    with pytest.raises(ConfigError, match="no axis_cosine"):
        range_target(along_x(), RenderConfig(range_target="camera_z"))


@pytest.mark.parametrize("method", ["traversal", "sampled"])
def test_half_precision_ends_with_the_lattice(method):
    field, rays = random_field(), random_rays(30)
    half = VoxelField(field.density_lattice.bfloat16(), field.logits_lattice.bfloat16(), SMALL_GRID)
    whole = VoxelField(half.density_lattice.float(), half.logits_lattice.float(), SMALL_GRID)
    single = Rays(rays.origin_m.float(), rays.direction.float(), rays.range_m.float(), *[rays.label] * 4)
    config = RenderConfig(method=method)
    with torch.autocast("cpu", torch.bfloat16):
        seen = render(half, single, SMALL_GRID, config=config)
        (seen.range_m.sum() + seen.logits.square().sum()).backward()
    expected = render(whole, single, SMALL_GRID, config=config)
    assert torch.equal(seen.range_m, expected.range_m) and torch.equal(seen.logits, expected.logits)
    assert field.density_lattice.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "splat"}, "render.method is 'splat'; choose traversal, sampled or surface"),
        ({"remainder": "?"}, "render.remainder"),
        ({"proposal_samples": 1}, "1 proposal and 100 importance"),
        ({"min_transmittance": 1.0}, "render.min_transmittance is 1.0"),
        ({"min_weight": float("nan")}, "render.min_weight is nan"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        RenderConfig(**changes)
