"""State-space layers whose state is a feature map: ConvS5.

Smith et al., "Convolutional State Space Models for Long-Range Spatiotemporal Modeling", NeurIPS 2023,
arXiv:2310.19694. Differences from the release: complex numbers are pairs of real ones, so that mixed precision and
compilation work, and exp(λΔ) - 1 is taken without cancellation.
"""
# Shapes: t frames, b clips, h rows, w columns, c channels, p complex states: half of the real size; the other half of
# the spectrum is its conjugate and is not stored. A complex tensor ends in a pair, as torch.view_as_real makes it.

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.kernels import linear_scan
from vision_ssm.kernels.pairs import multiply

from .convs5_outputs import ResNetOutput
from .over_time import EPS, check_clip

__all__ = [
    "LARGEST_REAL",
    "ConvS5",
    "ConvS5Layer",
    "ConvSSM",
    "DiscreteConvSSM",
    "check_reset",
    "discrete",
    "hippo_legs",
]

LARGEST_REAL = -1e-4  # of an eigenvalue, where they are clipped


_M = TypeVar("_M", bound=nn.Module)


def hippo_legs(state: int, blocks: int = 1) -> tuple[Tensor, Tensor]:
    """Spectrum of the normal part of HiPPO-LegS, block-diagonal (arXiv:2208.04933, section 4.3 and appendix B.1).

    Args:
        state: real size s of the state.
        blocks: equal blocks on the diagonal.

    Returns:
        Eigenvalues with negative imaginary part, (s / 2,), ascending in each block, and their orthonormal eigenvectors,
        (s, s / 2); complex128. The conjugates are the other half.

    Raises:
        ValueError: ``state`` is no multiple of twice ``blocks``.
    """
    if blocks < 1 or state < 1 or state % (2 * blocks):
        raise ValueError(f"state must be a positive multiple of 2 * blocks; got state={state}, blocks={blocks}")
    size = state // blocks
    root = torch.sqrt(torch.arange(size, dtype=torch.float64, device="cpu") + 0.5)
    above = torch.outer(root, root).triu(1)
    skew = above - above.T  # the normal part is skew - 1 / 2
    frequency, vectors = torch.linalg.eigh(-1j * skew)
    kept = size // 2
    values = torch.complex(torch.full_like(frequency[:kept], -0.5), frequency[:kept])
    return values.repeat(blocks), torch.block_diag(*[vectors[:, :kept]] * blocks)


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolution that keeps the size of maps (n, h, w, c), zero outside; ``kernel`` as conv2d takes it."""
    padding = kernel.shape[-1] // 2
    return F.conv2d(x.movedim(-1, 1), kernel.to(x.dtype), padding=padding).movedim(1, -1)


def check_reset(reset: Tensor | None, first: int, second: int) -> None:
    """Raises ValueError unless the resets, if there are any, are boolean and of these two axes."""
    if reset is not None and (reset.shape != (first, second) or reset.dtype != torch.bool):
        raise ValueError(f"reset must be boolean of shape {(first, second)}; got {reset.dtype} {tuple(reset.shape)}")


class ConvSSM(nn.Module):
    """x_t = Λ̄ x_{t-1} + B̄ * u_t and y_t = 2 Re(C * x_t), with convolutions B̄ and C (section 3).

    Args:
        dim: channels c in and out.
        state: real size 2 p of the state at each place.
        blocks: blocks of the initial spectrum.
        kernels: sizes of the kernels B and C, odd.
        clip_eigenvalues: keep real parts at -1e-4 or below, which keeps the recurrence stable.

    Shapes: u (t, b, h, w, c) and state (b, h, w, p, 2) -> y (t, b, h, w, c) and the last state.

    Raises:
        ValueError: an even kernel, or ``state`` no multiple of twice ``blocks``.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int,
        blocks: int = 1,
        kernels: tuple[int, int] = (3, 3),
        clip_eigenvalues: bool = True,
    ) -> None:
        super().__init__()
        if any(size % 2 == 0 for size in kernels):
            raise ValueError(f"kernels must be odd, so that maps keep their size; got {kernels}")
        self.dim, self.state, self.blocks, self.clip_eigenvalues = dim, state, blocks, clip_eigenvalues
        k_in, k_out = kernels
        self.lambda_re = nn.Parameter(torch.empty(state // 2))
        self.lambda_im = nn.Parameter(torch.empty(state // 2))
        self.log_step = nn.Parameter(torch.empty(state // 2))
        self.B = nn.Parameter(torch.empty(state // 2, dim, k_in, k_in, 2))
        self.C = nn.Parameter(torch.empty(dim, state // 2, k_out, k_out, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As released: HiPPO-LegS, He-normal B and C in its eigenbasis, Δ log-uniform in [0.001, 0.1]."""
        if self.B.is_meta:  # all would be computed in vain
            return
        values, vectors = hippo_legs(self.state, self.blocks)
        inward = torch.empty(vectors.shape[0], *self.B.shape[1:-1], dtype=torch.float64, device="cpu")
        outward = torch.empty(self.dim, vectors.shape[0], *self.C.shape[2:-1], dtype=torch.float64, device="cpu")
        for kernel in (inward, outward):
            nn.init.kaiming_normal_(kernel, nonlinearity="relu")
        with torch.no_grad():
            self.lambda_re.copy_(values.real)
            self.lambda_im.copy_(values.imag)
            self.log_step.uniform_(math.log(1e-3), math.log(1e-1))
            self.B.copy_(torch.view_as_real(torch.einsum("sp, sckl -> pckl", vectors.conj(), inward.to(vectors.dtype))))
            self.C.copy_(torch.view_as_real(torch.einsum("sp, cskl -> cpkl", vectors, outward.to(vectors.dtype))))

    def discretise(self) -> tuple[Tensor, Tensor]:
        """Λ̄ = exp(λΔ), (p, 2), and the kernel of B̄ = (Λ̄ - 1) / λ B, (2 p, c, k, k); at least float32."""
        wide = torch.promote_types(self.log_step.dtype, torch.float32)
        re, im, step = (m.to(wide) for m in (self.lambda_re, self.lambda_im, self.log_step))
        if self.clip_eigenvalues:
            re = re.clamp(max=LARGEST_REAL)
        step = step.exp()
        size, angle = torch.exp(re * step), im * step
        decay = torch.stack([size * angle.cos(), size * angle.sin()], dim=-1)
        # exp(a + ib) - 1 without subtracting near-equal numbers: Δ is small
        moved_re = torch.expm1(re * step) * angle.cos() - 2 * torch.sin(angle / 2) ** 2
        moved = torch.stack([moved_re, decay[:, 1]], dim=-1)
        inverse = torch.stack([re, -im], dim=-1) / (re**2 + im**2)[:, None]
        kernel = multiply(multiply(moved, inverse)[:, None, None, None], self.B.to(wide))
        return decay, kernel.movedim(-1, 1).flatten(0, 1)

    def readout(self) -> Tensor:
        """The kernel of 2 Re(C * x), (c, 2 p, k, k): real and imaginary parts are channels in turn."""
        re, im = self.C.unbind(-1)
        return torch.stack([2 * re, -2 * im], dim=2).flatten(1, 2)

    def forward(self, u: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _recur(u, state, reset, *self.discretise(), self.readout())


class DiscreteConvSSM(nn.Module):
    """A :class:`ConvSSM` discretised once, from its weights as they are now; it neither learns nor follows them.

    Shapes: as there.
    """

    decay: Tensor
    inward: Tensor
    outward: Tensor

    @torch.no_grad()
    def __init__(self, ssm: ConvSSM) -> None:
        super().__init__()
        decay, inward = ssm.discretise()
        self.register_buffer("decay", decay)
        for name, kernel in {"inward": inward.to(ssm.B.dtype), "outward": ssm.readout()}.items():
            self.register_buffer(name, kernel.contiguous(memory_format=torch.channels_last))  # as the maps are

    def forward(self, u: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _recur(u, state, reset, self.decay, self.inward, self.outward)


def discrete(module: _M) -> _M:
    """The module with every :class:`ConvSSM` in it discretised, for rollouts: each frame would do so anew.

    Modules that hold one are copied; all else, weights too, is shared with ``module``, which stays as it is.
    """
    if not any(isinstance(part, ConvSSM) for part in module.modules()):
        return module
    twin = copy.copy(module)
    twin._modules = {
        name: DiscreteConvSSM(part) if isinstance(part, ConvSSM) else part and discrete(part)
        for name, part in module._modules.items()
    }
    return twin


def _recur(
    u: Tensor, state: Tensor | None, reset: Tensor | None, decay: Tensor, inward: Tensor, outward: Tensor
) -> tuple[Tensor, Tensor]:
    """The clip through kernel, recurrence and kernel; see :class:`ConvSSM` for shapes and errors."""
    frames, clips, *grid = check_clip(u, outward.shape[0])
    shape = (clips, *grid, len(decay), 2)
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(
            f"the state must have shape {shape} (clips, height, width, complex states, 2); "
            f"got {tuple(state.shape)}. Pass a state that this layer returned for maps of this size"
        )
    check_reset(reset, frames, clips)
    entering = _convolve(u.flatten(0, 1), inward).reshape(frames, *shape)
    x, last = linear_scan(decay, entering, initial_state=state, resets=reset, pairs=True)
    return _convolve(x.flatten(0, 1).flatten(-2), outward).reshape(u.shape), last


class ConvS5(nn.Module):
    """The convolutional state-space model and its non-linear output block.

    Args:
        dim: channels c in and out.
        state: real size 2 p of the state at each place.
        blocks: blocks of the initial spectrum.
        kernels: sizes of the kernels B and C, odd.
        clip_eigenvalues: keep real parts at -1e-4 or below.
        output: makes the output block, as output(dim): :class:`ResNetOutput`, or ``partial`` of one of the others.

    Shapes: u (t, b, h, w, c), state (b, h, w, p, 2) or none for zeros, and reset (t, b), true where a new clip begins
    in the row -> (t, b, h, w, c) and the last state. Frames may come in pieces of any length, with the state between.

    Raises:
        ValueError: sizes that do not fit; said by name.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int,
        blocks: int = 1,
        kernels: tuple[int, int] = (3, 3),
        clip_eigenvalues: bool = True,
        output: Callable[[int], nn.Module] = ResNetOutput,
    ) -> None:
        super().__init__()
        self.ssm = ConvSSM(dim, state=state, blocks=blocks, kernels=kernels, clip_eigenvalues=clip_eigenvalues)
        self.output = output(dim)

    def forward(self, u: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, state = self.ssm(u, state, reset)
        maps = self.output(*(m.flatten(0, 1).movedim(-1, 1) for m in (y, u)))
        return maps.movedim(1, -1).reshape(u.shape), state

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One frame: x (b, h, w, c) and state (b, h, w, p, 2) -> (b, h, w, c) and the next state."""
        y, state = self(x[None], state)
        return y[0], state


class ConvS5Layer(nn.Module):
    """ConvS5 with a skip connection and a norm: norm(u + mixer(u)), or u + mixer(norm(u)) with ``prenorm``.

    Args:
        mixer: the ConvS5.
        prenorm: normalise what enters, not what leaves.

    Shapes: as :class:`ConvS5`.
    """

    def __init__(self, mixer: ConvS5, *, prenorm: bool = False) -> None:
        super().__init__()
        self.mixer, self.prenorm = mixer, prenorm
        self.norm = nn.LayerNorm(mixer.ssm.dim, eps=EPS)

    def forward(self, u: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, state = self.mixer(self.norm(u) if self.prenorm else u, state, reset)
        return (u + y if self.prenorm else self.norm(u + y)), state
