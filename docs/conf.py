"""Sphinx configuration. `make docs` builds the site, offline, with warnings as errors."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "_ext")]

from moe_jax.version import __version__

project = "moe_jax"
author = "The moe_jax authors"
project_copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "command_help",
    "docstrings",
    "field_tables",
]
exclude_patterns = ["_build", "_ext"]
nitpicky = False

html_theme = "furo"
html_title = "moe_jax"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "literal"  # docstrings write code in single backticks, as Markdown does
copybutton_prompt_text = r"\$ "
