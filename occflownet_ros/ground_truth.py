# SPDX-License-Identifier: Apache-2.0
"""Scoring a replay against the ground truth that its bag carries (as ``nuscenes_to_bag`` writes it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from occflownet_core import poses
from occflownet_core.evaluation import OccupancyEvaluation
from occflownet_core.labels import FREE
from occflownet_core.occupancy_frame import OccupancyFrame
from occflownet_core.ray_metrics import ray_origins_m
from occflownet_ros.bag import Bag
from occflownet_ros.nuscenes_messages import typestore

LIDAR_FRAME = "LIDAR_TOP"
_TOPICS = {"/keyframe", "/ground_truth/labels", "/ground_truth/mask_camera", "/odom", "/tf_static"}
_SAME_KEYFRAME_NS = 200_000_000


@dataclass(frozen=True, eq=False)
class TrueKeyframe:
    """The truth about one keyframe.

    Attributes:
        stamp_ns: the LiDAR's stamp, at which the labels hold.
        labels: uint8 [X, Y, Z].
        camera_mask: bool [X, Y, Z].
        global_from_ego: [4, 4] at that stamp.
    """

    stamp_ns: int
    labels: np.ndarray
    camera_mask: np.ndarray
    global_from_ego: np.ndarray


def read_ground_truth(bag: Path) -> tuple[list[TrueKeyframe], np.ndarray | None]:
    """The bag's labelled keyframes, and ``ego_from_lidar`` [4, 4] where it is told; nothing from a bag without them."""
    stamps_ns, labels, masks, ego_poses = [], {}, {}, {}
    ego_from_lidar = None
    with Bag(bag) as opened:
        for message in opened.messages(topics=_TOPICS):
            content = typestore().deserialize_cdr(message.data, message.msgtype)
            if message.topic == "/keyframe":
                stamps_ns.append(content.stamp.sec * 10**9 + content.stamp.nanosec)
            elif message.topic == "/odom":
                ego_poses[message.time_ns] = _pose(content.pose.pose.position, content.pose.pose.orientation)
            elif message.topic == "/tf_static":
                lidar = [t.transform for t in content.transforms if t.child_frame_id == LIDAR_FRAME]
                ego_from_lidar = _pose(lidar[0].translation, lidar[0].rotation) if lidar else ego_from_lidar
            else:
                shape = tuple(dim.size for dim in content.layout.dim)
                target = labels if message.topic.endswith("labels") else masks
                target[message.time_ns] = np.asarray(content.data, dtype=np.uint8).reshape(shape)
    return [
        TrueKeyframe(stamp_ns, labels[stamp_ns], masks[stamp_ns].astype(bool), ego_poses[nearest(ego_poses, stamp_ns)])
        for stamp_ns in stamps_ns
        if stamp_ns in labels and stamp_ns in masks and ego_poses
    ], ego_from_lidar


def score(frames: Mapping[int, OccupancyFrame], bag: Path) -> dict | None:
    """The benchmark's numbers for a replay, or None where the bag has no ground truth.

    A frame holds for its anchor camera's stamp and the truth for the LiDAR's, some 35 ms later: at 10 m/s they lie
    0.35 m apart, which costs a little. A keyframe without a frame counts as predicted free.

    Args:
        frames: by stamp in nanoseconds.
        bag: that was replayed.
    """
    truth, ego_from_lidar = read_ground_truth(bag)
    if not truth or not frames:
        return None
    some = next(iter(frames.values()))
    evaluation = OccupancyEvaluation(some.grid)
    nothing = np.full(some.grid.shape, FREE, dtype=np.uint8)
    missed = 0
    for keyframe in truth:
        stamp_ns = nearest(frames, keyframe.stamp_ns)
        is_there = abs(stamp_ns - keyframe.stamp_ns) < _SAME_KEYFRAME_NS
        missed += not is_there
        origins_m = None
        if ego_from_lidar is not None:
            lidars = np.stack([other.global_from_ego @ ego_from_lidar for other in truth])
            origins_m = ray_origins_m(lidars, keyframe.global_from_ego)
        prediction = frames[stamp_ns].labels if is_there else nothing
        evaluation.add(prediction, keyframe.labels, keyframe.camera_mask, origins_m)
    scores = evaluation.to_dict()
    if ego_from_lidar is None:
        del scores["rays"]
    return {**scores, "missed_keyframes": missed}


def nearest(stamps_ns: Mapping[int, object], stamp_ns: int) -> int:
    """The key nearest to a stamp."""
    return min(stamps_ns, key=lambda other_ns: abs(other_ns - stamp_ns))


def _pose(translation: object, rotation: object) -> np.ndarray:
    return poses.pose(
        np.array([translation.x, translation.y, translation.z]),
        np.array([rotation.w, rotation.x, rotation.y, rotation.z]),
    )
