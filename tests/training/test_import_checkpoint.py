# SPDX-License-Identifier: Apache-2.0
"""Weights of other projects: their names become ours, their values compute the same, and nothing of a pickle runs."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml

from occflownet_core.errors import ConfigError, TrainingError
from occflownet_core.model import OccFlowNet
from training.checkpoint import load_checkpoint
from training.fit import initial_model
from training.import_checkpoint import (
    RenameTable,
    import_weights,
    main,
    read_tensors,
    shipped_tables,
    slices_from_unfold,
)
from training.settings import CONFIG_FOLDER, TrainingConfig

SMALL = """
model:
  name: small
  cameras: [a, b]
  image_width_px: 64
  image_height_px: 64
  grid: {lower_m: [-6.4, -4.8, -0.8], upper_m: [6.4, 4.8, 0.8], voxel_size_m: 0.4}
  backbone: {name: resnet10t, pretrained: false, out_indices: [3, 4], channels: 16}
  depth: {bins: {min_m: 0.5, max_m: 8.5, step_m: 1.0}, context_channels: 6}
  volume: {memory_channels: 5, widths: [12, 16], blocks: [1, 1]}
  field: {channels: 7, hidden: 8, layers: 1}
"""
TINY_SWIN = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def network(config_file: Path, **backbone) -> OccFlowNet:
    config = TrainingConfig.from_yaml(config_file).model
    return OccFlowNet(dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, **backbone))).eval()


def swin_network(config_file: Path) -> OccFlowNet:
    options = {**TINY_SWIN, "depths": list(TINY_SWIN["depths"]), "num_heads": list(TINY_SWIN["num_heads"])}
    return network(config_file, name="swin_tiny_patch4_window7_224", out_indices=(2, 3), options=options)


def randomised(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.1 * torch.randn_like(tensor).abs() + 0.05)
    return model.eval()


def normalised(model: OccFlowNet, images: torch.Tensor) -> torch.Tensor:
    encoder = model.image_encoder
    return (images.float().permute(0, 3, 1, 2) - encoder.mean_rgb) / encoder.std_rgb


def levels(model: OccFlowNet, x: torch.Tensor) -> list[torch.Tensor]:
    return model.image_encoder.backbone(x)


def test_a_resnet_of_timm_computes_the_same_here(config_file):
    classifier = randomised(timm.create_model("resnet18", pretrained=False))
    model = network(config_file, name="resnet18")
    report = import_weights(model, classifier.state_dict(), RenameTable.load("timm_resnet"))
    assert report.unexpected == [] and report.mismatched == {}
    assert report.ignored == ["fc.weight", "fc.bias"]
    assert not [key for key in report.missing if key.startswith("image_encoder.backbone")]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(levels(model, x)[-1], classifier.forward_features(x))


def timm_swin() -> torch.nn.Module:
    return randomised(timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, img_size=64, **TINY_SWIN))


def require_same_swin(model: OccFlowNet, classifier: torch.nn.Module) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        reference = classifier.patch_embed(x)
        for stage in classifier.layers:
            reference = stage(reference)
        torch.testing.assert_close(levels(model, x)[-1], reference)


def test_a_swin_of_timm_computes_the_same_here(config_file):
    classifier, model = timm_swin(), swin_network(config_file)
    report = import_weights(model, classifier.state_dict(), RenameTable.load("timm_swin"))
    assert report.unexpected == [] and report.mismatched == {}
    assert not [key for key in report.missing if key.startswith("image_encoder.backbone")]
    require_same_swin(model, classifier)


def authors_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Patch merging at the end of the stage before, as Swin's authors save it."""
    moved = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        moved[".".join(parts)] = value
    return moved


def test_a_swin_of_its_authors_computes_the_same_here(config_file):
    classifier, model = timm_swin(), swin_network(config_file)
    report = import_weights(model, authors_layout(classifier.state_dict()), RenameTable.load("microsoft_swin"))
    assert report.unexpected == [] and not [k for k in report.missing if k.startswith("image_encoder.backbone")]
    require_same_swin(model, classifier)


