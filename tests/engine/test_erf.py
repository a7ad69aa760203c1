"""The effective receptive field: where it must be zero, where it must not, its areas, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import vision_ssm  # noqa: F401  registers the models
from vision_ssm.engine.erf import Field, average, initial, pictures, receptive_fields
from vision_ssm.tools import __main__ as cli

CPU = torch.device("cpu")


class Convolutions(nn.Sequential):
    """A network whose last map is that of its last layer."""

    def forward_intermediates(self, x, indices, intermediates_only):
        return [self(x)]


def field(network, size=64):
    return average([network], [torch.rand(3, size, size)], CPU)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.png", "a.jpg"):
        noise = np.random.default_rng(len(name)).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_convolution_sees_its_window():
    window = nn.Conv2d(3, 1, 3, padding=1)
    nn.init.ones_(window.weight)
    seen = field(Convolutions(window), size=20)
    expected = np.zeros((20, 20))
    expected[9:12, 9:12] = 1 / 9
    np.testing.assert_allclose(seen.shares, expected)
    assert seen.centre == pytest.approx((10.5, 10.5))
    assert seen.area(0.1) == pytest.approx(1 / 400)
    assert seen.area(0.2) == seen.area(0.99) == pytest.approx(9 / 400)


def test_convolutions_see_no_more_than_in_theory():
    seen = field(Convolutions(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1)), size=20)
    inside = np.zeros((20, 20), dtype=bool)
    inside[8:13, 8:13] = True
    assert (seen.shares[inside] > 0).all()
    assert (seen.shares[~inside] == 0).all()
    assert seen.area(0.5) < seen.area(0.99) <= 25 / 400


def test_a_normalised_map_is_not_lost_in_its_mean():
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(1, 8, affine=False)
    assert field(Convolutions(*layers)).shares.max() > 0


def test_a_scan_reaches_the_borders_and_its_twin_does_not():
    scanned, twin = (field(timm.create_model("test_hydra", mixer=mixer)) for mixer in ("hydra", "identity"))
    patch = np.zeros((64, 64), dtype=bool)
    patch[32:48, 32:48] = True
    assert (scanned.shares > 0).all()
    assert (twin.shares[patch] > 0).any()
    assert (twin.shares[~patch] == 0).all()


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim", "test_vit", "test_convnext", "test_resnet"])
def test_any_registered_model(name, folder):
    images = pictures(folder, name, size=64, most=1)
    torch.manual_seed(0)
    seen = initial(name, images, 2, CPU)
    assert seen.shares.shape == (64, 64)
    assert seen.shares.sum() == pytest.approx(1)
    assert 0 < seen.area(0.2) <= seen.area(0.5) <= seen.area(0.99) <= 1
    torch.manual_seed(0)
    np.testing.assert_array_equal(seen.shares, initial(name, images, 2, CPU).shares)


def test_every_sample_counts_alike():
    weak, strong = (Convolutions(nn.Conv2d(3, 1, 1)) for _ in range(2))
    nn.init.constant_(weak[0].weight, 1e-3)
    nn.init.constant_(strong[0].weight, 1e3)
    shifted = Convolutions(nn.ZeroPad2d((1, 0, 0, 0)), *strong)
    shares = average([weak, shifted], [torch.rand(3, 4, 4)], CPU).shares
    assert shares[2, 1] == shares[2, 2] == 0.5


def test_pictures_are_read_by_name_and_normalised(folder):
    first, second = pictures(folder, "test_vmamba", size=32, most=9)
    assert first.shape == second.shape == (3, 32, 32)
    assert torch.equal(first, pictures(folder / "a.jpg", "test_vmamba", size=32, most=1)[0])
    assert first.min() < -0.5


def test_the_picture_says_what_it_shows():
    shares = np.full((8, 8), 1 / 64)
    figure = receptive_fields({"before training": Field(shares=shares, samples=3)}, "a model, 8 px")
    assert figure.get_suptitle() == "a model, 8 px"
    assert figure.axes[0].get_title().startswith("before training, mean of 3")
    assert len(figure.axes) == 2  # the colour bar


def test_the_command_before_and_after_training(folder, tmp_path, capsys):
    weights, out = tmp_path / "weights.safetensors", tmp_path / "field.png"
    save_file(timm.create_model("test_vmamba", num_classes=3).state_dict(), weights)
    command = ["erf", "test_vmamba", folder, "--size", "64", "--samples", "2", "--out", out, "--device", "cpu"]
    assert cli.main([*map(str, command)]) == 0
    assert "trained" not in capsys.readouterr().out.replace("before training", "")
    alone = json.loads(out.with_suffix(".json").read_text())["fields"]
    assert list(alone) == ["before training"]

    assert "--overwrite" in refused(capsys, *command)
    assert cli.main([*map(str, command), "--checkpoint", str(weights), "--overwrite"]) == 0
    assert "trained: 20% of the gradient in" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    written = json.loads(out.with_suffix(".json").read_text())
    assert written["checkpoint"] == str(weights)
    assert written["fields"]["before training"] == alone["before training"]
    assert set(written["fields"]["trained"]["areas"]) == {"20%", "50%", "99%"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "field.json",
        "field.png",
        "pictures",
        "weights.safetensors",
    ]


def refused(capsys, *arguments: object) -> str:
    """The one line that a failing command writes."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_input_is_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (folder / "b.png").read_bytes()
    Path("broken.png").write_bytes(whole[: len(whole) // 2])
    Path("empty").mkdir()
    save_file(timm.create_model("test_hydra").state_dict(), "other.safetensors")
    picture = folder / "a.jpg"
    assert "no such picture or folder: absent.jpg" in refused(capsys, "erf", "test_vmamba", "absent.jpg")
    assert "broken.png cannot be read as a picture" in refused(capsys, "erf", "test_vmamba", "broken.png")
    assert "notes.txt cannot be read" in refused(capsys, "erf", "test_vmamba", folder / "notes.txt")
    assert "no picture in empty" in refused(capsys, "erf", "test_vmamba", "empty")
    assert "vmamba_huge" in refused(capsys, "erf", "vmamba_huge", picture)
    assert "at least 1; got size 224 and 0 samples" in refused(capsys, "erf", "test_vmamba", picture, "--samples", 0)
    assert "ends in .png" in refused(capsys, "erf", "test_vmamba", picture, "--out", "field.jpg")
    assert "no folder absent" in refused(capsys, "erf", "test_vmamba", picture, "--out", "absent/field.png")
    assert "does not fit" in refused(capsys, "erf", "test_vmamba", picture, "--checkpoint", "other.safetensors")
    assert "no checkpoint at absent.pth" in refused(capsys, "erf", "test_vmamba", picture, "--checkpoint", "absent.pth")
    assert not list(tmp_path.glob("*_erf.*"))


def test_a_network_without_maps_or_gradient_is_refused():
    with pytest.raises(ValueError, match="Identity has no forward_intermediates"):
        field(nn.Identity())
    dead = nn.Conv2d(3, 1, 1)
    nn.init.zeros_(dead.weight)
    with pytest.raises(ValueError, match="gradient of Convolutions by its input is zero or not finite"):
        field(Convolutions(dead))
