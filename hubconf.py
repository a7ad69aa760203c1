"""torch.hub: ``torch.hub.load(REPOSITORY, "vmamba_tiny", pretrained=True)`` needs torch and timm, and no installation.

Every model of the package but those for its tests is an entry point. Arguments are those of ``timm.create_model``.
"""

# Modules only: torch.hub takes every public callable of this file for a model.
import importlib.util
import pathlib
import sys
import types

import timm

dependencies = ["torch", "timm"]


def _package() -> types.ModuleType:
    """vision_ssm if it is imported, or else this checkout, whose top-level folders are parts of the package."""
    if "vision_ssm" not in sys.modules:
        root = pathlib.Path(__file__).parent
        spec = importlib.util.spec_from_file_location(
            "vision_ssm",
            root / "vision_ssm" / "__init__.py",
            submodule_search_locations=[str(root / "vision_ssm"), str(root)],
        )
        assert spec is not None and spec.loader is not None
        sys.modules["vision_ssm"] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules["vision_ssm"])
        except BaseException:
            del sys.modules["vision_ssm"]
            raise
    return sys.modules["vision_ssm"]


globals().update(
    {name: timm.model_entrypoint(name) for name in _package().list_models() if not name.startswith("test_")}
)
