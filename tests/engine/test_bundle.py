"""MONAI Bundles: complete, accepted by MONAI's own commands, and labelling volumes as ``vision-ssm predict`` does."""

import json
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from data_sets import save, small_brain
from documents import blocks, shell_lines
from torch.testing import assert_close

pytest.importorskip("fire")
pytest.importorskip("ignite")
pytest.importorskip("jsonschema")

from monai import bundle as monai_bundle
from monai.bundle import ConfigParser, ConfigWorkflow

from vision_ssm.data.deep_grey import deep_grey_files
from vision_ssm.engine.checkpoint import save_weights
from vision_ssm.engine.config import build, load_config
from vision_ssm.engine.segmentation import bundle
from vision_ssm.engine.segmentation.bundle import About, create_bundle
from vision_ssm.tools import __main__ as cli

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = str(FIXTURES / "tiny_unet.py")
SCHEMA = FIXTURES / "bundle_schema.json"
COMPLETE = [
    "LICENSE",
    "configs/inference.json",
    "configs/metadata.json",
    "configs/train.py",
    "docs/README.md",
    "models/model.pt",
]

pytestmark = pytest.mark.filterwarnings(
    "ignore:parsing config_file:UserWarning",  # MONAI says so of every config
    "ignore:No hash value provided:UserWarning",  # of the schema
    "ignore:`torch.jit:FutureWarning",  # MONAI's export
    "ignore:`torch.jit:DeprecationWarning",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config, file = load_config(TINY), tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_weights(file, build(config.model.net), config="tiny", classes=tuple(config.classes), channels=3)
    return file


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("bundles") / "tiny"
    assert cli.main(["bundle", "create", TINY, str(weights), str(target), "--modality", "MR"]) == 0
    return target


@pytest.fixture
def files(made) -> dict[str, str]:
    return {"meta_file": str(made / "configs/metadata.json"), "config_file": str(made / "configs/inference.json")}


def refused(capsys, *arguments: object) -> str:
    assert cli.main(["bundle", "create", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_bundle_is_complete_and_lone(made):
    assert sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()) == COMPLETE
    assert [path.name for path in made.parent.iterdir()] == ["tiny"]
    assert "Apache License" in (made / "LICENSE").read_text()
    assert "1 hippocampus" in (made / "docs/README.md").read_text()


def test_it_holds_the_weights(made, weights):
    net = ConfigParser(json.loads((made / "configs/inference.json").read_text())).get_parsed_content("network_def")
    state = torch.load(made / "models/model.pt", weights_only=True)
    net.load_state_dict(state)
    config = load_config(TINY)
    original = build(config.model.net)
    original.load_state_dict(bundle.read_state(weights))
    image = torch.randn(2, 3, 12, 24)
    with torch.no_grad():
        assert_close(net.eval()(image), original.eval()(image), rtol=0, atol=0)


def test_verify_metadata(files):
    monai_bundle.verify_metadata(meta_file=files["meta_file"], filepath=SCHEMA)


@pytest.mark.parametrize("key", json.loads(SCHEMA.read_text())["required"])
def test_verify_metadata_misses_each_key(key, files, tmp_path):
    metadata = json.loads(Path(files["meta_file"]).read_text())
    del metadata[key]
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=key):
        monai_bundle.verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=SCHEMA)


def test_metadata_describes_the_network(files):
    metadata = json.loads(Path(files["meta_file"]).read_text())
    assert metadata["version"] in metadata["changelog"]
    assert metadata["schema"].startswith("https://")
    image, pred = (
        metadata["network_data_format"][way][name] for way, name in (("inputs", "image"), ("outputs", "pred"))
    )
    assert (image["num_channels"], image["spatial_shape"], image["modality"]) == (3, [12, 24], "MR")
    assert list(pred["channel_def"].values())[:2] == ["background", "hippocampus"]
    assert len(image["channel_def"]) == 3 and len(pred["channel_def"]) == pred["num_channels"] == 7


