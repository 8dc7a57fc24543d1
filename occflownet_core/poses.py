# SPDX-License-Identifier: Apache-2.0
"""Rigid transforms as 4 x 4 float64 matrices whose names read ``target_from_source``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from occflownet_core.errors import GeometryError

_ORTHONORMAL_TOLERANCE = 1e-4
_NEARLY_PARALLEL = 0.9995


@dataclass(frozen=True)
class RecordedPose:
    """A pose in the very numbers of the table or message that holds it.

    A quaternion made back from a matrix differs in its last bits; passed on as recorded, it gives every reader the
    same matrix, bit for bit.

    Attributes:
        translation_m: three numbers, metres.
        quaternion_wxyz: four numbers, scalar first, of any length but zero.
        matrix: [4, 4] float64, made from them by ``pose``.

    Raises:
        GeometryError: see ``pose``.
    """

    translation_m: Sequence[float]
    quaternion_wxyz: Sequence[float]
    matrix: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "translation_m", tuple(map(float, self.translation_m)))
        object.__setattr__(self, "quaternion_wxyz", tuple(map(float, self.quaternion_wxyz)))
        object.__setattr__(self, "matrix", pose(np.array(self.translation_m), np.array(self.quaternion_wxyz)))


def pose(translation_m: np.ndarray, quaternion_wxyz: np.ndarray) -> np.ndarray:
    """``target_from_source`` [4, 4] of a source frame's position and orientation in the target frame.

    Args:
        translation_m: [3], metres.
        quaternion_wxyz: [4], scalar first as nuScenes writes it; any non-zero length (it is normalised).

    Raises:
        GeometryError: a value is not finite, or the quaternion is zero.
    """
    matrix = np.eye(4)
    matrix[:3, :3] = rotation_from_quaternion(quaternion_wxyz)
    matrix[:3, 3] = translation_m
    if not np.isfinite(matrix).all():
        raise GeometryError(
            f"translation {np.asarray(translation_m).tolist()} is not finite; give three numbers in metres"
        )
    return matrix


def rotation_from_quaternion(quaternion_wxyz: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of a quaternion [4], scalar first.

    Raises:
        GeometryError: the quaternion is zero or not finite.
    """
    q = np.asarray(quaternion_wxyz, dtype=np.float64)
    norm = np.linalg.norm(q)
    if q.shape != (4,) or not np.isfinite(norm) or norm < 1e-9:
        raise GeometryError(
            f"quaternion {q.tolist()} gives no rotation; give four finite numbers, scalar first, not all zero"
        )
    w, x, y, z = q / norm
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion_from_rotation(rotation: np.ndarray) -> np.ndarray:
    """Unit quaternion [4], scalar first and not negative, of a rotation matrix [3, 3] (Shepperd 1978)."""
    r = np.asarray(rotation, dtype=np.float64)[:3, :3]
    trace = np.trace(r)
    # Squared components times four; dividing by the largest keeps the division well conditioned.
    squares = np.array([1 + trace, *(1 - trace + 2 * np.diag(r))])
    i = int(np.argmax(squares))
    rows = (
        [squares[0], r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]],
        [r[2, 1] - r[1, 2], squares[1], r[1, 0] + r[0, 1], r[0, 2] + r[2, 0]],
        [r[0, 2] - r[2, 0], r[1, 0] + r[0, 1], squares[2], r[2, 1] + r[1, 2]],
        [r[1, 0] - r[0, 1], r[0, 2] + r[2, 0], r[2, 1] + r[1, 2], squares[3]],
    )
    q = np.array(rows[i]) / (2 * np.sqrt(squares[i]))
    q /= np.linalg.norm(q)
    return -q if q[0] < 0 else q


def inverse(target_from_source: np.ndarray) -> np.ndarray:
    """``source_from_target`` [..., 4, 4], by transposing the rotation (exact for rigid transforms)."""
    target_from_source = np.asarray(target_from_source, dtype=np.float64)
    rotation = np.swapaxes(target_from_source[..., :3, :3], -1, -2)
    result = np.zeros_like(target_from_source)
    result[..., :3, :3] = rotation
    result[..., :3, 3] = -(rotation @ target_from_source[..., :3, 3, None])[..., 0]
    result[..., 3, 3] = 1
    return result


def transform_points(target_from_source: np.ndarray, points_m: np.ndarray) -> np.ndarray:
    """Points [..., 3] of the source frame, expressed in the target frame."""
    return np.asarray(points_m) @ target_from_source[:3, :3].T + target_from_source[:3, 3]


def rotate_vectors(target_from_source: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Directions [..., 3] of the source frame, expressed in the target frame (no translation)."""
    return np.asarray(vectors) @ target_from_source[:3, :3].T


def interpolate(first: np.ndarray, second: np.ndarray, fraction: float) -> np.ndarray:
    """The pose [4, 4] a ``fraction`` of the way from ``first`` to ``second``: linear position, spherical rotation.

    A fraction outside 0..1 extrapolates at the same constant velocity (slerp: Shoemake, SIGGRAPH 1985).
    """
    q0, q1 = quaternion_from_rotation(first), quaternion_from_rotation(second)
    cosine = float(q0 @ q1)
    if cosine < 0:
        q1, cosine = -q1, -cosine
    if cosine > _NEARLY_PARALLEL:
        q = q0 + fraction * (q1 - q0)
    else:
        angle = np.arccos(cosine)
        q = (np.sin((1 - fraction) * angle) * q0 + np.sin(fraction * angle) * q1) / np.sin(angle)
    return pose((1 - fraction) * first[:3, 3] + fraction * second[:3, 3], q)


def yaw(target_from_source: np.ndarray) -> float:
    """Heading of the source's x axis in the target's x-y plane, radians in (-pi, pi]."""
    return float(np.arctan2(target_from_source[1, 0], target_from_source[0, 0]))


def require_rigid(target_from_source: np.ndarray, name: str) -> np.ndarray:
    """The transform as float64 [4, 4], if it is one.

    Raises:
        GeometryError: wrong shape, not finite, not orthonormal, or a reflection; ``name`` says which transform.
    """
    matrix = np.asarray(target_from_source, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise GeometryError(f"{name} has shape {matrix.shape}; give a 4 x 4 rigid transform")
    rotation = matrix[:3, :3]
    error = np.abs(rotation @ rotation.T - np.eye(3)).max() if np.isfinite(matrix).all() else np.inf
    if not error < _ORTHONORMAL_TOLERANCE or np.linalg.det(rotation) < 0 or not np.allclose(matrix[3], (0, 0, 0, 1)):
        raise GeometryError(
            f"{name} is not a rigid transform (its rotation part is off by {error:.2g}); check the extrinsics"
        )
    return matrix
