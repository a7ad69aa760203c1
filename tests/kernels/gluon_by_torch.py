"""Runs Gluon kernels without a GPU: their source, executed over PyTorch tensors, one program after the other.

Triton's interpreter knows no Gluon. Layouts are ignored here, so threads cannot be in each other's way; addresses,
masks, the order of asynchronous copies and the arithmetic are as on a GPU. Shared memory begins as NaN, a copy lands
when it is waited for, and an address outside its tensor is an error.
"""

import importlib.util
import inspect
import itertools
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import triton.experimental.gluon


class Tile(torch.Tensor):
    """A tensor in registers."""

    type = types.SimpleNamespace(layout=None)  # where it lies in them, which is not followed


def tile(value: Any, dtype: torch.dtype | None = None) -> Tile:
    return torch.as_tensor(value, dtype=dtype).as_subclass(Tile)


class Pointer:
    """Addresses in a tensor: the tensor and how far into it."""

    def __init__(self, memory: torch.Tensor, offset: Any = 0):
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, distance: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + distance)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        offset = torch.as_tensor(self.offset).as_subclass(torch.Tensor)
        mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.as_subclass(torch.Tensor)
        offset, mask = torch.broadcast_tensors(offset, mask)
        there = offset[mask]
        assert ((there >= 0) & (there < self.memory.numel())).all(), "an address outside its tensor"
        return torch.where(mask, offset, 0), mask

    def read(self, mask: Any, other: float) -> Tile:
        places, mask = self.places(mask)
        return tile(torch.where(mask, self.memory.view(-1)[places], torch.tensor(other, dtype=self.memory.dtype)))

    def write(self, value: torch.Tensor, mask: Any) -> None:
        places, mask = self.places(mask)
        written = places[mask]
        assert len(written.unique()) == len(written), "two threads write one address"
        assert value.dtype == self.memory.dtype, f"{value.dtype} is stored as {self.memory.dtype}"
        self.memory.view(-1)[written] = value.as_subclass(torch.Tensor).expand(mask.shape)[mask]


class Shared:
    """Shared memory."""

    def __init__(self, memory: torch.Tensor):
        self.memory, self.dtype, self.shape = memory, memory.dtype, list(memory.shape)

    def index(self, place: Any) -> "Shared":
        assert 0 <= int(place) < len(self.memory)
        return Shared(self.memory[int(place)])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.memory.narrow(dim, start, length))

    def permute(self, axes: list[int]) -> "Shared":
        return Shared(self.memory.permute(axes))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "Shared":
        assert (dtype, shape) == (self.dtype, self.shape)
        return self

    def load(self, layout: Any = None) -> Tile:
        return tile(self.memory.clone())

    def store(self, value: torch.Tensor) -> None:
        assert value.dtype == self.dtype and list(value.shape) == self.shape
        self.memory.copy_(value)


class Copies:
    """Asynchronous copies: groups of them that land in their order."""

    def __init__(self) -> None:
        self.open: list[Callable[[], Any]] = []
        self.groups: list[list[Callable[[], Any]]] = []

    def async_load(self, slot: Shared, pointer: Pointer, mask: Any = None) -> None:
        value = pointer.read(mask, 0)
        slot.memory.fill_(torch.nan if slot.dtype.is_floating_point else -(2**31))
        self.open.append(lambda: slot.memory.copy_(value))

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, left: int) -> None:
        landed, self.groups = self.groups[: len(self.groups) - left], self.groups[len(self.groups) - left :]
        for copy in itertools.chain.from_iterable(landed):
            copy()


def mma_v2(a: Tile, b: Tile, acc: Tile) -> Tile:
    assert a.dtype == b.dtype and acc.dtype == torch.float32
    return a.float() @ b.float() + acc


class Kernel:
    """A kernel that is launched as Triton's are, over any grid."""

    def __init__(self, function: Callable[..., None], machine: "Machine"):
        self.function, self.machine = function, machine
        self.__name__ = function.__name__
        self.arg_names = list(inspect.signature(function).parameters)

    def __call__(self, *arguments: Any, **constants: Any) -> Any:
        return self.function(*arguments, **constants)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            if "W" in constants:
                assert constants["W"] == num_warps
            given = [Pointer(m) if isinstance(m, torch.Tensor) else tile(m) for m in arguments]
            self.machine.grid = grid
            for place in itertools.product(*map(range, reversed(grid))):
                self.machine.place = place[::-1]
                self.function(*given, **constants)

        return launch


