"""The docs site without Quarto: notebooks → processed by nbdev → MyST → Sphinx → `_docs`.

python nbs/_site/build.py            Quarto where it is installed, Sphinx where not
python nbs/_site/build.py --sphinx   Sphinx, whatever is installed
"""
import argparse, contextlib, fcntl, html, os, re, shutil, subprocess, sys
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import yaml

here = Path(__file__).resolve().parent
root = here.parent.parent
nbs, docs, work = root / "nbs", root / "_docs", root / "_proc"
sys.path.insert(0, str(here))
import apidoc, quarto

NOISE = ("<contextlib._GeneratorContextManager", "<matplotlib.", "<Axes", "<Figure")


@dataclass
class Page:
    "One notebook on its way to the site."
    source: Path  # relative to nbs
    name: str  # page without .html: "core", "chapters/does_the_mixture_matter"
    title: str = ""
    description: str = ""
    module: str = ""
    nb: object = None
    figures: set = field(default_factory=set)

    @property
    def key(self): return self.name.replace("/", "-")


def website(): return yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]


def sections(site=None):
    "The sidebar: [(title, [notebook, …])], with patterns filled in and pages that are not there yet left out."
    out = []
    for entry in (site or website())["sidebar"]["contents"]:
        if isinstance(entry, str) or "href" in entry: continue
        wanted = [entry["contents"]] if isinstance(entry["contents"], str) else entry["contents"]
        wanted = [o if isinstance(o, str) else o["href"] for o in wanted]
        found = [p for w in wanted for p in (sorted(q.relative_to(nbs) for q in nbs.glob(w)) if "*" in w else [Path(w)]) if (nbs / p).exists()]
        out.append((entry["section"], found))
    return out


def notebooks():
    "Every notebook that is part of the project, relative to nbs."
    found = (p.relative_to(nbs) for p in nbs.rglob("*.ipynb"))
    return sorted(p for p in found if not any(o[0] in "._" for o in p.parts))


def page_name(path):
    from nbdev.config import nbpath2html
    return nbpath2html(path).with_suffix("").as_posix()


# ---------------------------------------------------------------- nbdev

def _procs():
    "nbdev's own steps, except that reference entries are read from the source instead of executed, and in the order of the code."
    from nbdev import frontmatter, processors as p

    class ShowDocs(p.add_show_docs):
        def begin(self):
            super().begin()
            cells, i = self.nb.cells, 0
            while i < len(cells):
                j = i
                while j < len(cells) and getattr(cells[j], "has_sd", False): j += 1
                cells[i:j] = reversed(cells[i:j])
                i = max(j, i + 1)

    return [frontmatter.FrontmatterProc, p.populate_language, ShowDocs, p.strip_ansi, p.hide_line, p.filter_stream_, p.rm_header_dash,
            p.clean_show_doc, p.rm_export, p.clean_magics, p.hide_, p.add_fold, p.mv_exports, p.strip_hidden_metadata]


def processed(path):
    "The notebook after nbdev's steps, and its front matter."
    from fastcore.nbio import read_nb
    from nbdev.process import NBProcessor
    nb = read_nb(path)
    module = next((m[1] for c in nb.cells if c.cell_type == "code" and (m := re.search(r"^\s*#\|\s*default_exp\s+(\S+)", c.source, re.M))), "")
    NBProcessor(nb=nb, procs=_procs(), rm_directives="quarto").process()
    matter = dict(getattr(nb, "frontmatter_", {}))
    cells = []
    for c in nb.cells[1:] if matter else nb.cells:
        kind = c.cell_type
        new = {"markdown": nbformat.v4.new_markdown_cell, "raw": nbformat.v4.new_raw_cell, "code": nbformat.v4.new_code_cell}[kind](c.source)
        if kind == "code": new.outputs = [_output(o) for o in c.get("outputs", [])]
        cells.append(new)
    return nbformat.v4.new_notebook(cells=cells), matter, module.replace(".", "/")


def _plain(o):
    if isinstance(o, dict): return nbformat.from_dict({k: _plain(v) for k, v in o.items()})
    return [_plain(v) for v in o] if isinstance(o, (list, tuple)) else o


def _text(o): return "".join(o) if isinstance(o, list) else o


def _output(o):
    o = _plain(dict(o))
    for k in list(o.get("data", {})): o["data"][k] = _text(o["data"][k]) if k != "application/json" else o["data"][k]
    if "text" in o: o["text"] = _text(o["text"])
    return o


