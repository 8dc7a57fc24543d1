# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the node: what they send, and how they judge."""

import pytest
from rclpy.serialization import deserialize_message, serialize_message
from std_msgs.msg import Header

from benchmarks import assembler, camera_streams, soak
from benchmarks.camera_streams import Recorded
from benchmarks.node_load import Load, Sample
from benchmarks.report import Figure
from occflownet_core.errors import OccflownetError
from occflownet_ros.conversions import nanoseconds
from occflownet_ros.share import share_path

MB_PER_S = 0.01


def test_a_serialised_message_takes_a_new_stamp_and_nothing_else():
    sent = serialize_message(Header(frame_id="CAM_FRONT"))
    header = deserialize_message(camera_streams.stamped(sent, 3_000_000_007), Header)
    assert nanoseconds(header.stamp) == 3_000_000_007 and header.frame_id == "CAM_FRONT"


def test_streams_keep_rate_offsets_and_order():
    sets = [[Recorded("/front", 0.0, b"", b""), Recorded("/left", -0.02, b"", b"")]]
    events = list(camera_streams.schedule(sets, rate_hz=10.0, seconds=0.2))
    images = [(round(due_s, 3), recorded.topic) for due_s, recorded in events if recorded]
    assert images == [(-0.02, "/left"), (0.0, "/front"), (0.08, "/left"), (0.1, "/front")]
    assert sum(recorded is None for _, recorded in events) == 10  # odometry of 50 Hz
    assert [due_s for due_s, _ in events] == sorted(due_s for due_s, _ in events)


@pytest.mark.parametrize("transport", ["compressed", "raw"])
def test_images_of_the_demo_drive_are_sent_by_six_cameras(transport):
    sets = camera_streams.read_sets(share_path("demo", "bag"), transport)
    assert len(sets) == 4 and {len(images) for images in sets} == {6}
    assert all(abs(one.offset_s) < 0.06 for images in sets for one in images)
    front = next(one for one in sets[0] if one.topic == "/CAM_FRONT")
    assert front.offset_s == 0 and (len(front.image) > 1600 * 900 * 3) == (transport == "raw")


def load_of(samples) -> Load:
    load = Load(sent={"front": 10}, samples=samples, seconds=300)
    load.replay.diagnostics["camera front"] = {"received": "9"}
    return load


def test_a_soak_run_is_judged_by_its_growth_after_the_first_minute():
    """300 MB at first, 400 from the first minute on, 0.01 MB more in a second, one handle that comes and goes."""
    samples = [Sample(t, 300.0 if t < 60 else 400.0 + MB_PER_S * (t - 60), 20 + (t == 100), 9) for t in range(1, 301)]
    growth, resident, handles, threads, images = soak.soak_figures(load_of(samples))
    assert growth.value == pytest.approx((300 - 30 - 60) * MB_PER_S)  # from one window's mean to the other's
    assert resident.ratio == pytest.approx(1 + growth.value / (400 + MB_PER_S * 14.5))
    assert (handles.value, handles.reference) == (21, 20) and (threads.value, threads.reference) == (9, 9)
    assert (images.value, images.reference) == (9, 10)


def test_a_soak_run_that_is_too_short_is_refused():
    with pytest.raises(OccflownetError, match="too short; give at least 150"):
        soak.soak_figures(load_of([Sample(t, 1.0, 1, 1) for t in range(100)]))


def test_sets_are_right_if_their_images_are_of_one_sweep():
    images = [assembler.Arrival(0.1 * k, k % 2, k // 2, k) for k in range(4)]
    found = assembler.outcome([((images[0], images[1]), 0.15), ((images[1], images[2]), 0.2)], busy_s=1.0)
    assert (found.right, found.wrong) == (1, 1) and found.delays_ms == pytest.approx([50.0])


def test_streams_that_lose_nothing_become_sets_that_are_all_right():
    images, whole = assembler.arrivals(12.0, 5.0, lost=0.0)
    assert whole == 60 and len(images) == 360
    found = assembler.run_ours(images, 12.0)
    assert (found.right, found.wrong) == (60, 0)


def test_a_figure_against_nothing_has_a_ratio():
    assert Figure("", 0, 0, "", "").ratio == 1 and Figure("", 2, 0, "", "").ratio == float("inf")
