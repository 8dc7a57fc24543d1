# SPDX-License-Identifier: Apache-2.0
"""Rays against a loop over points in float64, against nuscenes-devkit's projection, and against the still world."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from pyquaternion import Quaternion

from occflownet_core.errors import DatasetError
from occflownet_core.grid import OCC3D_GRID
from occflownet_core.labels import FREE, LABEL_FROM_LIDARSEG
from training.data.dataset import moving_boxes
from training.data.lidar_holes import directions_without_return
from training.data.nuscenes import KeyframeIndex, load_occupancy, load_points
from training.data.pseudo_labels import PseudoLabelRays
from training.data.rays import NO_CAMERA, UNLABELLED, FrameRays, LidarRays, RayLimits, temporal_rays

VERSION = "v1.0-tiny"
LIMITS = RayLimits(OCC3D_GRID)
EMPTY = FrameRays(
    np.zeros((7, 3), np.float32),
    *(np.zeros(0, np.int64), np.zeros((0, 3), np.float32), np.zeros(0, np.float32), np.zeros(0, np.uint8)),
    *(np.zeros((0, 2), np.float32), np.zeros(0, np.float32)),
)


@pytest.fixture(scope="module")
def index(tiny_root) -> KeyframeIndex:
    return KeyframeIndex(tiny_root.path, VERSION)


def frames_around(index: KeyframeIndex, source, i: int, horizon: int) -> dict:
    neighbours = {t: index.neighbour(i, t) for t in range(-horizon, horizon + 1)}
    return {t: (index[j], source.frame_rays(index[j])) for t, j in neighbours.items() if j is not None}


def slow_rays(index: KeyframeIndex, i: int, horizon: int) -> list[tuple]:
    """One point after the other, through the tables' own transforms in double precision."""
    from nuscenes import NuScenes

    nusc = NuScenes(index.version, str(index.dataroot), verbose=False)

    def matrices(token):
        data = nusc.get("sample_data", token)
        records = (
            nusc.get("ego_pose", data["ego_pose_token"]),
            nusc.get("calibrated_sensor", data["calibrated_sensor_token"]),
        )
        result = []
        for record in records:
            matrix = Quaternion(record["rotation"]).transformation_matrix
            matrix[:3, 3] = record["translation"]
            result.append(matrix)
        return data, *result, np.array(records[1]["camera_intrinsic"])

    now = nusc.get("sample", index[i].token)
    _, global_from_now, _, _ = matrices(now["data"]["LIDAR_TOP"])
    found = []
    for t in range(-horizon, horizon + 1):
        j = index.neighbour(i, t)
        if j is None:
            continue
        sample = nusc.get("sample", index[j].token)
        data, global_from_ego, ego_from_lidar, _ = matrices(sample["data"]["LIDAR_TOP"])
        points = np.fromfile(index.dataroot / data["filename"], np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
        raw = np.fromfile(index.dataroot / nusc.get("lidarseg", data["token"])["filename"], np.uint8)
        for c, channel in enumerate(index.cameras):
            image, global_from_car, car_from_camera, intrinsic = matrices(sample["data"][channel])
            centre = (np.linalg.inv(global_from_now) @ global_from_car @ car_from_camera)[:3, 3]
            camera_from_lidar = np.linalg.inv(global_from_car @ car_from_camera) @ global_from_ego @ ego_from_lidar
            now_from_lidar = np.linalg.inv(global_from_now) @ global_from_ego @ ego_from_lidar
            for point, label in zip(points, raw, strict=True):
                x, y, depth = (camera_from_lidar @ [*point, 1])[:3]
                if label in (0, 31) or depth <= 0:
                    continue
                u, v, _ = intrinsic @ [x, y, depth] / depth
                end = (now_from_lidar @ [*point, 1])[:3]
                distance = np.linalg.norm(end - centre)
                inside = all(-40 <= a < 40 for a in end[:2]) and -1 <= end[2] < 5.4
                if 0 <= u < image["width"] and 0 <= v < image["height"] and inside and 0.05 <= distance <= 39:
                    found.append((t, c, int(LABEL_FROM_LIDARSEG[label]), *centre, *end, depth / distance))
    return found


def test_rays_equal_a_loop_over_points(index):
    rays = temporal_rays(frames_around(index, LidarRays(), 2, 1), LIMITS)
    rays.check()
    slow = np.array(slow_rays(index, 2, 1))
    columns = (rays.time_index, rays.camera_index, rays.label, rays.origin_m, rays.end_m, rays.axis_cosine)
    fast = torch.cat([c.double().reshape(len(rays), -1) for c in columns], dim=1).numpy()
    assert len(fast) == len(slow) > 1000
    order_fast, order_slow = (np.lexsort(np.round(table[:, [8, 7, 6, 1, 0]].T, 3)) for table in (fast, slow))
    assert fast[order_fast] == pytest.approx(slow[order_slow], abs=2e-4)


def test_returns_beyond_the_box_say_that_the_way_there_is_free(index):
    """From 1 m above the ground: 10 m ahead, 50 m ahead, 20 m up, 50 m ahead of unknown class, 10 m of unknown class."""
    ahead, up = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
    direction = np.array([ahead, ahead, up, ahead, ahead], dtype=np.float32)
    range_m = np.array([10, 50, 20, 50, 10], dtype=np.float32)
    label = np.array([4, 15, 16, UNLABELLED, UNLABELLED], dtype=np.uint8)
    origin_m = np.array([[0, 0, 1], [0, 0, 2]], dtype=np.float32)
    pixel = np.zeros((5, 2), dtype=np.float32)
    frame = FrameRays(origin_m, np.zeros(5, dtype=np.int64), direction, range_m, label, pixel, range_m)
    as_published = temporal_rays({0: (index[0], frame)}, LIMITS)
    assert (as_published.range_m.tolist(), as_published.label.tolist()) == ([10], [4])
    rays = temporal_rays({0: (index[0], frame)}, RayLimits(OCC3D_GRID, beyond_is_free=True))
    assert rays.range_m.tolist() == [10, np.inf, np.inf, np.inf]
    assert rays.label.tolist() == [4, FREE, FREE, FREE]
    assert rays.direction[2].tolist() == pytest.approx(up) and rays.axis_cosine.tolist() == [1, 1, 1, 1]


def test_pixels_equal_the_devkits(index):
    assert_pixels_equal_the_devkits(index, index[1])


def test_pixels_equal_the_devkits_on_real_data(nuscenes_real_root, tmp_path):
    index = KeyframeIndex(nuscenes_real_root, "v1.0-mini", scenes=["scene-0061"])
    labels = np.full(len(load_points(index[0])), 17, np.uint8)
    labels.tofile(tmp_path / "lidarseg.bin")
    keyframe = dataclasses.replace(index[0], lidarseg_path=tmp_path / "lidarseg.bin")
    assert_pixels_equal_the_devkits(index, keyframe)


def assert_pixels_equal_the_devkits(index, keyframe):
    from nuscenes import NuScenes

    nusc = NuScenes(index.version, str(index.dataroot), verbose=False)
    rays = LidarRays(keep_noise=True).frame_rays(keyframe)
    sample = nusc.get("sample", keyframe.token)
    for c, channel in enumerate(index.cameras):
        # The devkit keeps a margin of one pixel, and points at least a metre away.
        theirs, depth_m, _ = nusc.explorer.map_pointcloud_to_image(
            sample["data"]["LIDAR_TOP"], sample["data"][channel], min_dist=1.0
        )
        mine = rays.camera_index == c
        pixel, mine_m = rays.pixel[mine], rays.depth_m[mine]
        frame = keyframe.cameras[c]
        kept = (mine_m > 1) & (pixel > 1).all(axis=1) & (pixel < (frame.width_px - 1, frame.height_px - 1)).all(axis=1)
        assert kept.sum() == theirs.shape[1] > 20
        # The devkit takes single precision through global coordinates, which are good to 0.1 mm there.
        assert pixel[kept] == pytest.approx(theirs[:2].T, abs=0.05)
        assert mine_m[kept] == pytest.approx(depth_m, abs=1e-3)


def test_a_still_world_stays_where_it_is(index, tiny_root):
    """Every ray of every keyframe ends at a point of the world, wherever the vehicle was when it saw it."""
    rays = temporal_rays(frames_around(index, LidarRays(), 2, 3), LIMITS)
    assert set(rays.time_index.tolist()) == {-2, -1, 0, 1, 2}
    pose = np.linalg.inv(index[2].global_from_ego)
    world_m = tiny_root.points_global_m @ pose[:3, :3].T + pose[:3, 3]
    from scipy.spatial import cKDTree

    distance_m, point = cKDTree(world_m).query(rays.end_m.numpy())
    assert distance_m.max() < 1e-3
    assert np.array_equal(LABEL_FROM_LIDARSEG[tiny_root.raw[point]], rays.label.numpy())


def test_panoptic_labels_say_the_same(index):
    for one, other in zip(
        dataclasses.astuple(LidarRays("lidarseg").frame_rays(index[0])),
        dataclasses.astuple(LidarRays("panoptic").frame_rays(index[0])),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_noise_and_own_vehicle_are_left_out(index, tiny_root):
    dropped = np.isin(tiny_root.raw, (0, 31)).mean()
    assert dropped > 0.03
    share = len(LidarRays().frame_rays(index[0])) / len(LidarRays(keep_noise=True).frame_rays(index[0]))
    assert share == pytest.approx(1 - dropped, abs=0.03)


def test_scene_ends_have_fewer_frames(index):
    assert sorted(frames_around(index, LidarRays(), 0, 3)) == [0, 1, 2, 3]
    assert sorted(frames_around(index, LidarRays(), 4, 3)) == [-3, -2, -1, 0]
    assert sorted(frames_around(index, LidarRays(), 5, 3)) == [0, 1]  # the next scene's first


def test_thinning_draws_without_replacement(index):
    frames = frames_around(index, LidarRays(), 2, 1)
    few = temporal_rays(frames, LIMITS, max_rays=200, rng=np.random.default_rng(0))
    assert len(few) == 200
    assert len(torch.unique(torch.cat([few.end_m, few.origin_m], dim=1), dim=0)) == 200
    again = temporal_rays(frames, LIMITS, max_rays=200, rng=np.random.default_rng(0))
    assert torch.equal(few.range_m, again.range_m)


def test_a_sweep_without_labelled_points_gives_no_rays(index):
    rays = temporal_rays({0: (index[0], EMPTY)}, LIMITS)
    rays.check()
    assert len(rays) == 0


def spinning_lidar(holes_deg: tuple[float, float], rings: int = 8, steps: int = 900) -> np.ndarray:
    """Rings from -4 to 10 degrees; in the hole there are points at the centre instead, as nuScenes stores them."""
    elevation, azimuth = np.meshgrid(
        np.radians(np.linspace(-4, 10, rings)), np.arange(steps) * 2 * np.pi / steps - np.pi
    )
    range_m = np.where((np.degrees(azimuth) > holes_deg[0]) & (np.degrees(azimuth) < holes_deg[1]), 0.0, 20.0)
    directions = [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    points = np.stack([*(range_m * d for d in directions), 0 * range_m, np.arange(rings) + 0 * azimuth], axis=-1)
    points[range_m == 0, :3] = (0.3, -0.2, 0.0)
    return points.reshape(-1, 5).astype(np.float32)


def test_directions_without_return_are_the_holes():
    found = directions_without_return(spinning_lidar((20.1, 40.1)))
    # Elevations -4, -2, 0, ..., 10; from 0 up there are six. The hole has 50 firings, less one beside each edge.
    assert found.shape == (6 * 48, 3)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(len(found)))
    azimuth, elevation = np.degrees(np.arctan2(found[:, 1], found[:, 0])), np.degrees(np.arcsin(found[:, 2]))
    assert np.unique(np.round(elevation, 3)).tolist() == [0, 2, 4, 6, 8, 10]
    assert np.sort(azimuth)[::6] == pytest.approx(20.8 + 0.4 * np.arange(48), abs=1e-3)


def test_a_hole_across_the_seam_is_found():
    points = spinning_lidar((170.1, 190))  # the firings from 170.4 to 189.6 degrees, 49 of them
    azimuth = np.degrees(np.arctan2(points[:, 1], points[:, 0]))
    points[azimuth < -170.1, :3] = 0
    found = directions_without_return(points)
    azimuth = np.degrees(np.arctan2(found[:, 1], found[:, 0])) % 360
    assert len(found) == 6 * 47 and azimuth.min() == pytest.approx(170.8) and azimuth.max() == pytest.approx(189.2)


def test_no_holes_without_rings():
    points = spinning_lidar((20, 40))
    points[:, 4] = 0
    assert len(directions_without_return(points)) == 0
    assert len(directions_without_return(points[:0])) == 0


def test_no_return_rays_start_at_the_lidar(index, tmp_path):
    points = spinning_lidar((20, 40))
    points.tofile(tmp_path / "sweep.pcd.bin")
    np.full(len(points), 28, np.uint8).tofile(tmp_path / "lidarseg.bin")
    lidar = dataclasses.replace(index[0].lidar, path=tmp_path / "sweep.pcd.bin")
    keyframe = dataclasses.replace(index[0], lidar=lidar, lidarseg_path=tmp_path / "lidarseg.bin")
    rays = temporal_rays({0: (keyframe, LidarRays(no_return=True).frame_rays(keyframe))}, LIMITS)
    rays.check()
    free = rays.camera_index == NO_CAMERA
    assert free.sum() == len(directions_without_return(points)) > 0
    assert torch.isinf(rays.range_m[free]).all() and (rays.label[free] == FREE).all()
    assert rays.origin_m[free][0].tolist() == pytest.approx([0.94, 0, 1.84], abs=1e-6)
    # The LiDAR is turned by a quarter to the right: azimuth 30 in its frame is -60 in the vehicle's.
    heading = torch.rad2deg(torch.atan2(rays.direction[free][:, 1], rays.direction[free][:, 0]))
    assert heading.mean().item() == pytest.approx(-60, abs=1)
    assert torch.isfinite(rays.range_m[~free]).all()


def write_pseudo_labels(index, folder, kind: str) -> None:
    """Depth and class of a plane 10 m before every camera, with sky above and an unknown class in one column."""
    depth_m = np.full((45, 80), 10.0)
    label = np.full((45, 80), 15, np.uint8)
    depth_m[:10], label[:10] = 0, FREE
    label[:, 2] = UNLABELLED
    depth_m[30:, :] = 0
    for frame in index[0].cameras:
        stem = folder / f"{frame.channel}_{frame.path.stem}"
        if kind == "png":
            cv2.imwrite(f"{stem}_depth.png", np.round(depth_m * 256).astype(np.uint16))
            cv2.imwrite(f"{stem}_label.png", label)
        else:
            np.savez(f"{stem}.npz", depth=depth_m, label=label)


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_pseudo_labels(index, tmp_path, kind):
    write_pseudo_labels(index, tmp_path, kind)
    name = "{channel}_{stem}"
    templates = (f"{name}_depth.png", f"{name}_label.png") if kind == "png" else (f"{name}.npz", f"{name}.npz")
    rays = PseudoLabelRays(tmp_path, *templates, stride=4).frame_rays(index[0])
    # Rows 2, 6, ..., 42 and columns 2, 6, ..., 78: two rows of sky, rows 10..26 of wall, the rest unknown. Column 2
    # keeps its depth where there is one, and has no sky.
    sky, wall = rays.label == FREE, rays.label == 15
    assert (sky.sum(), wall.sum(), (rays.label == UNLABELLED).sum()) == (6 * 2 * 19, 6 * 5 * 19, 6 * 5)
    assert np.isinf(rays.range_m[sky]).all() and (rays.depth_m[wall] == 10).all()
    # A pixel of the small image covers 4 x 4 of the camera's: its middle is at 4 * (i + 0.5).
    assert rays.pixel[rays.camera_index == 0][0] == pytest.approx([4 * 6.5, 4 * 2.5])
    end_m = rays.sensor_origin_m[rays.camera_index] + rays.direction * rays.range_m[:, None]
    for c, camera in enumerate(index[0].rig(at_reference=True)):
        mine = wall & (rays.camera_index == c)
        pixel, depth_m = camera.project(end_m[mine])
        assert pixel == pytest.approx(rays.pixel[mine], abs=1e-2) and depth_m == pytest.approx(np.full(mine.sum(), 10))
    moved = temporal_rays({0: (index[0], rays)}, LIMITS)
    moved.check()
    assert UNLABELLED not in moved.label


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d, s: (d / f"{s}_depth.png").unlink(), "_depth.png .* cannot be read"),
        (lambda d, s: (d / f"{s}_depth.png").write_bytes(b"abc"), "does not decode"),
        (lambda d, s: cv2.imwrite(str(d / f"{s}_label.png"), np.full((45, 80), 40, np.uint8)), "classes up to 40"),
        (lambda d, s: cv2.imwrite(str(d / f"{s}_label.png"), np.zeros((4, 4), np.uint8)), "at the same size"),
    ],
)
def test_bad_pseudo_labels(index, tmp_path, damage, says):
    write_pseudo_labels(index, tmp_path, "png")
    damage(tmp_path, f"CAM_BACK_{index[0].cameras[4].path.stem}")
    source = PseudoLabelRays(tmp_path, "{channel}_{stem}_depth.png", "{channel}_{stem}_label.png")
    with pytest.raises(DatasetError, match=says) as error:
        source.frame_rays(index[0])
    assert "split 'all'" in str(error.value) and "CAM_BACK" in str(error.value)


