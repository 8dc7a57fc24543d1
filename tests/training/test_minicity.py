# SPDX-License-Identifier: Apache-2.0
"""MiniCity on disk: the devkit opens it, its sensors and labels agree with each other, and it is reproducible."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from occflownet_core import poses
from occflownet_core.camera import Camera
from occflownet_core.grid import OCC3D_GRID
from occflownet_core.labels import FREE, label_of, labels_from_lidarseg, labels_from_panoptic

pytest.importorskip("embreex", reason="MiniCity needs the train extra")
nuscenes = pytest.importorskip("nuscenes", reason="the devkit is part of the train extra")

from training.data.minicity import calibration, generate, scene_world  # noqa: E402
from training.data.minicity.__main__ import main  # noqa: E402
from training.data.minicity.keyframe import DEPTH_UNIT_M  # noqa: E402
from training.data.minicity.lidar import sweep  # noqa: E402
from training.data.minicity.world import keyframe_time_s  # noqa: E402

KEYFRAMES, SEED = 3, 5


@pytest.fixture(scope="module")
def devkit(minicity_root):
    return nuscenes.NuScenes("v1.0-mini", str(minicity_root), verbose=False)


@pytest.fixture(scope="module")
def world(minicity_root):
    return scene_world(SEED, 0, KEYFRAMES)


@pytest.fixture(scope="module")
def sweeps(world):
    return [sweep(world, keyframe_time_s(k), world.noise(k, 0)) for k in range(KEYFRAMES)]


def pose_of(devkit, record: dict, table: str) -> np.ndarray:
    row = devkit.get(table, record[f"{table}_token"])
    return poses.pose(np.array(row["translation"]), np.array(row["rotation"]))


def lidar_record(devkit, sample: dict) -> dict:
    return devkit.get("sample_data", sample["data"]["LIDAR_TOP"])


def points_of(devkit, sample: dict) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 3] in the ego frame of LIDAR_TOP's timestamp, and their labels [N], from the files."""
    record = lidar_record(devkit, sample)
    points = np.fromfile(Path(devkit.dataroot) / record["filename"], dtype=np.float32).reshape(-1, 5)
    raw = np.fromfile(Path(devkit.dataroot) / devkit.get("lidarseg", record["token"])["filename"], dtype=np.uint8)
    assert len(points) == len(raw)
    in_ego = poses.transform_points(pose_of(devkit, record, "calibrated_sensor"), points[:, :3].astype(np.float64))
    return in_ego, labels_from_lidarseg(raw)


def occupancy_of(devkit, sample: dict) -> dict[str, np.ndarray]:
    scene = devkit.get("scene", sample["scene_token"])["name"]
    return dict(np.load(Path(devkit.dataroot) / "gts" / scene / sample["token"] / "labels.npz"))


def test_devkit_opens_it_and_its_own_statistics_run(devkit, capsys):
    assert len(devkit.scene) == 1
    assert devkit.scene[0]["name"] == "minicity-5-0000"
    assert len(devkit.sample) == KEYFRAMES
    assert len(devkit.sample_data) == len(devkit.ego_pose) == KEYFRAMES * 7
    assert {c["name"]: c["index"] for c in devkit.category}["vehicle.car"] == 17
    devkit.list_lidarseg_categories()
    devkit.list_panoptic_instances()
    devkit.get_sample_lidarseg_stats(devkit.sample[0]["token"])
    devkit.get_sample_lidarseg_stats(devkit.sample[0]["token"], gt_from="panoptic")
    devkit.list_scenes()
    listed = capsys.readouterr().out
    total = sum(len(points_of(devkit, s)[0]) for s in devkit.sample)
    assert f"total {total} points" in listed


def test_chains_of_keyframes_are_whole(devkit):
    scene = devkit.scene[0]
    sample, seen = devkit.get("sample", scene["first_sample_token"]), []
    while sample:
        seen.append(sample)
        sample = devkit.get("sample", sample["next"]) if sample["next"] else None
    assert seen[-1]["token"] == scene["last_sample_token"]
    assert len(seen) == scene["nbr_samples"]
    assert np.diff([s["timestamp"] for s in seen]).tolist() == [500_000] * (KEYFRAMES - 1)
    for sample in seen:
        assert set(sample["data"]) == {*calibration.CAMERAS, "LIDAR_TOP"}
        for channel, token in sample["data"].items():
            record = devkit.get("sample_data", token)
            late_us = record["timestamp"] - sample["timestamp"]
            assert late_us == (calibration.CAMERAS[channel].offset_us if channel != "LIDAR_TOP" else 0)
            assert record["timestamp"] == devkit.get("ego_pose", record["ego_pose_token"])["timestamp"]
            assert (Path(devkit.dataroot) / record["filename"]).is_file()


