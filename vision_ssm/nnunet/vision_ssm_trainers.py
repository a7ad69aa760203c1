"""Our networks built from the plans of nnU-Net v2, each beside its twin without a state-space model.

Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature
Methods 2021; and, for why the twins are here, "nnU-Net Revisited", arXiv:2404.09556. All but the network is nnU-Net's
own: data, loss, optimiser, schedule, inference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule

from vision_ssm.segmentation import SegMamba, SSMUNet, UMamba


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What nnU-Net planned for a network.

    Attributes:
        patch: sides of a patch.
        strides: what each stage reduces its input by along each axis, the finest stage first.
        kernels: sides of the convolutions of each stage.
        features: channels of each stage.
        blocks: convolutions or residual blocks of each stage of the encoder.
        decoder_blocks: the same of the decoder.
    """

    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]
    blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]

    @classmethod
    def read(cls, configuration: Mapping[str, Any]) -> Plan:
        """The plan of a configuration, in the format of today or in that of nnU-Net before 2.4."""
        if "architecture" in configuration:
            parts = configuration["architecture"]["arch_kwargs"]
            strides, kernels, features = parts["strides"], parts["kernel_sizes"], parts["features_per_stage"]
            blocks = parts.get("n_blocks_per_stage") or parts["n_conv_per_stage"]
        else:
            parts = configuration
            strides, kernels, blocks = (
                parts[key] for key in ("pool_op_kernel_sizes", "conv_kernel_sizes", "n_conv_per_stage_encoder")
            )
            widths = (parts["UNet_base_num_features"] * 2**stage for stage in range(len(strides)))
            features = [min(width, parts["unet_max_num_features"]) for width in widths]
        return cls(
            patch=tuple(configuration["patch_size"]),
            strides=tuple(map(tuple, strides)),
            kernels=tuple(map(tuple, kernels)),
            features=tuple(features),
            blocks=tuple(blocks),
            decoder_blocks=tuple(parts["n_conv_per_stage_decoder"]),
        )

    @property
    def axes(self) -> int:
        return len(self.patch)

    def halvings(self) -> list[int]:
        """How often the plan halves each axis."""
        return [sum(step > 1 for step in steps) for steps in zip(*self.strides, strict=True)]


class PlannedTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a network of ours; a subclass says which, and with what options of the network."""

    options: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__()
        cls.options = {**cls.options, **options}

    @classmethod
    def network_for(cls, plan: Plan, in_channels: int, out_channels: int) -> nn.Module:
        """The network with heads at every level of its decoder, which give logits."""
        raise NotImplementedError

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: Any,
        num_output_channels: Any,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network of a plan.

        nnU-Net before 2.4, and the forks of its time, pass dataset.json after the plans, all else one place later, and
        no number of outputs.
        """
        if isinstance(configuration_manager, Mapping):
            labels = plans_manager.get_label_manager(configuration_manager)
            configuration_manager, num_input_channels = num_input_channels, num_output_channels
            num_output_channels = labels.num_segmentation_heads
        plan = Plan.read(configuration_manager.configuration)
        network = cls.network_for(plan, num_input_channels, num_output_channels)
        # All heads are there in any case: a checkpoint of a training has them, and inference loads it strictly.
        supervise(network, enable_deep_supervision)
        return network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        supervise(self.bare_network(), enabled)

    def on_validation_epoch_start(self) -> None:
        """As nnU-Net's, and the network gives all levels: ours do so in training mode only.

        That mode is set on the modules which choose the outputs, not on those they hold: norms and dropout evaluate.
        """
        super().on_validation_epoch_start()
        for module in choosing(self.bare_network()):
            module.training = self.enable_deep_supervision

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """The levels of the network, which are not the plan's where it halves all axes alike."""
        if not self.enable_deep_supervision:
            return None
        patch = self.configuration_manager.patch_size
        return [
            [math.ceil(side / step) / side for side, step in zip(patch, reduction, strict=True)]
            for reduction in self.bare_network().reductions[:-1]
        ]

    def bare_network(self) -> Any:
        """The network out of what compiles it and what shares its gradients."""
        network = self.network.module if self.is_ddp else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network


