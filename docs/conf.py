"""Settings of the documentation, for `make docs`."""

from pathlib import Path

import pyro_nf

HERE = Path(__file__).parent

project = "pyro-nf"
author = "the pyro-nf developers"
copyright = "2026, the pyro-nf developers"  # noqa: A001 - as Sphinx calls it
version = release = pyro_nf.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]

# Notebooks are shown with the outputs that they were saved with: `make tutorials` runs them.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

# Docstrings: Google style, names and formulas in single backticks.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
add_module_names = False

html_theme = "furo"
html_title = "pyro-nf"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#b5440e", "color-brand-content": "#b5440e"},
    "dark_css_variables": {"color-brand-primary": "#ff9d5c", "color-brand-content": "#ff9d5c"},
}


def _copy_tutorials() -> None:
    """Copy the notebooks, whose links to these pages are right where the notebooks stand in the repository."""
    folder = HERE / "tutorials"
    folder.mkdir(exist_ok=True)
    for notebook in (HERE.parent / "tutorials").glob("*.ipynb"):
        text = notebook.read_text().replace("](../CONTRIBUTING.md", "](../contributing.md")
        text = text.replace("](../docs/", "](../")
        copy = folder / notebook.name
        if not copy.exists() or copy.read_text() != text:
            copy.write_text(text)


_copy_tutorials()
