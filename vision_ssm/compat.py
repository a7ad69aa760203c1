"""mamba_ssm's function signatures on this package's operators.

Code written for mamba_ssm, such as U-Mamba's, Vim's or SegMamba's, runs after one import is changed::

    from vision_ssm.compat import selective_scan_fn  # was: from mamba_ssm.ops.selective_scan_interface import ...
"""

import torch
from torch import Tensor

from .kernels import selective_scan

__all__ = ["selective_scan_fn"]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan with the signature and semantics of ``mamba_ssm.ops.selective_scan_interface.selective_scan_fn``.

    Differentiable in every tensor, on a CPU as well. The maps are brought to u's dtype; the last state is float32 and,
    as there, takes no part in the gradient. See :func:`vision_ssm.kernels.selective_scan` for one that does, and for
    an initial state.

    Args:
        u: input, (b, d, l).
        delta: step sizes, (b, d, l).
        A: (d, n), real.
        B, C: (b, n, l), (b, g, n, l) with g groups of channels, or constant (d, n).
        D: skip weights, (d,).
        z: gate, (b, d, l).
        delta_bias: (d,).
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step, (b, d, n).

    Raises:
        ValueError: a tensor is complex, or shapes and devices do not fit.
    """
    for name, m in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C), ("z", z)):
        if m is not None and m.is_complex():
            raise ValueError(
                f"selective_scan_fn: {name} is {m.dtype}; only real tensors are supported, as in every published "
                "vision model. Use real ones, or keep mamba_ssm for this layer"
            )
    delta, B, C = (m.to(u.dtype) for m in (delta, B, C))
    z = None if z is None else z.to(u.dtype)
    scanned = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=True)
    assert isinstance(scanned, tuple)
    y, last = scanned
    return (y, last.detach().to(torch.float32)) if return_last_state else y
