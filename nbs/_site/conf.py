"Sphinx settings of the docs site; what _quarto.yml says is taken from there."
import os
from pathlib import Path

import yaml

here = Path(__file__).resolve().parent
site = yaml.safe_load((here.parent.parent / "_quarto.yml").read_text(encoding="utf-8"))["website"]
stage = Path(os.environ["MIXBOOK_STAGE"])

project, author, copyright = site["title"], "The mixbook authors", "The mixbook authors, Apache License 2.0"
html_title = site["title"]
extensions = ["myst_nb", "sphinx_copybutton", "sphinx_design"]

nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath", "deflist", "tasklist", "attrs_inline"]
myst_all_links_external = False
numfig = True
numfig_format = {"figure": "Figure %s"}
suppress_warnings = ["myst.header", "mystnb.mime_priority"]
exclude_patterns = ["_extra"]

templates_path = ["templates"]
html_theme = "pydata_sphinx_theme"
html_static_path = ["static"]
html_extra_path = [str(stage / "_extra")]
html_css_files = ["style.css"]
html_favicon = "static/favicon.svg"
html_copy_source = False
html_show_sphinx = False
html_last_updated_fmt = None
html_use_index = False
html_domain_indices = False
html_theme_options = {
    "logo": {"text": site["title"], "image_light": "static/logo.svg", "image_dark": "static/logo.svg", "alt_text": "mixbook, home"},
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "show_nav_level": 2,
    "show_toc_level": 2,
    "collapse_navigation": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "github-dark",
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "article_header_start": ["breadcrumbs"],
    "search_bar_text": "Search mixbook",
    "back_to_top_button": True,
}
html_context = {"default_mode": "auto"}
html_sidebars = {"index": [], "search": []}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_selector = "div.cell_input div.highlight pre, div.highlight-bash pre, div.highlight-console pre, div.highlight-python:not(.api-signature) pre"


def copy_mathjax(app, exc):
    "The part of MathJax that is needed, from the package that carries it: formulas without a network."
    import importlib.util
    import shutil
    if exc is not None: return
    found = Path(importlib.util.find_spec("myst_nb").origin).parent.parent / "sphinx-mathjax-offline" / "static" / "mathjax"
    to = Path(app.outdir) / "_static" / "mathjax"
    to.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found / "tex-chtml.js", to / "tex-chtml.js")
    shutil.copytree(found / "output" / "chtml" / "fonts", to / "output" / "chtml" / "fonts", dirs_exist_ok=True)


mathjax_path = "mathjax/tex-chtml.js"
mathjax_options = {"defer": "defer"}


def setup(app): app.connect("build-finished", copy_mathjax)
