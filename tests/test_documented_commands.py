"""What the README and the documentation tell a reader to type works: here it is typed.

The blocks of a page run in their order and in one folder, as a reader goes through them. Commands run as they stand,
with the arguments of ``SHORTER`` behind them; files that a page takes for granted are those of ``GIVEN``. Lines that
cannot run here stand in ``ELSEWHERE``, and are parsed. The Python blocks of a page share their names; those of the
README are run by tests/test_readme.py, each by itself.
"""

import argparse
import doctest
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import LAYOUTS, save, small_brain
from documents import PAGES, README, ROOT, Block, blocks, code_in_sentences, shell_lines
from official_files import official
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from torch.distributed.run import parse_args as launch_arguments

from vision_ssm.engine.benchmark.rows import read_rows
from vision_ssm.engine.config import load_config
from vision_ssm.engine.video.encoding import write_video
from vision_ssm.tools import __main__ as cli

STEPS = "train_cfg.max_iters=2 train_cfg.val_interval=2 train_dataloader.batch_size=2"
SMALL = "model.net.backbone=test_vmamba model.net.out_indices=(0,1)"
PATCHES = "train_dataloader.dataset.size=(16,16,16) model.inferer.roi_size=(16,16,16)"
SEGMAMBA = "model.net.dims=(4,8) model.net.depths=(1,1) model.net.hidden=8 model.net.state=2"
RAMP = "param_scheduler.0.end=1 param_scheduler.1.begin=1"
DIGITS = f"val_dataloader.dataset.clips=1 test_dataloader.dataset.clips=2 {RAMP}"
CINE = "model.net.net.backbone=test_vmamba"
CINE_TEST = f"{CINE} test_dataloader.dataset.frames=2 test_dataloader.dataset.size=(32,32)"

SHORTER = {
    "vision-ssm train ": f"--set {STEPS}",
    "vision-ssm train medical/decathlon_umamba ": "--set model.net.channels=(4,8,8) model.net.decoder_blocks=1 "
    f"model.net.state=2 {PATCHES}",
    "vision-ssm train medical/brats_segmamba ": f"--set {SEGMAMBA} {PATCHES} train_dataloader.num_workers=0",
    "vision-ssm train medical/acdc_vm_unet ": "--set model.net.backbone=test_vmamba model.net.depths=(1,1,1,1) "
    "model.net.decoder_depths=(1,1,1,1) train_dataloader.dataset.size=(32,32) model.inferer.roi_size=(32,32)",
    "vision-ssm train medical/deep_grey_vmamba_unet --work-dir runs/brain --resume": "--set train_cfg.max_iters=3 "
    f"{SMALL}",
    "vision-ssm train medical/deep_grey_vmamba_unet --work-dir runs/averaged ": f"--set {SMALL}",
    "vision-ssm train video/moving_digits_convs5_nano ": f"--set {DIGITS}",
    "vision-ssm train video/moving_digits_vq_nano ": f"--set {DIGITS}",
    "vision-ssm train video/moving_digits_codes_nano ": f"--set {DIGITS}",
    "vision-ssm train video/moving_digits_heading ": "--set test_dataloader.dataset.clips=2",
    "vision-ssm train video/acdc_cine_unet ": f"--set {CINE_TEST} val_dataloader.dataset.frames=2 "
    "val_dataloader.dataset.size=(32,32) train_dataloader.dataset.dataset.frames=2 "
    "train_dataloader.dataset.dataset.size=(32,32)",
    "vision-ssm train video/folder_convs5 ": f"--set {RAMP} model.context=2 model.net.stack.layers=1 "
    "train_dataloader.num_workers=0 train_dataloader.dataset.dataset.frames=3 "
    "train_dataloader.dataset.dataset.size=(16,16) val_dataloader.dataset.frames=4 "
    "test_dataloader.dataset.frames=4 test_dataloader.dataset.size=(16,16)",
    "vision-ssm eval video/moving_digits_convs5_nano ": "--set test_dataloader.dataset.clips=2",
    "vision-ssm eval video/acdc_cine_unet ": f"--set {CINE_TEST}",
    "vision-ssm predict video/acdc_cine_unet ": f"--set {CINE}",
    "vision-ssm predict video/moving_digits_convs5_nano runs/digits/weights.safetensors IN.mp4 ": "--frames 20",
    "vision-ssm experiment run experiment/deep_grey ": "--seconds 0.01 --seeds 0 --networks umamba umamba_identity "
    "--set train_dataloader.dataset.size=(16,16,16) train_dataloader.batch_size=1 train_dataloader.num_workers=0 "
    "entrants.umamba.channels=(4,8) entrants.umamba_identity.channels=(4,8) model.inferer.overlap=0",
    "vision-ssm experiment run experiment/moving_digits ": "--seconds 0.01 --seeds 0 --networks convs5 "
    "--set model.context=2 entrants.convs5.dim=32 entrants.convs5.encoder=(32,32) entrants.convs5.decoder=(32,32) "
    "entrants.convs5.stack.dim=32 entrants.convs5.stack.layers=1 train_dataloader.batch_size=1 "
    "train_dataloader.num_workers=0 train_dataloader.dataset.dataset.frames=3 "
    "train_dataloader.dataset.dataset.size=(32,32) test_dataloader.dataset.clips=1 test_dataloader.dataset.frames=402 "
    "test_dataloader.dataset.size=(32,32)",
    "vision-ssm benchmark --suite smoke ": "--only ssd_scan linear_scan --seconds 0.001",
    "vision-ssm profile vmamba_tiny ": "--size 32 --seconds 0.01",
    "vision-ssm erf vmamba_tiny ": "--size 64 --samples 1",
    "torchrun --nproc-per-node 2 -m vision_ssm.tools train medical/brats_segmamba ": f"--set {STEPS} {SEGMAMBA} "
    f"{PATCHES} train_dataloader.num_workers=0",
}
"""How lines begin that take long as they stand, and what is put behind them: few steps, small networks and data."""

