# SPDX-License-Identifier: Apache-2.0
"""Domains of one's own: none that somebody is in, none twice, and the user's where there is one."""

import socket
import subprocess
import sys

import pytest

from occflownet_core.errors import OccflownetError
from occflownet_ros import private_graph
from occflownet_ros.private_graph import private_domain, use_private_graph

CHILD = "from occflownet_ros.private_graph import private_domain; print(private_domain())"


@pytest.fixture
def few_domains(monkeypatch):
    """Two domains that nobody else has; participant 0 of domain 102 listens on port 7400 + 250 * 102 + 10 = 32910."""
    monkeypatch.setattr(private_graph, "_DOMAINS", range(102, 104))
    monkeypatch.setattr(private_graph, "_reservations", [])
    yield
    for reservation in private_graph._reservations:
        reservation.close()


def test_a_domain_that_somebody_is_in_is_left_alone(few_domains):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as participant:
        participant.bind(("", 32910 + 2 * 3))  # participant 3
        assert private_domain() == 103
        with pytest.raises(OccflownetError, match="all ROS domains from 102 to 103 are in use"):
            private_domain()


def test_a_domain_in_which_a_process_was_killed_is_the_last_choice(few_domains, monkeypatch, tmp_path):
    monkeypatch.setattr(private_graph, "_SHARED_MEMORY", tmp_path)
    (tmp_path / "fastdds_port32911").touch()  # its user traffic; and other files that are there
    (tmp_path / "sem.fastdds_port33161_mutex").touch()
    (tmp_path / "fastdds_port33161_el").touch()
    assert [private_domain(), private_domain()] == [103, 102]


@pytest.mark.skipif(sys.platform != "linux", reason="reserved by abstract sockets, which Linux alone has")
def test_no_domain_is_given_twice_while_its_process_lives(few_domains, monkeypatch):
    first = {private_domain(), private_domain()}
    assert first == {102, 103}
    child = CHILD.replace("; print", "; private_graph._DOMAINS = range(102, 104); print")
    command = [sys.executable, "-c", f"from occflownet_ros import private_graph; {child}"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "are in use on this machine" in refused.stderr
    for reservation in private_graph._reservations:
        reservation.close()
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) in (102, 103)


def test_what_the_user_chose_stands(monkeypatch):
    monkeypatch.setenv("ROS_DOMAIN_ID", "42")
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    use_private_graph()
    assert private_graph.os.environ["ROS_DOMAIN_ID"] == "42"
    assert private_graph.os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "SUBNET"


def test_without_a_choice_the_graph_is_on_this_machine_alone(monkeypatch):
    for name in ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # so that what is set here goes when the test ends
    use_private_graph()
    assert 1 <= int(private_graph.os.environ["ROS_DOMAIN_ID"]) <= 101
    assert private_graph.os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
