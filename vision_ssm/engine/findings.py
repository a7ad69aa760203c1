"""What a command found: of what, its numbers on the console, and the files that hold them."""

from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config
from rich.console import Console

from vision_ssm.engine.config import config_name

__all__ = ["origin", "print_files", "print_numbers"]

WIDTH = 24  # of names, or more where one is longer


def origin(config: Config, **paths: Path) -> dict[str, str]:
    """Of what numbers are, to be kept with them: the config, and files and folders by what they hold."""
    return {"config": config_name(config), **{name: str(path) for name, path in paths.items()}}


def print_numbers(console: Console, numbers: Mapping[str, float | str]) -> None:
    """Prints numbers by name, one a line; words say why there is none."""
    width = max([WIDTH, *(len(name) + 1 for name in numbers)])
    for name, number in numbers.items():
        console.print(f"{name:{width}}{number if isinstance(number, str) else f'{number:.4f}'}")


def print_files(console: Console, out: Path, *beside: Path) -> None:
    console.print(f"scores: {', '.join(map(str, (out, *beside)))}")
