"""The tables in the README: models from the cards and the registry, networks as counted; never typed."""

import re
from pathlib import Path

import timm
import torch
from timm.models import get_pretrained_cfg_value

from vision_ssm.backbones import list_models
from vision_ssm.engine.benchmark.profile import CONVENTION, count_multiply_adds
from vision_ssm.engine.checkpoint import write_atomically
from vision_ssm.engine.zoo import networks_table
from vision_ssm.model_zoo.catalogue import Card, cards
from vision_ssm.model_zoo.checkpoints import input_size

__all__ = ["fill", "filled", "render"]

_BLOCK = re.compile(r"(?P<head><!-- (?P<table>models|networks) -->\n).*?(?P<tail><!-- /(?P=table) -->)", re.DOTALL)


def render() -> str:
    """Markdown: every model of the package, with what its card says where a checkpoint was published."""
    published = {card.model: card for card in cards()}
    lines = [
        "| timm name | parameters (M) | multiply-adds (G) | image px | top-1 % | weights |",
        "|---|---:|---:|---:|---:|---|",
    ]
    lines += [_card_line(published[name]) if name in published else _own_line(name) for name in list_models()]
    return "\n".join([*lines, "", f"{CONVENTION} Top-1 on ImageNet-1K is what the authors report."])


def filled(document: Path) -> str:
    """Text of ``document`` with its blocks ``<!-- models -->`` and ``<!-- networks -->`` rendered anew.

    Raises:
        ValueError: the document has neither.
    """
    text = document.read_text(encoding="utf-8")
    if not _BLOCK.search(text):
        raise ValueError(f"{document} has no block <!-- models --> ... <!-- /models -->, or of networks, to fill")
    tables = {"models": render, "networks": networks_table.render}
    return _BLOCK.sub(lambda block: f"{block['head']}\n{tables[block['table']]()}\n\n{block['tail']}", text)


def fill(document: Path) -> None:
    """Renders the blocks of ``document`` in place; see :func:`filled`."""
    text = filled(document)
    write_atomically(document, lambda partial: partial.write_text(text, encoding="utf-8"))


def _card_line(card: Card) -> str:
    costs = _costs(card.parameters, card.multiply_adds, card.image_size)
    return f"| `{card.model}` | {costs} | {card.top1} | [released]({card.url or card.page}), {card.licence} |"


def _own_line(name: str) -> str:
    size = input_size(name)
    with torch.device("meta"):
        net = timm.create_model(name).eval()
        total, _ = count_multiply_adds(net, torch.empty(1, *size))
    costs = _costs(sum(p.numel() for p in net.parameters()), total, size[-1])
    weights = "never released" if get_pretrained_cfg_value(name, "paper_ids") else "none"
    return f"| `{name}` | {costs} | | {weights} |"


def _costs(parameters: int, multiply_adds: int, size: int) -> str:
    return f"{parameters / 1e6:.1f} | {multiply_adds / 1e9:.2f} | {size}"
