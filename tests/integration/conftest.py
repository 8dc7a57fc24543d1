# SPDX-License-Identifier: Apache-2.0
"""What tests of a running node share."""

import os

import pytest
from ros_processes import NodeProcess, Vehicle

from occflownet_ros.private_graph import private_domain


@pytest.fixture(scope="module")
def graph_environment():
    """A ROS graph of the module's own, for what reads the environment."""
    before = dict(os.environ)
    os.environ.update({"ROS_DOMAIN_ID": str(private_domain()), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"})
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def vehicle():
    """The drivers' side of a module's graph; modules whose vehicle is another one have a fixture of their own."""
    vehicle = Vehicle()
    yield vehicle
    vehicle.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows what its processes said: what went wrong between processes may not come twice."""
    report = yield
    if report.failed:
        for node in NodeProcess.unclosed:
            title = f"node {node.process.pid}, exit status {node.process.poll()}"
            report.sections.append((title, node.log_path.read_text(errors="replace")))
        vehicle = item.funcargs.get("vehicle")
        if isinstance(vehicle, Vehicle):
            report.sections.append(("diagnostics that the vehicle heard last", vehicle.diagnostics_text()))
    return report
