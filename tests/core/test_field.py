# SPDX-License-Identifier: Apache-2.0
"""The occupancy field: at points and on lattices, against explicit loops."""

import itertools
import math

import numpy as np
import pytest
import torch

from occflownet_core.errors import ConfigError, GeometryError
from occflownet_core.field import FieldConfig, FieldDecoder, OccupancyField, occupancy_probability, refine
from occflownet_core.grid import VoxelGrid

GRID = VoxelGrid((-2, -1, 0), (2, 2, 1), 0.5)  # 8 x 6 x 2 cells
SMALL = {"channels": 4, "hidden": 8, "layers": 2}


def make_field(batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0, **config) -> OccupancyField:
    torch.manual_seed(seed)
    x, y, z = GRID.shape
    decoder = FieldDecoder(FieldConfig(**SMALL | config)).to(dtype)
    return OccupancyField(torch.randn(batch, 4, z, y, x, dtype=dtype), GRID, decoder)


def centres(grid: VoxelGrid) -> torch.Tensor:
    """Cell centres [Z * Y * X, 3] in the order of a lattice [Z, Y, X]."""
    return torch.from_numpy(grid.centres().transpose(2, 1, 0, 3).reshape(-1, 3).copy())


def interpolated_slowly(volume: np.ndarray, grid: VoxelGrid, point_m: np.ndarray) -> np.ndarray:
    """Values [C] of a volume [C, Z, Y, X] at a point; beyond the outermost centres they stay what they are there."""
    position = [
        min(max(float(i) - 0.5, 0), n - 1) for i, n in zip(grid.index_from_metric(point_m), grid.shape, strict=True)
    ]
    total = np.zeros(volume.shape[0])
    for corner in itertools.product((0, 1), repeat=3):
        weight, cell = 1.0, []
        for p, c, n in zip(position, corner, grid.shape, strict=True):
            low = min(math.floor(p), n - 2)
            weight *= p - low if c else 1 - (p - low)
            cell.append(low + c)
        total += weight * volume[:, cell[2], cell[1], cell[0]]
    return total


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_lattice_and_points_agree_at_cell_centres(dtype, tolerance):
    field = make_field(dtype=dtype)
    density, logits = field.lattice()
    points = centres(GRID).to(dtype)
    for b in range(2):
        batch_index = torch.full((len(points),), b)
        torch.testing.assert_close(field.density(points, batch_index), density[b].flatten(), atol=tolerance, rtol=0)
        torch.testing.assert_close(field.semantics(points, batch_index), logits[b].flatten(1).T, atol=tolerance, rtol=0)


def test_points_equal_explicit_loops():
    field = make_field()
    rng = np.random.default_rng(1)
    points = rng.uniform((-2, -1, 0), (2, 2, 1), (50, 3))
    batch_index = rng.integers(0, 2, 50)
    features = np.stack(
        [interpolated_slowly(field.features[b].numpy(), GRID, p) for b, p in zip(batch_index, points, strict=True)]
    )
    expected = torch.from_numpy(features)
    at = torch.from_numpy(points), torch.from_numpy(batch_index)
    torch.testing.assert_close(
        field.density(*at), 5 * torch.nn.functional.softplus(field.decoder.density_head(expected))[:, 0]
    )
    torch.testing.assert_close(field.semantics(*at), field.decoder.semantic_head(expected))


@pytest.mark.parametrize("factor", [2, 3])
def test_a_finer_lattice_interpolates_what_the_activation_takes(factor):
    field = make_field(batch=1)
    fine = VoxelGrid(GRID.lower_m, GRID.upper_m, GRID.voxel_size_m / factor)
    features = field.features.movedim(1, -1)
    coarse = torch.cat([field.decoder.density_head(features), field.decoder.semantic_head(features)], -1)[0].detach()
    coarse = coarse.movedim(-1, 0).numpy()  # [18, Z, Y, X]
    expected = torch.from_numpy(np.stack([interpolated_slowly(coarse, GRID, p) for p in centres(fine).numpy()], axis=1))
    density, logits = field.lattice(fine)
    assert density.shape == (1, *fine.shape[::-1])
    torch.testing.assert_close(density.flatten(), 5 * torch.log1p(torch.exp(expected[0])))
    torch.testing.assert_close(logits[0].flatten(1), expected[1:])


