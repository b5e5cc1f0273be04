"""How Sphinx builds the documentation: `sphinx-build -W -n docs build/docs`."""

from __future__ import annotations

import sparsekern

project = "sparsekern"
author = "the sparsekern authors"
copyright = author
version = release = sparsekern.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Docstrings are Google's style, with single backticks for code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
add_module_names = False

# Types in signatures and docstrings: those of torch, and of ours that have no entry of their own.
nitpick_ignore_regex = [("py:(class|exc|obj)", r".*")]

html_theme = "pydata_sphinx_theme"
html_title = "sparsekern"
html_static_path = ["style"]
templates_path = ["style"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"**": ["all-pages.html"]}
html_theme_options = {
    "logo": {"text": "sparsekern"},
    "navbar_center": [],
    "footer_start": [],
    "footer_end": [],
    "secondary_sidebar_items": {"**": ["page-toc"], "benchmarks": []},  # whose tables are wide
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
