"""The linear recurrence over time, step by step: the definition that every backend is compared with."""

import torch
from torch import Tensor


def linear_scan_ref(
    a: Tensor, b: Tensor, initial_state: Tensor | None = None, resets: Tensor | None = None, pairs: bool = False
) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t, with h_{t-1} = 0 where ``resets`` holds at t.

    Shapes: b (t, n, ...), with ``pairs`` (t, n, ..., 2); a broadcasts against b; initial_state (n, ...); resets (t, n).
    Returns h like b, and the last state.
    """
    if pairs:
        a, b = torch.view_as_complex(a), torch.view_as_complex(b)
        initial_state = None if initial_state is None else torch.view_as_complex(initial_state)
    state = torch.zeros_like(b[0]) if initial_state is None else initial_state
    a = a.expand(b.shape)
    states = []
    for t in range(len(b)):
        if resets is not None:
            stop = resets[t].view(-1, *[1] * (state.dim() - 1))
            state = torch.where(stop, torch.zeros_like(state), state)
        state = a[t] * state + b[t]
        states.append(state)
    h = torch.stack(states)
    return (torch.view_as_real(h), torch.view_as_real(state)) if pairs else (h, state)