def unfolded(tensor: torch.Tensor) -> torch.Tensor:
    """The slow way back: one input channel at a time, from slices (pixel, channel) to unfold's (channel, pixel)."""
    channels = tensor.shape[-1] // 4
    result = torch.empty_like(tensor)
    for channel in range(channels):
        for row in range(2):
            for column in range(2):
                result[..., channel * 4 + 2 * row + column] = tensor[..., (2 * column + row) * channels + channel]
    return result


def mmdetection_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for key, value in authors_layout(state).items():
        key = key.replace("patch_embed.proj.", "patch_embed.projection.").replace("layers.", "stages.", 1)
        key = (
            key.replace("attn.", "attn.w_msa.")
            .replace("mlp.fc1.", "ffn.layers.0.0.")
            .replace("mlp.fc2.", "ffn.layers.1.")
        )
        renamed[f"img_backbone.{key}"] = unfolded(value) if "downsample" in key else value
    return renamed


def test_a_swin_of_mmdetection_computes_the_same_here(config_file):
    classifier, model = timm_swin(), swin_network(config_file)
    state = {
        k: v
        for k, v in mmdetection_layout(classifier.state_dict()).items()
        if ".norm." not in k or "patch" in k or "down" in k
    }
    state = {k: v for k, v in state.items() if not k.startswith("img_backbone.head")}
    report = import_weights(model, state, RenameTable.load("bevdet_swin"))
    assert report.unexpected == [] and not [k for k in report.missing if k.startswith("image_encoder.backbone")]
    require_same_swin(model, classifier)


def test_unfolding_and_slicing_merge_the_same_patches():
    """mmdetection's patch merging is torch.nn.Unfold, the authors' is slices; worked on one image."""
    torch.manual_seed(0)
    x = torch.randn(1, 6, 4, 4)
    reduction, norm = torch.randn(5, 24), torch.randn(24)
    by_unfold = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # [1, 4 patches, 24]
    image = x.permute(0, 2, 3, 1)
    by_slices = torch.cat([image[:, r::2, c::2] for c in (0, 1) for r in (0, 1)], -1).flatten(1, 2)  # [1, 4, 24]
    torch.testing.assert_close(by_unfold @ reduction.T, by_slices @ slices_from_unfold(reduction).T)
    torch.testing.assert_close((by_unfold * norm).sum(-1), (by_slices * slices_from_unfold(norm)).sum(-1))


