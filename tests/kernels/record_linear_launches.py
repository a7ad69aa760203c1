"""Compiles the kernels of the linear recurrence for a GPU that need not be there, and says how they reach memory.

Of each launch: the kinds of its stores, and the barriers in each of its loops.

A program of its own, since Triton must not be in its interpreter's mode.
Prints a line of JSON for each.
"""

import json
import re
import sys

import torch
from record_launches import Driver  # its module turns the interpreter off
from triton.runtime import driver

from vision_ssm.kernels.linear_scan import gpu
from vision_ssm.kernels.linear_scan.cases import Case, make_inputs

CASES = {
    "state of ConvS5": (Case(2, 8, (16, 16, 256), (256,), pairs=True), torch.float32),
    "several runs, half precision": (Case(6, 2, (8, 64), (6, 2, 8, 64)), torch.bfloat16),
}


class Recorder:
    """A kernel that writes down what its launches were compiled to."""

    def __init__(self, kernel, case):
        self.kernel, self.case = kernel, case

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            ptx = self.kernel[grid](*arguments, **constants).asm["ptx"]
            loops = re.findall(r"^(\$L\w+):(.*?)bra(?:\.uni)?\s+\1;", ptx, re.MULTILINE | re.DOTALL)
            row = {
                "case": self.case,
                "kernel": self.kernel.__name__,
                "stores": re.findall(r"st\.global\S*", ptx),
                "loops": [body.count("bar.sync") for _, body in loops],
            }
            sys.stdout.write(json.dumps(row) + "\n")

        return launch


def main() -> None:
    driver.set_active(Driver(int(sys.argv[1])))
    kernels = gpu.scan_kernel, gpu.gradient_kernel, gpu.carry_kernel
    for name, (case, dtype) in CASES.items():
        gpu.scan_kernel, gpu.gradient_kernel, gpu.carry_kernel = (Recorder(kernel, name) for kernel in kernels)
        a, b, state = make_inputs(case, dtype, "cpu").values()
        resets = torch.zeros(case.length, case.batch, dtype=torch.bool)
        h, last = gpu.forward(a, b, state, resets, case.pairs)
        gpu.backward(h, last, a, h, state, resets, case.pairs)


if __name__ == "__main__":
    main()
