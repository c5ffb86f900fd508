"""Run every notebook on a copy and compare what it prints with what is stored, so that no page shows an old answer.

python tests/notebooks.py [--workers 2] [NAME …]

Numbers may differ by a few per cent, as they do between processors; words may not. A cell whose text depends on the machine
carries the line `#| varies`. Figures are not compared.
"""
import argparse, difflib, json, os, re, shutil, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
copy = root / "_proc" / "check"
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?(?![\w])")


def text(o): return "".join(o) if isinstance(o, list) else (o or "")


def shown(cell):
    "What a cell shows in words: printed text and the best text form of its values, without layout."
    out = []
    for o in cell.get("outputs", []):
        data = o.get("data", {})
        if o.get("name") == "stderr" or any(k.startswith("image/") for k in data): continue
        best = next((data[k] for k in ("text/markdown", "text/html", "text/plain") if k in data), o.get("text", ""))
        out.append(re.sub(r"<style.*?</style>| at 0x[0-9a-fA-F]+|<[^>]+>", " ", text(best), flags=re.S))
    return " ".join(" ".join(out).split())


def number(s): return float(s.replace(",", "").replace("−", "-"))


def same(a, b, rtol=0.05, atol=0.02):
    "Whether two texts agree word by word, and their numbers nearly."
    if a == b: return True
    if [w for w in NUMBER.sub("#", a).split()] != [w for w in NUMBER.sub("#", b).split()]: return False
    try: pairs = [(number(x), number(y)) for x, y in zip(NUMBER.findall(a), NUMBER.findall(b))]
    except ValueError: return False
    return all(abs(x - y) <= max(atol, rtol * max(abs(x), abs(y))) for x, y in pairs)


def compare(stored, fresh):
    "Lines that say where `fresh` shows something else than `stored`."
    said = []
    for i, (a, b) in enumerate(zip(stored["cells"], fresh["cells"])):
        if a["cell_type"] != "code" or re.search(r"^#\| *varies\b", text(a["source"]), re.M): continue
        x, y = shown(a), shown(b)
        if not same(x, y):
            at = next(iter(difflib.SequenceMatcher(None, x, y, autojunk=False).get_opcodes()[1:] or difflib.SequenceMatcher(None, x, y).get_opcodes()), None)
            lo = max(0, (at[1] if at else 0) - 30)
            said.append(f"  cell {i}: stored …{x[lo:lo + 110]!r}\n          now    …{y[lo:lo + 110]!r}")
    return said


def main():
    arg = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg.add_argument("names", nargs="*", help="notebooks relative to nbs (default: all)")
    arg.add_argument("--workers", type=int, default=2)
    a = arg.parse_args()
    start = time.time()
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(root / "nbs", copy / "nbs", ignore=skip, symlinks=True)
    for name in ("pyproject.toml", "settings.ini", "_quarto.yml"): shutil.copy(root / name, copy / name)
    shutil.copytree(root / "mixbook", copy / "mixbook", ignore=skip)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    tool = [str(Path(sys.executable).parent / "nbdev-test"), "--save", "--timing", "--n-workers", str(a.workers)]
    wanted = [Path(n).with_suffix(".ipynb") for n in a.names] or sorted(p.relative_to(root / "nbs") for p in (root / "nbs").rglob("*.ipynb") if not any(o[0] in "._" for o in p.relative_to(root / "nbs").parts))
    failed = False
    for path in [copy / "nbs" / n for n in wanted] if a.names else [copy / "nbs"]:
        failed |= bool(subprocess.run([*tool, str(path)], cwd=copy, env=env).returncode)
    stale = {}
    for name in wanted:
        read = lambda base: json.loads((base / "nbs" / name).read_text(encoding="utf-8"))
        if said := compare(read(root), read(copy)): stale[name] = said
    for name, said in stale.items(): print(f"{name}: what is stored is not what the notebook shows now\n" + "\n".join(said))
    print(f"{len(wanted)} notebooks in {time.time() - start:.0f} s: {'a notebook failed' if failed else 'all ran'}, {len(stale)} with stale outputs.")
    if not failed and not stale: shutil.rmtree(copy, ignore_errors=True)
    sys.exit(bool(failed or stale))


if __name__ == "__main__": main()