@pytest.mark.parametrize(
    ("table", "config", "pairs"),
    [
        (
            "bevdet_resnet",
            "nuscenes_r50_256x704",
            {
                "img_backbone.conv1.weight": "image_encoder.backbone.conv1.weight",
                "img_backbone.layer3.5.bn3.running_var": "image_encoder.backbone.layer3.5.bn3.running_var",
                "img_backbone.layer4.0.downsample.0.weight": "image_encoder.backbone.layer4.0.downsample.0.weight",
                "img_neck.lateral_convs.1.conv.bias": "image_encoder.lateral.1.bias",
                "img_neck.fpn_convs.0.conv.weight": "image_encoder.smooth.0.weight",
                "img_view_transformer.depth_net.reduce_conv.0.weight": "depth_net.reduce.0.weight",
                "img_view_transformer.depth_net.reduce_conv.1.running_mean": "depth_net.reduce.1.running_mean",
                "img_view_transformer.depth_net.context_conv.weight": "depth_net.context.weight",
                "img_view_transformer.depth_net.depth_conv.0.conv1.weight": "depth_net.depth.0.first.0.weight",
                "img_view_transformer.depth_net.depth_conv.2.bn2.bias": "depth_net.depth.2.second.1.bias",
                "img_view_transformer.depth_net.depth_conv.3.aspp3.atrous_conv.weight": "depth_net.depth.3.reaches.2.0.weight",
                "img_view_transformer.depth_net.depth_conv.3.global_avg_pool.1.weight": "depth_net.depth.3.whole.0.weight",
                "img_view_transformer.depth_net.depth_conv.3.bn1.weight": "depth_net.depth.3.merge.1.weight",
                "img_view_transformer.depth_net.depth_conv.5.bias": "depth_net.depth.4.bias",
            },
        ),
        (
            "bevdet_swin",
            "nuscenes_swinb_512x1408",
            {
                "img_backbone.patch_embed.projection.weight": "image_encoder.backbone.patch_embed.proj.weight",
                "img_backbone.stages.2.blocks.17.attn.w_msa.relative_position_bias_table": (
                    "image_encoder.backbone.layers_2.blocks.17.attn.relative_position_bias_table"
                ),
                "img_backbone.stages.0.blocks.1.ffn.layers.0.0.bias": "image_encoder.backbone.layers_0.blocks.1.mlp.fc1.bias",
                "img_backbone.stages.2.downsample.reduction.weight": "image_encoder.backbone.layers_3.downsample.reduction.weight",
                "img_neck.conv.0.weight": "image_encoder.neck.blocks.0.0.0.weight",
                "img_neck.conv.4.running_mean": "image_encoder.neck.blocks.0.1.1.running_mean",
                "img_view_transformer.depth_net.depth_conv.0.downsample.weight": "depth_net.depth.0.shortcut.0.weight",
            },
        ),
    ],
)  # fmt: skip
def test_names_of_the_bevdet_family(table, config, pairs):
    """Their keys as the published code names them; ours must exist in the network that the configuration describes."""
    rename = RenameTable.load(table)
    with torch.device("meta"):
        ours = OccFlowNet(
            TrainingConfig.from_yaml(CONFIG_FOLDER / f"{config}.yaml").model.without_download()
        ).state_dict()
    for theirs, expected in pairs.items():
        assert rename.target(theirs)[0] == expected
        assert expected in ours
    for theirs in ("img_bev_encoder_backbone.layers.0.0.conv1.weight", "img_view_transformer.depth_net.bn.weight"):
        assert rename.target(theirs) is None and rename.ignores(theirs)


def small_table(tmp_path, **content) -> str:
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump({"rename": [{"from": "^theirs[.]", "to": ""}], **content}))
    return str(path)


def test_what_became_of_every_key(config_file, tmp_path):
    model = network(config_file)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {
        "theirs.depth_net.head.bias": torch.full_like(before["depth_net.head.bias"], 7.0),
        "theirs.depth_net.head.weight": torch.zeros(1, 2, 3),
        "theirs.nothing.of.ours": torch.zeros(1),
        "other": torch.zeros(1),
        "optimizer.step": torch.zeros(1),
    }
    report = import_weights(model, tensors, RenameTable.load(small_table(tmp_path, ignore=["^optimizer"])))
    assert report.matched == {"theirs.depth_net.head.bias": "depth_net.head.bias"}
    assert report.mismatched == {"depth_net.head.weight": ((1, 2, 3), tuple(before["depth_net.head.weight"].shape))}
    assert report.unexpected == ["theirs.nothing.of.ours", "other"]
    assert report.ignored == ["optimizer.step"]
    assert len(report.missing) == len(before) - 2
    after = model.state_dict()
    assert (after["depth_net.head.bias"] == 7).all()
    assert all(torch.equal(after[name], before[name]) for name in before if name != "depth_net.head.bias")


def test_of_two_keys_for_one_place_the_one_that_fits_is_taken(config_file, tmp_path):
    model = network(config_file)
    fits = torch.ones_like(model.state_dict()["depth_net.head.bias"])
    rules = [{"from": "^(a|b)$", "to": "depth_net.head.bias"}]
    table = RenameTable.load(small_table(tmp_path, rename=rules))
    report = import_weights(model, {"a": torch.zeros(99), "b": fits}, table)
    assert report.matched == {"b": "depth_net.head.bias"} and report.mismatched == {}
    with pytest.raises(TrainingError, match=r"a and b both become depth_net\.head\.bias"):
        import_weights(model, {"a": fits, "b": fits}, table)


