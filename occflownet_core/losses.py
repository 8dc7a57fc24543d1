# SPDX-License-Identifier: Apache-2.0
"""Losses: rendered rays against their labels, depth distributions against LiDAR, voxels against 3D labels, priors.

Each function is one term, unweighted, a mean that is zero (with a graph) where there is nothing to compare.
``ray_losses`` and ``voxel_losses`` apply a config's switches and weights; ``point_losses`` has those on points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from occflownet_core.errors import ConfigError, GeometryError, OccflownetError
from occflownet_core.labels import BOXED_CLASSES, FREE, OCCUPIED_CLASSES
from occflownet_core.lift_tables import DepthBins
from occflownet_core.renderer import Rays, RenderConfig, RenderedRays, RenderSamples, range_target

OCC3D_VOXEL_COUNTS: tuple[int, ...] = (
    1163161, 2309034, 188743, 2997643, 20317180, 852476, 243808, 2457947, 497017, 2731022, 7224789, 214411435,
    5565043, 63191967, 76098082, 128860031, 141625221,
)  # fmt: skip
"""Voxels per occupied class in the Occ3D-nuScenes training split."""

_PROBABILITY_FLOOR = 1e-6
_CHANCE_FLOOR = 1e-4
_STILL_MPS = 0.1
_WEIGHTS_ALONG_RAYS = ("return_weight", "opacity_weight", "free_space_weight", "distortion_weight")


class NonFiniteLossError(OccflownetError):
    """A loss term is NaN or infinite.

    Attributes:
        terms: the terms' names.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self.terms = tuple(values)
        listed = ", ".join(f"{name} = {value}" for name, value in values.items())
        super().__init__(
            f"loss is not finite: {listed}; lower the learning rate, or look at this batch's images, rays and poses"
        )


@dataclass(frozen=True)
class LossConfig:
    """Which terms there are, what they weigh, and how each compares; a weight of 0 leaves a term out.

    Attributes:
        range_weight: of the rendered range (published: 0.05 on the square in metres).
        range_error: ``squared`` as published; ``absolute``; ``huber``, square up to ``huber_m``; ``log``, the absolute
            difference of logarithms, which minds a metre less the further it is away.
        huber_m: where ``huber`` turns from square to straight.
        return_weight: of the chance that a ray ends where its return is, as a negative logarithm. A range alone is an
            average: a ray that is half stopped before its return and half behind it has the right one. This term wants
            the opacity in the return's own voxel (not published; it more than doubles what fields learn from rays).
        return_margin_m: how far from the return is still there.
        semantic_weight: of the cross-entropy of rendered logits (published: 1).
        class_weighted: weigh each ray, and each occupied voxel, by its class: log(N / n_c) scaled to mean 1.
        opacity_weight: of the cross-entropy between opacity and "returned": 1 for returns, 0 for rays without.
        free_space_weight: of the weight that a ray spends before its return.
        free_space_margin_m: how far before the return that ends.
        distortion_weight: of the spread of weights along rays, in units of ``distortion_scale_m``.
        distortion_scale_m: the length that counts as 1 there.
        occupancy_weight, voxel_semantic_weight: of the two 3D terms, where 3D labels are used at all.
        voxel_camera_mask: 3D terms only where ``mask_camera`` says that some camera sees the voxel.
        depth_weight: of the depth distribution against LiDAR.
        flow_smoothness_weight, static_flow_weight: of the two priors on predicted velocity, where it is learned.
        box_velocity_weight: of predicted velocity inside annotated boxes that move.
        image_semantic_weight: of the classes that a linear map reads off each pixel's lifted context, against the
            class of the LiDAR return in it (not published). A backbone without pretraining learns classes from this
            long before it can from rays.
        free_point_weight: of one random point per ray, at least ``free_space_margin_m`` before its return, and of
            surfaces rendered that early: nothing is there (DVR's freespace loss, Occupancy Networks' cross-entropy).
        occupied_point_weight: of one random point per return, at most ``occupied_depth_m`` behind it: something is there,
            whether or not a surface is found (DVR's occupancy loss). A surface that is missed learns from this alone.
        occupied_depth_m: how deep; a voxel, or the thinnest thing that matters.
        point_semantic_weight: of the class at the return itself, rather than where the surface is.
    """

    range_weight: float = 0.05
    range_error: Literal["squared", "absolute", "huber", "log"] = "squared"
    huber_m: float = 1.0
    return_weight: float = 0.0
    return_margin_m: float = 0.2
    semantic_weight: float = 1.0
    class_weighted: bool = True
    opacity_weight: float = 0.0
    free_space_weight: float = 0.0
    free_space_margin_m: float = 0.8
    distortion_weight: float = 0.0
    distortion_scale_m: float = 40.0
    occupancy_weight: float = 1.0
    voxel_semantic_weight: float = 1.0
    voxel_camera_mask: bool = True
    depth_weight: float = 0.05
    image_semantic_weight: float = 0.0
    flow_smoothness_weight: float = 0.0
    static_flow_weight: float = 0.0
    box_velocity_weight: float = 0.0
    free_point_weight: float = 0.0
    occupied_point_weight: float = 0.0
    occupied_depth_m: float = 0.4
    point_semantic_weight: float = 0.0

    @property
    def reads_points(self) -> bool:
        """Whether any term asks the field about points, whatever the renderer."""
        return max(self.free_point_weight, self.occupied_point_weight, self.point_semantic_weight) > 0

    def check_method(self, method: str) -> None:
        """Check that rays rendered so have what the terms compare.

        Raises:
            ConfigError: a term wants the weights of a volume, and surfaces have none.
        """
        wanting = [name for name in _WEIGHTS_ALONG_RAYS if getattr(self, name)]
        if method == "surface" and wanting:
            raise ConfigError(
                f"loss.{wanting[0]} is {getattr(self, wanting[0])}, and surfaces have no weights along their rays; set it "
                "to 0 (free_point_weight and occupied_point_weight take its place), or render by traversal or samples"
            )

    def __post_init__(self) -> None:
        if self.range_error not in ("squared", "absolute", "huber", "log"):
            raise ConfigError(f"loss.range_error is '{self.range_error}'; choose squared, absolute, huber or log")
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name.endswith("_weight") and not 0 <= value < float("inf"):
                raise ConfigError(f"loss.{name} is {value}; give a finite weight, 0 leaves the term out")
        for name in ("huber_m", "distortion_scale_m", "occupied_depth_m"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"loss.{name} is {getattr(self, name)}; give positive metres")


