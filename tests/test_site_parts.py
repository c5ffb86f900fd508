"How the site reads notebooks: Quarto's notation into MyST, reference entries out of source text, one small site from end to end."
import re, sys
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root / "nbs" / "_site"))
import apidoc, build, quarto

from nbformat.v4 import new_code_cell as code, new_markdown_cell as md, new_notebook, new_output


# ---------------------------------------------------------------- notation

def test_callouts_become_admonitions_and_nest():
    text = "::: {.callout-tip title=\"Try it\"}\ninner\n\n::: {.callout-warning}\ndeep\n:::\n:::\nafter"
    out = quarto.divs(text)
    assert out.startswith("::::{admonition} Try it\n:class: tip") and ":::{warning}\ndeep\n:::\n::::\nafter" in out
    assert quarto.divs("::: {.callout-note collapse=\"true\"}\n## Head\nx\n:::") == ":::{admonition} Head\n:class: note dropdown\n\nx\n:::"


def test_fenced_code_is_left_alone():
    text = "```\n::: {.callout-note}\n@fig-a [x](y.ipynb)\n```"
    assert quarto.divs(text) == text
    assert quarto.references(text, "p", {"fig-a"}) == text
    assert quarto.links(text, lambda t, h: "z", "p") == text


def test_references_to_figures_carry_the_page():
    assert quarto.references("see @fig-a, @fig-b and a@fig-a", "core", {"fig-a"}) == "see {numref}`core-fig-a`, @fig-b and a@fig-a"


def test_links_between_notebooks_keep_their_anchor_and_lose_attributes():
    page_of = lambda target, here: f"SITE/{target[:-6]}.html" if target.endswith(".ipynb") else None
    assert quarto.links("[a `b`](c.ipynb#d){target=\"_blank\"} [e](https://f.g) ![i](j.ipynb)", page_of, "p") == "[a `b`](SITE/c.html#d) [e](https://f.g) ![i](j.ipynb)"


def test_a_line_of_arrows_becomes_steps():
    assert '<li>a</li><li>b &lt;c&gt;</li>' in quarto.flows("```\na ─► b <c>\n```")
    assert quarto.flows("```\na\n─► b\n```") == "```\na\n─► b\n```"


def test_headings_get_the_anchor_that_quarto_would_give():
    assert quarto.headings("## Plain words") == "## Plain words"
    assert quarto.headings("## `a_b` now") == '<a class="anchor" id="a_b-now"></a>\n\n## `a_b` now'
    assert quarto.headings("## Title {#sec-x .unnumbered}") == '<a class="anchor" id="sec-x"></a>\n\n## Title'


def test_cell_options_survive_bad_yaml():
    options, source = quarto.cell_options("#| label: fig-x\n#| fig-cap: loss: lower is better\n#| echo: false\nplot()")
    assert source == "plot()" and options["fig-cap"] == "loss: lower is better" and options["echo"] is False


@pytest.mark.parametrize("line,tag", [("echo: false", "remove-input"), ("output: false", "remove-output"), ("code-fold: true", "hide-input"), ("warning: false", "remove-stderr")])
def test_cell_options_become_tags(line, tag):
    cell = code(f"#| {line}\n1")
    assert quarto.code_cell(cell, quarto.cell_options(cell.source)[0], "p") and cell.metadata["tags"] == [tag]


def test_a_cell_that_is_not_included_is_dropped():
    assert not quarto.code_cell(code("1"), {"include": False}, "p")


# ---------------------------------------------------------------- reference

MODULE = '''
from dataclasses import dataclass
def fit(
    runs:list[int]|None, # Rows, `n` of them
    *,
    kind:str="a|b", # Which one
    # above the line
    seed:int=0,
)->dict: # The result
    "Fit `runs`."
    return {}
def short(a, b=1): # Their sum
    "Add."
    return a + b
@dataclass(frozen=True)
class Box(Base):
    "Holds things."
    size:int # How many
    name:str="x" # What it is called
    _hidden:int=0
    @property
    def area(self)->float: # In cm²
        "The area."
    def grow(self, by:int=1): "A larger box."
    def _secret(self): pass
@patch
def shrink(self:Box,
    by:int=1, # Steps
)->Box: # A smaller one
    "Shrink."
class Oops(ValueError): "Goes wrong."
'''


@pytest.fixture
def module(tmp_path):
    (tmp_path / "m.py").write_text(MODULE, encoding="utf-8")
    return apidoc.Module(tmp_path / "m.py")


def test_parameters_come_from_the_comments(module):
    fit = module.symbols["fit"]
    assert [(p.name, p.type, p.default, p.doc) for p in fit.params] == [
        ("runs", "list[int]|None", "", "Rows, `n` of them"), ("kind", "str", '"a|b"', "Which one"), ("seed", "int", "0", "above the line")]
    assert (fit.returns.type, fit.returns.doc) == ("dict", "The result") and fit.call == 'fit(runs, *, kind="a|b", seed=0)'
    assert "list[int]\\|None" in apidoc.entry(fit)
    short = module.symbols["short"]
    assert [p.doc for p in short.params] == ["", ""] and short.returns.doc == "Their sum"


