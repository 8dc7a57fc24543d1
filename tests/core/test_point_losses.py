# SPDX-License-Identifier: Apache-2.0
"""What rays say about points, worked out by hand; and what surfaces leave for the losses on rays to compare."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from occflownet_core.errors import ConfigError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE
from occflownet_core.losses import LossConfig, class_weights
from occflownet_core.motion import DynamicFilter, StaticWorld
from occflownet_core.point_losses import free_points, supervised_rays
from occflownet_core.renderer import Rays, RenderConfig
from occflownet_core.voxel_field import VoxelField

GRID = VoxelGrid((0, 0, 0), (40, 4, 4), 1.0)
SURFACE = RenderConfig(method="surface", surface_length_m=1.0)
NOTHING = LossConfig(range_weight=0, semantic_weight=0, class_weighted=False)


def rays(range_m, label, **kwargs) -> Rays:
    return Rays.from_numpy([0.5, 2, 2], [1, 0, 0], range_m, label, dtype=torch.float64, **kwargs)


def hall(wall_from: int, density_per_m: float = 50.0, haze_per_m: float = 0.25) -> VoxelField:
    """Haze up to a solid wall that begins with cell ``wall_from``; class 4 everywhere, with a logit of 2."""
    density = torch.full((1, 4, 4, 40), haze_per_m, dtype=torch.float64)
    density[..., wall_from:] = density_per_m
    logits = torch.zeros((1, 17, 4, 4, 40), dtype=torch.float64)
    logits[:, 4] = 2.0
    return VoxelField(density.requires_grad_(), logits.requires_grad_(), GRID)


def terms_of(field, labelled, losses, config=SURFACE, motion=None):
    generator = torch.Generator().manual_seed(0)
    return supervised_rays(field, labelled, GRID, motion or StaticWorld(), losses, config, generator)


def test_free_points_lie_before_the_return_and_on_surfaces_that_are_too_early():
    # From x = 0.5: returns at 10 and 0.5 m, and none. Free until 9 m; nothing; until the grid's end at 39.5 m.
    labelled = rays([10.0, 0.5, np.inf] * 100, [4, 4, FREE] * 100)
    surface_m = torch.tensor([3.0, 0.2, np.inf] * 99 + [9.5, 0.2, 20.0]).double()
    ray, t_m = free_points(labelled, GRID, 1.0, surface_m, torch.Generator().manual_seed(0))
    drawn, early = ray[:200], ray[200:]
    assert drawn.tolist() == [r for r in range(300) if r % 3 != 1]
    assert (t_m[:200][drawn % 3 == 0] <= 9.0).all() and t_m[:200][drawn % 3 == 0].max() > 8.0
    assert (t_m[:200][drawn % 3 == 2] <= 39.5).all() and t_m[:200][drawn % 3 == 2].max() > 38.0
    assert t_m.min() >= 0
    # 9.5 m is within the margin of the return; the ray without return must meet nothing at all.
    assert early.tolist() == [*range(0, 297, 3), 299]
    assert t_m[200:].tolist() == [3.0] * 99 + [20.0]


def test_free_points_cost_the_optical_depth_of_the_reference_length():
    # Haze of 0.25/m over the reference length of 1 m.
    losses = replace(NOTHING, free_point_weight=3.0)
    terms = terms_of(hall(20), rays([10.0], [4]), losses)
    assert set(terms) == {"free_point"}
    assert terms["free_point"].item() == pytest.approx(3 * 0.25)


def test_occupied_points_lie_behind_the_return_where_a_surface_is_missed():
    # All haze: f = 1 - exp(-0.25) behind the return, and nothing is rendered: only this term pulls.
    field = hall(40)
    terms = terms_of(field, rays([10.0], [4]), replace(NOTHING, range_weight=1.0, occupied_point_weight=2.0))
    assert terms["range"].item() == 0
    assert terms["occupied_point"].item() == pytest.approx(-2 * math.log(1 - math.exp(-0.25)))
    sum(terms.values()).backward()
    pulled = field.density_lattice.grad.nonzero()[:, 3].unique().tolist()
    # From 10.5 to 10.9 m along x: between the centres of cells 10 and 11 at most.
    assert set(pulled) <= {10, 11} and (field.density_lattice.grad <= 0).all()


def test_semantics_of_the_return_itself():
    losses = replace(NOTHING, point_semantic_weight=1.0, class_weighted=True)
    terms = terms_of(hall(20), rays([10.0, np.inf], [4, FREE]), losses)
    expected = class_weights()[4].item() * -math.log(math.exp(2) / (math.exp(2) + 16))
    assert terms["point_semantic"].item() == pytest.approx(expected, rel=1e-6)


def test_surfaces_count_only_where_they_are_met():
    # Density goes from 0 at 19.5 m to 50/m at 20.5 m and passes ln 2 / 1 m on the way: the surface is at 19.5 - 0.5 +
    # ln 2 / 50 from the origin at 0.5. The second ray begins in the wall, the third flies past everything.
    field = hall(20, haze_per_m=0.0)
    where_m = 19.0 + math.log(2) / 50
    origin = [[0.5, 2, 2], [30.5, 2, 2], [0.5, 2, 2]]
    direction = [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    labelled = Rays.from_numpy(origin, direction, [15.0, 5.0, 1.0], [4, 4, 4], dtype=torch.float64)
    terms = terms_of(field, labelled, LossConfig(range_error="absolute", range_weight=1.0, class_weighted=False))
    assert terms["range"].item() == pytest.approx(where_m - 15, abs=1e-5)
    assert terms["semantic"].item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 16)), rel=1e-6)
    terms["range"].backward()
    # d = 19 + ln 2 / s of the wall's first cells, four of which share the ray: dd/ds = -ln 2 / 50^2, and f rises with
    # every other density there too; what is behind and before gets nothing.
    touched = field.density_lattice.grad.nonzero()[:, 3].unique().tolist()
    assert touched == [19, 20]
    assert field.density_lattice.grad[..., 20].sum().item() == pytest.approx(-math.log(2) / 2500, rel=1e-3)


def test_what_the_filter_hides_is_neither_met_nor_asked():
    # Class 4 (car) is dynamic: at another time the haze before the return is not there, so it costs nothing.
    labelled = rays([10.0], [11], time_index=1)
    losses = replace(NOTHING, free_point_weight=1.0)
    assert terms_of(hall(20), labelled, losses, motion=DynamicFilter())["free_point"].item() == 0.0
    assert terms_of(hall(20), labelled, losses)["free_point"].item() == pytest.approx(0.25)


def test_points_do_without_surfaces():
    losses = replace(NOTHING, range_weight=0.05, free_point_weight=1.0, occupied_point_weight=1.0)
    config = RenderConfig(surface_length_m=1.0)
    terms = terms_of(hall(20), rays([10.0], [4]), losses, config)
    assert set(terms) == {"range", "free_point", "occupied_point"}
    assert terms["free_point"].item() == pytest.approx(0.25)


def test_terms_that_need_weights_along_rays_are_refused_for_surfaces():
    for name in ("return_weight", "opacity_weight", "free_space_weight", "distortion_weight"):
        with pytest.raises(ConfigError, match=f"loss.{name} is 0.5, and surfaces have no weights along their rays"):
            terms_of(hall(20), rays([10.0], [4]), replace(NOTHING, **{name: 0.5}))


def test_no_rays_give_zero_with_a_graph():
    losses = LossConfig(free_point_weight=1.0, occupied_point_weight=1.0, point_semantic_weight=1.0)
    terms = terms_of(hall(20), rays([10.0], [4])[:0], losses)
    assert {name: value.item() for name, value in terms.items()} == dict.fromkeys(terms, 0.0)
    assert len(terms) == 5
    sum(terms.values()).backward()
