# SPDX-License-Identifier: Apache-2.0
"""Recorded drives as an engine takes them, without a node: image sets of a bag or of a data set in nuScenes' format,
with ego motion between the anchor camera's stamps and, where there is one, the truth."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from occflownet_core.camera import CameraRig
from occflownet_core.errors import BagError, DatasetError
from occflownet_core.rig_file import load_rig
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.drive import EngineInput
from occflownet_ros.bag import Bag, BagMessage
from occflownet_ros.bag_calibration import save_bags_rig
from occflownet_ros.bag_decoding import decode, stamp_of
from occflownet_ros.bag_keyframes import (
    BagKeyframe,
    NodeInputs,
    find_inputs,
    keyframe_messages,
    keyframes_of,
    read_keyframes,
)
from occflownet_ros.calibration_source import anchor_index
from occflownet_ros.ego_motion import EgoMotion, PoseBuffer
from occflownet_ros.ground_truth import TrueKeyframe, read_ground_truth
from occflownet_ros.image_encodings import bgr_image
from occflownet_ros.nuscenes_scene import Scene, SensorFrame, open_nuscenes, read_jpeg, read_labels, read_scene
from occflownet_ros.parameters import LOCKSTEP, Settings
from occflownet_ros.replay_plan import default_anchor

_SETTINGS = Settings.from_values(LOCKSTEP)


def bag_inputs(
    path: Path,
    bundle: Bundle,
    anchor_camera: str = "",
    calibration: Path | None = None,
    gt: Path | None = None,
    most: int | None = None,
) -> Iterator[EngineInput]:
    """The complete image sets of a bag: those of its keyframes, or, where it marks none, one per anchor image.

    Args:
        path: rosbag2 folder or file.
        bundle: the model that will see them.
        anchor_camera: opens a set; empty for the front camera, or the bundle's first.
        calibration: YAML file of the cameras; None for ``calibration.yaml`` in the bag, else camera_info and /tf_static.
        gt: root of a data set with Occ3D's gts; None for the labels that the bag carries.
        most: stop after so many.

    Raises:
        BagError: the bag lacks a camera's images, or has no complete set.
        CalibrationError: its calibration is not known.
        DatasetError: labels are damaged, or of another grid than the bundle's.
    """
    anchor = anchor_index(bundle.cameras, anchor_camera or default_anchor(bundle))
    with Bag(path) as bag:
        topics = find_inputs(bag, bundle.cameras)
        keyframes = read_keyframes(bag, topics, anchor, _SETTINGS.max_camera_time_diff_ms)
    truth = {keyframe.token: keyframe for keyframe in read_ground_truth(path, gt)} if keyframes else {}
    _require_grid(truth.values(), bundle)
    rig = _rig(path, topics, bundle, calibration)
    ego = _Ego()
    with Bag(path) as bag:
        keyframes = keyframes or _every_set(bag, topics, anchor)
        complete = [keyframe for keyframe in keyframes if keyframe.is_complete][:most]
        if not complete:
            raise BagError(f"bag {path} has no moment at which every camera has an image; give another bag")
        for keyframe, messages in keyframe_messages(bag.messages(set(topics.topics)), complete, topics):
            for message in messages:
                if message.topic == topics.odometry:
                    ego.hear(message)
            by_topic = {message.topic: message for message in messages}
            images = np.stack(
                [
                    _network_image(by_topic[topic], bundle, camera)
                    for topic, camera in zip(topics.images, rig, strict=True)
                ]
            )
            known = truth.get(keyframe.token)
            yield EngineInput(
                keyframe.token,
                images,
                ego.motion_to(keyframe.set_stamp_ns),
                rig,
                known.labels if known else None,
                known.camera_mask if known else None,
            )


def dataset_inputs(
    dataroot: Path,
    version: str,
    scenes: Sequence[str],
    bundle: Bundle,
    anchor_camera: str = "",
    most: int | None = None,
) -> Iterator[EngineInput]:
    """The keyframes of a data set's scenes, as a vehicle would see them: bare extrinsics, motion between anchor stamps.

    Args:
        dataroot: with the tables' folder, samples and, for scores, Occ3D's gts.
        version: the tables' folder.
        scenes: names; none for all.
        bundle: the model that will see them.
        anchor_camera: gives a set's pose; empty for the front camera, or the bundle's first.
        most: stop after so many.

    Raises:
        DatasetError: tables, images or labels are missing or damaged, or labels are of another grid.
        CalibrationError: the scene lacks one of the bundle's cameras.
    """
    nusc = open_nuscenes(dataroot, version)
    anchor = bundle.cameras[anchor_index(bundle.cameras, anchor_camera or default_anchor(bundle))]
    left = most
    for name in scenes or [scene["name"] for scene in nusc.scene]:
        for frame in _scene_inputs(read_scene(nusc, name, sweeps=False), bundle, anchor):
            if left is not None and left <= 0:
                return
            left = None if left is None else left - 1
            yield frame


def _every_set(bag: Bag, topics: NodeInputs, anchor: int) -> list[BagKeyframe]:
    """A keyframe for each anchor image, named by its stamp."""
    stamps_ns: dict[str, list[int]] = {topic: [] for topic in topics.images}
    for message in bag.messages(set(topics.images)):
        stamps_ns[message.topic].append(stamp_of(message))
    ascending = [sorted(set(stamps_ns[topic])) for topic in topics.images]
    markers = [(stamp_ns, f"{stamp_ns / 1e9:.3f} s") for stamp_ns in ascending[anchor]]
    return keyframes_of(markers, ascending, anchor, _SETTINGS.max_camera_time_diff_ms)


def _rig(path: Path, topics: NodeInputs, bundle: Bundle, calibration: Path | None) -> CameraRig:
    if calibration is None and (path / "calibration.yaml").is_file():
        calibration = path / "calibration.yaml"
    if calibration is not None:
        return load_rig(calibration).ordered(bundle.cameras)
    if not topics.infos:
        raise BagError(f"bag {path} has no camera_info of every camera; give the cameras with --calibration FILE")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration.yaml"
        save_bags_rig(path, topics, bundle.cameras, _SETTINGS.base_frame, file)
        return load_rig(file)


def _network_image(message: BagMessage, bundle: Bundle, camera: object) -> np.ndarray:
    """uint8 RGB [h, w, 3] at the bundle's size, as the node makes it."""
    transform = bundle.image_transform(camera.width_px, camera.height_px)
    image = decode(message)
    data = np.asarray(image.data)
    if hasattr(image, "format"):
        return transform.jpeg(data)
    bgr = bgr_image(data, image.encoding, image.width, image.height, image.step, bool(image.is_bigendian))
    return cv2.cvtColor(transform.image(bgr), cv2.COLOR_BGR2RGB)


