"""State-space-model backbones for vision, video and medical imaging.

``import vision_ssm`` registers every model with timm: then ``timm.create_model("vmamba_tiny")`` works as usual.
"""

from ._version import __version__

try:
    from .kernels import backend_report
except ModuleNotFoundError as error:
    if error.name != "vision_ssm.kernels":
        raise
    raise ImportError(
        "vision_ssm is imported from a checkout that is not installed; run `pip install -e .` in the checkout"
    ) from None

from .backbones import list_models

__all__ = ["__version__", "backend_report", "list_models"]
