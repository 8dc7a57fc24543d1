# SPDX-License-Identifier: Apache-2.0
"""``ros2 launch`` of a replay evaluation: it runs, says where the page is, and ends; a wrong bag ends it with the reason.

Needs a ROS installation (launch_ros) with the package built.
"""

from __future__ import annotations

import json
import subprocess

import pytest
from ros_launch import launch_command, skip_unless_built
from ros_processes import ros_environment

from occflownet_ros.private_graph import private_domain

pytest.importorskip("launch_ros", reason="launch_ros comes with a ROS installation and is not installed here")
pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _is_built():
    skip_unless_built()


def launch(**arguments) -> str:
    """Run the launch file to its end; what was printed."""
    command = launch_command("replay.launch.py", **arguments)
    environment = ros_environment()
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    return run.stdout + run.stderr


def test_evaluates_the_demo_drive_and_ends(tmp_path):
    # Faster than the machine can follow: what is tested here is the launch, not the model.
    said = launch(out=tmp_path / "out", mode="realtime", rate="20", domain_id=private_domain())
    assert f"see {tmp_path / 'out' / 'report.html'}" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["mode"]["name"], report["mode"]["rate"]) == ("realtime", 20.0)
    assert report["keyframes"]["in_bag"] == 12


def test_a_missing_bag_ends_the_launch_with_the_reason(tmp_path):
    said = launch(bag="/nonexistent", out=tmp_path / "out")
    assert "there is no bag at /nonexistent" in said
    assert "replay_evaluation failed" in said
