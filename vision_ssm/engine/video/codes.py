"""Video in codes: training a tokenizer, and a model over the codes of one that is frozen."""
# Shapes: b clips, t frames, k channels of a frame, h rows, w columns; h' and w' of codes; n codes.

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from rich.console import Console
from torch import Tensor
from torch.nn.functional import mse_loss

from vision_ssm.engine.checkpoint import load_into, read_state, write_json
from vision_ssm.engine.figures import save_figure
from vision_ssm.engine.findings import origin, print_files, print_numbers
from vision_ssm.engine.outputs import require_output
from vision_ssm.engine.tasks import Mode
from vision_ssm.engine.training.build import build_loader
from vision_ssm.engine.training.device import device
from vision_ssm.engine.training.evaluate import evaluate, load_task
from vision_ssm.engine.video.next_frame import FramePrediction, require_next
from vision_ssm.engine.video.sheet import chosen, contact_sheet
from vision_ssm.video import CodedVideo, VQAutoencoder, code_loss
from vision_ssm.video.next_map import MASKED

__all__ = ["CodePrediction", "CodeUsage", "Tokenization", "measure_reconstructions"]


class Tokenization(BaseModel):
    """Frames through codes and back: squared error and commitment.

    Args:
        net: the tokenizer that is trained.
        commitment: weight of the commitment.

    The log has both losses, and how the codebook is used: the share of codes that the batch takes, and their
    perplexity, the number of codes that would be as hard to guess if all came as often.
    """

    def __init__(self, net: VQAutoencoder, *, commitment: float = 0.25) -> None:
        super().__init__()
        self.net = net
        self.commitment = commitment

    def forward(self, video: Tensor, actions: Tensor | None = None, mode: Mode = "tensor") -> Any:
        found = self.net(video)
        if mode == "tensor":
            return found.frames
        if mode == "loss":
            used, perplexity = usage(torch.bincount(found.codes.flatten(), minlength=self.net.codes))
            return {
                "loss_frames": mse_loss(found.frames.float(), video),
                "loss_commitment": self.commitment * found.commitment,
                "codes_used": used,
                "perplexity": perplexity,
            }
        clips = zip(found.frames, video, found.codes, strict=True)
        return [{"prediction": frames, "truth": truth, "codes": codes} for frames, truth, codes in clips]


def usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Share of codes that are used, and their perplexity, from how often each is, (n,)."""
    share = counts / counts.sum()
    return (counts > 0).float().mean(), torch.special.entr(share).sum().exp()


class CodeUsage(BaseMetric):
    """Share of the codes that a test set uses, and their perplexity.

    Args:
        codes: how many there are.
    """

    default_prefix = "codes"

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.codes = codes

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Tensor]]) -> None:
        self.results += [torch.bincount(one["codes"].flatten().cpu(), minlength=self.codes) for one in data_samples]

    def compute_metrics(self, results: list[Tensor]) -> dict[str, float]:
        used, perplexity = usage(torch.stack(results).sum(dim=0))
        return {"used": float(used), "perplexity": float(perplexity)}


class CodePrediction(FramePrediction):
    """The codes of the frames that follow a clip; tested, as any prediction of frames, by frames after a context.

    Args:
        net: frozen tokenizer and model.
        context: frames of a test clip that generation begins with; all others are generated.
        tokenizer: weights that training begins with, of the tokenizer, from ``vision-ssm train``; none where it came
            with them.
        label_smoothing: share of the target that is spread over all codes.
        kept: share of the frames, drawn for each batch, that are decoded and judged; saves memory.
        action_dropout: probability that a clip is trained without its actions.
        grad_checkpointing: compute most of the forward again in the backward, instead of keeping it.

    Raises:
        ValueError: a number is out of range.
    """

    net: CodedVideo

    def __init__(
        self,
        net: CodedVideo,
        *,
        context: int,
        tokenizer: str | Path | None,
        label_smoothing: float = 0.01,
        kept: float = 1.0,
        action_dropout: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        if not (0 < kept <= 1 and 0 <= action_dropout <= 1 and 0 <= label_smoothing <= 1):
            raise ValueError(
                "kept must be above 0 and at most 1, action_dropout and label_smoothing from 0 to 1; "
                f"got kept={kept}, action_dropout={action_dropout}, label_smoothing={label_smoothing}"
            )
        super().__init__(net, context=context, grad_checkpointing=grad_checkpointing)
        self.tokenizer = None if tokenizer is None else Path(tokenizer)
        self.label_smoothing, self.kept, self.action_dropout = label_smoothing, kept, action_dropout

    def init_weights(self) -> None:
        """Loads the tokenizer; called when training begins, before a checkpoint is resumed.

        Raises:
            FileNotFoundError, ValueError: the file is missing, damaged, or of another tokenizer.
        """
        if self.tokenizer is None:
            return
        if not self.tokenizer.is_file():
            raise FileNotFoundError(
                f"no weights of a tokenizer at {self.tokenizer}; train one (vision-ssm train video/moving_digits_vq "
                "--work-dir FOLDER) and --set model.tokenizer=FOLDER/weights.safetensors"
            )
        load_into(self.net.tokenizer, read_state(self.tokenizer), self.tokenizer)

    def forward(self, video: Tensor, actions: Tensor | None = None, mode: Mode = "tensor") -> Any:
        if mode != "loss":
            return super().forward(video, actions, mode)
        require_next(video)
        codes = self.net.encode(video)
        if actions is not None:
            dropped = torch.rand(len(actions), 1, device=actions.device) < self.action_dropout
            actions = actions[:, 1:].masked_fill(dropped, MASKED)
        seen, wanted = codes[:, :-1], codes[:, 1:]
        self.net.model.check(seen, actions)
        length = seen.shape[1]
        at = torch.randperm(length, device=video.device)[: math.ceil(self.kept * length)]
        logits, _ = self.net.model.predict(seen, actions, at=at)
        return {"loss": code_loss(logits.float(), wanted[:, at], label_smoothing=self.label_smoothing)}


def measure_reconstructions(config: Config, checkpoint: Path, *, console: Console, out: Path | None = None) -> None:
    """Prints how well a tokenizer's codes tell the frames of its config's test set, and writes it if ``out`` is given.

    Args:
        out: JSON file; beside it goes a figure of frames and what comes back of them (.png).

    Raises:
        FileNotFoundError, ValueError: see ``load_task`` and ``require_output``.
    """
    require_output(out)
    task = load_task(config, checkpoint)
    scores = evaluate(config, task, console=console)
    print_numbers(console, scores)
    if out is None:
        return
    write_json(out, {**origin(config, checkpoint=checkpoint), **scores})
    clip = next(iter(build_loader(config.test_dataloader)))["video"][:1].to(device())
    with torch.no_grad():
        decoded = task(clip)
    rows = {
        title: {number + 1: frames[0, number] for number in chosen(clip.shape[1])}
        for title, frames in {"frame": clip, "decoded": decoded}.items()
    }
    save_figure(out.with_suffix(".png"), contact_sheet(rows))
    print_files(console, out, out.with_suffix(".png"))