class _Ego:
    """Poses and the motion from set to set, by the node's own rules."""

    def __init__(self) -> None:
        self._poses = PoseBuffer(_SETTINGS.odom_max_gap_ms)
        self._motion = EgoMotion(_SETTINGS.memory_max_gap_s, _SETTINGS.max_speed_mps, _SETTINGS.max_yaw_rate_rps)

    def hear(self, message: BagMessage) -> None:
        pose = decode(message).pose.pose
        p, q = pose.position, pose.orientation
        self._poses.add(stamp_of(message), np.array([p.x, p.y, p.z]), np.array([q.w, q.x, q.y, q.z]))

    def motion_to(self, stamp_ns: int) -> np.ndarray | None:
        return self._motion.step(stamp_ns, self._poses.at(stamp_ns))


def _scene_inputs(scene: Scene, bundle: Bundle, anchor: str) -> Iterator[EngineInput]:
    frames = {name: [f for f in scene.frames if f.channel == name] for name in bundle.cameras}
    rig = scene.rig.ordered(bundle.cameras)
    stamps_ns = [[frame.stamp_ns for frame in frames[name]] for name in bundle.cameras]
    markers = [(keyframe.stamp_ns, keyframe.token) for keyframe in scene.keyframes]
    labels = {keyframe.token: keyframe.labels_path for keyframe in scene.keyframes}
    sets = keyframes_of(markers, stamps_ns, bundle.cameras.index(anchor), _SETTINGS.max_camera_time_diff_ms)
    motion = EgoMotion(_SETTINGS.memory_max_gap_s, _SETTINGS.max_speed_mps, _SETTINGS.max_yaw_rate_rps)
    for keyframe in sets:
        if not keyframe.is_complete:
            continue
        own = {
            name: next(frame for frame in frames[name] if frame.stamp_ns == stamp_ns)
            for name, stamp_ns in zip(bundle.cameras, keyframe.image_stamps_ns, strict=True)
        }
        truth, mask = read_labels(labels[keyframe.token]) if labels[keyframe.token] else (None, None)
        if truth is not None and truth.shape != bundle.grid.shape:
            raise _other_grid(keyframe.token, truth.shape, bundle)
        yield EngineInput(
            keyframe.token,
            np.stack([_frame_image(frame, bundle) for frame in own.values()]),
            motion.step(keyframe.set_stamp_ns, own[anchor].global_from_ego),
            rig,
            truth,
            None if mask is None else mask > 0,
        )


def _frame_image(frame: SensorFrame, bundle: Bundle) -> np.ndarray:
    return bundle.image_transform(frame.width_px, frame.height_px).jpeg(read_jpeg(frame))


def _require_grid(truth: Sequence[TrueKeyframe], bundle: Bundle) -> None:
    for keyframe in truth:
        if keyframe.labels.shape != bundle.grid.shape:
            raise _other_grid(keyframe.token, keyframe.labels.shape, bundle)


def _other_grid(token: str, shape: tuple[int, ...], bundle: Bundle) -> DatasetError:
    return DatasetError(
        f"the ground truth of keyframe {token} has {shape} cells, the bundle's grid {bundle.grid.shape}; "
        "compare on data of the same grid"
    )
