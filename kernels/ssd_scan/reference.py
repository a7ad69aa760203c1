"""The recurrence of the scalar-decay scan, step by step: the definition that every backend is compared with."""

import torch
from torch import Tensor


def ssd_scan_ref(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_tᵀ,  y_t = S_t C_t   (Mamba-2, arXiv:2405.21060, section 6).

    Shapes: x (b, l, h, p); dt (b, l, h); A (h); B, C (b, l, g, n); states (b, h, p, n). Returns y and the last state.
    """
    batch, length, heads, width = x.shape
    B, C = (m.repeat_interleave(heads // m.shape[2], dim=2) for m in (B, C))
    state = x.new_zeros(batch, heads, width, B.shape[3]) if initial_state is None else initial_state
    decay = torch.exp(dt * A)
    outputs: list[Tensor] = [x] * length
    for t in reversed(range(length)) if reverse else range(length):
        entering = torch.einsum("bhp,bhn->bhpn", dt[:, t, :, None] * x[:, t], B[:, t])
        state = decay[:, t, :, None, None] * state + entering
        outputs[t] = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
    return torch.stack(outputs, dim=1), state