def test_cameras_are_those_of_the_real_vehicle(nuscenes_real_root):
    real = nuscenes.NuScenes("v1.0-mini", str(nuscenes_real_root), verbose=False)
    sample = next(s for s in real.sample if real.get("scene", s["scene_token"])["name"] == "scene-0061")
    for name in calibration.CAMERAS:
        row = real.get("calibrated_sensor", real.get("sample_data", sample["data"][name])["calibrated_sensor_token"])
        camera = calibration.camera(name, 1600, 900)
        np.testing.assert_allclose(camera.intrinsic, row["camera_intrinsic"], atol=1e-9)
        np.testing.assert_allclose(camera.ego_from_camera[:3, 3], row["translation"], atol=1e-12)
        late_us = real.get("sample_data", sample["data"][name])["timestamp"] - sample["timestamp"]
        assert calibration.CAMERAS[name].offset_us == late_us


def test_images_have_the_size_that_was_asked_for_and_intrinsics_follow(devkit):
    record = devkit.get("sample_data", devkit.sample[0]["data"]["CAM_FRONT"])
    image = cv2.imread(str(Path(devkit.dataroot) / record["filename"]))
    assert image.shape == (198, 352, 3)
    assert (record["width"], record["height"]) == (352, 198)
    k = np.array(devkit.get("calibrated_sensor", record["calibrated_sensor_token"])["camera_intrinsic"])
    np.testing.assert_allclose(k[0, 0], 1266.417203046554 * 352 / 1600)
    assert image.std() > 20  # it shows something


def test_lidar_points_lie_in_voxels_of_their_class(devkit):
    agreeing, total = 0, 0
    for sample in devkit.sample:
        points, label = points_of(devkit, sample)
        assert 20_000 < len(points) <= 32 * 1084
        semantics = occupancy_of(devkit, sample)["semantics"]
        assert semantics.shape == (200, 200, 16)
        assert semantics.dtype == np.uint8
        cell, inside = OCC3D_GRID.cells(points)
        cell, label = cell[inside], label[inside]
        padded = np.pad(semantics, 1, constant_values=FREE)
        same = np.zeros(len(label), dtype=bool)
        for step in np.ndindex(3, 3, 3):
            same |= padded[tuple((cell + step).T)] == label
        agreeing, total = agreeing + same.sum(), total + len(same)
    assert agreeing / total >= 0.99


def test_masks_hold_what_the_sensors_saw(devkit):
    for sample in devkit.sample:
        truth = occupancy_of(devkit, sample)
        points, _ = points_of(devkit, sample)
        cell, inside = OCC3D_GRID.cells(points)
        # float32 in the file may move a point over a voxel's face.
        assert truth["mask_lidar"][tuple(cell[inside].T)].mean() > 0.9995
        assert set(np.unique(truth["mask_camera"])) == {0, 1}
        assert truth["mask_camera"][100, 100, 10] == 0  # above the roof, where no camera looks
        assert truth["mask_camera"][120:160, 98:102, 6].any()  # the free space ahead
        hidden = truth["semantics"][..., 0] != FREE
        assert not hidden.any()  # nothing lies under the ground


def test_the_road_under_the_vehicle_is_one_layer_of_driveable_surface(devkit):
    for sample in devkit.sample:
        column = occupancy_of(devkit, sample)["semantics"][98:106, 99:101]
        assert (column[..., 2] == label_of("driveable_surface")).all()
        assert (np.delete(column, 2, axis=-1) == FREE).all()


def test_no_point_lies_on_the_recording_vehicle(devkit):
    for sample in devkit.sample:
        points, _ = points_of(devkit, sample)
        inside = (points[:, 0] > -0.6) & (points[:, 0] < 3.4) & (np.abs(points[:, 1]) < 0.85) & (points[:, 2] > 0.1)
        assert not inside.any()


def test_visible_lidar_points_fall_on_pixels_of_their_class(devkit, world, sweeps):
    """Points are carried to each camera's moment: by their actor's motion, through the camera's own ego pose."""
    same, total = 0, 0
    for k, (sample, scan) in enumerate(zip(devkit.sample, sweeps, strict=True)):
        in_ego, label = points_of(devkit, sample)
        in_global = poses.transform_points(pose_of(devkit, lidar_record(devkit, sample), "ego_pose"), in_ego)
        for name, calibrated in calibration.CAMERAS.items():
            record = devkit.get("sample_data", sample["data"][name])
            moment_s = keyframe_time_s(k) + calibrated.offset_us * 1e-6
            points = in_global.copy()
            for actor in np.unique(scan.instance[scan.instance > 0]):
                rows = np.flatnonzero(scan.instance == actor)
                points[rows] = carried(world.actors[actor - 1], points[rows], scan.time_s[rows], moment_s)
            row = devkit.get("calibrated_sensor", record["calibrated_sensor_token"])
            camera = Camera(
                name, 352, 198, np.array(row["camera_intrinsic"]), pose_of(devkit, record, "calibrated_sensor")
            )
            ego = poses.transform_points(poses.inverse(pose_of(devkit, record, "ego_pose")), points)
            pixels, depth_m = camera.project(ego)
            seen = camera.sees(pixels, depth_m)
            column, line = pixels[seen].astype(int).T
            stem = Path(devkit.dataroot) / "semantics" / Path(record["filename"]).relative_to("samples").with_suffix("")
            rendered = cv2.imread(f"{stem}_label.png", cv2.IMREAD_UNCHANGED)[line, column]
            range_m = cv2.imread(f"{stem}_depth.png", cv2.IMREAD_UNCHANGED)[line, column] * DEPTH_UNIT_M
            near = (range_m > 0) & (np.abs(depth_m[seen] - range_m) < 0.10 + 0.02 * range_m)
            same += (rendered == label[seen])[near].sum()
            total += near.sum()
    assert total > 20_000
    assert same / total >= 0.98, same / total


