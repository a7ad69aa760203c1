"""The suite of video: what its jobs measure, that memory that is wanting is a row, and how its rows are shown."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from vision_ssm.engine.benchmark import SUITES, video
from vision_ssm.engine.benchmark.rows import Clip, Row, Timing, render
from vision_ssm.engine.benchmark.timing import describe
from vision_ssm.engine.benchmark.video import RUNS, GenerationJob, TrainingJob, compile_parts, total
from vision_ssm.layers import TemporalStack
from vision_ssm.video import MODELS, ConvLSTM, FrameTransformer, NextFrame, convs5_stack

CPU = torch.device("cpu")
SECONDS = 0.01


def tiny(stack):
    return NextFrame(stack(), dim=8, encoder=(32, 32), decoder=(32, 32))


TINY = {
    "convs5": lambda: tiny(lambda: convs5_stack(8, state=8, layers=2, groups=2)),
    "conv_lstm": lambda: tiny(lambda: TemporalStack(ConvLSTM(8) for _ in range(2))),
    "recomputed": lambda: tiny(lambda: FrameTransformer(8, width=16, heads=2, layers=2, patch=2, cache=False)),
}


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    for name, make in TINY.items():
        monkeypatch.setitem(MODELS, name, make)


def rows(job):
    return [Row(suite="video", environment=describe(CPU), **fields) for fields in job.rows(CPU, SECONDS)]


def timing(ms):
    return Timing(median_ms=ms, p20_ms=ms, p80_ms=2 * ms, runs=9, peak_mib=ms, clock_mhz=None)


@pytest.mark.parametrize("checkpointing", [None, "maps", "all"])
def test_a_training_step_takes_whole_clips(checkpointing, monkeypatch):
    def measure(work, *_):
        for run in work.values():
            run()
        return dict.fromkeys(work, timing(4.0))

    monkeypatch.setattr(video, "measure", measure)
    made = []
    monkeypatch.setitem(MODELS, "convs5", lambda: made.append(TINY["convs5"]()) or made[-1])
    (row,) = rows(TrainingJob("convs5", batch=2, size=8, frames=3, checkpointing=checkpointing))
    assert (row.case, row.direction, row.clip) == ("3 frames", "forward+backward", Clip(frames=3, state_bytes=None))
    assert row.frames_per_s == pytest.approx(1500)
    assert row.note == (f"{checkpointing} checkpointed" if checkpointing else "")
    (model,) = made
    assert model.grad_checkpointing == (checkpointing is not None)
    assert model.stack.grad_checkpointing == (checkpointing == "all")
    assert all(parameter.grad is not None for name, parameter in model.named_parameters())


def test_generation_says_what_the_state_grows_to():
    constant = rows(GenerationJob("convs5", size=8, contexts=(2, 5), frames=4))
    growing = rows(GenerationJob("recomputed", size=8, contexts=(2, 5), frames=4, summed=True))
    for found in (constant, growing):
        assert [(row.case, row.direction) for row in found] == [
            ("after 2 frames", "next frame"),
            ("after 5 frames", "next frame"),
            ("4 frames", "generation"),
        ]
    assert [row.clip.state_bytes for row in constant] == [2 * 4 * 4 * 4 * 2 * 4] * 3
    frame = 4 * 4 * 8 * 2  # in bfloat16
    assert [row.clip.state_bytes for row in growing] == [2 * frame, 5 * frame, 5 * frame]
    assert [row.note for row in growing] == ["", "", "summed from the frames above"]
    assert not any(row.note for row in constant)


def test_a_sum_follows_the_lines_between_what_was_measured():
    found = total({2: timing(1.0), 4: timing(3.0)}, 6)
    assert found.median_ms == pytest.approx(1 + 1 + 1 + 2 + 3 + 3)
    assert found.p80_ms == pytest.approx(2 * found.median_ms)
    assert (found.runs, found.peak_mib) == (9, 3.0)


@pytest.mark.parametrize(
    "job",
    [
        TrainingJob("convs5", size=8, frames=3, checkpointing="all"),
        GenerationJob("convs5", size=8, contexts=(2,), frames=4),
    ],
    ids=["training", "generation"],
)
def test_memory_that_is_wanting_is_a_row(job, monkeypatch):
    def measure(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has less. Go away.")

    monkeypatch.setattr(video, "measure", measure)
    (row,) = rows(job)
    assert row.timing is None
    assert row.note.endswith("CUDA out of memory. Tried to allocate 9.00 GiB")
    assert Row.from_json(json.dumps(asdict(row))) == row
    assert f"|  |  |  |  | {row.note} |" in render([row])


def test_rows_of_video_survive_the_file_and_have_a_table_of_their_own():
    (first, *_, last) = found = rows(GenerationJob("convs5", size=8, contexts=(2,), frames=4))
    assert [Row.from_json(json.dumps(asdict(row))) for row in found] == found
    last = replace(last, timing=timing(8.0), clip=Clip(frames=4, state_bytes=2048), note="a note")
    text = render([first, last])
    assert text.count("| model |") == 1
    assert "| convs5 | 1 x 4 frames | bfloat16 | generation | 8 (8 to 16) | 500 | 2 | 8 | a note |" in text
    assert last.side is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("name", ["convs5", "conv_lstm"])
def test_compiled_parts_compute_the_same(name, monkeypatch):
    """Every layer is compiled, and with a compiler that changes nothing, nothing changes."""
    seen = []

    def compiler(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    model, clip = TINY[name](), torch.rand(1, 3, 1, 8, 8)
    wanted = model(clip)[0]
    compile_parts(model)
    assert_close(model(clip)[0], wanted)
    assert len(seen) >= 3  # encoder, decoder, and what the layers have in common


def test_the_suite_names_what_exists():
    jobs = [job for job in SUITES["video"].jobs if isinstance(job, (TrainingJob, GenerationJob))]
    labels = [job.label for job in jobs]
    assert len({*labels}) == len(labels)
    assert {job.model for job in jobs} <= MODELS.keys()
    assert {job.run for job in jobs} == RUNS.keys()


def test_a_step_runs_as_the_name_says(monkeypatch):
    """A compiler and a graph that write down when they were asked; memory is not counted where there is a graph."""
    monkeypatch.setattr(torch, "compile", lambda step: [*step, "compiled"])
    monkeypatch.setattr(video, "CapturedStep", lambda step: [*step, "CUDA graph"])
    monkeypatch.setattr(video, "measure", lambda work, *_: dict.fromkeys(work, timing(4.0)))
    for name, run in RUNS.items():
        asked = run.accelerate([])
        assert ", ".join(asked) == name.replace("eager", "")
        counted = GenerationJob("convs5", name).measured(list, CPU, SECONDS).peak_mib is not None
        assert counted == ("CUDA graph" not in asked)
