"""nnU-Net v2 with our networks: built from any plan, and trained and used by the real nnU-Net on pieces of a brain."""

import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("nnunetv2")

from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

import vision_ssm.nnunet
from vision_ssm.data.deep_grey import deep_grey_files
from vision_ssm.nnunet import vision_ssm_trainers as trainers

OURS = vision_ssm.nnunet.__path__[0]
FOLDERS = os.pathsep.join((OURS, str(Path(__file__).parents[1] / "fixtures" / "nnunet")))
ALL = {name: found for name, found in vars(trainers).items() if name.startswith("nnUNetTrainer") and name[13:]}
NETWORKS = [name for name in ALL if not name.endswith("Identity")]
PLANS = {  # patch, halved axes of each stage but the first
    "image": ((24, 20), ((1, 1), (1, 1))),
    "image halved along one axis": ((40, 12), ((1, 1), (1, 0), (1, 0))),
    "volume": ((16, 8, 12), ((1, 1, 1), (1, 1, 1))),
    "thick slices": ((5, 24, 20), ((0, 1, 1), (0, 1, 1))),
}


@pytest.fixture(params=PLANS)
def configuration(request) -> ConfigurationManager:
    return ConfigurationManager(planned(*PLANS[request.param]))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(trainers.nnUNetTrainerSSMUNet, "backbone", "test_vmamba")


def planned(patch, halved) -> dict:
    """A configuration as nnU-Net plans it."""
    strides = [[1] * len(patch), *([1 + half for half in stage] for stage in halved)]
    kernels = [[1 + 2 * (stage > 0 or axis > 0) for axis in range(len(patch))] for stage in range(len(strides))]
    architecture = {
        "strides": strides,
        "kernel_sizes": kernels,
        "features_per_stage": [8 * 2**stage for stage in range(len(strides))],
        "n_conv_per_stage": [1] * len(strides),
        "n_conv_per_stage_decoder": [1] * len(halved),
    }
    return {"patch_size": list(patch), "architecture": {"arch_kwargs": architecture}}


def build(trainer, configuration, deep_supervision=True):
    torch.manual_seed(0)
    return trainer.build_network_architecture(None, configuration, 2, 3, deep_supervision)


def trainer_of(trainer, configuration, network):
    """The trainer as nnU-Net holds it once the network is built, without its folders."""
    made = trainer.__new__(trainer)
    made.configuration_manager, made.network = configuration, network
    made.is_ddp, made.enable_deep_supervision = False, True
    return made


def scans(network) -> int:
    return sum(name.endswith("A_log") for name, _ in network.named_parameters())


def test_every_network_has_its_twin():
    assert set(NETWORKS) == {
        "nnUNetTrainerSSMUNet",
        "nnUNetTrainerSegMamba",
        "nnUNetTrainerUMamba",
        "nnUNetTrainerUMambaEncoder",
    }
    assert {f"{name}Identity" for name in NETWORKS} < set(ALL)


