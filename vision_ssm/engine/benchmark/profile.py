"""What a model costs: parameters, multiply-adds, memory kept for the backward, time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vision_ssm.engine.benchmark.timing import measure
from vision_ssm.kernels.flops import routed_scan_flops, selective_scan_flops, ssd_scan_flops

from .jobs import create

__all__ = ["CONVENTION", "Profile", "count_multiply_adds", "profile"]

CONVENTION = (
    "Multiply-adds as published for this family: one for each of a matrix product or convolution, five for each element"
    " of a LayerNorm, two of a BatchNorm, and for a selective scan nine for each step, channel and state (five for the"
    " scalar decay of Hydra). Activation functions, additions and RMSNorms are not counted."
)

_aten = torch.ops.aten
_ssm = torch.ops.vision_ssm
_SCANS = (_ssm.routed_scan, _ssm.selective_scan, _ssm.ssd_scan)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Costs of one model at one size.

    Attributes:
        parameters: trainable parameters.
        multiply_adds: of one image, see ``CONVENTION``.
        scanned: share of ``multiply_adds`` in the scans.
        kept_mib: memory that a training step keeps for its backward, of one image, parameters not counted.
        forward_ms, step_ms: median time of inference, and of forward with backward, of the batch.
    """

    parameters: int
    multiply_adds: int
    scanned: float
    kept_mib: float
    forward_ms: float
    step_ms: float


def profile(name: str, *, size: int, batch: int, device: torch.device, seconds: float = 2.0) -> Profile:
    """Measures a timm model with random weights in float32.

    Raises:
        RuntimeError: timm knows no such model.
        ValueError: ``seconds``, the time for each of the two measurements, is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive; got {seconds}")
    with torch.device("meta"):
        total, scanned = count_multiply_adds(create(name, size).eval(), torch.empty(1, 3, size, size))
    model = create(name, size).to(device)
    images = torch.randn(batch, 3, size, size, device=device)

    def infer() -> None:
        model.eval()
        with torch.inference_mode():
            model(images)

    def step() -> None:
        model.train()
        model.zero_grad()
        model(images).square().mean().backward()

    kept = kept_bytes(model.train(), images)
    timings = measure({"forward": infer, "step": step}, device, seconds)
    return Profile(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        multiply_adds=total,
        scanned=scanned / total,
        kept_mib=kept / batch / 2**20,
        forward_ms=timings["forward"].median_ms,
        step_ms=timings["step"].median_ms,
    )


def count_multiply_adds(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Multiply-adds of a forward, see ``CONVENTION``, and those of the scans among them. Works on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_TWICE_THE_COUNT) as counter:
        model(images)
    by_operator = counter.get_flop_counts()["Global"]
    return sum(by_operator.values()) // 2, sum(by_operator.get(scan, 0) for scan in _SCANS) // 2


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of the tensors that a forward keeps for its backward, each storage once, parameters not counted."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(images)
    del out  # until here the addresses are those of distinct tensors
    return sum(kept.values())


# PyTorch's counter takes a multiplication and its addition for two; these count the same way.
def _layer_norm(x: Sequence[int], *rest: Any, **options: Any) -> int:
    return 2 * 5 * math.prod(x)


def _batch_norm(x: Sequence[int], *rest: Any, **options: Any) -> int:
    return 2 * 2 * math.prod(x)


def _routed_scan(x: Sequence[int], low: Any, weight: Sequence[int], *rest: Any, **options: Any) -> int:
    """The recurrence counts whole, the projection of Δ is a matrix product."""
    recurrence = routed_scan_flops(x, low, (*weight[:2], 0), *rest)
    return routed_scan_flops(x, low, weight, *rest) + recurrence


def _selective_scan(*shapes: Any, **options: Any) -> int:
    return 2 * selective_scan_flops(*shapes)


def _ssd_scan(*shapes: Any, **options: Any) -> int:
    return 2 * ssd_scan_flops(*shapes)


_TWICE_THE_COUNT: dict[Any, Any] = {
    _aten.native_layer_norm: _layer_norm,
    _aten.native_batch_norm: _batch_norm,
    _aten._native_batch_norm_legit_no_training: _batch_norm,
    _aten.cudnn_batch_norm: _batch_norm,
    _ssm.routed_scan: _routed_scan,
    _ssm.selective_scan: _selective_scan,
    _ssm.ssd_scan: _ssd_scan,
}
