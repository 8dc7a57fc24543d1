# SPDX-License-Identifier: Apache-2.0
"""Surface rendering: ranges in closed form, implicit gradients against formulas and finite differences, what is stored."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occflownet_core.boxes import MovingBoxes
from occflownet_core.errors import ConfigError
from occflownet_core.field import FieldConfig, FieldDecoder, OccupancyField
from occflownet_core.grid import VoxelGrid
from occflownet_core.motion import BoxFlow, LearnedFlow
from occflownet_core.renderer import Rays, RenderConfig, render
from occflownet_core.renderer.surface import bounded_slope, march, refine
from occflownet_core.voxel_field import VoxelField
from tests.core.rendering_twins import SMALL_GRID, random_field, random_rays, yaw_pose

GRID = VoxelGrid((-8.0, -8.0, -8.0), (8.0, 8.0, 8.0), 1.0)
SURFACE = RenderConfig(method="surface", sampled_field="continuous", surface_steps=200)
SHARPNESS = 3.0


@dataclass
class Solid:
    """A field with f = sigmoid(depth * SHARPNESS) for a reference length of 0.4 m: 0.5 on the solid's face."""

    depth_m: Callable[[Tensor], Tensor]
    """Points [N, 3] -> how deep [N] they lie in it; negative outside."""

    def density(self, points_m: Tensor, batch_index: Tensor) -> Tensor:
        return torch.nn.functional.softplus(SHARPNESS * self.depth_m(points_m)) / 0.4

    def semantics(self, points_m: Tensor, batch_index: Tensor) -> Tensor:
        return points_m


def sphere(centre_m: Tensor, radius_m: Tensor) -> Solid:
    return Solid(lambda p: radius_m - (p - centre_m).norm(dim=-1))


def ray(origin, direction, **kwargs) -> Rays:
    direction = torch.tensor(direction, dtype=torch.float64)
    unit = direction / direction.norm()
    return Rays.from_numpy([origin], [unit.tolist()], [1.0], [0], dtype=torch.float64, **kwargs)


def real(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).squeeze()


def seen_range(field, rays, config=SURFACE, **kwargs) -> Tensor:
    return render(field, rays, GRID, config=config, **kwargs).range_m


@pytest.mark.parametrize(
    ("origin", "direction", "expected_m"),
    [
        # Sphere of radius 2 around (3, 0, 0): head on at 1; at half the radius beside, 3 - sqrt(3); beside it; from behind.
        ([0, 0, 0], [1, 0, 0], 1.0),
        ([0, 1, 0], [1, 0, 0], 3 - math.sqrt(3)),
        ([0, 2.5, 0], [1, 0, 0], math.inf),
        ([0, 0, 0], [-1, 0, 0], math.inf),
        ([7, 0, 0], [-1, 0, 0], 2.0),
        ([3, 0.5, 0], [1, 0, 0], 0.0),  # starts inside: ends at once, where it leaves does not count
        ([-20, 0, 0], [1, 0, 0], 21.0),  # starts outside the grid
    ],
)
def test_sphere(origin, direction, expected_m):
    found = seen_range(sphere(real(3, 0, 0), real(2)), ray(origin, direction))
    assert found.item() == pytest.approx(expected_m, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.floats(-1.4, 1.4), st.floats(-1.4, 1.4), st.floats(0.5, 6.0))
def test_plane(yaw, pitch, distance_m):
    # The plane x = distance, seen under an angle: distance / cos of it.
    direction = [math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), math.sin(pitch)]
    expected_m = distance_m / direction[0]
    end_m = [expected_m * c for c in direction]
    found = seen_range(Solid(lambda p: p[:, 0] - distance_m), ray([0, 0, 0], direction))
    if max(map(abs, end_m)) < 7.9:
        assert found.item() == pytest.approx(expected_m, abs=1e-6)
    elif max(map(abs, end_m)) > 8.1:
        assert found.item() == math.inf


def test_box_from_several_sides():
    # |x - 3| < 1, |y| < 2, |z| < 0.5; its depth is the distance to the nearest face.
    half = real(1, 2, 0.5)
    box = Solid(lambda p: (half - (p - real(3, 0, 0)).abs()).amin(dim=-1))
    assert seen_range(box, ray([0, 0, 0], [1, 0, 0])).item() == pytest.approx(2.0, abs=1e-6)
    assert seen_range(box, ray([3, -6, 0], [0, 1, 0])).item() == pytest.approx(4.0, abs=1e-6)
    assert seen_range(box, ray([3, 0, 4], [0, 0, -1])).item() == pytest.approx(3.5, abs=1e-6)
    # Along (1, 1, 0) from the origin: in x from 2 on, where y = 2 ends: it touches the edge only; lower it goes in.
    assert seen_range(box, ray([0, -0.5, 0], [1, 1, 0])).item() == pytest.approx(2 * math.sqrt(2), abs=1e-6)


