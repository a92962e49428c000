"""How Sphinx makes the site: `make docs`, strictly."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import weighting

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "weighting-dsl"
copyright = "the weighting-dsl authors"
version = release = weighting.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"weighting-dsl {version}"
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.header"]  # a page of reference starts its stages at the second level
autodoc_typehints = "none"  # signatures name them; classes of torch and pydantic have no page here
autodoc_member_order = "bysource"
# Annotations of fields, which stand in the code without their module.
nitpick_ignore = [("py:class", name) for name in ("Tensor", "torch.Tensor", "Level", "Collectives")]


def setup(app: Sphinx) -> None:
    """Let pages beside docs/ be read from the site: as files, which must be there."""
    app.connect("source-read", _link_files)


def _link_files(app: Sphinx, name: str, source: list[str]) -> None:
    del app, name
    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+)\)", r"{download}`\1 <\2>`", source[0])
