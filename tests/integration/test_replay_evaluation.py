# SPDX-License-Identifier: Apache-2.0
"""Replay evaluation end to end: lockstep says what ``training.evaluate`` says, bit for bit; real time counts its drops;
the page opens from disk in a browser and shows both."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from occflownet_core.runtime.bundle import load_bundle
from occflownet_ros.share import share_path

pytest.importorskip("rclpy", reason="rclpy is not installed (extra 'ros')")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

BUNDLE = share_path("demo", "bundle")
# A busy machine draws in software and loads models slowly; on an idle one each test takes seconds.
PATIENT_S = 240.0


def evaluate(bag: Path, out: Path, *options: str) -> dict:
    from occflownet_ros.replay_evaluation import main

    assert main(["--bag", str(bag), "--bundle", str(BUNDLE), "--out", str(out), *options]) == 0
    return json.loads((out / "report.json").read_text())


def bag_of(root: Path, scene: str, out: Path, *options: str) -> Path:
    pytest.importorskip("nuscenes")
    from occflownet_ros.nuscenes_to_bag import main

    arguments = ["--dataroot", str(root), "--version", "v1.0-mini", "--scene", scene, "--out", str(out), *options]
    assert main(arguments) == 0
    return out


def offline(root: Path, scene: str) -> tuple[dict[str, np.ndarray], dict | None]:
    """What the training's evaluation says of a scene: labels by token, and the scores where there is ground truth."""
    evaluate = pytest.importorskip("training.evaluate", reason="the offline evaluation needs the train extra")
    from occflownet_core.runtime.bundle import load_bundle
    from occflownet_core.runtime.factory import create_engine
    from training.data.nuscenes import KeyframeIndex

    bundle = load_bundle(BUNDLE)
    index = KeyframeIndex(root, "v1.0-mini", scenes=[scene], cameras=bundle.cameras)
    results = evaluate.run_keyframes(create_engine(bundle), index, "anchor")
    labels = {index[r.keyframe].token: r.labels_at(bundle.occupancy_threshold) for r in results}
    if not index[0].occupancy_path.is_file():
        return labels, None
    return labels, evaluate.evaluate(create_engine(bundle), index, bundle.occupancy_threshold, "anchor")


def require_same_labels(out: Path, expected: dict[str, np.ndarray]) -> None:
    assert {path.stem for path in (out / "labels").iterdir()} == set(expected)
    for token, labels in expected.items():
        assert len(np.unique(labels)) > 3, "a scene of few classes would prove little"
        np.testing.assert_array_equal(np.load(out / "labels" / f"{token}.npz")["semantics"], labels)


@pytest.fixture(scope="module")
def lockstep(minicity_root, tmp_path_factory) -> tuple[Path, dict]:
    """The small city's scene in lockstep, scored against the data root."""
    folder = tmp_path_factory.mktemp("lockstep")
    scene = next((minicity_root / "gts").iterdir()).name
    bag = bag_of(minicity_root, scene, folder / "bag")
    report = evaluate(bag, folder / "out", "--gt", str(minicity_root), "--save-labels")
    return folder / "out", report


def test_lockstep_says_what_the_training_says_bit_for_bit(lockstep, minicity_root):
    out, report = lockstep
    labels, scores = offline(minicity_root, next((minicity_root / "gts").iterdir()).name)
    assert len(labels) == 3
    require_same_labels(out, labels)
    for part in ("camera_mask", "no_mask", "rays"):
        assert report["scores"][part] == scores[part]


def test_the_report_says_where_its_numbers_come_from(lockstep):
    _, report = lockstep
    assert report["keyframes"] == {"in_bag": 3, "with_all_images": 3, "published": 3, "missed": 0}
    assert report["sets"]["processed"] == 3
    assert report["mode"]["name"] == "lockstep" and report["mode"]["anchor_camera"] == "CAM_FRONT"
    assert all(
        len(report[source]["sha256" if source == "bag" else "bundle_yaml_sha256"]) == 64 for source in ("bag", "model")
    )
    threshold = load_bundle(BUNDLE).occupancy_threshold
    assert "Trained without the camera mask" in report["settings"]
    assert f"threshold {threshold:g} " in report["settings"]
    assert "/" not in report["mode"]["parameters"]["bundle"]
    stages = report["frames"][1]["latency_ms"]
    parts = stages["busy"] + stages["decode"] + stages["wait"] + stages["engine"] + stages["publish"]
    assert parts == pytest.approx(stages["total"], abs=0.05)


@pytest.mark.parametrize(("scene", "keyframes"), [("scene-0061", 1), ("scene-0103", 2)])
def test_lockstep_on_real_keyframes_is_exact_too(scene, keyframes, nuscenes_real_root, tmp_path):
    labels, _ = offline(nuscenes_real_root, scene)
    report = evaluate(bag_of(nuscenes_real_root, scene, tmp_path / "bag"), tmp_path / "out", "--save-labels")
    assert len(labels) == keyframes == report["keyframes"]["published"]
    require_same_labels(tmp_path / "out", labels)
    assert report["scores"] is None and (tmp_path / "out" / "report.html").is_file()


