"The commands end to end on text with hostile names, and what they say when something is wrong."
import json, os, re, signal, subprocess, sys, time
from html.parser import HTMLParser

import pandas as pd
import pytest

from mixbook.cli import main, verbs
from mixbook.corpus import toy_corpus
from mixbook.core import read_runs

EVIL = {"code": "<img src=x onerror=alert(1)>", "prose": "p $(touch pwned); 'q' \"r\"", "tables": "tables"}
SMALL = ["--n-mixtures", "16", "--depth", "1", "--tokens", "8192", "--n-workers", "0", "--budget", "200000"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    "JSON lines whose domains are not polite."
    file = tmp_path_factory.mktemp("texts")/"all.jsonl"
    toy = toy_corpus()
    file.write_text("".join(json.dumps({"text": t, "kind": EVIL[d]}) + "\n" for d in toy.domains for t in toy.texts(d)))
    return file


@pytest.fixture(scope="module")
def study(texts, tmp_path_factory):
    "A whole study, verb by verb."
    folder = tmp_path_factory.mktemp("study")/"s"
    assert main(["corpus", str(texts), str(folder), "--domain", "kind", *SMALL]) == 0
    settings = json.loads((folder/"study.json").read_text())
    (folder/"study.json").write_text(json.dumps(settings | {"confirm_depth": 2, "confirm_tokens": 8192}))
    for verb in ("sweep", "fit", "propose", "confirm", "report"): assert main([verb, str(folder)]) == 0, verb
    return folder


class Tags(HTMLParser):
    def __init__(self): super().__init__(); self.seen = []
    def handle_starttag(self, tag, attrs): self.seen.append((tag, dict(attrs)))


def test_report_is_one_file_and_names_stay_text(study):
    page = (study/"report.html").read_text()
    tags = Tags(); tags.feed(page)
    assert not [a for t, a in tags.seen if "onerror" in a] and "&lt;img src=x" in page
    assert not [t for t, a in tags.seen if t == "script" or a.get("src", "data:")[:5] != "data:"]
    assert "no evidence" in page or "better" in page or "worse" in page
    assert not list(study.parent.glob("**/pwned")) and not os.path.exists("pwned")


def test_every_part_is_in_the_folder(study):
    runs = read_runs(study/"runs")
    assert runs.groupby("study")["run"].nunique()["sweep"] == 16
    assert set(runs[runs.study == "confirm"].seed) == {0, 1, 2}
    recipe = json.loads((study/"recipe.json").read_text())
    assert abs(sum(v for _, v in recipe["weights"]["__series__"]) - 1) < 1e-9
    assert {p.name for p in (study/"recipes").glob("*")} >= {"llm_foundry.yaml", "olmo_core.yaml"}


def test_a_second_sweep_trains_nothing(study, capsys):
    before = sorted(p.name for p in (study/"runs").iterdir())
    assert main(["sweep", str(study)]) == 0
    assert sorted(p.name for p in (study/"runs").iterdir()) == before


def test_a_moved_study_still_reports(study, tmp_path):
    import shutil
    shutil.copytree(study, tmp_path/"moved")
    (tmp_path/"moved"/"report.html").unlink()
    assert main(["report", str(tmp_path/"moved")]) == 0 and (tmp_path/"moved"/"report.html").exists()


@pytest.mark.parametrize("argv, part", [
    (["corpus", "no/such/folder", "OUT"], "no/such/folder"),
    (["sweep", "nowhere"], "no study.json"),
    (["write", "nowhere.json", "OUT"], "nowhere.json"),
    (["swep"], "did you mean 'sweep'?"),
])
def test_wrong_input_is_one_line_and_not_zero(argv, part, tmp_path, capsys):
    assert main([a.replace("OUT", str(tmp_path/"out")) for a in argv]) == 2
    err = capsys.readouterr().err
    assert part in err and "Traceback" not in err


def test_misspelt_column_and_target(texts, tmp_path, capsys):
    assert main(["corpus", str(texts), str(tmp_path/"a"), "--domain", "kinds"]) == 2
    assert "did you mean 'kind'?" in capsys.readouterr().err
    assert main(["corpus", str(texts), str(tmp_path/"b"), "--domain", "kind", "--targets", "table"]) == 2
    assert "did you mean 'tables'?" in capsys.readouterr().err


def test_report_before_recipe_says_what_to_run(texts, tmp_path, capsys):
    assert main(["corpus", str(texts), str(tmp_path/"s"), "--domain", "kind", *SMALL]) == 0
    assert main(["report", str(tmp_path/"s")]) == 2
    assert "mixbook propose" in capsys.readouterr().err


def test_full_disk_is_one_line(study, tmp_path, monkeypatch, capsys):
    import mixbook.core as core
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(core.os, "fsync", full)
    assert main(["write", str(study/"recipe.json"), str(tmp_path/"x.csv"), "--target", "csv"]) == 2
    assert "No space left" in capsys.readouterr().err and not (tmp_path/"x.csv").exists()


def test_ctrl_c_keeps_what_was_finished(texts, tmp_path):
    folder = tmp_path/"s"
    assert main(["corpus", str(texts), str(folder), "--domain", "kind", "--n-mixtures", "64", "--depth", "1", "--tokens", "40000", "--n-workers", "0", "--budget", "200000"]) == 0
    p = subprocess.Popen([sys.executable, "-c", "import sys; from mixbook.cli import main; sys.exit(main(sys.argv[1:]))", "sweep", str(folder)], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and len(list((folder/"runs").glob("*.parquet"))) < 2: time.sleep(.1)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "Traceback" not in err, err[-2000:]
    assert len(read_runs(folder/"runs")) >= 2


def test_help_of_every_verb(capsys):
    for v in verbs:
        with pytest.raises(SystemExit) as e: main([v, "--help"])
        assert e.value.code == 0
    assert main(["--help"]) == 0
