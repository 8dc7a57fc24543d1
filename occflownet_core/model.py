# SPDX-License-Identifier: Apache-2.0
"""OccFlowNet: camera images to an occupancy field, with one volume of memory; and the form in which it is deployed.

After OccFlowNet (Boeder, Gigengack, Risse; arXiv 2402.12792), whose encoder is BEVStereo's: depth distribution and
context per pixel, lifted into a volume, the previous volume warped by ego motion beside it, a volume network, a field.
How large it is, and which of its parts are the light ones, is the configuration's matter: one definition serves the
demo on a laptop, the published size, and real time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from occflownet_core.encoder.backbone import BackboneConfig, ConvBlock, ImageEncoder
from occflownet_core.encoder.depth import CameraAwareDepthNet, DepthConfig, DepthNet
from occflownet_core.encoder.lift import CameraTensors, LiftTensors, SplatTensors
from occflownet_core.encoder.splat import SortedSplat
from occflownet_core.encoder.stereo import StereoMatcher, StereoView
from occflownet_core.encoder.temporal import warp_planar
from occflownet_core.encoder.volume import VolumeConfig, VolumeEncoder
from occflownet_core.encoder.volume3d import FrameBlock3d, VolumeEncoder3d
from occflownet_core.errors import ConfigError, OccflownetError
from occflownet_core.field import FieldConfig, FieldDecoder, OccupancyField, occupancy_probability
from occflownet_core.grid import OCC3D_GRID, VoxelGrid
from occflownet_core.labels import FREE, OCCUPIED_CLASSES
from occflownet_core.lift_tables import CAMERA_INPUTS, GATHER_INPUTS, SPLAT_INPUTS, LiftSpec
from occflownet_core.runtime.bundle import FIELD_FEATURES

VIEW_INPUTS = ("stereo_features", "stereo_image_from_ego")
"""Names of a ``StereoView``'s parts in a graph."""

NUSCENES_CAMERAS = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the network.

    Attributes:
        name: of the model, kept in its bundles.
        cameras: camera names in the order of the images.
        image_width_px, image_height_px: size of the network's images.
        grid: where labels are given.
        working_coarsening: how many label cells make the edge of one cell of the working volume.
        lift: ``gather``, every voxel reads the pixels it projects to; or ``splat``, every pixel at every depth adds to
            the voxel it falls into, as published.
        lift_slots: most cameras that one voxel gathers from.
        occupancy_threshold: a voxel is occupied where its probability is above.
        backbone, depth, volume, field: the parts.

    Raises:
        ConfigError: the threshold is no probability.
    """

    name: str = "occflownet"
    cameras: tuple[str, ...] = NUSCENES_CAMERAS
    image_width_px: int = 352
    image_height_px: int = 128
    grid: VoxelGrid = OCC3D_GRID
    working_coarsening: int = 2
    lift: Literal["gather", "splat"] = "gather"
    lift_slots: int = 2
    occupancy_threshold: float = 0.5
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    depth: DepthConfig = dataclasses.field(default_factory=DepthConfig)
    volume: VolumeConfig = dataclasses.field(default_factory=VolumeConfig)
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.occupancy_threshold <= 1:
            raise ConfigError(f"occupancy_threshold is {self.occupancy_threshold}; give a probability from 0 to 1")

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """A configuration of plain values, as YAML gives them.

        Raises:
            ConfigError: a key is unknown or a value has a wrong type.
        """
        import jsonargparse

        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--model", type=cls)
        try:
            return parser.instantiate(parser.parse_object({"model": values})).model
        except (jsonargparse.ArgumentError, OccflownetError, TypeError, ValueError) as error:
            raise ConfigError(f"model configuration: {' '.join(str(error).split())}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> ModelConfig:
        """The ``model:`` section of a training configuration.

        Raises:
            ConfigError: the file cannot be read, has no such section, or the section is wrong.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"configuration {path} cannot be read ({str(error).splitlines()[0]})") from None
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise ConfigError(f"configuration {path} has no 'model:' section; see training/configs for examples")
        try:
            return cls.from_dict(content["model"])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict:
        """Plain values for YAML; ``from_dict`` reads them back."""
        return _plain(dataclasses.asdict(self))

    def without_download(self) -> ModelConfig:
        """The same, for a network whose weights are about to be loaded: no pretrained ones are fetched."""
        return dataclasses.replace(self, backbone=dataclasses.replace(self.backbone, pretrained=False))

    @property
    def working_grid(self) -> VoxelGrid:
        """The grid that features live on."""
        return self.grid.coarsened(self.working_coarsening)

    def lift_spec(self, stride: int) -> LiftSpec:
        """Shapes for ``build_lift_tables``, of an image encoder with the given stride."""
        return LiftSpec(
            grid=self.working_grid,
            depth_bins=self.depth.bins,
            feature_height=self.image_height_px // stride,
            feature_width=self.image_width_px // stride,
            slots=self.lift_slots,
            reference_focal_px=self.depth.reference_focal_px,
            method=self.lift,
            knows_cameras=self.depth.knows_camera,
        )


