"""The documentation site; ``make docs`` builds it into docs/_build."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

from vision_ssm import __version__

HERE = Path(__file__).parent
sys.path.append(str(HERE / "extensions"))

project = "vision_ssm"
author = "The vision_ssm authors"
copyright = f"2026, {author}"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "generated", "mathml"]
exclude_patterns = ["_build", "_generated", "extensions"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"vision_ssm {__version__}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/test_docs.py runs the notebooks

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False


def plain_stars(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings write shapes such as (b, *grid, c) and have no emphasis: a star outside ``literals`` is a star."""
    for number, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [re.sub(r"(?<![\\*])\*(?!\*)", r"\\*", part) for part in parts[::2]]
        lines[number] = "``".join(parts)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", plain_stars, priority=400)  # before napoleon, at 500
