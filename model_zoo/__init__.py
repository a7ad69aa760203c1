"""Published checkpoints: where they are, and how to bring them into our layout."""

if __name__ != "vision_ssm.model_zoo":  # a checkout on sys.path
    raise ImportError("import vision_ssm.model_zoo; the bare name 'model_zoo' belongs to another project")

from .checkpoints import convert, load

__all__ = ["convert", "load"]
