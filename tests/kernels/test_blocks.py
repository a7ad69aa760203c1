"""The part of the routed scan that only a GPU can run: what can be said of it without one.

Its results are compared with the reference by tests/kernels/test_routed_scan.py, on a GPU.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vision_ssm.kernels import ATROUS, AXIAL_3D, BIDIRECTIONAL, CROSS, HILBERT, ROW, Route, atrous, routed_scan

pytest.importorskip("triton")
from vision_ssm.kernels.routed_scan import gpu_blocks
from vision_ssm.kernels.routed_scan.cases import Case, make_inputs
from vision_ssm.kernels.routes import COLUMN, ROW_BACK

if not gpu_blocks.HAS_GLUON:
    pytest.skip("this Triton has no Gluon", allow_module_level=True)

from vision_ssm.kernels.routed_scan.gpu_block_kernels import carry_kernel, merge_kernel

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_and_are_launched_again_with_the_same_arguments(capability):
    program = Path(__file__).with_name("record_launches.py")
    run = subprocess.run(
        [sys.executable, str(program), str(capability)], capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr
    rows = {row["case"]: row for row in map(json.loads, run.stdout.splitlines())}
    assert all(row["same"] for row in rows.values())
    assert rows["pairs"]["programs"].count("pair_walk_kernel") == 2
    assert rows["pairs, cut"]["programs"].count("pair_kernel") == 2
    assert rows["pairs, cut"]["programs"].count("pair_gradient_kernel") == 2
    assert "merge_kernel" not in rows["direct"]["programs"]
    assert rows["pairs, cut"]["programs"].count("carry_kernel") == 3
    assert len(rows) == 6


def test_a_reversed_route_has_its_missing_steps_in_front():
    table = gpu_blocks.order_table(CROSS, (3, 2), 16, torch.device("cpu"))
    row, _, back, _ = table
    assert row.tolist() == [*range(6), *[-1] * 10]
    assert torch.equal(back, row.flip(0))


def test_pairs_of_routes():
    assert gpu_blocks.pairs(CROSS, (4, 5)) == [(0, 2), (1, 3)]
    assert gpu_blocks.pairs(AXIAL_3D, (2, 3, 4)) == [(0, 3), (1, 4), (2, 5)]
    assert gpu_blocks.pairs(BIDIRECTIONAL[::-1], (3, 3)) == [(1, 0)]
    assert gpu_blocks.pairs(ATROUS, (4, 6)) is None
    assert gpu_blocks.pairs((ROW,), (4, 6)) is None
    assert gpu_blocks.pairs(HILBERT, (4, 6)) is not None
    assert gpu_blocks.pairs((ROW, replace(ROW_BACK, hilbert=True)), (4, 6)) is None
    assert gpu_blocks.pairs((ROW, ROW), (4, 6)) is None


def test_tensors_on_a_cpu_are_not_served():
    half = torch.zeros(1, 2, 2, 8, dtype=torch.float16)
    assert not gpu_blocks.serves(half, half, torch.zeros(1, 8, 2), torch.zeros(1, 8, 1))


@ON_CPU
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("segments", [2, 5, 9])
def test_carry_hands_each_segment_what_comes_into_it(segments, back):
    routes, samples, state, channels = 2, 3, 2, 5
    total = torch.rand(routes, samples, segments, channels)
    left = torch.randn(routes, samples, segments, state, channels)
    A = -torch.rand(state, routes, channels)
    expected, h = torch.empty_like(left), torch.zeros(routes, samples, state, channels)
    for segment in reversed(range(segments)) if back else range(segments):
        expected[:, :, segment] = h
        decay = torch.exp2(total[:, :, segment, None] * A.transpose(0, 1)[:, None])
        h = decay * h + left[:, :, segment]
    grid = (routes * samples * state * 2,)
    carry_kernel[grid](
        total, left, A, segments, channels, state, samples, routes, BACK=back, BLOCK_S=4, BLOCK_D=4
    )  # fmt: skip
    torch.testing.assert_close(left, expected)


@ON_CPU
@pytest.mark.parametrize("count", [1, 3])
def test_merge_adds_maps(count):
    parts, out = torch.randn(count, 37), torch.empty(37, dtype=torch.float16)
    merge_kernel[(3,)](parts, out, count, 37, BLOCK=16)
    assert torch.equal(out, parts.sum(0).half())


@pytest.fixture
def capable_gpu(monkeypatch):
    """A GPU as far as questions about it go."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    gpu_blocks._obstacle.cache_clear()
    gpu_blocks._tell.cache_clear()
    yield torch.device("cuda")
    gpu_blocks._obstacle.cache_clear()
    gpu_blocks._tell.cache_clear()


