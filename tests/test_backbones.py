"""Every registered model against timm's contract; the lists come from timm, nothing is kept by hand."""

import json
import re
import zlib

import numpy as np
import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import vision_ssm
from vision_ssm import model_zoo
from vision_ssm.backbones import FAMILIES, Vim
from vision_ssm.layers import MIXERS
from vision_ssm.model_zoo import converters

MODELS = vision_ssm.list_models()
SMALLEST = vision_ssm.list_models("test_*")
PLAIN = ["test_hydra", "test_vim"]
HIERARCHICAL = [name for name in SMALLEST if name not in PLAIN]
LIGHT = [*SMALLEST, "vmamba_nano"]
PUBLISHED = [name for name in MODELS if name not in LIGHT]
STATE_SPACE = (".A_log", ".D", ".dt_bias")


def create(name, **kwargs):
    return timm.create_model(name, **kwargs).eval()


@pytest.fixture
def on_meta():
    """Shapes alone: no weights are drawn and nothing is computed, so the largest models cost nothing."""
    with torch.device("meta"):
        yield


def test_every_family_has_a_smallest_model():
    assert sorted(SMALLEST) == [f"test_{family}" for family in FAMILIES]


def test_published_names():
    assert {f"vmamba_{size}" for size in ("tiny", "small", "base")} <= set(PUBLISHED)
    assert vision_ssm.list_models("*_v0") == ["vmamba_base_v0", "vmamba_small_v0", "vmamba_tiny_v0"]


