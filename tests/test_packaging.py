# SPDX-License-Identifier: Apache-2.0
"""What packaging promises: colcon puts things where ros2 looks, rooms import downward only, sources carry a licence."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
EXECUTABLES = (
    "occflownet_node",
    "nuscenes_to_bag",
    "bag_to_nuscenes",
    "bag_player",
    "replay_evaluation",
    "demo",
    "occflownet-engine",
)


def tracked_files():
    """What a clone would hold; without git (a source archive) all that lies there."""
    listing = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in listing.stdout.splitlines() if (REPOSITORY / line).is_file()]


def python_files(*rooms):
    return [path for path in tracked_files() if path.suffix == ".py" and path.parts[0] in rooms]


@pytest.fixture(scope="module")
def colcon_install(tmp_path_factory):
    """The package built by colcon in a workspace of its own; the folder that ROS would source."""
    colcon = Path(sys.executable).parent / "colcon"
    if not colcon.is_file():
        pytest.skip("colcon is not installed (pip install colcon-common-extensions)")
    workspace = tmp_path_factory.mktemp("workspace")
    for path in tracked_files():
        target = workspace / "src" / "occflownet_ros" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / path, target)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    build = subprocess.run([str(colcon), "build"], cwd=workspace, env=environment, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return workspace / "install" / "occflownet_ros"


def test_ros2_run_and_launch_find_everything(colcon_install):
    for executable in EXECUTABLES:
        assert os.access(colcon_install / "lib" / "occflownet_ros" / executable, os.X_OK)
    share = colcon_install / "share" / "occflownet_ros"
    for path in (
        "package.xml",
        "launch/occ.launch.py",
        "config/occ.yaml",
        "config/occ.rviz",
        "config/fastdds.xml",
        "config/foxglove.json",
    ):
        assert (share / path).is_file(), path
    assert (colcon_install / "share" / "ament_index" / "resource_index" / "packages" / "occflownet_ros").is_file()


def test_the_installed_package_finds_its_share(colcon_install):
    pytest.importorskip("ament_index_python")
    packages = next((colcon_install / "lib").glob("python3*/site-packages"))
    environment = {**os.environ, "PYTHONPATH": str(packages), "AMENT_PREFIX_PATH": str(colcon_install)}
    program = "from occflownet_ros.share import share_path; print(share_path('config', 'occ.yaml'))"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=colcon_install, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()) == colcon_install / "share" / "occflownet_ros" / "config" / "occ.yaml"


def test_versions_agree():
    version = ElementTree.parse(REPOSITORY / "package.xml").getroot().findtext("version")
    setup = re.search(r'version="([^"]+)"', (REPOSITORY / "setup.py").read_text()).group(1)
    core = re.search(r'__version__ = "([^"]+)"', (REPOSITORY / "occflownet_core" / "__init__.py").read_text()).group(1)
    assert version == setup == core


@pytest.mark.parametrize(
    ("room", "must_not_import"),
    [
        ("occflownet_core", {"occflownet_ros", "training", "rclpy", "nuscenes"}),
        ("training", {"occflownet_ros", "rclpy"}),
        ("occflownet_ros", {"training", "torch"}),
    ],
)
def test_rooms_import_downward_only(room, must_not_import):
    for path in python_files(room):
        for node in ast.walk(ast.parse((REPOSITORY / path).read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            wrong = {name.partition(".")[0] for name in names} & must_not_import
            assert not wrong, f"{path}:{node.lineno} imports {wrong}"


def test_the_node_does_not_load_torch():
    pytest.importorskip("rclpy")
    program = "import sys, occflownet_ros.node, occflownet_core.runtime.onnx_engine; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def test_every_source_file_names_its_licence():
    for path in tracked_files():
        if path.suffix == ".py" or path.name in ("Makefile", "package.xml") or path.suffix == ".yaml":
            if path.parts[0] == "demo":
                continue  # a bundle's and a bag's own files
            head = "\n".join((REPOSITORY / path).read_text().splitlines()[:4])
            assert "SPDX-License-Identifier: Apache-2.0" in head, path