class ObservedImages(NamedTuple):
    """What the images of one frame say by themselves.

    Attributes:
        volume: [B, C * Z, Y, X], which is the next frame's memory.
        depth_logits: [B, N, D, h, w] over the depth bins.
        class_logits: [B, N, 17, h, w] over the occupied classes; for supervision only.
        view: what the next frame's stereo matches against; None for networks without.
    """

    volume: Tensor
    depth_logits: Tensor
    class_logits: Tensor
    view: StereoView | None = None


class ModelOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        field: the occupancy field in the current ego frame.
        seen: what the current images say by themselves; its volume (and view) is the memory for the next frame.
    """

    field: OccupancyField
    seen: ObservedImages


class OccFlowNet(nn.Module):
    """The network.

    The memory is the volume of one frame *before* it is fused with its own past. It therefore depends on that frame
    alone: two frames of training show the network all that it will meet after an hour on the road. With stereo, it also
    depends on the frame before, whose features that frame was matched against: three frames show all.

    Raises:
        ConfigError: the configuration describes no network that can be built.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = config.working_grid
        stereo = config.depth.stereo
        size = config.image_height_px, config.image_width_px
        self.image_encoder = ImageEncoder(config.backbone, size, stereo.level if stereo else None)
        coarsest = self.image_encoder.coarsest_stride
        if config.image_width_px % coarsest or config.image_height_px % coarsest:
            raise ConfigError(
                f"images of {config.image_width_px} x {config.image_height_px} px do not suit backbone "
                f"'{config.backbone.name}'; make both sizes multiples of {coarsest}"
            )
        self.lift_spec = config.lift_spec(self.image_encoder.stride)
        heights = self.grid.shape[2]
        memory = config.volume.memory_channels * heights
        depth_net = CameraAwareDepthNet if config.depth.knows_camera else DepthNet
        self.depth_net = depth_net(config.backbone.channels, config.depth)
        self.stereo = self._stereo_matcher() if stereo else None
        if config.volume.kind == "planar":
            self.frame_block = ConvBlock(config.depth.context_channels * heights, memory)
            self.volume_encoder = VolumeEncoder(2 * memory, config.field.channels * heights, config.volume)
        else:
            width = config.volume.memory_channels
            self.frame_block = FrameBlock3d(config.depth.context_channels, width, heights)
            self.volume_encoder = VolumeEncoder3d(2 * width, config.field.channels, heights, config.volume)
        self.decoder = FieldDecoder(config.field)
        # Reads classes off the lifted context linearly, so that learning them puts them there; no part of what is deployed.
        self.context_classes = nn.Conv2d(config.depth.context_channels, OCCUPIED_CLASSES, 1)
        self.checkpointing = False

    def _stereo_matcher(self) -> StereoMatcher:
        depth, images = self.config.depth, self.image_encoder
        depths_m = tuple(depth.bins.centres_m().tolist())
        return StereoMatcher(
            images.fine_channels, images.fine_stride, images.stride, depths_m, depth.hidden_channels, depth.stereo
        )

    def set_checkpointing(self, enabled: bool) -> None:
        """Keep few activations for backward, and compute the others again (arXiv 1604.06174): less memory, more time.

        Batch norms then see each batch twice, which takes their running statistics as far as two equal batches would.
        """
        self.checkpointing = enabled
        self.image_encoder.set_checkpointing(enabled)
        if self.stereo is not None:
            self.stereo.checkpointing = enabled

    def forward(
        self,
        images: Tensor,
        tables: LiftTensors | SplatTensors | SortedSplat,
        previous_from_current: Tensor,
        state: Tensor,
        previous_view: StereoView | None = None,
    ) -> ModelOutput:
        """The occupancy field around the vehicle.

        Args:
            images: uint8 RGB [B, N, H, W, 3].
            tables: calibration, built by ``build_lift_tables(rig, model.lift_spec)``.
            previous_from_current: [B, 4, 4], pose of the current ego frame in the previous frame's ego frame.
            state: [B, C * Z, Y, X], the ``state`` of the previous frame; zeros where there is none.
            previous_view: the ``view`` of the previous frame, for stereo; None, or zeros, where there is none.
        """
        before = () if previous_view is None else (previous_from_current, previous_view)
        seen = self.observe(images, tables, *before)
        memory = warp_planar(state, previous_from_current, self.grid)
        features = self._kept_small(self.volume_encoder, torch.cat([seen.volume, memory], dim=1))
        features = features.float()  # in mixed precision too: a ray sums many small densities
        x, y, z = self.grid.shape
        field = OccupancyField(features.reshape(len(features), -1, z, y, x), self.grid, self.decoder)
        return ModelOutput(field, seen)

    def observe(
        self,
        images: Tensor,
        tables: LiftTensors | SplatTensors | SortedSplat,
        previous_from_current: Tensor | None = None,
        previous_view: StereoView | None = None,
    ) -> ObservedImages:
        """One frame by itself, without the memory of volumes; arguments as for ``forward``."""
        batch, cameras = images.shape[:2]
        features = self.image_encoder.features(images.flatten(0, 1))
        view, known = None, ()
        if self.config.depth.knows_camera:
            known = (tables.cameras.camera_parameters.flatten(0, 1),)
        if self.stereo is not None:
            view = self.stereo.view(features.fine.unflatten(0, (batch, cameras)), tables.cameras.image_from_ego)
            if previous_view is None:
                previous_view = StereoView(torch.zeros_like(view.features), torch.zeros_like(view.image_from_ego))
                previous_from_current = torch.eye(4, device=images.device).expand(batch, 4, 4)
            matched = self.stereo(view.features, tables.cameras.ego_from_image, previous_from_current, previous_view)
            known = (*known, matched)
        depth_logits, context = self._kept_small(self.depth_net, features.pyramid, *known)
        class_logits = self.context_classes(context)
        depth_logits, context, class_logits = (
            t.unflatten(0, (batch, cameras)) for t in (depth_logits, context, class_logits)
        )
        x, y, z = self.grid.shape
        lifted = tables.lift(context, F.softmax(depth_logits, dim=2), (z, y, x))  # [B, C, Z, Y, X]
        volume = self._kept_small(self.frame_block, lifted.flatten(1, 2))
        return ObservedImages(volume, depth_logits, class_logits, view)

    def view(self, images: Tensor, tables: LiftTensors | SplatTensors) -> StereoView | None:
        """What the next frame's stereo matches against, alone; None for networks without."""
        if self.stereo is None:
            return None
        fine = self.image_encoder.features(images.flatten(0, 1)).fine
        return self.stereo.view(fine.unflatten(0, images.shape[:2]), tables.cameras.image_from_ego)

    def _kept_small(self, part: Callable, *arguments: Tensor):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *arguments, use_reentrant=False)
        return part(*arguments)

    def empty_state(self, batch: int = 1) -> Tensor:
        """No memory: zeros [B, C * Z, Y, X]."""
        x, y, z = self.grid.shape
        channels = self.config.volume.memory_channels * z
        return torch.zeros(batch, channels, y, x, device=next(self.parameters()).device)

    def empty_view(self, batch: int = 1) -> StereoView | None:
        """Nothing to match against; None for networks without stereo."""
        if self.stereo is None:
            return None
        config, device = self.config, next(self.parameters()).device
        cameras, stride = len(config.cameras), self.stereo.level_stride
        size = config.image_height_px // stride, config.image_width_px // stride
        features = torch.zeros(batch, cameras, config.depth.stereo.channels, *size, device=device)
        return StereoView(features, torch.zeros(batch, cameras, 4, 4, device=device))


