"""Half precision: A, the bias of Δ, its softplus and the states stay in float32, in every layer with a state space."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from vision_ssm.kernels import CROSS, routed_scan, selective_scan
from vision_ssm.layers import MIXERS, SS, ConvS5, Hydra
from vision_ssm.layers.bidirectional import BothDirections
from vision_ssm.layers.convs5_outputs import ResNetOutput
from vision_ssm.layers.hydra import COMBINATIONS
from vision_ssm.layers.mamba import Mamba

HALVES = [torch.float16, torch.bfloat16]
MAP, TOKENS, CLIP = (2, 5, 6, 8), (2, 9, 8), (3, 2, 5, 6, 8)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{
        name: (partial(SS, 8, spatial_dims=2, mixer=name), MAP)
        for name in MIXERS
        if name not in ("attention", "identity")
    },
    **{f"hydra_{name}": (partial(Hydra, 8, state=4, head_dim=4, combine=name), TOKENS) for name in COMBINATIONS},
    "hydra_learned": (partial(Hydra, 8, state=4, head_dim=4, learned_state=True), TOKENS),
    "gated": (partial(SS, 8, spatial_dims=2, gate=True, state=3), MAP),
    "volume": (partial(SS, 8, spatial_dims=3), (1, 2, 3, 4, 8)),
    "mamba": (partial(Mamba, 8, mixer=BothDirections, state=3), TOKENS),
}
WIDE = {"routed_scan": ("dt_weight", "dt_bias", "A", "D"), "selective_scan": ("A",), "ssd_scan": ("dt", "A")}
"""Arguments of each operator that autocast must not narrow."""


class Scans(TorchDispatchMode):
    """Remembers the arguments of every scan, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "vision_ssm":
            names = (argument.name for argument in function._schema.arguments)
            self.calls.append((name, dict(zip(names, args, strict=False))))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_leaves_the_recurrence_in_float32(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape, requires_grad=True)
    with Scans() as scans, torch.autocast("cpu", dtype):
        y = layer(x)
    assert scans.calls
    for operator, arguments in scans.calls:
        assert all(arguments[wide].dtype == torch.float32 for wide in WIDE[operator])
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_leaves_the_eigenvalues_of_convs5_in_float32(dtype: torch.dtype) -> None:
    layer = ConvS5(8, state=8, output=partial(ResNetOutput, groups=2))
    with Scans() as scans, torch.autocast("cpu", dtype):
        layer(torch.randn(CLIP))
    decays = [arguments["a"] for operator, arguments in scans.calls if operator.startswith("linear")]
    assert decays
    assert all(decay.dtype == torch.float32 for decay in decays)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_slow_decay_is_not_rounded_to_none(dtype: torch.dtype) -> None:
    """Steps of about 1e-5, which half precision adds to a bias of -12 with an error of several percent."""
    channels, state, rank = 3, 2, 2
    x, low = (torch.randn(1, 6, 7, width).to(dtype) for width in (channels, 4 * (rank + 2 * state)))
    weight, bias = 0.3 * torch.randn(4, channels, rank), torch.full((4, channels), -12.0)
    A, D = -torch.rand(4, channels, state) - 0.5, torch.zeros(4, channels)
    wanted = routed_scan(*(m.double() for m in (x, low, weight, bias, A, D)), CROSS)
    y = routed_scan(x, low, weight, bias, A, D, CROSS)
    assert y.dtype == dtype
    assert_close(
        y.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=float(wanted.abs().max()) * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("narrow", [False, True], ids=["float32 weights", "half weights"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_sequential_scan_computes_in_float32(dtype: torch.dtype, narrow: bool) -> None:
    u, delta = torch.randn(2, 1, 3, 40).to(dtype)
    B, C = torch.randn(2, 1, 2, 40).to(dtype)
    weights = [-torch.rand(3, 2) - 0.5, torch.randn(3), torch.full((3,), -9.0)]
    A, D, bias = (m.to(dtype) for m in weights) if narrow else weights
    y = selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
    wide = selective_scan(*(m.double() for m in (u, delta, A, B, C, D)), delta_bias=bias.double(), delta_softplus=True)
    assert isinstance(y, Tensor)
    assert isinstance(wide, Tensor)
    eps = torch.finfo(dtype).eps
    assert_close(y.double(), wide, rtol=2 * eps, atol=float(wide.abs().max()) * eps)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_half_weights_is_near_the_same_in_float64(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    layer, x = make().to(dtype), torch.randn(shape).to(dtype)
    y = layer(x)
    wanted = layer.double()(x.double())
    assert y.dtype == dtype
    assert (y.double() - wanted).norm() < 8 * torch.finfo(dtype).eps * wanted.norm()
