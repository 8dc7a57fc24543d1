# SPDX-License-Identifier: Apache-2.0
"""Queries: bounded batches, probability, classes and gradient anywhere, and the written-out twin that is exported."""

import math

import numpy as np
import pytest
import torch

from occflownet_core.deployed_field import DeployedField
from occflownet_core.errors import GeometryError
from occflownet_core.field import FieldConfig, FieldDecoder, OccupancyField, TorchField, occupancy_probability
from occflownet_core.grid import VoxelGrid
from occflownet_core.query import batches, require_points

GRID = VoxelGrid((-2, -1, 0), (2, 2, 1), 0.5)  # 8 x 6 x 2 cells
LENGTH_M = 0.25


def make_field(dtype: torch.dtype = torch.float64, **config) -> OccupancyField:
    torch.manual_seed(0)
    x, y, z = GRID.shape
    decoder = FieldDecoder(FieldConfig(channels=4, hidden=8, layers=2, initial_density_per_m=0.5, **config)).to(dtype)
    return OccupancyField(torch.randn(2, 4, z, y, x, dtype=dtype), GRID, decoder)


def points_in_the_box(count: int = 60, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    share = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    return (torch.tensor(GRID.lower_m) + share * torch.tensor([4, 3, 1])).to(dtype)


@pytest.mark.parametrize("sample", [0, 1])
def test_a_query_is_density_and_semantics_of_one_sample(sample):
    field, points = make_field(), points_in_the_box()
    which = torch.full((len(points),), sample)
    answer = field.query(points, LENGTH_M, sample, points_at_a_time=7)
    expected = 1 - torch.exp(-LENGTH_M * field.density(points, which))
    torch.testing.assert_close(answer.probability, expected.detach())
    torch.testing.assert_close(answer.logits, field.semantics(points, which).detach())
    assert answer.inside.all() and answer.gradient_per_m is None
    assert not answer.probability.requires_grad


def test_both_orders_of_decoding_and_interpolating_agree_at_cell_centres():
    """The lattice decodes and then interpolates, a query interpolates and then decodes."""
    field = make_field(torch.float32)
    centres = torch.from_numpy(GRID.centres().transpose(2, 1, 0, 3).reshape(-1, 3)).float()
    density, logits = field.lattice()
    answer = field.query(centres, LENGTH_M, sample=1)
    expected = occupancy_probability(density, LENGTH_M)[1].flatten()
    torch.testing.assert_close(answer.probability, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(answer.logits, logits[1].flatten(1).T, atol=1e-5, rtol=0)


def test_no_more_points_than_asked_are_evaluated_at_a_time():
    field, sizes = make_field(), []
    field.decoder.density_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    field.query(points_in_the_box(60), LENGTH_M, points_at_a_time=25)
    assert sizes == [25, 25, 10]


@pytest.mark.parametrize(("count", "parts"), [(0, [(0, 0)]), (3, [(0, 3)]), (5, [(0, 3), (3, 5)])])
def test_batches_cover_everything_once(count, parts):
    assert [(part.start, part.stop) for part in batches(count, 3)] == parts


def test_no_points_give_no_answers_of_the_right_shape():
    answer = make_field().query(torch.zeros(0, 3, dtype=torch.float64), LENGTH_M, gradient=True)
    assert [tuple(part.shape) for part in answer] == [(0,), (0, 17), (0,), (0, 3)]


def test_outside_there_is_nothing_and_the_mask_says_so():
    outside = torch.tensor([[2.0, 0, 0.5], [-2.01, 0, 0.5], [0, 0, math.inf], [-math.inf, 0, 0], [0, 1e30, 0]])
    answer = make_field().query(outside.double(), LENGTH_M, gradient=True)
    assert not answer.inside.any()
    assert (answer.probability == 0).all() and (answer.logits == 0).all() and (answer.gradient_per_m == 0).all()
    assert (
        make_field().query(torch.tensor([[-2.0, -1.0, 0.0]]).double(), LENGTH_M).inside.all()
    )  # lower faces belong to it


@pytest.mark.parametrize("activation", ["softplus", "sigmoid"])
def test_the_gradient_is_that_of_finite_differences(activation):
    field, points, step_m = make_field(density=activation), points_in_the_box(), 1e-6
    # Where a difference would straddle a kink (a cell's centre plane, or the flat outermost half cells) there is none.
    position = (points - torch.tensor(GRID.lower_m)) / 0.5 - 0.5
    points = points[((position - position.round()).abs() > 1e-4).all(dim=1)]
    slopes = []
    for axis in range(3):
        step = torch.eye(3, dtype=torch.float64)[axis] * step_m
        ahead, behind = (field.query(points + sign * step, LENGTH_M).probability for sign in (1, -1))
        slopes.append((ahead - behind) / (2 * step_m))
    found = field.query(points, LENGTH_M, gradient=True).gradient_per_m
    torch.testing.assert_close(found, torch.stack(slopes, dim=1), atol=1e-6, rtol=1e-5)
    assert found.abs().max() > 0.05


def test_the_gradient_of_a_ramp_is_its_slope():
    """Sigmoid density, log odds 2 x + const along x: d/dx sigmoid = 2 s (1 - s); 1 - exp(-l s) multiplies by l exp(-l s)."""
    grid = VoxelGrid((0, 0, 0), (4, 2, 2), 1.0)
    decoder = FieldDecoder(FieldConfig(1, 1, 0, density="sigmoid", density_scale_per_m=1.0)).double()
    torch.nn.init.ones_(decoder.density_head[0].weight)
    torch.nn.init.zeros_(decoder.density_head[0].bias)
    ramp = 2 * torch.arange(4, dtype=torch.float64) - 3  # 0 at x = 2
    field = OccupancyField(ramp.expand(1, 1, 2, 2, 4), grid, decoder)
    answer = field.query(torch.tensor([[2.0, 1.0, 1.0], [0.25, 1.0, 1.0]]).double(), 0.8, gradient=True)
    assert answer.probability[0].item() == pytest.approx(1 - math.exp(-0.4))
    assert answer.gradient_per_m[0].tolist() == pytest.approx([0.8 * math.exp(-0.4) * 0.5, 0, 0])
    assert answer.gradient_per_m[1].tolist() == [0, 0, 0]  # the outermost half cell is flat


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (torch.zeros(3), r"shape \(3,\); give \[N, 3\]"),
        (torch.zeros(4, 2), r"shape \(4, 2\); give \[N, 3\]"),
        (torch.tensor([[0, 0, 0], [1, math.nan, 2.0]]), r"query point 1 is \[1.0, nan, 2.0\]; leave out"),
    ],
)
def test_points_that_are_refused(points, words):
    with pytest.raises(GeometryError, match=words):
        make_field().query(points.double(), LENGTH_M)
    with pytest.raises(GeometryError, match=words):
        require_points(points.numpy())