class DeployedModel(nn.Module):
    """The network as a vehicle runs it: one set of images and plain tensors in, labels out (DESIGN: graph boundary).

    Attributes:
        inputs: names of its arguments in order.
        outputs: names of its results in order, of which the last ones are the memory.
        recurrent: the memory: results by the arguments that they become in the next run.
    """

    def __init__(self, model: OccFlowNet) -> None:
        super().__init__()
        self.model = model
        self.recurrent = {"state": "next_state"}
        if model.stereo is not None:
            self.recurrent |= {name: f"next_{name}" for name in VIEW_INPUTS}
        tables = model.lift_spec.inputs
        self.inputs = ("images", *tables, "previous_from_current", "occupancy_threshold", *self.recurrent)
        velocity = ("velocity",) if model.config.field.velocity else ()
        self.outputs = ("labels", "occupancy_probability", *velocity, FIELD_FEATURES, *self.recurrent.values())

    def empty_memory(self) -> tuple[Tensor, ...]:
        """Zeros for the arguments that are memory, in order."""
        return (self.model.empty_state(), *(self.model.empty_view() or ()))

    def forward(self, images: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Labels, probability, velocity where the model has one, the field's features, and memory.

        Args:
            images: uint8 [N, H, W, 3].
            others: by ``inputs``: a rig's ``LiftTables.arrays`` or ``SplatTables.arrays``; previous_from_current
                [4, 4]; occupancy_threshold, a scalar; state [1, C * Z, Y, X]; with stereo the previous view,
                [1, N, C, h, w] and [1, N, 4, 4].

        Returns:
            labels uint8 [X, Y, Z], probability of being occupied [X, Y, Z], velocity [X, Y, Z, 3] in m/s, features
            [1, Z, Y, X, C] for queries, and the memory for the next run.
        """
        given = dict(zip(self.inputs[1:], others, strict=True))
        view = StereoView(*(given[name] for name in VIEW_INPUTS)) if self.model.stereo is not None else None
        # TensorRT has uint8 at a graph's boundary only: cast first on the way in, last on the way out.
        output = self.model(
            images.float()[None],
            _running_tables(self.model.lift_spec, given),
            given["previous_from_current"][None],
            given["state"],
            view,
        )
        grid = self.model.config.grid
        density, logits = output.field.lattice(grid)
        probability = occupancy_probability(density, grid.voxel_size_m)[0]  # [Z, Y, X]
        label = torch.where(probability > given["occupancy_threshold"], logits.argmax(1)[0].int(), FREE)
        results = [label.permute(2, 1, 0).to(torch.uint8), probability.permute(2, 1, 0)]
        if self.model.config.field.velocity:
            results.append(output.field.velocity_lattice(grid)[0].permute(3, 2, 1, 0))
        return *results, output.field.features.movedim(1, -1), output.seen.volume, *(output.seen.view or ())


def _running_tables(spec: LiftSpec, given: dict[str, Tensor]) -> LiftTensors | SortedSplat:
    """The tables among a graph's inputs, as the network takes them."""
    cameras = CameraTensors(*(given[name][None] for name in CAMERA_INPUTS)) if spec.knows_cameras else None
    if spec.method == "splat":
        return SortedSplat(*(given[name] for name in SPLAT_INPUTS), cameras)
    return LiftTensors(*(given[name][None] for name in GATHER_INPUTS), cameras)


def _plain(value: object) -> object:
    """The same with lists for tuples, as YAML has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