def class_weights(counts: tuple[int, ...] = OCC3D_VOXEL_COUNTS) -> Tensor:
    """Weight per class [K]: log(N / n_c), scaled to mean 1 (OccFlowNet, arXiv 2402.12792)."""
    n = torch.tensor(counts, dtype=torch.float64)
    weight = torch.log(n.sum() / n)
    return (weight / weight.mean()).float()


def ray_losses(
    rendered: RenderedRays, rays: Rays, config: LossConfig, render: RenderConfig | None = None
) -> dict[str, Tensor]:
    """Weighted terms of 2D supervision, by name; their sum is what training minimises.

    Args:
        rendered: what ``renderer.render`` made of ``rays``.
        rays: with their labels; those without return only count in the terms on opacity and free space.
        config: terms and weights.
        render: how they were rendered. Of surfaces only rays that met one count in range and semantics.

    Raises:
        ConfigError: see ``LossConfig.check_method``.
    """
    render = render or RenderConfig()
    config.check_method(render.method)
    returned = rays.returned
    if render.method == "surface":
        returned = returned & torch.zeros_like(returned).index_fill(0, rendered.samples.ray, True)
    returned = returned.nonzero()[:, 0]
    label = rays.label[returned]
    weight = class_weights().to(rendered.logits)[label] if config.class_weighted else None
    terms: dict[str, Tensor] = {}
    if config.range_weight:
        target_m = range_target(rays, render)[returned]
        error = range_loss(rendered.range_m[returned], target_m, weight, config.range_error, config.huber_m)
        terms["range"] = config.range_weight * error
    if config.return_weight:
        error = return_loss(rendered.samples, rays.range_m, weight, config.return_margin_m)
        terms["return"] = config.return_weight * error
    if config.semantic_weight:
        terms["semantic"] = config.semantic_weight * semantic_loss(rendered.logits[returned], label, weight)
    if config.opacity_weight:
        terms["opacity"] = config.opacity_weight * opacity_loss(rendered.opacity, rays.returned)
    if config.free_space_weight:
        free = free_space_loss(rendered.samples, rays.range_m, config.free_space_margin_m)
        terms["free_space"] = config.free_space_weight * free
    if config.distortion_weight:
        spread = distortion_loss(rendered.samples, len(rays), config.distortion_scale_m)
        terms["distortion"] = config.distortion_weight * spread
    return terms


