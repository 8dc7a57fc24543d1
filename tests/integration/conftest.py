# SPDX-License-Identifier: Apache-2.0
"""What tests of a running node share."""

import pytest
from ros_processes import NodeProcess, Vehicle


@pytest.fixture(scope="module", autouse=True)
def _own_graph(graph_environment):
    """Whoever was killed in a module leaves its graph soiled; no other module is to be in it."""


@pytest.fixture(scope="module")
def vehicle(graph_environment):
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
