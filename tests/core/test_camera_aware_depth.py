# SPDX-License-Identifier: Apache-2.0
"""The depth net that is told its cameras, the 3D volume network, and the neck that concatenates."""

import pytest
import torch
import torch.nn.functional as F

from occflownet_core.encoder.backbone import BackboneConfig, ConcatenatingNeck, ImageEncoder
from occflownet_core.encoder.depth import CameraAwareDepthNet, CameraGate, DepthConfig, Surroundings
from occflownet_core.encoder.stereo import StereoConfig
from occflownet_core.encoder.volume import VolumeConfig
from occflownet_core.encoder.volume3d import FrameBlock3d, VolumeEncoder3d, enlarged
from occflownet_core.errors import ConfigError
from occflownet_core.lift_tables import DepthBins


def depth_net(stereo: bool = False) -> CameraAwareDepthNet:
    torch.manual_seed(0)
    config = DepthConfig(
        DepthBins(1, 6, 1),
        context_channels=3,
        knows_camera=True,
        hidden_channels=8,
        stereo=StereoConfig() if stereo else None,
    )
    return CameraAwareDepthNet(6, config)


def test_the_same_image_of_another_camera_has_another_depth():
    net = depth_net().eval()
    features, parameters = torch.randn(1, 6, 4, 5), torch.randn(2, 17)
    depth, context = net(features.expand(2, -1, -1, -1), parameters)
    assert depth.shape == (2, 5, 4, 5)
    assert context.shape == (2, 3, 4, 5)
    assert (depth[0] - depth[1]).abs().max() > 1e-3
    assert (context[0] - context[1]).abs().max() > 1e-3


def test_a_gate_is_one_number_a_channel():
    """sigmoid(W2 relu(W1 p + b1) + b2), by hand for weights that are all 0 but the last bias."""
    gate = CameraGate(3)
    for parameter in gate.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        gate.gate[2].bias.copy_(torch.tensor([0.0, 100.0, -100.0]))
    found = gate(torch.ones(2, 3, 2, 2), torch.randn(2, 17))
    torch.testing.assert_close(found[:, :, 0, 1], torch.tensor([[0.5, 1.0, 0.0]] * 2))


def test_matching_helps_depth_and_leaves_context_alone():
    net = depth_net(stereo=True).eval()
    features, parameters = torch.randn(1, 6, 4, 5), torch.randn(1, 17)
    one, other = (net(features, parameters, torch.full((1, 8, 4, 5), value)) for value in (0.0, 1.0))
    assert (one[0] - other[0]).abs().max() > 1e-3
    torch.testing.assert_close(one[1], other[1])


def test_surroundings_reach_as_far_as_their_dilation():
    """With the whole image's mean silenced, a pixel reads itself and those 6, 12 and 18 to the left and right."""
    torch.manual_seed(0)
    net = Surroundings(16).eval()
    image = torch.randn(1, 16, 1, 64, requires_grad=True)
    net.whole[0].weight.data.zero_()
    weight = torch.autograd.grad(net(image)[0, :, 0, 32].sum(), image)[0][0].abs().sum(0)[0]
    reached = {column - 32 for column in range(64) if weight[column] > 0}
    assert reached == {0, -6, 6, -12, 12, -18, 18}


def test_one_image_alone_can_be_learned_from():
    net = depth_net().train()
    depth, context = net(torch.randn(1, 6, 4, 5), torch.randn(1, 17))
    (depth.square().sum() + context.square().sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_stereo_needs_cameras():
    with pytest.raises(ConfigError, match="knows_camera: true"):
        DepthConfig(stereo=StereoConfig())


@pytest.mark.parametrize("size", [(4, 8, 10), (3, 5, 7), (8, 5, 6)])
def test_enlarging_in_two_steps_is_trilinear(size):
    volume = torch.randn(2, 3, 2, 4, 5, requires_grad=True)
    fast = enlarged(volume, size)
    slow = F.interpolate(volume, size=size, mode="trilinear", align_corners=False)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn_like(fast)
    torch.testing.assert_close(
        *(torch.autograd.grad((result * weight).sum(), volume)[0] for result in (fast, slow)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("size", [(4, 8, 10), (3, 5, 7), (1, 3, 2)])
def test_the_3d_network_keeps_any_size(size):
    z, y, x = size
    net = VolumeEncoder3d(4, 6, z, VolumeConfig(widths=(5, 6, 7), blocks=(1, 2, 1), kind="conv3d")).eval()
    assert net(torch.randn(2, 4 * z, y, x)).shape == (2, 6 * z, y, x)


def test_channels_and_heights_are_unfolded_in_the_order_in_which_volumes_are_folded():
    """Of a frame block with weights of 0 but the shortcut's, a channel that is only copied stays where it was."""
    block = FrameBlock3d(2, 3, heights=4).eval()
    torch.nn.init.zeros_(block.block.second[0].weight)
    weight = torch.zeros(3, 2, 1, 1, 1)
    weight[2, 1] = 1
    block.block.shortcut[0].weight.data.copy_(weight)
    volume = torch.rand(1, 2, 4, 5, 6)
    found = block(volume.flatten(1, 2)).unflatten(1, (3, 4))
    torch.testing.assert_close(found[:, 2], volume[:, 1], atol=1e-4, rtol=1e-4)
    assert (found[:, :2] == 0).all()


def test_3d_widths_and_blocks_belong_together():
    with pytest.raises(ConfigError, match="differ in number"):
        VolumeEncoder3d(6, 10, 4, VolumeConfig(widths=(8, 12), blocks=(1,), kind="conv3d"))


@pytest.mark.parametrize("widths", [(4,), (4, 6), (4, 6, 8)])
def test_the_neck_reads_every_level(widths):
    net = ConcatenatingNeck(widths, 5).eval()
    levels = [torch.randn(2, w, 16 >> i, 24 >> i, requires_grad=True) for i, w in enumerate(widths)]
    merged = net(levels)
    assert merged.shape == (2, 5, 16, 24)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(merged.sum(), levels))


def test_a_transformer_gives_its_levels_channels_first_at_the_images_size():
    options = {"depths": [1, 1, 1, 1], "embed_dim": 16, "num_heads": [1, 2, 4, 8]}
    config = BackboneConfig("swin_tiny_patch4_window7_224", False, (2, 3), 8, "concatenate", options)
    encoder = ImageEncoder(config, (64, 96), fine_level=0).eval()
    pyramid, fine = encoder.features(torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8))
    assert pyramid.shape == (2, 8, 4, 6)
    assert fine.shape == (2, 16, 16, 24)
    assert (encoder.stride, encoder.fine_stride, encoder.fine_channels) == (16, 4, 16)


def test_matching_takes_a_finer_level_than_the_pyramid():
    with pytest.raises(ConfigError, match="level 2 is not finer"):
        ImageEncoder(BackboneConfig("resnet18", False, (2, 3), 8), fine_level=2)


def test_options_that_the_backbone_does_not_have():
    with pytest.raises(ConfigError, match="backbone 'resnet18'"):
        ImageEncoder(BackboneConfig("resnet18", False, (2, 3), 8, options={"legs": 4}))
