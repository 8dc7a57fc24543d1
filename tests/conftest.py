# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several rooms share."""

import os
from pathlib import Path

import hypothesis
import pytest

from occflownet_ros.private_graph import use_private_graph

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def graph_environment():
    """A ROS graph of the module's own, in the environment of this process."""
    before = dict(os.environ)
    for name in ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE"):
        os.environ.pop(name, None)
    use_private_graph()
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def nuscenes_real_root() -> Path:
    """Three real nuScenes keyframes, which lie beside the checkout on some machines and are not ours to ship."""
    root = REPOSITORY.parent / "shared" / "data" / "nuscenes-real"
    if not (root / "v1.0-mini").is_dir():
        pytest.skip(f"the real nuScenes keyframes are not on this machine (looked in {root})")
    return root


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory) -> Path:
    """A bundle of the demo's network with random weights: what it says means nothing, how it runs is the real thing."""
    export = pytest.importorskip("training.export", reason="exporting a bundle needs the train extra")
    directory = tmp_path_factory.mktemp("bundle") / "minicity_tiny"
    config = REPOSITORY / "training" / "configs" / "minicity_tiny.yaml"
    assert export.main(["--config", str(config), "--out", str(directory)]) == 0
    return directory


@pytest.fixture(scope="session")
def minicity_root(tmp_path_factory) -> Path:
    """A small MiniCity: one scene of three keyframes (seed 5, 352 x 198), with class and depth images."""
    minicity = pytest.importorskip("training.data.minicity", reason="MiniCity needs the train extra")
    root = tmp_path_factory.mktemp("data") / "minicity"
    return minicity.generate(root, 1, 3, 5, (352, 198), processes=1, write_semantics=True)