def test_nnunet_finds_them_all(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", FOLDERS)
    for name, trainer in ALL.items():
        found = recursive_find_trainer_class_by_name(name)
        assert found.__name__ == name
        assert dict(found.options) == dict(trainer.options)
    assert recursive_find_trainer_class_by_name("nnUNetTrainerTestSSMUNet").backbone == "test_vmamba"


@pytest.mark.parametrize("name", NETWORKS)
def test_levels_are_those_of_the_targets(name, configuration):
    """While training and while validating; the finest is as large as the patch."""
    network = build(ALL[name], configuration)
    trainer = trainer_of(ALL[name], configuration, network)
    patch = configuration.patch_size
    targets = DownsampleSegForDSTransform(trainer._get_deep_supervision_scales())(
        segmentation=torch.zeros(1, *patch, dtype=torch.int16)
    )["segmentation"]
    assert len(targets) >= 2
    for start in (network.train, trainer.on_validation_epoch_start):
        start()
        outputs = network(torch.randn(2, 2, *patch))
        assert [tuple(level.shape) for level in outputs] == [(2, 3, *target.shape[1:]) for target in targets]
        assert outputs[0].shape[2:] == tuple(patch)


@pytest.mark.parametrize("name", NETWORKS)
def test_inference_takes_the_weights_of_a_training(name, configuration):
    trained = build(ALL[name], configuration).eval()
    network = build(ALL[name], configuration, deep_supervision=False).eval()
    network.load_state_dict(trained.state_dict())
    image = torch.randn(1, 2, *configuration.patch_size)
    with torch.no_grad():
        logits = network(image)
    assert logits.shape == (1, 3, *configuration.patch_size)
    assert logits.min() < 0  # no softmax, no sigmoid


@pytest.mark.parametrize("plan", ["image", "volume"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_twin_is_without_scans(name, plan):
    configuration = ConfigurationManager(planned(*PLANS[plan]))
    network, twin = (build(ALL[found], configuration) for found in (name, f"{name}Identity"))
    assert scans(network) > 0 == scans(twin)
    image = torch.randn(1, 2, *configuration.patch_size)
    assert [level.shape for level in twin(image)] == [level.shape for level in network(image)]


@pytest.mark.parametrize("name", ["nnUNetTrainerUMamba", "nnUNetTrainerSSMUNet"])
def test_what_is_planned_is_built(name):
    configuration = ConfigurationManager(planned(*PLANS["thick slices"]))
    assert build(ALL[name], configuration).reductions == [[1, 1, 1], [1, 2, 2], [1, 4, 4]]
    network = build(ALL[name], configuration)
    kernels = {tuple(parameter.shape[2:]) for parameter in network.parameters() if parameter.ndim == 5}
    assert (3, 3, 3) in kernels and ((1, 3, 3) in kernels) == (name == "nnUNetTrainerUMamba")  # of the first stage


def test_norms_evaluate_while_validating():
    configuration = ConfigurationManager(planned(*PLANS["volume"]))
    network = build(trainers.nnUNetTrainerUMamba, configuration).train()
    trainer = trainer_of(trainers.nnUNetTrainerUMamba, configuration, network)
    trainer.on_validation_epoch_start()
    assert {type(module) for module in network.modules() if module.training} == {type(network), type(network.decoder)}


def test_deep_supervision_is_switched():
    configuration = ConfigurationManager(planned(*PLANS["image"]))
    for name in ("nnUNetTrainerUMamba", "nnUNetTrainerSSMUNet"):
        network = build(ALL[name], configuration).train()
        trainer = trainer_of(ALL[name], configuration, network)
        image = torch.randn(2, 2, 24, 20)
        assert isinstance(network(image), list)
        trainer.set_deep_supervision_enabled(False)
        assert isinstance(network(image), torch.Tensor)
        trainer.set_deep_supervision_enabled(True)
        assert isinstance(network(image), list)


def test_the_older_signature_and_plans():
    """Before 2.4 dataset.json comes second, the number of outputs from the labels, and the plan is flat."""
    new = planned(*PLANS["volume"])
    parts = new["architecture"]["arch_kwargs"]
    old = {
        "patch_size": new["patch_size"],
        "pool_op_kernel_sizes": parts["strides"],
        "conv_kernel_sizes": parts["kernel_sizes"],
        "n_conv_per_stage_encoder": parts["n_conv_per_stage"],
        "n_conv_per_stage_decoder": parts["n_conv_per_stage_decoder"],
        "UNet_base_num_features": 8,
        "unet_max_num_features": 16,
    }
    parts["features_per_stage"] = [8, 16, 16]
    plans = SimpleNamespace(get_label_manager=lambda dataset: SimpleNamespace(num_segmentation_heads=dataset["heads"]))
    arguments = (plans, {"heads": 3}, SimpleNamespace(configuration=old), 2)
    torch.manual_seed(0)
    network = trainers.nnUNetTrainerUMamba.build_network_architecture(*arguments, enable_deep_supervision=False)
    assert_close(
        network.state_dict(),
        build(trainers.nnUNetTrainerUMamba, ConfigurationManager(new)).state_dict(),
        rtol=0,
        atol=0,
    )
    assert isinstance(network.train()(torch.randn(1, 2, 16, 8, 12)), torch.Tensor)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Five pieces of the brain, slices 2 mm apart, planned and preprocessed by nnU-Net; the first is to be labelled."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    root = tmp_path_factory.mktemp("nnunet")
    raw = root / "raw" / "Dataset101_Brain"
    image, label = (nibabel.load(deep_grey_files()[0][key]) for key in ("image", "label"))
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / folder).mkdir(parents=True)
    for number, (x, y) in enumerate(((16, 24), (52, 24), (18, 40), (50, 44), (30, 30))):
        piece = np.s_[x : x + 24, y : y + 24, 20:36:2]
        classes = np.minimum(np.asarray(label.slicer[piece].dataobj), 2)
        nibabel.save(image.slicer[piece], raw / "imagesTr" / f"brain_{number}_0000.nii.gz")
        nibabel.save(
            nibabel.Nifti1Image(classes, image.slicer[piece].affine), raw / "labelsTr" / f"brain_{number}.nii.gz"
        )
    nibabel.save(image.slicer[16:40, 24:48, 20:36:2], raw / "imagesTs" / "brain_0000.nii.gz")
    about = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "hippocampus": 1, "other": 2}}
    (raw / "dataset.json").write_text(json.dumps(about | {"numTraining": 5, "file_ending": ".nii.gz"}))
    with pytest.MonkeyPatch.context() as environment:
        for key, folder in (("raw", "raw"), ("preprocessed", "preprocessed"), ("results", "results")):
            environment.setenv(f"nnUNet_{key}", str(root / folder))
        environment.setenv("nnUNet_extTrainer", FOLDERS)
        environment.setenv("nnUNet_n_proc_DA", "1")
        extract_fingerprints([101], num_processes=1)
        plan_experiments([101])
        preprocess([101], configurations=("2d", "3d_fullres"), num_processes=(1, 1))
        environment.setenv("nnUNet_n_proc_DA", "0")  # data are augmented in this process
        yield root


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # nnU-Net's own
@pytest.mark.parametrize(
    ("name", "configuration"), [("nnUNetTrainerTestSSMUNet", "2d"), ("nnUNetTrainerUMambaEncoder", "3d_fullres")]
)
def test_an_epoch_and_a_prediction(name, configuration, dataset):
    predict = importlib.import_module("nnunetv2.inference.predict_from_raw_data")
    folder = dataset / "preprocessed" / "Dataset101_Brain"
    plans, about = (json.loads((folder / file).read_text()) for file in ("nnUNetPlans.json", "dataset.json"))
    trainer = recursive_find_trainer_class_by_name(name)(
        plans | {"continue_training": False}, configuration, 0, about, torch.device("cpu")
    )
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
    trainer.run_training()
    checkpoint = torch.load(Path(trainer.output_folder, "checkpoint_final.pth"), weights_only=False)
    assert checkpoint["trainer_name"] == name
    losses = [checkpoint["logging"][f"{part}_losses"] for part in ("train", "val")]
    assert np.isfinite(losses).all() and np.shape(losses) == (2, 1)

    predictor = predict.nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), "checkpoint_final.pth")
    labels = dataset / "labels" / name
    labels.mkdir(parents=True)
    images = dataset / "raw" / "Dataset101_Brain" / "imagesTs"
    predictor.predict_from_files_sequential(str(images), str(labels))
    found, image = nibabel.load(labels / "brain.nii.gz"), nibabel.load(images / "brain_0000.nii.gz")
    assert found.shape == image.shape
    np.testing.assert_allclose(found.affine, image.affine, atol=1e-5)
    assert set(np.unique(found.dataobj)) <= {0, 1, 2}
