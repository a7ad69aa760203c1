"""timm's contract: what timm's own tests ask of every registered model, and what its users rely on beside them.

Every model is checked on the meta device, where nothing is drawn and shapes alone are computed; values are checked on
the smallest model of each family. The lists come from timm, and no model is excluded from any check.
"""

import copy
from urllib.error import URLError

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_notrace_functions, get_notrace_modules, group_parameters
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from vision_ssm.backbones import FAMILIES
from vision_ssm.layers.convolution import Conv1d, Conv2d, Conv3d

MODELS = sorted(name for family in FAMILIES for name in timm.list_models(module=family))
SMALLEST = [name for name in MODELS if name.startswith("test_")]
STATE_SPACE = (".A_log", ".D", ".dt_bias")

# torch 2.14 says so of every script; Python 3.14 has none.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")

every = pytest.mark.parametrize("name", MODELS)
smallest = pytest.mark.parametrize("name", SMALLEST)


def create(name, **kwargs):
    return timm.create_model(name, **kwargs).eval()


def on_meta(name, **kwargs):
    return create(name, device="meta", **kwargs)


def image_of(model, **kwargs):
    return torch.randn(1, *model.pretrained_cfg["input_size"], **kwargs)


def without_gradient(model):
    return [key for key, parameter in model.named_parameters() if parameter.grad is None]


def test_names_are_not_those_of_timm():
    assert not set(MODELS) & set(dir(timm.models))
    assert sorted(f"test_{family}" for family in FAMILIES) == SMALLEST