def test_doubling_takes_a_quarter_and_three_quarters():
    line = torch.tensor([0.0, 4.0]).view(1, 1, 1, 1, 2)
    assert refine(line, 2)[0, 0, 0, 0].tolist() == [0, 1, 3, 4]
    column = torch.tensor([0.0, 4.0]).view(1, 1, 2, 1, 1)
    assert refine(column, 2)[0, 0, :, 1, 1].tolist() == [0, 1, 3, 4]


def test_outside_the_box_there_is_nothing():
    field = make_field(batch=1)
    outside = torch.tensor(
        [[-2.001, 0, 0.5], [2.0, 0, 0.5], [0, 2.5, 0.5], [0, 0, -0.01], [1e9, 0, 0], [math.nan, 0, 0]]
    )
    zero = torch.zeros(6, dtype=torch.long)
    assert (field.density(outside.double(), zero) == 0).all()
    assert (field.semantics(outside.double(), zero) == 0).all()
    inside = torch.tensor([[-1.999, 0, 0.5], [1.999, 0, 0.5]]).double()
    assert (field.density(inside, zero[:2]) > 0).all()


def test_the_outermost_half_cell_is_flat():
    field = make_field(batch=1)
    across = torch.tensor([[-1.99, 0.1, 0.5], [-1.75, 0.1, 0.5], [-1.74, 0.1, 0.5]]).double()
    edge, centre, beyond = field.density(across, torch.zeros(3, dtype=torch.long)).tolist()
    assert edge == pytest.approx(centre, abs=1e-12)
    assert beyond != pytest.approx(centre, abs=1e-6)


def test_gradients_with_respect_to_points_and_features():
    field = make_field()
    points = torch.tensor([[-1.3, 0.4, 0.4], [0.9, 1.2, 0.61], [0.2, -0.6, 0.33]]).double().requires_grad_()
    features = field.features.clone().requires_grad_()
    batch_index = torch.tensor([0, 1, 0])

    def both(points, features):
        at = OccupancyField(features, GRID, field.decoder)
        return at.density(points, batch_index), at.semantics(points, batch_index)

    assert torch.autograd.gradcheck(both, (points, features))


@pytest.mark.parametrize(
    ("config", "pre_density", "expected"),
    [
        ({"density": "sigmoid", "density_scale_per_m": 1.0}, 0.0, 0.5),
        ({"density": "sigmoid", "density_scale_per_m": 1.0}, 50.0, 1.0),  # the published cap
        ({"density": "softplus", "density_scale_per_m": 2.0}, 0.0, 2 * math.log(2)),
        ({"density": "softplus", "density_scale_per_m": 2.0}, 50.0, 100.0),
    ],
)
def test_density_activations(config, pre_density, expected):
    decoder = FieldDecoder(FieldConfig(**SMALL | config))
    assert decoder.density(torch.tensor(pre_density)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("activation", ["softplus", "sigmoid"])
def test_an_untrained_field_starts_thin(activation):
    decoder = FieldDecoder(FieldConfig(**SMALL, density=activation, initial_density_per_m=0.03))
    bias = decoder.density_head[-1].bias
    assert decoder.density(bias).item() == pytest.approx(0.03, rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"initial_density_per_m": 0.0},
        {"density_scale_per_m": -1.0},
        {"density": "sigmoid", "density_scale_per_m": 1.0, "initial_density_per_m": 1.0},
        {"density": "relu"},
    ],
)
def test_impossible_densities_are_refused(config):
    with pytest.raises(ConfigError, match="cannot start at"):
        FieldDecoder(FieldConfig(**SMALL | config))


def test_half_the_light_passes_one_half_life():
    density = torch.tensor([0.0, math.log(2) / 0.4, 1e9])
    assert occupancy_probability(density, 0.4).tolist() == pytest.approx([0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    "grid",
    [
        VoxelGrid((-2, -1, 0), (2, 2, 1), 1.0),
        VoxelGrid((-2, -1, 0), (2, 1, 1), 0.25),
        VoxelGrid((-2.5, -1, 0), (1.5, 2, 1), 0.25),
    ],
    ids=["coarser", "smaller", "shifted"],
)
def test_a_lattice_of_another_box_is_refused(grid):
    with pytest.raises(GeometryError, match="give the same box in cells that divide its own"):
        make_field().lattice(grid)


def test_features_of_another_grid_are_refused():
    field = make_field()
    with pytest.raises(GeometryError, match="field features"):
        OccupancyField(field.features[..., :-1], GRID, field.decoder)
    with pytest.raises(GeometryError, match=r"give \[B, C, Z, Y, X\]"):
        OccupancyField(field.features[0], GRID, field.decoder)
