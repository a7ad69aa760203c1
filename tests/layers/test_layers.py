import json
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from vision_ssm.kernels import AXIAL_3D, CROSS, HILBERT_3D, TRI_3D
from vision_ssm.layers import MIXERS, SS, SS2D, SS3D, RoutedScan, find_mixer
from vision_ssm.layers.init import dt_bias_, s4d_real_
from vision_ssm.model_zoo.converters.vmamba import convert

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def golden(golden_file, name):
    """Facts and arrays of a golden layer."""
    arrays = {key: torch.from_numpy(m) for key, m in np.load(golden_file(f"ops/ss2d/{name}.npz")).items()}
    return json.loads(golden_file(f"ops/ss2d/{name}.json").read_text()), arrays


def ours(arrays, prefix):
    """The file's arrays under ``prefix`` in our layout; the converter knows the layer as a block's ``op``."""
    block = "layers.0.blocks.0.op."
    upstream = {block + key.removeprefix(prefix): m for key, m in arrays.items() if key.startswith(prefix)}
    return {key.removeprefix("stages.0.blocks.0.mixer."): m for key, m in convert(upstream).items()}


def ss2d(facts, arrays, prefix="w."):
    layer = SS2D(
        facts["d_model"],
        state=facts["d_state"],
        expand=facts["ssm_ratio"],
        rank=facts["dt_rank"],
        mixer="atrous" if facts["style"].startswith("efficientvmamba") else "cross",
        gate=facts.get("gate", True),
        conv_bias=facts.get("conv_bias", True),
    ).double()
    layer.load_state_dict(ours(arrays, prefix), strict=True)
    return layer


GOLDEN = """
    vmamba_gated_nhwc vmamba_nogate_nchw vmamba_nogate_ratio2_n16 vmamba_single_row vmamba_wide_input
    efficientvmamba_even efficientvmamba_odd efficientvmamba_single_row
"""


def golden_results(name, golden_file, device, dtype):
    """Pairs of what the layer gives and what the file has: the output, then the gradients."""
    facts, arrays = golden(golden_file, name)
    layer = ss2d(facts, arrays).to(device, dtype)
    x = arrays["x"].to(device, dtype).requires_grad_()
    y = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if facts["layout"] == "NCHW" else layer(x)
    y.backward(arrays["dy"].to(device, dtype))
    wanted = ours(arrays, "grad_w.")
    yield y, arrays["y"]
    yield x.grad, arrays["grad_x"]
    for key, parameter in layer.named_parameters():
        yield parameter.grad, wanted[key]


@pytest.mark.parametrize("name", GOLDEN.split())
def test_golden_layer(name, golden_file):
    for have, want in golden_results(name, golden_file, "cpu", torch.float64):
        assert_close(have, want, **EXACT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the float32 of a GPU; float64 on a CPU is above")
@pytest.mark.parametrize("name", GOLDEN.split())
def test_golden_layer_on_a_gpu(name, golden_file):
    for have, want in golden_results(name, golden_file, "cuda", torch.float32):
        assert (have.cpu().double() - want).norm() <= 1e-4 * want.norm()


def test_golden_efficient_block(golden_file):
    """The block around the layer is written out here: it shares one squeeze-excite between scan and convolution."""
    facts, arrays = golden(golden_file, "efficientvmamba_block")
    layer = ss2d(facts, arrays, "w.op.")
    w = {key[2:]: m.requires_grad_() for key, m in arrays.items() if key.startswith("w.") and "running" not in key}
    stats = [arrays[f"w.conv_branch.1.running_{name}"] for name in ("mean", "var")]

    def excite(v):
        g = F.layer_norm(v, v.shape[-1:], w["se.norm.weight"], w["se.norm.bias"]).mean((1, 2))
        g = F.gelu(F.linear(g, w["se.global_reduce.weight"], w["se.global_reduce.bias"]))
        return v * F.linear(g, w["se.channel_select.weight"], w["se.channel_select.bias"]).sigmoid()[:, None, None]

    x = arrays["x"].requires_grad_()
    u = F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"])
    c = F.conv2d(u.permute(0, 3, 1, 2), w["conv_branch.0.weight"], w["conv_branch.0.bias"], padding=1, groups=16)
    c = F.gelu(F.batch_norm(c, *stats, w["conv_branch.1.weight"], w["conv_branch.1.bias"]))
    c = F.conv2d(c, w["conv_branch.3.weight"], w["conv_branch.3.bias"]).permute(0, 2, 3, 1)
    y = x + excite(layer(u)) + excite(c)
    assert_close(y, arrays["y"], **EXACT)
    y.backward(arrays["dy"])
    assert_close(x.grad, arrays["grad_x"], **EXACT)
    for key, m in w.items():
        if not key.startswith("op."):
            assert_close(m.grad, arrays[f"grad_w.{key}"], **EXACT)
    wanted = ours(arrays, "grad_w.op.")
    for key, parameter in layer.named_parameters():
        assert_close(parameter.grad, wanted[key], **EXACT)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 4), (1, 1, 1), (2, 3, 5)], ids=str)