class Machine:
    """The GPU: the grid of the launch, the program at work, and the dialect as modules."""

    def __init__(self) -> None:
        self.grid: tuple[int, ...] = ()
        self.place: tuple[int, ...] = ()
        self.copies = Copies()

    def language(self) -> types.ModuleType:
        gl = types.ModuleType("language")
        for name in ("float16", "bfloat16", "float32", "int32", "int64"):
            setattr(gl, name, getattr(torch, name))
        for name in (
            "BlockedLayout",
            "SliceLayout",
            "NVMMADistributedLayout",
            "DotOperandLayout",
            "SwizzledSharedLayout",
        ):
            setattr(gl, name, lambda *sizes: None)
        gl.constexpr = lambda value: value
        gl.static_range = range
        gl.program_id = lambda axis: tile(self.place[axis])
        gl.num_programs = lambda axis: tile(self.grid[axis])
        gl.cdiv = lambda a, b: (a + b - 1) // b
        gl.arange = lambda start, end, layout: tile(torch.arange(start, end))
        gl.full = lambda shape, value, dtype, layout=None: tile(torch.full(shape, value, dtype=dtype))
        gl.zeros = lambda shape, dtype, layout=None: tile(torch.zeros(shape, dtype=dtype))
        gl.load = lambda pointer, mask=None, other=0.0: pointer.read(mask, other)
        gl.store = lambda pointer, value, mask=None: pointer.write(value, mask)
        gl.allocate_shared_memory = lambda dtype, shape, layout: Shared(
            torch.full(shape, torch.nan if dtype.is_floating_point else -(2**31), dtype=dtype)
        )
        gl.convert_layout = lambda value, layout, assert_trivial=False: value
        gl.split = lambda value: value.unbind(-1)
        gl.join = lambda a, b: torch.stack([a, b], dim=-1)
        gl.sum = lambda value, axis: value.sum(axis)
        gl.where = lambda condition, a, b: torch.where(condition, a, b)
        gl.exp2, gl.abs = torch.exp2, torch.abs
        gl.minimum = lambda a, b: torch.minimum(*torch.broadcast_tensors(tile(a), tile(b).to(tile(a).dtype)))
        gl.maximum = lambda a, b: torch.maximum(*torch.broadcast_tensors(tile(a), tile(b).to(tile(a).dtype)))
        gl.barrier = lambda: None
        return gl

    def dialect(self) -> dict[str, types.ModuleType]:
        """The modules of ``triton.experimental.gluon`` that this machine takes the place of."""

        def jit(function: Any = None, *, do_not_specialize: Any = ()) -> Any:
            return (lambda inner: Kernel(inner, self)) if function is None else Kernel(function, self)

        gluon, ampere = types.ModuleType("gluon"), types.ModuleType("ampere")
        gluon.jit, gluon.constexpr_function, gluon.language = jit, lambda function: function, self.language()
        ampere.async_copy, ampere.mma_v2 = self.copies, mma_v2
        root = "triton.experimental.gluon"
        return {root: gluon, f"{root}.language": gluon.language, f"{root}.language.nvidia.ampere": ampere}


def kernels() -> dict[str, Kernel]:
    """The kernels of the routed scan on such a machine, by name."""
    dialect = Machine().dialect()
    package = "vision_ssm.kernels.routed_scan"
    importlib.import_module(f"{package}.gpu_blocks")  # with all that it needs: what is imported below is forgotten
    found = {}
    with (
        mock.patch.dict(sys.modules, dialect),
        mock.patch.object(triton.experimental, "gluon", dialect["triton.experimental.gluon"]),
    ):
        for name in ("gpu_block_parts", "gpu_block_kernels", "gpu_pair_kernels"):
            spec = importlib.util.find_spec(f"{package}.{name}")
            sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found.update({name: value for name, value in vars(module).items() if isinstance(value, Kernel)})
    return found
