# SPDX-License-Identifier: Apache-2.0
"""The keyframe index and the data set: poses, windows, labels, boxes, depth, batches, and one sentence per bad input."""

import dataclasses
import json
import pickle

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from occflownet_core.errors import DatasetError
from occflownet_core.grid import OCC3D_GRID
from occflownet_core.lift_tables import DepthBins, LiftSpec
from occflownet_core.preprocess import ImageTransform
from training.data.augment import Augmentation
from training.data.batch import EpochSampler, collate
from training.data.dataset import NuScenesOccupancy, depth_images, moving_boxes
from training.data.nuscenes import CAMERAS, KeyframeIndex, label_of_category, load_occupancy, load_points
from training.data.rays import UNLABELLED, LidarRays

VERSION = "v1.0-tiny"
WIDTH_PX, HEIGHT_PX = 160, 80
SPEC = LiftSpec(OCC3D_GRID.coarsened(4), DepthBins(1.0, 45.0, 1.0), feature_height=5, feature_width=10)


@pytest.fixture(scope="module")
def index(tiny_root) -> KeyframeIndex:
    return KeyframeIndex(tiny_root.path, VERSION)


def dataset(index, **settings) -> NuScenesOccupancy:
    return NuScenesOccupancy(index, WIDTH_PX, HEIGHT_PX, SPEC, **settings)


def test_scenes_and_neighbours(index):
    assert index.scenes == {"tiny-0001": range(5), "tiny-0002": range(5, 7)}
    assert [k.token for k in index.keyframes][4:6] == ["tiny-0001-4", "tiny-0002-0"]
    assert index.neighbour(0, -1) is None and index.neighbour(4, 1) is None and index.neighbour(3, 1) == 4


def test_splits(tiny_root):
    def tokens(**choice):
        return [k.token for k in KeyframeIndex(tiny_root.path, VERSION, **choice).keyframes]

    assert len(tokens(split="train")) == 5  # the root's own splits.json
    assert tokens(split="val") == tokens(scenes=["tiny-0002"]) == ["tiny-0002-0", "tiny-0002-1"]
    with pytest.raises(DatasetError, match="no split 'test2'; choose one of all, mini_train"):
        tokens(split="test2")
    with pytest.raises(DatasetError, match=r"split 'mini_val' has no scene in .*, which has tiny-0001, tiny-0002"):
        tokens(split="mini_val")
    with pytest.raises(DatasetError, match="no scene nowhere"):
        tokens(scenes=["nowhere"])


def test_official_splits_on_real_data(nuscenes_real_root):
    assert list(KeyframeIndex(nuscenes_real_root, "v1.0-mini", "val").scenes) == ["scene-0103"]
    assert list(KeyframeIndex(nuscenes_real_root, "v1.0-mini", "mini_train").scenes) == ["scene-0061"]


def test_the_rig_at_reference_time_sees_still_points_where_the_image_has_them(index, tiny_root):
    """The world's points go through global coordinates at the camera's own stamp; ego coordinates hold at the LiDAR's."""
    keyframe = index[2]
    ego_from_global = np.linalg.inv(keyframe.global_from_ego)
    in_ego_m = tiny_root.points_global_m @ ego_from_global[:3, :3].T + ego_from_global[:3, 3]
    for frame, camera in zip(keyframe.cameras, keyframe.rig(at_reference=True), strict=True):
        camera_from_global = np.linalg.inv(frame.global_from_ego @ frame.ego_from_sensor)
        at_camera = tiny_root.points_global_m @ camera_from_global[:3, :3].T + camera_from_global[:3, 3]
        pixel, depth_m = camera.project(in_ego_m)
        assert depth_m == pytest.approx(at_camera[:, 2], abs=1e-6)
        ahead = depth_m > 1
        expected = at_camera[ahead] @ frame.intrinsic.T
        assert pixel[ahead] == pytest.approx(expected[:, :2] / expected[:, 2:], abs=1e-3)