def carried(actor, points_m: np.ndarray, measured_s: np.ndarray, moment_s: float) -> np.ndarray:
    """Points on an actor, each seen at its own time, where they are at another moment."""
    if actor.stands:
        return points_m
    then = actor.global_from_box(moment_s)
    moved = [
        poses.transform_points(then @ poses.inverse(actor.global_from_box(t)), p)
        for t, p in zip(measured_s, points_m, strict=True)
    ]
    return np.array(moved)


def test_points_of_an_instance_lie_in_its_box_when_they_are_measured(world, sweeps):
    moving = 0
    for k, scan in enumerate(sweeps):
        points = poses.transform_points(world.global_from_ego(keyframe_time_s(k)), scan.point_ego_m)
        for index in np.unique(scan.instance[scan.instance > 0]) - 1:
            actor = world.actors[index]
            rows = np.flatnonzero(scan.instance == index + 1)[::7]
            for row in rows:
                box_from_global = poses.inverse(actor.global_from_box(scan.time_s[row]))
                at = poses.transform_points(box_from_global, points[row])
                assert (np.abs(at) < actor.size_m / 2 + 5 * calibration.LIDAR_NOISE_M).all(), (index, at)
            moving += len(rows) * (not actor.stands)
    assert moving > 50


def test_boxes_follow_the_devkit_and_count_their_points(devkit):
    persistent = 0
    for sample in devkit.sample:
        record = lidar_record(devkit, sample)
        panoptic = np.load(Path(devkit.dataroot) / devkit.get("panoptic", record["token"])["filename"])["data"]
        assert panoptic.dtype == np.uint16
        assert (labels_from_panoptic(panoptic) == points_of(devkit, sample)[1]).all()
        counts = {}
        for token in sample["anns"]:
            annotation = devkit.get("sample_annotation", token)
            index = devkit.lidarseg_name2idx_mapping[annotation["category_name"]]
            counts.setdefault(index, []).append(annotation["num_lidar_pts"])
            if annotation["next"]:
                after = devkit.get("sample_annotation", annotation["next"])
                assert after["instance_token"] == annotation["instance_token"]
                assert after["size"] == annotation["size"]
                persistent += 1
        for index, numbers in counts.items():
            _, by_instance = np.unique(
                panoptic[(panoptic // 1000 == index) & (panoptic % 1000 > 0)], return_counts=True
            )
            assert sorted(by_instance.tolist()) == sorted(n for n in numbers if n)
    assert persistent > 40


def test_velocities_of_boxes_are_those_of_their_actors(devkit, world):
    moving = 0
    for annotation in devkit.sample_annotation:
        velocity = devkit.box_velocity(annotation["token"])
        attributes = [devkit.get("attribute", t)["name"] for t in annotation["attribute_tokens"]]
        if "vehicle.parked" in attributes or "pedestrian.standing" in attributes:
            assert not np.nan_to_num(velocity).any()
        if "vehicle.moving" in attributes and np.isfinite(velocity).all():
            assert 1.0 < np.linalg.norm(velocity) < 15
            moving += 1
    assert moving > 3


def test_the_same_seed_gives_the_same_bytes_in_two_processes(minicity_root, tmp_path):
    again = generate(tmp_path / "again", 1, KEYFRAMES, SEED, (352, 198), processes=2, write_semantics=True)
    assert digests(again) == digests(minicity_root)


def digests(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image-size", "352,198"], "WxH"),
        (["--image-size", "9000x9"], "9000x9"),
        (["--scenes", "0"], "--scenes is 0"),
        (["--keyframes", "0"], "--keyframes is 0"),
        (["--keyframes", "100000"], "100000"),
        (["--seed", "-1"], "--seed is -1"),
        (["--processes", "0"], "--processes is 0"),
    ],
)
def test_wrong_arguments_get_one_sentence_and_status_2(arguments, words, tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    complaint = capsys.readouterr().err
    assert words in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_taken_is_left_alone(tmp_path, capsys):
    mine = tmp_path / "thesis.txt"
    mine.write_text("all of it")
    assert main(["--out", str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--force"]) == 2  # it is no MiniCity, so it is not deleted
    assert "not a MiniCity" in capsys.readouterr().err
    assert mine.read_text() == "all of it"
    assert main(["--out", str(mine)]) == 2
