# SPDX-License-Identifier: Apache-2.0
"""What tests of bags share."""

from pathlib import Path

import pytest

from tests.ros import own_vehicle as vehicle


@pytest.fixture(scope="session")
def own_bag(tmp_path_factory) -> Path:
    """The own vehicle's drive, with its topics.yaml beside it; do not change it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "topics.yaml").write_text(vehicle.TOPICS_YAML)
    return vehicle.write_bag(folder / "drive", vehicle.drive())
