# SPDX-License-Identifier: Apache-2.0
"""What buses, cables and drivers do to a running node: named in the diagnostics, counted, survived. See docs/faults.md.

All cameras of one node go wrong at once, each in its own way; then the anchor, the clock, the odometry, the calibration
and the engine, one after the other. The tests share that node and go in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from counting_bundle import write_counting_bundle
from diagnostic_msgs.msg import DiagnosticStatus
from fault_drive import IMAGE, IMAGE_SIZE_PX, PATIENT_S, PERIOD_NS, Fault, FaultDrive, active_node, jpeg_of
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from ros_processes import Vehicle

pytestmark = pytest.mark.integration

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR
HEALTHY_SWEEPS, FAULTY_SWEEPS = 12, 30
ENOUGH = 0.4  # of the sweeps: a busy machine replaces sets by newer ones, and is no fault that is looked for here
ANCHOR = "ANCHOR"


@dataclass(frozen=True)
class CameraFault:
    """What a camera does during the faulty sweeps, and what the node must say about it meanwhile.

    Attributes:
        sends: instead of each healthy image.
        level, words: of the camera's diagnostic; words are a regular expression.
        counter: that tells how often.
        count: its value after the drive, None where it depends on when an image arrives.
    """

    sends: Fault
    level: bytes
    words: str
    counter: str
    count: int | None


def leaves_out(keep_one_in: int) -> Fault:
    return lambda sweep, stamp_ns: [] if sweep % keep_one_in else [(stamp_ns, IMAGE)]


FROZEN: dict[str, int] = {}
HOUR_NS = 3600 * 10**9
CAMERA_FAULTS = {
    "STOPS": CameraFault(lambda k, t: [], ERROR, r"no image for [12]\.\d s on /STOPS/", "absent", None),
    "STARTS_LATE": CameraFault(lambda k, t: [], ERROR, "no image yet on /STARTS_LATE/", "absent", None),
    "FREEZES": CameraFault(
        lambda k, t: [(FROZEN.setdefault("ns", t), IMAGE)],
        ERROR, r"frozen: \d+ images of one and the same stamp", "duplicate", FAULTY_SWEEPS - 1,
    ),
    "IS_SLOWER": CameraFault(leaves_out(4), WARN, r"absent from \d+ sets", "absent", None),
    "JUMPS_BACK": CameraFault(
        lambda k, t: [(t - HOUR_NS, IMAGE)], ERROR, r"stamps are 3600\.\d s behind the anchor camera's", "absent", None
    ),
    "REPEATS": CameraFault(
        lambda k, t: [(t, IMAGE), (t, IMAGE)], WARN, r"\d+ duplicate", "duplicate", FAULTY_SWEEPS
    ),
    "OVERTAKES": CameraFault(
        lambda k, t: [(t, IMAGE), (t - PERIOD_NS // 2, IMAGE)],
        WARN, r"\d+ out of order", "out_of_order", FAULTY_SWEEPS,
    ),
    "SENDS_GARBAGE": CameraFault(
        lambda k, t: [(t, b"no image at all")], WARN, r"\d+ undecodable", "undecodable", FAULTY_SWEEPS
    ),
    "CUTS_SHORT": CameraFault(
        lambda k, t: [(t, IMAGE[: len(IMAGE) // 2])],
        WARN, r"\d+ undecodable", "undecodable", FAULTY_SWEEPS,
    ),
    "MISSES_SOME": CameraFault(
        lambda k, t: [] if k % 5 == 0 else [(t, IMAGE)],
        WARN, r"missed about \d+ of the last \d+ images \(one every 100 ms\)", "absent", None,
    ),
}  # fmt: skip
CAMERAS = (ANCHOR, "HEALTHY", *CAMERA_FAULTS)


@pytest.fixture(scope="module")
def drive(tmp_path_factory) -> Iterator[FaultDrive]:
    folder = tmp_path_factory.mktemp("faults")
    vehicle = Vehicle(CAMERAS, IMAGE_SIZE_PX)
    bundle = write_counting_bundle(folder / "bundle", CAMERAS)
    node = active_node(
        vehicle, folder, bundle, missing_cameras="mask", deadline_ms=180.0, image_depth=50, odom_reliability="reliable"
    )
    try:
        drive = FaultDrive(vehicle)
        drive.node = node
        yield drive
        assert node.interrupt() < 2 and node.process.returncode == 0
        assert "Traceback" not in node.log
    finally:
        node.close()
        vehicle.close()


@pytest.fixture(scope="module")
def camera_drive(drive):
    """Healthy but for a camera that starts late; then everything goes wrong at once; then all is well."""
    drive.drive(HEALTHY_SWEEPS, {"STARTS_LATE": CAMERA_FAULTS["STARTS_LATE"].sends})
    begun = len(drive.vehicle.diagnostics)
    stamps = drive.drive(FAULTY_SWEEPS, {name: fault.sends for name, fault in CAMERA_FAULTS.items()})
    reports = drive.vehicle.diagnostics[begun + 1 :]
    drive.recovered = drive.recovers(100)
    return stamps, reports


def statuses(reports, name: str) -> list[DiagnosticStatus]:
    return [s for report in reports for s in report.status if s.name == f"occflownet: {name}"]


@pytest.mark.parametrize("name", CAMERA_FAULTS)
def test_a_faulty_camera_is_named_and_counted(drive, camera_drive, name):
    _, reports = camera_drive
    fault = CAMERA_FAULTS[name]
    said = [(status.level, status.message) for status in statuses(reports, f"camera {name}")]
    assert any(level == fault.level and re.search(fault.words, message) for level, message in said), said
    counted = int(drive.vehicle.status(f"camera {name}")[fault.counter])
    assert counted == fault.count if fault.count is not None else counted >= FAULTY_SWEEPS // 6


def test_the_others_are_not_blamed_and_output_goes_on(drive, camera_drive):
    stamps, reports = camera_drive
    for name in (ANCHOR, "HEALTHY"):
        levels = [status.level for status in statuses(reports, f"camera {name}")]
        assert ERROR not in levels and OK in levels
    assert len(drive.stamps_of_output(stamps)) >= FAULTY_SWEEPS * ENOUGH


def test_when_the_cameras_are_well_again_so_is_the_node(drive, camera_drive):
    assert drive.recovered, [(s.name, s.message) for s in drive.vehicle.diagnostics[-1].status if s.level != OK]


def set_missing_cameras(drive, policy: str) -> None:
    client = drive.vehicle.node.create_client(SetParameters, "/occflownet/set_parameters")
    assert client.wait_for_service(PATIENT_S)
    parameter = Parameter("missing_cameras", value=policy).to_parameter_msg()
    future = client.call_async(SetParameters.Request(parameters=[parameter]))
    assert drive.vehicle.wait(future.done, PATIENT_S) and future.result().results[0].successful
    drive.vehicle.node.destroy_client(client)


def test_where_incomplete_sets_are_dropped_the_absent_camera_is_named(drive, camera_drive):
    set_missing_cameras(drive, "drop")
    begun = len(drive.vehicle.diagnostics)
    stamps = drive.drive(22, {"STOPS": lambda k, t: []})
    reports = drive.vehicle.diagnostics[begun + 1 :]
    assert drive.stamps_of_output(stamps[2:]) == []
    assert any("no set in the last second" in s.message for s in statuses(reports, "engine"))
    assert any("absent from" in s.message or s.level == ERROR for s in statuses(reports, "camera STOPS"))
    assert int(drive.vehicle.status("engine")["sets dropped"]) >= 22 * ENOUGH
    assert drive.recovers()
    set_missing_cameras(drive, "mask")


def test_an_anchor_that_stops_stops_the_output_and_is_named(drive, camera_drive):
    begun = len(drive.vehicle.diagnostics)
    stamps = drive.drive(28, {ANCHOR: lambda k, t: []})
    reports = drive.vehicle.diagnostics[begun + 1 :]
    assert drive.stamps_of_output(stamps[2:]) == []
    assert any("no image for" in s.message and s.level == ERROR for s in statuses(reports, f"camera {ANCHOR}"))
    for name in CAMERAS[1:]:
        assert ERROR not in {s.level for s in statuses(reports, f"camera {name}")}, "only the anchor is to blame"
    assert any("no set in the last second" in s.message for s in statuses(reports, "engine"))
    assert drive.recovers()


def test_a_clock_that_is_set_back_starts_everything_anew(drive, camera_drive):
    jumps = int(drive.vehicle.status("engine").get("sets time_jumps", 0))
    drive.jump_clock(-60.0)
    stamps = drive.drive(12)
    assert drive.stamps_of_output(stamps[:3]), "a looping bag must not cost more than its first sweeps"
    assert 1 in drive.memory_after(stamps[0])[: 2 * 12]
    assert drive.recovers()
    assert int(drive.vehicle.status("engine")["sets time_jumps"]) == jumps + 1
    assert int(drive.vehicle.status("ego motion")["reset time_jump"]) >= 1


def test_an_engine_that_fails_forgets_and_goes_on(drive, camera_drive):
    begun = len(drive.vehicle.diagnostics)
    white = jpeg_of(255)
    stamps = drive.drive(15, {"HEALTHY": lambda k, t: [(t, white)]})
    reports = drive.vehicle.diagnostics[begun:]
    assert drive.stamps_of_output(stamps[1:]) == []
    assert any(s.level == ERROR and re.search(r"failed on \d+ sets", s.message) for s in statuses(reports, "engine"))
    assert "a set could not be processed: ONNX Runtime failed while running 'counting'" in drive.node.log
    after = drive.drive(8)
    assert drive.memory_after(after[0])[:3] == [1, 2, 3]
    assert drive.recovers()
    assert int(drive.vehicle.status("ego motion")["reset engine"]) >= 15 * ENOUGH


def nan(sweep, message):
    message.pose.pose.position.x = float("nan")
    return message


def elsewhere(sweep, message):
    message.pose.pose.position.x += 5000.0
    return message


@pytest.mark.parametrize(
    ("odometry", "words", "counter"),
    [
        (nan, r"\d+ poses refused in the last second", "refused"),
        (lambda k, message: None, r"no pose of the vehicle at|no .* for 1\.\d s", "reset no_odometry"),
        (elsewhere, r"odometry moved 500\d\.\d m", "reset pose_jump"),
    ],
    ids=["nan", "gap", "jump"],
)
def test_odometry_that_is_wrong_costs_the_memory_and_no_more(drive, camera_drive, odometry, words, counter):
    begun = len(drive.vehicle.diagnostics)
    stamps = drive.drive(22, odometry=odometry)
    reports = drive.vehicle.diagnostics[begun:]
    assert len(drive.stamps_of_output(stamps)) >= 22 * ENOUGH
    assert any(s.level == WARN and re.search(words, s.message) for s in statuses(reports, "ego motion")), [
        s.message for s in statuses(reports, "ego motion")
    ]
    assert 1 in drive.memory_after(stamps[0])
    assert drive.recovers()
    assert int(drive.vehicle.status("ego motion")[counter]) >= 1


def test_a_singular_calibration_stops_the_output_until_there_is_a_better_one(drive, camera_drive):
    begun = len(drive.vehicle.diagnostics)
    stamps = drive.drive(15, fx_px=0.0)
    reports = drive.vehicle.diagnostics[begun:]
    assert drive.stamps_of_output(stamps[6:]) == []
    assert any(s.level == ERROR and "focal lengths are fx = 0" in s.message for s in statuses(reports, "calibration"))
    assert drive.recovers()
    assert int(drive.vehicle.status("calibration")["tables built"]) == 2


def test_bytes_that_are_no_message_do_not_end_the_node(drive, camera_drive):
    begun = len(drive.vehicle.diagnostics)
    for data in (b"", b"\0\1\0\0", b"\0\1\0\0" + b"\xff" * 40, bytes(300)):
        drive.vehicle.send_bytes(1, data)
    drive.vehicle.wait(lambda: len(drive.vehicle.diagnostics) > begun, PATIENT_S)
    reports = drive.vehicle.diagnostics[begun:]
    assert any("no sensor_msgs/CameraInfo" in s.message for s in statuses(reports, "calibration")), [
        s.message for s in statuses(reports, "calibration")
    ]
    assert drive.recovers()
    assert drive.node.process.poll() is None
