"""Compiles the kernels of the group norm for a GPU that need not be there, and says how they reach memory.

A program of its own, since Triton must not be in its interpreter's mode.
Prints a line of JSON for each launch: how wide its widest access to memory is.
"""

import json
import re
import sys

import torch
from record_launches import Driver  # its module turns the interpreter off
from triton.runtime import driver

from vision_ssm.kernels.group_norm import gpu

KERNELS = "moments_kernel", "output_kernel", "sums_kernel", "gradient_kernel"
CASES = {
    "ConvS5": ((2, 256, 16, 16), 32, "gelu_tanh"),
    "encoder": ((2, 64, 64, 64), 32, "elu"),
    "ragged": ((2, 15, 5, 7), 3, "elu"),
}


class Recorder:
    """A kernel that writes down what its launches were compiled to."""

    def __init__(self, kernel, case):
        self.kernel, self.case = kernel, case

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            ptx = self.kernel[grid](*arguments, **constants).asm["ptx"]
            widths = re.findall(r"(?:ld|st)\.global\S*?\.(v\d)?\.?b\d+", ptx)
            row = {"case": self.case, "kernel": self.kernel.__name__, "widest": max(widths)}
            sys.stdout.write(json.dumps(row) + "\n")

        return launch


def main() -> None:
    driver.set_active(Driver(int(sys.argv[1])))
    kernels = [getattr(gpu, name) for name in KERNELS]
    for case, (shape, groups, activation) in CASES.items():
        for name, kernel in zip(KERNELS, kernels, strict=True):
            setattr(gpu, name, Recorder(kernel, case))
        x = torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.zeros(shape[1]), torch.zeros(shape[1])
        y, mean, rstd = gpu.forward(x, groups, weight, bias, 1e-6, activation)
        gpu.backward(y, x, weight, bias, mean, rstd, activation)


if __name__ == "__main__":
    main()
