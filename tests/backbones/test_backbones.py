"""What the backbones compute: sizes, mixers, tokens, official outputs. timm's contract has a file of its own."""

import json
import re
import zlib
from itertools import product

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

import vision_ssm
from vision_ssm import model_zoo
from vision_ssm.backbones import Vim
from vision_ssm.kernels import COLUMN, ROW, atrous
from vision_ssm.layers import MIXERS, RoutedScan
from vision_ssm.model_zoo import converters

SMALLEST = vision_ssm.list_models("test_*")


def create(name, **kwargs):
    return timm.create_model(name, **kwargs).eval()


def test_published_names():
    assert {f"vmamba_{size}" for size in ("tiny", "small", "base")} <= set(vision_ssm.list_models())
    assert vision_ssm.list_models("*_v0") == ["vmamba_base_v0", "vmamba_small_v0", "vmamba_tiny_v0"]


@pytest.mark.parametrize("size", [(1, 1), (1, 33), (31, 5), (64, 64), (65, 47)], ids=str)
@pytest.mark.parametrize("name", SMALLEST)
def test_any_input_size(name, size):
    model = create(name, in_chans=1, num_classes=3)
    patch = {"test_vmamba": 1, "test_efficient_vmamba": 4, "test_vim2": 4}.get(name, 16)  # VMamba's stem pads
    size = tuple(max(patch, side) for side in size)
    assert model(torch.randn(1, 1, *size)).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"features_only": True}], ids=["classifier", "pyramid"])
@pytest.mark.parametrize("name", SMALLEST)
def test_an_image_that_does_not_fit_is_named(name, options):
    model = create(name, in_chans=2, **options)
    for image in (
        torch.randn(1, 3, 32, 32),
        torch.randn(2, 32, 32),
        torch.randn(0, 2, 32, 32),
        torch.randn(1, 2, 0, 32),
        torch.randn(1, 2, 32, 32).double(),
    ):
        with pytest.raises(ValueError, match=r"image (must have shape \(batch, 2, height, width\)|is torch\.float64)"):
            model(image)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["test_vmamba", "test_vim"])
def test_another_mixer_is_one_argument(name, mixer):
    """On the tokens of a plain model too, which have one axis."""
    model = timm.create_model(name, mixer=mixer, num_classes=3)
    model(torch.randn(2, 3, 40, 33)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_atrous_stride(stride):
    model = create("test_efficient_vmamba", stride=stride, num_classes=2)
    assert model.stages[0].blocks[0].mixer.scan.A_log.shape[0] == stride**2
    assert model(torch.randn(1, 3, 44, 52)).isfinite().all()


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("grid", [(7, 8), (1, 4), (6, 6)], ids=str)
def test_an_atrous_scan_is_a_scan_of_each_sub_map(stride, grid):
    """Padded at the end; sub-maps that begin on an even row are scanned by rows, the others by columns."""
    scan = RoutedScan(6, state=2, rank=2, routes=atrous(stride)).double()
    x = torch.randn(2, *grid, 6, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -grid[1] % stride, 0, -grid[0] % stride))
    wanted = torch.full_like(padded, torch.nan)
    for k, (column, row) in enumerate(product(range(stride), repeat=2)):
        part = RoutedScan(6, state=2, rank=2, routes=(COLUMN if row % 2 else ROW,)).double()
        weights = {key: value.unflatten(0, (stride**2, -1))[k] for key, value in scan.state_dict().items()}
        part.load_state_dict({key: value.view_as(part.get_parameter(key)) for key, value in weights.items()})
        wanted[:, row::stride, column::stride] = part(padded[:, row::stride, column::stride])
    assert_close(scan(x), wanted[:, : grid[0], : grid[1]])


