"""How Sphinx builds the documentation: `sphinx-build -W -n docs build/docs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

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


class FiguresInPages(SphinxPostTransform):
    """Put SVG figures into the pages themselves, where they follow the site's mode; as pictures
    they would follow the system's."""

    default_priority = 1

    def run(self, **options: Any) -> None:
        """Replace the images of this page."""
        for image in list(self.document.findall(nodes.image)):
            if image["uri"].endswith(".svg"):
                drawing = Path(self.app.srcdir, image["uri"]).read_text()
                figure = nodes.raw("", f'<div class="drawing">{drawing}</div>', format="html")
                alone = isinstance(image.parent, nodes.paragraph) and len(image.parent) == 1
                (image.parent if alone else image).replace_self(figure)


def setup(app: Any) -> None:
    """Add what is above to Sphinx."""
    app.add_post_transform(FiguresInPages)