def test_the_bare_rig_is_the_extrinsics(index):
    for frame, camera in zip(index[2].cameras, index[2].rig(at_reference=False), strict=True):
        assert np.array_equal(camera.ego_from_camera, frame.ego_from_sensor)
    # 8 m/s times 35 ms between CAM_FRONT's stamp and the LiDAR's.
    anchor, lidar = index[2].anchor.global_from_ego, index[2].reference.global_from_ego
    assert index[2].anchor.channel == "CAM_FRONT"
    assert np.linalg.norm(anchor[:3, 3] - lidar[:3, 3]) == pytest.approx(0.28, abs=0.01)


def test_a_sample_of_everything(index):
    sample = dataset(index, rays=LidarRays(), boxes=True, depth=True, occupancy="required", max_rays=300)[2][0]
    assert sample.token == "tiny-0001-2" and sample.scene == "tiny-0001"
    assert sample.images.shape == (6, HEIGHT_PX, WIDTH_PX, 3) and sample.images.dtype == np.uint8
    path = index[2].cameras[1].path
    transform = ImageTransform.fit(320, 180, WIDTH_PX, HEIGHT_PX)
    assert CAMERAS[1] == "CAM_FRONT" and "CAM_FRONT." in path.name
    assert np.array_equal(sample.images[1], transform.jpeg(path.read_bytes()))
    assert sample.previous_from_current is None
    assert len(sample.rays) == 300
    assert sample.depth_m.shape == (6, 5, 10) and (sample.depth_m > 0).mean() > 0.2
    assert sample.occupancy.labels.shape == (200, 200, 16) and sample.occupancy.camera_mask.dtype == bool
    assert sample.frame_time_s == pytest.approx([np.nan, -1, -0.5, 0, 0.5, 1, np.nan], nan_ok=True)


def test_windows_end_at_the_item_and_carry_the_motion(index):
    windows = dataset(index, window=2, rays=LidarRays(), supervised=1)
    assert len(windows) == 4 + 1
    first, second = windows[1]
    assert (first.token, second.token) == ("tiny-0001-1", "tiny-0001-2")
    assert first.previous_from_current is None and first.rays is None and len(second.rays) > 0
    still = np.array([420.0, 1105.0, 1.0, 1])
    here, there = (np.linalg.inv(index[i].global_from_ego) @ still for i in (2, 1))
    assert second.previous_from_current @ here == pytest.approx(there)
    assert [w[0].token for w in (windows[3], windows[4])] == ["tiny-0001-3", "tiny-0002-0"]


def test_boxes_pair_objects_over_time(index):
    boxes = moving_boxes(index, 0, horizon=2)
    # Car, truck (only now) and person (only later); the barrier has no moving class and one box has no volume.
    rows = sorted(zip(boxes.time_index.tolist(), boxes.label.tolist(), boxes.paired.tolist(), strict=True))
    assert rows == [(1, 4, True), (1, 7, False), (1, 10, False), (2, 4, True), (2, 7, False), (2, 10, False)]
    car = (boxes.label == 4) & (boxes.time_index == 2)
    assert boxes.size_m[car][0].tolist() == [4.5, 1.8, 1.6]  # length, width, height
    # Poses are relative to the ego frame of time 0, in which the car starts 12 m ahead and drives 6 m/s, 1 m/s right.
    assert boxes.ego_from_box_now[car][0, :3, 3].tolist() == pytest.approx([12, 2, 0.8])
    assert boxes.ego_from_box_then[car][0, :3, 3].tolist() == pytest.approx([18, 1, 0.8])
    person, truck = boxes.label == 7, boxes.label == 10
    assert not boxes.seen_now[person].any() and boxes.seen_then[person].all()
    assert boxes.seen_now[truck].all() and not boxes.seen_then[truck].any()


def test_no_neighbours_no_boxes(index):
    assert len(moving_boxes(index, 0, horizon=0)) == 0