def choosing(network: nn.Module) -> list[Any]:
    """The modules that choose between one level and all of them: the network, and its decoder if it asks that."""
    return [module for module in network.modules() if module is network or hasattr(module, "deep_supervision")]


def supervise(network: nn.Module, enabled: bool) -> None:
    """Switches the coarser levels on or off."""
    for module in choosing(network):
        module.deep_supervision = enabled


class nnUNetTrainerSSMUNet(PlannedTrainer):
    """SSMUNet with the widths of the plan.

    Its 3-D encoder has the plan's stages, strides and kernels, and two blocks a stage. In 2-D it is a timm backbone,
    which halves both axes alike, without the maps that are coarser than the plan's.
    """

    backbone: ClassVar[str] = "vmamba_tiny"

    @classmethod
    def network_for(cls, plan: Plan, in_channels: int, out_channels: int) -> nn.Module:
        if plan.axes == 3:
            encoder: dict[str, Any] = {
                "backbone": "ssm3d_small",
                "dims": plan.features[1:],
                "depths": (2,) * len(plan.features[1:]),
                "strides": plan.strides[1:],
                "kernel_sizes": plan.kernels[1:],
            }
            levels = len(plan.features) - 1
        else:
            maps = max(1, min(plan.halvings()) - 1)  # the first is at 1/4
            encoder = {"backbone": cls.backbone, "out_indices": range(min(maps, 4))}
            levels = len(encoder["out_indices"]) + 1
        return SSMUNet(
            spatial_dims=plan.axes,
            in_channels=in_channels,
            out_channels=out_channels,
            decoder_channels=plan.features[:levels],
            deep_supervision=True,
            **encoder,
            **cls.options,
        )


class nnUNetTrainerSSMUNetIdentity(nnUNetTrainerSSMUNet, mixer="identity"):
    """The same without the state-space model."""


class nnUNetTrainerUMamba(PlannedTrainer):
    """UMamba with the stages, strides, kernels, widths and numbers of blocks of the plan; Mamba in the bottleneck."""

    @classmethod
    def network_for(cls, plan: Plan, in_channels: int, out_channels: int) -> nn.Module:
        return UMamba(
            plan.axes,
            in_channels,
            out_channels,
            channels=plan.features,
            strides=plan.strides,
            kernel_sizes=plan.kernels,
            blocks=plan.blocks,
            decoder_blocks=plan.decoder_blocks,
            deep_supervision=True,
            **cls.options,
        )


class nnUNetTrainerUMambaIdentity(nnUNetTrainerUMamba, mixer="identity"):
    """The same without the state-space model."""


class nnUNetTrainerUMambaEncoder(nnUNetTrainerUMamba, form="encoder"):
    """Mamba ends every stage of the encoder."""


class nnUNetTrainerUMambaEncoderIdentity(nnUNetTrainerUMambaEncoder, mixer="identity"):
    """The same without the state-space model."""


class nnUNetTrainerSegMamba(PlannedTrainer):
    """SegMamba with its own widths, as many of its stages as the plan halves the axis that it halves most.

    It halves all axes alike and pads those that are too short.
    """

    @classmethod
    def network_for(cls, plan: Plan, in_channels: int, out_channels: int) -> nn.Module:
        widths = (48, 96, 192, 384)
        stages = max(1, min(len(widths), max(plan.halvings())))
        return SegMamba(
            plan.axes,
            in_channels,
            out_channels,
            dims=widths[:stages],
            depths=(2,) * stages,
            hidden=2 * widths[stages - 1],
            deep_supervision=True,
            **cls.options,
        )


class nnUNetTrainerSegMambaIdentity(nnUNetTrainerSegMamba, mixer="identity"):
    """The same without the state-space model."""
