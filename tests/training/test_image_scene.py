# SPDX-License-Identifier: Apache-2.0
"""Learning from images alone: views and their sources, a field fitted to a log's images, and photometric training."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
from windows import small_config  # noqa: E402

from benchmarks import photometric as benchmark  # noqa: E402
from occflownet_core import poses  # noqa: E402
from occflownet_core.boxes import MovingBoxes  # noqa: E402
from occflownet_core.errors import ConfigError  # noqa: E402
from occflownet_core.grid import VoxelGrid  # noqa: E402
from occflownet_core.lift_tables import DepthBins  # noqa: E402
from occflownet_core.photometric import PhotometricConfig  # noqa: E402
from occflownet_core.renderer import Rays, render  # noqa: E402
from occflownet_core.views import PixelRays, Views  # noqa: E402
from training import fit_scene  # noqa: E402
from training.data.augment import GridFlip, ImageDraw  # noqa: E402
from training.data.dataset import NuScenesOccupancy  # noqa: E402
from training.data.nuscenes import KeyframeIndex  # noqa: E402
from training.data.views import load_views, source_views  # noqa: E402
from training.fit import fit  # noqa: E402
from training.image_scene import ImageScene, fit_to_images  # noqa: E402
from training.loaders import OccupancyData  # noqa: E402
from training.scene import Scene, median_range_m  # noqa: E402
from training.settings import SupervisionSettings, TrainingConfig  # noqa: E402
from training.voxel_fitting import FitSettings  # noqa: E402

CONFIGS = Path(fit_scene.__file__).parent / "configs"
WIDTH_PX, HEIGHT_PX, FOCAL_PX = 96, 64, 60.0
AHEAD = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])  # image axes of a camera that looks along x


def looking(y_m: float, x_m: float = 0.0, image_from_ego: np.ndarray = AHEAD) -> np.ndarray:
    """[3, 4] projection of a camera at (x, y, 0)."""
    intrinsic = np.array([[FOCAL_PX, 0, WIDTH_PX / 2], [0, FOCAL_PX, HEIGHT_PX / 2], [0, 0, 1]])
    rotated = intrinsic @ image_from_ego
    return np.concatenate([rotated, -rotated @ np.array([[x_m], [y_m], [0.0]])], axis=1)


def blank_views(image_from_ego: np.ndarray, times: np.ndarray) -> Views:
    """Black images without sources."""
    count = len(times)
    return Views(
        torch.zeros((count, HEIGHT_PX, WIDTH_PX, 3), dtype=torch.uint8),
        torch.from_numpy(image_from_ego),
        torch.from_numpy(times),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, dtype=torch.int64),
        torch.full((count, 1), -1),
    )


def test_sources_are_those_that_see_the_same_from_elsewhere():
    behind = AHEAD @ np.diag([-1.0, -1.0, 1.0])
    projections = np.stack(
        [looking(0), looking(0.1), looking(1.0), looking(3.0), looking(0, image_from_ego=behind), looking(-1.0)]
    )
    times = np.array([0, 0, 0, 1, 0, 3])
    # Not itself, not from a hand's breadth away, not looking back, not three keyframes later; the nearer one sees more.
    found = source_views(blank_views(projections, times), 3)
    assert found[0].tolist() == [2, 3, -1]
    assert found[4].tolist() == [-1, -1, -1]


@pytest.fixture(scope="module")
def index(tiny_root) -> KeyframeIndex:
    return KeyframeIndex(tiny_root.path, "v1.0-tiny")


def test_views_of_a_root_show_points_where_their_cameras_have_them(index):
    now, later = index[0], index[1]
    now_from_later = poses.inverse(now.global_from_ego) @ later.global_from_ego
    views = load_views({0: (now, np.eye(4)), 1: (later, now_from_later)}, 160, 90, 2)
    assert views.images.shape == (12, 90, 160, 3) and views.time_index.tolist() == [0] * 6 + [1] * 6
    in_later_m = np.array([6.0, 1.0, 0.5])
    point = torch.from_numpy(np.append(poses.transform_points(now_from_later, in_later_m), 1.0))
    for c, camera in enumerate(later.rig()):
        pixel, depth_m = camera.project(in_later_m)
        at = views.image_from_ego[6 + c] @ point
        assert at[2].item() == pytest.approx(depth_m)
        np.testing.assert_allclose(at[:2] / at[2], pixel / 2, rtol=1e-9)  # half of 320 x 180


def test_a_flipped_sample_has_flipped_views(index):
    common = {"sources": 2, "horizon": 1, "window": 1, "lift": None}
    dataset = NuScenesOccupancy(index, 160, 90, **common)
    plain, flipped = (dataset._views(1, flip) for flip in (GridFlip(), GridFlip(y=True)))
    view, pixel = torch.tensor([2, 9]), torch.tensor([[20.5, 30.5], [99.5, 60.5]]).double()
    ours, mirrored = (PixelRays.through(views, view, pixel).rays for views in (plain, flipped))
    expected = GridFlip(y=True).rays(ours, dataset.grid)
    torch.testing.assert_close(mirrored.origin_m, expected.origin_m)
    torch.testing.assert_close(mirrored.direction, expected.direction)
    assert torch.equal(plain.sources, flipped.sources)


@pytest.mark.parametrize("flip", [GridFlip(), GridFlip(x=True)])
def test_the_encoders_pixels_show_what_the_views_show_there(index, flip):
    """A point of the world, by the augmented camera in the encoder's image, and by the view's projection in the view."""
    model = TrainingConfig.from_yaml(CONFIGS / "minicity_tiny_photometric.yaml").model
    dataset = NuScenesOccupancy(index, 160, 90, model.lift_spec(16), sources=2, horizon=1)
    rig = index[1].rig()
    warps = [ImageDraw(0.1, 0.2, 0.05, mirrored).warp(320, 180, 160, 90) for mirrored in (False, True) * 3]
    encoder, views = dataset._encoder_pixels(rig, warps), dataset._views(1, flip)
    now = (views.time_index == 0).nonzero()[:, 0].tolist()
    for c, (camera, warp) in enumerate(zip(rig, warps, strict=True)):
        point_m = camera.unproject(np.array([[130.0, 95.0]]), np.array([9.0]))[0]
        seen_px, _ = warp.camera(camera).project(point_m)
        encoder_px = np.array([160 - seen_px[0] if warp.mirrored else seen_px[0], seen_px[1], 1.0])
        at = views.image_from_ego[now[c]].numpy() @ flip.matrix(dataset.grid) @ np.append(point_m, 1.0)
        np.testing.assert_allclose(encoder.view_from_image[0, c].numpy() @ encoder_px, at[:2] / at[2], atol=1e-6)
        # Bins of 0.8 m from 1 m on at the reference focal length; a longer lens brings things nearer, so they are further.
        focal_px = warp.camera(camera).intrinsic[0, 0]
        assert encoder.bin_depth_m[0, c, 2].item() == pytest.approx((1.0 + 2.5 * 0.8) * focal_px / 278.0, rel=1e-6)


def wall_log() -> ImageScene:
    """Five cameras side by side, seen as five keyframes, before a wall 6 m away."""
    y_m = (-1.6, -0.8, 0.0, 0.8, 1.6)
    u, v = np.meshgrid(np.arange(WIDTH_PX) + 0.5, np.arange(HEIGHT_PX) + 0.5)
    right, down = (u - WIDTH_PX / 2) / FOCAL_PX * 6.0, (v - HEIGHT_PX / 2) / FOCAL_PX * 6.0
    images = []
    for y in y_m:
        wall_y, wall_z = y - right, -down
        brightness = 0.5 + 0.2 * np.sin(2.3 * wall_y + 1.7 * wall_z) + 0.2 * np.sin(4.1 * wall_z - 3.2 * wall_y)
        images.append((255 * brightness).astype(np.uint8)[..., None].repeat(3, axis=2))
    projections = np.stack([looking(y) for y in y_m])
    times = np.arange(1, 6)
    views = replace(blank_views(projections, times), images=torch.from_numpy(np.stack(images)))
    views = replace(views, sources=source_views(views, 4))
    grid = VoxelGrid((0.0, -4.0, -2.4), (8.0, 4.0, 2.4), 0.4)
    scene = Scene((), np.eye(4), grid, Rays.empty(), MovingBoxes.empty(), grid)
    return ImageScene(scene, views, MovingBoxes.empty())


def test_a_field_learns_from_images_how_far_the_wall_is():
    images = wall_log()
    settings = FitSettings(40, 600, current_share=None, density_levels=((1, 1, 1), (1, 4, 4)))
    recipe = PhotometricConfig(matching_weight=1.0, color_weight=0.1)
    fitted = fit_to_images(images, settings, recipe)
    y, z = np.meshgrid(np.linspace(-1.5, 1.5, 7), np.linspace(-0.8, 0.8, 5))
    towards = np.stack([np.full(y.size, 6.0), y.ravel(), z.ravel()], axis=1)
    range_m = np.linalg.norm(towards, axis=1)
    rays = Rays.from_numpy(np.zeros((y.size, 3)), towards / range_m[:, None], range_m, np.full(y.size, 15))
    found_m = median_range_m(render(fitted.field, rays, images.scene.grid), len(rays))
    assert (found_m - rays.range_m).abs().median() < 0.3  # three quarters of a voxel; untrained they meet nothing
    assert (found_m - rays.range_m).abs().quantile(0.9) < 0.8
    assert not fitted.logits.any()


def test_the_command_fits_to_images_where_there_is_no_lidar_label(tiny_root, tmp_path, capsys):
    common = ["--dataroot", str(tiny_root.path), "--scenes", "tiny-0002", "--out", str(tmp_path), "--threads", "1"]
    quick = ["--steps", "2", "--rays-per-step", "200", "--image-width", "64", "--pictures", "0", "--mesh", "0"]
    assert fit_scene.main([*common, "--from", "images", *quick]) == 0
    report = json.loads((tmp_path / "tiny-0002" / "fit.json").read_text())
    assert report["from"] == "images" and report["labels"] == "none" and set(report["terms"]) == {"matching", "color"}
    assert report["ranges"]["rays"] > 100 and report["moving_objects"] >= 1
    out = capsys.readouterr().out
    assert "occupied or free" in out and "17 classes" not in out


def test_a_log_without_lidar_and_boxes_is_fitted_to_its_images(own_tiny_root, tmp_path):
    tables = own_tiny_root.path / "v1.0-tiny"
    for name in ("sample_annotation", "instance"):
        (tables / f"{name}.json").write_text("[]")
    recordings = json.loads((tables / "sample_data.json").read_text())
    (tables / "sample_data.json").write_text(json.dumps([r for r in recordings if "LIDAR" not in r["filename"]]))
    for labels in ("lidarseg", "panoptic"):
        (tables / f"{labels}.json").unlink(missing_ok=True)
    options = {"--dataroot": own_tiny_root.path, "--scenes": "tiny-0002", "--out": tmp_path, "--threads": 1}
    options |= {
        "--from": "images",
        "--steps": 2,
        "--rays-per-step": 200,
        "--image-width": 64,
        "--pictures": 0,
        "--mesh": 0,
    }
    arguments = [str(part) for option in options.items() for part in option]
    assert fit_scene.main(arguments) == 0
    report = json.loads((tmp_path / "tiny-0002" / "fit.json").read_text())
    assert report["ranges"] is None and report["moving_objects"] == 0
    arguments[arguments.index("images")] = "lidar"
    assert fit_scene.main(arguments) == 2


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--hold-out", "0.2"], "--labels and --hold-out are about LiDAR points"),
        (["--labels", "lidarseg"], "--labels and --hold-out are about LiDAR points"),
        (["--image-width", "8"], "--image-width is 8; give at least 16"),
    ],
)
def test_mistakes_get_a_sentence(tiny_root, tmp_path, capsys, more, sentence):
    common = ["--dataroot", str(tiny_root.path), "--out", str(tmp_path), "--from", "images"]
    assert fit_scene.main([*common, *more]) == 2
    assert sentence in capsys.readouterr().err


def photometric_run(path: Path, root: Path, name: str = "minicity_tiny_photometric.yaml") -> TrainingConfig:
    """The shipped configuration on the tiny root, two steps of few pixels."""
    config = TrainingConfig.from_yaml(CONFIGS / name)
    trainer = replace(
        config.trainer, out=str(path), max_steps=2, val_steps=2, val_samples=1, picture_steps=0, threads=1
    )
    return replace(
        config,
        data=replace(config.data, dataroot=str(root), workers=0),
        photometric=replace(config.photometric, pixels_per_step=64),
        trainer=trainer,
    )


def test_the_shipped_configuration_trains_on_images_alone(tiny_root, tmp_path):
    trainer = fit(photometric_run(tmp_path, tiny_root.path))
    assert trainer.global_step == 2
    metrics = trainer.callback_metrics
    assert metrics["train/matching"] > 0 and metrics["train/color"] > 0 and "train/range" not in metrics
    provenance = torch.load(tmp_path / "last.ckpt", weights_only=True)["provenance"]
    assert provenance["supervision"].startswith("images alone (pixels in moving boxes left out, keyframes -2 to 2)")


def test_its_image_encoder_may_learn_depths_from_images_first(tiny_root, tmp_path):
    config = photometric_run(tmp_path, tiny_root.path, "minicity_tiny_photometric_images.yaml")
    (dataset,) = OccupancyData(config, SimpleNamespace()).train.datasets
    assert dataset.source is None
    trainer = fit(config)
    assert trainer.callback_metrics["train/depth_matching"] == trainer.callback_metrics["train/loss"] > 0
    learned = {name for name, tensor in trainer.lightning_module.named_parameters() if tensor.grad is not None}
    provenance = torch.load(tmp_path / "last.ckpt", weights_only=True)["provenance"]
    assert provenance["supervision"].startswith("images alone, depths of their pixels (pixels in moving boxes left out")
    assert any(name.startswith("model.depth") for name in learned) and not any("field" in name for name in learned)


def test_no_lidar_is_read_for_it(tiny_root, tmp_path):
    data = OccupancyData(photometric_run(tmp_path, tiny_root.path), SimpleNamespace())
    (dataset,) = data.train.datasets
    assert dataset.source is None and dataset.sources == 4 and dataset.horizon == 2 and dataset.boxes


def test_voxels_fitted_to_photographs_are_labels_without_classes_and_without_lidar(tiny_root, tmp_path):
    config = photometric_run(tmp_path, tiny_root.path)
    assert config.score == "geometric_iou"
    by_voxels = replace(config, supervision=SupervisionSettings("3d"))
    assert by_voxels.score == "miou"
    shapes = replace(by_voxels, losses=replace(config.losses, voxel_semantic_weight=0.0))
    assert shapes.score == "geometric_iou"
    (dataset,) = OccupancyData(shapes, SimpleNamespace()).train.datasets
    assert dataset.source is None


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"supervision": {"kind": "photometric"}}, "nothing is asked of images"),
        (
            {"supervision": {"kind": "photometric"}, "photometric": {"matching_weight": 1.0}},
            "which has no LiDAR, and losses.depth_weight",
        ),
        ({"photometric": {"matching_weight": 1.0}}, "set model.field.color: true"),
        ({"supervision": {"kind": "photometric"}, "photometric": {"depth_weight": 1.0}}, "nothing is asked of images"),
        ({"supervision": {"kind": "images"}, "photometric": {"color_weight": 1.0}}, "which makes no field"),
        (
            {"supervision": {"kind": "images"}, "losses": {"depth_weight": 0.0, "image_semantic_weight": 0.0}},
            "nothing is asked of them",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path, sections, sentence):
    with pytest.raises(ConfigError, match=sentence):
        small_config(tmp_path, **sections)


def test_a_flat_ground_is_met_by_hand():
    down = np.array([[0.6, 0.0, -0.8], [1.0, 0.0, 0.0]])
    rays = Rays.from_numpy(np.array([[0.0, 0.0, 1.6]] * 2), down, np.array([2.5, 7.0]), np.zeros(2))
    error_m = benchmark.errors_of(benchmark.flat_ground_m(rays), rays)
    assert error_m.tolist() == [pytest.approx(0.5), np.inf]
    found = benchmark.summary(error_m)
    assert found["within_1m"] == 0.5 and found["missed"] == 0.5 and found["median_m"] == pytest.approx(0.5)
    assert found["p90_m"] == pytest.approx(0.5)  # of two, the lower
    assert benchmark.standing(rays).tolist() == [False, True]  # ends at -0.4 and 1.6 m


def test_depths_are_judged_as_shares_by_hand():
    batch = SimpleNamespace(depth_m=torch.tensor([[[[4.0, 0.0, 8.0]]]]))  # no return in the second cell
    logits = torch.zeros(1, 1, 4, 1, 3)  # bins of 2 m from 1 m on: 2, 4, 6, 8 m
    logits[0, 0, 2, 0, 0] = logits[0, 0, 3, 0, 2] = 1.0
    error = benchmark.depth_errors_of(logits, batch, DepthBins(1.0, 9.0, 2.0))
    assert error.tolist() == [0.5, 0.0]
    found = benchmark.depth_summaries(({"a": np.array([0.15, 0.05, 0.3])}, np.array([False, True, True])))
    assert found == {"a": {"ground": [0.0, 1.0], "standing": [0.5, 0.5]}}


def test_networks_are_called_by_what_tells_them_apart():
    paths = [Path("out/a/last.ckpt"), Path("out/b/last.ckpt"), Path("out/b/best.ckpt")]
    assert benchmark.run_names(paths) == ["a", "b/last", "b/best"]
    with pytest.raises(ConfigError, match="names a/last twice"):
        benchmark.run_names([paths[0], Path("elsewhere/a/last.ckpt")])


def test_the_benchmark_wants_something_to_measure(capsys):
    assert benchmark.main([]) == 2
    assert "nothing to measure" in capsys.readouterr().err
