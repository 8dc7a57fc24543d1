# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several rooms share."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def nuscenes_real_root() -> Path:
    """Three real nuScenes keyframes, which lie beside the checkout on some machines and are not ours to ship."""
    root = REPOSITORY.parent / "shared" / "data" / "nuscenes-real"
    if not (root / "v1.0-mini").is_dir():
        pytest.skip(f"the real nuScenes keyframes are not on this machine (looked in {root})")
    return root