def linker(pages, base):
    "A function that links the backticked public names of a text to their place in the reference."
    where, owners, arguments = {}, {}, set()
    stems = {p.module for p in pages}
    for page in pages:
        if not page.module: continue
        for name, symbol in apidoc.module(root / "mixbook" / f"{page.module}.py").symbols.items():
            owners.setdefault(name, []).append(page.module)
            arguments |= {p.name for p in symbol.params}
    # A bare word links only where it can mean nothing else: not a module, a command of the shell, or a common argument.
    def plain(name, module): return name not in stems and module != "cli" and len(set(owners[name]) - {"cli"}) == 1 and (name not in arguments or "_" in name)
    for page in pages:
        if not page.module: continue
        for name in apidoc.module(root / "mixbook" / f"{page.module}.py").symbols:
            if any(part.startswith("_") for part in name.split(".")): continue
            url = f"{base}/{page.name}.html#{name.lower()}"
            if plain(name, page.module): where[name] = url
            for lead in (f"{page.module}.", f"mixbook.{page.module}.", *(() if page.module == "cli" else ("mb.", "mixbook."))): where.setdefault(lead + name, url)
    def do(text, own=()):
        def one(m):
            name = m[1].removesuffix("()")
            return f"[`{m[1]}`]({where[name]})" if name in where and name not in own else m[0]
        def line(text): return text if text.startswith(("#", "    ", "![")) else re.sub(r"(?<![\[`])`([\w.]+(?:\(\))?)`(?!`)", one, text)
        return quarto.outside_code(text, line)
    return do


# ---------------------------------------------------------------- staging

def tidy_outputs(cell, options):
    "Outputs as the site shows them: no reprs of helpers, no inline styles, no widgets (their scripts would come from the network)."
    kept = []
    for o in cell.outputs:
        data = o.get("data")
        if data is not None:
            for mime in [m for m in data if "widget" in m]: del data[mime]
            plain = data.get("text/plain", "")
            if not data or (set(data) == {"text/plain"} and plain.startswith(NOISE)): continue
            if "text/html" in data:
                data["text/html"] = re.sub(r"<style scoped>.*?</style>\s*", "", data["text/html"], flags=re.S).replace(' border="1"', "").replace(' style="text-align: right;"', "")
        if o.output_type == "stream" and not o.text.strip(): continue
        kept.append(o)
    cell.outputs = kept


def markdown_cell(text, page, page_of, link):
    text = quarto.links(quarto.divs(quarto.images(quarto.flows(text), page.key)), page_of, page.source)
    return quarto.headings(quarto.references(link(text), page.key, page.figures))


def only_for_checks(source):
    "Whether a cell does nothing but fetch what checks and documentation need: of no interest to a reader of the site."
    lines = [l for l in source.splitlines() if l.strip()]
    return bool(lines) and all(re.match(r"(from|import) (fastcore\.test|nbdev)\b", l) for l in lines)


def show_doc_call(source):
    "Name and heading level of a `show_doc(…)` cell."
    import ast
    call = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "show_doc")
    level = next((k.value.value for k in call.keywords if k.arg == "title_level"), 3)
    return ast.unparse(call.args[0]), level


def stage(page, page_of, link, base):
    "The notebook of `page` as a notebook for MyST-NB."
    prepared, shown = [], set()
    for cell in page.nb.cells:
        if cell.cell_type != "code": prepared.append((cell, {}, None)); continue
        options, source = quarto.cell_options(cell.source)
        call = show_doc_call(source) if source.startswith("show_doc(") else None
        if call: shown.add(call[0])
        if label := options.get("label"): page.figures.add(label) if str(label).startswith("fig-") and options.get("fig-cap") else None
        cell.source = source
        prepared.append((cell, options, call))
    for cell, _, _ in prepared:
        if cell.cell_type == "markdown": page.figures |= set(re.findall(r"^!\[.*\]\(.*\)\{[^}]*#(fig-[\w-]+)", cell.source, re.M))
    file = f"{base}/_notebooks/{page.source.as_posix()}"
    says = f"`mixbook.{page.module}` · " if page.module else ""
    cells = [nbformat.v4.new_markdown_cell("\n\n".join(filter(None, [
        f"# {page.title}", f"```{{div}} subtitle\n{link(page.description)}\n```" if page.description else "",
        f"```{{div}} page-file\n{says}this page is a notebook: [{page.source.name}]({file})\n```" if page.name != "index" else ""])))]
    for cell, options, call in prepared:
        if call: cells.append(nbformat.v4.new_markdown_cell(reference(page, *call, shown, link)))
        elif cell.cell_type == "markdown": cells.append(nbformat.v4.new_markdown_cell(markdown_cell(cell.source, page, page_of, link)))
        elif cell.cell_type == "code" and quarto.code_cell(cell, options, page.key):
            tidy_outputs(cell, options)
            if only_for_checks(cell.source) and not cell.outputs: continue
            if options.get("output") == "asis": cells += [nbformat.v4.new_markdown_cell(markdown_cell(t, page, page_of, link)) for o in cell.outputs if (t := o.get("data", {}).get("text/markdown") or o.get("text"))]
            elif cell.source or cell.outputs: cells.append(cell)
    meta = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    if page.description: meta["myst"] = {"html_meta": {"description": page.description}}
    return nbformat.v4.new_notebook(cells=cells, metadata=meta)


