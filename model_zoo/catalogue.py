"""The published checkpoints that this package reads: one card each, kept in ``cards/<family>.yaml``."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

CARDS = Path(__file__).parent / "cards"


@dataclass(frozen=True, kw_only=True)
class Card:
    """One published checkpoint.

    Attributes:
        family: name of the converter.
        model: timm name of the model that it fits.
        file: its name as published.
        page: where the authors publish it.
        url: the file's own address; None where none is known.
        sha256: as the publisher states it; None where none is stated.
        licence: SPDX identifier, or "none stated".
        licence_source: what that was read from.
        image_size: side of the images in pixels.
        top1: percent on ImageNet-1K, as the authors report it.
        parameters: measured, all of them trainable.
        multiply_adds: measured, of one image; ``vision_ssm.engine.benchmark.profile.CONVENTION`` says what is counted.
    """

    family: str
    model: str
    file: str
    page: str
    url: str | None
    sha256: str | None
    licence: str
    licence_source: str
    image_size: int
    top1: float
    parameters: int
    multiply_adds: int


@cache
def cards() -> tuple[Card, ...]:
    """All cards, family by family in the order of their files."""
    found = []
    for path in sorted(CARDS.glob("*.yaml")):
        shared = yaml.safe_load(path.read_text(encoding="utf-8"))
        own = shared.pop("checkpoints")
        found += [Card(**{**shared, **entry}) for entry in own]
    return tuple(found)


def card_of_file(name: str) -> Card | None:
    """The card of a published file, known by its name."""
    return next((card for card in cards() if card.file == name), None)