ELSEWHERE = {
    "make ": "CI runs the targets lint, audit, docs and test; dev installs; demo is the command quickstart",
    "pip install ": "needs a package index; tests/test_packaging.py installs the wheel",
    "python3 -m venv ": "what is installed into it needs a package index",
    ".venv/bin/": "needs a package index",
    "vision-ssm quickstart": "tests/test_tools.py runs it, and the commands that it prints",
    "vision-ssm export vmamba_tiny --to onnx ": "takes minutes; tests/engine/test_export.py exports smaller models",
    "vision-ssm zoo fetch ": "needs the network; tests/test_security.py fetches from a server of its own",
    "export nnUNet_extTrainer=": "tests/ecosystem/test_nnunet.py has nnU-Net find the trainers there",
    "nnUNetv2_train ": "tests/ecosystem/test_nnunet.py plans, trains and predicts in one process",
    "torchrun --nnodes 2 ": "needs two machines",
    "torchrun --nproc-per-node 2 -m vision_ssm.tools train medical/brats_segmamba_fsdp ": "takes 20 seconds to start, "
    "and the page has a line that runs; tests/engine/test_distributed.py trains shards in two processes",
    "torchrun --nproc-per-node 2 -m vision_ssm.tools train medical/brats_ssm_unet ": "as above",
    "torchrun --nproc-per-node 1 -m vision_ssm.tools scale measure ": "is for GPUs; tests/engine/test_distributed.py "
    "measures another suite",
    "torchrun --nproc-per-node 2 -m vision_ssm.tools scale measure ": "as above",
}
"""How lines begin that do not run here, and why."""


def official_file(path: Path) -> None:
    torch.save({"model": official("vmamba_tiny", classes=1000)}, path)


def photos(folder: Path) -> None:
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 80, 3), dtype=np.uint8)).save(folder / "noise.png")


def volume(path: Path) -> None:
    image, _, affine = small_brain()
    save(path, image, affine)


def cases(folder: Path) -> None:
    for name in ("one", "two"):
        volume(folder / f"{name}.nii.gz")


def truth(folder: Path) -> None:
    _, label, affine = small_brain()
    for name in ("one", "two"):
        save(folder / f"{name}.nii.gz", label, affine)


def series(folder: Path) -> None:
    """A slice of pydicom's, five times."""
    folder.mkdir()
    item = dcmread(get_testdata_file("CT_small.dcm", download=False))
    for z in range(5):
        item.InstanceNumber, item.ImagePositionPatient = z + 1, [0, 0, 5 * z]
        item.SOPInstanceUID = item.file_meta.MediaStorageSOPInstanceUID = f"1.2.{z}"
        item.save_as(folder / f"{z}.dcm")


