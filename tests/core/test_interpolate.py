# SPDX-License-Identifier: Apache-2.0
"""Lookups at points: centres, borders, batches, gradients, and the published stretch."""

import math

import pytest
import torch

from occflownet_core.errors import GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.interpolate import corners, nearest, table_from_volume, trilinear
from tests.core.rendering_twins import SMALL_GRID, random_field

ROW = VoxelGrid((0, 0, 0), (4, 1, 1), 1.0)


def along_row(x: list[float], function=trilinear, **kwargs) -> list[float]:
    volume = torch.tensor([10.0, 20.0, 40.0, 80.0]).view(1, 1, 1, 1, 4)
    points = torch.tensor([[value, 0.5, 0.5] for value in x])
    return function(volume, ROW, points, torch.zeros(len(x), dtype=torch.long), **kwargs)[:, 0].tolist()


def test_values_lie_at_cell_centres_and_fade_to_zero_outside():
    assert along_row([0.5, 1.0, 2.25, 3.5]) == [10.0, 15.0, 35.0, 80.0]
    assert along_row([0.25, 4.0, 4.5, -9.0]) == [7.5, 40.0, 0.0, 0.0]


def test_published_alignment_stretches_centres_to_faces():
    assert along_row([0.0, 4.0, 2.0], alignment="edges") == pytest.approx([10.0, 80.0, 30.0])


def test_nearest_is_constant_in_a_cell():
    assert along_row([0.0, 0.99, 1.0, 3.99], nearest) == [10.0, 10.0, 20.0, 80.0]
    assert along_row([-0.01, 4.0, 1e30, -math.inf], nearest) == [0.0] * 4


def random_points(count: int = 200, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    points = (torch.rand(count, 3, generator=generator, dtype=torch.float64) - 0.5) * 5
    return points, torch.randint(0, batch, (count,), generator=generator)


def test_trilinear_equals_plain_loops_over_eight_cells():
    field = random_field(batch=2)
    points, batch = random_points(40)
    found = trilinear(field.logits_lattice, SMALL_GRID, points, batch)
    for point, b, value in zip(points, batch, found, strict=True):
        u = [(p - low) / 0.5 - 0.5 for p, low in zip(point.tolist(), SMALL_GRID.lower_m, strict=True)]
        expected = torch.zeros(3).double()
        for corner in range(8):
            cell = [math.floor(v) + (corner >> axis & 1) for axis, v in enumerate(u)]
            if all(0 <= c < n for c, n in zip(cell, SMALL_GRID.shape, strict=True)):
                share = math.prod(1 - abs(v - c) for v, c in zip(u, cell, strict=True))
                expected = expected + share * field.logits_lattice[b, :, cell[2], cell[1], cell[0]].detach()
        torch.testing.assert_close(value.detach(), expected)


@pytest.mark.parametrize("alignment", ["centres", "edges"])
def test_corner_rows_and_shares_say_the_same(alignment):
    field = random_field(batch=2)
    points, batch = random_points()
    row, share = corners(SMALL_GRID, points, batch, alignment)
    by_rows = (table_from_volume(field.logits_lattice)[row] * share[..., None]).sum(dim=1)
    torch.testing.assert_close(trilinear(field.logits_lattice, SMALL_GRID, points, batch, alignment), by_rows)


def test_gradients_reach_values_and_points():
    field = random_field(batch=2)
    points, batch = random_points(8)
    assert torch.autograd.gradcheck(
        lambda volume, p: trilinear(volume, SMALL_GRID, p, batch),
        (field.logits_lattice, points.requires_grad_()),
        atol=1e-6,
    )


def test_a_volume_that_does_not_fit_is_refused():
    with pytest.raises(GeometryError, match=r"cells \(z, y, x\) = \(1, 1, 4\)"):
        trilinear(torch.zeros(1, 1, 4, 1, 1), ROW, torch.zeros(1, 3), torch.zeros(1))


def test_another_lattice_of_a_voxel_field_is_its_own_trilinear_values():
    field = random_field()
    finer = VoxelGrid(SMALL_GRID.lower_m, SMALL_GRID.upper_m, 0.25)
    density, logits = field.lattice(finer)
    assert density.shape == (1, 8, 12, 16) and logits.shape == (1, 3, 8, 12, 16)
    centre = torch.tensor(finer.centres()[5, 3, 2])[None]
    zero = torch.zeros(1, dtype=torch.long)
    torch.testing.assert_close(density[0, 2, 3, 5], field.density(centre, zero)[0])
    torch.testing.assert_close(logits[0, :, 2, 3, 5], field.semantics(centre, zero)[0])
    assert field.lattice(SMALL_GRID)[0] is field.density_lattice
