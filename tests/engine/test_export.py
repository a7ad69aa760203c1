"""Models as files that run without this package: the plain operators, the formats, and what is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import vision_ssm
from vision_ssm.engine.config import load_config
from vision_ssm.engine.export import program as exporting
from vision_ssm.engine.export import table
from vision_ssm.engine.export.file import TOLERANCE, Exported, deviation, export
from vision_ssm.engine.export.formats import FORMATS
from vision_ssm.engine.export.program import EXAMPLE, operators, plain, trace
from vision_ssm.engine.export.subject import Subject, backbone, network
from vision_ssm.kernels import ROUTES, Route, cross_merge, cross_scan, decompositions, routed_scan
from vision_ssm.kernels.routes import encode
from vision_ssm.segmentation import SSMUNet, SwinUMamba, UltraLightVMUNet, UMamba, VMUNet
from vision_ssm.tools import __main__ as cli
from vision_ssm.tools.export import KINDS

# One small model of each family: its name and what makes it small.
FAMILIES = {
    "vmamba": ("test_vmamba", {"depths": (1, 1), "dims": (8, 8)}),
    "vmamba_v0": ("vmamba_tiny_v0", {"depths": (1, 1), "dims": (8, 8), "state": 4}),
    "efficient_vmamba": ("test_efficient_vmamba", {}),
    "vim": ("test_vim", {"depth": 1, "dim": 8, "img_size": 48}),
    "hydra": ("test_hydra", {"depth": 1}),
    "vim2": ("test_vim2", {"depths": (1, 1), "dims": (8, 8), "channel_expand": (1.0, 1.0)}),
}
# One small segmentation network of each kind, for images of one channel and two classes.
NETWORKS = {
    "SSMUNet": lambda: SSMUNet(
        "test_vmamba",
        in_channels=1,
        out_channels=2,
        out_indices=(0, 1),
        decoder_channels=[4] * 3,
        depths=(1, 1),
        dims=(8, 8),
    ),
    "UMamba": lambda: UMamba(2, 1, 2, channels=(4, 8), blocks=1, decoder_blocks=1, state=4),
    "VMUNet": lambda: VMUNet(2, 1, 2, backbone="test_vmamba", depths=[1] * 4, decoder_depths=[1] * 4),
    "SwinUMamba": lambda: SwinUMamba(2, 1, 2, backbone="test_vmamba", stem_channels=8),
    "UltraLightVMUNet": lambda: UltraLightVMUNet(2, 1, 2, widths=[4] * 6),
}
LENGTHS = (1, 2, 31, 32, 33, 70)
ALONE = """
import json, sys, torch
kind, path, image, wanted = sys.argv[1:]
image, wanted = torch.load(image), torch.load(wanted)
if kind == "pt2":
    found = torch.export.load(path).module()(image)
elif kind == "aoti":
    found = torch._inductor.aoti_load_package(path)(image)
elif kind == "torchscript":
    found = torch.jit.load(path)(image)
