# SPDX-License-Identifier: Apache-2.0
"""Photometric supervision: what a field says must look alike in every image that sees it. No LiDAR, no labels.

Two terms of the field, for volumes and surfaces alike. *Matching*: the patch around a pixel, moved to where its ray ends, must be
found in the images of other moments and cameras (Monodepth2, arXiv 1806.01260, eq. 1 to 4). A volume pays for every
place where a ray may end, by its weight (SelfOcc, arXiv 2311.12754, section 3.3): a cost at many distances has no local
minimum to be caught in, as a gradient through one distance has. *Colour*: the field has one at every point, and what
is rendered of it must be the pixel's (NeRF, arXiv 2003.08934, eq. 6; DVR, arXiv 1912.07372, eq. 1). And one of the image
encoder, whose depth distributions must be likely where pixels match: a cheap start, as LiDAR in single images is for labels.

All hold for what stands still. Pixels whose rays cross a box that moves are left out (``motion.StillWorld``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from occflownet_core.errors import ConfigError
from occflownet_core.grid import VoxelGrid
from occflownet_core.motion import StaticWorld
from occflownet_core.renderer import Rays, RenderConfig, RenderedRays, render
from occflownet_core.views import EncoderPixels, PixelRays, Views
from occflownet_core.voxel_field import Field

PATCH_STEP_PX = 2
MATCHING_TEMPERATURE = 0.005
"""Dissimilarity by which a depth is e times less likely to be a pixel's."""
_PATCH = torch.tensor([[u, v] for v in (-1, 0, 1) for u in (-1, 0, 1)])
_INFINITY_M = 1e5
_STEPS_BEYOND = 8
_NEAREST_DEPTH_M = 0.2
_LEAST_WEIGHT = 1e-4
_POINTS_AT_A_TIME = 32_768
_STRUCTURE_SHARE = 0.85  # of the dissimilarity; the rest is the difference of brightness (Monodepth2)
_SSIM_MEAN, _SSIM_VARIANCE = 0.01**2, 0.03**2  # of brightness from 0 to 1 (Wang et al. 2004)


@dataclass(frozen=True)
class PhotometricConfig:
    """How images supervise; weights of 0 leave a term out.

    Attributes:
        matching_weight: of the dissimilarity between a pixel's patch and the views that see where its ray ends.
        depth_weight: of the cross-entropy of the image encoder's depths against where its pixels match.
        color_weight: of the difference between rendered and seen colour; the field needs a colour head.
        pixels_per_step: rays that are drawn per batch.
        sources: other views that a pixel is looked for in, those that see the most of what its view sees.
        beyond: what the best match behind the grid costs, as a multiple of its dissimilarity; see ``cost_beyond``.
        box_scale: moving boxes are this much larger than annotated, when what is in them is left out.
    """

    matching_weight: float = 0.0
    depth_weight: float = 0.0
    color_weight: float = 0.0
    pixels_per_step: int = 2048
    sources: int = 4
    beyond: float = 1.3
    box_scale: float = 1.3

    def __post_init__(self) -> None:
        for name in ("matching_weight", "depth_weight", "color_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(
                    f"photometric.{name} is {getattr(self, name)}; give a finite weight, 0 leaves the term out"
                )
        for name in ("pixels_per_step", "sources"):
            if getattr(self, name) < 1:
                raise ConfigError(f"photometric.{name} is {getattr(self, name)}; give at least 1")
        if not 1 <= self.beyond < float("inf"):
            raise ConfigError(f"photometric.beyond is {self.beyond}; give a factor of 1 or more")
        if not self.box_scale > 0:
            raise ConfigError(f"photometric.box_scale is {self.box_scale}; give a positive factor")

    @property
    def is_used(self) -> bool:
        """Whether images supervise at all."""
        return self.asks_field or self.depth_weight > 0

    @property
    def asks_field(self) -> bool:
        """Whether they supervise the field."""
        return max(self.matching_weight, self.color_weight) > 0


