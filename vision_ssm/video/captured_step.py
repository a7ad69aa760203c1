"""One CUDA graph in place of the many kernels of a step."""

import torch
from torch import Tensor

from vision_ssm.layers.over_time import State
from vision_ssm.video.next_map import Step


class CapturedStep:
    """A step as one CUDA graph, which leaves the host one launch in place of one for each kernel.

    It is captured at the first call, and replayed at each call; what it returns is not overwritten later. One shape
    goes through it: batch and maps stay as they were at first, and so does the state, which rules out a Transformer.

    Args:
        step: the step; without gradients. A compiled one is compiled before it is captured.

    Raises:
        ValueError: tensors are not on a GPU, or are not as those of the first call in shape, dtype and device.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, frame: Tensor, action: Tensor | None, state: State) -> tuple[Tensor, State]:
        given = [frame, *state] if action is None else [frame, *state, action]
        graph = self.graph or self._capture(given, len(state))
        wanted, got = ([(tuple(m.shape), m.dtype, m.device.type) for m in held] for held in (self.inputs, given))
        if wanted != got:
            raise ValueError(f"captured for tensors {wanted}; got {got}. Capture another step for them")
        torch._foreach_copy_(self.inputs, given)
        graph.replay()
        prediction, *after = kept = [torch.empty_like(m) for m in self.outputs]
        torch._foreach_copy_(kept, self.outputs)
        return prediction, tuple(after)

    def _capture(self, given: list[Tensor], states: int) -> torch.cuda.CUDAGraph:
        if not all(m.is_cuda for m in given):
            raise ValueError("a CUDA graph needs all tensors on a GPU; move model and clip there, or use torch.compile")
        self.inputs = [m.clone() for m in given]
        frame, state, rest = self.inputs[0], tuple(self.inputs[1 : states + 1]), self.inputs[states + 1 :]
        action = rest[0] if rest else None
        device = frame.device
        # Weights that autocast has cast and keeps are freed when it ends, but the graph would go on reading them.
        autocast = torch.autocast(
            "cuda",
            torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        with torch.cuda.device(device), autocast:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):  # kernels are compiled and chosen before the capture
                    self.step(frame, action, state)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                prediction, after = self.step(frame, action, state)
        self.graph, self.outputs = graph, [prediction, *after]
        return graph
