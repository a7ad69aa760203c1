"""Published checkpoints: listed, fetched, converted with their provenance, and verified."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vision_ssm._version import __version__
from vision_ssm.engine.checkpoint import require_file, write_atomically
from vision_ssm.engine.outputs import require_outputs
from vision_ssm.engine.zoo.download import cache_folder, download, require_sha256
from vision_ssm.model_zoo import checkpoints
from vision_ssm.model_zoo.catalogue import Card, card_of_file, cards
from vision_ssm.model_zoo.converters import AVERAGES, taken

__all__ = ["Verdict", "VerificationError", "convert_file", "fetch", "find_cards", "print_cards", "verify_file"]


class VerificationError(Exception):
    """A checkpoint is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found out about a checkpoint that is in order.

    Attributes:
        model: timm name of the model that it fits.
        card: of the published file that it is or was converted from, known by its name; None for another.
        sha256: of the published file, computed or, of a converted one, as noted at the conversion.
        tensors: how many were loaded.
        logits: shape of the output for one image.
    """

    model: str
    card: Card | None
    sha256: str | None
    tensors: int
    logits: tuple[int, ...]

    def report(self) -> str:
        """The findings in words."""
        hashed = "as published" if self.card and self.card.sha256 else "none was published to compare with"
        return (
            f"{self.model}: {self.tensors} tensors, strictly loaded\n"
            f"SHA-256 of the source: {self.sha256 or 'not noted'} ({hashed})\n"
            f"logits {self.logits}, all finite"
        )


def find_cards(which: str) -> list[Card]:
    """Cards of the family ``which``, or of the models whose names match this pattern.

    Raises:
        ValueError: there are none.
    """
    found = [card for card in cards() if card.family == which or fnmatch(card.model, which)]
    if not found:
        families = ", ".join(sorted({card.family for card in cards()}))
        raise ValueError(f"no checkpoint of {which!r}; give a family ({families}) or a pattern such as '*tiny*'")
    return found


def print_cards(console: Console, found: Sequence[Card]) -> None:
    """A table of the cards, and below it the files, where they are and their hashes where any are stated."""
    numbers = (Column(heading, justify="right") for heading in ("params (M)", "mult-adds (G)", "px", "top-1 %"))
    table = Table(Column("model", no_wrap=True), *numbers, Column("licence", no_wrap=True))
    for card in found:
        costs = f"{card.parameters / 1e6:.2f}", f"{card.multiply_adds / 1e9:.3f}", str(card.image_size)
        table.add_row(card.model, *costs, str(card.top1), card.licence)
    console.print(table)
    for card in found:
        stated = f", SHA-256 {card.sha256}" if card.sha256 else ""
        console.print(f"{card.model}: {card.file} from {card.url or card.page}{stated}", soft_wrap=True)


def fetch(which: str, *, sha256: str | None = None, console: Console) -> Path:
    """The official file of a card, in the user's cache; fetched over https unless it is there and whole.

    Args:
        which: name of a model or of a published file.
        sha256: what the file must have; that of the card by default.

    Raises:
        ValueError: no such card, or several; a card without an address; no hash is known, or another one than the card
            states.
        DownloadError: see ``vision_ssm.engine.zoo.download.download``; nothing is kept then.
    """
    card = only_card(which)
    if card.url is None:
        raise ValueError(f"no address of {card.file} is known; it is published at {card.page}")
    if card.sha256 is not None and sha256 not in (None, card.sha256):
        raise ValueError(f"{card.file} was published with the SHA-256 {card.sha256}, not {sha256}")
    expected = card.sha256 or sha256
    if expected is None:
        raise ValueError(
            f"the authors state no SHA-256 of {card.file}, so a download could not be checked; give the hash of a copy "
            f"that you trust by --sha256, or fetch it yourself from {card.page}"
        )
    require_sha256(expected)
    target = cache_folder() / "zoo" / expected.lower() / Path(card.file).name
    if target.is_file() and _sha256(target) == expected.lower():
        return target
    columns = TextColumn("{task.description}"), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(card.file)
        try:
            download(
                card.url,
                target,
                sha256=expected,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        finally:
            if target.parent.is_dir() and not any(target.parent.iterdir()):
                target.parent.rmdir()
    return target


def only_card(which: str) -> Card:
    """The card of a model, or of a published file.

    Raises:
        ValueError: there is none, or a model has several files.
    """
    found = [card for card in cards() if which in (card.model, card.file)]
    if len(found) != 1:
        files = ", ".join(card.file for card in found or cards())
        raise ValueError(f"{len(found) or 'no'} published files of {which!r}; name one of {files}")
    return found[0]


def convert_file(source: Path, target: Path, *, model: str | None = None, overwrite: bool = False) -> dict[str, str]:
    """Converts an official checkpoint to safetensors in this package's layout, all of it or nothing.

    Args:
        source: official file.
        target: new ``.safetensors`` file.
        model: timm name of the model; by default that of the card with this file name, else the one that fits.
        overwrite: replace ``target``.

    Returns:
        The metadata of ``target``: where its tensors come from, and what moving averages were taken or left out.

    Raises:
        FileNotFoundError, FileExistsError, PermissionError: no source, a target that exists, nowhere to write.
        ValueError: the source cannot be read, has another hash than its card, fits no model or not this one, or is no
            official checkpoint; the target is the source, or no ``.safetensors`` file.
    """
    if model is not None:
        checkpoints.require_own(model)
    require_file(source)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors, the format that is written")
    require_outputs([target], source, overwrite=overwrite)
    digest = _sha256(source)
    card = _card(source.name, model, digest, source)
    state = checkpoints.read(source)
    if not checkpoints.is_official(state):
        raise ValueError(
            f"{source} is not laid out as a checkpoint of VMamba, EfficientVMamba or Vim; one in this package's own"
            " layout needs no conversion, model_zoo.load and timm read it as it is"
        )
    model = model or (card.model if card else checkpoints.identify(state))
    ours = checkpoints.convert(state, model)
    metadata = {
        "format": "pt",
        "package": "vision_ssm",
        "version": __version__,
        "model": model,
        "source_file": source.name,
        "source_sha256": digest,
        "source_page": card.page if card else "unknown",
        "licence": card.licence if card else "none stated",
    }
    source_key = taken(state)
    if source_key in AVERAGES:
        metadata["moving_average"] = source_key
    elif averages := [name for name in AVERAGES if name in state]:
        metadata["left_out"] = ", ".join(averages)
    owned = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in ours.items()}
    write_atomically(target, lambda partial: partial.write_bytes(save(owned, metadata=metadata)))
    return metadata


def verify_file(path: Path, *, model: str | None = None) -> Verdict:
    """Checks a checkpoint, official or converted: its hash where the card states one, strict loading, finite logits.

    Args:
        path: the file.
        model: timm name of the model; by default the one in the metadata or of the card, else the one that fits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: this package has no such model.
        VerificationError: a check failed.
    """
    if model is not None:
        checkpoints.require_own(model)
    require_file(path)
    try:
        noted = _metadata(path)
        digest = noted.get("source_sha256") if path.suffix == ".safetensors" else _sha256(path)
        card = _card(noted.get("source_file", path.name), model, digest, path)
        state = checkpoints.read(path)
        model = model or noted.get("model") or (card.model if card else checkpoints.identify(state))
        ours = checkpoints.convert(state, model)
    except ValueError as error:
        raise VerificationError(str(error)) from error
    net = timm.create_model(model, num_classes=checkpoints.classes(ours, model)).eval()
    net.load_state_dict(ours)
    image = torch.randn(1, *checkpoints.input_size(model), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = net(image)
    if not logits.isfinite().all():
        raise VerificationError(f"{model} gives logits that are not finite with these weights")
    return Verdict(model=model, card=card, sha256=digest, tensors=len(ours), logits=tuple(logits.shape))


def _card(name: str, model: str | None, digest: str | None, path: Path) -> Card | None:
    """The card of the published file ``name``, unless it is that of another model; its hash must be the stated one."""
    card = card_of_file(name)
    if card is None or model not in (None, card.model):
        return None
    if card.sha256 not in (None, digest):
        raise ValueError(
            f"{path} has the SHA-256 {digest}, but {card.file} was published with {card.sha256}; download it again from"
            f" {card.url or card.page}"
        )
    return card


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); copy it again") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