def test_depth_images_hold_the_nearest_return(index):
    rays = LidarRays().frame_rays(index[0])
    rig = index[0].rig()
    warps = [
        image.warp(320, 180, WIDTH_PX, HEIGHT_PX) for image in Augmentation().draw(np.random.default_rng(5), 6).images
    ]
    images, labels = depth_images(rays, warps, rig, SPEC)
    expected, expected_label = np.zeros_like(images), np.full_like(labels, UNLABELLED)
    for camera, pixel, depth_m, label in zip(rays.camera_index, rays.pixel, rays.depth_m, rays.label, strict=True):
        u, v = warps[camera].pixels(pixel)
        column, row = int(np.floor(u / 16)), int(np.floor(v / 16))
        if 0 <= column < 10 and 0 <= row < 5:
            old = expected[camera, row, column]
            if old == 0 or depth_m < old:
                expected[camera, row, column], expected_label[camera, row, column] = depth_m, label
    assert np.array_equal(images, expected) and (images > 0).sum() > 60
    assert np.array_equal(labels, expected_label) and len(np.unique(labels)) > 4
    # A network that thinks in a reference focal length is told depth as that camera would see it.
    scaled, _ = depth_images(rays, warps, rig, dataclasses.replace(SPEC, reference_focal_px=100.0))
    focal_px = np.array([w.camera(c).intrinsic[0, 0] for w, c in zip(warps, rig, strict=True)])[:, None, None]
    assert scaled == pytest.approx(images * (100 / focal_px), rel=1e-5)


def test_random_choices_depend_on_seed_item_and_epoch_alone(index):
    settings = {"rays": LidarRays(), "max_rays": 50, "augmentation": Augmentation()}
    one, two = dataset(index, **settings), dataset(index, **settings)
    two[(0, 0)], two[(3, 1)]  # what was read before does not matter
    a, b, c = one[(2, 1)][0], two[(2, 1)][0], one[(2, 2)][0]
    assert np.array_equal(a.images, b.images) and torch.equal(a.rays.range_m, b.rays.range_m)
    assert not np.array_equal(a.images, c.images)
    other = dataset(index, seed=1, **settings)[(2, 1)][0]
    assert not np.array_equal(a.images, other.images)


def test_augmented_samples_agree_with_themselves(index):
    """Labels, rays, boxes and motion of a flipped sample are those of the plain one, mirrored."""
    flip_only = Augmentation((0, 0), 0, False, flip_x=False, flip_y=True)
    settings = {"rays": LidarRays(), "boxes": True, "occupancy": "required", "window": 2}
    epoch = next(e for e in range(20) if flip_only.draw(np.random.default_rng([0, e, 1]), 6).flip.y)
    plain, flipped = dataset(index, **settings)[1][1], dataset(index, augmentation=flip_only, **settings)[(1, epoch)][1]
    assert np.array_equal(flipped.occupancy.labels, plain.occupancy.labels[:, ::-1])
    assert np.array_equal(flipped.occupancy.camera_mask, plain.occupancy.camera_mask[:, ::-1])
    sign = torch.tensor([1.0, -1, 1])
    assert torch.allclose(flipped.rays.end_m, plain.rays.end_m * sign, atol=1e-4)
    assert torch.allclose(
        flipped.boxes.ego_from_box_now[:, :3, 3], plain.boxes.ego_from_box_now[:, :3, 3] * sign, equal_nan=True
    )
    assert flipped.previous_from_current[1, 3] == pytest.approx(-plain.previous_from_current[1, 3])
    x, y, z = SPEC.grid.shape
    assert np.array_equal(
        flipped.tables.pixel_index.reshape(z, y, x, -1), plain.tables.pixel_index.reshape(z, y, x, -1)[:, ::-1]
    )


def test_batches_through_a_loader_with_processes(index):
    data = dataset(index, window=2, rays=LidarRays(), boxes=True, depth=True, occupancy="required", max_rays=100)
    sampler = EpochSampler(len(data), seed=4)
    loader = DataLoader(data, batch_size=2, sampler=sampler, collate_fn=collate, num_workers=1)
    before, now = next(iter(loader))
    assert before.rays is None and before.labels is None and not before.has_previous.any()
    assert now.images.shape == (2, 6, HEIGHT_PX, WIDTH_PX, 3) and now.has_previous.all() and len(now) == 2
    assert now.previous_from_current.shape == (2, 4, 4) and now.previous_from_current.dtype == torch.float32
    assert now.labels.shape == (2, 200, 200, 16) and now.labels.dtype == torch.uint8
    assert now.depth_m.shape == (2, 6, 5, 10) and now.frame_time_s.shape == (2, 7)
    assert torch.bincount(now.rays.batch_index).tolist() == [100, 100]
    assert set(now.boxes.batch_index.tolist()) == {0, 1}
    items = list(sampler)[:2]
    expected = [data[item][1] for item in items]
    assert now.tokens == tuple(sample.token for sample in expected)
    assert torch.equal(now.rays.range_m[:100], expected[0].rays.range_m)
    assert torch.equal(now.tables.pixel_index[1], torch.from_numpy(expected[1].tables.pixel_index))
    moved = now.to("cpu")
    assert torch.equal(moved.images, now.images)


