"""Every medical config, made small, trains a step on data in its layout and validates."""

import json

import pytest
import torch
from rich.console import Console

from vision_ssm.engine.checkpoint import load_into, read_state, save_weights
from vision_ssm.engine.config import build, config_names, load_config
from vision_ssm.engine.segmentation.measures import measure_volumes
from vision_ssm.engine.segmentation.regions import RegionDice, RegionLoss
from vision_ssm.engine.training.build import build_loader, build_runner
from vision_ssm.engine.training.evaluate import evaluate, load_task

NETS = {
    "basic_unet": ("features=(4, 4, 4, 4, 4, 4)",),
    "dynunet": ("filters=(4, 4, 4, 4, 4)",),
    "segmamba": ("dims=(4, 8)", "depths=(1, 1)", "hidden=8", "state=2"),
    "segmamba_fsdp": ("dims=(4, 8)", "depths=(1, 1)", "hidden=8", "state=2"),
    "segresnet": ("init_filters=8", "blocks_down=(1, 1)", "blocks_up=(1,)"),
    "ssm_unet": ("dims=(4, 8)", "depths=(1, 1)"),
    "swin_umamba": ("backbone=test_vmamba", "stem_channels=4"),
    "swin_unetr": ("feature_size=12", "depths=(1, 1, 1, 1)", "num_heads=(1, 1, 2, 2)"),
    "ultralight_vm_unet": ("widths=(4, 4, 4, 8, 8, 8)", "state=2"),
    "umamba": ("channels=(4, 8, 8)", "blocks=1", "decoder_blocks=1", "state=2"),
    "vm_unet": ("backbone=test_vmamba", "depths=(1, 1, 1, 1)", "decoder_depths=(1, 1, 1, 1)"),
    "vmamba_unet": ("backbone=test_vmamba", "out_indices=(0, 1)"),
}
SIDES = {
    "dynunet": 32,
    "swin_unetr": 64,
}  # of a patch along z, 16 by default: instance norms need two cells at the coarsest
FOLDS = "train_dataloader.dataset.items.data.folds=3", "val_dataloader.dataset.data.folds=3"
DATA = {
    "acdc": ("train_dataloader.dataset.items.volumes.data.folds=3", FOLDS[1]),
    "brats": (*FOLDS, "train_dataloader.num_workers=0", "optim_wrapper.type=mmengine.optim.OptimWrapper"),
    "decathlon": FOLDS,
    "deep_grey": ("model.inferer.sw_batch_size=64",),
    "deep_grey_3d": (),
    "synapse": (),
}
MEDICAL = [name for name in config_names() if name.startswith("medical/")]


def parts(name: str) -> tuple[str, str]:
    """Data and network of a config: ``medical/deep_grey_3d_umamba`` -> deep_grey_3d, umamba."""
    stem = name.removeprefix("medical/")
    data = max((data for data in DATA if stem.startswith(f"{data}_")), key=len)
    return data, stem.removeprefix(f"{data}_")


def made_small(name: str, small_set, *overrides: str):
    """The config with a tiny network, small patches, and the data set of its layout that the tests make."""
    data, net = parts(name)
    changes = [*DATA[data], "train_cfg.max_iters=1", "train_cfg.val_interval=1", "train_dataloader.batch_size=1"]
    changes += [f"model.net.{one}" for one in NETS[net]]
    if data in ("acdc", "synapse"):
        changes += ["train_dataloader.dataset.size=(32, 32)", "model.inferer.roi_size=(32, 32)"]
    elif data != "deep_grey":
        side = min(SIDES.get(net, 16), 32), min(SIDES.get(net, 16), 32), SIDES.get(net, 16)
        changes += [f"train_dataloader.dataset.size={side}", f"model.inferer.roi_size={side}"]
    root = [] if data.startswith("deep_grey") else [f"data_root={small_set(data)}"]
    return load_config(name, [*root, *changes, "model.inferer.overlap=0.0", *overrides])


