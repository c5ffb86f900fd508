"""README.md from nbs/index.ipynb: the processed notebook through nbconvert, with links that work where the repository is shown.

python nbs/_site/readme.py           write README.md and its figures (nbs/images/readme-*.png)
python nbs/_site/readme.py --check   say what is stale, write nothing
"""
import argparse, base64, os, re, sys
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build, quarto

images = build.nbs / "images"


def _links(text, base, source_of):
    "Addresses of the site and of pages become paths inside the repository."
    def one(m):
        page, _, anchor = m[1].partition("#")
        page = page.strip("/") or "index.html"
        return f"]({source_of[page]})" if page in source_of else m[0]
    text = re.sub(rf"\]\({re.escape(base)}([^)\s]*)\)", one, text)
    return re.sub(r"\]\((?!nbs/|https?:|#|mailto:)([^)\s]+\.(?:ipynb|png|svg)(?:#[^)\s]*)?)\)", lambda m: f"](nbs/{m[1]})", text)


def _plain_callouts(text):
    def one(m):
        kind = (re.search(r"callout-(\w+)", m[1]) or [0, "note"])[1].upper()
        body = re.sub(r"^#+\s*(.*)$", r"**\1**", m[2].strip(), flags=re.M)
        return f"> [!{kind}]\n" + "\n".join(f"> {l}".rstrip() for l in body.splitlines())
    return re.sub(r"^:::+\s*\{([^}]*callout[^}]*)\}\n(.*?)\n:::+\s*$", one, text, flags=re.S | re.M)


def make():
    "The text of README.md, and its figures as {name: bytes}."
    from nbconvert import MarkdownExporter
    nb, matter, _ = build.processed(build.nbs / "index.ipynb")
    site = build.website()
    base = site["site-url"].rstrip("/") + "/"
    source_of = {f"{build.page_name(p)}.html": f"nbs/{p.as_posix()}" for p in build.notebooks()}
    cells, figures = [], {}
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(\]\([^)\s]+\))\{[^}]*\}", r"\1", _plain_callouts(cell.source))
        elif cell.cell_type == "code":
            options, cell.source = quarto.cell_options(cell.source)
            if not quarto.code_cell(cell, options, "index"): continue
            build.tidy_outputs(cell, options)
            tags = cell.metadata.get("tags", [])
            if "remove-output" in tags: cell.outputs = []
            for o in cell.outputs:
                data = o.get("data", {})
                if "image/png" in data:
                    name = f"readme-{len(figures) + 1}.png"
                    figures[name] = base64.b64decode(data["image/png"])
                    alt = str(options.get("fig-alt") or options.get("fig-cap") or "Figure").replace("\n", " ")
                    o.data = nbformat.from_dict({"text/markdown": f"![{alt}](nbs/images/{name})"})
                elif "text/html" in data: data["text/html"] = re.sub(r"</?div[^>]*>\s*", "", data["text/html"])
            if build.only_for_checks(cell.source) and not cell.outputs: continue
            if "remove-input" in tags: cells += [nbformat.v4.new_markdown_cell(build._text(t)) for o in cell.outputs if (t := o.get("data", {}).get("text/markdown") or o.get("data", {}).get("text/html") or (f"```\n{x.rstrip()}\n```" if (x := o.get("text") or o.get("data", {}).get("text/plain")) else ""))]; continue
        cells.append(cell)
    text, _ = MarkdownExporter().from_notebook_node(nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}}))
    head = f"# {matter.get('title', site['title'])}\n\n" + (f"> {matter['description']}\n\n" if matter.get("description") else "")
    made = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook. -->\n\n"
    text = re.sub(r"[ \t]+$", "", _links(head + made + text, base, source_of), flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", figures


def stale():
    "Names of the files that differ from what the notebook gives."
    text, figures = make()
    on_disk = {p.name: p.read_bytes() for p in images.glob("readme-*.png")} if images.exists() else {}
    out = [] if (build.root / "README.md").read_text(encoding="utf-8") == text else ["README.md"]
    return out + [f"nbs/images/{n}" for n in sorted({*figures, *on_disk}) if figures.get(n) != on_disk.get(n)]


def main():
    arg = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg.add_argument("--check", action="store_true", help="write nothing; exit 1 when stale")
    if not (build.nbs / "index.ipynb").exists(): raise SystemExit("nbs/index.ipynb is not there, and README.md is made from it.")
    if arg.parse_args().check:
        if old := stale(): raise SystemExit(f"Stale: {', '.join(old)}. Run `make readme`.")
        return
    text, figures = make()
    images.mkdir(exist_ok=True)
    for old in images.glob("readme-*.png"):
        if old.name not in figures: os.remove(old)
    for name, data in figures.items(): (images / name).write_bytes(data)
    if not any(images.iterdir()): images.rmdir()
    (build.root / "README.md").write_text(text, encoding="utf-8")
    print(f"README.md written, {len(figures)} figures.")


if __name__ == "__main__": main()