def test_from_the_command_line_to_the_start_of_training(config_file, tmp_path, capsys):
    torch.save(
        {"state_dict": timm.create_model("resnet10t", pretrained=False).state_dict(), "epoch": 3}, tmp_path / "r.pth"
    )
    out = tmp_path / "deep" / "start.ckpt"
    options = ["--checkpoint", str(tmp_path / "r.pth"), "--table", "timm_resnet", "--config", str(config_file)]
    assert main([*options, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "matched" in said and "--trainer.initial_weights" in said
    checkpoint = load_checkpoint(out)
    assert checkpoint.provenance["imported_from"] == "r.pth" and checkpoint.provenance["keys"]["matched"] > 50
    config = TrainingConfig.from_yaml(config_file)
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, initial_weights=str(out)))
    model, provenance = initial_model(config)
    assert provenance["table"].startswith("timm_resnet")
    state = read_tensors(tmp_path / "r.pth")
    torch.testing.assert_close(model.image_encoder.backbone.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])
    assert main([*options, "--out", str(tmp_path / "s.ckpt"), "--strict"]) == 2
    assert "with --strict every key must fit" in capsys.readouterr().err
    assert not (tmp_path / "s.ckpt").exists()


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}]
)
def test_where_tensors_are_kept(tmp_path, wrap):
    state = {"a.weight": torch.ones(2), "b": torch.zeros(1)}
    torch.save(wrap(state), tmp_path / "c.pth")
    assert set(read_tensors(tmp_path / "c.pth")) == set(state)
    safetensors.torch.save_file(state, tmp_path / "c.safetensors")
    assert set(read_tensors(tmp_path / "c.safetensors")) == set(state)


class Harmful:
    """What a pickle may do when it is read."""

    def __reduce__(self):
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize(
    "content", [{"state_dict": {}, "meta": Harmful()}, {"a": torch.ones(1), "args": argparse.Namespace(x=1)}]
)
def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(TrainingError, match=r"pickles more than tensors \(\w+.*which could run any program"):
        read_tensors(tmp_path / "c.pth")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "missing.pth"], "there is no checkpoint missing.pth"),
        (["--checkpoint", "broken.pth"], "broken.pth cannot be read"),
        (["--checkpoint", "broken.safetensors"], "broken.safetensors cannot be read"),
        (["--checkpoint", "empty.pth"], "holds no tensors"),
        (["--table", "detr"], "there is no table detr"),
        (["--table", "bad.yaml"], "table bad.yaml is malformed"),
        (["--table", "regex.yaml"], "table regex.yaml is malformed"),
        (["--table", "bevdet_swin"], "fits with table bevdet_swin; choose another of bevdet_resnet"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_a_users_mistake_gets_one_sentence(config_file, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    safetensors.torch.save_file({"conv1.weight": torch.zeros(24, 3, 3, 3)}, "good.safetensors")
    Path("broken.pth").write_bytes(b"\x80\x02junk")
    Path("broken.safetensors").write_bytes(b"\x00" * 20)
    torch.save({"epoch": 3}, "empty.pth")
    Path("bad.yaml").write_text("ignore: []")
    Path("regex.yaml").write_text("rename: [{from: '(', to: x}]")
    usual = [
        "--checkpoint",
        "good.safetensors",
        "--table",
        "timm_resnet",
        "--config",
        str(config_file),
        "--out",
        "out.ckpt",
    ]
    assert main([*usual, *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("import_checkpoint: ") and words in errors and errors.count("\n") == 1
    assert not Path("out.ckpt").exists()


def test_shipped_tables_can_be_read():
    names = shipped_tables()
    assert {"timm_resnet", "timm_swin", "microsoft_swin", "bevdet_resnet", "bevdet_swin"} <= set(names)
    assert all(RenameTable.load(name).rules for name in names)
    with pytest.raises(ConfigError, match="there is no table"):
        RenameTable.load("nothing")