@every
def test_configuration(name):
    model = on_meta(name)
    state, config = model.state_dict(), model.pretrained_cfg
    x = image_of(model, device="meta")
    assert all(tensor.is_meta for tensor in state.values())
    assert config["architecture"] == name
    assert model.in_chans == config["input_size"][0] == state[f"{config['first_conv']}.weight"].shape[1]
    assert model.num_classes == config["num_classes"] == state[f"{config['classifier']}.weight"].shape[0]

    features = model.forward_features(x)
    if config["pool_size"]:
        assert features.shape == (1, model.num_features, *config["pool_size"])
    else:
        tokens = model.pos_embed.shape[1] if hasattr(model, "pos_embed") else (x.shape[2] // 16) * (x.shape[3] // 16)
        assert features.shape == (1, tokens, model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    for options, shape in (({}, pooled.shape), ({"global_pool": ""}, features.shape)):
        model.reset_classifier(0, **options)
        for headless in (model, on_meta(name, num_classes=0, **options)):
            assert headless.num_classes == 0 and headless.forward_head(features).shape == shape
    assert model(x).shape == features.shape
    logits = on_meta(name, num_classes=3, global_pool="").forward_head(features)  # of each cell or token
    assert logits.shape == ((1, 3, *features.shape[2:]) if config["pool_size"] else (*features.shape[:2], 3))

    with pytest.raises(TypeError, match="not_an_argument"):
        on_meta(name, not_an_argument=1)


@every
def test_a_new_classifier_has_the_model_s_device_dtype_and_mode(name):
    model = on_meta(name).to(torch.float64).requires_grad_(False)
    model.reset_classifier(0)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.reset_classifier(7)
    weight = model.get_classifier().weight
    assert weight.shape == (7, model.head_hidden_size) and weight.requires_grad
    assert weight.is_meta and weight.dtype == torch.float64
    assert not any(module.training for module in model.modules())
    assert model.bfloat16()(image_of(model, device="meta").bfloat16()).dtype == torch.bfloat16


@every
def test_groups_of_parameters(name):
    model = on_meta(name)
    keys = {key for key, _ in model.named_parameters()}
    fine, coarse = (group_parameters(model, model.group_matcher(coarse=coarse)) for coarse in (False, True))
    for groups in (fine, coarse):
        assert {key for members in groups.values() for key in members} == keys
    assert len(fine) >= len(coarse) > 1
    undecayed = model.no_weight_decay()
    assert {key for key in keys if key.endswith(STATE_SPACE)} <= undecayed <= keys
    assert not {key for key in undecayed if key.endswith(("proj.weight", "conv.weight"))}


@every
def test_every_parameter_gets_a_gradient(name):
    model = on_meta(name, num_classes=42, drop_path_rate=0.1).train()
    out = model(torch.empty(2, 3, 64, 64, device="meta"))
    out.mean().backward()
    assert out.shape == (2, 42) and not without_gradient(model)


@every
@pytest.mark.parametrize("options", [{}, {"feature_cls": "getter", "out_indices": (0, -2)}], ids=str)
def test_feature_maps(name, options):
    model = on_meta(name, features_only=True, **options)
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    maps = model(torch.empty(1, 3, 64, 96, device="meta"))
    assert len(maps) == len(options.get("out_indices", maps)) and (len(maps) >= 3 or "out_indices" in options)
    assert reductions == sorted(reductions)
    for found, width, reduction in zip(maps, channels, reductions, strict=True):
        cells = (7, 11) if "stride8" in name else (64 // reduction, 96 // reduction)  # patches of 16, every 8 pixels
        assert found.shape == (1, width, *cells)


@every
@torch.jit.optimized_execution(False)  # optimising takes longer than all else
def test_scripts(name):
    script = torch.jit.script(on_meta(name, scriptable=True))
    assert script(torch.empty(1, 3, 64, 96, device="meta")).shape == (1, 1000)


@smallest
@torch.jit.optimized_execution(False)
def test_a_script_computes_the_same(name):
    for options in ({}, {"features_only": True, "feature_cls": "getter"}):
        model = create(name, scriptable=True, **options)
        script = torch.jit.script(model)
        for x in (image_of(model), torch.randn(2, 3, 49, 70)):
            assert_close(script(x), model(x), rtol=1e-4, atol=1e-5)


def traced(model):
    """torchvision's graph of a model, with timm's leaves."""
    tracing = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    tracing["param_shapes_constant"] = True
    train, evaluation = (nodes[-1:] for nodes in get_graph_node_names(model, tracer_kwargs=tracing))
    return create_feature_extractor(
        model, train_return_nodes=train, eval_return_nodes=evaluation, tracer_kwargs=tracing
    )


@every
def test_traces(name):
    (out,) = traced(on_meta(name))(torch.empty(1, 3, 64, 96, device="meta")).values()
    assert out.shape == (1, 1000)


@smallest
@torch.jit.optimized_execution(False)
def test_a_trace_computes_the_same(name):
    model = create(name, num_classes=42, scriptable=True)
    graph = traced(model).eval()
    script = torch.jit.script(graph)
    for x in (image_of(model), torch.randn(2, 3, 49, 70)):
        (out,) = graph(x).values()
        assert torch.equal(out, model(x))
        assert_close(*script(x).values(), out, rtol=1e-4, atol=1e-5)
    (out,) = graph.train()(torch.randn(2, 3, 64, 64)).values()
    out.mean().backward()
    assert out.shape == (2, 42) and not without_gradient(graph)
    features = create(name, scriptable=True, features_only=True, feature_cfg={"feature_cls": "fx"})
    assert_close(torch.jit.script(features)(x), features(x), rtol=1e-4, atol=1e-5)


@smallest
@pytest.mark.parametrize("options", [{}, {"mixer": "identity"}], ids=["scan", "identity"])
def test_forward_and_backward(name, options, device):
    """Values and gradients are finite, and the same when blocks are checkpointed."""
    model = create(name, num_classes=42, device=device, **options)
    x = image_of(model, device=device)
    out = model(x)
    assert out.shape == (1, 42) and out.isfinite().all()
    model.set_grad_checkpointing()
    assert_close(model(x), out, rtol=1e-4, atol=1e-5)
    gradients = []
    for enable in (True, False):
        model.train().set_grad_checkpointing(enable)
        model.zero_grad()
        model(torch.cat([x[..., :48, :48], x[..., -48:, -48:]])).square().sum().backward()
        assert not without_gradient(model)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients[0])
    assert_close(*gradients)


@smallest
def test_intermediates(name):
    model = create(name)
    x = torch.randn(2, 3, 70, 45)
    final, maps = model.forward_intermediates(x)
    assert_close(final, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [level["num_chs"] for level in model.feature_info]
    (normed,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    if model.pretrained_cfg["pool_size"]:
        assert_close(normed, final)
    model.set_grad_checkpointing()
    assert_close(model.forward_intermediates(x), (final, maps), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@smallest
def test_wrappers_hand_out_the_intermediates(name):
    model = create(name)
    x = torch.randn(2, 3, 70, 45)
    maps = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    kinds = ["getter", "list", "fx"] if model.pretrained_cfg["pool_size"] else ["getter"]  # the others show tokens
    for kind in kinds:
        torch.manual_seed(0)  # the weights above
        wrapper = create(name, features_only=True, feature_cls=kind, out_indices=(0, 2))
        assert_close(wrapper(x), maps)
        if kind == "list":  # the others have no such switch
            wrapper.set_grad_checkpointing()
            assert_close(wrapper(x), maps, rtol=1e-4, atol=1e-5)


@smallest
def test_what_is_pruned_is_not_needed(name):
    """The map of each level is the same from a model that is cut behind it, and all that is left of that one counts."""
    model = create(name)
    x = torch.randn(2, 3, 64, 45)
    maps = model.forward_intermediates(x, intermediates_only=True)
    last = len(maps) - 1
    whole = copy.deepcopy(model)
    assert whole.prune_intermediate_layers([last], prune_head=False) == [last]
    assert_close(whole(x), model(x))
    for level, wanted in enumerate(maps):
        final, found = model.forward_intermediates(x, indices=[level], stop_early=True)
        assert_close(found, [wanted])
        cut = copy.deepcopy(model)
        assert cut.prune_intermediate_layers([level], prune_norm=True) == [level]
        features, found = cut.forward_intermediates(x, indices=[level])
        assert_close(found, [wanted])
        assert_close(features, cut.forward_features(x))
        if level < last:
            assert_close(features, final)
        features.sum().backward()
        assert not without_gradient(cut)
        cut.reset_classifier(5, "avg")
        assert cut(x).shape == (2, 5) and cut.head_hidden_size == cut.feature_info[level]["num_chs"]


@smallest
def test_weights_fill_a_model_made_on_meta(name):
    source, model = create(name), on_meta(name)
    model.load_state_dict(source.state_dict(), assign=True)
    x = image_of(source)
    assert_close(model(x), source(x))


@smallest
@pytest.mark.parametrize("options", [{}, {"features_only": True}], ids=str)
def test_dtype_is_an_argument(name, options):
    model = create(name, dtype=torch.bfloat16, **options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    out = model(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16))
    for found in out if options else [out]:
        assert found.dtype == torch.bfloat16 and found.isfinite().all()


@smallest
def test_pretrained_weights_fit_other_channels_and_classes(name, tmp_path):
    source = create(name)
    state, config = source.state_dict(), source.pretrained_cfg
    save_file(state, tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors")}
    first, classifier = (f"{config[key]}.weight" for key in ("first_conv", "classifier"))
    for in_chans, num_classes in ((1, 5), (2, 1000), (4, 0)):
        sizes = {"in_chans": in_chans, "num_classes": num_classes}
        model = create(name, pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
        found = model.state_dict()
        assert model(torch.randn(1, in_chans, 32, 32)).shape == (1, num_classes or model.num_features)
        kept = state.keys() - {first, *(() if num_classes == 1000 else (classifier, classifier[:-6] + "bias"))}
        assert_close({key: found[key] for key in kept}, {key: state[key] for key in kept}, rtol=0, atol=0)
        if in_chans == 1:
            assert_close(found[first], state[first].sum(1, keepdim=True))
    x = torch.randn(1, 3, 32, 32)
    wrapper = create(name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=(0, 1))
    assert_close(wrapper(x), source.forward_intermediates(x, indices=[0, 1], intermediates_only=True))


@every
def test_weights_that_cannot_be_had_are_an_error(name, monkeypatch):
    def unreachable(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", unreachable)
    with pytest.raises(RuntimeError, match=f"pretrained weights of {name}: (.|\n)*zoo list.*checkpoint_path=FILE"):
        on_meta(name, pretrained=True)


@smallest
def test_compiles_once_for_all_sizes(name):
    model = create(name, num_classes=4)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for size in ((72, 104), (80, 112), (88, 96)):  # PyTorch's convolution has another path below 20480 elements
            x = torch.randn(1, 3, *size)
            assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@smallest
def test_convolutions_are_those_that_train_compiled(name):
    convolutions = [m for m in on_meta(name).modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    assert convolutions and all(isinstance(m, (Conv1d, Conv2d, Conv3d)) for m in convolutions)


@smallest
def test_exports_for_all_sizes(name):
    model = create(name, num_classes=4)
    sizes = (dict.fromkeys((0, 2, 3), Dim.DYNAMIC),)
    program = torch.export.export(model, (torch.randn(2, 3, 96, 80),), dynamic_shapes=sizes).module()
    for size in ((160, 160), (64, 112), (70, 45)):  # 160 x 160 is the size that Vim's position embedding is made for
        x = torch.randn(3, 3, *size)
        assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
