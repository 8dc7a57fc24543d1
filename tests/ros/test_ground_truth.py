# SPDX-License-Identifier: Apache-2.0
"""Scoring a replay against its bag: the truth comes back as written, a perfect replay scores 1, a missed one is a miss."""

import numpy as np
import pytest

from occflownet_core.grid import OCC3D_GRID
from occflownet_core.labels import FREE
from occflownet_core.occupancy_frame import OccupancyFrame

pytest.importorskip("nuscenes")

ANCHOR_BEFORE_LIDAR_NS = 35_000_000


@pytest.fixture(scope="module")
def labelled_bag(minicity_root, tmp_path_factory):
    from occflownet_ros.nuscenes_to_bag import main

    bag = tmp_path_factory.mktemp("bags") / "labelled"
    scene = next((minicity_root / "gts").iterdir()).name
    options = [
        "--dataroot",
        str(minicity_root),
        "--version",
        "v1.0-mini",
        "--scene",
        scene,
        "--out",
        str(bag),
        "--no-lidar",
    ]
    assert main(options) == 0
    return bag


def frames_of(keyframes, labels_of):
    stamps_ns = [k.stamp_ns - ANCHOR_BEFORE_LIDAR_NS for k in keyframes]
    return {
        s: OccupancyFrame(s, "base_link", OCC3D_GRID, labels_of(k)) for s, k in zip(stamps_ns, keyframes, strict=True)
    }


def test_the_bag_gives_back_what_the_data_root_says(labelled_bag, minicity_root):
    from occflownet_ros.ground_truth import read_ground_truth

    keyframes = read_ground_truth(labelled_bag)
    files = sorted((minicity_root / "gts").glob("*/*/labels.npz"))
    assert len(keyframes) == len(files) > 1
    expected = {np.load(f)["semantics"].tobytes(): np.load(f)["mask_camera"] for f in files}
    for keyframe in keyframes:
        np.testing.assert_array_equal(keyframe.camera_mask, expected[keyframe.labels.tobytes()].astype(bool))
    # Rays start where nuScenes' LiDAR stands, 1.84 m above the rear axle.
    assert keyframes[0].ray_origins_m[0] == pytest.approx((0.944, 0, 1.840), abs=1e-3)


def test_a_perfect_replay_scores_one_and_an_empty_one_nothing(labelled_bag):
    from occflownet_ros.ground_truth import read_ground_truth, score

    keyframes = read_ground_truth(labelled_bag)
    perfect = score(frames_of(keyframes, lambda k: k.labels), labelled_bag)
    assert perfect["camera_mask"]["miou_17"] == 1
    assert perfect["rays"]["ray_iou"] == 1
    assert perfect["missed_keyframes"] == 0
    empty = score(frames_of(keyframes, lambda k: np.full_like(k.labels, FREE)), labelled_bag)
    assert empty["camera_mask"]["miou_17"] == 0
    assert empty["camera_mask"]["geometric_iou"] == 0


def test_a_missed_keyframe_counts_as_predicted_free(labelled_bag):
    from occflownet_ros.ground_truth import read_ground_truth, score

    keyframes = read_ground_truth(labelled_bag)
    some = score(frames_of(keyframes[1:], lambda k: k.labels), labelled_bag)
    occupied = [int((k.labels != FREE)[k.camera_mask].sum()) for k in keyframes]
    assert some["missed_keyframes"] == 1
    assert some["camera_mask"]["geometric_iou"] == pytest.approx(sum(occupied[1:]) / sum(occupied))
