# SPDX-License-Identifier: Apache-2.0
"""What happens to processes: a player that is killed, a subscriber that hangs, a bundle that is replaced, SIGINT."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from counting_bundle import write_counting_bundle
from diagnostic_msgs.msg import DiagnosticStatus
from fault_drive import IMAGE_SIZE_PX, PATIENT_S, FaultDrive, active_node
from ros_processes import CAMERAS, ROOT, Vehicle, ros_environment
from std_msgs.msg import UInt8MultiArray

from occflownet_ros.lifecycle_client import (
    ACTIVATE,
    CLEANUP,
    CONFIGURE,
    DEACTIVATE,
    UNCONFIGURED,
    LifecycleError,
    change_state,
    state_of,
)

pytestmark = pytest.mark.integration

ERROR = DiagnosticStatus.ERROR
PLAYER = (sys.executable, "-m", "occflownet_ros.bag_player", ROOT / "demo" / "bag", "--rate", "2", "--loop")
HANGING_SUBSCRIBER = """
import rclpy
from visualization_msgs.msg import MarkerArray
from std_msgs.msg import UInt8MultiArray
rclpy.init()
node = rclpy.create_node("hanging_subscriber")
heard = lambda message: print("heard", flush=True)
subscriptions = [
    node.create_subscription(UInt8MultiArray, "/occflownet/labels", heard, 10),
    node.create_subscription(MarkerArray, "/occflownet/voxels", heard, 10),
]
rclpy.spin(node)
"""


@contextmanager
def process(*command: object) -> Iterator[subprocess.Popen]:
    started = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=ros_environment(), stdout=subprocess.PIPE, bufsize=0
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


@pytest.fixture(scope="module")
def vehicle():
    vehicle = Vehicle(CAMERAS, IMAGE_SIZE_PX)
    yield vehicle
    vehicle.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_counting_bundle(tmp_path_factory.mktemp("bundles") / "bundle", CAMERAS, fails_from=256)


@pytest.fixture(scope="module")
def node(vehicle, bundle, tmp_path_factory):
    """An active node; the tests below share it, in order."""
    node = active_node(vehicle, tmp_path_factory.mktemp("node"), bundle, deadline_ms=2000.0)
    yield node
    node.close()


def test_a_player_that_is_killed_and_restarted(vehicle, node):
    labels = vehicle.hear(UInt8MultiArray, "/occflownet/labels")
    with process(*PLAYER, "--no-progress"):
        assert vehicle.wait(lambda: len(labels) >= 5, PATIENT_S)
    # Leaving the block killed it, with whatever it held in shared memory.
    vehicle.diagnostics.clear()
    assert vehicle.wait(lambda: "no image for" in vehicle.status("camera CAM_FRONT").get("message", ""), PATIENT_S)
    assert vehicle.status("camera CAM_FRONT")["level"] == ERROR
    labels.clear()
    with process(*PLAYER, "--no-progress"):
        assert vehicle.wait(lambda: len(labels) >= 3, PATIENT_S)
        assert vehicle.wait(lambda: int(vehicle.status("engine").get("sets time_jumps", 0)) >= 1, PATIENT_S)
    assert node.process.poll() is None


def hears(subscriber: subprocess.Popen, drive: FaultDrive, sweeps: int = 100) -> bool:
    """Whether it says so while the vehicle drives on."""
    for _ in range(sweeps):
        drive.drive(1)
        if select.select([subscriber.stdout], [], [], 0)[0]:
            return subscriber.stdout.readline() == b"heard\n"
    return False


def test_a_subscriber_that_hangs_holds_nobody_up(vehicle, node):
    drive = FaultDrive(vehicle)
    with process(sys.executable, "-c", HANGING_SUBSCRIBER) as subscriber:
        assert hears(subscriber, drive)
        subscriber.send_signal(signal.SIGSTOP)
        stamps = drive.drive(30)
        assert len(drive.stamps_of_output(stamps)) >= 12  # of 30: a busy machine replaces sets by newer ones
        assert float(vehicle.status("engine")["latency publish p50 / p95 [ms]"].split(" / ")[0]) < 50
        while select.select([subscriber.stdout], [], [], 0)[0]:
            subscriber.stdout.readline()
        subscriber.send_signal(signal.SIGCONT)
        assert hears(subscriber, drive) and subscriber.poll() is None


def test_a_bundle_that_is_replaced_on_disk_is_taken_at_the_next_configure(vehicle, node, bundle):
    drive = FaultDrive(vehicle)
    assert drive.recovers()
    write_counting_bundle(bundle, CAMERAS, name="newer", fails_from=256)
    assert drive.stamps_of_output(drive.drive(5))
    assert vehicle.status("engine")["engine"] == "counting on onnxruntime"
    for transition in (DEACTIVATE, CLEANUP, CONFIGURE, ACTIVATE):
        change_state(vehicle.node, "occflownet", transition, PATIENT_S)
    assert vehicle.wait(vehicle.is_heard, PATIENT_S)
    assert drive.recovers()
    assert vehicle.status("engine")["engine"] == "newer on onnxruntime"


@pytest.mark.parametrize(
    ("file", "left", "sentence"),
    [
        ("model.onnx", lambda whole: whole[:-1], "model.onnx was altered or cut short: its sha256 starts with"),
        ("bundle.yaml", lambda whole: b"\n".join(whole.split(b"\n")[:2]), "bundle.yaml lacks the entry"),
        ("bundle.yaml", lambda whole: b"", "bundle.yaml holds no table of entries"),
        ("model.onnx", None, "lacks model.onnx (No such file or directory); copy the whole folder again"),
    ],
    ids=["graph cut short", "description cut short", "description empty", "graph missing"],
)
def test_a_half_written_bundle_is_refused_in_one_sentence_and_the_old_one_runs_on(
    vehicle, node, bundle, file, left, sentence
):
    drive = FaultDrive(vehicle)
    whole = (bundle / file).read_bytes()
    (bundle / file).unlink()
    if left is not None:
        (bundle / file).write_bytes(left(whole))
    try:
        assert drive.stamps_of_output(drive.drive(4))
        for transition in (DEACTIVATE, CLEANUP):
            change_state(vehicle.node, "occflownet", transition, PATIENT_S)
        with pytest.raises(LifecycleError, match="refused 'configure'"):
            change_state(vehicle.node, "occflownet", CONFIGURE, PATIENT_S)
        assert state_of(vehicle.node, "occflownet", PATIENT_S) == UNCONFIGURED
        assert sentence in node.log and "Traceback" not in node.log
    finally:
        (bundle / file).write_bytes(whole)
    for transition in (CONFIGURE, ACTIVATE):
        change_state(vehicle.node, "occflownet", transition, PATIENT_S)
    assert vehicle.wait(vehicle.is_heard, PATIENT_S)
    assert drive.recovers()


def test_a_storm_of_interrupts_ends_it_cleanly(vehicle, node):
    """While active, while tidying up, and while the interpreter ends."""
    begun_s = time.monotonic()
    while node.process.poll() is None and time.monotonic() - begun_s < 10:
        node.process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    assert time.monotonic() - begun_s < 5
    assert node.process.returncode == 0 and "Traceback" not in node.log
