# SPDX-License-Identifier: Apache-2.0
"""Views, pixels' rays, patches moved into other views, and the photometric losses of volumes and surfaces."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from occflownet_core import photometric, poses
from occflownet_core.boxes import MovingBoxes
from occflownet_core.camera import Camera
from occflownet_core.errors import ConfigError, GeometryError
from occflownet_core.grid import VoxelGrid
from occflownet_core.motion import StillWorld
from occflownet_core.photometric import (
    PatchMatcher,
    PhotometricConfig,
    bilinear,
    color_loss,
    depth_matching_loss,
    dissimilarity,
    draw_encoder_pixels,
    leaving_below,
    photometric_losses,
    surface_matching_loss,
    volume_matching_loss,
)
from occflownet_core.renderer import Rays, RenderConfig, RenderedRays, RenderSamples, render
from occflownet_core.views import EncoderPixels, PixelRays, Views
from occflownet_core.voxel_field import VoxelField

WIDTH_PX, HEIGHT_PX, FOCAL_PX = 96, 64, 60.0
WALL_M = 8.0
FORWARD = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # camera's x right, y down, z forward
GRID = VoxelGrid((0.0, -8.0, -4.0), (16.0, 8.0, 4.0), 0.5)


def camera(y_m: float, turned: np.ndarray = FORWARD) -> Camera:
    intrinsic = np.array([[FOCAL_PX, 0, WIDTH_PX / 2], [0, FOCAL_PX, HEIGHT_PX / 2], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turned, (0.0, y_m, 0.0)
    return Camera(f"at {y_m:g}", WIDTH_PX, HEIGHT_PX, intrinsic, pose)


def texture(y_m: np.ndarray, z_m: np.ndarray) -> np.ndarray:
    """Brightness of a wall, smooth and nowhere the same: no period within 15 m."""
    return 0.5 + 0.2 * np.sin(1.3 * y_m + 0.7 * z_m) + 0.15 * np.sin(3.1 * z_m - 2.2 * y_m) + 0.1 * np.sin(4.7 * y_m)


def wall_views(*y_m: float) -> Views:
    """Cameras side by side, looking along x at a wall 8 m away, each with the others as sources."""
    cameras = [camera(y) for y in y_m]
    u, v = np.meshgrid(np.arange(WIDTH_PX) + 0.5, np.arange(HEIGHT_PX) + 0.5)
    images = []
    for one in cameras:
        point_m = one.unproject(np.stack([u, v], axis=-1), np.full(u.shape, WALL_M))
        images.append(
            (255 * texture(point_m[..., 1], point_m[..., 2])).round().astype(np.uint8)[..., None].repeat(3, 2)
        )
    others = [[j for j in range(len(y_m)) if j != i] for i in range(len(y_m))]
    return Views(
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack([c.intrinsic @ poses.inverse(c.ego_from_camera)[:3] for c in cameras])),
        torch.arange(len(y_m)),
        torch.arange(len(y_m)),
        torch.zeros(len(y_m), dtype=torch.int64),
        torch.tensor(others).view(len(y_m), -1),
    )


def middle_pixels(views: Views, count: int = 40) -> PixelRays:
    """Random pixels of the first view, away from the border."""
    pixels = PixelRays.draw(views, 40 * count, 20, torch.Generator().manual_seed(1))
    return pixels[(pixels.view == 0).nonzero()[:count, 0]]


def test_rays_go_through_the_pixels_that_they_are_of():
    views = wall_views(1.0, -1.0)
    pixels = PixelRays.draw(views, 50, 2, torch.Generator().manual_seed(0))
    points_m = pixels.rays.origin_m + 7.0 * pixels.rays.direction
    for i, view in enumerate(pixels.view.tolist()):
        seen_px, depth_m = camera((1.0, -1.0)[view]).project(points_m[i].double().numpy())
        np.testing.assert_allclose(seen_px, pixels.pixel[i], atol=1e-4)
        assert depth_m == pytest.approx(7.0 * pixels.rays.axis_cosine[i].item(), rel=1e-5)
    assert torch.equal(pixels.rays.time_index, pixels.view)
    assert (pixels.pixel >= 2.5).all() and (pixels.pixel <= torch.tensor([WIDTH_PX - 2.5, HEIGHT_PX - 2.5])).all()


def test_a_pixels_color_is_that_of_the_image():
    views = wall_views(0.0, 1.0)
    views.images[1, 5, 9] = torch.tensor([255, 51, 0], dtype=torch.uint8)
    pixels = PixelRays.through(views, torch.tensor([1]), torch.tensor([[9.5, 5.5]]).double())
    torch.testing.assert_close(pixels.color(views), torch.tensor([[1.0, 0.2, 0.0]]))


def test_views_of_two_samples_keep_their_own_sources():
    one = wall_views(0.0, 1.0)
    both = Views.cat([one, one])
    assert both.sources.tolist() == [[1], [0], [3], [2]]


def test_views_whose_parts_differ_in_number_are_refused():
    views = wall_views(0.0, 1.0)
    with pytest.raises(GeometryError, match="2 images and 1 of time_index"):
        Views(
            views.images,
            views.image_from_ego,
            views.time_index[:1],
            views.camera_index,
            views.batch_index,
            views.sources,
        )


def test_bilinear_values_are_opencvs():
    image = np.random.default_rng(0).random((12, 17)).astype(np.float32)
    pixel = np.random.default_rng(1).uniform(0.5, (16.4, 11.4), (100, 2)).astype(np.float32)
    theirs = cv2.remap(image, pixel[:, :1] - 0.5, pixel[:, 1:] - 0.5, cv2.INTER_LINEAR)[:, 0]
    ours, inside = bilinear(torch.from_numpy(image)[None], torch.zeros(100, dtype=torch.int64), torch.from_numpy(pixel))
    assert inside.all()
    np.testing.assert_allclose(ours, theirs, atol=0.02)  # OpenCV counts positions in 1/32 pixels
    outside = torch.tensor([[0.4, 5.0], [16.6, 5.0], [5.0, 11.6]])
    assert not bilinear(torch.from_numpy(image)[None], torch.zeros(3, dtype=torch.int64), outside)[1].any()


def test_dissimilarity_is_made_of_ssim_and_brightness():
    a, b = np.random.default_rng(2).random((2, 9))
    theirs = structural_similarity(
        a.reshape(3, 3), b.reshape(3, 3), win_size=3, data_range=1.0, use_sample_covariance=False, full=True
    )[1][1, 1]
    expected = 0.85 * (1 - theirs) / 2 + 0.15 * np.abs(a - b).mean()
    assert dissimilarity(torch.from_numpy(a), torch.from_numpy(b)).item() == pytest.approx(expected, rel=1e-6)
    assert dissimilarity(torch.from_numpy(a), torch.from_numpy(a)).item() == pytest.approx(0, abs=1e-12)


def test_a_patch_is_found_where_the_wall_is_and_nowhere_else():
    views = wall_views(0.0, 1.5, -1.5)
    pixels = middle_pixels(views)
    matcher = PatchMatcher(views, pixels)
    ray = torch.arange(len(pixels))
    wall_m = WALL_M / pixels.rays.axis_cosine
    at_wall, known = matcher.cost(ray, wall_m)
    assert known.all() and (at_wall < 0.01).all()
    for factor in (0.7, 1.5):
        cost, known = matcher.cost(ray, factor * wall_m)
        assert (cost[known] > at_wall[known] + 0.05).float().mean() > 0.9


def test_where_no_other_view_looks_nothing_is_known():
    views = wall_views(0.0, 1.5)
    leftmost = PixelRays.through(views, torch.tensor([0]), torch.tensor([[93.5, 30.5]]).double())
    rays = torch.zeros(2, dtype=torch.int64)
    # What lies at the right border is outside the image of a camera to the left, however far away it is.
    cost, known = PatchMatcher(views, leftmost).cost(rays, torch.tensor([3.0, 1e5]))
    assert known.tolist() == [False, False] and cost.tolist() == [0.0, 0.0]
    alone = replace(views, sources=torch.tensor([[-1], [-1]]))
    assert not PatchMatcher(alone, middle_pixels(alone, 1)).cost(rays[:1], torch.tensor([WALL_M]))[1].any()


def test_of_four_views_the_better_half_counts():
    views = wall_views(0.0, 1.0, -1.0, 2.0, -2.0)
    pixels = middle_pixels(views, 10)
    wall_m, ray = WALL_M / pixels.rays.axis_cosine, torch.arange(10)
    clean = PatchMatcher(views, pixels).cost(ray, wall_m)[0]

    def behind_something(*hidden: int) -> torch.Tensor:
        """Costs where something dark stands before some of the cameras."""
        images = views.images.clone()
        images[list(hidden)] = 0
        return PatchMatcher(replace(views, images=images), pixels).cost(ray, wall_m)[0]

    assert (behind_something(1, 3) < clean + 0.02).all()
    assert (behind_something(1, 2, 3) > 0.2).all()


class FixedCosts:
    """Costs by distance, for sums worked out by hand: 0.1 within 6 m, unknown to 10 m, 0.4 to 15 m,
    0.3 to 50 m, 0.6 beyond."""

    def cost(self, ray, range_m):
        known = (range_m < 6) | (range_m > 10)
        cost = torch.where(range_m < 6, 0.1, torch.where(range_m < 15, 0.4, torch.where(range_m < 50, 0.3, 0.6)))
        return cost * known, known


def rendered_by_hand(weight: torch.Tensor) -> RenderedRays:
    """One ray with samples at 5, 8 and 12 m; the rest of its weight leaves the grid."""
    samples = RenderSamples(torch.zeros(3, dtype=torch.int64), torch.tensor([4.5, 7.5, 11.5]), torch.ones(3), weight)
    opacity = weight.sum()[None]
    return RenderedRays(torch.tensor([9.0]), torch.zeros(1, 3), opacity, torch.tensor([20.0]), samples)


def test_a_volume_pays_for_every_place_by_its_weight():
    weight = torch.tensor([0.2, 0.4, 0.1], requires_grad=True)
    loss = volume_matching_loss(rendered_by_hand(weight), FixedCosts(), torch.tensor([True]), beyond=1.3)
    # 0.2 at a cost of 0.1, 0.1 at 0.4, the remaining 0.3 somewhere behind 20 m, best at 0.3, raised to 0.39; and 0.4 where
    # nobody looks, at the mean of these three costs.
    guess = (0.1 + 0.4 + 0.39) / 3
    assert loss.item() == pytest.approx(0.2 * 0.1 + 0.1 * 0.4 + 0.3 * 0.39 + 0.4 * guess)
    loss.backward()
    # What ends somewhere no longer passes at 0.39.
    torch.testing.assert_close(weight.grad, torch.tensor([0.1 - 0.39, guess - 0.39, 0.4 - 0.39]))
    dearer = volume_matching_loss(rendered_by_hand(weight), FixedCosts(), torch.tensor([True]), beyond=2.0)
    guess = (0.1 + 0.4 + 0.6) / 3
    assert dearer.item() == pytest.approx(0.2 * 0.1 + 0.1 * 0.4 + 0.3 * 0.6 + 0.4 * guess)


def test_an_encoders_depths_are_held_against_where_pixels_match(monkeypatch):
    monkeypatch.setattr(photometric, "MATCHING_TEMPERATURE", 0.3)
    views = wall_views(0.0, 1.5)
    # One pixel on the axis, where depth is range; the range of the other is 5/4 of its depth.
    at = torch.tensor([[48.0, 32.0], [48.0, 32.0 + 0.75 * FOCAL_PX]]).double()
    pixels = PixelRays.through(views, torch.tensor([0, 0]), at)
    probability = torch.tensor([[0.2, 0.5, 0.3]]).repeat(2, 1)
    logits = probability.log().requires_grad_()
    loss = depth_matching_loss(logits, torch.tensor([[5.0, 8.0, 12.0]]).repeat(2, 1), FixedCosts(), pixels)
    # The first: 0.1 at 5 m, 0.4 at 12 m, and at 8 m, where nobody looks, their mean: likely as 1 to e^-1 to e^-0.5. The other
    # is unknown at 6.25 and 10 m and so, with 0.3 at 15 m, alike everywhere: it does not count.
    likely = torch.tensor([1.0, math.exp(-0.5), math.exp(-1.0)])
    target = likely / likely.sum()
    assert loss.item() == pytest.approx(0.50648 * 1.60944 + 0.30720 * 0.69315 + 0.18632 * 1.20397, abs=1e-4)
    loss.backward()
    torch.testing.assert_close(logits.grad[0], probability[0] - target)
    assert logits.grad[1].abs().max() < 1e-6


def test_an_encoder_finds_the_depth_of_a_wall():
    views = wall_views(0.0, 1.5, -1.5)
    pixels = middle_pixels(views)
    bins_m = torch.arange(2.0, 20.0, 1.0).expand(len(pixels), -1)
    logits = torch.zeros(bins_m.shape, requires_grad=True)
    depth_matching_loss(logits, bins_m, PatchMatcher(views, pixels), pixels).backward()
    assert (bins_m.gather(1, logits.grad.argmin(dim=1, keepdim=True)) == WALL_M).float().mean() > 0.9


def test_an_encoders_pixels_lie_where_the_views_have_them():
    one = wall_views(0.0, 1.5)
    now = replace(one, time_index=torch.zeros(2, dtype=torch.int64), camera_index=torch.tensor([1, 0]))
    other = replace(one, time_index=torch.ones(2, dtype=torch.int64), batch_index=torch.zeros(2, dtype=torch.int64))
    views = Views.cat([other, now])  # the second view of now is camera 0's
    half = torch.tensor([[2.0, 0, 0], [0, 2.0, 0]]).double()  # the encoder's images are half as large
    shifted = torch.tensor([[1.0, 0, 60.0], [0, 1.0, 0]]).double()
    encoder = EncoderPixels(torch.stack([half, shifted])[None], torch.zeros(1, 2, 3))
    size_px = (WIDTH_PX // 2, HEIGHT_PX // 2)
    pixels, image, cell = draw_encoder_pixels(
        views, encoder, (1, 2, 4, 6), size_px, 400, torch.Generator().manual_seed(0)
    )
    assert set(zip(image.tolist(), pixels.view.tolist(), strict=True)) == {(0, 3), (1, 2)}
    first, second = pixels.pixel[image == 0], pixels.pixel[image == 1]
    # Cells are 8 x 8 pixels, 16 x 16 in the first camera's view.
    assert torch.equal(cell[image == 0], (first[:, 1] // 16 * 6 + first[:, 0] // 16).long())
    assert torch.equal(cell[image == 1], (second[:, 1] // 8 * 6 + (second[:, 0] - 60) // 8).long())
    assert len(first) > 150 and len(second) > 100  # of 200 each, without those whose patch leaves the view
    for at in (first, second):
        assert (at >= 2.5).all() and (at <= at.new_tensor([WIDTH_PX - 2.5, HEIGHT_PX - 2.5])).all()


def test_only_the_sides_and_the_top_of_the_grid_are_open():
    directions = np.array([[1.0, 0, 0], [0, 0, 1.0], [0.6, 0, -0.8], [0.9950371902, 0, -0.0995037190]])
    rays = Rays.from_numpy(np.zeros((4, 3)), directions, np.full(4, np.inf), 17)
    far_m = torch.tensor([16.0, 4.0, 5.0, 16.08])  # the last one leaves through the side, 1.6 m down
    assert leaving_below(rays, far_m, GRID).tolist() == [False, False, True, False]


def test_colors_are_compared_by_opacity():
    seen = torch.tensor(
        [[0.25, 0.1, 0.0], [0.0, 0.0, 0.0]]
    )  # an opacity of one half: the thing itself is twice as bright
    rendered = RenderedRays(
        torch.zeros(2), seen, torch.tensor([0.5, 0.0]), torch.zeros(2), RenderSamples(*[torch.zeros(0)] * 4)
    )
    loss = color_loss(rendered, torch.tensor([[0.5, 0.5, 0.0], [1.0, 1.0, 1.0]]))
    assert loss.item() == pytest.approx(0.5 * (0.0 + 0.3 + 0.0) / 3 / 2)


def wall_field(x_m: torch.Tensor, sharpness: float = 4.0) -> VoxelField:
    """Opaque behind x_m, where 0.4 m of it are so with probability one half; differentiable in x_m; grey."""
    centre_x_m = torch.from_numpy(GRID.centres()[:, 0, 0, 0]).float()
    density = 2 * math.log(2) / 0.4 * torch.sigmoid(sharpness * (centre_x_m - x_m))
    x, y, z = GRID.shape
    return VoxelField(density.expand(1, z, y, x), torch.full((1, 3, z, y, x), 0.5), GRID)


@pytest.mark.parametrize(("method", "step_m"), [("surface", 0.4), ("traversal", 1.5)])
def test_a_wall_in_the_wrong_place_is_pushed_to_where_images_agree(method, step_m):
    views = wall_views(0.0, 1.5, -1.5)
    pixels = middle_pixels(views, 200)
    matching, rendering = PhotometricConfig(matching_weight=1.0), RenderConfig(method=method)
    for offset_m, sign in ((-step_m, -1), (step_m, 1)):
        x_m = torch.tensor(WALL_M + offset_m, requires_grad=True)
        photometric_losses(wall_field(x_m), views, pixels, GRID, matching, rendering)["matching"].backward()
        assert torch.sign(x_m.grad) == sign  # descent moves it towards the wall


def test_a_surfaces_gradient_is_that_of_finite_differences():
    views = wall_views(0.0, 1.5, -1.5)
    pixels = middle_pixels(views, 200)

    def loss(x_m: torch.Tensor) -> torch.Tensor:
        rendered = render(wall_field(x_m), pixels.rays, GRID, config=RenderConfig(method="surface", secant_steps=20))
        return surface_matching_loss(rendered, PatchMatcher(views, pixels))

    x_m = torch.tensor(WALL_M + 0.35, requires_grad=True)
    loss(x_m).backward()
    with torch.no_grad():
        difference = (loss(x_m + 0.01) - loss(x_m - 0.01)) / 0.02
    assert x_m.grad.item() == pytest.approx(difference.item(), rel=0.1)


def test_terms_are_weighted_and_left_out_at_zero():
    views = wall_views(0.0, 1.5, -1.5)
    pixels = middle_pixels(views)
    field = wall_field(torch.tensor(WALL_M))
    one = photometric_losses(field, views, pixels, GRID, PhotometricConfig(matching_weight=1.0, color_weight=1.0))
    two = photometric_losses(field, views, pixels, GRID, PhotometricConfig(matching_weight=2.0))
    assert set(one) == {"matching", "color"} and set(two) == {"matching"}
    torch.testing.assert_close(two["matching"], 2 * one["matching"])


def test_pixels_that_see_into_a_moving_box_are_left_out():
    def box(x_m: float, y_m: float) -> np.ndarray:
        return poses.pose((x_m, y_m, 0.0), (1.0, 0.0, 0.0, 0.0))

    # At time 1 one box is ahead and was elsewhere at time 0; another stands still to the right.
    boxes = MovingBoxes.from_numpy(
        [box(6, 5), box(6, -5)], [box(6, 0), box(6, -5)], np.full((2, 3), 2.0), [4, 4], [1, 1]
    )

    def rays(targets: list[tuple[float, float]], time: int) -> Rays:
        to = np.array([[x, y, 0.0] for x, y in targets])
        direction = to / np.linalg.norm(to, axis=1, keepdims=True)
        return Rays.from_numpy(np.zeros((len(to), 3)), direction, np.full(len(to), np.inf), 17, time)

    ahead_left_right = [(6, 0), (6, 5), (6, -5)]
    assert StillWorld(boxes, 1.0).keeps(rays(ahead_left_right, 1), GRID).tolist() == [False, True, True]
    assert StillWorld(boxes, 1.0).keeps(rays(ahead_left_right, 0), GRID).tolist() == [True, False, True]
    beside = [(6, 1.7)]
    assert StillWorld(boxes, 1.0).keeps(rays(beside, 1), GRID).tolist() == [True]
    assert StillWorld(boxes, 1.5).keeps(rays(beside, 1), GRID).tolist() == [False]
    assert StillWorld(MovingBoxes.empty()).keeps(rays(ahead_left_right, 1), GRID).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"matching_weight": -1.0}, "photometric.matching_weight is -1.0"),
        ({"depth_weight": float("inf")}, "photometric.depth_weight is inf"),
        ({"color_weight": float("nan")}, "photometric.color_weight is nan"),
        ({"sources": 0}, "photometric.sources is 0; give at least 1"),
        ({"pixels_per_step": 0}, "photometric.pixels_per_step is 0"),
        ({"beyond": 0.9}, "photometric.beyond is 0.9; give a factor of 1 or more"),
        ({"box_scale": 0.0}, "photometric.box_scale is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        PhotometricConfig(**settings)