class PatchMatcher:
    """How alike the patches around pixels are to other views, were their rays to end at some distance.

    A patch of 3 x 3 pixels, two pixels apart, is taken to face its own camera.

    Args:
        views: images.
        pixels: [R].
    """

    def __init__(self, views: Views, pixels: PixelRays) -> None:
        self._views = views
        sources = views.sources[pixels.view]  # [R, S]
        self._exists, self._source = sources >= 0, sources.clamp(min=0)
        offset_px = PATCH_STEP_PX * _PATCH.to(pixels.pixel)  # [P, 2]
        spread = offset_px @ views.ego_from_pixel[pixels.view][:, :, :2].mT  # [R, P, 3], at a depth of 1 m
        along = pixels.rays.direction.double()[:, None] + pixels.rays.axis_cosine.double()[:, None, None] * spread
        projection = views.image_from_ego[self._source]  # [R, S, 3, 4]
        centre_m = views.centre_m[pixels.view][:, None, :, None]
        # A patch's pixel at range t is at base + t * slope in a source, (u, v, 1) times depth: linear in t.
        self._base = (projection[..., :3] @ centre_m + projection[..., 3:])[..., 0].float()  # [R, S, 3]
        self._slope = torch.einsum("rsij,rpj->rspi", projection[..., :3], along).float()  # [R, S, P, 3]
        at = (pixels.pixel[:, None] + offset_px).long()
        self._patch = views.brightness[pixels.view[:, None], at[..., 1], at[..., 0]]  # [R, P]

    def cost(self, ray: Tensor, range_m: Tensor) -> tuple[Tensor, Tensor]:
        """Dissimilarity [n], 0 alike to 1, at ranges [n] of rays [n], differentiable in them; and whether any source
        sees the place [n] bool (0 where not).

        The mean over the better half of the sources that see it: in the others it may be hidden.
        """
        parts = [
            self._cost(ray[i : i + _POINTS_AT_A_TIME], range_m[i : i + _POINTS_AT_A_TIME])
            for i in range(0, len(ray), _POINTS_AT_A_TIME)
        ] or [self._cost(ray, range_m)]
        cost, known = (torch.cat(column) for column in zip(*parts, strict=True))
        return cost, known

    def _cost(self, ray: Tensor, range_m: Tensor) -> tuple[Tensor, Tensor]:
        at = self._base[ray][:, :, None] + range_m[:, None, None, None] * self._slope[ray]  # [n, S, P, 3]
        depth_m = at[..., 2]
        pixel = at[..., :2] / depth_m.clamp(min=_NEAREST_DEPTH_M)[..., None]
        found, inside = bilinear(self._views.brightness, self._source[ray][..., None].expand(depth_m.shape), pixel)
        seen = (inside & (depth_m > _NEAREST_DEPTH_M)).all(dim=-1) & self._exists[ray]  # [n, S]
        each = dissimilarity(self._patch[ray][:, None].expand_as(found), found)
        best = torch.where(seen, each, torch.inf).sort(dim=1).values
        half = (seen.sum(dim=1) + 1) // 2  # [n]
        kept = torch.arange(best.shape[1], device=best.device) < half[:, None]
        return torch.where(kept, best, 0.0).sum(dim=1) / half.clamp(min=1), half > 0


