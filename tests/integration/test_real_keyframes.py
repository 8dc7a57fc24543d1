# SPDX-License-Identifier: Apache-2.0
"""Real nuScenes keyframes through the whole path: data root -> bag -> player -> DDS -> node -> labels."""

from pathlib import Path

import numpy as np
import pytest

from occflownet_core.rig_file import load_rig

pytest.importorskip("rclpy")
pytest.importorskip("nuscenes")

KEYFRAMES = {"scene-0061": 1, "scene-0103": 2}


def keyframes_of(root, scene_name):
    """Per keyframe of a scene: channel -> sample_data record, from the devkit."""
    from nuscenes.nuscenes import NuScenes

    data = NuScenes("v1.0-mini", dataroot=str(root), verbose=False)
    scene = next(s for s in data.scene if s["name"] == scene_name)
    token, found = scene["first_sample_token"], []
    while token:
        sample = data.get("sample", token)
        found.append({channel: data.get("sample_data", sd) for channel, sd in sample["data"].items()})
        token = sample["next"]
    return data, found


@pytest.mark.integration
@pytest.mark.parametrize("scene_name", KEYFRAMES)
def test_every_keyframes_labels_come_back(scene_name, nuscenes_real_root, tiny_bundle, tmp_path):
    from occflownet_core.runtime.bundle import load_bundle
    from occflownet_core.runtime.factory import create_engine
    from occflownet_ros.nuscenes_to_bag import main as nuscenes_to_bag
    from occflownet_ros.parameters import EVERY_SET
    from occflownet_ros.replay import replay_bag

    bag = tmp_path / scene_name
    arguments = [
        "--dataroot",
        str(nuscenes_real_root),
        "--version",
        "v1.0-mini",
        "--scene",
        scene_name,
        "--out",
        str(bag),
    ]
    assert nuscenes_to_bag(arguments) == 0
    parameters = {
        **EVERY_SET,
        "bundle": str(tiny_bundle),
        "calibration_file": str(bag / "calibration.yaml"),
        "anchor_camera": "CAM_FRONT",
    }
    replay = replay_bag(bag, parameters, tmp_path / "log", ("--no-progress",))

    data, keyframes = keyframes_of(nuscenes_real_root, scene_name)
    assert len(keyframes) == KEYFRAMES[scene_name]
    expected_stamps_ns = [keyframe["CAM_FRONT"]["timestamp"] * 1000 for keyframe in keyframes]
    assert sorted(replay.frames) == expected_stamps_ns
    assert {frame.frame_id for frame in replay.frames.values()} == {"base_link"}

    # The first set has no memory behind it: the engine, called directly on the same files, must say the same.
    bundle = load_bundle(tiny_bundle)
    engine = create_engine(bundle, "onnxruntime")
    engine.calibrate(load_rig(bag / "calibration.yaml"))
    transform = bundle.image_transform(1600, 900)
    files = [Path(data.get_sample_data_path(keyframes[0][camera]["token"])) for camera in bundle.cameras]
    images = np.stack([transform.jpeg(file.read_bytes()) for file in files])
    np.testing.assert_array_equal(replay.frames[expected_stamps_ns[0]].labels, engine.infer(images, None).labels)
    assert replay.set_counts()["processed"] == len(keyframes)
