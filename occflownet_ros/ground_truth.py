# SPDX-License-Identifier: Apache-2.0
"""The truth about a bag's keyframes, from the bag itself (as ``nuscenes_to_bag`` writes it) or from Occ3D's gts folder,
and the scores of predictions against it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from occflownet_core import poses
from occflownet_core.errors import BagError, DatasetError
from occflownet_core.evaluation import OccupancyEvaluation
from occflownet_core.grid import VoxelGrid
from occflownet_core.labels import FREE
from occflownet_core.occupancy_frame import OccupancyFrame
from occflownet_core.ray_metrics import ray_origins_m
from occflownet_ros.bag import Bag, BagMessage
from occflownet_ros.bag_decoding import decode, stamp_of
from occflownet_ros.bag_keyframes import KEYFRAME_TOPIC
from occflownet_ros.nuscenes_scene import read_labels

LIDAR_FRAME = "LIDAR_TOP"
_LABELS, _MASK = "/ground_truth/labels", "/ground_truth/mask_camera"
_TOPICS = {KEYFRAME_TOPIC, _LABELS, _MASK, "/odom", "/tf_static"}
_SAME_KEYFRAME_NS = 200_000_000


@dataclass(frozen=True, eq=False)
class TrueKeyframe:
    """The truth about one keyframe.

    Attributes:
        token: the data set's name for it.
        stamp_ns: the LiDAR's stamp, at which the labels hold.
        labels: uint8 [X, Y, Z].
        camera_mask: bool [X, Y, Z].
        ray_origins_m: [O, 3] from which RayIoU judges it, ego frame; None where the bag has no LiDAR.
    """

    token: str
    stamp_ns: int
    labels: np.ndarray
    camera_mask: np.ndarray
    ray_origins_m: np.ndarray | None


@dataclass
class _BagContent:
    """What a bag says about truth and motion.

    Attributes:
        tokens: of the keyframes, by LiDAR stamp, in order of time.
        labels, masks: uint8 [X, Y, Z] by LiDAR stamp.
        ego_poses: ``global_from_ego`` [4, 4] by stamp.
        ego_from_lidar: [4, 4], None where there is no LiDAR.
    """

    tokens: dict[int, str]
    labels: dict[int, np.ndarray]
    masks: dict[int, np.ndarray]
    ego_poses: dict[int, np.ndarray]
    ego_from_lidar: np.ndarray | None

    def ray_origins_m(self) -> dict[int, np.ndarray | None]:
        """RayIoU's origins by keyframe stamp: where the LiDAR was at all the bag's keyframes."""
        if self.ego_from_lidar is None or not self.ego_poses:
            return dict.fromkeys(self.tokens)
        ego = {stamp_ns: self.ego_poses[nearest(self.ego_poses, stamp_ns)] for stamp_ns in self.tokens}
        lidars = np.stack([global_from_ego @ self.ego_from_lidar for global_from_ego in ego.values()])
        return {stamp_ns: ray_origins_m(lidars, global_from_ego) for stamp_ns, global_from_ego in ego.items()}


def read_ground_truth(bag: Path, dataroot: Path | None = None) -> list[TrueKeyframe]:
    """The labelled ones of a bag's keyframes, in order of time; none where there are no labels.

    Args:
        bag: rosbag2 folder or file.
        dataroot: root of a data set with Occ3D's ``gts/<scene>/<token>/labels.npz``; None takes what the bag carries.

    Raises:
        DatasetError: the root has no gts, none of the bag's keyframes is in it, or a file is damaged.
    """
    content = _read(bag, with_labels=dataroot is None)
    if dataroot is not None:
        _read_labels(content, dataroot, bag)
    origins_m = content.ray_origins_m()
    return [
        TrueKeyframe(token, stamp_ns, content.labels[stamp_ns], content.masks[stamp_ns] > 0, origins_m[stamp_ns])
        for stamp_ns, token in content.tokens.items()
        if stamp_ns in content.labels and stamp_ns in content.masks
    ]


def _read(bag: Path, with_labels: bool) -> _BagContent:
    content = _BagContent({}, {}, {}, {}, None)
    topics = _TOPICS if with_labels else _TOPICS - {_LABELS, _MASK}
    with Bag(bag) as opened:
        for message in opened.messages(topics=topics):
            decoded = decode(message)
            if message.topic == KEYFRAME_TOPIC:
                content.tokens[stamp_of(message)] = decoded.frame_id
            elif message.topic == "/odom":
                pose = decoded.pose.pose
                content.ego_poses[stamp_of(message)] = _pose(pose.position, pose.orientation)
            elif message.topic == "/tf_static":
                lidar = [t.transform for t in decoded.transforms if t.child_frame_id == LIDAR_FRAME]
                if lidar:
                    content.ego_from_lidar = _pose(lidar[0].translation, lidar[0].rotation)
            else:
                # The message has no stamp: it is recorded at its keyframe's.
                target = content.labels if message.topic == _LABELS else content.masks
                shape = tuple(dim.size for dim in decoded.layout.dim)
                target[message.time_ns] = _label_array(np.asarray(decoded.data, dtype=np.uint8), shape, message)
    content.tokens = dict(sorted(content.tokens.items()))
    return content


def _label_array(values: np.ndarray, shape: tuple[int, ...], message: BagMessage) -> np.ndarray:
    if values.size != math.prod(shape):
        raise BagError(
            f"the message of {message.topic} at {message.time_ns} ns holds {values.size} labels where its layout says "
            f"{' x '.join(map(str, shape))}; record it again, or give the labels with --gt"
        )
    return values.reshape(shape)


def _read_labels(content: _BagContent, dataroot: Path, bag: Path) -> None:
    """Take the labels from the data root's gts folder."""
    folder = dataroot / "gts"
    if not folder.is_dir():
        raise DatasetError(
            f"{dataroot} has no folder gts; give the root into which Occ3D's gts were unpacked, or leave --gt out"
        )
    files = {path.name: path / "labels.npz" for path in folder.glob("*/*")}
    for stamp_ns, token in content.tokens.items():
        if token in files:
            content.labels[stamp_ns], content.masks[stamp_ns] = read_labels(files[token])
    if content.tokens and not content.labels:
        raise DatasetError(
            f"none of the {len(content.tokens)} keyframes of bag {bag} (the first is {next(iter(content.tokens.values()))}) "
            f"is in {folder}; give the ground truth of the scene that was recorded"
        )


