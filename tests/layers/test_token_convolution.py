"""The convolution along tokens: PyTorch's, and the sum of shifted lists that a compiler is given."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vision_ssm.layers import Hydra
from vision_ssm.layers.bidirectional import BothDirections
from vision_ssm.layers.token_convolution import TokenConvolution


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 3), (2, 2), (0, 0)])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_both_forms_are_the_padded_convolution(before, after, length):
    conv = TokenConvolution(5, before=before, after=after).double()
    x = torch.randn(2, length, 5, dtype=torch.float64, requires_grad=True)
    padded = F.pad(x.transpose(1, 2), (before, after))
    expected = F.conv1d(padded, conv.weight, conv.bias, groups=5).transpose(1, 2)
    leaves = [x, *conv.parameters()]
    exact = torch.autograd.grad(expected.sin().sum(), leaves)
    for y in (conv(x), conv.shifted(x)):
        assert_close(y, expected)
        assert_close(torch.autograd.grad(y.sin().sum(), leaves), exact)


def test_autocast_gives_its_dtype():
    conv, x = TokenConvolution(4, before=1, after=1), torch.randn(1, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        eager, shifted = conv(x), conv.shifted(x)
    assert eager.dtype == shifted.dtype == torch.bfloat16
    assert_close(shifted, eager, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "make", [lambda: BothDirections(4, state=2, rank=2), lambda: Hydra(8, head_dim=4, state=4)], ids=["vim", "hydra"]
)
def test_compiled_layers_convolve_nothing(make):
    """Nothing is laid out anew for a convolution, and one program serves every length."""
    graphs = []

    def backend(module, inputs):
        graphs.append({str(node.target) for node in module.graph.nodes if node.op == "call_function"})
        return module.forward

    torch.manual_seed(0)
    layer = make().double()
    compiled = torch.compile(layer, backend=backend, dynamic=True, fullgraph=True)
    for length in (7, 12, 5):
        x = torch.randn(2, length, layer.in_proj.in_features if hasattr(layer, "in_proj") else 4, dtype=torch.float64)
        assert_close(compiled(x), layer(x))
    (targets,) = graphs
    assert not any("conv" in target for target in targets)
