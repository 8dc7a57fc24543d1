# SPDX-License-Identifier: Apache-2.0
"""``ros2 launch``: the launch file drives the node to active, names what is wrong, and leaves nothing behind.

Needs a ROS installation (launch_ros) with the package built; the node itself needs neither and is tested without.
"""

from __future__ import annotations

import signal
import subprocess
import time

import psutil
import pytest
from ros_launch import launch_command, skip_unless_built
from ros_processes import Vehicle, ring_rig, ros_environment

from occflownet_core.rig_file import save_rig
from occflownet_ros.lifecycle_client import ACTIVE, wait_for_state

pytest.importorskip("launch_ros", reason="launch_ros comes with a ROS installation and is not installed here")
pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _is_built():
    skip_unless_built()


def launch(log, **arguments) -> subprocess.Popen:
    command = launch_command("occ.launch.py", **arguments)
    with log.open("w") as output:
        return subprocess.Popen(command, env=ros_environment(), stdout=output, stderr=subprocess.STDOUT)


def test_drives_the_node_to_active_and_ends_it(tiny_bundle, tmp_path):
    save_rig(ring_rig(), tmp_path / "rig.yaml")
    vehicle = Vehicle()
    process = launch(tmp_path / "log.txt", bundle=tiny_bundle, calibration_file=tmp_path / "rig.yaml")
    try:
        time.sleep(1)
        wait_for_state(vehicle.node, "occflownet", ACTIVE, 20)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=10)
        assert not [child for child in children if child.is_running()]
    finally:
        process.poll() is None and process.kill()
        vehicle.close()


def test_a_missing_bundle_ends_the_launch_with_the_reason(tmp_path):
    process = launch(tmp_path / "log.txt", bundle="/nonexistent")
    try:
        process.wait(timeout=20)
    finally:
        process.poll() is None and process.kill()
    assert "there is no model bundle at /nonexistent" in (tmp_path / "log.txt").read_text()
