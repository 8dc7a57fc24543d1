# SPDX-License-Identifier: Apache-2.0
"""A fitted scene as one mesh and one volume of labels for the whole drive, in the ego frame of its first keyframe.

What stands still is meshed as a whole. Moving objects are meshed in their bays, each in its box's own frame, and put
where their boxes are at one keyframe; the volume of labels leaves them out.

Between voxel centres the *logarithm* of the density is interpolated: where a free voxel meets an opaque one, the surface then
lies between the two, while a density interpolated itself passes a low threshold almost at the free one's centre. The lattice
on which surfaces are searched begins at those centres, and nowhere between eight of them is the field above the greatest of
the eight: no piece of the surface, however small, slips through (see ``occflownet_core.mise``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from occflownet_core import poses
from occflownet_core.errors import ConfigError
from occflownet_core.field import occupancy_probability
from occflownet_core.grid import OCC3D_GRID, VoxelGrid
from occflownet_core.interpolate import trilinear
from occflownet_core.labels import labels_above
from occflownet_core.mesh import Mesh, extract_mesh, require_format, save_mesh
from occflownet_core.mise import levels_to
from occflownet_core.query import FieldSamples
from training.scene import BOX_SCALE, Scene
from training.voxel_fitting import FitSettings, FittedVoxels

LENGTH_M = OCC3D_GRID.voxel_size_m
"""What a probability is of: that so long a piece is opaque, as for the keyframes' labels, whatever the fit's voxels."""

_LEAST_DENSITY_PER_M = 1e-3  # a twentieth of where voxels start; a logarithm needs an end


@dataclass(frozen=True, eq=False)
class LatticeField:
    """A box of voxels of a fitted field as ``extract_mesh`` takes it: continuous between their centres, free beyond.

    Attributes:
        evidence: [1, 1, Z, Y, X], logarithm of the density over the least one; zero beyond the box.
        logits: [1, 17, Z, Y, X].
        grid: the box.
    """

    evidence: Tensor
    logits: Tensor
    grid: VoxelGrid

    @staticmethod
    def of(fitted: FittedVoxels, lower_m: Sequence[float], upper_m: Sequence[float]) -> LatticeField:
        """The voxels of the fitted grid that lie, wholly or in part, between two corners [3]."""
        first = np.floor(np.maximum(fitted.grid.index_from_metric(lower_m), 0) + 1e-6).astype(int)
        last = np.ceil(np.minimum(fitted.grid.index_from_metric(upper_m), fitted.grid.shape) - 1e-6).astype(int)
        x, y, z = (slice(*ends) for ends in zip(first, last, strict=True))
        density = fitted.field.density_lattice[:, None, z, y, x]
        return LatticeField(
            (density / _LEAST_DENSITY_PER_M).clamp(min=1).log(),
            fitted.logits[:, :, z, y, x],
            VoxelGrid(*map(tuple, fitted.grid.metric_from_index([first, last])), fitted.grid.voxel_size_m),
        )

    @property
    def search_grid(self) -> VoxelGrid:
        """The cells between the voxels' centres, and one more layer around them."""
        half_m = self.grid.voxel_size_m / 2
        lower_m, upper_m = np.array(self.grid.lower_m) - half_m, np.array(self.grid.upper_m) + half_m
        return VoxelGrid(tuple(lower_m), tuple(upper_m), self.grid.voxel_size_m)

    def probability(self, points_m: np.ndarray) -> np.ndarray:
        return self._probability(torch.from_numpy(points_m)).numpy()

    def samples(self, points_m: np.ndarray, gradient: bool = False) -> FieldSamples:
        points = torch.from_numpy(points_m).requires_grad_(gradient)
        probability = self._probability(points)
        slope_per_m = torch.autograd.grad(probability.sum(), points)[0].numpy() if gradient else None
        logits = trilinear(self.logits, self.grid, points.detach(), _one_sample(points))
        return FieldSamples(probability.detach().numpy(), logits.numpy(), self.grid.contains(points_m), slope_per_m)

    def _probability(self, points_m: Tensor) -> Tensor:
        evidence = trilinear(self.evidence, self.grid, points_m, _one_sample(points_m))[:, 0]
        return occupancy_probability(_LEAST_DENSITY_PER_M * evidence.exp(), LENGTH_M)


def drive_mesh(scene: Scene, fitted: FittedVoxels, k: int, threshold: float, resolution_m: float) -> Mesh:
    """What stands still, and the moving objects where they are at keyframe ``k``.

    Args:
        scene, fitted: field and frame.
        k: keyframe; an object that is not annotated there is left out.
        threshold: of the probability that 0.4 m are opaque, inside (0, 1).
        resolution_m: voxels are halved until cells are no larger.

    Returns:
        the mesh in the scene's frame; its ``cells`` are those of what stands still.

    Raises:
        ConfigError, GeometryError: the threshold or the resolution is no such number.
    """
    parts = [_mesh(LatticeField.of(fitted, scene.static.lower_m, scene.static.upper_m), threshold, resolution_m)]
    boxes = scene.boxes[scene.boxes.time_index == k + 1]
    for bay, pose, size_m in zip(boxes.ego_from_box_now, boxes.ego_from_box_then, boxes.size_m, strict=True):
        scene_from_bay = pose.numpy() @ poses.inverse(bay.numpy())
        half_m = BOX_SCALE * size_m.numpy() / 2
        content = LatticeField.of(fitted, bay[:3, 3].numpy() - half_m, bay[:3, 3].numpy() + half_m)
        parts.append(_moved(_mesh(content, threshold, resolution_m), scene_from_bay))
    return _joined(parts)