def voxel_losses(
    density: Tensor, logits: Tensor, labels: Tensor, voxel_size_m: float, mask: Tensor | None, config: LossConfig
) -> dict[str, Tensor]:
    """Weighted terms of 3D supervision, by name.

    Args:
        density: [B, Z, Y, X] 1/m; logits: [B, 17, Z, Y, X].
        labels: [B, X, Y, Z] integer, Occ3D's order.
        voxel_size_m: edge of a cell.
        mask: [B, X, Y, Z], true where a camera sees the voxel; read where ``config.voxel_camera_mask``.

    Raises:
        GeometryError: labels or mask do not fit the lattice, or the mask that the config asks for is missing.
    """
    labels = _volume_order(labels, density, "labels").long()
    if config.voxel_camera_mask and mask is None:
        raise GeometryError("3D losses need mask_camera, which was not given; give it, or set voxel_camera_mask: false")
    counted = _volume_order(mask, density, "mask").bool() if config.voxel_camera_mask else labels >= 0
    terms: dict[str, Tensor] = {}
    if config.occupancy_weight:
        terms["occupancy"] = config.occupancy_weight * occupancy_loss(
            density[counted], labels[counted] != FREE, voxel_size_m
        )
    if config.voxel_semantic_weight:
        occupied = counted & (labels != FREE)
        label = labels[occupied]
        weight = class_weights().to(logits)[label] if config.class_weighted else None
        error = semantic_loss(logits.movedim(1, -1)[occupied], label, weight)
        terms["voxel_semantic"] = config.voxel_semantic_weight * error
    return terms


def _volume_order(labels: Tensor, density: Tensor, name: str) -> Tensor:
    """[B, Z, Y, X] of [B, X, Y, Z]."""
    turned = labels.permute(0, 3, 2, 1) if labels.dim() == 4 else labels
    if turned.shape != density.shape:
        raise GeometryError(
            f"3D {name} have shape {tuple(labels.shape)}; for a density of {tuple(density.shape)} [B, Z, Y, X] "
            "give [B, X, Y, Z]"
        )
    return turned


def _mean(values: Tensor, weight: Tensor | None = None) -> Tensor:
    return (values if weight is None else values * weight).sum() / max(values.numel(), 1)


def range_loss(
    range_m: Tensor, target_m: Tensor, weight: Tensor | None = None, error: str = "squared", huber_m: float = 1.0
) -> Tensor:
    """Mean range error of rays [R]; see ``LossConfig.range_error``."""
    if error == "log":
        difference = range_m.clamp(min=0.1).log() - target_m.clamp(min=0.1).log()
        return _mean(difference.abs(), weight)
    difference = range_m - target_m
    if error == "squared":
        return _mean(difference.square(), weight)
    if error == "absolute":
        return _mean(difference.abs(), weight)
    return _mean(F.huber_loss(range_m, target_m, reduction="none", delta=huber_m), weight)


