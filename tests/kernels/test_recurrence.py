import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vision_ssm.kernels import recurrence
from vision_ssm.kernels.recurrence import softplus


@pytest.fixture(params=["numba", "torch"])
def backend(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setattr(recurrence, "HAS_NUMBA", request.param == "numba")


def loop(a, b, initial):
    h, out = initial, []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        out.append(h)
    return torch.stack(out, 1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3), (3, 2, 1), (2, 7, 5), (1, 97, 4), (3, 300, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scan_equals_loop(backend, shape, dtype):
    a, b = torch.rand(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    initial = torch.randn(shape[0], shape[2], dtype=dtype)
    assert_close(recurrence.scan_(a, b.clone(), initial), loop(a, b, initial))
    assert_close(recurrence.scan_(a, b.clone()), loop(a, b, torch.zeros_like(initial)))


@given(rows=st.integers(1, 3), length=st.integers(1, 60), width=st.integers(1, 5))
@pytest.mark.parametrize("numba", [True, False])
def test_adjoint_is_the_transpose(rows, length, width, numba):
    before, recurrence.HAS_NUMBA = recurrence.HAS_NUMBA, numba
    try:
        a, b, c = (torch.rand(rows, length, width, dtype=torch.float64) for _ in range(3))
        forward = (recurrence.scan_(a, b.clone()) * c).sum()
        assert_close(forward, (b * recurrence.adjoint_scan_(a, c.clone())).sum())
    finally:
        recurrence.HAS_NUMBA = before


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.float64, 1e-15)], ids=str)
def test_softplus(dtype, tolerance):
    x = torch.cat([torch.linspace(-80, 80, 4001), torch.tensor([0.0, 1e-30, -1e4])]).to(dtype)
    want = torch.nn.functional.softplus(x.double(), threshold=1e9)
    assert_close(softplus(x).double(), want, rtol=tolerance, atol=0)
    extreme = softplus(torch.tensor([float("-inf"), 1e4, float("inf"), float("nan")], dtype=dtype))
    assert_close(extreme, torch.tensor([0.0, 1e4, float("inf"), float("nan")], dtype=dtype), equal_nan=True)