def test_the_sampler_repeats_itself_and_shares_out():
    sampler = EpochSampler(10, seed=1)
    sampler.set_epoch(3)
    again = EpochSampler(10, seed=1)
    again.set_epoch(3)
    assert list(sampler) == list(again) and sorted(i for i, _ in sampler) == list(range(10))
    assert {epoch for _, epoch in sampler} == {3}
    parts = [EpochSampler(10, seed=1, rank=rank, ranks=3) for rank in range(3)]
    shares = [[i for i, _ in part] for part in parts]
    assert [len(share) for share in shares] == [len(part) for part in parts] == [3, 3, 3]
    assert len({i for share in shares for i in share}) == 9
    assert [i for i, _ in EpochSampler(4, shuffle=False)] == [0, 1, 2, 3]


def test_the_index_is_small_to_send(index):
    assert len(pickle.dumps(index)) < 20_000 * len(index)


def test_windows_of_different_length_do_not_stack(index):
    samples = dataset(index, window=2)[0]
    with pytest.raises(DatasetError, match=r"windows of \[1, 2\]"):
        collate([samples, samples[:1]])


def test_categories():
    assert label_of_category("vehicle.bus.bendy") == 3
    assert label_of_category("human.pedestrian.adult") == 7
    assert label_of_category("spaceship") == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"horizon": -1}, "horizon is -1"),
        ({"window": 2, "supervised": 3}, "supervised 3"),
        ({"window": 9}, "no scene of split 'all' .* has 9 keyframes"),
        ({"depth": True}, "give a source of rays"),
        ({"occupancy": "maybe"}, "occupancy is 'maybe'"),
    ],
)
def test_impossible_settings(index, settings, says):
    with pytest.raises(DatasetError, match=says):
        dataset(index, **settings)


def truncate(path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: (p / VERSION / "ego_pose.json").unlink(), "lacks the table ego_pose.json"),
        (lambda p: truncate(p / VERSION / "sample.json", 100), "nuscenes-devkit cannot open"),
        (lambda p: (p / VERSION / "splits.json").write_text("[3]"), "cannot be read as splits"),
        (lambda p: next((p / "lidarseg" / VERSION).iterdir()).unlink(), "13 label files but|cannot open"),
    ],
)
def test_bad_tables(own_tiny_root, damage, says):
    damage(own_tiny_root.path)
    with pytest.raises(DatasetError, match=says):
        KeyframeIndex(own_tiny_root.path, VERSION, "train")


def test_no_tables_at_all(tmp_path, tiny_root):
    with pytest.raises(DatasetError, match=r"no tables at .*v1.0-trainval; give the folder"):
        KeyframeIndex(tmp_path)
    with pytest.raises(DatasetError, match=r"the root has version v1\.0-tiny"):
        KeyframeIndex(tiny_root.path, "v1.0-trainval")


def edit(root, table: str, change) -> None:
    change(root.tables[table])
    root.write_tables()


def test_tables_that_do_not_fit_together(own_tiny_root):
    keyframe_data = [row for row in own_tiny_root.tables["sample_data"] if row["token"] != "tiny-0001-1-CAM_BACK"]
    (own_tiny_root.path / VERSION / "sample_data.json").write_text(json.dumps(keyframe_data))
    with pytest.raises(DatasetError, match=r"keyframe tiny-0001-1 of tiny-0001 \(split 'all'\) has no CAM_BACK"):
        KeyframeIndex(own_tiny_root.path, VERSION)
    own_tiny_root.write_tables()
    edit(own_tiny_root, "ego_pose", lambda rows: rows.pop(3))
    with pytest.raises(DatasetError, match=r"ego_pose.json of .* has no entry tiny-0001-0-"):
        KeyframeIndex(own_tiny_root.path, VERSION)