def test_real_time_counts_what_it_drops_as_free(tmp_path):
    # Ten times faster than recorded: 20 keyframes a second are more than the model keeps up with anywhere.
    report = evaluate(share_path("demo", "bag"), tmp_path / "out", "--mode", "realtime", "--rate", "10")
    counts = report["keyframes"]
    missed = [frame for frame in report["frames"] if not frame["published"]]
    assert counts["in_bag"] == 12 and counts["missed"] == len(missed) == 12 - counts["published"]
    assert missed, "every keyframe was answered: choose a higher rate"
    for frame in missed:
        assert frame["scores"]["geometric_iou"] == 0 and frame["scores"]["ray_iou"] == 0
        assert frame["reason"] == "the node did not publish its set"


# The page in a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install selenium)")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Chromium and its driver are not installed (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"),
        *("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--proxy-server=127.0.0.1:9"),  # no network
    ):
        options.add_argument(argument)
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    session.command_executor.client_config.timeout = 2 * PATIENT_S
    session.set_page_load_timeout(PATIENT_S)
    session.set_script_timeout(PATIENT_S)
    yield session
    session.quit()


def shown(browser, expected: str) -> str:
    """Wait until the page shows ``frame/layer``; the number of cubes that it draws."""
    until_s = time.monotonic() + PATIENT_S
    while (now := browser.execute_script("return document.body.dataset.shown")) != expected:
        assert time.monotonic() < until_s, f"the page shows {now}, not {expected}"
        time.sleep(0.05)
    return browser.execute_script("return document.body.dataset.cubes")


def wait_until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENT_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.1)


def text(browser, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def press(browser, key: str) -> None:
    browser.execute_script(
        "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))", key
    )


def took_screenshot(browser, path: Path) -> bool:
    """The driver gives a page ten seconds to draw itself, which a busy machine may exceed."""
    from selenium.common.exceptions import TimeoutException

    with contextlib.suppress(TimeoutException):
        return browser.save_screenshot(str(path))
    return False


def test_the_page_opens_from_disk_and_shows_the_numbers_and_the_voxels(lockstep, browser, tmp_path):
    from occflownet_core.labels import CLASS_NAMES, FREE
    from occflownet_core.occupancy_frame import surface_voxels

    out, report = lockstep
    browser.get((out / "report.html").as_uri())
    labels = [np.load(out / "labels" / f"{frame['token']}.npz")["semantics"] for frame in report["frames"]]
    surface = [surface_voxels(voxels) for voxels in labels]
    assert shown(browser, "0/prediction") == str(int(surface[0].sum()))
    assert text(browser, "#miou") == f"{100 * report['scores']['camera_mask']['miou_17']:.1f} %"
    assert text(browser, "#rayiou") == f"{100 * report['scores']['rays']['ray_iou']:.1f} %"
    last = len(labels) - 1
    assert text(browser, "#answered") == f"{last + 1} / {last + 1}"

    # The slider moves time: its input event, as a hand or an arrow key on it gives.
    browser.execute_script(
        "const t = document.getElementById('time'); t.value = t.max; t.dispatchEvent(new Event('input'))"
    )
    assert shown(browser, f"{last}/prediction") == str(int(surface[last].sum()))
    assert f"{last + 1} of {last + 1}" in text(browser, "#time-text")
    assert report["frames"][last]["token"] in text(browser, "#frame-facts")
    press(browser, "ArrowLeft")
    shown(browser, f"{last - 1}/prediction")

    # A class is hidden by its legend entry, and the rest stays.
    classes, counts = np.unique(labels[last - 1][surface[last - 1]], return_counts=True)
    busiest = int(classes[counts.argmax()])
    assert text(browser, f'#legend [data-label="{busiest}"]').startswith(CLASS_NAMES[busiest].replace("_", " "))
    browser.execute_script("document.querySelector(arguments[0]).click()", f'#legend [data-label="{busiest}"]')
    rest = str(int(counts.sum() - counts.max()))
    wait_until(lambda: browser.execute_script("return document.body.dataset.cubes") == rest)
    browser.execute_script("document.querySelector(arguments[0]).click()", f'#legend [data-label="{busiest}"]')

    # Difference and both sides.
    press(browser, "3")
    shown(browser, f"{last - 1}/difference")
    press(browser, "4")
    assert len(shown(browser, f"{last - 1}/both").split()) == 2

    wait_until(lambda: took_screenshot(browser, tmp_path / "page.png"))
    assert (labels[0] != FREE).any()
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors


def test_the_page_draws_what_the_numbers_say(lockstep, browser):
    """Pixels of the canvas, from above: the most frequent class's colour is there, and gone when it is hidden."""
    import cv2

    from occflownet_core.labels import COLORS_RGB, label_of

    out, _ = lockstep
    browser.get((out / "report.html").as_uri())
    shown(browser, "0/prediction")
    press(browser, "2")
    shown(browser, "0/truth")
    press(browser, "a")
    road = COLORS_RGB[label_of("driveable_surface")].astype(int)

    def road_pixels() -> int:
        image = browser.execute_script("return document.getElementById('voxels').toDataURL('image/png')")
        png = np.frombuffer(base64.b64decode(image.partition(",")[2]), np.uint8)
        pixels = cv2.imdecode(png, cv2.IMREAD_COLOR)[..., ::-1].astype(int)
        return int((np.abs(pixels - road).max(axis=-1) < 25).sum())

    wait_until(lambda: road_pixels() > 3000)
    browser.execute_script(
        "document.querySelector(arguments[0]).click()", f'#legend [data-label="{label_of("driveable_surface")}"]'
    )
    wait_until(lambda: road_pixels() < 100)