def test_verify_net_in_out(files):
    monai_bundle.verify_net_in_out(net_id="network_def", device="cpu", **files)
    with pytest.raises(ValueError, match="output channel number"):
        monai_bundle.verify_net_in_out(
            net_id="network_def", device="cpu", **files, **{"_meta_#network_data_format#outputs#pred#num_channels": 4}
        )


def test_every_property_of_an_inference_bundle_is_there(made, files):
    brain = deep_grey_files()[0]["image"]
    workflow = ConfigWorkflow(
        workflow_type="infer", logging_file=False, **files, bundle_root=str(made), dataset_dir=brain
    )
    workflow.initialize()
    assert not workflow.check_properties()  # the names of those that are missing


@pytest.mark.slow
def test_run_labels_a_volume_as_predict_does(made, weights, tmp_path):
    brain = nibabel.load(deep_grey_files()[0]["image"])
    image = str(tmp_path / "brain.nii.gz")
    nibabel.save(brain.slicer[20:68, 30:78, 20:44], image)
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    done = subprocess.run(
        [*command, "--datalist", f"['{image}']", "--output_dir", str(tmp_path / "eval")],
        cwd=made,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "eval").iterdir()
    assert cli.main(["predict", TINY, str(weights), image, str(tmp_path / "ours.nii.gz")]) == 0
    found, ours = (nibabel.load(path) for path in (written, tmp_path / "ours.nii.gz"))
    assert found.shape == ours.shape and found.get_data_dtype() == np.uint8
    np.testing.assert_allclose(found.affine, nibabel.load(image).affine)
    labels, expected = (np.asarray(one.dataobj) for one in (found, ours))
    assert len(np.unique(expected)) > 1
    assert (labels == expected).mean() > 0.9999  # float32 on either side of a tie