def test_classes_show_fields_members_and_patched_methods(module):
    box = module.symbols["Box"]
    assert box.call == 'Box(size, name="x")' and [p.doc for p in box.params] == ["How many", "What it is called"]
    assert [m.name for m in box.members] == ["Box.area", "Box.grow"] and box.anchors == ("Box._secret",)
    assert module.symbols["Box.shrink"].call == "Box.shrink(by=1)"
    text = apidoc.entry(box, shown={"Box.grow"})
    assert 'id="box.area"' in text and 'id="box.grow"' not in text and "| The area. |" in text
    assert "class Oops(ValueError)" in apidoc.entry(module.symbols["Oops"])


def test_long_signatures_break_at_top_level_commas():
    call = "f(" + ", ".join(f"argument_{i}=(1, {i})" for i in range(5)) + ")"
    assert apidoc.wrap_call(call).count("\n") == 6 and "    argument_3=(1, 3),\n" in apidoc.wrap_call(call)


# ---------------------------------------------------------------- end to end

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A project of two notebooks, and a function that builds its site."
    for name, at in dict(root=tmp_path, nbs=tmp_path / "nbs", docs=tmp_path / "_docs", work=tmp_path / "_proc").items(): monkeypatch.setattr(build, name, at)
    (tmp_path / "nbs" / "guides").mkdir(parents=True)
    (tmp_path / "_proc").mkdir()
    (tmp_path / "mixbook").mkdir()
    (tmp_path / "mixbook" / "core.py").write_text('def hello(\n    name:str, # Whom\n)->str: # A greeting\n    "Greet `name`."\n    return name\n', encoding="utf-8")
    (tmp_path / "_quarto.yml").write_text("website: {title: mixbook, description: d, site-url: https://x.example/mixbook, sidebar: {contents: [{section: API, contents: [00_core.ipynb, 01_absent.ipynb]}, {section: Guides, contents: guides/*.ipynb}]}}\n")
    cells = [md("# Core\n\n> The *base*."), code("#| default_exp core"), md("## First part\n\nSee @fig-dot, [the guide](guides/use.ipynb#steps), `hello`, and $a^2$.\n\n::: {.callout-note}\nMind this.\n:::"),
             code('#| export\ndef hello(\n    name:str, # Whom\n)->str: # A greeting\n    "Greet `name`."\n    return name'),
             code("#| label: fig-dot\n#| fig-cap: A dot.\n#| fig-alt: One dot.\nplot()", outputs=[new_output("display_data", {"image/png": PNG, "text/plain": "<Figure>"})]),
             code("#| code-fold: true\nfolded()"), code("#| echo: false\nunseen()", outputs=[new_output("stream", name="stdout", text="seen")]), code("#| include: false\ngone()"),
             code("w", outputs=[new_output("execute_result", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "<contextlib._GeneratorContextManager>"})]),
             code("frame", outputs=[new_output("execute_result", {"text/html": '<div>\n<style scoped>\n.x {}\n</style>\n<table border="1" class="dataframe"><tr><td>7</td></tr></table></div>', "text/plain": "7"})])]
    nbformat.write(new_notebook(cells=cells), tmp_path / "nbs" / "00_core.ipynb")
    guide = [md("# Use it\n\n> How."), md("## Steps\n\nBack to [core](../00_core.ipynb).")]

    def make(*more):
        nbformat.write(new_notebook(cells=[*guide, *more]), tmp_path / "nbs" / "guides" / "01_use.ipynb")
        (tmp_path / "nbs" / "guides" / "01_use.ipynb").rename(tmp_path / "nbs" / "guides" / "use.ipynb")
        build.build_sphinx()
        return (build.docs / "core.html").read_text(encoding="utf-8")
    return make


def test_a_small_site_shows_everything(small):
    text = small()
    for want in ("<title>Core", 'href="guides/use.html#steps"', 'href="#core-fig-dot"', ">Figure 1<", 'alt="One dot."', "A dot.", 'id="hello"', "Whom", "A greeting", 'href="core.html#hello"', "admonition note", "Mind this.", "folded", "seen", "<td>7</td>"):
        assert want in text, want
    for no in ("unseen", "gone()", "_GeneratorContextManager", "widget-view", "style scoped", ":::", "show_doc", "https://x.example"): assert no not in text, no
    assert re.search(r"<details[^>]*hide.*?folded", text, re.S)
    assert 'href="../core.html"' in (build.docs / "guides" / "use.html").read_text(encoding="utf-8")
    assert "def hello" not in (build.docs / "searchindex.js").read_text(encoding="utf-8")
    assert "[Core](core.html.md): The *base*." in (build.docs / "llms.txt").read_text(encoding="utf-8")


def test_a_reference_to_nothing_fails_the_build(small, capfd):
    with pytest.raises(SystemExit, match="not built"): small(md("See {numref}`no-such-figure`."))
    assert "no-such-figure" in capfd.readouterr().err
    assert not (build.docs / "index.html").exists()
