"""Any arguments give a result of the documented shape, or a ValueError that names the argument.

VSSM_FUZZ_EXAMPLES is about how many examples are drawn. With VSSM_FUZZ_REPORT=docs/guides/fuzz.json the run writes what
came of them there, and into the table of the page beside it.
"""

import json
import os
import platform
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from torch import Tensor, nn

import vision_ssm
from vision_ssm.compat import selective_scan_fn
from vision_ssm.engine.checkpoint import write_json
from vision_ssm.engine.config import load_config
from vision_ssm.engine.segmentation.predict import predict_file
from vision_ssm.engine.segmentation.predictor import Predictor
from vision_ssm.engine.training.evaluate import load_task
from vision_ssm.kernels import (
    ROUTES,
    Route,
    cross_merge,
    cross_scan,
    find_routes,
    linear_scan,
    routed_scan,
    selective_scan,
    ssd_scan,
)
from vision_ssm.layers import MIXERS, SS, Hydra
from vision_ssm.segmentation import SegMamba, SSMUNet, SwinUMamba, UltraLightVMUNet, UMamba, VMUNet
from vision_ssm.video import NextFrame, convs5_stack

EXAMPLES = int(os.environ.get("VSSM_FUZZ_EXAMPLES", "150"))
REPORT = os.environ.get("VSSM_FUZZ_REPORT")
PAGE = Path(__file__).parents[1] / "docs" / "guides" / "numbers_and_safety.md"
BANDS = str(Path(__file__).parent / "fixtures" / "bands.py")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OUTCOMES: dict[str, Counter[str]] = defaultdict(Counter)


def drawn(share: float) -> settings:
    """So many of all examples; the same ones each time."""
    return settings(
        max_examples=max(3, round(share * EXAMPLES)),
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # to make an example smaller, the networks would run for minutes
        suppress_health_check=list(HealthCheck),
    )


def holds(name: str, arguments: Sequence[str], call: Callable[[], Any], check: Callable[[Any], bool]) -> None:
    """The property; counts what came of the example."""
    outcome = "violated"
    try:
        with torch.no_grad():
            result = call()
        assert check(result)
        outcome = "computed"
    except ValueError as error:
        assert any(argument in str(error) for argument in arguments), f"names none of {arguments}: {error}"
        outcome = "refused"
    finally:
        OUTCOMES[name][outcome] += 1


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    yield
    assert all(counts["computed"] for counts in OUTCOMES.values()), "a property in which every example is refused"
    if REPORT:  # properties that this run left out keep what an earlier one found
        earlier = json.loads(Path(REPORT).read_text())["outcomes"] if Path(REPORT).exists() else {}
        outcomes = {name: dict(sorted(counts.items())) for name, counts in OUTCOMES.items()}
        merged = dict(sorted({**earlier, **outcomes}.items()))
        total = sum(count for counts in merged.values() for count in counts.values())
        about = {"version": vision_ssm.__version__, "torch": torch.__version__, "python": platform.python_version()}
        write_json(Path(REPORT), {**about, "examples": total, "outcomes": merged})
        page = Path(REPORT).with_name(PAGE.name)
        if page.exists():
            page.write_text(filled(page.read_text(encoding="utf-8"), Path(REPORT)), encoding="utf-8")


def filled(text: str, report: Path) -> str:
    """The page with the table of a report."""
    found = json.loads(report.read_text())
    rows = [
        f"| {name} | {sum(counts.values())} | {counts.get('refused', 0)} |"
        for name, counts in found["outcomes"].items()
    ]
    violated = sum(counts.get("violated", 0) for counts in found["outcomes"].values())
    versions = f"torch {found['torch']}, Python {found['python']}"
    about = f"{found['examples']} examples with {versions}; in {violated} the property does not hold."
    table = "\n".join([about, "", "| what | examples | refused with a clear error |", "|---|---:|---:|", *rows])
    return re.sub("(<!-- fuzz -->\n).*?(<!-- /fuzz -->)", rf"\1\n{table}\n\n\2", text, flags=re.DOTALL)


def test_the_page_shows_the_report() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text, PAGE.with_name("fuzz.json")) == text
    assert json.loads(PAGE.with_name("fuzz.json").read_text())["examples"] >= 5000