def test_the_first_of_several_surfaces_and_never_a_leaving_one():
    # Shells around x = 2 and x = 5, thick 1 each; from inside the first one the second is not reached: it ends there.
    walls = Solid(lambda p: 0.5 - torch.minimum((p[:, 0] - 2).abs(), (p[:, 0] - 5).abs()))
    assert seen_range(walls, ray([0, 0, 0], [1, 0, 0])).item() == pytest.approx(1.5, abs=1e-6)
    assert seen_range(walls, ray([3.5, 0, 0], [1, 0, 0])).item() == pytest.approx(1.0, abs=1e-6)
    assert seen_range(walls, ray([2, 0, 0], [1, 0, 0])).item() == 0.0
    # Every crossing that is found rises.
    brackets, _ = march(lambda r, t: torch.sin(t), real(4.0)[None], real(20.0)[None], steps=50)
    assert brackets.free_excess.item() < 0 <= brackets.occupied_excess.item()
    assert refine(lambda r, t: torch.sin(t), brackets, 8).item() == pytest.approx(2 * math.pi, abs=1e-9)


def test_marching_equals_its_slow_twin():
    generator = torch.Generator().manual_seed(5)
    phase, pace = (torch.rand(40, generator=generator, dtype=torch.float64) * k for k in (6, 4))
    excess = lambda r, t: torch.sin(phase[r, None] + pace[r, None] * t) - 0.9  # noqa: E731
    near, far = torch.zeros(40).double(), torch.full((40,), 3.0).double()
    far[3] = 0.0  # misses the grid
    brackets, inside = march(excess, near, far, steps=30)
    found = {
        r: (a, b)
        for r, a, b in zip(*(v.tolist() for v in (brackets.ray, brackets.free_m, brackets.occupied_m)), strict=True)
    }
    for r in range(40):
        values = [float(excess(torch.tensor([r]), torch.tensor([[k * far[r] / 30]]))) for k in range(31)]
        rising = [k for k in range(30) if values[k] < 0 <= values[k + 1]]
        if far[r] == 0 or (values[0] < 0 and not rising):
            assert r not in found and r not in inside.tolist()
        elif values[0] >= 0:
            assert r in inside.tolist() and r not in found
        else:
            assert found[r] == pytest.approx((rising[0] * 0.1, (rising[0] + 1) * 0.1))


def test_gradient_of_a_sphere_by_formula():
    # d = s - sqrt(r^2 - b^2) with s = c_x along x and b = c_y: dd/dr = -r / root, dd/dc_x = 1, dd/dc_y = c_y / root.
    centre, radius = real(3, 1, 0).requires_grad_(), real(2).requires_grad_()
    root = math.sqrt(3)
    origin = real(0, 0, 0)[None].requires_grad_()
    rays = replace(ray([0, 0, 0], [1, 0, 0]), origin_m=origin)
    found = seen_range(sphere(centre, radius), rays)
    assert found.item() == pytest.approx(3 - root, abs=1e-6)
    found.sum().backward()
    assert radius.grad.item() == pytest.approx(-2 / root, abs=1e-5)
    assert centre.grad.tolist() == pytest.approx([1, 1 / root, 0], abs=1e-5)
    assert origin.grad.tolist() == [pytest.approx([-1, -1 / root, 0], abs=1e-5)]


def test_semantics_move_the_surface_too():
    # Logits are the point itself: x of the surface is c_x - r, so its slope in r is -1 (DVR's texture at p(d)).
    radius = real(2).requires_grad_()
    seen = render(sphere(real(3, 0, 0), radius), ray([0, 0, 0], [1, 0, 0]), GRID, config=SURFACE)
    assert seen.logits.tolist() == [pytest.approx([1, 0, 0], abs=1e-6)]
    assert torch.autograd.grad(seen.logits[0, 0], radius)[0].item() == pytest.approx(-1, abs=1e-5)