@pytest.mark.parametrize("name", MODELS)
def test_head_and_configuration(name, on_meta):
    model = timm.create_model(name)
    state = model.state_dict()
    config = model.pretrained_cfg
    assert f"{config['classifier']}.weight" in state and f"{config['first_conv']}.weight" in state
    assert (model.num_classes, model.num_features) == (1000, model.head_hidden_size)
    assert model.no_weight_decay() >= {key for key in state if key.endswith(STATE_SPACE)}
    assert not {key for key in model.no_weight_decay() if key.endswith(("proj.weight", "conv.weight"))}
    model.reset_classifier(7)
    assert model.get_classifier().weight.shape == (7, model.num_features)
    size = config["input_size"]
    features = model.forward_features(torch.empty(2, *size))
    if config["pool_size"]:
        assert features.shape == (2, model.num_features, *config["pool_size"])
    else:
        tokens = model.pos_embed.shape[1] if hasattr(model, "pos_embed") else (size[1] // 16) * (size[2] // 16)
        assert features.shape == (2, tokens, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.forward_head(features).shape == (2, 7)
    model.reset_classifier(0, "")
    assert model(torch.empty(2, *size)).shape == features.shape


@pytest.mark.parametrize("name", MODELS)
def test_features_match_feature_info(name, on_meta):
    model = timm.create_model(name, features_only=True)
    maps = model(torch.empty(1, 3, 64, 96))
    info = list(zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True))
    assert [reduction for _, reduction in info] == sorted(reduction for _, reduction in info)
    for features, (channels, reduction) in zip(maps, info, strict=True):
        if "stride8" in name:  # patches of 16 x 16, every 8 pixels
            assert features.shape == (1, channels, 64 // 8 - 1, 96 // 8 - 1)
        else:
            assert features.shape == (1, channels, 64 // reduction, 96 // reduction)


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("options", [{}, {"mixer": "identity"}], ids=["scan", "identity"])
def test_forward_and_backward_reach_every_parameter(name, options, device):
    model = timm.create_model(name, num_classes=42, drop_path_rate=0.1, **options).to(device).train()
    out = model(torch.randn(2, 3, 64, 64, device=device))
    out.mean().backward()
    assert out.shape == (2, 42) and out.isfinite().all()
    dead = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not dead
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("size", [(1, 1), (1, 33), (31, 5), (64, 64), (65, 47)], ids=str)
@pytest.mark.parametrize("name", SMALLEST)
def test_any_input_size(name, size):
    model = create(name, in_chans=1, num_classes=3)
    smallest = {"test_vmamba": 1, "test_efficient_vmamba": 4, "test_vim2": 4}.get(
        name, 16
    )  # one patch; VMamba's stem pads
    size = tuple(max(smallest, side) for side in size)
    assert model(torch.randn(1, 1, *size)).isfinite().all()


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("name", SMALLEST)
def test_input_channels(name, channels):
    assert create(name, in_chans=channels, num_classes=2)(torch.randn(1, channels, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize("mixer", MIXERS)
def test_another_mixer_is_one_argument(mixer):
    model = timm.create_model("test_vmamba", mixer=mixer, num_classes=3)
    model(torch.randn(2, 3, 40, 33)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_atrous_stride(stride):
    model = create("test_efficient_vmamba", stride=stride, num_classes=2)
    assert model.stages[0].blocks[0].mixer.scan.A_log.shape[0] == stride**2
    assert model(torch.randn(1, 3, 44, 52)).isfinite().all()


@pytest.mark.parametrize("name", SMALLEST)
def test_gradient_checkpointing_changes_nothing(name):
    model = timm.create_model(name, num_classes=5).train()
    x = torch.randn(1, 3, 48, 48)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert_close(*grads)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_forward_intermediates(name):
    model = create(name)
    x = torch.randn(2, 3, 70, 45)
    final, maps = model.forward_intermediates(x)
    assert_close(final, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [16, 24, 32, 48]
    stages = timm.create_model(name, features_only=True).eval()
    flat = {re.sub(r"^(stem|stages)\.", r"\1_", key): m for key, m in model.state_dict().items()}
    stages.load_state_dict({key: m for key, m in flat.items() if key.startswith("st")}, strict=True)
    assert_close(stages(x), maps)
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert_close(early, maps[1:2])
    assert_close(model.forward_intermediates(x, indices=1, norm=True)[1][0], final)
    model.set_grad_checkpointing()
    assert_close(model.forward_intermediates(x)[0], final)
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", PLAIN)
def test_forward_intermediates_of_tokens(name):
    model = create(name)
    x = torch.randn(2, 3, 70, 45)
    final, maps = model.forward_intermediates(x)
    assert_close(final, model.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 2)] * 4
    assert timm.create_model(name, features_only=True, out_indices=(1,)).eval()(x)[0].shape == maps[1].shape
    patches, cls = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NLC", return_prefix_tokens=True)[1][
        0
    ]
    assert_close(patches if cls is None else torch.cat([patches[:, :4], cls, patches[:, 4:]], dim=1), final)
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert_close(early, maps[1:2])
    with pytest.raises(ValueError, match="'NCHW' or 'NLC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert_close(model.forward_intermediates(x, indices=[1], intermediates_only=True), early)


def test_head_keeps_the_dtype():
    for name in SMALLEST:
        model = create(name).bfloat16()
        model.reset_classifier(7)
        assert model.get_classifier().weight.dtype == torch.bfloat16


def test_vim_begins_as_released():
    layer = timm.create_model("test_vim").blocks[0].mixer
    assert (layer.mixer.back.scan.dt_bias == 0).all() and (layer.mixer.ahead.scan.dt_bias < -2).all()
    assert 0.5 < layer.out_proj.weight.abs().max() * (64**0.5) * (4**0.5) <= 1.0
    twin = timm.create_model("test_vim", mixer="hydra").blocks[0].mixer
    assert twin.mixer.mixer.out_proj.weight.abs().max() > 1.5 * twin.out_proj.weight.abs().max()


def test_vim_exports_beside_its_own_size():
    model = create("test_vim", num_classes=4)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (torch.randn(2, 3, 96, 80),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    for size in ((160, 160), (64, 112)):
        x = torch.randn(1, 3, *size)
        assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_prune_intermediate_layers(name):
    model = create(name)
    x = torch.randn(1, 3, 32, 32)
    want = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2], prune_norm=True) == [0, 2]
    assert len(model.stages) == 3 and model.num_features == model.feature_info[-1]["num_chs"]
    model.reset_classifier(5, "avg")
    assert model(x).shape == (1, 5)
    assert_close(model.forward_intermediates(x, indices=[0, 2], intermediates_only=True), want)


@pytest.mark.parametrize("name", SMALLEST)
def test_compiles_without_a_graph_break(name):
    model = create(name, num_classes=4)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for size in ((72, 104), (80, 112), (88, 96)):  # PyTorch's convolution has another path below 20480 elements
            x = torch.randn(1, 3, *size)
            assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", SMALLEST)
def test_exports(name):
    model = create(name, num_classes=4)
    x = torch.randn(1, 3, 64, 96)
    program = torch.export.export(model, (x,))
    assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", SMALLEST)
def test_layer_groups_cover_every_parameter(name):
    from timm.models import group_parameters

    model = create(name)
    grouped = group_parameters(model, model.group_matcher())
    assert {key for keys in grouped.values() for key in keys} == {key for key, _ in model.named_parameters()}
    assert len(grouped) >= len(group_parameters(model, model.group_matcher(coarse=True)))


def test_wrong_arguments_say_what_is_accepted():
    with pytest.raises(ValueError, match="one entry a stage"):
        timm.create_model("test_vmamba", depths=(1, 1))
    with pytest.raises(ValueError, match="unknown mixer 'scan'"):
        timm.create_model("test_vmamba", mixer="scan")
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
    model = create(request.param)
    assert sum(p.numel() for p in model.parameters()) == facts["num_parameters"]
    return facts, model_zoo.load(model, model_zoo.convert(weights, request.param))


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