def reference(page, name, level, shown, link):
    file = root / "mixbook" / f"{page.module}.py"
    symbol = apidoc.module(file).symbols.get(name) if page.module else None
    if symbol is None: raise SystemExit(f"{page.source}: show_doc({name}) names nothing in {file.relative_to(root)}. Run nbdev-export.")
    return apidoc.entry(symbol, level, shown, link)


def cards(entries):
    "A grid of cards: (title, page, text)."
    inner = "\n\n".join(f":::{{grid-item-card}} {title}\n:link: /{page}\n:link-type: doc\n\n{text}\n:::" for title, page, text in entries)
    return f"::::{{grid}} 1 1 2 2\n:gutter: 3\n:margin: 4 4 0 0\n:padding: 0\n\n{inner}\n\n::::"


def index_page(title, pages, text=""):
    "A section's own page: one card a notebook, and the toctree that makes the sidebar."
    tree = "\n".join(f"/{p.name}" for p in pages)
    return f"# {title}\n\n{text}\n\n{cards((p.title, p.name, p.description) for p in pages)}\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"


def names_table(pages, base):
    "All public names, module by module: the reference at one glance."
    rows = ["| Module | Names |", "| --- | --- |"]
    for p in pages:
        if not p.module: continue
        known = apidoc.module(root / "mixbook" / f"{p.module}.py").symbols.values()
        names = [s.name for s in known if "." not in s.name and not s.name.startswith("_")]
        rows.append(f"| [`{p.module}`]({base}/{p.name}.html) | {' '.join(f'[`{n}`]({base}/{p.name}.html#{n.lower()})' for n in names)} |")
    return "```{div} names-table\n" + "\n".join(rows) + "\n```"


TEXTS = {
    "Chapters": "Questions asked of the data and answered with intervals. Each chapter reads the runs it rests on and runs in under a minute.",
    "API": "One notebook a module: the explanation, the code and the examples that check it. The number in a notebook's name is the order of import.",
    "Guides": "How to get a job done, step by step.",
    "Explanations": "Why things are as they are.",
}


def write_stage(folder):
    "Everything that Sphinx reads, below `folder`; returns the pages."
    site = website()
    base = site["site-url"].rstrip("/")
    pages = {p: Page(p, page_name(p)) for p in notebooks()}
    for p, page in pages.items():
        page.nb, matter, page.module = processed(nbs / p)
        page.title = str(matter.get("title") or site["title"])
        page.description = str(matter.get("description") or "")
    link = linker(list(pages.values()), base)

    def page_of(target, source):
        if not target.endswith(".ipynb") or "://" in target: return None
        path = Path(os.path.normpath(source.parent / target))
        return f"{base}/{page_name(path)}.html"

    for p, page in pages.items():
        out = folder / f"{page.name}.ipynb"
        out.parent.mkdir(parents=True, exist_ok=True)
        page.staged = stage(page, page_of, link, base)
        copy = folder / "_extra" / "_notebooks" / p
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(nbs / p, copy)
    tops = []
    for title, paths in sections(site):
        if not paths: continue
        mine = [pages[p] for p in paths]
        lower = title.lower()
        name = f"{lower}/index" if (nbs / lower).is_dir() else lower
        text = TEXTS.get(title, "") + ("\n\n" + names_table(mine, base) if title == "API" else "")
        (folder / f"{name}.md").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(index_page(title, mine, text), encoding="utf-8")
        tops.append((title, name, TEXTS.get(title, "")))
    listed = {p for _, paths in sections(site) for p in paths} | {Path("index.ipynb")}
    tree = "```{toctree}\n:hidden:\n\n" + "\n".join(f"/{name}" for _, name, _ in tops) + "\n```"
    for p, page in pages.items():
        if p not in listed:
            print(f"note: {p} is not in the sidebar of _quarto.yml")
            page.staged.metadata["orphan"] = True
        if p == Path("index.ipynb"): page.staged.cells.append(nbformat.v4.new_markdown_cell(f"{cards(tops)}\n\n{tree}"))
        nbformat.write(page.staged, folder / f"{page.name}.ipynb")
    if Path("index.ipynb") not in pages:
        (folder / "index.md").write_text(f"# {site['title']}\n\n{site['description']}.\n\n{cards(tops)}\n\n{tree}\n", encoding="utf-8")
    for f in nbs.rglob("*"):
        rel = f.relative_to(nbs)
        if f.is_file() and f.suffix in (".png", ".svg", ".jpg") and not any(o[0] in "._" for o in rel.parts):
            (folder / rel).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(f, folder / rel)
    return pages


