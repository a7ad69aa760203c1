"""Every medical config, made small, trains a step on data in its layout and validates."""

import pytest
import torch

from vision_ssm.engine.config import build, config_names, load_config
from vision_ssm.engine.regions import RegionDice, RegionLoss
from vision_ssm.engine.runner import build_runner

NETS = {
    "basic_unet": ("features=(4, 4, 4, 4, 4, 4)",),
    "dynunet": ("filters=(4, 4, 4, 4, 4)",),
    "segmamba": ("dims=(4, 8)", "depths=(1, 1)", "hidden=8", "state=2"),
    "segresnet": ("init_filters=8", "blocks_down=(1, 1)", "blocks_up=(1,)"),
    "ssm_unet": ("dims=(4, 8)", "depths=(1, 1)"),
    "swin_umamba": ("backbone=test_vmamba", "stem_channels=4"),
    "swin_unetr": ("feature_size=12", "depths=(1, 1, 1, 1)", "num_heads=(1, 1, 2, 2)"),
    "ultralight_vm_unet": ("widths=(4, 4, 4, 8, 8, 8)", "state=2"),
    "umamba": ("channels=(4, 8)", "blocks=1", "decoder_blocks=1", "state=2"),
    "vm_unet": ("backbone=test_vmamba", "depths=(1, 1, 1, 1)", "decoder_depths=(1, 1, 1, 1)"),
    "vmamba_unet": ("backbone=test_vmamba", "out_indices=(0, 1)"),
}
PATCH = "train_dataloader.dataset.size"
FOLDS = "train_dataloader.dataset.items.data.folds=3", "val_dataloader.dataset.data.folds=3"
SMALL_VOLUME = (f"{PATCH}=(32, 32, 32)", "model.inferer.roi_size=(32, 32, 32)")
SMALL_SLICE = (f"{PATCH}=(32, 32)", "model.inferer.roi_size=(32, 32)")
DATA = {
    "acdc": (*SMALL_SLICE, "train_dataloader.dataset.items.volumes.data.folds=3", FOLDS[1]),
    "brats": (
        *SMALL_VOLUME,
        *FOLDS,
        "train_dataloader.num_workers=0",
        "optim_wrapper.type=mmengine.optim.OptimWrapper",
    ),
    "decathlon": (*SMALL_VOLUME, *FOLDS),
    "deep_grey": ("model.inferer.sw_batch_size=64",),
    "deep_grey_3d": (f"{PATCH}=(32, 32, 32)", "model.inferer.roi_size=(64, 64, 64)", "model.inferer.overlap=0.0"),
    "synapse": SMALL_SLICE,
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
    root = () if data.startswith("deep_grey") else (f"data_root={small_set(data)}",)
    if net == "swin_unetr":  # its instance norms need two cells at 1/32
        overrides = (f"{PATCH}=(32, 32, 64)", "model.inferer.roi_size=(32, 32, 64)", *overrides)
    run = ("train_cfg.max_iters=1", "train_cfg.val_interval=1", "train_dataloader.batch_size=2")
    return load_config(name, [*root, *DATA[data], *run, *(f"model.net.{one}" for one in NETS[net]), *overrides])


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
