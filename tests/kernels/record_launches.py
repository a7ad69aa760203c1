"""Runs the Gluon path of the routed scan without a GPU: kernels are compiled for one, and launches are written down.

A program of its own, since Triton must not be in its interpreter's mode. Prints a line of JSON for each case: the
programs that were launched, and whether a second call launched the same ones with the same arguments.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vision_ssm.kernels import ATROUS, BIDIRECTIONAL, CROSS
from vision_ssm.kernels.routed_scan import gpu_blocks
from vision_ssm.kernels.routed_scan.cases import Case, make_inputs

CASES = {
    "pairs": (Case(2, (5, 7), 96, 1, 6, CROSS), torch.float16),
    "pairs, cut": (Case(1, (40, 40), 64, 1, 12, CROSS), torch.bfloat16),
    "one pair, ragged channels": (Case(2, (6, 4), 40, 1, 2, BIDIRECTIONAL), torch.float16),
    "direct": (Case(2, (4, 6), 64, 1, 48, ATROUS), torch.float16),
    "several states, cut": (Case(1, (20, 20), 32, 16, 6, BIDIRECTIONAL), torch.bfloat16),
    "several states": (Case(64, (4, 4), 96, 4, 4, CROSS), torch.float16),
}

launches = []
known = {}


class Launcher:
    """Writes down a launch. Tensors, given themselves or by address, are named in the order in which they appear."""

    def __init__(self, source, metadata):
        self.name = source.fn.__name__
        self.pointers = [kind.startswith("*") for kind in source.signature.values()]

    def __call__(self, grid_0, grid_1, grid_2, stream, function, metadata, launch_metadata, enter, leave, *args):
        arguments = [self.named(m) if pointer else m for m, pointer in zip(args, self.pointers, strict=True)]
        launches.append((self.name, (grid_0, grid_1, grid_2), stream, arguments))

    def named(self, m):
        address = m.data_ptr() if isinstance(m, torch.Tensor) else m
        assert address and address % 16 == 0
        return known.setdefault(address, f"tensor {len(known)}")


class Utils:
    def load_binary(self, name, binary, shared, device):
        return 1, 2, 255, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 163 * 2**10, "multiprocessor_count": 108}


class Driver:
    """What Triton asks of a device."""

    utils, launcher_cls = Utils(), Launcher

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


class Kept(TorchDispatchMode):
    """Keeps every tensor, so that no two have one address."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.tensors.append(function(*args, **(kwargs or {})))
        return self.tensors[-1]


def shifted(m):
    """The same values, two bytes further on."""
    return torch.cat([m.new_zeros(1), m.flatten()])[1:].view(m.shape)


def main() -> None:
    driver.set_active(Driver(int(sys.argv[1])))
    gpu_blocks.multiprocessors = lambda device: 108
    case, dtype = CASES["one pair, ragged channels"]
    x, low_rank, *weights = make_inputs(case, dtype, "cpu").values()
    gpu_blocks.forward(shifted(x), shifted(low_rank), *weights, case.routes)
    gpu_blocks.backward(shifted(x), shifted(x), shifted(low_rank), *weights, case.routes)
    for name, (case, dtype) in CASES.items():
        inputs = list(make_inputs(case, dtype, "cpu").values())
        calls = []
        for _ in range(2):
            launches.clear()
            known.clear()
            with Kept():
                gpu_blocks.forward(*inputs, case.routes)
                gpu_blocks.backward(torch.ones_like(inputs[0]), *inputs, case.routes)
            calls.append(list(launches))
        row = {"case": name, "programs": [launch[0] for launch in calls[0]], "same": calls[0] == calls[1]}
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