def finite_difference(loss, parameter: Tensor, entries: list[int], step: float = 1e-6) -> list[float]:
    """Central differences of a scalar function in some of a parameter's entries."""
    flat, found = parameter.detach().view(-1), []
    for entry in entries:
        value = flat[entry].item()
        ends = []
        for sign in (1, -1):
            flat[entry] = value + sign * step
            with torch.no_grad():
                ends.append(loss().item())
        flat[entry] = value
        found.append((ends[0] - ends[1]) / (2 * step))
    return found


def check_against_differences(loss, parameters: list[Tensor], count: int = 12) -> None:
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        entries = gradient.abs().flatten().argsort(descending=True)[:count].tolist()
        assert gradient.abs().max() > 1e-3
        expected = finite_difference(loss, parameter, entries)
        assert gradient.flatten()[entries].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def loss_of(field, rays: Rays, grid: VoxelGrid, config: RenderConfig) -> Tensor:
    seen = render(field, rays, grid, config=config)
    mix = torch.arange(1.0, len(rays) + 1).double()
    hit = torch.isfinite(seen.range_m)
    assert hit.sum() >= 3
    return (mix[hit] * seen.range_m[hit]).sum() + (seen.logits.square() * mix[:, None]).sum()


PRECISE = replace(SURFACE, secant_steps=30, surface_steps=64)


def test_gradients_of_a_voxel_field_against_finite_differences():
    field, rays = random_field(seed=1), random_rays(25, seed=2, reach_m=1.5)
    config = replace(PRECISE, sampled_field="lattice", surface_length_m=1.0)
    check_against_differences(
        lambda: loss_of(field, rays, SMALL_GRID, config), [field.density_lattice, field.logits_lattice]
    )


def test_gradients_of_features_and_decoder_against_finite_differences():
    torch.manual_seed(0)
    decoder = FieldDecoder(FieldConfig(channels=4, hidden=8, layers=1, initial_density_per_m=1.0)).double()
    features = torch.randn((1, 4, *SMALL_GRID.shape[::-1]), dtype=torch.float64).requires_grad_()
    rays = random_rays(25, seed=3, reach_m=1.5)
    config = replace(PRECISE, surface_length_m=1.0)
    heads = [decoder.density_head[0].weight, decoder.density_head[-1].bias, decoder.semantic_head[0].weight]
    check_against_differences(
        lambda: loss_of(OccupancyField(features, SMALL_GRID, decoder), rays, SMALL_GRID, config), [features, *heads], 6
    )


def test_slopes_keep_their_sign_and_grazing_rays_stay_finite():
    found = bounded_slope(torch.tensor([2.0, -2.0, 1e-9, -1e-9, 0.0]))
    assert found.tolist() == pytest.approx([2.0, -2.0, 0.01, -0.01, 0.01])
    # A ray that touches the sphere at a depth of one part in a billion: the root in the formula is almost zero.
    radius = real(2).requires_grad_()
    rays = ray([0, 2 - 1e-9, 0], [1, 0, 0])
    seen = seen_range(sphere(real(3.04, 0, 0), radius), rays, replace(SURFACE, surface_steps=200))
    assert torch.isfinite(seen).all()
    (gradient,) = torch.autograd.grad(seen.sum(), radius)
    assert -1e3 < gradient.item() < 0  # a larger sphere is met earlier, and by no more than the bound says


