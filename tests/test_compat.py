"""mamba_ssm's selective_scan_fn on our operators: its semantics, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vision_ssm.compat import selective_scan_fn


def mamba(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The definition, step by step in float32: (b, d, l) and B, C in any of their three shapes."""
    dtype, (u, delta) = u.dtype, (u.float(), delta.float())
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    (batch, dim, length), state = u.shape, A.shape[1]

    def per_step(m):
        if m.dim() == 2:
            return m.float()[None, :, :, None].expand(batch, dim, state, length)
        m = m.float()[:, None] if m.dim() == 3 else m.float()
        return m.repeat_interleave(dim // m.shape[1], dim=1)

    B, C = per_step(B), per_step(C)
    h, ys = torch.zeros(batch, dim, state), []
    for t in range(length):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z.float())).to(dtype), h


def arguments(shape, groups=None, constant=(), dtype=torch.float32):
    batch, dim, length, state = shape
    per_step = (batch, state, length) if groups is None else (batch, groups, state, length)
    shapes = {"B": per_step, "C": per_step, **dict.fromkeys(constant, (dim, state))}
    return {
        "u": torch.randn(batch, dim, length, dtype=dtype),
        "delta": torch.randn(batch, dim, length, dtype=dtype),
        "A": -torch.rand(dim, state) - 0.1,
        **{name: torch.randn(size).to(torch.float32 if len(size) == 2 else dtype) for name, size in shapes.items()},
        "D": torch.randn(dim),
        "z": torch.randn(batch, dim, length, dtype=dtype),
        "delta_bias": torch.randn(dim) - 2,
        "delta_softplus": True,
    }


@pytest.mark.parametrize(
    ("groups", "constant"),
    [(None, ()), (2, ()), (None, ("B",)), (None, ("C",)), (None, ("B", "C"))],
    ids=["variable", "grouped", "constant B", "constant C", "both constant"],
)
@pytest.mark.parametrize("drop", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias", "delta_softplus")])
def test_equals_the_definition(groups, constant, drop):
    inputs = {name: m for name, m in arguments((2, 4, 7, 3), groups, constant).items() if name not in drop}
    if "delta_softplus" in drop:
        inputs["delta"] = inputs["delta"].abs()
    y, last = selective_scan_fn(**inputs, return_last_state=True)
    want, want_last = mamba(**inputs)
    assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert_close(last, want_last, rtol=1e-5, atol=1e-5)
    assert torch.equal(selective_scan_fn(**inputs), y)


def test_positions_are_mamba_ssms():
    inputs = arguments((1, 2, 5, 1))
    assert_close(selective_scan_fn(*inputs.values()), mamba(**inputs)[0], rtol=1e-5, atol=1e-5)
    assert len(selective_scan_fn(*inputs.values(), True)) == 2


def test_gradients():
    inputs = {name: m.requires_grad_() if torch.is_tensor(m) else m for name, m in arguments((2, 4, 6, 2)).items()}
    leaves = [m for m in inputs.values() if torch.is_tensor(m)]
    have = torch.autograd.grad(selective_scan_fn(**inputs).square().sum(), leaves)
    want = torch.autograd.grad(mamba(**inputs)[0].square().sum(), leaves)
    for name, ours, theirs in zip(inputs, have, want, strict=False):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_half_precision_and_mixed_maps():
    inputs = arguments((2, 4, 9, 2), dtype=torch.bfloat16)
    inputs["delta"], inputs["B"] = inputs["delta"].float(), inputs["B"].half()
    y, last = selective_scan_fn(**inputs, return_last_state=True)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert_close(y.float(), mamba(**inputs)[0].float(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C"])
def test_complex_is_refused(name):
    inputs = arguments((1, 2, 5, 2))
    inputs[name] = inputs[name].to(torch.complex64)
    with pytest.raises(ValueError, match=f"{name} is torch.complex64; only real"):
        selective_scan_fn(**inputs)
