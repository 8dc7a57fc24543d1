# SPDX-License-Identifier: Apache-2.0
"""What tests of a running node share."""

import pytest
from ros_processes import Vehicle


@pytest.fixture(scope="module")
def vehicle():
    """The drivers' side of a module's graph; modules whose vehicle is another one have a fixture of their own."""
    vehicle = Vehicle()
    yield vehicle
    vehicle.close()
