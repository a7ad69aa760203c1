"""What ``import kernels`` gives in a checkout: the package of that name if one is installed, else next to nothing.

The folder stands on ``sys.path`` there, where libraries look for the package of the bare name and must not stumble.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType


class Nothing(ModuleType):
    """A module that only says whose name it bears."""

    __version__ = "0"  # older than any that a library would take for the package

    def __getattr__(self, name: str) -> object:
        error = AttributeError if name.startswith("__") else ImportError
        raise error(f"kernels has no {name}: import vision_ssm.kernels; the bare name belongs to another project")


def step_aside(module: ModuleType) -> None:
    """Puts the installed package in the place of ``module``, or empties it where there is none."""
    name = module.__name__
    others = [entry for entry in sys.path if not Path(entry, "kernels", "routed_scan").exists()]  # no checkouts
    spec = PathFinder.find_spec(name, others)
    if spec is None or spec.loader is None:
        module.__class__ = Nothing
        del module.__path__  # no modules either
    else:
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