# ---------------------------------------------------------------- after Sphinx

def relative_links(folder, base):
    "Links that nbdev writes with the site's address become relative, so that the site works from any place."
    for f in folder.rglob("*.html"):
        up = "../" * (len(f.relative_to(folder).parts) - 1)
        text = f.read_text(encoding="utf-8")
        new = re.sub(rf'href="{re.escape(base)}(?:/([^"]*))?"', lambda m: f'href="{up}{m[1] or "index.html"}"', text)
        new = new.replace('class="reference external" href="' + up, 'class="reference internal" href="' + up) if up else new
        if new != text: f.write_text(new, encoding="utf-8")


def plain_pages(folder, pages, site):
    "llms.txt, and each page as Markdown beside it (`core.html.md`)."
    from nbconvert import MarkdownExporter
    exporter = MarkdownExporter()
    lines = [f"# {site['title']}", "", f"> {site['description']}", ""]
    groups = [("Start", [Path("index.ipynb")] if Path("index.ipynb") in pages else []), *sections(site)]
    for title, paths in groups:
        if paths: lines += [f"## {title}", ""] + [f"- [{pages[p].title}]({pages[p].name}.html.md): {pages[p].description}" for p in paths] + [""]
    for page in pages.values():
        nb = nbformat.from_dict(page.staged)
        for c in nb.cells:
            if c.cell_type == "markdown":
                c.source = re.sub(r"[`~]{3,}\{raw\} html\n.*?\n[`~]{3,}", "", c.source, flags=re.S)
                c.source = re.sub(r'<a class="anchor" id="[^"]*"></a>\n*', "", c.source)
                c.source = re.sub(r"```\{div\} [\w -]+\n(.*?)\n```", r"\1", c.source, flags=re.S)
                c.source = re.sub(r"```\{code-block\} python\n:class: [\w-]+\n", "```python\n", c.source)
                c.source = re.sub(r"```\{toctree\}.*?```|::::\{grid\}.*?\n::::\n", "", c.source, flags=re.S)
        for c in nb.cells:
            for o in c.get("outputs", []):
                for k in [k for k in o.get("data", {}) if k.startswith("image/") or (k == "text/html" and "text/plain" in o["data"])]: del o["data"][k]
        text, _ = exporter.from_notebook_node(nb)
        (folder / f"{page.name}.html.md").write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")
    (folder / "llms.txt").write_text("\n".join(lines), encoding="utf-8")


@contextlib.contextmanager
def only_one():
    "Two builds at a time would overwrite each other."
    work.mkdir(exist_ok=True)
    with open(work / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def build_sphinx(strict=True):
    site = website()
    stage_at, out = work / "site", work / "_html"
    for folder in (stage_at, out): shutil.rmtree(folder, ignore_errors=True)
    stage_at.mkdir(parents=True)
    pages = write_stage(stage_at)
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-b", "html", "-c", str(here), "-d", str(work / "_doctrees"), *(["-W", "--keep-going"] if strict else []), str(stage_at), str(out)]
    done = subprocess.run(command, cwd=work, env={**os.environ, "MIXBOOK_STAGE": str(stage_at)})
    if done.returncode: raise SystemExit("The site was not built: see the warnings above.")
    relative_links(out, site["site-url"].rstrip("/"))
    plain_pages(out, pages, site)
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(out, docs)
    return pages


def build_quarto():
    tool = Path(sys.executable).parent / "nbdev-docs"
    subprocess.run([str(tool)], cwd=root, check=True)


def main():
    arg = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg.add_argument("--sphinx", action="store_true", help="do not use Quarto")
    arg.add_argument("--lenient", action="store_true", help="warnings do not fail the build")
    a = arg.parse_args()
    with only_one():
        if shutil.which("quarto") and not a.sphinx: build_quarto()
        else: print(f"{len(build_sphinx(not a.lenient))} notebooks rendered.")
    print("Open _docs/index.html in a browser, or: python -m http.server -d _docs 8000")


if __name__ == "__main__": main()