def _mesh(field: LatticeField, threshold: float, resolution_m: float) -> Mesh:
    coarse = field.search_grid
    return extract_mesh(field, coarse, threshold, levels_to(coarse, resolution_m))


def _moved(mesh: Mesh, target_from_source: np.ndarray) -> Mesh:
    vertices_m = poses.transform_points(target_from_source, mesh.vertices_m.astype(np.float64))
    return Mesh(vertices_m.astype(np.float32), mesh.triangles, mesh.labels, mesh.cells)


def _joined(parts: Sequence[Mesh]) -> Mesh:
    before = np.cumsum([0, *(len(part.vertices_m) for part in parts)])
    return Mesh(
        np.concatenate([part.vertices_m for part in parts]),
        np.concatenate([part.triangles + np.int32(n) for part, n in zip(parts, before, strict=False)]),
        np.concatenate([part.labels for part in parts]),
        parts[0].cells,
    )


def drive_labels(scene: Scene, fitted: FittedVoxels, threshold: float) -> dict[str, np.ndarray]:
    """Labels of the fit's own voxels, without what moves.

    Returns:
        semantics uint8 [X, Y, Z]; seen bool [X, Y, Z], whether any ray asked anything of a voxel; origin_m [3], the lower
        corner of voxel (0, 0, 0); voxel_size_m; scene_from_global [4, 4], from global coordinates to those of origin_m.
    """
    x, y, z = (slice(n) for n in scene.static.shape)
    probability = occupancy_probability(fitted.field.density_lattice[0], LENGTH_M).permute(2, 1, 0)
    return {
        "semantics": labels_above(threshold, probability[x, y, z].numpy(), fitted.label[x, y, z]),
        "seen": fitted.seen[0].permute(2, 1, 0)[x, y, z].numpy(),
        "origin_m": np.array(scene.static.lower_m),
        "voxel_size_m": np.array(scene.static.voxel_size_m),
        "scene_from_global": scene.scene_from_global,
    }


def write_drive(scene: Scene, fitted: FittedVoxels, options: argparse.Namespace, folder: Path) -> dict:
    """``drive.npz`` and, if wanted, the mesh; what the report says about them."""
    np.savez_compressed(folder / "drive.npz", **drive_labels(scene, fitted, options.threshold))
    if not options.mesh:
        return {"mesh": None}
    k = len(scene.keyframes) // 2 if options.mesh_keyframe is None else options.mesh_keyframe
    mesh = drive_mesh(scene, fitted, k, options.mesh_threshold, options.mesh)
    save_mesh(mesh, folder / options.mesh_file)
    return {
        "mesh": {
            "file": options.mesh_file,
            "cell_m": mesh.cells.grid.voxel_size_m,
            "keyframe": k,
            "threshold": options.mesh_threshold,
            "triangles": len(mesh.triangles),
            "vertices": len(mesh.vertices_m),
        }
    }


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """Those that ``write_drive`` reads."""
    group = parser.add_argument_group("mesh of the whole drive")
    group.add_argument(
        "--mesh", type=float, default=0.2, metavar="RESOLUTION_M", help="its cells (default 0.2 m); 0: no mesh"
    )
    group.add_argument(
        "--mesh-file",
        default="drive.glb",
        metavar="NAME",
        help="in the scene's folder, *.glb or *.ply (default drive.glb)",
    )
    group.add_argument(
        "--mesh-keyframe",
        type=int,
        metavar="K",
        help="keyframe, counted from 0, at which moving objects are shown (default: the middle one)",
    )
    group.add_argument(
        "--mesh-threshold",
        type=float,
        default=0.2,
        metavar="P",
        help="probability at which its surface lies (default 0.2; less keeps more of what few beams met, but swells all things)",
    )


def check_mesh_options(options: argparse.Namespace, keyframes: int) -> None:
    """Refuse before anything is fitted what could not be meshed after it.

    Args:
        options: of the command.
        keyframes: of the shortest scene.

    Raises:
        OccflownetError: the resolution, threshold, keyframe or file name is wrong.
    """
    if not 0 <= options.mesh < np.inf:
        raise ConfigError(
            f"--mesh is {options.mesh:g}; give the size of its cells in metres, e.g. 0.2, or 0 for no mesh"
        )
    free = 1 - np.exp(-FitSettings.initial_density_per_m * LENGTH_M)
    if not free < options.mesh_threshold < 1:
        raise ConfigError(
            f"--mesh-threshold is {options.mesh_threshold:g}; give a probability between {free:.3f}, which voxels have "
            "that no ray asked about, and 1"
        )
    if options.mesh_keyframe is not None and not 0 <= options.mesh_keyframe < keyframes:
        raise ConfigError(f"--mesh-keyframe is {options.mesh_keyframe}; give one of 0 to {keyframes - 1}")
    if Path(options.mesh_file).name != options.mesh_file:
        raise ConfigError(
            f"--mesh-file is {options.mesh_file}; give a name without folders, it lies in the scene's own"
        )
    require_format(Path(options.mesh_file))


def _one_sample(points_m: Tensor) -> Tensor:
    return torch.zeros(len(points_m), dtype=torch.long)