def semantic_loss(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of logits [N, K] against classes [N] below K.

    Raises:
        GeometryError: a label is not one of the K classes (rays without return, or free voxels, were not left out).
    """
    if label.numel() and int(label.max()) >= logits.shape[-1]:
        raise GeometryError(
            f"label {int(label.max())} has no logit among {logits.shape[-1]}; only occupied classes have semantics"
        )
    return _mean(F.cross_entropy(logits, label, reduction="none"), weight)


def return_loss(samples: RenderSamples, range_m: Tensor, weight: Tensor | None, margin_m: float) -> Tensor:
    """Mean negative logarithm of the chance that rays [R] end within a margin of their return.

    The likelihood of the return under the rendering weights, as DS-NeRF's depth supervision (arXiv 2107.02791) has it,
    of the whole intervals that reach into the margin.

    Args:
        samples: of all rays.
        range_m: [R]; rays without a return do not count.
        weight: optional, per ray *with* a return.
    """
    at_m = range_m[samples.ray]
    there = (samples.start_m <= at_m + margin_m) & (samples.start_m + samples.length_m >= at_m - margin_m)
    chance = torch.zeros_like(range_m).index_add(0, samples.ray, (samples.weight * there).to(range_m.dtype))
    return _mean(-chance[torch.isfinite(range_m)].clamp(min=_CHANCE_FLOOR).log(), weight)


def opacity_loss(opacity: Tensor, returned: Tensor) -> Tensor:
    """Mean binary cross-entropy of opacity [R] against whether something is there [R]."""
    bounded = opacity.clamp(_PROBABILITY_FLOOR, 1 - _PROBABILITY_FLOOR)
    return _mean(-torch.where(returned, bounded.log(), torch.log1p(-bounded)))


def free_space_loss(samples: RenderSamples, range_m: Tensor, margin_m: float) -> Tensor:
    """Mean weight that rays [R] spend more than a margin before their return; all of it for rays without one."""
    middle_m = samples.start_m + 0.5 * samples.length_m
    before = middle_m < range_m[samples.ray] - margin_m
    return (samples.weight * before).sum() / max(len(range_m), 1)


def distortion_loss(samples: RenderSamples, rays: int, scale_m: float = 1.0) -> Tensor:
    """Spread of the weights along rays (mip-NeRF 360, arXiv 2111.12077, eq. 15), in O(M).

    sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 d_i, with midpoints m and lengths d in units of ``scale_m``: midpoints
    ascend, so the double sum is 2 sum_i w_i (m_i sum_{j<i} w_j - sum_{j<i} w_j m_j).

    Returns:
        mean over rays.
    """
    if len(samples.ray) == 0:
        return samples.weight.sum()
    weight, length = samples.weight.double(), samples.length_m.double() / scale_m
    middle = samples.start_m.double() / scale_m + 0.5 * length
    pairs = 2 * weight * (middle * _sum_before(weight, samples.ray) - _sum_before(weight * middle, samples.ray))
    own = weight.square() * length / 3
    return ((pairs + own).sum() / max(rays, 1)).to(samples.weight.dtype)


def _sum_before(values: Tensor, ray: Tensor) -> Tensor:
    """Sum [M] of the earlier values [M] of the same ray; ``ray`` ascends."""
    before = values.cumsum(0) - values
    first = torch.searchsorted(ray, ray)
    return before - before[first]


def depth_distribution_loss(logits: Tensor, depth_m: Tensor, bins: DepthBins) -> Tensor:
    """Mean cross-entropy of a distribution over depth bins against LiDAR depth (BEVDepth, arXiv 2206.10092).

    Args:
        logits: [N, D, H, W].
        depth_m: [N, H, W] along the optical axis, as the bins count it (``LiftSpec.network_depth_m``); pixels that are
            not finite, or in no bin, do not count.
        bins: D of them.
    """
    depth_bin = ((depth_m - bins.min_m) / bins.step_m).floor()
    known = (depth_bin >= 0) & (depth_bin < logits.shape[1])  # NaN compares false
    return semantic_loss(logits.movedim(1, -1)[known], depth_bin[known].long())


def occupancy_loss(density: Tensor, occupied: Tensor, voxel_size_m: float) -> Tensor:
    """Mean binary cross-entropy of voxels' opacity 1 - exp(-s l) against occupied; density and occupied [N]."""
    optical_depth = density * voxel_size_m
    opaque = torch.log(-torch.expm1(-optical_depth.clamp(min=_PROBABILITY_FLOOR)))
    return _mean(torch.where(occupied, -opaque, optical_depth))


def flow_smoothness_loss(velocity_mps: Tensor) -> Tensor:
    """Mean absolute difference of velocity [B, 3, Z, Y, X] between neighbouring voxels."""
    return torch.stack(
        [velocity_mps.diff(dim=axis).abs().mean() for axis in (2, 3, 4) if velocity_mps.shape[axis] > 1]
    ).mean()


def static_flow_loss(velocity_mps: Tensor, logits: Tensor, movable: tuple[int, ...] = BOXED_CLASSES) -> Tensor:
    """Mean speed where content cannot move: velocity [B, 3, Z, Y, X] times the chance that it is of no movable class.

    Args:
        logits: [B, 17, Z, Y, X], not differentiated: a class must not be learned from standing still.
    """
    static = [label for label in range(OCCUPIED_CLASSES) if label not in movable]
    chance = logits.detach().softmax(dim=1)[:, static].sum(dim=1)
    # A root's slope is infinite at rest, where most voxels are.
    speed = (velocity_mps.square().sum(dim=1) + _PROBABILITY_FLOOR).sqrt() - _PROBABILITY_FLOOR**0.5
    return _mean(speed * chance)


def velocity_loss(velocity_mps: Tensor, wanted_mps: Tensor) -> Tensor:
    """Mean length of the difference of velocities [n, 3], rounded off below 0.1 m/s; zero, with a graph, of none."""
    difference = (velocity_mps - wanted_mps.to(velocity_mps)).square().sum(dim=-1)
    return _mean((difference + _STILL_MPS**2).sqrt() - _STILL_MPS)


def require_finite(losses: Mapping[str, Tensor]) -> None:
    """Check that every term is a number.

    Raises:
        NonFiniteLossError: naming those that are not.
    """
    names = list(losses)
    if names and not torch.isfinite(torch.stack([losses[name].detach() for name in names])).all():
        raise NonFiniteLossError({n: losses[n].item() for n in names if not torch.isfinite(losses[n])})