def evaluate_keyframes(
    truth: Sequence[TrueKeyframe], predictions: Sequence[np.ndarray | None], grid: VoxelGrid
) -> Iterator[OccupancyEvaluation]:
    """The evaluation of each keyframe on its own; ``OccupancyEvaluation.include`` adds them up.

    Args:
        truth: keyframes.
        predictions: uint8 [X, Y, Z] for each, None for one that was missed: it counts as predicted free everywhere.
        grid: of all labels.

    Raises:
        DatasetError: a keyframe's labels are of another grid.
    """
    nothing = np.full(grid.shape, FREE, dtype=np.uint8)
    for keyframe, prediction in zip(truth, predictions, strict=True):
        if keyframe.labels.shape != grid.shape:
            raise DatasetError(
                f"the ground truth of keyframe {keyframe.token} has {keyframe.labels.shape} cells, the bundle's grid "
                f"{grid.shape}; evaluate a bundle of the same grid"
            )
        evaluation = OccupancyEvaluation(grid)
        labels = nothing if prediction is None else prediction
        evaluation.add(labels, keyframe.labels, keyframe.camera_mask, keyframe.ray_origins_m)
        yield evaluation


def total(evaluations: Sequence[OccupancyEvaluation], with_rays: bool) -> dict:
    """All scores of several keyframes together; without ``rays`` where the bag has no LiDAR."""
    evaluation = OccupancyEvaluation(evaluations[0].grid)
    for one in evaluations:
        evaluation.include(one)
    scores = evaluation.to_dict()
    if not with_rays:
        del scores["rays"]
    return scores


def score(frames: Mapping[int, OccupancyFrame], bag: Path) -> dict | None:
    """The benchmark's numbers for a replay, or None where the bag has no ground truth.

    A frame holds for its anchor camera's stamp and the truth for the LiDAR's, some 35 ms later: at 10 m/s they lie
    0.35 m apart, which costs a little. A keyframe without a frame counts as predicted free.

    Args:
        frames: by stamp in nanoseconds.
        bag: that was replayed.
    """
    truth = read_ground_truth(bag)
    if not truth or not frames:
        return None
    grid = next(iter(frames.values())).grid
    stamps_ns = [nearest(frames, keyframe.stamp_ns) for keyframe in truth]
    predictions = [
        frames[stamp_ns].labels if abs(stamp_ns - keyframe.stamp_ns) < _SAME_KEYFRAME_NS else None
        for stamp_ns, keyframe in zip(stamps_ns, truth, strict=True)
    ]
    evaluations = list(evaluate_keyframes(truth, predictions, grid))
    scores = total(evaluations, with_rays=all(k.ray_origins_m is not None for k in truth))
    return {**scores, "missed_keyframes": sum(prediction is None for prediction in predictions)}


def nearest(stamps_ns: Mapping[int, object], stamp_ns: int) -> int:
    """The key nearest to a stamp."""
    return min(stamps_ns, key=lambda other_ns: abs(other_ns - stamp_ns))


def _pose(translation: object, rotation: object) -> np.ndarray:
    return poses.pose(
        np.array([translation.x, translation.y, translation.z]),
        np.array([rotation.w, rotation.x, rotation.y, rotation.z]),
    )