def cine(path: Path) -> None:
    image, _, affine = small_brain()
    save(path, np.stack([image] * 3, axis=-1), affine)


def video(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, torch.rand(10, 3, 24, 32) * 2 - 1, 5)


def videos(folder: Path) -> None:
    for part in ("train", "test"):
        video(folder / part / "noise.mp4")


def acdc(folder: Path) -> None:
    image, label, affine = small_brain()
    LAYOUTS["acdc"](folder, image[..., ::4], label[..., ::4], affine)


def stopped_run(folder: Path) -> None:
    """A run that was stopped in its third step. Its checkpoints have the names that the config's interval gives."""
    kept = "train_cfg.max_iters=3 default_hooks.checkpoint.interval=1 default_hooks.checkpoint.max_keep_ckpts=3"
    command = f"vision-ssm train medical/deep_grey_vmamba_unet --work-dir {folder}"
    assert typed(f"{command} --set {STEPS} {SMALL} {kept}") == 0
    (folder / "iter_1.pth").rename(folder / "iter_80.pth")
    (folder / "iter_2.pth").rename(folder / "iter_160.pth")
    (folder / "iter_3.pth").unlink()


def measured(path: Path) -> None:
    assert typed(f"vision-ssm scale measure {path} --suite scale_smoke") == 0


def measured_by_two(path: Path) -> None:
    """What one process measured, as if there had been two."""
    rows = [replace(row, processes=2, batch=2 * row.batch) for row in read_rows(Path("one.jsonl"))]
    path.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in rows))


GIVEN: dict[str, Callable[[Path], object]] = {
    "ACDC/database/training": acdc,
    "BraTS2021": lambda folder: LAYOUTS["brats"](folder, *small_brain()),
    "CASE.nii.gz": volume,
    "CASES": cases,
    "IN.mp4": video,
    "IN.nii.gz": volume,
    "SERIES": series,
    "TRUTH": truth,
    "Task04_Hippocampus": lambda folder: LAYOUTS["decathlon"](folder, *small_brain()),
    "VIDEOS": videos,
    "cine.nii.gz": cine,
    "one.jsonl": measured,
    "photos": photos,
    "runs/brain": stopped_run,
    "two.jsonl": measured_by_two,
    "vssm1_tiny_0230s_ckpt_epoch_264.pth": official_file,
}
"""Files and folders that pages name and do not make, and what makes them, small; in the order of their names."""


def typed(line: str) -> int:
    """Status of a command of the package, or of several processes of it."""
    program, *arguments = shlex.split(line)
    if program == "vision-ssm":
        return cli.main(arguments)
    command = [Path(sys.executable).with_name(program), *arguments]
    return subprocess.run(command, env={**os.environ, "PET_STANDALONE": "1"}, check=False, timeout=400).returncode


def shortened(line: str) -> str:
    return " ".join([line, *(behind for beginning, behind in SHORTER.items() if line.startswith(beginning))])


def runs_here(line: str) -> bool:
    return not line.startswith(tuple(ELSEWHERE))


def run_python(block: Block, page: Path, names: dict[str, object]) -> None:
    exec(compile("\n" * block.line + block.code, page, "exec"), names)


def run_doctest(block: Block, page: Path, names: dict[str, object]) -> None:
    example = doctest.DocTestParser().get_doctest(block.code, names, page.stem, str(page), block.line)
    doctest.DebugRunner().run(example, clear_globs=False)
    names.update(example.globs)


OUTPUT = re.compile(r"--(?:out|figure|work-dir) (\S+)")


def run_shell(block: Block, page: Path, names: dict[str, object]) -> None:
    for line in filter(runs_here, shell_lines(block)):
        assert line.startswith(("vision-ssm ", "torchrun ")), f"{page.name}: no test runs {line!r}"
        if line.startswith("torchrun ") and torch.cuda.device_count() == 1:
            continue  # its processes need a GPU each, or none
        assert typed(shortened(line)) == 0, line
        assert [path for path in OUTPUT.findall(line) if not Path(path).exists()] == [], line


