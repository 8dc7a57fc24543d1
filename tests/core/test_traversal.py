# SPDX-License-Identifier: Apache-2.0
"""Exact traversal: crossings against sorted face planes, rendering against hand-worked cases and slow twins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occflownet_core.errors import GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.interpolate import nearest
from occflownet_core.motion import StaticWorld
from occflownet_core.renderer import Rays, RenderConfig, render
from occflownet_core.renderer.packed import bag_logits, integrate
from occflownet_core.renderer.traversal import traverse
from occflownet_core.voxel_field import VoxelField
from tests.core.rendering_twins import (
    SMALL_GRID,
    crossings_by_sorting,
    exit_m,
    random_field,
    random_rays,
    render_by_sorting,
    render_by_tiny_steps,
)

CUBE = VoxelGrid((0, 0, 0), (4, 4, 4), 1.0)
EXACT = RenderConfig(min_transmittance=0.0, min_weight=0.0)
DIAGONAL = math.sqrt(0.5)


def one_ray(origin, direction) -> Rays:
    return Rays.from_numpy([origin], [direction], [1.0], [0], dtype=torch.float64)


def cells_of(rays: Rays, grid: VoxelGrid = CUBE) -> list[list[tuple[tuple, float, float]]]:
    """Per ray (cell, start, end), crossings of zero length left out."""
    crossings = traverse(StaticWorld().pieces(rays), rays.batch_index, grid, torch.float64)
    x, y, _ = grid.shape
    found: list[list] = [[] for _ in range(len(rays))]
    columns = (crossings.ray, crossings.cell, crossings.start_m, crossings.length_m)
    for ray, cell, start, length in zip(*(c.tolist() for c in columns), strict=True):
        if length > 1e-9:
            found[ray].append(((cell % x, cell // x % y, cell // (x * y)), start, start + length))
    return found


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_axis_parallel_rays_cross_every_cell_of_their_row(axis, sign):
    origin, direction = np.full(3, 1.5), np.zeros(3)
    origin[axis], direction[axis] = (-2.0 if sign > 0 else 6.0), sign
    expected = []
    for step in range(4):
        cell = [1, 1, 1]
        cell[axis] = step if sign > 0 else 3 - step
        expected.append((tuple(cell), 2.0 + step, 3.0 + step))
    assert cells_of(one_ray(origin, direction)) == [expected]


def test_a_diagonal_through_edges_touches_no_third_cell():
    found = cells_of(one_ray((0, 0, 0.5), (DIAGONAL, DIAGONAL, 0)))[0]
    assert [cell for cell, *_ in found] == [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 3, 0)]
    assert [end - start for _, start, end in found] == pytest.approx([math.sqrt(2)] * 4)


def test_a_ray_in_a_face_belongs_to_the_cell_above_it():
    assert [cell for cell, *_ in cells_of(one_ray((-1, 2.0, 0.5), (1, 0, 0)))[0]] == [(i, 2, 0) for i in range(4)]


def test_a_start_inside_counts_from_there():
    assert cells_of(one_ray((2.25, 0.5, 0.5), (1, 0, 0))) == [[((2, 0, 0), 0.0, 0.75), ((3, 0, 0), 0.75, 1.75)]]


def test_a_start_on_a_face_going_back_leaves_the_cell_behind_it():
    assert cells_of(one_ray((2.0, 0.5, 0.5), (-1, 0, 0))) == [[((1, 0, 0), 0.0, 1.0), ((0, 0, 0), 1.0, 2.0)]]


@pytest.mark.parametrize("origin", [(-1, 5, 0.5), (5, 0.5, 0.5), (-1, 4.0, 0.5)])
def test_rays_that_miss_cross_nothing(origin):
    assert cells_of(one_ray(origin, (1, 0, 0))) == [[]]


coordinate = st.one_of(st.floats(-3, 3), st.sampled_from([-2.0, -1.5, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]))
slope = st.one_of(st.floats(-1, 1), st.sampled_from([0.0, 1.0, -1.0, 0.5])).map(lambda s: s if abs(s) > 1e-7 else 0.0)


@settings(max_examples=300, deadline=None)
@given(origin=st.tuples(*[coordinate] * 3), direction=st.tuples(*[slope] * 3))
def test_crossings_equal_sorted_face_planes(origin, direction):
    length = np.linalg.norm(direction)
    if length < 1e-3:
        return
    origin, direction = np.array(origin), np.array(direction) / length
    expected = crossings_by_sorting(origin, direction, SMALL_GRID)
    found = cells_of(one_ray(origin, direction), SMALL_GRID)[0]
    # Cells of a sliver may be named by either side of a face; what has a length must agree.
    expected = [c for c in expected if c[2] - c[1] > 1e-7]
    found = [c for c in found if c[2] - c[1] > 1e-7]
    assert [c[0] for c in found] == [c[0] for c in expected]
    np.testing.assert_allclose([c[1:] for c in found], [c[1:] for c in expected], atol=1e-6)


def row_field(density: list[float]) -> VoxelField:
    """Four cells in a row, whose class is their index."""
    grid = VoxelGrid((0, 0, 0), (4, 1, 1), 1.0)
    return VoxelField(torch.tensor(density).double().view(1, 1, 1, 4), torch.eye(4).double().view(1, 4, 1, 1, 4), grid)


def test_one_opaque_voxel_is_seen_at_its_face():
    field = row_field([0, 0, 1e6, 0])
    seen = render(field, one_ray((0, 0.5, 0.5), (1, 0, 0)), field.grid)
    assert seen.range_m.item() == pytest.approx(2.0 + 1e-6)
    assert seen.opacity.item() == pytest.approx(1.0)
    assert seen.logits.tolist() == [pytest.approx([0, 0, 1, 0])]
    assert seen.far_m.item() == 4.0


@pytest.mark.parametrize(
    # Density ln 2 over 1 m: half ends there, on average (1/ln2 - 1) = 0.442695 m after the face; half reaches x = 4.
    ("remainder", "range_m"),
    [("far_end", 0.5 * 1.4426950408889634 + 0.5 * 4), ("dropped", 0.5 * 1.4426950408889634)],
)
def test_a_half_transparent_slab(remainder, range_m):
    field = row_field([0, math.log(2), 0, 0])
    seen = render(field, one_ray((0, 0.5, 0.5), (1, 0, 0)), field.grid, config=RenderConfig(remainder=remainder))
    assert seen.opacity.item() == pytest.approx(0.5)
    assert seen.range_m.item() == pytest.approx(range_m)
    assert seen.logits.tolist() == [pytest.approx([0, 0.5, 0, 0])]


def test_a_start_inside_something_solid_sees_it_at_once():
    field = row_field([1e6, 0, 0, 0])
    assert render(field, one_ray((0.5, 0.5, 0.5), (1, 0, 0)), field.grid).range_m.item() == pytest.approx(1e-6)


def test_a_miss_sees_nothing_and_breaks_no_gradient():
    field = random_field()
    rays = Rays.cat([one_ray((9, 9, 9), (1, 0, 0)), one_ray((0.1, 0.2, 0.3), (1, 0, 0))])
    seen = render(field, rays, SMALL_GRID)
    assert (seen.range_m[0], seen.opacity[0], seen.far_m[0]) == (0, 0, 0) and (seen.logits[0] == 0).all()
    for chosen in (rays, rays[:1], rays[:0]):
        seen = render(field, chosen, SMALL_GRID)
        (seen.range_m.sum() + seen.logits.sum() + seen.opacity.sum()).backward()
    assert torch.isfinite(field.density_lattice.grad).all() and torch.isfinite(field.logits_lattice.grad).all()


def test_extreme_densities_stay_finite():
    field = row_field([1e-30, 1e30, 1e4, 0.0])
    field.density_lattice.requires_grad_()
    seen = render(field, one_ray((0, 0.5, 0.5), (1, 0, 0)), field.grid, config=EXACT)
    assert seen.range_m.item() == pytest.approx(1.0)
    (seen.range_m.sum() + seen.logits.square().sum()).backward()
    assert torch.isfinite(field.density_lattice.grad).all()


def loss_of(range_m, logits, opacity):
    """Something that depends on all three in a different way per ray."""
    mix = torch.arange(1.0, len(range_m) + 1).double()
    return (mix * range_m).sum() + (logits.square() * mix[:, None]).sum() + (mix * opacity.square()).sum()


def test_values_and_gradients_equal_the_sorting_twin():
    rays, field = random_rays(60, batch=2), random_field(batch=2)
    parameters = (field.density_lattice, field.logits_lattice)
    twin = render_by_sorting(field, rays)
    seen = render(field, rays, SMALL_GRID, config=EXACT)
    for ours, theirs in zip((seen.range_m, seen.logits, seen.opacity), twin, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    ours = torch.autograd.grad(loss_of(seen.range_m, seen.logits, seen.opacity), parameters)
    theirs = torch.autograd.grad(loss_of(*twin), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)
        assert a.abs().max() > 0.1


def test_values_and_gradients_approach_the_tiny_step_twin():
    rays, field = random_rays(12, seed=3, reach_m=1.0), random_field(seed=3)
    parameters = (field.density_lattice, field.logits_lattice)
    zero = torch.zeros(20_000, dtype=torch.long)
    rows = [
        render_by_tiny_steps(
            lambda p: nearest(field.density_lattice[:, None], SMALL_GRID, p, zero)[:, 0],
            lambda p: nearest(field.logits_lattice, SMALL_GRID, p, zero),
            origin,
            direction,
            exit_m(origin, direction, SMALL_GRID),
        )
        for origin, direction in zip(rays.origin_m, rays.direction, strict=True)
    ]
    twin = [torch.stack(column) for column in zip(*rows, strict=True)]
    seen = render(field, rays, SMALL_GRID, config=EXACT)
    for ours, theirs in zip((seen.range_m, seen.logits, seen.opacity), twin, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
    ours = torch.autograd.grad(loss_of(seen.range_m, seen.logits, seen.opacity), parameters)
    for a, b in zip(ours, torch.autograd.grad(loss_of(*twin), parameters), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=1e-2)


def test_gradcheck_of_the_integral_and_the_bags():
    generator = torch.Generator().manual_seed(0)
    ray = torch.tensor([0, 0, 0, 2, 2, 3], dtype=torch.int32)
    start = torch.tensor([0.0, 0.5, 1.5, 1.0, 1.2, 0.0]).double()
    length = torch.tensor([0.5, 1.0, 0.2, 0.2, 0.0, 2.0]).double()
    # Thin enough for the series, thick, zero, and very thick.
    depth = torch.tensor([1e-4, 0.7, 2.0, 0.0, 0.3, 20.0]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda d: integrate(d, start, length, ray, 4), (depth,))
    table = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, generator=generator, dtype=torch.float64, requires_grad=True)
    cell = torch.tensor([0, 1, 1, 4, 0, 3], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda w, t: bag_logits(w, t, cell, ray, 4), (weight, table))


def test_integral_around_the_series_threshold_is_smooth():
    one, zero = torch.ones(1).double(), torch.zeros(1, dtype=torch.long)
    below, above = (
        integrate(one * tau, one * 0, one, zero.int(), 1)[1].item() / tau
        for tau in (1e-3 * (1 - 1e-9), 1e-3 * (1 + 1e-9))
    )
    assert below == pytest.approx(above, abs=1e-7) and below == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("limit", [1e-2, 1e-4])
def test_stopping_early_changes_no_more_than_promised(limit):
    rays, field = random_rays(200, seed=5), random_field(seed=5)
    with torch.no_grad():
        field.density_lattice.mul_(4)
    exact = render(field, rays, SMALL_GRID, config=EXACT)
    stopped = render(field, rays, SMALL_GRID, config=RenderConfig(min_transmittance=limit))
    # What is left behind the stop is at most ``limit``, spread over at most the rest of the segment.
    assert (stopped.range_m - exact.range_m).abs().max() <= limit * exact.far_m.max()
    assert (stopped.opacity - exact.opacity).abs().max() <= limit
    assert (stopped.logits - exact.logits).abs().max() <= limit * field.logits_lattice.abs().max()
    assert stopped.samples.length_m.sum() < exact.samples.length_m.sum()


def test_light_voxels_lose_only_their_logits_gradient():
    rays, field = random_rays(100, seed=6), random_field(seed=6)
    parameters = (field.density_lattice, field.logits_lattice)
    gradients = []
    for min_weight in (0.0, 1e-2):
        seen = render(field, rays, SMALL_GRID, config=RenderConfig(min_transmittance=0, min_weight=min_weight))
        gradients.append(torch.autograd.grad(seen.logits.square().sum(), parameters))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], atol=1e-12, rtol=0)
    # The gradient by hand: every voxel gets w times twice the ray's logits, if w exceeds the limit.
    crossings = traverse(StaticWorld().pieces(rays), rays.batch_index, SMALL_GRID, torch.float64)
    for min_weight, gradient in zip((0.0, 1e-2), gradients, strict=True):
        weight = seen.samples.weight.detach() * (seen.samples.weight > min_weight)
        rows = 2 * weight[:, None] * seen.logits.detach()[crossings.ray]
        expected = torch.zeros(SMALL_GRID.size, 3).double().index_add(0, crossings.cell, rows)
        torch.testing.assert_close(gradient[1], expected.T.reshape(gradient[1].shape))
    assert (gradients[0][1] - gradients[1][1]).abs().max() > 1e-3


def test_weights_of_a_ray_add_up_to_its_opacity():
    rays, field = random_rays(50), random_field()
    seen = render(field, rays, SMALL_GRID, config=EXACT)
    total = torch.zeros(50).double().index_add(0, seen.samples.ray, seen.samples.weight)
    torch.testing.assert_close(total, seen.opacity)
    assert (seen.samples.ray.diff() >= 0).all()


def test_float32_is_close_to_float64():
    rays, field = random_rays(100), random_field()
    single = Rays(rays.origin_m.float(), rays.direction.float(), rays.range_m.float(), *[rays.label] * 4)
    half = VoxelField(field.density_lattice.float(), field.logits_lattice.float(), SMALL_GRID)
    seen, exact = render(half, single, SMALL_GRID), render(field, rays, SMALL_GRID, config=EXACT)
    assert seen.range_m.dtype == torch.float32
    # Rays that graze an edge may hit a neighbour after rounding: compare all but the worst few.
    error = (seen.range_m - exact.range_m).abs().sort().values
    assert error[-5] < 1e-3


def test_a_field_of_another_grid_is_refused():
    field = row_field([0, 0, 0, 0])
    with pytest.raises(GeometryError, match="density has shape"):
        render_with = VoxelField(field.density_lattice, field.logits_lattice, CUBE)
        render(render_with, one_ray((0, 0, 0), (1, 0, 0)), CUBE)
