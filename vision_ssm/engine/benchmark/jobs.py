"""What a suite is made of: cases of an operator, and models side by side.

Cases of the operators come from ``kernels/<operator>/cases.py``, which the tests use too. Models are measured in turns,
so that a change of the machine's clock or load meets all of them alike.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache, partial
from itertools import product
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.kernels import linear_scan, routed_scan, selective_scan, ssd_scan
from vision_ssm.kernels.linear_scan import cases as linear_cases
from vision_ssm.kernels.linear_scan.reference import linear_scan_ref
from vision_ssm.kernels.routed_scan import cases as routed_cases
from vision_ssm.kernels.routed_scan.reference import routed_scan_ref
from vision_ssm.kernels.routes import index_table
from vision_ssm.kernels.selective_scan import cases as selective_cases
from vision_ssm.kernels.selective_scan.reference import selective_scan_ref
from vision_ssm.kernels.ssd_scan import cases as ssd_cases
from vision_ssm.kernels.ssd_scan.reference import ssd_scan_ref

from .rows import COPY, Accuracy
from .timing import measure

__all__ = [
    "BOTH",
    "FORWARD",
    "OPERATORS",
    "RUNS",
    "ModelJob",
    "Operator",
    "OperatorJob",
    "captured",
    "create",
    "infer",
    "torch_name",
    "train_step",
]

FORWARD, BOTH = "forward", "forward+backward"

_MANY_STEPS = 1_000

Inputs = dict[str, Tensor]

RUNS = {"eager": None, "compiled": "default", "compiled, CUDA graphs": "reduce-overhead"}
"""How models run: the modes of torch.compile, if any."""


@dataclass(frozen=True)
class Operator:
    """How to call an operator and its reference on the inputs of a case.

    Args:
        batched: the inputs that have a batch axis.
        axis: that axis, of these and of the output.
    """

    cases: Mapping[str, Any]
    make_inputs: Callable[..., Inputs]
    call: Callable[[Any, Inputs], Tensor]
    reference: Callable[[Any, Inputs], Tensor]
    batched: tuple[str, ...]
    axis: int = 0

    def work(self, case: Any, inputs: Inputs, direction: str) -> Callable[[], object]:
        """What is timed; the loss is half the squared norm of the output, whose gradient is the output itself."""
        if direction == FORWARD:
            return torch.no_grad()(partial(self.call, case, inputs))
        leaves = _leaves(inputs)

        def run() -> object:
            y = self.call(case, leaves)
            return torch.autograd.grad(y, list(leaves.values()), y.detach())

        return run

    def accuracy(self, case: Any, inputs: Inputs, dy: Tensor, direction: str) -> Accuracy:
        """Error against the float64 reference, and bytes moved at least.

        The call has its full batch; the reference computes the first sample, and the other samples' dy is zero, so
        that the gradients of the weights are those of this sample too. Backward reads dy and the inputs once more,
        and writes the gradients.
        """
        leaves = _leaves(inputs)
        first = {name: self._first(m) if name in self.batched else m for name, m in inputs.items()}
        exact = _leaves({name: m.double() for name, m in first.items()})
        y, expected = self.call(case, leaves), self.reference(case, exact)
        pairs = [(self._first(y), expected)]
        read, written = sum(m.nbytes for m in inputs.values()), y.nbytes
        compulsory_bytes = read + written
        if direction == BOTH:
            one = self._first(dy)
            dy = torch.zeros_like(dy)
            self._first(dy).copy_(one)
            grads = torch.autograd.grad(y, list(leaves.values()), dy)
            exact_grads = torch.autograd.grad(expected, list(exact.values()), one.double())
            for name, ours, theirs in zip(leaves, grads, exact_grads, strict=True):
                pairs.append((self._first(ours) if name in self.batched else ours, theirs))
            compulsory_bytes += 2 * read + written
        return Accuracy(error=max(_deviation(*pair) for pair in pairs), compulsory_bytes=compulsory_bytes)

    def _first(self, m: Tensor) -> Tensor:
        """The first sample."""
        return m.narrow(self.axis, 0, 1)


@dataclass(frozen=True)
class OperatorJob:
    """Cases of one operator whose names match one of the patterns, forward and forward with backward.

    On CUDA each is timed as it is called, the host's part included, and once more as a CUDA graph, without it.

    Args:
        beside_copy: also time, in turns with each case, a copy that reads and writes as many bytes as the case compels.
    """

    operator: str
    cases: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    beside_copy: bool = False

    @property
    def label(self) -> str:
        return self.operator

    def rows(self, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
        """Fields of each row, all but the suite and the environment."""
        operator = OPERATORS[self.operator]
        names = [name for name in operator.cases if any(fnmatch(name, pattern) for pattern in self.cases)]
        for name, dtype, direction in product(names, self.dtypes, (FORWARD, BOTH)):
            case = operator.cases[name]
            inputs = operator.make_inputs(case, dtype, device)
            y = operator.call(case, inputs)
            dy = torch.randn(y.shape, dtype=y.dtype, device=device, generator=torch.Generator(device).manual_seed(0))
            accuracy = operator.accuracy(case, inputs, dy, direction)
            work = {name: operator.work(case, inputs, direction)}
            if device.type == "cuda":
                work[f"{name}, CUDA graph"] = captured(work[name])
            if self.beside_copy:
                work[COPY] = _copy(accuracy.compulsory_bytes, device)
            for label, timing in measure(work, device, seconds).items():
                yield {
                    "subject": COPY if label == COPY else self.operator,
                    "case": name if label == COPY else label,
                    "batch": case.batch,
                    "direction": direction,
                    "dtype": torch_name(dtype),
                    "layout": torch_name(torch.contiguous_format),
                    "timing": timing if label == name else replace(timing, peak_mib=None),
                    "accuracy": replace(accuracy, error=0.0) if label == COPY else accuracy,
                }


@dataclass(frozen=True)
class ModelJob:
    """timm models with random weights, measured in turns.

    Args:
        models: their names.
        batch: images of one run.
        size: side of the images in pixels.
        autocast: the dtype of autocast, if any.
        layout: order of the axes of weights and images.
        run: how they run, a name in ``RUNS``; compiling is not part of the time.
    """

    models: tuple[str, ...]
    batch: int
    size: int = 224
    autocast: torch.dtype | None = None
    layout: torch.memory_format = torch.contiguous_format
    run: str = "eager"

    @property
    def label(self) -> str:
        return f"{', '.join(self.models)}: {self.size} px, {self.run}"

    def rows(self, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
        """Fields of each row, all but the suite and the environment."""
        mode = RUNS[self.run]
        models = {name: create(name, self.size).to(device).to(memory_format=self.layout) for name in self.models}
        if mode:
            torch.compiler.reset()  # sizes are compiled one by one, not as one program for any size
            for model in models.values():
                model.compile(mode=mode)
        images = torch.randn(self.batch, 3, self.size, self.size, device=device).to(memory_format=self.layout)
        for direction, step in ((FORWARD, infer), (BOTH, train_step)):
            for model in models.values():
                model.train(direction == BOTH)
            work = {name: partial(step, model, images, self.autocast) for name, model in models.items()}
            for name, timing in measure(work, device, seconds).items():
                yield {
                    "subject": name,
                    "case": f"{self.size} px" + f", {self.run}" * bool(mode),
                    "batch": self.batch,
                    "direction": direction,
                    "dtype": torch_name(self.autocast or torch.float32),
                    "layout": torch_name(self.layout),
                    "timing": timing,
                    "accuracy": None,
                }


def _copy(traffic: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads half the bytes of ``traffic`` and writes the other half."""
    source = torch.randint(256, (traffic // 2,), dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The work of ``run`` as a CUDA graph, captured at its first call: the peak of work measured before counts neither
    its memory nor its stream's."""
    graph = cache(partial(_capture, run))
    return lambda: graph().replay()


def _capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = _side_stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace for every stream that it has seen, which would count as peak."""
    return torch.cuda.Stream()


def create(name: str, size: int, **options: Any) -> nn.Module:
    """The timm model for images of ``size``; those that are built for one size are told it."""
    config = timm.get_pretrained_cfg(name)
    told: dict[str, Any] = {"img_size": size} if config is not None and config.fixed_input_size else {}
    return timm.create_model(name, **told, **options)


def infer(model: nn.Module, images: Tensor, autocast: torch.dtype | None) -> None:
    with torch.inference_mode(), torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        model(images)


def train_step(model: nn.Module, images: Tensor, autocast: torch.dtype | None) -> None:
    """Forward and backward of the cross entropy, of each image or each of its cells, without an optimizer."""
    model.zero_grad()
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        logits = model(images)
        labels = torch.zeros(len(images), *logits.shape[2:], dtype=torch.long, device=images.device)
        loss = F.cross_entropy(logits, labels)
    loss.backward()


def _leaves(inputs: Inputs) -> Inputs:
    return {name: m.detach().requires_grad_() for name, m in inputs.items()}


def _deviation(ours: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest exact value; the smallest normal number stands in for a zero."""
    return ((ours - exact).abs().max() / exact.abs().max().clamp(min=torch.finfo(exact.dtype).tiny)).item()


def torch_name(value: torch.dtype | torch.memory_format) -> str:
    return str(value).removeprefix("torch.").removesuffix("_format")


def _routed_scan(case: routed_cases.Case, inputs: Inputs) -> Tensor:
    return routed_scan(**inputs, routes=case.routes)


def _routed_scan_ref(case: routed_cases.Case, inputs: Inputs) -> Tensor:
    """The equation, step by step; the operator itself, in the inputs' float64, where that takes too many steps."""
    if math.prod(case.grid) > _MANY_STEPS:
        return _routed_scan(case, inputs)
    x = inputs["x"]
    flat = {**inputs, "x": x.flatten(1, -2), "low_rank": inputs["low_rank"].flatten(1, -2)}
    return routed_scan_ref(**flat, index=index_table(case.routes, case.grid, x.device)).view(x.shape)


def _project(inputs: Inputs) -> Inputs:
    scan = {name: m for name, m in inputs.items() if name != "projection"}
    return {**scan, "low_rank": F.linear(inputs["x"], inputs["projection"].to(inputs["x"].dtype))}


def _core(case: routed_cases.Case, inputs: Inputs) -> Tensor:
    return _routed_scan(case, _project(inputs))


def _core_ref(case: routed_cases.Case, inputs: Inputs) -> Tensor:
    return _routed_scan_ref(case, _project(inputs))


def _core_inputs(case: routed_cases.Case, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    """Those of the routed scan, with a projection of random weights in place of the low-rank part."""
    inputs = routed_cases.make_inputs(case, dtype, device)
    channels, columns = inputs["x"].shape[-1], inputs.pop("low_rank").shape[-1]
    generator = torch.Generator().manual_seed(1)
    return {**inputs, "projection": (torch.randn(columns, channels, generator=generator) * channels**-0.5).to(device)}


def _selective_scan(case: selective_cases.Case, inputs: Inputs) -> Tensor:
    arguments: dict[str, Any] = {**inputs, "delta_softplus": True}
    y = selective_scan(**arguments)
    assert isinstance(y, Tensor)  # no last state was asked for
    return y


def _selective_scan_ref(case: selective_cases.Case, inputs: Inputs) -> Tensor:
    arguments: dict[str, Any] = {**inputs, "delta_softplus": True}
    return selective_scan_ref(**arguments)[0]


def _linear_scan(case: linear_cases.Case, inputs: Inputs) -> Tensor:
    return linear_scan(inputs["a"], inputs["b"], pairs=case.pairs)[0]


def _linear_scan_ref(case: linear_cases.Case, inputs: Inputs) -> Tensor:
    return linear_scan_ref(inputs["a"], inputs["b"], pairs=case.pairs)[0]


def _linear_inputs(case: linear_cases.Case, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    """Those of a sequence that starts from zero."""
    inputs = linear_cases.make_inputs(case, dtype, device)
    del inputs["initial_state"]
    return inputs


def _ssd_scan(case: ssd_cases.Case, inputs: Inputs) -> Tensor:
    arguments: dict[str, Any] = {**inputs}
    return ssd_scan(**arguments)[0]


def _ssd_scan_ref(case: ssd_cases.Case, inputs: Inputs) -> Tensor:
    """The recurrence, step by step; the operator itself, in the inputs' float64, where that takes too many steps."""
    arguments: dict[str, Any] = {**inputs}
    return (ssd_scan if case.length > _MANY_STEPS else ssd_scan_ref)(**arguments)[0]


OPERATORS: dict[str, Operator] = {
    "routed_scan": Operator(
        cases=routed_cases.CASES,
        make_inputs=routed_cases.make_inputs,
        call=_routed_scan,
        reference=_routed_scan_ref,
        batched=("x", "low_rank"),
    ),
    "ss2d core": Operator(
        cases=routed_cases.CASES,
        make_inputs=_core_inputs,
        call=_core,
        reference=_core_ref,
        batched=("x",),
    ),
    "selective_scan": Operator(
        cases=selective_cases.CASES,
        make_inputs=selective_cases.make_inputs,
        call=_selective_scan,
        reference=_selective_scan_ref,
        batched=("u", "delta", "B", "C"),
    ),
    "linear_scan": Operator(
        cases=linear_cases.CASES,
        make_inputs=_linear_inputs,
        call=_linear_scan,
        reference=_linear_scan_ref,
        batched=("b",),
        axis=1,
    ),
    "ssd_scan": Operator(
        cases=ssd_cases.CASES,
        make_inputs=ssd_cases.make_inputs,
        call=_ssd_scan,
        reference=_ssd_scan_ref,
        batched=("x", "dt", "B", "C", "initial_state"),
    ),
}