def stored_bytes(config: RenderConfig, rays: Rays, field: VoxelField) -> int:
    """What autograd keeps for backward of one rendering."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        seen = render(field, rays, SMALL_GRID, config=config)
    assert torch.isfinite(seen.range_m).any()
    return sum(kept.values())


def test_what_is_stored_does_not_grow_with_the_steps():
    field, rays = random_field(seed=1), random_rays(2000, seed=2, reach_m=1.5)
    surface = RenderConfig(method="surface", surface_length_m=1.0)
    few, many = (
        stored_bytes(replace(surface, surface_steps=n, surface_first_steps=n), rays, field) for n in (64, 1024)
    )
    assert many == pytest.approx(few, rel=0.02)  # a finer march meets a few more surfaces
    sampled = RenderConfig(method="sampled")
    assert many < stored_bytes(sampled, rays, field) / 4


def test_no_gradient_is_prepared_where_none_is_wanted():
    with torch.no_grad():
        found = seen_range(sphere(real(3, 0, 0), real(2)), ray([0, 0, 0], [1, 0, 0]))
    assert not found.requires_grad and found.item() == pytest.approx(1.0, abs=1e-6)


def test_what_a_miss_and_a_start_inside_look_like():
    rays = Rays.cat([ray([0, 0, 0], [-1, 0, 0]), ray([3, 0, 0], [1, 0, 0]), ray([0, 0, 0], [1, 0, 0])])
    seen = render(sphere(real(3, 0, 0), real(2).requires_grad_()), rays, GRID, config=SURFACE)
    assert seen.range_m.tolist() == pytest.approx([math.inf, 0.0, 1.0], abs=1e-6)
    assert seen.opacity.tolist() == [0.0, 1.0, 1.0]
    assert seen.logits[0].tolist() == [0.0, 0.0, 0.0]
    assert seen.samples.ray.tolist() == [2] and seen.samples.weight.tolist() == [1.0]
    nothing = render(sphere(real(3, 0, 0), real(2).requires_grad_()), rays[:0], GRID, config=SURFACE)
    assert len(nothing.range_m) == 0


def test_a_field_that_is_constant_within_its_cells_is_refused_for_learning():
    field = random_field(seed=1)
    field = VoxelField(field.density_lattice, field.logits_lattice, SMALL_GRID, "nearest")
    with pytest.raises(ConfigError, match="constant within its cells"):
        render(field, random_rays(25, seed=2, reach_m=1.5), SMALL_GRID, config=replace(PRECISE, surface_length_m=1.0))


def test_late_marches_find_the_same_surfaces():
    field = sphere(real(3, 0, 0), real(2))
    rays = Rays.cat([ray([0, y, 0], [1, 0, 0]) for y in (0.0, 0.5, 1.0)])
    late = seen_range(field, rays, replace(SURFACE, stratified=True), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(late, seen_range(field, rays), atol=1e-6, rtol=0)


def test_content_of_a_box_is_met_where_it_was_then():
    # A wall 1 m thick stands in front at x = 4..5 now; at time 1 it was 2 m further away, turned by nothing.
    thickness = real(0.5).requires_grad_()
    wall = Solid(lambda p: thickness - (p[:, 0] - 4.5).abs())
    boxes = MovingBoxes.from_numpy(yaw_pose(4.5, 0, 0)[None], yaw_pose(6.5, 0, 0)[None], [[2.0, 20.0, 20.0]], [4], [1])
    motion = BoxFlow(boxes, scale=1.0)
    now, then = ray([0, 0, 0], [1, 0, 0]), ray([0, 0, 0], [1, 0, 0], time_index=1)
    seen = render(wall, Rays.cat([now, then]), GRID, motion, SURFACE).range_m
    assert seen.tolist() == pytest.approx([4.0, 6.0], abs=1e-6)
    for found in seen:  # a thicker wall is met as much earlier
        (gradient,) = torch.autograd.grad(found, thickness, retain_graph=True)
        assert gradient.item() == pytest.approx(-1.0, abs=1e-3)


def test_a_learned_velocity_gets_the_surface_s_gradient():
    # The wall's face, at x = 4 now, was at 4 + v dt = 5 one keyframe (0.5 s) later: dd/dv = 0.5 s.
    speed = real(2).requires_grad_()
    wall = Solid(lambda p: p[:, 0] - 4)
    flow = LearnedFlow(lambda p, b: torch.stack([speed.expand(len(p)), *[torch.zeros(len(p)).double()] * 2], dim=1))
    seen = render(wall, ray([0, 0, 0], [1, 0, 0], time_index=1), GRID, flow, SURFACE).range_m
    assert seen.item() == pytest.approx(5.0, abs=1e-6)
    assert torch.autograd.grad(seen.sum(), speed)[0].item() == pytest.approx(0.5, abs=1e-3)


def test_steps_double_at_equal_shares_of_a_run():
    config = RenderConfig(method="surface", surface_steps=100, surface_first_steps=16)
    # 16, 32, 64, then 100: four quarters.
    assert [config.at(done).surface_steps for done in (0.0, 0.24, 0.26, 0.6, 0.76, 1.0)] == [16, 16, 32, 64, 100, 100]
    assert RenderConfig().at(0.0) == RenderConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"surface_threshold": 0.0}, r"surface_threshold is 0.0; give a probability inside \(0, 1\)"),
        ({"surface_threshold": math.nan}, "surface_threshold is nan"),
        ({"surface_length_m": -1.0}, "surface_length_m is -1.0; give positive metres"),
        ({"surface_steps": 0}, "surface_steps is 0; give at least 1"),
        ({"secant_steps": -1}, "secant_steps is -1; give at least 0"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RenderConfig(method="surface", **values)
