# SPDX-License-Identifier: Apache-2.0
"""A ROS graph of one's own on this machine, for replays, benchmarks and tests: away from a vehicle's, and from each other."""

from __future__ import annotations

import os
import random
import re
import socket
import sys
from pathlib import Path

from occflownet_core.errors import OccflownetError

_DOMAINS = range(1, 102)
"""Not 0, which is a vehicle's; of larger ones Linux hands out the ports to others (ip_local_port_range)."""

_FIRST_PORT, _PORTS_PER_DOMAIN, _METATRAFFIC = 7400, 250, 10
_PARTICIPANTS = 10
"""DDSI-RTPS 9.6.1.1: participant k of domain d listens on UDP port 7400 + 250 d + 10 + 2 k."""

_SHARED_MEMORY = Path("/dev/shm")

_reservations: list[socket.socket] = []


def use_private_graph() -> None:
    """Let this process and its children be in a graph of their own; what the user has set in the environment stands.

    Raises:
        OccflownetError: every domain is in use.
    """
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    if "ROS_DOMAIN_ID" not in os.environ:
        os.environ["ROS_DOMAIN_ID"] = str(private_domain())


def private_domain() -> int:
    """A ROS domain that nobody on this machine is in, and that this function gives to nobody else while this process lives.

    Raises:
        OccflownetError: every domain is in use.
    """
    soiled = _soiled_domains()
    for domain in sorted(random.sample(_DOMAINS, len(_DOMAINS)), key=soiled.__contains__):
        if _is_quiet(domain) and _reserve(domain):
            return domain
    raise OccflownetError(
        f"all ROS domains from {_DOMAINS[0]} to {_DOMAINS[-1]} are in use on this machine; end what is not needed"
    )


def _is_quiet(domain: int) -> bool:
    """Whether none of a domain's first participants is there."""
    first = _FIRST_PORT + _PORTS_PER_DOMAIN * domain + _METATRAFFIC
    for port in range(first, first + 2 * _PARTICIPANTS, 2):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                return False
    return True


def _soiled_domains() -> set[int]:
    """Domains in which a process was killed: Fast DDS's shared-memory ports stay, and may keep who comes next from hearing."""
    ports = (re.fullmatch(r"fastdds_port(\d+)", path.name) for path in _SHARED_MEMORY.glob("fastdds_port*"))
    return {(int(port[1]) - _FIRST_PORT) // _PORTS_PER_DOMAIN for port in ports if port}


def _reserve(domain: int) -> bool:
    """Whether the domain was not reserved. A name without a file, which the system frees when this process ends."""
    if sys.platform != "linux":
        return True
    reservation = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        reservation.bind(f"\0occflownet-ros-domain-{domain}")
    except OSError:
        reservation.close()
        return False
    _reservations.append(reservation)
    return True
