# SPDX-License-Identifier: Apache-2.0
"""RayIoU against hand-worked rays and a ray caster that walks in tiny steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occflownet_core.errors import GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE
from occflownet_core.ray_metrics import (
    AZIMUTHS,
    RayCaster,
    RayScores,
    pitches_rad,
    ray_directions,
    ray_origins_m,
)

GRID = VoxelGrid((-8.0, -6.0, -1.0), (8.0, 6.0, 2.2), 0.4)  # 40 x 30 x 8
STEP_M = 0.002


def walk(labels: np.ndarray, origin_m: np.ndarray, direction: np.ndarray) -> tuple[int, float]:
    """The slow twin: label and distance of the first occupied voxel, to one step."""
    distance_m = np.arange(0, 25, STEP_M)
    cell, inside = GRID.cells(origin_m + distance_m[:, None] * direction)
    label = np.where(inside, labels[tuple(cell.T)], FREE)
    first = (label != FREE).argmax()
    return (int(label[first]), distance_m[first]) if label[first] != FREE else (FREE, np.inf)


def test_39_rings_of_360():
    # SparseOcc: the first ring looks 45 degrees down, the tenth arctan(1/10), then steps of the last difference to 12.5.
    pitch = np.degrees(pitches_rad())
    assert len(pitch) == 39
    assert pitch[0] == pytest.approx(-45) and pitch[9] == pytest.approx(-5.710593)
    assert np.diff(pitch[8:]) == pytest.approx(np.full(30, 0.629599), abs=1e-5)
    assert pitch[-2] < np.degrees(0.21) <= pitch[-1]
    directions = ray_directions()
    assert directions.shape == (14040, 3)
    assert np.linalg.norm(directions, axis=1) == pytest.approx(np.ones(14040))
    assert directions[0] == pytest.approx([np.sqrt(0.5), 0, -np.sqrt(0.5)])
    assert directions[90] == pytest.approx([0, np.sqrt(0.5), -np.sqrt(0.5)], abs=1e-9)


def test_flat_ground_by_hand():
    labels = np.full(GRID.shape, FREE, np.uint8)
    labels[:, :, 1] = 11  # from -0.6 to -0.2 m
    hits = RayCaster(GRID, [[0.1, 0.1, 1.8]]).cast(labels)
    down = hits.label[0, 0]
    assert (down == 11).all()  # 45 degrees down from 2 m above the ground's upper face
    assert hits.depth_m[0, 0] == pytest.approx(np.full(AZIMUTHS, 2 * np.sqrt(2)), abs=1e-5)
    assert (hits.label[0, -1] == FREE).all() and np.isinf(hits.depth_m[0, -1]).all()


def test_a_wall_is_met_at_its_near_face():
    labels = np.full(GRID.shape, FREE, np.uint8)
    labels[30, :, :] = 15  # x from 4.0 to 4.4 m
    hits = RayCaster(GRID, [[0.1, 0.1, 1.0]]).cast(labels)
    pitch = pitches_rad()[20]
    assert hits.label[0, 20, 0] == 15 and hits.label[0, 20, 180] == FREE
    assert hits.depth_m[0, 20, 0] == pytest.approx(3.9 / np.cos(pitch), abs=1e-5)
    assert hits.depth_m[0, 20, 30] == pytest.approx(3.9 / np.cos(pitch) / np.cos(np.pi / 6), abs=1e-5)


def test_an_origin_inside_something_meets_it_at_once():
    labels = np.full(GRID.shape, 4, np.uint8)
    hits = RayCaster(GRID, [[0.1, 0.1, 1.0]]).cast(labels)
    assert (hits.label == 4).all() and (hits.depth_m == 0).all()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), filled=st.sampled_from([0.002, 0.02, 0.3]))
def test_casting_equals_walking(seed, filled):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(GRID.shape) < filled, rng.integers(0, 17, GRID.shape), FREE).astype(np.uint8)
    # Two origins within the grid, one above it and one below it.
    origins_m = rng.uniform((-7.9, -5.9, -0.9), (7.9, 5.9, 2.1), (4, 3))
    origins_m[2:, 2] = 2.4, -1.3
    hits = RayCaster(GRID, origins_m).cast(labels)
    directions = ray_directions()
    for ray in rng.integers(0, len(directions), 40):
        o = ray % 4
        ring, azimuth = divmod(int(ray), AZIMUTHS)
        label, depth_m = walk(labels, origins_m[o], directions[ray])
        found, found_m = int(hits.label[o, ring, azimuth]), hits.depth_m[o, ring, azimuth]
        if (label, found) != (FREE, FREE) and not np.isclose(depth_m, found_m, atol=1.01 * STEP_M):
            # The walker may step over a voxel's corner; then the caster's hit is real and no longer than a step.
            assert found_m < depth_m
            chord_m = np.arange(found_m - STEP_M, found_m + 2 * STEP_M, 1e-5)
            cell, inside = GRID.cells(origins_m[o] + chord_m[:, None] * directions[ray])
            solid = inside & (labels[tuple(cell.T)] != FREE)
            assert 0 < solid.sum() * 1e-5 <= 1.01 * STEP_M
        else:
            assert label == found


def test_ray_iou_by_hand():
    """The wall stands 1.2 m too far on one side: those rays count from 2 m on; on the other its class is wrong."""
    truth = np.full(GRID.shape, FREE, np.uint8)
    guess = truth.copy()
    truth[30, :, :], guess[33, :, :] = 15, 15
    truth[5, :, :], guess[5, :, :] = 4, 10
    caster = RayCaster(GRID, [[0.1, 0.1, 1.0]])
    there, seen = caster.cast(truth), caster.cast(guess)
    scores = RayScores()
    scores.add(seen, there)
    # The same from the definition, ray by ray.
    expected = np.zeros((3, 17))
    for c in range(17):
        for i, limit_m in enumerate((1, 2, 4)):
            valid = there.label != FREE
            close = np.abs(np.where(valid, there.depth_m, 0) - seen.depth_m) < limit_m
            both = (valid & (there.label == c) & (seen.label == c) & close).sum()
            union = (there.label == c).sum() + (valid & (seen.label == c)).sum() - both
            expected[i, c] = both / union if union else np.nan
    assert scores.iou == pytest.approx(expected, nan_ok=True)
    assert scores.iou[0, 15] == 0 and scores.iou[1, 15] > 0.5
    assert scores.iou[:, 4].tolist() == [0, 0, 0]
    assert scores.ray_iou == pytest.approx(np.mean(np.nanmean(expected, axis=1)))


def test_perfect_prediction_scores_one_and_samples_add_up():
    rng = np.random.default_rng(1)
    labels = np.where(rng.random(GRID.shape) < 0.02, rng.integers(0, 17, GRID.shape), FREE).astype(np.uint8)
    caster = RayCaster(GRID, [[0.1, 0.1, 1.0]])
    scores = RayScores()
    scores.add(caster.cast(labels), caster.cast(labels))
    once = scores.there.copy()
    scores.add(caster.cast(labels), caster.cast(labels))
    assert scores.ray_iou == 1
    assert np.array_equal(scores.there, 2 * once)


def test_origins_near_the_vehicle_evenly_thinned_out():
    drive = np.tile(np.eye(4), (40, 1, 1))
    drive[:, 0, 3] = np.arange(40) * 4.0  # every 4 m; at keyframe 20 the vehicle is at x = 80
    origins_m = ray_origins_m(drive, drive[20])
    # |x| < 39 m keeps x = -36..36 (19 of them); rounding 0, 18/7, ... gives the 8 below.
    assert origins_m[:, 0].tolist() == [-36.0, -24.0, -16.0, -4.0, 4.0, 16.0, 24.0, 36.0]
    assert (origins_m[:, 1:] == 0).all()


def test_no_origin_gives_no_rays():
    hits = RayCaster(GRID, np.zeros((0, 3))).cast(np.zeros(GRID.shape, np.uint8))
    assert hits.label.shape == (0, 39, 360)
    scores = RayScores()
    scores.add(hits, hits)
    assert np.isnan(scores.ray_iou)


def test_bad_origin():
    with pytest.raises(GeometryError, match="beside the grid"):
        RayCaster(GRID, [[9.0, 0, 0]])