def test_bad_sources(index):
    with pytest.raises(DatasetError, match="lidarseg or panoptic"):
        LidarRays("semantic")
    with pytest.raises(DatasetError, match=r"may hold \{scene\}"):
        PseudoLabelRays(".", "{camera}.png", "{stem}.png")


def occupied_by(labels: np.ndarray, points_m: np.ndarray) -> np.ndarray:
    """Label of the voxel around each point; FREE outside the grid."""
    cell, inside = OCC3D_GRID.cells(points_m)
    return np.where(inside, labels[tuple(cell.T)], FREE)


def beside(labels: np.ndarray, points_m: np.ndarray, label: np.ndarray) -> np.ndarray:
    """True where the point's voxel or one of its 26 neighbours has the label."""
    steps = np.stack(np.meshgrid(*[(-0.4, 0, 0.4)] * 3), axis=-1).reshape(-1, 3)
    return np.any([occupied_by(labels, points_m + step) == label for step in steps], axis=0)


def test_rays_of_minicity_end_in_its_voxels_and_cross_free_space(minicity_root):
    index = KeyframeIndex(minicity_root, "v1.0-mini")
    labels, _, _ = load_occupancy(index[1], OCC3D_GRID)
    lidar = temporal_rays({0: (index[1], LidarRays(no_return=True).frame_rays(index[1]))}, LIMITS)
    semantics = minicity_root / "semantics"
    pixels = PseudoLabelRays(semantics, "{channel}/{stem}_depth.png", "{channel}/{stem}_label.png", depth_unit_m=0.01)
    for rays in (lidar, temporal_rays({0: (index[1], pixels.frame_rays(index[1]))}, LIMITS)):
        rays.check()
        seen = rays[rays.returned]
        assert len(seen) > 5000
        assert beside(labels, seen.end_m.numpy(), seen.label.numpy()).mean() > 0.97
        # Half way to a return there is nothing, and nothing all along a ray without one.
        halfway_m = (seen.origin_m + 0.5 * seen.range_m[:, None] * seen.direction).numpy()
        assert (occupied_by(labels, halfway_m) == FREE).mean() > 0.98
        sky = rays[~rays.returned]
        assert len(sky) > 200
        along_m = np.arange(0.5, 40, 0.4)[:, None, None] * sky.direction.numpy() + sky.origin_m.numpy()
        assert (occupied_by(labels, along_m.reshape(-1, 3)) == FREE).mean() > 0.98