def test_an_impossible_pose(own_tiny_root):
    edit(own_tiny_root, "ego_pose", lambda rows: rows[8].update(rotation=[0, 0, 0, 0]))
    with pytest.raises(DatasetError, match=r"sample_data tiny-0001-1-.*split 'all'.*quaternion"):
        KeyframeIndex(own_tiny_root.path, VERSION)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda k: k.cameras[3].path.unlink(), r"image .*CAM_BACK_LEFT.jpg .* cannot be read"),
        (lambda k: truncate(k.cameras[3].path, 700), r"image .*CAM_BACK_LEFT.jpg .*ends before its end"),
        (lambda k: cv2.imwrite(str(k.cameras[3].path), np.zeros((9, 9, 3))), r"the image is 9 x 9 but 320 x 180"),
        (lambda k: truncate(k.lidar.path, 999), r"point cloud .*holds 999 bytes"),
        (lambda k: truncate(k.lidar.path, 2000), r"lidarseg labels .* are for 1560 points, the point cloud has 100"),
        (lambda k: k.lidar.path.unlink(), r"point cloud .* cannot be read"),
        (lambda k: k.lidarseg_path.unlink(), r"lidarseg labels .* cannot be read"),
        (lambda k: k.lidarseg_path.write_bytes(b"\xff" * 1560), r"lidarseg index 255"),
        (lambda k: k.occupancy_path.unlink(), r"occupancy labels .* are missing"),
        (lambda k: truncate(k.occupancy_path, 500), r"occupancy labels .* are damaged"),
        (lambda k: np.savez(k.occupancy_path, semantics=np.zeros((2, 2, 2))), r"damaged .*mask_camera"),
    ],
)
def test_damaged_files_are_named_with_their_split(own_tiny_root, damage, says):
    index = KeyframeIndex(own_tiny_root.path, VERSION, "train")
    damage(index[0])
    with pytest.raises(DatasetError, match=says) as error:
        dataset(index, rays=LidarRays(), occupancy="required", horizon=0)[0]
    assert "split 'train'" in str(error.value) and "\n" not in str(error.value)


def test_damaged_panoptic_labels(own_tiny_root):
    index = KeyframeIndex(own_tiny_root.path, VERSION, "train")
    truncate(index[0].panoptic_path, 100)
    with pytest.raises(DatasetError, match=r"panoptic labels .*split 'train'.* are damaged"):
        LidarRays("panoptic").frame_rays(index[0])


def test_occupancy_may_be_absent(own_tiny_root):
    index = KeyframeIndex(own_tiny_root.path, VERSION)
    index[0].occupancy_path.unlink()
    data = dataset(index, occupancy="present")
    assert data[0][0].occupancy is None and data[1][0].occupancy is not None
    assert collate([data[0], data[1]])[0].labels is None
    with pytest.raises(DatasetError, match=r"have shape \(200, 200, 16\); the grid has \(50, 50, 4\)"):
        load_occupancy(index[1], SPEC.grid)


@pytest.mark.parametrize("labels", ["lidarseg", "panoptic"])
def test_real_data_without_point_labels_says_so(nuscenes_real_root, labels):
    index = KeyframeIndex(nuscenes_real_root, "v1.0-mini")
    with pytest.raises(DatasetError, match=f"no {labels} labels for n015-.*LIDAR_TOP.*split 'all'.*nuScenes-{labels}"):
        LidarRays(labels).frame_rays(index[0])
    with pytest.raises(DatasetError, match="has no LIDAR_TOP"):
        load_points(index[1])


def test_real_images_load_and_move(nuscenes_real_root):
    index = KeyframeIndex(nuscenes_real_root, "v1.0-mini", scenes=["scene-0103"])
    first, second = NuScenesOccupancy(index, 352, 128, SPEC_REAL, window=2)[0]
    assert second.images.shape == (6, 128, 352, 3) and second.images.std() > 20
    # The README's 4.26 m in half a second, straight ahead.
    assert np.linalg.norm(second.previous_from_current[:3, 3]) == pytest.approx(4.26, abs=0.02)
    assert second.previous_from_current[0, 3] > 4.2 and first.previous_from_current is None


SPEC_REAL = LiftSpec(OCC3D_GRID.coarsened(4), DepthBins(1.0, 45.0, 1.0), feature_height=8, feature_width=22)
