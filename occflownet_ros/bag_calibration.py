# SPDX-License-Identifier: Apache-2.0
"""The camera rig that a bag tells of itself: intrinsics from camera_info, extrinsics from /tf_static."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from occflownet_core.camera import Camera, CameraRig
from occflownet_core.errors import CalibrationError
from occflownet_core.poses import RecordedPose
from occflownet_core.rig_file import save_rig
from occflownet_ros.bag import Bag
from occflownet_ros.bag_decoding import decode
from occflownet_ros.bag_keyframes import NodeInputs
from occflownet_ros.transform_tree import TransformTree

_STATIC_TRANSFORMS = "/tf_static"


def save_bags_rig(bag: Path, inputs: NodeInputs, cameras: Sequence[str], base_frame: str, file: Path) -> None:
    """Write the bag's rig as a calibration file, extrinsics in the bag's own numbers where one transform gives them.

    Args:
        bag: rosbag2 folder or file.
        inputs: topics, camera_info among them.
        cameras: names in the file, in the order of the topics.
        base_frame: what extrinsics are relative to.
        file: to write.

    Raises:
        CalibrationError: a camera's frame is not connected to the base frame.
    """
    with Bag(bag) as opened:
        infos = [_first(opened, topic) for topic in inputs.infos]
        tree = _static_tree(opened)
    paths = [tree.path(base_frame, info.header.frame_id) for info in infos]
    unknown = [info.header.frame_id for info, path in zip(infos, paths, strict=True) if path is None]
    if unknown:
        raise CalibrationError(
            f"bag {bag} has no transform from {base_frame} to {', '.join(unknown)} on {_STATIC_TRANSFORMS}; give the "
            "cameras' extrinsics with --calibration FILE"
        )
    mounts = {name: path.at(0) for name, path in zip(cameras, paths, strict=True)}
    rig = CameraRig(tuple(_camera(name, info, mounts[name]) for name, info in zip(cameras, infos, strict=True)))
    save_rig(rig, file, f"as recorded in {bag.resolve().name}", mounts)


def _first(bag: Bag, topic: str) -> object:
    return decode(next(bag.messages({topic})))


def _static_tree(bag: Bag) -> TransformTree:
    tree = TransformTree()
    for message in bag.messages({_STATIC_TRANSFORMS}):
        for stamped in decode(message).transforms:
            t, q = stamped.transform.translation, stamped.transform.rotation
            pose = RecordedPose((t.x, t.y, t.z), (q.w, q.x, q.y, q.z))
            tree.add(stamped.header.frame_id, stamped.child_frame_id, pose)
    return tree


def _camera(name: str, info: object, mount: RecordedPose) -> Camera:
    projection = np.asarray(info.p, dtype=np.float64).reshape(3, 4)[:, :3]
    intrinsic = projection if projection.any() else np.asarray(info.k, dtype=np.float64).reshape(3, 3)
    return Camera(name, info.width, info.height, intrinsic, mount.matrix)