def test_rays_of_moving_objects_follow_their_boxes(minicity_root):
    """What a neighbour keyframe saw of a moving car lies, carried back by the car's box, in the car's voxels of now."""
    index = KeyframeIndex(minicity_root, "v1.0-mini")
    labels, _, _ = load_occupancy(index[1], OCC3D_GRID)
    boxes = moving_boxes(index, 1, horizon=1)
    other = temporal_rays({0: (index[1], EMPTY), 1: (index[2], LidarRays().frame_rays(index[2]))}, LIMITS)
    shift_m = (boxes.ego_from_box_now - boxes.ego_from_box_then)[:, :3, 3].norm(dim=1)
    # Those that moved by more than half their length: what stayed behind is then mostly in other voxels.
    moved = boxes.paired & (boxes.time_index == 1) & (shift_m > 0.5 * boxes.size_m[:, 0])
    near, carried, left = [], [], []
    for b in torch.nonzero(moved).flatten().tolist():
        pose, label, end_m = boxes.ego_from_box_then[b].numpy(), boxes.label[b].item(), other.end_m.numpy()
        within = np.abs((end_m - pose[:3, 3]) @ pose[:3, :3]) <= boxes.size_m[b].numpy() / 2 * 1.15
        then_m = end_m[within.all(axis=1) & (other.label.numpy() == label)]
        now_m = boxes.to_now(torch.from_numpy(then_m).double(), torch.full((len(then_m),), b)).numpy()
        inside = OCC3D_GRID.contains(now_m)
        near += beside(labels, now_m[inside], label).tolist()
        carried += (occupied_by(labels, now_m[inside]) == label).tolist()
        left += (occupied_by(labels, then_m[inside]) == label).tolist()
    assert len(carried) > 100
    assert np.mean(near) > 0.97 and np.mean(carried) > 0.85 and np.mean(left) < 0.3
