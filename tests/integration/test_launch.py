# SPDX-License-Identifier: Apache-2.0
"""``ros2 launch``: the launch file drives the node to active, names what is wrong, and leaves nothing behind.

Needs a ROS installation (launch_ros) with the package built; the node itself needs neither and is tested without.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest
from ros_processes import ROOT, Vehicle, ring_rig, ros_environment

from occflownet_core.rig_file import save_rig
from occflownet_ros.lifecycle_client import ACTIVE, wait_for_state

pytest.importorskip("launch_ros", reason="launch_ros comes with a ROS installation and is not installed here")
pytestmark = pytest.mark.integration

LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
service = LaunchService()
source = PythonLaunchDescriptionSource(sys.argv[1])
arguments = [tuple(argument.split(":=", 1)) for argument in sys.argv[2:]]
service.include_launch_description(LaunchDescription([IncludeLaunchDescription(source, launch_arguments=arguments)]))
sys.exit(service.run())
"""


@pytest.fixture(autouse=True)
def _is_built():
    from ament_index_python.packages import PackageNotFoundError, get_package_prefix

    try:
        get_package_prefix("occflownet_ros")
    except PackageNotFoundError:
        pytest.skip("the package is not built with colcon here, so launch cannot find its node")


def launch(log, **arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", LAUNCH, str(ROOT / "launch" / "occ.launch.py")]
    command += [f"{name}:={value}" for name, value in arguments.items()]
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