RUN = {"python": run_python, "pycon": run_doctest, "shell": run_shell}
SHOWN = {"text", "toml", "json", "bash"}


def what_runs(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in (RUN if page != README else {"shell"})]


def lines(page: Path) -> Iterator[str]:
    """Of a shell, those that are only shown too."""
    return (line for block in blocks(page) if block.language in {"shell", *SHOWN} for line in shell_lines(block))


def named(page: Path) -> set[str]:
    """Words of the commands that run, and what is behind their ``=``."""
    shell = (line for block in what_runs(page) if block.language == "shell" for line in shell_lines(block))
    words = (word for line in filter(runs_here, shell) for word in shlex.split(line))
    return {word.rpartition("=")[2].rstrip("/") for word in words}


def parameter(page: Path) -> object:
    """Pages with commands train, and take longer."""
    marks = [pytest.mark.slow] if any(block.language == "shell" for block in what_runs(page)) else []
    return pytest.param(page, marks=marks, id=page.relative_to(ROOT).with_suffix("").as_posix())


@pytest.mark.parametrize("page", [parameter(page) for page in PAGES if what_runs(page)])
def test_blocks_run_in_their_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in sorted(named(page) & GIVEN.keys()):
        GIVEN[name](Path(name))
    names: dict[str, object] = {"__name__": "page"}
    for block in what_runs(page):
        RUN[block.language](block, page, names)


EVERY_LINE = sorted({line.strip() for page in PAGES for line in lines(page)})
EXAMPLES = [line.strip() for name in cli.COMMANDS for line in (cli.tool_of(name).__doc__ or "").splitlines()]
COMMAND = re.compile(r"(?:srun )?(?:torchrun|vision-ssm) ")


@pytest.mark.parametrize("line", sorted({line for line in EVERY_LINE + EXAMPLES if COMMAND.match(line)}), ids=str)
def test_commands_are_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that do not run here, and the examples of ``--help``, too; a config that a line names is read."""
    for name, value in {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "1", "head": "node0"}.items():
        monkeypatch.setenv(name, value)
    program, *arguments = shlex.split(os.path.expandvars(line.removeprefix("srun ")))
    if program == "torchrun":
        launch = launch_arguments(arguments)
        assert launch.module and launch.training_script == "vision_ssm.tools"
        arguments = launch.training_script_args
    parsed = cli.tool_of(arguments[0]).parser().parse_args(arguments[1:])
    if "config" in parsed:
        load_config(parsed.config, parsed.set, safe=parsed.safe)


CUT_SHORT = re.compile(r"(?:vision-ssm|torchrun .* -m vision_ssm\.tools) (?P<name>[a-z]+)(?P<rest>.*)")
SENTENCES = sorted({span for page in PAGES for span in code_in_sentences(page) if CUT_SHORT.match(span)})


@pytest.mark.parametrize("span", SENTENCES, ids=str)
def test_commands_in_sentences_are_understood(span: str) -> None:
    """They may be cut short, so it is their names and options that are looked at."""
    found = CUT_SHORT.match(span)
    assert found is not None
    parsers = [cli.tool_of(found["name"]).parser()]
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    assert {word for word in found["rest"].split() if word.startswith("--")} <= known


def test_make_has_the_targets() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    spans = [span for page in PAGES for span in code_in_sentences(page)]
    named = {line.split()[1] for line in (*EVERY_LINE, *spans) if line.startswith("make ")}
    assert {"audit", "demo", "dev", "docs", "lint", "test"} <= named <= targets


def test_every_language_is_run_or_only_shown() -> None:
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert RUN.keys() <= languages <= {*RUN, *SHOWN}


@pytest.mark.parametrize("beginning", [*ELSEWHERE, *SHORTER], ids=str)
def test_tables_hold_nothing_that_no_page_has(beginning: str) -> None:
    """Nor name a test that is not there."""
    assert any(line.startswith(beginning) and runs_here(line) == (beginning in SHORTER) for line in EVERY_LINE)
    tests = re.findall(r"tests/\S+\.py", ELSEWHERE.get(beginning, ""))
    assert [test for test in tests if not (ROOT / test).is_file()] == []


@pytest.mark.parametrize("name", GIVEN)
def test_every_given_file_is_named(name: str) -> None:
    assert any(name in named(page) for page in PAGES)