def test_every_mixer_keeps_the_shape_and_trains(mixer, grid, device):
    layer = SS(6, spatial_dims=len(grid), state=2, mixer=mixer, gate=True).to(device)
    x = torch.randn(2, *grid, 6, device=device, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert y.shape == x.shape and y.isfinite().all() and x.grad.isfinite().all()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_names_choose_the_routes_by_the_axes():
    for mixer, two, three in (
        ("cross", CROSS, AXIAL_3D),
        ("tri", 3, TRI_3D),
        ("hilbert", 2, HILBERT_3D),
        ("atrous", 4, 8),
    ):
        for layer, wanted in ((SS2D(4, mixer=mixer), two), (SS3D(4, mixer=mixer), three)):
            routes = layer.scan.routes
            assert (len(routes) if isinstance(wanted, int) else routes) == wanted
    assert find_mixer("cross")(4, state=1, rank=1).routes == CROSS
    assert SS(4, spatial_dims=1, mixer="bidirectional")(torch.randn(2, 7, 4)).shape == (2, 7, 4)


def test_the_layer_of_images_is_that_of_its_name():
    plain, general = SS2D(6, state=2, gate=True), SS(6, spatial_dims=2, kernel_size=(3, 3), state=2, gate=True)
    general.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 3, 5, 6)
    assert isinstance(plain, SS) and torch.equal(plain(x), general(x))


def test_a_volume_of_one_slice_is_an_image():
    """With routes that stay in the slice, and a convolution that does: what differs in 3-D is the third axis alone."""
    flat = SS2D(4, mixer="bidirectional", conv_bias=True)
    deep = SS3D(4, kernel_size=(1, 3, 3), mixer="bidirectional", conv_bias=True)
    deep.load_state_dict({key: m[:, :, None] if key == "conv.weight" else m for key, m in flat.state_dict().items()})
    x = torch.randn(2, 3, 5, 4)
    assert_close(deep(x[:, None])[:, 0], flat(x))


def test_kernels_differ_by_axis():
    layer = SS3D(4, kernel_size=(1, 3, 5))
    assert layer.conv.weight.shape == (4, 1, 1, 3, 5) and layer(torch.randn(1, 2, 2, 2, 4)).shape == (1, 2, 2, 2, 4)


@pytest.mark.parametrize("mixer", ["cross", "atrous", "tri", "hilbert"])
def test_one_compilation_serves_every_volume(mixer):
    layer, graphs = SS3D(6, state=2, mixer=mixer), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for grid in ((3, 7, 5), (9, 4, 11)):
        x = torch.randn(2, *grid, 6)
        assert_close(compiled(x), layer(x))
    assert len(graphs) == 1
    exported = torch.export.export(layer, (x,), strict=True).module()
    assert_close(exported(x), layer(x))