@pytest.mark.parametrize("name", ["test_hydra", "test_vim"])
def test_forward_intermediates_of_tokens(name):
    model = create(name)
    x = torch.randn(2, 3, 70, 45)
    final, maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 2)] * 4
    _, found = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NLC", return_prefix_tokens=True)
    ((patches, cls),) = found
    assert_close(patches if cls is None else torch.cat([patches[:, :4], cls, patches[:, 4:]], dim=1), final)
    with pytest.raises(ValueError, match="'NCHW' or 'NLC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_vim_begins_as_released():
    layer = timm.create_model("test_vim").blocks[0].mixer
    assert (layer.mixer.back.scan.dt_bias == 0).all() and (layer.mixer.ahead.scan.dt_bias < -2).all()
    assert 0.5 < layer.out_proj.weight.abs().max() * (64**0.5) * (4**0.5) <= 1.0
    twin = timm.create_model("test_vim", mixer="hydra").blocks[0].mixer
    assert twin.mixer.mixer.out_proj.weight.abs().max() > 1.5 * twin.out_proj.weight.abs().max()


def test_class_token_stays_in_the_middle_at_any_size():
    """The position embedding of the class token is its own at every image size, and pooling finds the token."""
    model = create("test_vim", num_classes=0)
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[:, 50] = 3.0  # of 100 patches and the token
        model.patch_embed.weight.zero_()
        model.cls_token.fill_(1.0)
    tokens = model.embed(torch.randn(1, 3, 48, 80))
    assert tokens.shape == (1, 16, 32)
    assert (tokens[:, 7] == 4.0).all() and tokens.abs().sum((0, 2)).nonzero().flatten().tolist() == [7]
    model.global_pool = "token"
    assert_close(model.forward_head(tokens), tokens[:, 7])
    model.reset_classifier(0, "avg")
    assert_close(model.forward_head(tokens), torch.zeros(1, 32))
    with pytest.raises(ValueError, match="global_pool must be"):
        model.reset_classifier(0, "max")


def test_wrong_arguments_say_what_is_accepted():
    with pytest.raises(ValueError, match="one entry a stage"):
        timm.create_model("test_vmamba", depths=(1, 1))
    with pytest.raises(ValueError, match="unknown mixer 'scan'"):
        timm.create_model("test_vmamba", mixer="scan")
    for size in (8, (64,), (64, 8), (1, 64, 64)):
        with pytest.raises(ValueError, match=rf"a patch of 16 x 16 pixels; got {re.escape(str(size))}"):
            timm.create_model("test_vim", img_size=size)
    for name in SMALLEST:
        with pytest.raises(ValueError, match=r"drop_path_rate must lie between 0 and 1; got 1\.5"):
            timm.create_model(name, drop_path_rate=1.5)
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("vmamba_huge")


def rebuild(entry):
    """The weight recipe of the golden files."""
    rng = np.random.default_rng(zlib.crc32(entry["key"].encode()))
    value = np.asarray(entry["mean"] + entry["std"] * rng.standard_normal(tuple(entry["shape"])))
    if entry["key"].endswith("running_var"):
        value = np.abs(value) + 0.5
    return torch.from_numpy(value.astype(np.float32))


def drawn(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def stored(tensor, entry):
    """A tensor at the golden file's positions, with its norm, and what the file has there."""
    flat = tensor.double().flatten()
    count, n = len(entry["values"]), flat.numel()
    positions = range(n) if n <= count else [(k * (n - 1)) // (count - 1) for k in range(count)]
    wanted = torch.tensor(entry["values"], dtype=torch.float64)
    assert list(tensor.shape) == entry["shape"]
    return flat[list(positions)], wanted, flat.norm().item(), entry["l2"]


def assert_stored(tensor, entry, tolerance, what):
    have, want, norm, wanted_norm = stored(tensor, entry)
    scale = max(want.norm().item(), wanted_norm * (len(want) / tensor.numel()) ** 0.5)
    assert (have - want).norm().item() <= tolerance * scale, what
    assert abs(norm - wanted_norm) <= tolerance * wanted_norm, what


def official_gradient(model, key, shape):
    """A parameter's gradient in the official layout, found by sending each element's position through the converter."""
    positions = torch.arange(int(np.prod(shape))).reshape(shape)
    family = getattr(converters, type(model).__module__.rpartition(".")[2])
    ((ours, order),) = family.convert({key: positions}).items()
    gradient = torch.empty(positions.numel(), dtype=torch.float64)
    gradient[order.flatten()] = model.get_parameter(ours).grad.double().flatten()
    return gradient.reshape(shape)


@pytest.fixture(
    scope="module",
    params=["vmamba_tiny", "vmamba_tiny_v0", "efficient_vmamba_tiny", "efficient_vmamba_small", "vim_tiny"],
)
def golden(request, parity):
    facts = json.loads((parity / f"{request.param}.json").read_text())
    weights = {entry["key"]: rebuild(entry) for entry in facts["params"]}
    arguments = facts.get("model_kwargs", {})
    model = create(request.param, **arguments)
    assert sum(p.numel() for p in model.parameters()) == facts["num_parameters"]
    return facts, model_zoo.load(model, model_zoo.convert(weights, request.param, **arguments))


def observed(model, x):
    """The features that golden files hold, by their names, and the logits."""
    if isinstance(model, Vim):
        maps = {"embed": model.embed(x)}
        maps["block0"] = model.blocks[0](maps["embed"])
        for i, block in enumerate(model.blocks[1:], start=1):
            maps[f"block{i}"] = block(maps[f"block{i - 1}"])
        final = model.norm(maps[f"block{len(model.blocks) - 1}"])
        maps["cls_feature"] = model.forward_head(final, pre_logits=True)
        return maps, model.get_classifier()(maps["cls_feature"])
    final, stages = model.forward_intermediates(x)
    pooled = model.forward_head(final, pre_logits=True)
    maps = {"stem": model.stem(x), "pooled": pooled, **{f"stage{i}": m for i, m in enumerate(stages)}}
    return maps, model.get_classifier()(pooled)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize(
    ("dtype", "logits", "features", "gradients"),
    [(torch.float32, 1e-4, 2e-4, 2e-3), (torch.float64, 1e-9, 1e-9, 1e-8)],
    ids=["float32", "float64"],
)
def test_equals_the_official_model(
    golden, case, dtype, logits, features, gradients, device, monkeypatch, record_property
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default, 3e-4 off
    facts, model = golden
    model = model.to(device, dtype)
    if (facts["model"], dtype) == ("efficient_vmamba_tiny", torch.float32):
        gradients *= 10  # float32 puts one of 185,088 inputs of a ReLU on the other side of 0; float64 does not
    case = facts["cases"][case]
    x = drawn(case["input_seed"], case["input_shape"]).to(device, dtype)

    with torch.set_grad_enabled("cotangent_seed" in case):
        x.requires_grad_("cotangent_seed" in case)
        maps, out = observed(model, x)

    wanted = torch.tensor(case["logits_f64"], dtype=torch.float64).view(case["logits_shape"])
    error = ((out.double().cpu() - wanted).norm() / wanted.norm()).item()
    record_property("relative_error_of_the_logits", error)
    assert error <= logits
    for entry in case["features"]:
        assert_stored(maps[entry["name"]].detach().cpu(), entry, features, entry["name"])

    if "cotangent_seed" in case:
        model.zero_grad()
        out.backward(drawn(case["cotangent_seed"], case["logits_shape"]).to(out))
        assert_stored(x.grad.cpu(), case["grad_input"], gradients, "input")
        assert case["grad_params"]
        for entry in case["grad_params"]:
            key = entry.get("key") or entry["name"]
            assert_stored(official_gradient(model.cpu(), key, entry["shape"]), entry, gradients, key)
