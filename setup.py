# SPDX-License-Identifier: Apache-2.0
"""Packaging for colcon (ament_python) and pip alike; package.xml carries the ROS dependencies."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "occflownet_ros"
SHARE = f"share/{PACKAGE}"


def shared_tree(folder: str) -> list[tuple[str, list[str]]]:
    """Every file below a folder, to be installed below the package's share directory at the same place."""
    by_directory: dict[str, list[str]] = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            by_directory.setdefault(f"{SHARE}/{path.parent.as_posix()}", []).append(path.as_posix())
    return list(by_directory.items())


runtime = [
    "numpy>=1.23",
    "opencv-python-headless>=4.8",
    "pyyaml>=6",
    "pillow>=10.1",
    "rich>=13",
    "onnxruntime>=1.20",
    "rosbags>=0.10",
    "apsw>=3.40",
    "lz4>=4",
    "backports.zstd>=1; python_version<'3.14'",
]
ros = [
    "ros-rclpy[fastrtps]",
    "ros-builtin-interfaces",
    "ros-diagnostic-msgs",
    "ros-geometry-msgs",
    "ros-lifecycle-msgs",
    "ros-nav-msgs",
    "ros-rosgraph-msgs",
    "ros-sensor-msgs",
    "ros-std-msgs",
    "ros-std-srvs",
    "ros-visualization-msgs",
]
export = ["torch>=2.6", "timm>=1.0", "onnx>=1.17", "onnxscript>=0.3", "safetensors>=0.4"]
mesh = ["scikit-image>=0.22", "trimesh>=4.5"]
train = [
    *export,
    *mesh,
    "lightning>=2.6",
    "jsonargparse[signatures]>=4.49",
    "tensorboard>=2.16",
    "matplotlib>=3.6",
    "nuscenes-devkit>=1.1.11",
    "embreex>=2.17.7",
    "mapbox_earcut>=1.0",
    "shapely>=2",
    "scipy>=1.10",
]
test = [
    "pytest>=8",
    "colcon-common-extensions>=0.3",
    "setuptools<80",
    "pytest-timeout>=2",
    "hypothesis>=6.100",
    "mcap>=1.1",
    "psutil>=5.9",
    "selenium>=4",
]

setup(
    name=PACKAGE,
    version="0.1.0",
    description="Camera-only semantic occupancy for ROS 2 vehicles, learned without 3D labels",
    maintainer="OccFlowNet ROS maintainers",
    maintainer_email="maintainers@occflownet-ros.org",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["occflownet_core*", "occflownet_ros*", "training*"]),
    package_data={"training": ["configs/*.yaml", "import_tables/*.yaml"], "occflownet_ros.report": ["assets/*"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (SHARE, ["package.xml"]),
        *[entry for folder in ("launch", "config", "demo") for entry in shared_tree(folder)],
    ],
    install_requires=runtime,
    extras_require={
        "ros": ros,
        "export": export,
        "train": train,
        "mesh": mesh,
        "tensorrt": ["tensorrt>=11", "cuda-bindings>=12.9", "onnx>=1.17"],
        "test": test,
        "dev": [*test, "ruff>=0.6"],
    },
    entry_points={
        "console_scripts": [
            "occflownet_node = occflownet_ros.node:main",
            "nuscenes_to_bag = occflownet_ros.nuscenes_to_bag:main",
            "bag_to_nuscenes = occflownet_ros.bag_to_nuscenes:main",
            "bag_player = occflownet_ros.bag_player:main",
            "demo = occflownet_ros.demo:main",
            "replay_evaluation = occflownet_ros.replay_evaluation:main",
            "occflownet-engine = occflownet_ros.engine_tool:main",
            "occflownet-query = occflownet_ros.query_tool:main",
        ]
    },
    zip_safe=True,
)
