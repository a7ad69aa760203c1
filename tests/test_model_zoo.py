import json
import re

import pytest
import safetensors.torch
import timm
import torch
from official_files import layouts
from official_shapes import PUBLISHED
from torch.testing import assert_close

import vision_ssm  # noqa: F401  registers the models
from vision_ssm import model_zoo
from vision_ssm.engine.zoo.published import convert_file
from vision_ssm.model_zoo.catalogue import cards
from vision_ssm.model_zoo.converters import rename_keys

SPELLINGS = {  # what older official files call the same parts
    "patch_embed.0.": "patch_embed.proj.",
    "patch_embed.2.": "patch_embed.norm.",
    ".norm.": ".ln_1.",
    ".op.": ".self_attention.",
    "classifier.": "",
}


@pytest.fixture(scope="module", params=["vmamba_tiny", "vmamba_tiny_v0"])
def official(request, parity):
    """Name and official state dict of zeros, but for a few values that tell the axes apart."""
    facts = json.loads((parity / f"{request.param}.json").read_text())
    return request.param, {
        entry["key"]: torch.arange(entry["shape"][0])
        .float()
        .reshape(-1, *[1] * (len(entry["shape"]) - 1))
        .expand(entry["shape"])
        for entry in facts["params"]
    }


def test_every_key_lands(official):
    name, source = official
    with torch.device("meta"):
        wanted = timm.create_model(name).state_dict()
    ours = model_zoo.convert(source, name)
    assert {key: m.shape for key, m in ours.items()} == {key: m.shape for key, m in wanted.items()}
    assert len(ours) == len(source)


def test_released_spellings_mean_the_same(official):
    name, source = official
    want = model_zoo.convert(source, name)
    older = {}
    for key, value in source.items():
        for now, then in SPELLINGS.items():
            if now != ".norm." or ".blocks." in key:  # the norm of a block; that of a down-sampling keeps its name
                key = key.replace(now, then)
        if key.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")):
            value = value[:, :, None, None]
        older[key] = value
    assert older.keys() != source.keys()
    have = model_zoo.convert({"model": older, "epoch": 3}, name)
    assert have.keys() == want.keys() and all(torch.equal(have[key], want[key]) for key in want)


def test_missing_and_left_over_keys_are_all_listed(official):
    name, source = official
    broken = dict(source)
    broken.pop("layers.1.blocks.0.op.Ds")
    broken["layers.9.extra"] = torch.zeros(1)
    broken["classifier.norm.weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match="does not fit") as error:
        model_zoo.convert(broken, name)
    text = str(error.value)
    assert "1 missing: stages.1.blocks.0.mixer.scan.D" in text
    assert "1 unexpected: layers.9.extra" in text
    assert "1 of another shape: norm.weight (5,), not (768,)" in text


def test_another_variant_is_refused(official):
    _, source = official
    with pytest.raises(ValueError, match="does not fit vmamba_small"):
        model_zoo.convert(source, "vmamba_small")


def test_a_model_that_is_built_otherwise_is_told():
    source = layouts("test_vim", img_size=[48, 80])[0]
    with pytest.raises(ValueError, match=r"pos_embed \(1, 16, 32\), not \(1, 101, 32\)"):
        model_zoo.convert(source, "test_vim")
    model = timm.create_model("test_vim", img_size=[48, 80], num_classes=5)
    model.load_state_dict(model_zoo.convert(source, "test_vim", img_size=[48, 80]))


@pytest.mark.parametrize("name", ["model_ema", "state_dict_ema"])
def test_a_moving_average_is_taken_where_it_stands_alone(name, tmp_path):
    theirs, ours = layouts("test_vmamba", classes=3)
    torch.save({name: theirs, "epoch": 3}, tmp_path / "average.pth")
    for model in (
        model_zoo.load(small(), tmp_path / "average.pth"),
        timm.create_model("test_vmamba", num_classes=3, checkpoint_path=str(tmp_path / "average.pth")),
    ):
        assert_close(model.state_dict(), ours, rtol=0, atol=0)
    metadata = convert_file(tmp_path / "average.pth", tmp_path / "average.safetensors")
    assert metadata["moving_average"] == name and "left_out" not in metadata


def test_unknown_model_lists_the_known_ones():
    for name in ("vmamba_huge", "resnet18"):
        with pytest.raises(ValueError, match=f"unknown model '{name}'.*vmamba_tiny"):
            model_zoo.convert({}, name)


def test_mixed_layouts_are_refused():
    with pytest.raises(ValueError, match="both mean 'b'"):
        rename_keys({"a": 1, "b": 2}, [("^a$", "b")])


def small(**kwargs):
    return timm.create_model("test_vmamba", num_classes=3, **kwargs)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_own_checkpoints_load(tmp_path, suffix):
    source, target = small(), small()
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": source.state_dict(), "epoch": 1}, path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    assert model_zoo.load(target, path) is target
    assert_close(target.state_dict(), source.state_dict())


def test_timm_converts_on_the_way(official, tmp_path):
    name, source = official
    path = tmp_path / "official.pth"
    torch.save({"model": source}, path)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert_close(model.state_dict(), model_zoo.convert(source, name))


def test_a_failed_load_leaves_the_model_alone():
    model = small()
    before = {key: m.clone() for key, m in model.state_dict().items()}
    wrong = {key: torch.zeros_like(m) for key, m in before.items()}
    wrong.pop("head.fc.bias")
    with pytest.raises(ValueError, match=r"1 missing: head\.fc\.bias"):
        model_zoo.load(model, wrong)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        model_zoo.load(small(), tmp_path / "none.pth")
    for name in ("cut.safetensors", "cut.pth"):
        path = tmp_path / name
        torch.save(small().state_dict(), path) if name.endswith("pth") else safetensors.torch.save_file(
            small().state_dict(), path
        )
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            model_zoo.load(small(), path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        model_zoo.load(small(), tmp_path / "list.pth")


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_refused(tmp_path, capsys):
    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        model_zoo.load(small(), tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_variant_is_the_one_of_the_fact_sheets(name):
    """Those without a golden file too: each official key has its place, and no place is left."""
    official = {key: torch.empty(shape, device="meta") for key, shape in PUBLISHED[name]().items()}
    ours = model_zoo.convert(official, name)
    assert len(ours) == len(official)
    strides = timm.create_model(name, device="meta").feature_info[0]["reduction"]
    assert strides == (4 if "vmamba" in name else 8 if name.endswith("stride8") else 16)


def test_every_published_variant_has_its_card_and_its_official_shapes(parity):
    assert sorted(PUBLISHED) == sorted(card.model for card in cards())
    for path in parity.glob("*.json"):
        facts = json.loads(path.read_text())
        assert PUBLISHED[path.stem]() == {entry["key"]: tuple(entry["shape"]) for entry in facts["params"]}


def test_sizes_are_those_of_the_fact_sheets(parity):
    table = re.findall(
        r"^\| ([\w, -]+) \| ([\d ]+) \| .* \| ([\d.]+) G \|", (parity / "architectures.md").read_text(), re.M
    )
    rows = {{"Vim-tiny, stride 8": "vim_tiny_stride8"}.get(name, name): sizes for name, *sizes in table}
    assert len(rows) == 10
    for card in cards():
        if card.model in rows:
            parameters, billions = rows[card.model]
            assert card.parameters == int(parameters.replace(" ", ""))
            assert card.multiply_adds == pytest.approx(1e9 * float(billions), rel=0.01)
