# SPDX-License-Identifier: Apache-2.0
"""SIGINT at any moment ends the node cleanly and soon."""

from __future__ import annotations

from pathlib import Path

import pytest
from counting_bundle import write_counting_bundle
from fault_drive import IMAGE_SIZE_PX, PATIENT_S, FaultDrive, rig_of
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from ros_processes import CAMERAS, ROOT, NodeProcess, Vehicle

from occflownet_core.rig_file import save_rig
from occflownet_ros.lifecycle_client import ACTIVATE, CONFIGURE, change_state, state_of

pytestmark = pytest.mark.integration


@pytest.fixture
def vehicle():
    """One per test: a graph can keep a node that was interrupted while it announced itself for as long as it lives itself.

    Its last announcement may arrive after its farewell, and middleware takes that for a node come back.
    """
    vehicle = Vehicle(CAMERAS, IMAGE_SIZE_PX)
    yield vehicle
    vehicle.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_counting_bundle(tmp_path_factory.mktemp("bundles") / "bundle", CAMERAS)


@pytest.fixture
def start(vehicle, bundle, tmp_path):
    started = []

    def start_node(which: Path = bundle) -> NodeProcess:
        save_rig(rig_of(CAMERAS), tmp_path / "rig.yaml")
        started.append(
            NodeProcess(tmp_path / "log.txt", bundle=which, calibration_file=tmp_path / "rig.yaml", threads=1)
        )
        state_of(vehicle.node, "occflownet", PATIENT_S)
        return started[-1]

    yield start_node
    for node in started:
        node.close()


def ending(node: NodeProcess) -> tuple[int, bool, bool]:
    """Exit status after SIGINT, whether it came soon, and whether there was a traceback."""
    # The bound that users are promised is 2 s; tests may share two cores with much else.
    soon = node.interrupt() < 5
    return node.process.returncode, soon, "Traceback" in node.log


CLEAN = (0, True, False)


@pytest.mark.parametrize("after_s", [0.05, 0.5, 1.2])
def test_interrupt_during_configure(vehicle, start, after_s):
    """Of the demo's model, which takes a second or two to load and to warm up."""
    node = start(ROOT / "demo" / "bundle")
    client = vehicle.node.create_client(ChangeState, "occflownet/change_state")
    assert client.wait_for_service(PATIENT_S)
    client.call_async(ChangeState.Request(transition=Transition(id=CONFIGURE)))
    vehicle.wait(lambda: False, after_s)
    vehicle.node.destroy_client(client)
    assert ending(node) == CLEAN, node.log


def test_interrupt_while_inactive(vehicle, start):
    node = start()
    change_state(vehicle.node, "occflownet", CONFIGURE, PATIENT_S)
    assert ending(node) == CLEAN, node.log


def test_interrupt_while_the_engine_runs(vehicle, start):
    """The demo's network takes a few hundred milliseconds per set, so it is at work nearly always."""
    node = start(ROOT / "demo" / "bundle")
    for transition in (CONFIGURE, ACTIVATE):
        change_state(vehicle.node, "occflownet", transition, PATIENT_S)
    assert vehicle.wait(vehicle.is_heard, PATIENT_S)
    FaultDrive(vehicle).drive(12)
    assert ending(node) == CLEAN, node.log