def test_the_commands_of_its_readme_run(made, tmp_path, monkeypatch):
    """In their order, as they stand, on files of the names that they have."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "tiny"))
    shutil.copy(SCHEMA, "schema.json")
    image, _, affine = small_brain()
    for name in ("FOLDER/case", "one", "another"):
        save(Path(f"{name}.nii.gz"), image, affine)
    (block,) = [block for block in blocks(Path("docs/README.md")) if block.language == "shell"]
    commands = [shlex.split(line) for line in shell_lines(block)]
    assert [command[0] for command in commands] == ["python"] * 5 + ["vision-ssm"]
    for command in commands[:-1]:
        monkeypatch.setattr(sys, "argv", command[2:])
        runpy.run_module(command[2], run_name="__main__")
    assert sorted(path.name for path in Path("eval").iterdir()) == [
        f"{name}_labels.nii.gz" for name in ("another", "case", "one")
    ]
    assert Path("models/model.ts").is_file()
    assert cli.main(commands[-1][1:]) == 0


def test_cases_of_several_modalities_are_put_together(tmp_path):
    config = load_config(
        str(FIXTURES / "bands.py"),
        ["modalities=('t1', ('t2', 't2w'))", "prepare.0.channels=2", "model.net.in_channels=2"],
    )
    net = build(config.model.net)
    with torch.no_grad():  # the sum of both channels against 1 and 3: background, low, high
        net.weight.copy_(torch.tensor([[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]]).reshape(3, 2, 1, 1, 1))
        net.bias.copy_(torch.tensor([0.0, -1.0, -6.0]))
    save_weights(tmp_path / "w.safetensors", net, config="bands", classes=("low", "high"), channels=2)
    create_bundle(config, tmp_path / "w.safetensors", tmp_path / "bands", About())
    metadata = json.loads((tmp_path / "bands/configs/metadata.json").read_text())
    assert metadata["network_data_format"]["inputs"]["image"]["channel_def"] == {"0": "t1", "1": "t2"}

    (tmp_path / "cases").mkdir()
    wanted = np.random.default_rng(0).integers(0, 3, (9, 10, 7)).astype(np.float32)
    affine = np.diag([-2.0, 1.0, 3.0, 1.0])
    for name, voxels in (("patient_t1", wanted), ("patient_t2w", wanted > 1)):
        nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), affine), tmp_path / "cases" / f"{name}.nii")
    parser = ConfigParser(json.loads((tmp_path / "bands/configs/inference.json").read_text()))
    parser.update({"bundle_root": str(tmp_path / "bands"), "dataset_dir": str(tmp_path / "cases")})
    parser.get_parsed_content("run")
    found = nibabel.load(tmp_path / "bands/eval/patient_t1_labels.nii.gz")
    np.testing.assert_array_equal(np.asarray(found.dataobj), wanted)
    np.testing.assert_allclose(found.affine, affine)


def test_a_folder_without_volumes_is_named(files, tmp_path):
    parser = ConfigParser(json.loads(Path(files["config_file"]).read_text()))
    parser.update({"dataset_dir": str(tmp_path)})
    with pytest.raises(RuntimeError) as stop:
        parser.get_parsed_content("datalist")
    assert "no case in" in str(stop.value.__cause__)


def test_ckpt_export(made, files, tmp_path):
    exported = tmp_path / "model.ts"
    monai_bundle.ckpt_export(
        net_id="network_def", filepath=str(exported), ckpt_file=str(made / "models/model.pt"), **files
    )
    net = ConfigParser(json.loads(Path(files["config_file"]).read_text())).get_parsed_content("network_def").eval()
    net.load_state_dict(torch.load(made / "models/model.pt", weights_only=True))
    loaded = torch.jit.load(exported)
    with torch.no_grad():
        for image in (torch.randn(4, 3, 12, 24), torch.randn(1, 3, 13, 21)):
            assert_close(loaded(image), net(image), rtol=1e-4, atol=1e-5)


def test_the_training_config_travels(made):
    again, config = load_config(str(made / "configs/train.py")), load_config(TINY)
    assert again.to_dict() == config.to_dict()
    assert bundle.docstring(again) == bundle.docstring(config)


def test_overrides_reach_the_bundle(tmp_path):
    config = load_config(TINY, ["model.net.mixer=identity"])
    net = build(config.model.net)
    save_weights(tmp_path / "w.safetensors", net, config="tiny", classes=tuple(config.classes), channels=3)
    create_bundle(config, tmp_path / "w.safetensors", tmp_path / "twin", About())
    assert json.loads((tmp_path / "twin/configs/inference.json").read_text())["network_def"]["mixer"] == "identity"


def test_bad_input_is_refused_and_leaves_nothing(weights, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    assert "choose a new folder" in refused(capsys, TINY, weights, tmp_path / "taken")
    assert "no such folder" in refused(capsys, TINY, weights, tmp_path / "absent" / "new")
    assert "no such checkpoint" in refused(capsys, TINY, tmp_path / "w.pth", tmp_path / "new")
    assert "does not segment volumes" in refused(capsys, "image/mnist_vmamba_nano", weights, tmp_path / "new")
    assert "another model" in refused(capsys, "medical/deep_grey_basic_unet", weights, tmp_path / "new")
    overridden = ("--set", "classes=('all',)")
    assert "has 2 classes (background, all), but model.net.out_channels is for 7" in refused(
        capsys, TINY, weights, tmp_path / "new", *overridden
    )
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_interrupted_bundle_leaves_nothing(weights, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        create_bundle(load_config(TINY), weights, tmp_path / "new", About())
    assert list(tmp_path.iterdir()) == []


def test_the_language_is_monais():
    described = bundle.translate({"type": "monai.transforms.Compose", "transforms": (1, None, {"a": True})})
    assert described == {"_target_": "monai.transforms.Compose", "transforms": [1, None, {"a": True}]}
    assert bundle.translate({"function": len}) == {"function": {"_target_": "builtins.len", "_mode_": "callable"}}
    for entry, complaint in ((lambda: 0, "by name"), ("$exit()", "evaluate"), (object(), "describe it as")):
        with pytest.raises(ValueError, match=complaint):
            bundle.translate({"entry": entry})


def test_pretrained_weights_are_not_fetched_for_a_bundle():
    config = load_config(TINY, ["model.net.pretrained=True"])
    assert bundle.inference_config(config)["network_def"]["pretrained"] is False