@pytest.mark.slow
@pytest.mark.parametrize("name", MEDICAL)
def test_a_medical_config_trains_and_validates(name, small_set, tmp_path):
    config = made_small(name, small_set)
    runner = build_runner(config, tmp_path)
    before = [parameter.detach().clone() for parameter in runner.model.net.parameters()]
    runner.train()
    after = list(runner.model.net.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert 0 <= runner.message_hub.get_scalar(f"val/{config.score}").current() <= 1


@pytest.mark.parametrize(
    "name", [name for name in MEDICAL if parts(name)[1] in ("ssm_unet", "umamba", "segmamba", "vm_unet")]
)
def test_the_twin_has_the_same_config_without_the_scan(name, small_set):
    nets = [build(made_small(name, small_set, *change).model.net) for change in ((), ("model.net.mixer=identity",))]
    counts = [sum(parameter.numel() for parameter in net.parameters()) for net in nets]
    assert counts[1] < counts[0]


@pytest.mark.parametrize("name", [name for name in MEDICAL if "data_root" in load_config(name)])
def test_data_root_reaches_every_set(name):
    config = load_config(name, ["data_root=/elsewhere"])
    roots = []

    def collect(node) -> None:
        if isinstance(node, dict):
            roots.extend([node["root"]] if "root" in node else [])
            [collect(child) for child in node.values()]

    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        collect(config[loader])
    assert roots == ["/elsewhere"] * 3


def test_absent_data_say_how_to_name_them(tmp_path):
    config = load_config("medical/decathlon_dynunet", [f"data_root={tmp_path / 'absent'}"])
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*absent; .*--set data_root=FOLDER"):
        build(config.train_dataloader.dataset)


def test_weights_of_a_network_that_names_a_tensor_twice_are_published(tmp_path):
    """MONAI's DynUNet does; the run of hours that ends with an error instead would be lost."""
    net = torch.nn.ModuleDict({"down": torch.nn.Linear(2, 3)})
    net["skip"] = net["down"]
    path = tmp_path / "weights.safetensors"
    save_weights(path, net, config="c", classes=("a",), channels=2)
    other = torch.nn.ModuleDict({"down": torch.nn.Linear(2, 3)})
    other["skip"] = other["down"]
    load_into(other, read_state(path), path)
    assert torch.equal(other["down"].weight, net["down"].weight)


def test_worker_processes_give_the_same_patches(small_set):
    """In another process as in this one; so a run that goes on sees what it would have seen."""
    batches = []
    for workers in (0, 2):
        config = made_small("medical/decathlon_segresnet", small_set)
        loader = build_loader({**config.train_dataloader, "num_workers": workers})
        loader.sampler.start = 5
        batches.append(next(iter(loader)))
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in ("image", "label"))


REGIONS = {"whole": (1, 2), "core": (2,)}


def test_the_loss_of_regions_is_least_where_the_classes_are_right():
    label = torch.randint(0, 3, (2, 1, 6, 6, 6)).float()
    right = torch.nn.functional.one_hot(label[:, 0].long(), 3).movedim(-1, 1).float() * 20
    loss = RegionLoss(REGIONS)
    assert loss(right, label) < 1e-3
    # A core taken for the rest of the whole costs less than one taken for background.
    as_rest, as_background = right.clone(), right.clone()
    as_rest[:, [1, 2]] = right[:, [1, 2]].where(label != 2, right[:, [2, 1]])
    as_background[:, [0, 2]] = right[:, [0, 2]].where(label != 2, right[:, [2, 0]])
    assert loss.dice(*regions_of(as_rest, label)) < loss.dice(*regions_of(as_background, label))
    assert loss(right.requires_grad_(), label).backward() is None


def regions_of(logits, label):
    """What the Dice loss of ``REGIONS`` compares."""
    chances = logits.softmax(dim=1)
    return torch.stack([chances[:, 1:].sum(dim=1), chances[:, 2]], dim=1), torch.cat([label > 0, label > 1], dim=1)


def test_dice_of_regions_takes_their_classes_together():
    label = torch.zeros(1, 4, 4, 4)
    label[:, :2], label[:, 0] = 1, 2
    prediction = label.clone()
    prediction[label == 2] = 1  # the core was not found, the whole was
    metric = RegionDice(REGIONS)
    metric.process({}, [{"prediction": prediction, "label": label}])
    assert metric.compute_metrics(metric.results) == {"whole": 1.0, "core": 0.0, "mean": 0.5}


def test_arrays_that_no_file_is_prepared_like_are_scored_case_by_case(small_set, tmp_path):
    """Synapse has no ``prepare``; its test items are scored as they are, by the distances that its metrics state."""
    config = made_small("medical/synapse_ultralight_vm_unet", small_set)
    net = build(config.model).net
    save_weights(tmp_path / "net.safetensors", net, config="synapse", classes=tuple(config.classes), channels=1)
    out = tmp_path / "scores.json"
    measure_volumes(config, tmp_path / "net.safetensors", console=Console(quiet=True), out=out)
    written = json.loads(out.read_text())
    assert written["checkpoint"] == str(tmp_path / "net.safetensors")
    assert len(written["cases"]) == len(config.classes)
    assert {f"{metric}/liver" for metric in ("dice", "hd95", "nsd")} < written["means"].keys()
    scores = evaluate(config, load_task(config, tmp_path / "net.safetensors"))
    assert written["means"]["dice/mean"]["mean"] == pytest.approx(scores["dice/mean"], abs=1e-6)