@pytest.mark.parametrize(
    ("same_dtype", "sizes", "small", "said"),
    [
        (True, (96, 6, 1), True, None),
        (True, (32, 6, 16), True, None),
        (False, (96, 6, 1), True, "cast"),
        (True, (97, 6, 1), True, "97 channels"),
        (True, (96, 5, 1), True, None),
        (True, (96, 6, 5), True, "state size 5 is odd"),
        (True, (96, 64, 1), True, "rank 64"),
        (True, (96, 6, 1), False, "2\\^31"),
    ],
)
def test_what_keeps_a_map_from_the_fast_kernels_is_said(same_dtype, sizes, small, said, capable_gpu):
    obstacle = gpu_blocks._obstacle(same_dtype, sizes, small, capable_gpu)
    assert obstacle is None if said is None else re.search(said, obstacle)


def test_a_slower_kernel_is_told_of_once_or_is_an_error(monkeypatch, capable_gpu):
    with pytest.warns(UserWarning, match="slower Triton kernels for a half-precision map: 97 channels"):
        gpu_blocks._tell("97 channels")
    gpu_blocks._tell("97 channels")  # a second warning would be an error here
    monkeypatch.setenv("VSSM_STRICT_BACKEND", "1")
    with pytest.raises(RuntimeError, match=r"98 channels.*VSSM_STRICT_BACKEND"):
        gpu_blocks._tell("98 channels")


ON_GPU = {
    "pairs": Case(2, (13, 37), 96, 1, 6),
    "pairs, uncut": Case(300, (5, 7), 192, 1, 12),
    "pairs, cut often": Case(1, (257, 263), 96, 1, 6),
    "one cell": Case(1, (1, 1), 96, 1, 6),
    "one pair": Case(2, (40, 41), 64, 1, 6, BIDIRECTIONAL),
    "volume": Case(2, (5, 14, 7), 64, 1, 12, AXIAL_3D),
    "no pairs": Case(2, (12, 20), 64, 1, 6, (ROW_BACK, ROW, COLUMN)),
    "direct": Case(2, (12, 20), 64, 1, 6, ATROUS),
    "direct, shared columns": Case(2, (12, 21), 64, 1, 6, atrous(3), shared=True),
    "not all cells": Case(2, (12, 20), 64, 1, 6, (Route((0, 1), stride=2), Route((1, 0), stride=2))),
    "curve": Case(2, (12, 20), 64, 1, 6, HILBERT),
    "few channels": Case(2, (24, 20), 8, 1, 2),
    "many channels": Case(2, (24, 20), 768, 1, 48),
    "16 states": Case(2, (14, 20), 32, 16, 6, BIDIRECTIONAL),
    "16 states, shared columns": Case(200, (8, 8), 96, 16, 6, ATROUS, shared=True),
    "64 states": Case(1, (9, 8), 40, 64, 4),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Gluon has no interpreter; the rest is above")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 6e-3)], ids=["float16", "bfloat16"]
)
@pytest.mark.parametrize("name", ON_GPU)
def test_equals_the_float64_operator(name, dtype, tolerance, monkeypatch):
    """The float64 operator runs other kernels. The second call launches kept programs; both are equal bit for bit."""
    monkeypatch.setenv("VSSM_STRICT_BACKEND", "1")
    case = ON_GPU[name]
    inputs = [m.requires_grad_() for m in make_inputs(case, dtype, "cuda").values()]
    exact = [m.detach().double().requires_grad_() for m in inputs]
    dy = torch.randn_like(inputs[0])

    def run(leaves):
        y = routed_scan(*leaves, case.routes)
        return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    first, second, want = run(inputs), run(inputs), run(exact)
    for have, again, value in zip(first, second, want, strict=True):
        assert torch.equal(have, again)
        assert (have.double() - value).norm() <= tolerance * value.norm()
