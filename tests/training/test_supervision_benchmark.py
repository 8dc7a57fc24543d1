# SPDX-License-Identifier: Apache-2.0
"""The ablation's instruments: worlds whose best field is known, scores and spreads by hand, what is kept and refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import network_training, supervision
from benchmarks.field_fitting import (
    ROWS,
    Window,
    WindowSettings,
    busiest_keyframes,
    fit,
    load_truth,
    load_window,
    swept_by_moving_boxes,
)
from benchmarks.paired_tables import Spread, difference_table, mean_table, paired_difference, with_section
from occflownet_core.boxes import MovingBoxes
from occflownet_core.errors import ConfigError, DatasetError
from occflownet_core.labels import FREE, label_of
from occflownet_core.renderer import Rays
from training.data.nuscenes import KeyframeIndex
from training.data.rays import LidarRays
from training.settings import parse

SMALL = WindowSettings(steps=40, rays_per_step=400, reach_m=4.0, density_rate=0.5, logit_rate=0.5, forgetting=0.05)
CAR, MANMADE = label_of("car"), label_of("manmade")


def straight_rays(y_m: float, z_m: float, range_m: float, label: int, time_index: int, count: int = 200) -> Rays:
    """Parallel rays along x from x = -3 m, spread over 0.2 m in y and z."""
    rng = np.random.default_rng(0)
    origin = np.stack(
        [np.full(count, -3.0), y_m + rng.uniform(-0.1, 0.1, count), z_m + rng.uniform(-0.1, 0.1, count)], axis=1
    )
    return Rays.from_numpy(
        origin, np.tile([1.0, 0, 0], (count, 1)), np.full(count, range_m), np.full(count, label), time_index
    )


def car_that_moves(by_m: float) -> MovingBoxes:
    """A cube of 0.8 m, now at y = 0.3 m, further left at the next keyframe."""
    now, then = np.eye(4), np.eye(4)
    now[:3, 3] = 2.3, 0.3, 0.3
    then[:3, 3] = 2.3, 0.3 + by_m, 0.3
    return MovingBoxes.from_numpy(now[None], then[None], np.full((1, 3), 0.8), np.array([CAR]), np.array([1]))


def test_a_wall_is_found_and_what_no_ray_crosses_stays_free():
    window = Window(straight_rays(0.2, 0.4, 6.45, MANMADE, 0), MovingBoxes.empty())  # ends at x = 3.45 m
    fitted = fit(window, ROWS["single"], SMALL)
    assert fitted.probability[18, 10, 3] > 0.8 and fitted.label[18, 10, 3] == MANMADE
    assert fitted.probability[3:18, 10, 3].max() < 0.05
    # 1 - exp(-0.02 / m * 0.4 m): where every voxel starts.
    np.testing.assert_allclose(fitted.probability[:, 2], 0.00797, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "now", "ghost"), [("flow", True, False), ("static", False, True), ("filter", False, False)]
)
def test_where_a_car_seen_half_a_second_later_ends_up(row, now, ghost):
    window = Window(straight_rays(1.85, 0.4, 5.25, CAR, 1), car_that_moves(1.6))  # ends at x = 2.25 m
    # Something else, so that the filter has rays left.
    wall = straight_rays(-2.2, 0.4, 6.45, MANMADE, 1)
    window = replace(window, rays=Rays.cat([window.rays, wall]))
    labels = fit(window, ROWS[row], SMALL).labels_at(0.3)
    assert (labels[15, 10, 3] == CAR) == now
    assert (labels[15, 14, 3] == CAR) == ghost


def test_fits_repeat_themselves():
    window = Window(straight_rays(0.2, 0.4, 6.45, MANMADE, 0, count=900), MovingBoxes.empty())
    first, second = (fit(window, ROWS["single"], replace(SMALL, steps=5)) for _ in range(2))
    np.testing.assert_array_equal(first.probability, second.probability)


def test_swept_voxels_by_hand():
    swept = swept_by_moving_boxes(car_that_moves(1.6), SMALL.grid)
    # Voxel centres in y: 0.2 and 0.6 m lie within 0.4 m of 0.3 m, 1.8 and 2.2 m within 0.4 m of 1.9 m; so in x and z.
    x, y, z = (set(axis.tolist()) for axis in np.nonzero(swept))
    assert (x, y, z) == ({15, 16}, {10, 11, 14, 15}, {2, 3}) and swept.sum() == 2 * 4 * 2
    assert not swept_by_moving_boxes(car_that_moves(0.1), SMALL.grid).any()  # it stands


def test_windows_of_a_data_set(tiny_root):
    index = KeyframeIndex(tiny_root.path, "v1.0-tiny")
    settings = WindowSettings()
    whole = load_window(index, 2, settings.grid)
    window = whole.seen_by(ROWS["horizon_2"])
    assert set(window.rays.time_index.tolist()) == {-2, -1, 0, 1, 2} and set(window.boxes.time_index.tolist()) == {
        -2,
        -1,
        1,
        2,
    }
    assert set(whole.seen_by(ROWS["single"]).rays.time_index.tolist()) == {0}
    truth = load_truth(index, 2, settings.grid)
    # The file's car fills x 110..119, y 90..94, z 2..4 of 200 cells; the grid starts at cell 60 of them.
    assert truth.labels.shape == (80, 80, 16) and (truth.labels[50:60, 30:35, 2:5] == CAR).all()
    assert (truth.labels != FREE).sum() == 10 * 5 * 3


def test_rows_take_their_part_of_a_window():
    hole = Rays.from_numpy([[0.0, 0, 1]], [[1.0, 0, 0]], [np.inf], [FREE], 1)
    window = Window(Rays.cat([straight_rays(0.2, 0.4, 6.45, MANMADE, 2, count=5), hole]), car_that_moves(1.6))
    assert [len(window.seen_by(ROWS[key]).rays) for key in ("flow", "no_holes", "horizon_1", "single")] == [6, 5, 1, 0]
    assert [len(window.seen_by(ROWS[key]).boxes) for key in ("horizon_1", "single")] == [1, 0]


def test_keyframes_without_enough_neighbours_are_refused(tiny_root):
    with pytest.raises(DatasetError, match=r"0 scenes of .* make more scenes, of 9 keyframes"):
        busiest_keyframes(KeyframeIndex(tiny_root.path, "v1.0-tiny"), 1, WindowSettings().grid)


def test_half_a_pixel_in_every_camera(tiny_root):
    keyframe = KeyframeIndex(tiny_root.path, "v1.0-tiny")[1]
    right, off = (LidarRays(no_return=True, half_pixel_offset=o).frame_rays(keyframe) for o in (False, True))
    for c, camera in enumerate(keyframe.cameras):
        mine = right.camera_index == c
        ego_from_camera = np.linalg.inv(keyframe.global_from_ego) @ camera.global_from_sensor
        end_m = off.sensor_origin_m[c] + off.direction[mine] * off.range_m[mine, None]
        in_camera = (np.c_[end_m, np.ones(len(end_m))] @ np.linalg.inv(ego_from_camera).T)[:, :3] @ camera.intrinsic.T
        np.testing.assert_allclose(in_camera[:, 2], right.depth_m[mine], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(in_camera[:, :2] / in_camera[:, 2:], right.pixel[mine] + 0.5, atol=0.05)
    holes = right.camera_index == -1
    np.testing.assert_array_equal(off.direction[holes], right.direction[holes])


def test_scores_by_hand():
    confusion, moving = np.zeros((18, 18), dtype=int), np.zeros((18, 18), dtype=int)
    confusion[CAR, CAR], confusion[CAR, FREE], confusion[FREE, CAR] = 6, 2, 4  # IoU 6 / 12
    confusion[MANMADE, MANMADE], confusion[MANMADE, CAR] = 9, 1  # IoU 9 / 10; the car's becomes 6 / 13
    confusion[FREE, label_of("bus")] = 3  # there is no bus: it must not become a class of its own
    moving[CAR, CAR], moving[FREE, label_of("truck")] = 5, 5
    scores = supervision.scores_of(confusion, moving)
    assert scores["dynamic"] == pytest.approx(6 / 13) and scores["static"] == pytest.approx(0.9)
    assert scores["miou"] == pytest.approx((6 / 13 + 0.9) / 2)
    assert scores["geometric"] == pytest.approx(16 / 25)  # 6 + 9 + 1 of these and 2 missed, 7 invented
    assert scores["dynamic_occupied"] == pytest.approx(6 / 16)
    assert scores["moving"] == pytest.approx(0.5)


def test_paired_differences_leave_out_what_units_differ_in():
    row = {"a": {"m": 0.30}, "b": {"m": 0.52}, "c": {"m": 0.73}}
    reference = {"a": {"m": 0.20}, "b": {"m": 0.40}, "c": {"m": 0.60}, "d": {"m": 0.9}}
    spread = paired_difference(row, reference, "m")
    # Differences 0.10, 0.12, 0.13: mean 0.11667, deviation sqrt((0.01667^2 + 0.00333^2 + 0.01333^2) / 2) = 0.01528.
    assert (spread.mean, spread.deviation, spread.count) == (
        pytest.approx(0.116667, abs=1e-6),
        pytest.approx(0.015275, abs=1e-6),
        3,
    )
    assert spread.percent(signed=True) == "+11.7 ± 1.5"
    assert Spread.of([0.5]).percent() == "50.0" and Spread.of([float("nan")]).percent() == "-"
    names, measures = {"row": "Row", "ref": "Reference"}, {"m": "M"}
    rows = {"ref": reference, "row": row}
    means = mean_table("T", rows, names, measures, {"extra": {"row": "x", "ref": "y"}})
    assert means.rows[1] == ("Row", "51.7 ± 21.5", "x")
    differences = difference_table("T", rows, {"ref": None, "row": "ref"}, names, measures)
    assert differences.rows == (("Row", "Reference", "+11.7 ± 1.5"),)
    assert "| Row | Reference | +11.7 ± 1.5 |" in differences.markdown()


def test_tables_replace_their_section_of_a_page_and_nothing_else():
    page = "top\n<!-- a begins -->\nold\n<!-- a ends -->\nmiddle\n<!-- b begins -->\n<!-- b ends -->\n"
    changed = with_section(page, "a", "new")
    assert changed == page.replace("\nold\n", "\n\nnew\n")
    assert with_section(changed, "a", "new") == changed
    with pytest.raises(ConfigError, match="no section 'c'"):
        with_section(page, "c", "new")


def test_what_was_measured_with_other_settings_is_measured_again(tmp_path):
    results = supervision.Results(tmp_path, SMALL)
    results.save("flow", "token", {"value": 1})
    assert results.load("flow", "token")["value"] == 1
    assert results.load("static", "token") is None
    assert supervision.Results(tmp_path, replace(SMALL, logit_rate=0.1)).load("flow", "token") is None


def test_command_lines_refuse_in_one_sentence(tmp_path, capsys):
    assert supervision.main(["--dataroot", str(tmp_path), "--rows", "flwo"]) == 2
    assert "row 'flwo' is unknown; the rows are single, static" in capsys.readouterr().err
    assert network_training.main(["--dataroot", "a", "--val-dataroot", "b", "--rows", "flwo"]) == 2
    assert "row 'flwo' is unknown" in capsys.readouterr().err


def test_every_network_row_is_a_configuration():
    base = ["--config", "training/configs/minicity_tiny.yaml"]
    configs = {key: parse([*base, *row.options])[0] for key, row in network_training.ROWS.items()}
    assert configs["single"].data.horizon == 0 and configs["flow"].data.horizon == 3
    assert [configs[key].motion.kind for key in ("static", "filter", "flow")] == ["static", "filter", "box_flow"]
    assert [configs[key].supervision.kind for key in ("flow", "2d3d", "3d")] == ["2d", "2d3d", "3d"]
    assert configs["fitted"].supervision.kind == "3d" and configs["fitted"].data.labels_folder == "gts_fitted"
    by_file = parse(["--config", "training/configs/minicity_tiny_surface.yaml"])[0]
    assert (configs["surface"].rendering, configs["surface"].losses) == (by_file.rendering, by_file.losses)


def test_network_scores_come_from_finished_evaluations(tmp_path):
    runs = [network_training.Run("flow", seed, tmp_path / f"flow_seed{seed}") for seed in range(2)]
    masked = {"miou_17": 0.2, "geometric_iou": 0.4, "static_miou": 0.3, "dynamic_miou": None, "dynamic_iou": 0.5}
    for run, miou in zip(runs, (0.2, 0.3), strict=True):
        run.out.mkdir()
        run.result.write_text(json.dumps({"camera_mask": {**masked, "miou_17": miou}, "rays": {"ray_iou": 0.1}}))
    unfinished = network_training.Run("filter", 0, tmp_path / "filter_seed0")
    means, differences = network_training.tables([*runs, unfinished], "small")
    assert means.rows == (
        ("2D, 7 keyframes, box flow", "25.0 ± 7.1", "40.0 ± 0.0", "30.0 ± 0.0", "-", "50.0 ± 0.0", "10.0 ± 0.0", "2"),
    )
    assert differences.rows == ()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