else:
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
assert "vision_ssm" not in sys.modules
print((found - wanted).abs().max().item() / wanted.abs().max().item())
"""

ops = torch.ops.vision_ssm

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="AOTInductor needs g++, which is not there")

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")  # by torch 2.14


def subject_of(family, sizes=(32, 40), **options):
    """A small model whose scans count: what they add at the beginning of training is lost in rounding."""
    name, small = FAMILIES[family]
    torch.manual_seed(0)
    subject = backbone(name, None, sizes, num_classes=4, **{**small, **options})
    with torch.no_grad():
        for parameter in subject.net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return subject


def network_of(make, sizes=(64, 64)):
    """A small segmentation network, with noise in its weights as above."""
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    least = max(net.reductions[-1]) + 1
    return Subject(net=net, name="net", channels=1, sizes=sizes, classes=2, weights="random", least=least)


def error_alone(kind, path, subject, shape, folder):
    """The greatest difference from the model of what a file computes in a process of its own."""
    image = torch.randn(shape)
    with torch.no_grad():
        torch.save(subject.net(image), folder / "wanted.pt")
    torch.save(image, folder / "image.pt")
    command = [sys.executable, "-W", "ignore", "-c", ALONE, kind, path, folder / "image.pt", folder / "wanted.pt"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("started", [False, True])
def test_plain_selective_and_ssd_scans(length, started):
    state = lambda *shape: torch.randn(*shape) if started else None  # noqa: E731
    u, delta = torch.randn(2, 2, 6, length).unbind()
    B, C = torch.randn(2, 2, 2, 4, length).unbind()
    inputs = (u, delta, -5 * torch.rand(6, 4), B, C, torch.randn(6), torch.randn(6), True, state(2, 6, 4))
    assert_close(decompositions.selective_scan(*inputs), ops.selective_scan(*inputs), rtol=1e-4, atol=1e-4)
    for reverse in (False, True):
        x, dt = torch.randn(2, length, 4, 3), torch.rand(2, length, 4)
        B, C = torch.randn(2, 2, length, 2, 5).unbind()
        inputs = (x, dt, -torch.rand(4), B, C, state(2, 4, 3, 5), reverse)
        assert_close(decompositions.ssd_scan(*inputs), ops.ssd_scan(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("pairs", [False, True])
def test_plain_linear_scan(length, pairs):
    last = (2,) if pairs else ()
    b, resets = torch.randn(length, 2, 3, *last), torch.rand(length, 2) < 0.2
    for a in (0.7 * torch.rand(3, *last), 0.7 * torch.rand(length, 2, 3, *last)):
        for initial in (None, torch.randn(2, 3, *last)):
            for stops in (None, resets):
                inputs = (a, b, initial, stops, pairs)
                assert_close(decompositions.linear_scan(*inputs), ops.linear_scan(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROUTES)
def test_plain_routes(name):
    routes = ROUTES[name]
    grid, count = (6, 4, 2)[: len(routes[0].axes)], len(routes)
    x = torch.randn(2, 3, *grid)
    y = cross_scan(x, routes)
    assert torch.equal(decompositions.cross_scan(x, encode(routes)), y)
    assert_close(decompositions.cross_merge(y, encode(routes), grid), cross_merge(y, routes, grid))
    for maps in {count, 1 if name == "atrous" else count}:
        x, low_rank = torch.randn(2, *grid, 3), torch.randn(2, *grid, maps * 10)
        weights = torch.randn(count, 3, 2), torch.randn(count, 3), -torch.rand(count, 3, 4), torch.randn(count, 3)
        wanted = routed_scan(x, low_rank, *weights, routes)
        found = decompositions.routed_scan(x, low_rank, *weights, encode(routes), [])
        assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        flat = decompositions.routed_scan(x.flatten(1, -2), low_rank.flatten(1, -2), *weights, encode(routes), grid)
        assert torch.equal(flat.view(x.shape), found)


@pytest.mark.parametrize("grid", [(5, 7), (6, 9), (4, 4)])
def test_a_plain_route_skips_cells_of_any_grid(grid):
    routes = (Route((0, 1), stride=3, offset=(1, 2)),)
    x = torch.randn(1, 2, *grid)
    y = cross_scan(x, routes)
    assert torch.equal(decompositions.cross_scan(x, encode(routes)), y)
    assert torch.equal(decompositions.cross_merge(y, encode(routes), grid), cross_merge(y, routes, grid))


def test_depth_is_the_logarithm_of_the_length(record_property):
    counts = []
    for length in (32, 32**2, 32**3):
        a, b = torch.rand(2, length, 1).unbind()
        counts.append(len(make_fx(lambda a, b: decompositions.scan(a, b))(a, b).graph.nodes))
    record_property("nodes of a scan of 32, 1024 and 32768 steps", counts)
    assert counts[2] - counts[1] == counts[1] - counts[0] and counts[2] < 3.2 * counts[0] < 300


def test_nothing_overflows():
    u, delta = torch.randn(2, 1, 2, 5000).unbind()
    B, C = torch.randn(2, 1, 1, 3, 5000).unbind()
    inputs = (u, 100 * delta.abs(), -50 * torch.rand(2, 3), B, C, None, None, False, None)
    assert_close(decompositions.selective_scan(*inputs), ops.selective_scan(*inputs), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(14, 14), (3, 40), (29, 5)])
def test_bicubic_is_that_of_pytorch(size):
    x = torch.randn(2, 3, 14, 14)
    wanted = F.interpolate(x, size=size, mode="bicubic", antialias=True)
    assert_close(exporting.bicubic(x, size, False), wanted, rtol=1e-5, atol=1e-5)


LARGER = {"efficient_vmamba", "vim2", "vmamba_v0"}


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow if f in LARGER else []) for f in FAMILIES])
def test_onnx_of_every_family(family, tmp_path, record_property):
    subject = subject_of(family)
    done = export(subject, tmp_path / "model.onnx", "onnx")
    record_property("operators and error", (done.nodes, done.error))
    assert done.error < TOLERANCE / 10 and done.checked == ((1, 3, 32, 40),)
    assert done.scans and done.nodes < 250 * done.scans + 400
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("kind", ["pt2", "torchscript", pytest.param("aoti", marks=[pytest.mark.slow, needs_compiler])])
def test_a_file_runs_where_the_package_is_not(kind, tmp_path):
    subject = subject_of("hydra")
    sides, shape = ((32, 64), (5, 3, 64, 33)) if kind == "aoti" else (None, (1, 3, 32, 40))
    done = export(subject, tmp_path / f"model{FORMATS[kind].suffix}", kind, sides)
    assert error_alone(kind, done.path, subject, shape, tmp_path) < TOLERANCE
    extra = {"vision_ssm.json": ""}
    if kind == "aoti":
        return
    if kind == "pt2":
        torch.export.load(done.path, extra_files=extra)
    else:
        with pytest.raises(Exception, match=r"for images of shape \[1, 3, 32, 40\]; got \[1, 3, 32, 41\]"):
            torch.jit.load(done.path, _extra_files=extra)(torch.zeros(1, 3, 32, 41))
    about = json.loads(extra["vision_ssm.json"])
    assert about["model"] == "test_hydra" and about["weights"] == "random" and about["classes"] == 4
    assert about["input"] == {"channels": 3, "axes": 2, "sizes": [32, 40]} and len(about["mean"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_file_takes_sizes_that_were_never_seen(kind, tmp_path, record_property):
    subject = subject_of("vmamba", depths=(1,), dims=(8,))
    done = export(subject, tmp_path / f"model{FORMATS[kind].suffix}", kind, sides=(32, 100))
    record_property("operators and error", (done.nodes, done.error))
    assert {shape[0] for shape in done.checked} == {1, 3} and not {shape[2] for shape in done.checked} & set(EXAMPLE)
    for shape in ((1, 3, 33, 100), (5, 3, 64, 32)):
        assert error_alone(kind, done.path, subject, shape, tmp_path) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vim", "hydra"])
def test_other_families_take_any_size(family, tmp_path):
    done = export(subject_of(family), tmp_path / "model.pt2", "pt2", sides=(32, 100))
    assert done.error < TOLERANCE and len(done.checked) == 3


@pytest.mark.parametrize("name", NETWORKS)
def test_segmentation_networks_are_traced_for_any_size(name):
    subject = network_of(NETWORKS[name])
    program = trace(subject, (subject.least, 100)).module(check_guards=False)
    for shape in ((3, 1, 40, 64), (2, 1, 64, 95), (5, 1, 65, 34)):
        assert deviation(subject.net, program, shape) < TOLERANCE / 100


def test_the_file_of_a_network_pads_and_crops_sizes_that_were_never_seen(tmp_path):
    subject = network_of(partial(UMamba, 2, 1, 2, channels=(4, 8), blocks=1, decoder_blocks=1, mixer="identity"))
    done = export(subject, tmp_path / "net.onnx", "onnx", sides=(8, 32))  # 32 is whole cells: it must be traced padded
    assert done.error < TOLERANCE / 10
    assert error_alone("onnx", done.path, subject, (5, 1, 31, 10), tmp_path) < TOLERANCE / 10


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_network_of_volumes(kind, tmp_path):
    volumes = partial(UMamba, 3, 1, 2, channels=(4, 8), blocks=1, decoder_blocks=1, state=4)
    done = export(network_of(volumes, (8, 9, 10)), tmp_path / f"net{FORMATS[kind].suffix}", kind)
    assert done.scans == 1 and done.error < TOLERANCE / 10 and done.checked == ((1, 1, 8, 9, 10),)


def test_the_parser_of_tensorrt_takes_it(tmp_path):
    trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed: its parser was not asked")
    export(subject_of("vmamba"), tmp_path / "model.onnx", "onnx")
    logger = trt.Logger(trt.Logger.ERROR)
    parser = trt.OnnxParser(trt.Builder(logger).create_network(0), logger)
    assert parser.parse_from_file(str(tmp_path / "model.onnx")), [str(parser.get_error(0))]


@pytest.mark.slow
def test_a_network_of_a_config(tmp_path):
    config = load_config("medical/deep_grey_vmamba_unet", ["model.net.backbone=test_vmamba"])
    subject = network(config, None, (32, 48))
    assert subject.channels == 5 and subject.classes == tuple(config.classes)
    assert network(config, None).sizes == (48, 96) and subject.least == 17
    done = export(subject, tmp_path / "net.ts", "torchscript")
    assert torch.jit.load(done.path)(torch.zeros(1, 5, 32, 48)).shape == (1, 7, 32, 48)


def test_a_checkpoint_is_what_is_exported(tmp_path):
    source = timm.create_model("test_hydra", num_classes=3)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    subject = backbone("test_hydra", tmp_path / "weights.safetensors")
    assert subject.classes == 3 and subject.weights == "weights.safetensors" and not subject.net.training
    assert_close(subject.net.state_dict(), source.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="does not fit"):
        backbone("test_vim", tmp_path / "weights.safetensors")


def test_a_file_that_computes_something_else_gets_no_name(tmp_path, monkeypatch):
    wrong = FORMATS["torchscript"]._replace(read=lambda path: lambda image: torch.ones(len(image), 4))
    monkeypatch.setitem(FORMATS, "torchscript", wrong)
    (tmp_path / "model.ts").write_text("what was there before")
    with pytest.raises(RuntimeError, match=r"off by .* at \(1, 3, 32, 40\); nothing was written"):
        export(subject_of("hydra"), tmp_path / "model.ts", "torchscript")
    assert (tmp_path / "model.ts").read_text() == "what was there before" and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_is_refused(tmp_path):
    subject = subject_of("vmamba")
    with pytest.raises(ValueError, match="the formats are pt2, aoti, onnx, torchscript"):
        export(subject, tmp_path / "a", "tflite")
    with pytest.raises(ValueError, match="for one size; export it with --fixed"):
        export(subject, tmp_path / "a.ts", "torchscript", sides=(32, 64))
    for sides in ((64, 32), (0, 32)):
        with pytest.raises(ValueError, match="the least and a greater one"):
            export(subject, tmp_path / "a.pt2", "pt2", sides=sides)
    with pytest.raises(ValueError, match=r"test_vmamba pads images below 33 .* let its sides begin at 33"):
        export(dataclasses.replace(subject, least=33), tmp_path / "a.pt2", "pt2", sides=(32, 64))
    with pytest.raises(ValueError, match=r"must end in \.pt2; got .*a\.so"):
        export(subject, tmp_path / "a.so", "aoti")
    with pytest.raises(ValueError, match="export the model for a fixed height and width"):
        plain(trace(subject_of("vmamba", mixer="hilbert", depths=(1,), dims=(8,)), (32, 64)))
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--to", "torchscript", "--fixed", "--size", "32", "32"]
    assert cli.main(["export", "test_hydra", *small, "--random-weights"]) == 0
    assert "test_hydra.ts: " in (out := capsys.readouterr().out) and "on 1x3x32x32" in out
    assert cli.main(["export", "test_hydra", *small, "--checkpoint", "absent.safetensors"]) == 2
    assert "absent.safetensors" in capsys.readouterr().err
    assert cli.main(["export", "resnet18", *small, "--random-weights"]) == 2
    assert "unknown model 'resnet18'" in capsys.readouterr().err
    assert cli.main(["export", "test_hydra", "--to", "torchscript", "--random-weights"]) == 2
    assert "--fixed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["export", "test_hydra", *small])  # no word of weights
    assert "--random-weights" in capsys.readouterr().err


def test_the_page_shows_what_was_measured():
    page = Path(__file__).parents[2] / "docs" / "guides" / "export.md"
    assert table.filled(page) == page.read_text(encoding="utf-8")
    for row in table.read(page):
        assert row["model"] in vision_ssm.list_models() or load_config(row["model"]).model
        assert row["error"] <= TOLERANCE
    measured = {row["model"] for row in table.read(page) if row["to"] == "pt2"}
    assert measured >= {*vision_ssm.list_models()}


def test_figures_are_kept_beside_a_page(tmp_path):
    subject = subject_of("hydra")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- exported -->\n<!-- /exported -->\nafter\n")
    (tmp_path / "model.ts").write_bytes(bytes(2**20))
    for error in (2e-3, 1e-6):  # the second in place of the first
        made = {"path": tmp_path / "model.ts", "scans": 2, "nodes": 99, "error": error}
        done = Exported(**made, sides=None, checked=((1, 3, 32, 40),))
        table.record(page, subject, "torchscript", done)
    (row,) = table.read(page)
    assert row["model"] == "test_hydra" and row["error"] == 1e-6 and row["mib"] == 1.0
    (line,) = [line for line in page.read_text().splitlines() if line.startswith("| `test_hydra`")]
    assert (
        "| fixed |" in line
        and "| 2 | 99 | 1.0 | 1x3x32x40 | 1.0e-06 |" in line
        and page.read_text().endswith("after\n")
    )
    table.record(page, subject, "torchscript", dataclasses.replace(done, sides=(32, 64)))
    assert "| torchscript | 32 to 64 |" in page.read_text() and len(table.read(page)) == 2  # both kinds of file
    (tmp_path / "other.md").write_text("no block")
    with pytest.raises(ValueError, match="no block <!-- exported -->"):
        table.record(tmp_path / "other.md", subject, "torchscript", done)
    assert not (tmp_path / "other.jsonl").exists()


def test_the_command_knows_every_format():
    assert tuple(FORMATS) == KINDS


def test_operators_of_this_package_are_gone():
    traced = trace(subject_of("hydra"), None)
    assert operators(traced)["vision_ssm.ssd_scan.default"] == 2
    names = operators(plain(traced))
    assert not [name for name in names if "vision_ssm" in name] and names["aten.linear.default"]