def test_numpy_in_numpy_out():
    field, points = make_field(torch.float32), points_in_the_box(dtype=torch.float32)
    answer = TorchField(field, LENGTH_M, sample=1).samples(points.numpy(), gradient=True)
    expected = field.query(points, LENGTH_M, 1, gradient=True)
    for ours, theirs in zip(answer, expected, strict=True):
        assert isinstance(ours, np.ndarray)
        np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("activation", ["softplus", "sigmoid"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_what_is_exported_is_the_field_with_its_gradient(activation, layers):
    """Derivatives written out by hand against automatic ones; points reach into the flat outermost half cells."""
    torch.manual_seed(2)
    config = FieldConfig(channels=4, hidden=8, layers=layers, density=activation, initial_density_per_m=0.5)
    x, y, z = GRID.shape
    field = OccupancyField(torch.randn(1, 4, z, y, x), GRID, FieldDecoder(config))
    points = points_in_the_box(300, torch.float32)
    deployed = DeployedField(field.decoder, GRID, LENGTH_M)
    features = field.features.movedim(1, -1)
    with torch.no_grad():
        probability, detailed, logits, gradient_per_m = deployed(features, points[:100], points)
    expected = field.query(points, LENGTH_M, gradient=True)
    torch.testing.assert_close(probability, expected.probability[:100], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(detailed, expected.probability, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient_per_m, expected.gradient_per_m, atol=1e-4, rtol=1e-4)
    assert expected.gradient_per_m.abs().max() > 0.05


def test_a_field_of_one_layer_does_not_change_with_height():
    grid = VoxelGrid((0, 0, 0), (4, 4, 1), 1.0)
    torch.manual_seed(3)
    field = OccupancyField(torch.randn(1, 4, 1, 4, 4), grid, make_field(torch.float32).decoder)
    points = torch.rand(50, 3) * torch.tensor([4, 4, 1])
    with torch.no_grad():
        _, probability, _, gradient_per_m = DeployedField(field.decoder, grid, LENGTH_M)(
            field.features.movedim(1, -1), points[:0], points
        )
    expected = field.query(points, LENGTH_M, gradient=True)
    torch.testing.assert_close(probability, expected.probability, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient_per_m, expected.gradient_per_m, atol=1e-4, rtol=1e-4)
    assert (gradient_per_m[:, 2] == 0).all()
