import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vision_ssm.layers import SS2D
from vision_ssm.layers.convolution import Conv1d, Conv2d, Conv3d


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()  # the modules share one forward, and PyTorch limits how often it compiles one


def gradients(run, module, x):
    """The output of ``run``, and gradients of the input and of every parameter of ``module``."""
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])]


def graph_catcher(graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return backend


@pytest.mark.parametrize(
    ("layer", "ours", "grids"),
    [
        (nn.Conv1d(6, 6, 4, groups=6), Conv1d(6, 6, 4, groups=6), [(9,), (14,)]),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), Conv2d(4, 6, 3, stride=2, padding=1), [(5, 8), (9, 7)]),
        (nn.Conv2d(4, 4, 3, dilation=2, groups=2), Conv2d(4, 4, 3, dilation=2, groups=2), [(6, 8), (9, 7)]),
        (
            nn.Conv3d(4, 4, (1, 3, 5), padding=(0, 1, 2), groups=4, bias=False),
            Conv3d(4, 4, (1, 3, 5), padding=(0, 1, 2), groups=4, bias=False),
            [(2, 5, 7), (3, 4, 6)],
        ),
    ],
    ids=["causal", "strided", "dilated", "volume"],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_trained_compiled_as_pytorchs_own(layer, ours, grids, autocast):
    ours.load_state_dict(layer.state_dict(), strict=True)
    graphs = []
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=graph_catcher(graphs))
    for batch, grid in zip((2, 3), grids, strict=True):
        x = torch.randn(batch, layer.in_channels, *grid, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            have, want = gradients(compiled, ours, x), gradients(layer, layer, x)
        for a, b in zip(have, want, strict=True):
            assert_close(a, b, **({"rtol": 0.02, "atol": 0.1} if autocast else {}))
    assert len(graphs) == 1 and "vision_ssm.convolution" in graphs[0].code


def test_an_image_gets_a_gradient_when_it_asks_and_weights_when_they_do():
    layer, x = Conv2d(3, 4, 2, stride=2), torch.randn(2, 3, 6, 8, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    layer.requires_grad_(False)
    (have,), (want,) = (torch.autograd.grad(run(x).square().sum(), [x]) for run in (compiled, layer))
    assert_close(have, want)
    layer.requires_grad_(True)
    weights = list(layer.parameters())
    for have, want in zip(
        *(torch.autograd.grad(run(x.detach()).sum(), weights) for run in (compiled, layer)), strict=True
    ):
        assert_close(have, want)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_is_pytorchs_own_unless_gradients_are_compiled():
    layer, x, graphs = Conv2d(4, 4, 3), torch.randn(2, 4, 6, 8), []
    with torch.no_grad():
        torch.compile(layer, fullgraph=True, dynamic=True, backend=graph_catcher(graphs))(x)
    assert "vision_ssm" not in graphs[0].code
    for strict in (False, True):
        assert "vision_ssm" not in torch.export.export(layer, (x,), strict=strict).graph_module.code
    assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck itself reads it
def test_opcheck():
    cells, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 35, 4), (6, 2, 3, 3), (6,)))
    window = [5, 7], [2, 1], [1, 0], [1, 1], 2
    torch.library.opcheck(torch.ops.vision_ssm.convolution.default, (cells, weight, bias, *window))
    torch.library.opcheck(torch.ops.vision_ssm.convolution.default, (cells, weight, None, *window))


@pytest.mark.slow  # inductor calls a C++ compiler
def test_one_compilation_trains_a_layer_on_every_size():
    layer = SS2D(4, state=1)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for step, (batch, height, width) in enumerate(((2, 10, 14), (3, 16, 11), (5, 9, 22))):
        x = torch.randn(batch, height, width, 4, requires_grad=True)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            have = gradients(compiled, layer, x)
        for a, b in zip(have, gradients(layer, layer, x), strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-5)
