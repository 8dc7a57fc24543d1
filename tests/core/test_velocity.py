# SPDX-License-Identifier: Apache-2.0
"""The field's velocity, and what annotated boxes say about it."""

import numpy as np
import pytest
import torch

from occflownet_core.boxes import MovingBoxes
from occflownet_core.errors import ConfigError
from occflownet_core.field import FieldConfig, FieldDecoder, OccupancyField
from occflownet_core.grid import VoxelGrid
from occflownet_core.losses import velocity_loss
from occflownet_core.motion import box_velocities

GRID = VoxelGrid((-2, -1, 0), (2, 2, 1), 0.5)  # 8 x 6 x 2 cells


def upright(x_m: float, y_m: float, yaw_deg: float = 0.0) -> np.ndarray:
    pose = np.eye(4)
    cosine, sine = np.cos(np.radians(yaw_deg)), np.sin(np.radians(yaw_deg))
    pose[:2, :2] = [[cosine, -sine], [sine, cosine]]
    pose[:3, 3] = x_m, y_m, 0.5
    return pose


def boxes(*rows: tuple[np.ndarray, np.ndarray, int]) -> MovingBoxes:
    now, then, time = zip(*rows, strict=True)
    count = len(rows)
    return MovingBoxes.from_numpy(
        np.array(now), np.array(then), np.ones((count, 3)), np.full(count, 4), np.array(time), np.zeros(count, int)
    )


def found(moving: MovingBoxes) -> dict[tuple[float, ...], list[tuple[float, ...]]]:
    """Velocities by cell centre."""
    sample, cell, velocity_mps = box_velocities(moving, GRID)
    assert (sample == 0).all()
    centres = GRID.centres().transpose(2, 1, 0, 3).reshape(-1, 3)[cell.numpy()]
    result: dict[tuple[float, ...], list[tuple[float, ...]]] = {}
    for centre, velocity in zip(centres.tolist(), velocity_mps.tolist(), strict=True):
        result.setdefault(tuple(centre), []).append(tuple(round(v, 9) for v in velocity))
    return result


def test_a_box_gives_its_cells_displacement_over_time():
    """1 m cube about (1, 0.5): 2 x 2 x 2 cells; 1 m ahead half a second later, 0.5 m behind half a second before."""
    there = found(boxes((upright(1, 0.5), upright(2, 0.5), 1), (upright(1, 0.5), upright(0.5, 0.5), -1)))
    assert set(there) == {(x, y, z) for x in (0.75, 1.25) for y in (0.25, 0.75) for z in (0.25, 0.75)}
    assert all(sorted(each) == [(1.0, 0.0, 0.0), (2.0, 0.0, 0.0)] for each in there.values())


def test_a_turning_box_moves_its_corners():
    """A quarter turn to the left about (1, 0.5) takes (1.25, 0.75) to (0.75, 0.75): 0.5 m in half a second."""
    there = found(boxes((upright(1, 0.5), upright(1, 0.5, 90), 1)))
    assert there[1.25, 0.75, 0.25] == [(-1.0, 0.0, 0.0)] and there[0.75, 0.25, 0.25] == [(1.0, 0.0, 0.0)]


def test_only_the_next_keyframes_and_known_partners_count():
    absent = np.full((4, 4), np.nan)
    assert found(boxes((upright(1, 0.5), upright(2, 0.5), 2), (upright(1, 0.5), absent, 1))) == {}
    assert found(MovingBoxes.empty()) == {}


def test_velocity_loss_by_hand():
    zero = torch.zeros(2, 3, requires_grad=True)
    loss = velocity_loss(zero, torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    assert loss.item() == pytest.approx(((25 + 0.01) ** 0.5 - 0.1) / 2)
    loss.backward()
    assert zero.grad[0, :2].tolist() == pytest.approx([-0.3, -0.4], rel=1e-2) and zero.grad[1].tolist() == [0, 0, 0]
    assert velocity_loss(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0


def field(velocity: bool) -> OccupancyField:
    torch.manual_seed(0)
    decoder = FieldDecoder(FieldConfig(channels=4, hidden=8, layers=1, velocity=velocity))
    return OccupancyField(torch.randn(1, 4, 2, 6, 8), GRID, decoder)


def test_an_untrained_world_stands_still():
    assert field(True).velocity_lattice().abs().max() == 0


def test_velocity_is_decoded_per_cell_and_interpolated():
    moving = field(True)
    torch.nn.init.normal_(moving.decoder.velocity_head[-1].weight)
    coarse, fine = moving.velocity_lattice(), moving.velocity_lattice(VoxelGrid(GRID.lower_m, GRID.upper_m, 0.25))
    assert coarse.shape == (1, 3, 2, 6, 8) and fine.shape == (1, 3, 4, 12, 16)
    by_hand = moving.decoder.velocity(moving.features[0, :, 1, 2, 3])
    torch.testing.assert_close(coarse[0, :, 1, 2, 3], by_hand)
    # Half way between two cells' centres, a quarter cell off: weights 3/4 and 1/4 along each axis.
    along_x = 0.75 * coarse[0, :, 0, 0, 3] + 0.25 * coarse[0, :, 0, 0, 4]
    torch.testing.assert_close(fine[0, :, 0, 0, 7], along_x)


def test_a_field_without_velocity_says_so():
    with pytest.raises(ConfigError, match=r"set model\.field\.velocity: true"):
        field(False).velocity_lattice()