def mostly(usual: Any, others: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The usual value, or what a strategy of usual values gives, nine times of ten."""
    common = usual if isinstance(usual, st.SearchStrategy) else st.just(usual)
    return st.integers(0, 9).flatmap(lambda draw: others if draw == 5 else common)


@lru_cache(maxsize=64)
def model(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, **options).eval()


@drawn(0.08)
@given(st.data())
def test_backbones(data: st.DataObject) -> None:
    """Names, sizes, channels, classes, dtypes, mixers; as classifier, as pyramid, as list of tokens or maps."""
    draw = data.draw
    name = draw(st.sampled_from(vision_ssm.list_models("test_*")))
    dtype = draw(st.sampled_from(DTYPES))
    channels, classes = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    pyramid = draw(st.booleans())
    options: dict[str, Any] = {"in_chans": channels, "dtype": dtype}
    mixer = draw(mostly(None, st.sampled_from([*MIXERS, "nonsense"])))
    if mixer and name in ("test_vmamba", "test_vim", "test_efficient_vmamba"):
        options["mixer"] = mixer
    options |= {"features_only": True} if pyramid else {"num_classes": classes}
    batch = draw(mostly(st.integers(1, 2), st.just(0)))
    height, width = (draw(mostly(st.integers(16, 40), st.integers(0, 15))) for _ in range(2))
    shape = (batch, draw(mostly(channels, st.integers(0, 4))), height, width)
    shape = draw(mostly(shape, st.sampled_from([shape[1:], (*shape, 2)])))
    image = torch.randn(shape).to(draw(mostly(dtype, st.sampled_from(DTYPES))))

    def right(result: Any) -> bool:
        net = model(name, **options)
        if not pyramid:
            return result.dtype == dtype and result.shape == (batch, classes or net.num_features)
        info: Any = net.feature_info
        return [m.shape[:2] for m in result] == [(batch, width) for width in info.channels()]

    holds("backbones", ["image", "mixer"], lambda: model(name, **options)(image), right)


NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "SSMUNet, images": (partial(SSMUNet, "test_vmamba", decoder_channels=(4, 4, 6, 8, 8)), 2),
    "SSMUNet, volumes": (
        partial(SSMUNet, "ssm3d_nano", spatial_dims=3, dims=(4, 6), depths=(1, 1), strides=(2, 2), kernel_sizes=(3, 3)),
        3,
    ),
    "UMamba, images": (partial(UMamba, 2, channels=(4, 6), state=2), 2),
    "UMamba, volumes": (partial(UMamba, 3, form="encoder", channels=(4, 6), state=2), 3),
    "SegMamba": (partial(SegMamba, 3, dims=(4, 6), depths=(1, 1), hidden=8, state=2), 3),
    "VMUNet": (partial(VMUNet, 2, backbone="test_vmamba", depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1)), 2),
    "SwinUMamba": (partial(SwinUMamba, 2, backbone="test_vmamba", stem_channels=8), 2),
    "UltraLightVMUNet": (partial(UltraLightVMUNet, 2, widths=(4, 8, 8, 8, 12, 16), state=2), 2),
}


@lru_cache(maxsize=64)
def network(name: str, training: bool, **options: Any) -> nn.Module:
    return NETWORKS[name][0](**options).train(training)


@drawn(0.08)
@given(st.data())
def test_segmentation_networks(data: st.DataObject) -> None:
    draw = data.draw
    name = draw(st.sampled_from(list(NETWORKS)))
    channels, classes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    axes = draw(mostly(NETWORKS[name][1], st.integers(1, 4)))
    sizes = tuple(draw(st.lists(mostly(st.integers(1, 20), st.just(0)), min_size=axes, max_size=axes)))
    shape = (draw(mostly(st.integers(1, 2), st.just(0))), draw(mostly(channels, st.integers(0, 4))), *sizes)
    training = draw(st.booleans())
    image = torch.randn(shape)

    def call() -> Any:
        return network(name, training, in_channels=channels, out_channels=classes)(image)

    holds("segmentation networks", ["image"], call, lambda logits: logits.shape == (shape[0], classes, *sizes))


@drawn(0.06)
@given(st.data())
def test_what_networks_are_made_of(data: st.DataObject) -> None:
    draw = data.draw
    widths = st.lists(st.integers(1, 6), max_size=6).map(tuple)
    arguments: dict[str, Any] = {
        "spatial_dims": draw(mostly(2, st.integers(0, 4))),
        "in_channels": draw(st.integers(1, 3)),
        "out_channels": draw(st.integers(1, 3)),
        "mixer": draw(mostly("cross", st.sampled_from([*MIXERS, "nonsense"]))),
    }
    form = draw(st.sampled_from(["ssm_unet", "umamba"]))
    if form == "umamba":
        arguments["channels"] = draw(mostly((4, 6), widths))
        arguments["strides"] = draw(mostly(1, st.one_of(st.integers(0, 3), st.lists(st.integers(0, 3), max_size=3))))
        arguments["kernel_sizes"] = draw(
            mostly(3, st.one_of(st.integers(0, 5), st.lists(st.integers(1, 3), max_size=3)))
        )
        arguments["form"] = draw(mostly("encoder", st.sampled_from(["bottleneck", "nonsense"])))
        make: Callable[..., nn.Module] = partial(UMamba, state=2)
        names = list(arguments)
    else:
        arguments["decoder_channels"] = draw(mostly(None, widths))
        arguments["out_indices"] = draw(mostly(None, st.lists(st.integers(0, 3), max_size=3, unique=True).map(sorted)))
        backbone = draw(mostly("test_vmamba", st.sampled_from(["test_vim", "resnet_nonsense", "ssm3d_nano", ""])))
        make = partial(SSMUNet, backbone)
        names = [*arguments, "backbone", "map"]
    image = torch.randn(1, arguments["in_channels"], *[9] * min(arguments["spatial_dims"], 2))
    wanted = (1, arguments["out_channels"], *image.shape[2:])
    holds(
        "networks' arguments", [*names, "image"], lambda: make(**arguments).eval()(image), lambda y: y.shape == wanted
    )


@drawn(0.2)
@given(st.data())
def test_layers(data: st.DataObject) -> None:
    """Heads, groups, taps, widths, kernels, states and axes of the layers."""
    draw = data.draw
    dim = draw(st.integers(1, 9))
    if draw(st.booleans()):
        arguments: dict[str, Any] = {
            "state": draw(st.integers(1, 4)),
            "expand": draw(st.sampled_from([1.0, 1.5, 2.0])),
            "head_dim": draw(st.integers(1, 9)),
            "groups": draw(st.integers(1, 3)),
            "taps": draw(st.integers(1, 6)),
            "learned_state": draw(st.booleans()),
            "combine": draw(mostly("quasiseparable", st.sampled_from(["add", "multiply", "concatenate", "nonsense"]))),
        }
        x = torch.randn(2, draw(st.integers(1, 9)), dim)
        make: Callable[..., nn.Module] = Hydra
    else:
        axes = draw(mostly(2, st.integers(0, 4)))
        arguments = {
            "spatial_dims": axes,
            "kernel_size": draw(mostly(3, st.one_of(st.integers(0, 5), st.lists(st.integers(1, 5), max_size=4)))),
            "state": draw(st.integers(1, 3)),
            "expand": draw(st.sampled_from([1.0, 1.5, 2.0])),
            "rank": draw(st.sampled_from([None, 1, 3])),
            "mixer": draw(mostly(st.sampled_from([*MIXERS]), st.just("nonsense"))),
            "gate": draw(st.booleans()),
        }
        x = torch.randn(1, *draw(st.lists(st.integers(1, 5), min_size=axes, max_size=axes)), dim)
        make = SS
    holds("layers", [*arguments, "combination"], lambda: make(dim, **arguments)(x), lambda y: y.shape == x.shape)


def spoilt(draw: Callable[..., Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor in four examples of five as it is; else of another size, dtype or number of axes."""
    if draw(st.integers(0, 2)) == 0:
        return tensors
    name = draw(st.sampled_from(list(tensors)))
    m = tensors[name]
    axis = draw(st.integers(0, m.dim() - 1))
    how = draw(st.sampled_from(["longer", "empty", "flat", "deep", "integers", "complex", "half"]))
    changed = {
        "longer": lambda: torch.cat([m, m.narrow(axis, 0, 1)], dim=axis),
        "empty": lambda: m.narrow(axis, 0, 0),
        "flat": lambda: m.flatten(),
        "deep": lambda: m[None],
        "integers": lambda: m.long(),
        "complex": lambda: m.to(torch.complex64),
        "half": lambda: m.bfloat16(),
    }[how]()
    return {**tensors, name: changed}


@drawn(0.4)
@given(st.data())
def test_operators(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    batch, length, dim, state, groups, rank = (draw(st.integers(1, high)) for high in (2, 9, 4, 3, 2, 2))
    grid = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    routes = ROUTES[draw(st.sampled_from(list(ROUTES)))]
    operator = draw(st.sampled_from(["routed", "selective", "compat", "ssd", "linear", "cross_scan", "cross_merge"]))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def of(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(like)

    A = -torch.rand(groups * dim, state, dtype=wide)
    sequences = {
        "u": of(batch, groups * dim, length),
        "delta": of(batch, groups * dim, length),
        "A": A,
        "B": of(batch, groups, state, length),
        "C": of(batch, groups, state, length),
        "D": of(groups * dim, like=wide),
    }
    heads = {
        "x": of(batch, length, groups * 2, dim),
        "dt": torch.rand(batch, length, groups * 2, dtype=wide),
        "A": -torch.rand(groups * 2, dtype=wide),
        "B": of(batch, length, groups, state),
        "C": of(batch, length, groups, state),
    }
    count = len(routes)
    cells = {
        "x": of(batch, *grid, dim),
        "low_rank": of(batch, *grid, count * (rank + 2 * state)),
        "dt_weight": of(count, dim, rank, like=wide),
        "dt_bias": of(count, dim, like=wide),
        "A": -torch.rand(count, dim, state, dtype=wide),
        "D": of(count, dim, like=wide),
    }
    fits = len(routes[0].axes) == len(grid)
    steps = routes[0].length(grid) if fits else 3
    tensors, call, right = {
        "routed": (cells, lambda **t: routed_scan(**t, routes=routes), lambda y, t: y.shape == t["x"].shape),
        "selective": (sequences, selective_scan, lambda y, t: y.shape == t["u"].shape),
        "compat": (sequences, selective_scan_fn, lambda y, t: y.shape == t["u"].shape),
        "ssd": (heads, ssd_scan, lambda y, t: y[0].shape == t["x"].shape),
        "linear": (
            {"a": torch.rand(length, batch, dim, dtype=wide), "b": of(length, batch, dim)},
            linear_scan,
            lambda y, t: y[0].shape == t["b"].shape,
        ),
        "cross_scan": (
            {"x": of(batch, dim, *grid)},
            lambda **t: cross_scan(**t, routes=routes),
            lambda y, t: y.shape == (t["x"].shape[0], count, t["x"].shape[1], routes[0].length(t["x"].shape[2:])),
        ),
        "cross_merge": (
            {"y": of(batch, count, dim, steps)},
            lambda **t: cross_merge(**t, routes=routes, grid=grid),
            lambda x, t: x.shape == (t["y"].shape[0], t["y"].shape[2], *grid),
        ),
    }[operator]
    given_tensors = spoilt(draw, tensors)
    names = [f"{name} " for name in tensors] + ["route", "grid"]
    holds("operators", names, lambda: call(**given_tensors), lambda result: right(result, given_tensors))


@drawn(0.08)
@given(st.data())
def test_routes(data: st.DataObject) -> None:
    draw = data.draw
    if draw(st.booleans()):
        name = draw(st.one_of(st.sampled_from(list(ROUTES)), st.text(max_size=8)))
        holds("routes", ["routes"], lambda: find_routes(name), lambda routes: routes == ROUTES[name])
        return
    numbers = st.lists(st.integers(-1, 3), max_size=4).map(tuple)
    arguments = {
        "axes": draw(mostly((0, 1), numbers)),
        "stride": draw(st.integers(-1, 3)),
        "offset": draw(mostly(None, numbers)),
        "hilbert": draw(st.booleans()),
        "reverse": draw(st.booleans()),
    }
    grid = tuple(draw(st.lists(st.integers(1, 6), min_size=len(arguments["axes"]), max_size=len(arguments["axes"]))))

    def call() -> tuple[Route, Tensor]:
        route = Route(**arguments)
        return route, route.index(grid)

    def right(result: tuple[Route, Tensor]) -> bool:
        route, index = result
        return index.shape == (route.length(grid),) and index.unique().numel() == index.numel()

    holds("routes", [*arguments, "grid"], call, right)


@pytest.fixture(scope="module")
def predictor(bands: Path) -> Predictor:
    config = load_config(BANDS)
    return Predictor(config, load_task(config, bands))


@drawn(0.03)
@given(data=st.data())
def test_prediction(data: st.DataObject, predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Volumes of any shape, dtype, spacing and turn; with NaN; cut off."""
    draw = data.draw
    folder = tmp_path_factory.mktemp("volume")
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=3, max_size=3)))
    shape = draw(mostly(shape, st.sampled_from([shape[:2], (*shape, 2), (*shape, 1)])))
    kind = draw(st.sampled_from(["uint8", "int16", "int32", "float32", "float64"]))
    voxels = (2 * np.random.default_rng(0).random(shape)).astype(kind)
    if kind.startswith("float") and draw(mostly(False, st.just(True))):
        voxels.flat[0] = np.nan
    spacing = draw(st.lists(mostly(1.0, st.sampled_from([0.0, -2.0, 0.3, 5.0, np.nan])), min_size=3, max_size=3))
    turn = np.eye(3)[draw(st.permutations(range(3)))]
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    source, target = folder / "image.nii.gz", folder / "labels.nii.gz"
    try:
        nibabel.save(nibabel.Nifti1Image(voxels, affine), source)
    except (ValueError, RuntimeWarning, np.linalg.LinAlgError, nibabel.spatialimages.HeaderDataError):
        return  # no such file can be made
    if draw(mostly(False, st.just(True))):
        source.write_bytes(source.read_bytes()[: -draw(st.integers(1, 60))])

    def right(result: Any) -> bool:
        written = nibabel.load(result.labels)
        return written.shape == shape[:3] and written.get_data_dtype() == np.uint8

    holds("prediction", [str(source)], lambda: predict_file(predictor, source, target), right)


@lru_cache(maxsize=8)
def video(channels: int) -> NextFrame:
    stack = convs5_stack(32, state=4, layers=1)
    return NextFrame(stack, dim=32, encoder=(32, 32), decoder=(32, 32), channels=channels).eval()


@drawn(0.02)
@given(st.data())
def test_video(data: st.DataObject) -> None:
    draw = data.draw
    channels = draw(st.integers(1, 2))
    sizes = [draw(mostly(8, st.integers(0, 12))) for _ in range(2)]
    clips, given_frames = (draw(mostly(st.integers(1, 2), st.just(0))) for _ in range(2))
    shape = (clips, given_frames, draw(mostly(channels, st.integers(0, 3))), *sizes)
    shape = draw(mostly(shape, st.just(shape[1:])))
    frames = draw(mostly(st.integers(1, 3), st.integers(-1, 0)))

    def right(result: tuple[Tensor, Any]) -> bool:
        return result[0].shape == (shape[0], frames, *shape[2:])

    names = ["frames", "height and width", "clip"]
    holds("video", names, lambda: video(channels).generate(torch.rand(shape), frames), right)


@drawn(0.05)
@given(st.data())
def test_overrides(data: st.DataObject) -> None:
    draw = data.draw
    keys = [
        "train_cfg.max_iters",
        "model.net.mixer",
        "optim_wrapper.optimizer.lr",
        "model.net.type",
        "data_root",
        "seed",
    ]
    key = draw(st.one_of(st.sampled_from(keys), st.text("abc._", max_size=8)))
    value = draw(st.one_of(st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=3)))
    safe = draw(st.booleans())
    part = key.split(".")[0]
    arguments = [key, part] if part else ["override"]
    holds(
        "overrides",
        [*arguments, "KEY=VALUE"],
        lambda: load_config(BANDS if not safe else "medical/acdc_umamba", [f"{key}={value}"], safe=safe),
        lambda config: isinstance(config, Config),
    )
