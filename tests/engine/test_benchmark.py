"""The benchmark: what it measures, what it writes, and that the committed tables are what it renders."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from vision_ssm.engine import benchmark
from vision_ssm.engine.benchmark import SUITES, Suite
from vision_ssm.engine.benchmark.figure import resolution
from vision_ssm.engine.benchmark.jobs import BOTH, FORWARD, OPERATORS, ModelJob, OperatorJob
from vision_ssm.engine.benchmark.rows import Accuracy, Environment, Row, Timing, filled, read_rows, render, write_rows
from vision_ssm.engine.benchmark.timing import describe, measure
from vision_ssm.engine.benchmark.volumes import VolumeJob
from vision_ssm.tools.benchmark import main
from vision_ssm.tools.errors import run

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "model_zoo" / "results" / "README.md"]
TINY = Suite((OperatorJob("routed_scan", ("prime_*",)), ModelJob(("test_vmamba",), batch=2, size=64)), seconds=0.01)


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SUITES, "tiny", TINY)
    return "tiny"


@pytest.fixture
def row() -> Row:
    environment = Environment(device="a CPU", threads=2, torch="2", timm="1", triton=None, numba="0.6", commit="abc")
    timing = Timing(median_ms=2.0, p20_ms=1.5, p80_ms=2.5, runs=9, peak_mib=None, clock_mhz=None)
    return Row(
        suite="ops",
        subject="routed_scan",
        case="stage1",
        batch=4,
        direction=FORWARD,
        dtype="float32",
        layout="contiguous",
        timing=timing,
        accuracy=Accuracy(error=1e-7, compulsory_bytes=3_000_000),
        environment=environment,
    )


def test_rows_of_a_suite(tiny_suite: str, device: torch.device) -> None:
    rows = [r for r in benchmark.run(tiny_suite, device) if "CUDA graph" not in r.case]
    assert [(r.subject, r.direction) for r in rows] == [
        (subject, direction) for subject in ("routed_scan", "test_vmamba") for direction in (FORWARD, BOTH)
    ]
    for r in rows:
        assert 0 < r.timing.p20_ms <= r.timing.median_ms <= r.timing.p80_ms
        assert (r.timing.peak_mib is None) == (device.type == "cpu")
        assert (r.accuracy is not None) == (r.subject == "routed_scan")
    assert all(r.accuracy.error < 1e-5 for r in rows[:2])


@pytest.mark.parametrize("name", OPERATORS)
def test_cases_of_the_suites_exist(name: str) -> None:
    jobs = [job for suite in SUITES.values() for job in suite.jobs if isinstance(job, OperatorJob)]
    patterns = [pattern for job in jobs if job.operator == name for pattern in job.cases]
    assert patterns
    for pattern in patterns:
        assert [case for case in OPERATORS[name].cases if Path(case).match(pattern)], pattern


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_a_wrong_value_is_seen(direction: str) -> None:
    operator = OPERATORS["routed_scan"]
    case = operator.cases["prime_grid"]
    inputs = operator.make_inputs(case, torch.float32, "cpu")
    wrong = replace(operator, call=lambda case, inputs: 1.1 * operator.call(case, inputs))
    dy = torch.randn_like(inputs["x"])
    assert wrong.accuracy(case, inputs, dy, direction).error == pytest.approx(0.1, rel=1e-3)


def test_a_wrong_gradient_is_seen() -> None:
    operator = OPERATORS["selective_scan"]
    case = operator.cases["prime_length"]
    inputs = operator.make_inputs(case, torch.float32, "cpu")

    def constant_decay(case: object, inputs: dict) -> torch.Tensor:
        return operator.call(case, {**inputs, "A": inputs["A"].detach() + 0 * inputs["A"]})

    wrong, dy = replace(operator, call=constant_decay), torch.randn_like(inputs["u"])
    assert wrong.accuracy(case, inputs, dy, FORWARD).error < 1e-5
    assert wrong.accuracy(case, inputs, dy, BOTH).error == pytest.approx(1)


def test_compulsory_bytes() -> None:
    operator = OPERATORS["routed_scan"]
    case = operator.cases["prime_grid"]
    inputs = operator.make_inputs(case, torch.float32, "cpu")
    dy = torch.randn_like(inputs["x"])
    read = sum(m.nbytes for m in inputs.values())
    assert operator.accuracy(case, inputs, dy, FORWARD).compulsory_bytes == read + dy.nbytes
    assert operator.accuracy(case, inputs, dy, BOTH).compulsory_bytes == 3 * read + 2 * dy.nbytes


def test_rates(row: Row) -> None:
    assert row.gb_per_s == pytest.approx(1.5)
    assert row.samples_per_s == pytest.approx(2000)


@pytest.mark.parametrize("peak", [None, 300.0])
def test_plot_against_tokens(row: Row, tmp_path: Path, peak: float | None) -> None:
    timing = replace(row.timing, peak_mib=peak)
    rows = [
        replace(row, subject=subject, case=f"{side} px{compiled}", accuracy=None, timing=timing)
        for subject in ("vmamba_tiny", "vit_small_patch16_224")
        for side in (448, 224)
        for compiled in ("", ", compiled")
    ]
    panels = resolution([row, *rows]).axes
    assert len(panels) == (1 if peak is None else 2)
    assert [list(line.get_xdata()) for line in panels[0].lines] == [[196, 784]] * 4
    assert panels[0].get_xscale() == panels[0].get_yscale() == "log"
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    assert main(["plot", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_no_model_is_refused(row: Row) -> None:
    with pytest.raises(ValueError, match="no row is of a model"):
        resolution([row])


def test_models_of_one_size_are_told_it() -> None:
    job = ModelJob(("vit_tiny_patch16_224",), batch=1, size=64)
    assert [fields["case"] for fields in job.rows(torch.device("cpu"), 0.01)] == ["64 px"] * 2


def test_work_is_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr("vision_ssm.engine.benchmark.timing._cpu_times", lambda run, seconds: [run() or 1.0])
    measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), 1.0)
    assert "".join(order).endswith("ababab")


def test_unknown_suite_lists_the_suites() -> None:
    with pytest.raises(ValueError, match=r"unknown suite 'fast'; suites are cpu, ops, .*, volumes, video, smoke"):
        benchmark.run("fast")


def test_a_suite_for_the_cpu_refuses_a_gpu() -> None:
    with pytest.raises(ValueError, match="suite 'cpu' is for cpu; got device 'cuda'"):
        benchmark.run("cpu", "cuda")


def test_commit_comes_from_the_variable_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vision_ssm.engine.benchmark.timing._SOURCE", tmp_path / "timing.py")
    monkeypatch.setenv("VISION_SSM_COMMIT", "1234abcd")
    assert describe(torch.device("cpu")).commit == "1234abcd"
    monkeypatch.delenv("VISION_SSM_COMMIT")
    assert describe(torch.device("cpu")).commit == "unknown"


def test_rows_survive_the_file(row: Row, tmp_path: Path) -> None:
    rows = [row, replace(row, accuracy=None, subject="vmamba_tiny")]
    path = tmp_path / "new" / "rows.jsonl"
    assert list(write_rows(rows, path)) == rows
    assert read_rows(path) == rows
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.jsonl"]


def test_results_are_never_overwritten(row: Row, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("earlier")
    with pytest.raises(FileExistsError, match="never overwritten"):
        list(write_rows([row], path))
    assert path.read_text() == "earlier"


def test_an_interrupted_run_keeps_its_rows_apart(row: Row, tmp_path: Path) -> None:
    def interrupted():
        yield row
        raise KeyboardInterrupt

    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        list(write_rows(interrupted(), path))
    assert not path.exists()
    assert read_rows(tmp_path / "rows.jsonl.part") == [row]


@pytest.mark.parametrize("line", ["", "{}", "3", '{"suite": "ops"', '{"environment": {"device": "x"}}'])
def test_a_broken_file_names_the_line(line: str, row: Row, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    list(write_rows([row], path))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is no benchmark row"):
        read_rows(path)


def test_tables_keep_environments_and_kinds_apart(row: Row) -> None:
    model = replace(row, accuracy=None, subject="vmamba_tiny", case="224 px")
    elsewhere = replace(row, environment=replace(row.environment, device="another CPU"))
    text = render([row, model, elsewhere])
    assert text.count(" commit abc.") == 3
    assert text.index("a CPU, 2 threads") < text.index("another CPU, 2 threads")
    assert "| routed_scan | stage1 | float32 | forward | 2 (1.5 to 2.5) | 1.5 | 1.0e-07 |  |" in text
    assert "| vmamba_tiny | 4 x 224 px | float32 | forward | 2 (1.5 to 2.5) | 2e+03 |  |" in text


def test_a_document_is_filled_and_stays_so(row: Row, tmp_path: Path) -> None:
    list(write_rows([row], tmp_path / "rows.jsonl"))
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- benchmark rows.jsonl -->\nold\n<!-- /benchmark -->\nafter\n")
    assert main(["render", "--into", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert render([row]) in text
    assert filled(document) == text


def test_a_document_without_blocks_is_refused(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("nothing here")
    with pytest.raises(ValueError, match="has no block"):
        filled(document)


def test_a_copy_of_as_many_bytes_stands_beside_an_operator(device: torch.device) -> None:
    job = OperatorJob("linear_scan", ("by_element",), beside_copy=True)
    rows = [fields for fields in job.rows(device, 0.01) if fields["case"] == "by_element"]
    assert [(fields["subject"], fields["direction"]) for fields in rows] == [
        (subject, direction) for direction in (FORWARD, BOTH) for subject in ("linear_scan", "copy")
    ]
    for ours, copy in zip(rows[::2], rows[1::2], strict=True):
        assert copy["accuracy"] == replace(ours["accuracy"], error=0)


def test_networks_are_measured_on_volumes(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    job = VolumeJob(("segresnet", "ssm_unet_identity"), batch=1, size=16)
    monkeypatch.setitem(SUITES, "tiny", Suite((job,), seconds=0.01))
    rows = list(benchmark.run("tiny", device))
    assert [(r.subject, r.direction) for r in rows] == [
        (name, direction) for direction in (FORWARD, BOTH) for name in job.networks
    ]
    assert {r.side for r in rows} == {None}
    assert "| segresnet | 1 x 16^3 voxels | bfloat16 | forward |" in render(rows)


def test_a_share_of_the_copy_is_rendered(row: Row) -> None:
    copy = replace(row, subject="copy", timing=replace(row.timing, median_ms=1.2))
    graph = replace(row, case="stage1, CUDA graph", timing=replace(row.timing, median_ms=1.5))
    text = render([row, graph, copy, replace(row, dtype="bfloat16")])
    assert "| routed_scan | stage1 | float32 | forward | 2 (1.5 to 2.5) | 1.5 | 60% | 1.0e-07 |  |" in text
    assert "| routed_scan | stage1, CUDA graph | float32 | forward | 1.5 (1.5 to 2.5) | 2 | 80% | 1.0e-07 |  |" in text
    assert "| routed_scan | stage1 | bfloat16 | forward | 2 (1.5 to 2.5) | 1.5 |  | 1.0e-07 |  |" in text
    assert "of copy" not in render([row])


def test_a_suite_runs_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "tiny", replace(TINY, seconds=100))
    rows = list(benchmark.run("tiny", "cpu", only=["test_vmamba*"], seconds=0.01))
    assert {row.subject for row in rows} == {"test_vmamba"}
    with pytest.raises(ValueError, match="no job of suite 'tiny' is vmamba; jobs are: routed_scan; test_vmamba: 64 px"):
        benchmark.run("tiny", "cpu", only=["vmamba"])
    with pytest.raises(ValueError, match="seconds must be more than 0; got 0"):
        benchmark.run("tiny", "cpu", seconds=0)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_committed_tables_are_rendered(document: Path) -> None:
    assert filled(document) == document.read_text(encoding="utf-8"), (
        f"run vision-ssm benchmark render --into {document}"
    )


def test_the_command_measures_and_renders(tiny_suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(["--suite", tiny_suite, "--out", str(out), "--device", "cpu"]) == 0
    assert "routed_scan prime_grid float32 forward" in capsys.readouterr().out
    assert main(["render", str(out)]) == 0
    assert render(read_rows(out)) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--suite", "fast", "--out", "rows.jsonl"],
            "unknown suite 'fast'; suites are cpu, ops, models, resolution, volumes, video, smoke",
        ),
        (["--suite", "cpu", "--out", "rows.jsonl", "--device", "cuda"], "suite 'cpu' is for cpu"),
        (["render"], "render needs files"),
        (["render", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(main, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--suite", "cpu"], ["--out", "rows.jsonl"]])
def test_missing_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "give --suite and --out" in capsys.readouterr().err
