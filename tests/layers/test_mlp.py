"""The MLP that computes its activation anew in the backward, beside timm's."""

import pytest
import torch
from timm.layers import Mlp
from torch.testing import assert_close

from vision_ssm.layers.mlp import LeanMlp


def kept(mlp, x):
    """Elements that an MLP keeps for its backward, weights not counted, and its gradients."""
    weights = {m.data_ptr() for m in mlp.parameters()}
    sizes = {}

    def pack(m):
        if m.data_ptr() not in weights:
            sizes[m.data_ptr()] = m.numel()
        return m

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda m: m):
        y = mlp(x)
    return sum(sizes.values()), torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])


@pytest.fixture
def both():
    lean, plain = LeanMlp(6, 24).double(), Mlp(6, 24).double()
    plain.load_state_dict(lean.state_dict())
    return lean, plain


def test_gradients_are_those_of_timm_and_less_is_kept(both):
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    (fewer, ours), (more, theirs) = (kept(mlp, x) for mlp in both)
    assert_close(ours, theirs, rtol=0.0, atol=0.0)
    assert more == 2 * 5 * (6 + 24 + 24)
    assert fewer == 2 * 5 * (6 + 24)


def test_evaluation_checkpoints_nothing(both):
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    lean, plain = (mlp.eval() for mlp in both)
    assert kept(lean, x)[0] == kept(plain, x)[0]