def test_checkpointing_changes_no_gradient():
    layer, x = SS3D(4, state=2).double(), torch.randn(1, 2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    have = torch.autograd.grad(again.square().sum(), [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims must be 1, 2 or 3; got 4"),
        ({"spatial_dims": 3, "kernel_size": (3, 3)}, r"kernel_size must be one size or 3.*got \(3, 3\)"),
        ({"spatial_dims": 3, "kernel_size": (1, 2, 3)}, "kernel_size must be odd"),
        ({"spatial_dims": 2, "kernel_size": 0}, "each at least 1"),
    ],
)
def test_wrong_axes_and_kernels_say_what_is_accepted(arguments, message):
    with pytest.raises(ValueError, match=message):
        SS(4, **arguments)


def test_identity_has_no_scan():
    names = [name for name, _ in SS2D(6, mixer="identity").named_parameters()]
    assert names and not any(re.search("scan|A_log|dt_", name) for name in names)


def test_mixer_may_be_a_callable_and_the_scan_takes_volumes():
    scan = RoutedScan(4, state=2, rank=1, routes=AXIAL_3D)
    assert scan(torch.randn(1, 2, 3, 4, 4)).shape == (1, 2, 3, 4, 4)
    layer = SS2D(6, mixer=partial(RoutedScan, routes=AXIAL_3D[:1]))
    assert isinstance(layer.scan, RoutedScan)


def test_unknown_mixer_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match="unknown mixer 'crossed'; the mixers are cross, bidirectional, atrous, tri, hilbert, hydra, mambamixer",
    ):
        SS2D(6, mixer="crossed")


def test_initial_values_are_the_published_ones():
    scan = RoutedScan(512, state=16, rank=6)
    assert_close(torch.exp(scan.A_log[1, 3]), torch.arange(1.0, 17))
    assert (scan.D == 1).all()
    dt = F.softplus(scan.dt_bias)
    assert 1e-3 <= dt.min() < 2e-3 and 0.08 < dt.max() <= 0.1001
    assert_close(dt.log().mean().item(), np.log(1e-2), atol=0.1, rtol=0)
    assert scan.dt_weight.abs().max() <= 6**-0.5


def test_step_size_floor():
    dt = F.softplus(dt_bias_(torch.empty(1000), low=1e-6, high=1e-5, floor=1e-4))
    assert_close(dt, torch.full_like(dt, 1e-4))
    assert s4d_real_(torch.empty(3, 1)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_training_follows_float32(dtype, device):
    """A, Δ's bias and the state stay in float32, so that half precision trains like float32."""

    def losses(enabled):
        torch.manual_seed(0)
        layer = nn.Sequential(SS2D(8, state=4), nn.LayerNorm(8), SS2D(8, state=1)).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
        x, target = torch.randn(4, 6, 6, 8, device=device), torch.randn(4, 6, 6, 8, device=device)
        curve = []
        for _ in range(300):
            with torch.autocast(device.type, dtype=dtype, enabled=enabled):
                loss = F.mse_loss(layer(x).float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return torch.tensor(curve)

    full, half = losses(False), losses(True)
    assert full[-1] < 0.5 * full[0]
    # step by step while rounding has not yet led the two apart, and over the whole run
    assert_close(half[:60], full[:60], rtol=0.01, atol=0)
    assert_close(half.mean(), full.mean(), rtol=0.01, atol=0)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:The CUDA Graph is empty")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_runs_as_a_cuda_graph():
    """What is kept between calls, such as the table of routes, must not lie in the graph's memory."""
    layer = SS2D(32).cuda()
    x = torch.randn(2, 16, 24, 32, device="cuda")
    layer(x).square().sum().backward()
    want = [parameter.grad.clone() for parameter in layer.parameters()]
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        layer.zero_grad()
        compiled(x).square().sum().backward()
    for parameter, exact in zip(layer.parameters(), want, strict=True):
        assert_close(parameter.grad, exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())
