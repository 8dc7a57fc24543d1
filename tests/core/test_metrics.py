# SPDX-License-Identifier: Apache-2.0
"""Voxel metrics against hand-worked numbers, loops and scikit-learn's definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occflownet_core.errors import GeometryError
from occflownet_core.labels import BOXED_CLASSES, FREE
from occflownet_core.metrics import CLASS_SETS, STATIC_CLASSES, ThresholdSweep, VoxelScores, confusion_matrix


def test_confusion_counts_truth_in_rows():
    matrix = confusion_matrix(np.array([4, 4, 17], np.uint8), np.array([4, 10, 10], np.uint8))
    assert matrix[4, 4] == 1 and matrix[10, 4] == 1 and matrix[10, 17] == 1
    assert matrix.sum() == 3 and matrix.shape == (18, 18)


def test_scores_by_hand():
    #        car right, car seen as truck, car missed, free seen as car, free right; one more outside the mask
    truth = np.array([4, 4, 4, FREE, FREE, 11], np.uint8)
    guess = np.array([4, 10, FREE, 4, FREE, 4], np.uint8)
    scores = VoxelScores.of(confusion_matrix(guess, truth, np.array([1, 1, 1, 1, 1, 0], bool)))
    assert scores.iou[4] == pytest.approx(1 / 4)  # 1 hit of 3 there + 1 more predicted
    assert scores.iou[10] == 0  # predicted once, never there
    assert np.isnan(np.delete(scores.iou, [4, 10])).all()
    assert scores.miou == pytest.approx(1 / 8)
    assert scores.dynamic_miou == pytest.approx(1 / 8)
    assert np.isnan(scores.static_miou)
    assert scores.dynamic_iou == pytest.approx(2 / 4)  # a car seen as a truck is right here
    assert scores.geometric_iou == pytest.approx(2 / 4)  # two of {car, car, car, wrong car}
    assert scores.precision == pytest.approx(2 / 3) and scores.recall == pytest.approx(2 / 3)


def test_class_sets():
    assert sorted([*BOXED_CLASSES, *STATIC_CLASSES]) == list(range(17))
    assert sorted(set(CLASS_SETS[17]) - set(CLASS_SETS[15])) == [0, 12]


def test_scores_of_nothing_are_nan():
    scores = VoxelScores.of(np.zeros((18, 18), int))
    assert np.isnan([scores.miou, scores.geometric_iou, scores.precision]).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_confusion_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(0, 18, (2, 3, 4, 5), dtype=np.uint8)
    mask = rng.random((3, 4, 5)) < 0.5
    expected = np.zeros((18, 18), int)
    for t, g, m in zip(truth.ravel(), guess.ravel(), mask.ravel(), strict=True):
        expected[t, g] += m
    assert np.array_equal(confusion_matrix(guess, truth, mask), expected)
    scores = VoxelScores.of(expected)
    for c in range(17):
        union = ((truth == c) | (guess == c))[mask].sum()
        both = ((truth == c) & (guess == c))[mask].sum()
        assert scores.iou[c] == pytest.approx(both / union) if union else np.isnan(scores.iou[c])


def test_sweep_equals_thresholding_each_time():
    rng = np.random.default_rng(3)
    thresholds = [0.0, 0.25, 0.5, 0.9]
    sweep = ThresholdSweep(thresholds)
    expected = np.zeros((len(thresholds), 18, 18), int)
    for _ in range(2):
        probability = rng.random((6, 5, 4)).astype(np.float32)
        probability[0, :3, 0] = [0.25, 0.5, 0.0]  # exactly at a threshold: not above it
        label = rng.integers(0, 17, (6, 5, 4), dtype=np.uint8)
        truth = rng.integers(0, 18, (6, 5, 4), dtype=np.uint8)
        mask = rng.random((6, 5, 4)) < 0.7
        sweep.add(probability, label, truth, mask)
        for i, threshold in enumerate(thresholds):
            guess = np.where(probability > np.float32(threshold), label, FREE).astype(np.uint8)
            expected[i] += confusion_matrix(guess, truth, mask)
    assert np.array_equal(sweep.confusion_matrices(), expected)


def test_bad_input():
    labels = np.zeros((2, 2, 2), np.uint8)
    with pytest.raises(GeometryError, match="shapes"):
        confusion_matrix(labels, labels[:1])
    with pytest.raises(GeometryError, match="label is 18"):
        confusion_matrix(labels + 18, labels)
    with pytest.raises(GeometryError, match="do not ascend"):
        ThresholdSweep([0.5, 0.5])