def bilinear(images: Tensor, view: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Images [V, H, W] between the centres of their pixels, differentiable in where.

    Args:
        view: [...] int64, which image; ``grid_sample`` would want all points of an image together.
        pixel: [..., 2] continuous.

    Returns:
        values [...], 0 outside; whether all four neighbours are in the image [...].
    """
    height, width = images.shape[1:]
    at = pixel - 0.5
    corner = at.detach().floor()
    inside = ((corner >= 0) & (corner < corner.new_tensor([width - 1, height - 1]))).all(dim=-1)
    corner = torch.where(inside[..., None], corner, 0.0)
    u, v = torch.where(inside[..., None], at - corner, 0.0).unbind(dim=-1)
    first = (view * height + corner[..., 1].long()) * width + corner[..., 0].long()
    flat = images.reshape(-1)
    upper = flat[first] * (1 - u) + flat[first + 1] * u
    lower = flat[first + width] * (1 - u) + flat[first + width + 1] * u
    return torch.where(inside, upper * (1 - v) + lower * v, 0.0), inside


def dissimilarity(a: Tensor, b: Tensor) -> Tensor:
    """0 (alike) to 1 [...] of patches [..., P]: structure (SSIM, Wang et al. 2004) and brightness (Monodepth2, eq. 3)."""
    mean_a, mean_b = a.mean(dim=-1), b.mean(dim=-1)
    deviation_a, deviation_b = a - mean_a[..., None], b - mean_b[..., None]
    variance_a, variance_b = deviation_a.square().mean(dim=-1), deviation_b.square().mean(dim=-1)
    covariance = (deviation_a * deviation_b).mean(dim=-1)
    similarity = (2 * mean_a * mean_b + _SSIM_MEAN) * (2 * covariance + _SSIM_VARIANCE)
    similarity = similarity / (
        (mean_a.square() + mean_b.square() + _SSIM_MEAN) * (variance_a + variance_b + _SSIM_VARIANCE)
    )
    structure = (1 - similarity).clamp(0, 2) / 2
    return _STRUCTURE_SHARE * structure + (1 - _STRUCTURE_SHARE) * (a - b).abs().mean(dim=-1)


def draw_pixels(
    views: Views, count: int, motion: StaticWorld, grid: VoxelGrid, generator: torch.Generator | None = None
) -> PixelRays:
    """At most ``count`` random pixels, those that the motion keeps."""
    pixels = PixelRays.draw(views, count, PATCH_STEP_PX, generator)
    return pixels[motion.keeps(pixels.rays, grid)]


def draw_encoder_pixels(
    views: Views,
    encoder: EncoderPixels,
    shape: tuple[int, int, int, int],
    size_px: tuple[int, int],
    count: int,
    generator: torch.Generator | None = None,
) -> tuple[PixelRays, Tensor, Tensor]:
    """At most ``count`` random pixels of the encoder's images that lie in the views of the same moment.

    Args:
        views: all of the samples', among them those of the current keyframe.
        encoder: where pixels lie.
        shape: B, N, h, w of the encoder's feature maps.
        size_px: width and height of its images.
        count: of pixels that are drawn (on the CPU).

    Returns:
        The pixels [R]; the image that each is of [R], of B * N; and its cell in the feature map [R], of h * w.
    """
    samples, cameras, rows, columns = shape
    device, width_px, height_px = views.images.device, *size_px
    image = torch.randint(samples * cameras, (count,), generator=generator).to(device)
    at = torch.rand(count, 2, generator=generator, dtype=torch.float64).to(device)  # shares of width and height
    pixel = torch.cat([at * at.new_tensor([width_px, height_px]), torch.ones_like(at[:, :1])], dim=1)
    there = (encoder.view_from_image.flatten(0, 1)[image] @ pixel[..., None])[..., 0].floor() + 0.5
    margin = PATCH_STEP_PX + 0.5
    limits = there.new_tensor(views.images.shape[2:0:-1]) - margin
    inside = ((there >= margin) & (there <= limits)).all(dim=1)
    now = (views.time_index == 0).nonzero()[:, 0]
    view = torch.full((samples * cameras,), -1, device=device)
    view[views.batch_index[now] * cameras + views.camera_index[now]] = now
    cell = (at[:, 1] * rows).long() * columns + (at[:, 0] * columns).long()
    return PixelRays.through(views, view[image[inside]], there[inside]), image[inside], cell[inside]


def photometric_losses(
    field: Field,
    views: Views,
    pixels: PixelRays,
    grid: VoxelGrid,
    config: PhotometricConfig,
    rendering: RenderConfig | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Weighted terms by name.

    Args:
        field: density, and colour in the place of class logits: [N, 3] at points, [B, 3, Z, Y, X] on a lattice
            (``OccupancyField.colored``).
        views: images.
        pixels: of them that are to be explained, none of what moves.
        grid: as for ``renderer.render``.
        config: terms and weights.
        rendering: how rays are rendered.
        generator: of samples (on the CPU).
    """
    rendering = rendering or RenderConfig()
    rendered = render(field, pixels.rays, grid, StaticWorld(), rendering, generator)
    terms: dict[str, Tensor] = {}
    if config.matching_weight:
        matcher = PatchMatcher(views, pixels)
        if rendering.method == "surface":
            error = surface_matching_loss(rendered, matcher)
        else:
            open_end = ~leaving_below(pixels.rays, rendered.far_m, grid)
            error = volume_matching_loss(rendered, matcher, open_end, config.beyond)
        terms["matching"] = config.matching_weight * error
    if config.color_weight:
        terms["color"] = config.color_weight * color_loss(rendered, pixels.color(views))
    return terms


def volume_matching_loss(rendered: RenderedRays, matcher: PatchMatcher, open_end: Tensor, beyond: float) -> Tensor:
    """Mean dissimilarity over where rays may end, by the chance that they do.

    What leaves the grid ends infinitely far away; or, where the end is open, behind the grid, wherever that fits best.
    A place that no other view sees costs what places on its ray cost on average: ending there is no better than a guess.

    Args:
        rendered: [R].
        matcher: of the same rays.
        open_end: [R] bool.
        beyond: as in ``PhotometricConfig``.
    """
    samples = rendered.samples
    kept = (samples.weight.detach() > _LEAST_WEIGHT).nonzero()[:, 0]
    middle_m = samples.start_m[kept] + 0.5 * samples.length_m[kept]
    with torch.no_grad():
        within, within_known = matcher.cost(samples.ray[kept], middle_m.float())
        behind, behind_known = cost_beyond(matcher, rendered.far_m, open_end, beyond)
        rays = torch.arange(len(rendered.opacity), device=kept.device)
        ray, cost, known = (
            torch.cat(pair) for pair in ((samples.ray[kept], rays), (within, behind), (within_known, behind_known))
        )
        number = torch.zeros_like(rendered.opacity).index_add(0, ray, known.to(rendered.opacity))
        guess = torch.zeros_like(rendered.opacity).index_add(0, ray, cost) / number.clamp(min=1)
        cost = torch.where(known, cost, guess[ray])
    chance = torch.cat([samples.weight[kept], 1 - rendered.opacity.to(samples.weight)])
    return (chance * cost).sum() / max(len(rays), 1)


def leaving_below(rays: Rays, far_m: Tensor, grid: VoxelGrid) -> Tensor:
    """True [R] for rays that leave the grid, at ``far_m`` [R], through its bottom: the ground is in the grid, and nothing
    is to be seen behind it."""
    end_z_m = rays.origin_m[:, 2] + far_m * rays.direction[:, 2]
    return (rays.direction[:, 2] < 0) & (end_z_m < grid.lower_m[2] + 0.5 * grid.voxel_size_m)


def cost_beyond(matcher: PatchMatcher, far_m: Tensor, open_end: Tensor, beyond: float) -> tuple[Tensor, Tensor]:
    """The dissimilarity [R] at infinity or, where the end is open [R], at the best of the distances from ``far_m`` [R] to
    there, equal steps of their inverse; and whether any of them is seen [R].

    Were houses that stand out of the grid looked for at infinity alone, a ceiling would grow where the grid ends. But the
    least of many costs is low by chance as well: being raised, by ``beyond``, it keeps rays from passing through what matches
    poorly everywhere. (By 1.3 rather than 1, on a MiniCity log, 7 % of LiDAR returns are missed rather than 19 %.)
    """
    ray = open_end.nonzero()[:, 0]
    share = torch.arange(_STEPS_BEYOND, device=far_m.device) / _STEPS_BEYOND
    range_m = torch.cat([(far_m[ray, None] / (1 - share)).reshape(-1), torch.full_like(far_m, _INFINITY_M)])
    ray = torch.cat([ray.repeat_interleave(_STEPS_BEYOND), torch.arange(len(far_m), device=far_m.device)])
    cost, known = matcher.cost(ray, range_m.float())
    none = cost.new_full((len(far_m),), torch.inf)
    least = none.scatter_reduce(0, ray, torch.where(known, cost, torch.inf), "amin")
    return beyond * least.nan_to_num(posinf=0.0), least.isfinite()


def depth_matching_loss(logits: Tensor, bin_depth_m: Tensor, matcher: PatchMatcher, pixels: PixelRays) -> Tensor:
    """Mean cross-entropy of pixels' depth distributions against where they match: a bin is the likelier the less dissimilar
    other views are there, exp(-cost / ``MATCHING_TEMPERATURE``). Pixels that match everywhere alike tell nothing: each counts
    by how much surer its matches are than a guess, 1 - entropy / ln D.

    Bins whose place no other view sees cost what the pixel's bins cost on average. (Paying for bins by their probability, as
    volumes pay for places, moves a distribution only where it already is.)

    Args:
        logits: [R, D] over depth bins.
        bin_depth_m: [R, D], depth along the camera's axis of the bins' centres.
        matcher: of the pixels.
        pixels: [R].
    """
    range_m = bin_depth_m / pixels.rays.axis_cosine[:, None]
    ray = torch.arange(len(range_m), device=range_m.device)[:, None].expand_as(range_m)
    with torch.no_grad():
        cost, known = (part.view_as(range_m) for part in matcher.cost(ray.reshape(-1), range_m.reshape(-1)))
        guess = cost.sum(dim=1, keepdim=True) / known.sum(dim=1, keepdim=True).clamp(min=1)
        cost = torch.where(known, cost, guess)
        target = (-cost / MATCHING_TEMPERATURE).softmax(dim=1)
        sureness = 1 + torch.xlogy(target, target).sum(dim=1) / math.log(target.shape[1])
    error = -(target * logits.log_softmax(dim=1)).sum(dim=1)
    return (sureness * error).sum() / sureness.sum().clamp(min=_LEAST_WEIGHT)


def surface_matching_loss(rendered: RenderedRays, matcher: PatchMatcher) -> Tensor:
    """Mean dissimilarity where rays end, of those that meet a surface; its gradient moves the surface."""
    hit = rendered.samples.ray
    cost, known = matcher.cost(hit, rendered.range_m[hit].float())
    return (cost * known).sum() / known.sum().clamp(min=1)


def color_loss(rendered: RenderedRays, color: Tensor) -> Tensor:
    """Mean absolute difference between the colour of what rays end at and their pixels' [R, 3], by opacity.

    The opacity that weighs has no gradient: being transparent must not pay.
    """
    opacity = rendered.opacity
    seen = rendered.logits / opacity.clamp(min=_LEAST_WEIGHT)[:, None]
    return ((seen - color).abs().mean(dim=1) * opacity.detach()).sum() / max(len(color), 1)
