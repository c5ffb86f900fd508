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


# ---------------------------------------------------------------- from a study to codes

@pytest.fixture(scope="module")
def model(study, tmp_path_factory):
    file = tmp_path_factory.mktemp("model")/"model.safetensors"
    assert main(["train", str(study), str(file), "--tokens", "60000"]) == 0
    return file


def test_train_saves_the_model_of_the_recipe(study, model, capsys):
    from mixbook.proxy import load_proxy
    from mixbook.study import open_study, rivals
    p = load_proxy(model)
    assert p.row["tokens"] == 60000//512*512 and p.config.depth == 2 and {k[2:]: v for k, v in p.row.items() if k.startswith("w/")} == pytest.approx(dict(rivals(open_study(study))["recipe"]))
    assert main(["train", str(study), str(model), "--tokens", "60000"]) == 0 and load_proxy(model).row["created"] == p.row["created"]  # read, not trained again
    assert [f.name for f in model.parent.iterdir()] == ["model.safetensors"] and "held-out loss" in capsys.readouterr().out
    for argv, part in ((["--mixture", "recip"], "did you mean 'recipe'"), (["--tokens", "61000"], "holds another model"), (["--depth", "0"], "depth")):
        assert main(["train", str(study), str(model), *argv]) == 2
        err = capsys.readouterr().err
        assert part in err and err.count("\n") == 1
    assert main(["train", str(study), str(model.with_name("m.bin"))]) == 2 and ".safetensors" in capsys.readouterr().err
    assert main(["train", str(study), str(model.with_name("m.safetensors")), "--dry", "--mixture", "natural"]) == 0
    assert "minutes" in capsys.readouterr().out and not model.with_name("m.safetensors").exists()


def test_qat_from_the_shell(study, model, tmp_path, capsys):
    from mixbook.qat import QATResult
    out = tmp_path/"two"; argv = ["qat", str(model), str(study), str(out), "--fraction", ".4", "--control"]
    assert main([*argv, "--dry"]) == 0
    said = capsys.readouterr().out
    assert not out.exists() and "40." in said and "minutes" in said and "embedding" in said and "formula" in said
    assert main(argv) == 0
    said = capsys.readouterr().out
    r = QATResult.load(out)
    assert {p.name for p in out.iterdir()} == {"codes.safetensors", "model.safetensors", "runs", "stage.json"} and len(r.rows) == 4 and r.stage.by == "fraction"
    mean = r.table["mean"]
    assert mean.iloc[2] < mean.iloc[1] and all(n in said for n in r.table.index) and f"{mean.iloc[2]:.4f}" in said
    written = (out/"stage.json").stat().st_mtime_ns
    assert main(argv) == 0 and capsys.readouterr().out.splitlines()[-1] == said.splitlines()[-1] and (out/"stage.json").stat().st_mtime_ns == written  # nothing is trained twice
    assert main([*argv, "--bits", "4"]) == 2 and "holds another run" in capsys.readouterr().err
    assert main(["qat", str(model), str(study/"corpus"), str(tmp_path/"t"), "--tokens", "4096", "--bits", "1.58"]) == 0  # the corpus itself


def test_qat_goes_on_where_it_was_stopped(study, model, tmp_path, monkeypatch, capsys):
    import functools, mixbook.qat as mq
    from mixbook.quant import QuantizedModel
    whole, killed, real, often = tmp_path/"whole", tmp_path/"killed", mq._advance_qat, functools.partial(mq.continue_qat, save_seconds=0)
    argv = lambda out: ["qat", str(model), str(study), str(out), "--tokens", "4096"]
    assert main(argv(whole)) == 0
    steps = []
    def advance(t):
        if (killed/"training.safetensors").exists() and t.step == 121: raise KeyboardInterrupt
        steps.append(t.step)
        return real(t)
    monkeypatch.setattr(mq, "continue_qat", often); monkeypatch.setattr(mq, "_advance_qat", advance)
    assert main(argv(killed)) == 130 and (killed/"training.safetensors").exists() and not (killed/"codes.safetensors").exists()
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(mq, "_advance_qat", lambda t: steps.append(t.step) or real(t)); steps.clear()
    assert main(argv(killed)) == 0 and 120 not in steps[7:]  # a probe of six steps, then the rest
    assert QuantizedModel.load(killed/"codes.safetensors").hash == QuantizedModel.load(whole/"codes.safetensors").hash


def test_qat_says_what_is_wrong_in_one_line(study, model, tmp_path, capsys):
    from mixbook.proxy import load_proxy, save_proxy
    damaged, foreign, out = tmp_path/"d.safetensors", tmp_path/"f.safetensors", str(tmp_path/"out")
    damaged.write_bytes(model.read_bytes()[:-100])
    from safetensors.torch import save_file
    import torch
    save_file({"model.embed_tokens.weight": torch.ones(4, 4)}, foreign)
    other = toy_corpus(tmp_path/"other", seed=5)
    file = tmp_path/"a.file"; file.write_text("x")
    for argv, part in (([str(tmp_path/"none"), str(study), out], "no such file"), ([str(damaged), str(study), out], "damaged"), ([str(foreign), str(study), out], "weights of another program"),
                       ([str(model), str(tmp_path), out], "manifest.json"), ([str(model), str(other.path), out], "that the checkpoint was trained on"), ([str(model), str(study), str(file)], "found the file"),
                       ([str(model), str(study), out, "--bits", "16"], "expected bits"), ([str(model), str(study), out, "--method", "sqe"], "did you mean 'seq'"), ([str(model), str(study), out, "--kind", "fusd"], "did you mean 'fused'"),
                       ([str(model), str(study), out, "--fraction", "1.5"], "between 0 and 1"), ([str(model), str(study), out, "--tokens", "9", "--fraction", ".1"], "found both"), ([str(model), str(study), out, "--per", "col"], "row, tensor")):
        assert main(["qat", *argv]) == 2, argv
        err = capsys.readouterr().err
        assert part in err and err.count("\n") == 1 and "Traceback" not in err, (argv, err)
    assert not (tmp_path/"out").exists()
    assert main(["qta"]) == 2 and "did you mean 'qat'" in capsys.readouterr().err
    assert main(["plan", "published", "--bits", "2,4", "--flops", "1e20", "--memory", "5e8", "--embedding", "2e8"]) == 0
    said = capsys.readouterr().out
    assert "1.8e+09" in said and "embeddings at max(4, bits)" in said


def test_export_refuses_what_is_not_quantised(model, tmp_path, capsys):
    "One line, and nothing under the final name."
    assert main(["export", str(model), str(tmp_path/"m.mlpackage")]) == 2
    err = capsys.readouterr().err
    assert "quantised" in err and "Traceback" not in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_ship_says_what_it_would_train(study, capsys):
    assert main(["ship", str(study), "--dry"]) == 0
    said = capsys.readouterr().out
    assert "qat_tokens" in said and not (study/"device").exists()


def test_ship_ends_with_a_proof_and_the_report_shows_it(study, tmp_path, capsys):
    pytest.importorskip("coremltools")
    import shutil
    shutil.copytree(study, tmp_path/"s")
    assert main(["ship", str(tmp_path/"s")]) == 0
    assert "codes equal" in capsys.readouterr().out and json.loads((tmp_path/"s/device/device.json").read_text())["ok"]
    assert main(["report", str(tmp_path/"s")]) == 0 and "It was interpreted, not run on a device" in (tmp_path/"s/report.html").read_text()
