"A notebook runs top to bottom in a kernel, as JupyterLab runs it (the notebook tests run in process)."
import json, os, shutil, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def test_jupyter_executes_a_notebook(tmp_path):
    shutil.copy(root / "nbs" / "00_core.ipynb", tmp_path / "core.ipynb")
    tool = Path(sys.executable).parent / "jupyter"
    done = subprocess.run([tool, "execute", "--inplace", "--timeout=120", "core.ipynb"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "JUPYTER_PLATFORM_DIRS": "1", "IPYTHONDIR": str(tmp_path / "ipython")})
    assert done.returncode == 0, done.stderr[-2000:]
    cells = [c for c in json.loads((tmp_path / "core.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert len(cells) > 20 and all(c["execution_count"] for c in cells if "".join(c["source"]).strip())
    assert not [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
    assert any("text/html" in o.get("data", {}) for c in cells for o in c["outputs"]), "tables are shown as tables"


def test_progress_bars_have_their_widgets():
    "`tqdm.auto` falls back to text with a warning where ipywidgets is missing; the environment must not be such a one."
    code = "import warnings; warnings.simplefilter('error'); import tqdm.notebook as t; assert t.IProgress is not None"
    subprocess.run([sys.executable, "-c", code], check=True)
