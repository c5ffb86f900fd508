"Every recipe format: golden text, the trainer's own parser, exact digits, hostile names, round trips."
import ast, json, os, subprocess, warnings
from decimal import Decimal
from pathlib import Path
import numpy as np, pandas as pd, pytest, yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from mixbook.core import DataError, MixbookWarning, UnsupportedError
from mixbook.recipe import Recipe
from mixbook.writers import MEANINGS, read_recipe, recipe_targets, round_to_sum, to_numbers, to_shares, write_recipe, writers

GOLDEN = Path(__file__).parent/"golden"
FRESH = os.environ.get("MIXBOOK_GOLDEN") == "1" # regenerate: MIXBOOK_GOLDEN=1 pytest tests/test_writers.py -k golden
TARGETS = [t for t in writers if t != "deepspeed"]
AWKWARD = ["web", "code's \"best\" & $(touch pwned)", "日本語/проза", "a: b\n# c|`d`", "no"]

two = Recipe(weights={"web": .7, "code": .3}, tokens={"web": 8e8, "code": 1e8}, docs={"web": 1e6, "code": 2e4}, budget=500_000_000,
             provenance={"mixbook": "0.1.0", "corpus": "1a2b3c", "tokenizer": "bytes", "runs": 64, "seed": 0})
_w = pd.Series([1/3, 1/3, 1/3 - 2e-3, 2e-3, 0.], index=AWKWARD)
five = Recipe(weights=_w, lo=_w*.9, hi=_w*1.1, natural=pd.Series([.5, .2, .2, .05, .05], index=AWKWARD), tokens=pd.Series([7e8, 3e8, 9e7, 4e6, 1e6], index=AWKWARD),
              docs=pd.Series([9e5, 3e4, 8e4, 700, 100], index=AWKWARD), budget=600_000_000, provenance={"corpus": "x\ny"})
staged = Recipe(stages=((0., {"web": .8, "code": .2, "maths": 0.}), (.75, {"web": .4, "code": .3, "maths": .3})), budget=500_000_000)


def options(target):
    "Arguments that make both recipes expressible in `target`."
    out = {"budget": 30_000_000} if writers[target].meaning == "kept" else {}
    return out | ({"paths": {d: f"/data/{i}_text_document" for i, d in enumerate(["web", "code", *AWKWARD[1:]])}} if target == "megatron" else {})


def compare(file, name):
    want = GOLDEN/name
    if FRESH:
        want.parent.mkdir(parents=True, exist_ok=True)
        want.write_bytes(file.read_bytes())
    assert file.read_bytes() == want.read_bytes(), f"{name} differs; if the change is meant, run with MIXBOOK_GOLDEN=1 and read the diff"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name, recipe", [("two", two), ("five", five)])
def test_golden(name, recipe, target, tmp_path):
    file = tmp_path/f"{target}.{writers[target].ext}"
    report = write_recipe(recipe, file, target, **options(target))
    for f in report.attrs["files"]: compare(Path(f), f"{name}/{Path(f).name}")
    limit = 0 if writers[target].decimals is None else 1/2048 if writers[target].grid else 1e-4 if target == "markdown" else 1e-5
    assert report.attrs["max_deviation"] <= limit + 1e-12
    assert abs(report["realised"].sum() - 1) < 1e-12


@pytest.mark.parametrize("target", ["nanotron", "levanter", "csv", "json", "markdown"])
def test_golden_stages(target, tmp_path):
    file = tmp_path/f"{target}.{writers[target].ext}"
    report = write_recipe(staged, file, target, batch=32)
    compare(file, f"staged/{file.name}")
    if target != "json": assert set(report["start"]) == {0., .75}


def test_no_golden_file_without_a_writer():
    stems = {f.name.split(".")[0] for f in GOLDEN.glob("*/*.*")}
    assert stems == set(TARGETS)


def parsed(file, ext):
    text = file.read_text(encoding="utf-8")
    if ext == "yaml": return yaml.safe_load(text)
    if ext == "json": return json.loads(text)
    if ext == "py": return {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(text).body if isinstance(n, ast.Assign) and isinstance(n.value, (ast.Dict, ast.List))}
    return text


@pytest.mark.parametrize("target", [t for t in TARGETS if writers[t].ext in ("yaml", "json", "py")])
def test_names_survive_the_parser(target, tmp_path):
    file = tmp_path/"x"
    write_recipe(five, file, target, **options(target))
    found = json.dumps(parsed(file, writers[target].ext), ensure_ascii=False)
    for d in AWKWARD[:4]: assert json.dumps(d, ensure_ascii=False)[1:-1] in found, d


def test_digits_sum_exactly(tmp_path):
    w = pd.Series(np.random.default_rng(1).dirichlet(np.ones(17)), index=[f"d{i}" for i in range(17)])
    write_recipe(w, tmp_path/"b.txt", "megatron")
    assert sum(Decimal(v) for v in (tmp_path/"b.txt").read_text().split()[::2]) == 1
    write_recipe(w, tmp_path/"b.yaml", "olmo_core")
    assert sum(Decimal(str(o["target_ratio"])) for o in yaml.safe_load((tmp_path/"b.yaml").read_text())["sources"]) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda v: sum(v) > 1e-3), st.integers(0, 8))
def test_round_to_sum(values, decimals):
    v = pd.Series(values)/sum(values)
    unit = round_to_sum(v, decimals, 1)
    assert unit.sum() == 10**decimals and (unit >= 0).all()
    assert (abs(unit - v*10**decimals) < 1 + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_conversions_are_inverse_and_ignore_order(data):
    k = data.draw(st.integers(2, 8))
    pos = lambda lo, hi: pd.Series(data.draw(st.lists(st.floats(lo, hi), min_size=k, max_size=k)), index=[f"d{i}" for i in range(k)])
    w, tokens, docs = pos(.01, 1), pos(1e3, 1e12), pos(1, 1e9)
    w = w/w.sum()
    meaning = data.draw(st.sampled_from(list(MEANINGS)))
    kw = dict(tokens=tokens[::-1], docs=docs.sort_values())
    assert np.allclose(to_shares(to_numbers(w, meaning, budget=1e9, **kw), meaning, **kw), w, atol=1e-9)


names = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=12)

@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ds=st.lists(names, min_size=2, max_size=5, unique=True), seed=st.integers(0, 99))
def test_round_trip_with_any_names(ds, seed, tmp_path):
    w = pd.Series(np.random.default_rng(seed).dirichlet(np.ones(len(ds))) + .01, index=ds)
    recipe = Recipe(weights=w/w.sum())
    for target in ("json", "csv", "megatron_json", "nanotron", "llm_foundry", "olmo_core", "regmix", "levanter", "olmix"):
        write_recipe(recipe, tmp_path/"f", target)
        back = read_recipe(tmp_path/"f", target).weights
        assert list(back.index) == ds, target
        assert np.allclose(back, recipe.weights, atol=1/2048 if target == "levanter" else 1e-6), target


def test_lossless_formats(tmp_path):
    for name, r in (("five", five), ("staged", staged)):
        write_recipe(r, tmp_path/"r.json", "json")
        assert read_recipe(tmp_path/"r.json") == r
        write_recipe(r, tmp_path/"r.csv", "csv")
        back = read_recipe(tmp_path/"r.csv")
        assert (back.weights == r.weights).all() and back.stages == r.stages
        if r.lo is not None: assert (back.lo == r.lo).all() and (back.docs == r.docs).all()


@pytest.mark.parametrize("target", ["megatron", "megatron_json", "nanotron", "olmo_core", "olmix", "regmix", "llm_foundry", "levanter", "csv", "json"])
def test_target_is_guessed(target, tmp_path):
    file = tmp_path/f"f.{writers[target].ext}"
    write_recipe(two, file, target)
    assert np.allclose(read_recipe(file).weights, two.weights, atol=1/2048) and list(read_recipe(file).weights.index) == ["web", "code"]


def test_paths_name_the_domains(tmp_path):
    paths = {"web": "/x/part/0", "code": "/y/part/0"}
    write_recipe(two, tmp_path/"b.txt", "megatron", paths=paths)
    assert read_recipe(tmp_path/"b.txt", paths=paths).weights["code"] == pytest.approx(.3)
    with pytest.raises(DataError, match="two paths stand for one domain '0'"): read_recipe(tmp_path/"b.txt")
    write_recipe(two, tmp_path/"c.txt", "megatron", paths="/d/{domain}_text_document")
    assert list(read_recipe(tmp_path/"c.txt").weights.index) == ["web", "code"]


def test_shell_sees_only_words(tmp_path):
    write_recipe(five, tmp_path/"b.sh", "megatron_sh", paths="/data/{domain}")
    run = subprocess.run(["bash", "-c", "source ./b.sh && printf '%s\\0' \"${DATA_PATH[@]}\""], cwd=tmp_path, capture_output=True, check=True)
    words = run.stdout.decode().split("\0")[:-1]
    assert words[1::2] == [f"/data/{d}" for d in AWKWARD[:4]] and run.stderr == b""
    assert not (tmp_path/"pwned").exists()


def test_comments_cannot_be_left(tmp_path):
    evil = Recipe(weights={"a\nimport os": 1., "b\r\nrm -rf": 0.}, provenance={"corpus": "x\n$(rm)\u2028y\x85z"})
    for target in ("megatron_sh", "litgpt", "nanotron"):
        write_recipe(evil, tmp_path/"f", target)
        head = [o for o in (tmp_path/"f").read_text().splitlines() if "Origin" in o or "Left out" in o]
        assert len(head) == 2 and all(o.startswith("# ") for o in head)


def test_hf_snippet_realises_the_token_shares(tmp_path):
    datasets = pytest.importorskip("datasets")
    r = Recipe(weights={"web": .5, "it's": .3, "chat": .2}, tokens={"web": 6e5, "it's": 4e5, "chat": 3e4}, docs={"web": 1200, "it's": 100, "chat": 600})
    write_recipe(r, tmp_path/"mix.py", "hf")
    scope = {}
    exec(compile((tmp_path/"mix.py").read_text(), "mix.py", "exec"), scope)
    sources = {d: datasets.Dataset.from_dict({"domain": [d]*int(r.docs[d]), "n": [r.tokens[d]/r.docs[d]]*int(r.docs[d])}) for d in r.domains}
    mixed = scope["mixture"](sources, seed=3)
    rows = pd.Series(mixed["domain"]).value_counts()
    p = pd.Series(scope["PROBABILITIES"])
    n = rows.sum()
    assert n > 1500
    chi2 = ((rows - n*p)**2/(n*p)).sum()
    assert chi2 < 13.8, chi2                                                    # 99.9 % point, two degrees of freedom
    tokens = pd.DataFrame({"d": mixed["domain"], "n": mixed["n"]}).groupby("d")["n"].sum()
    got = tokens/tokens.sum()
    assert (abs(got - r.weights) < .05).all(), got
    assert abs(p["it's"] - .3) > .2                                             # the shares themselves would have been far off


def test_kept_says_the_way_out(tmp_path):
    with pytest.raises(UnsupportedError, match="at most 333,333,333 tokens") as e: write_recipe(two, tmp_path/"a", "axolotl")
    assert "2 times with 0.75 each" in str(e.value)
    ok = write_recipe(two, tmp_path/"a", "axolotl", budget=333_333_333)
    assert ok["written"].max() <= 1 and ok.attrs["max_deviation"] < 1e-5
    three = staged.replace(tokens={"web": 1e9, "code": 1e9, "maths": 1e7})
    with pytest.raises(UnsupportedError, match="at most 133,333,333 tokens"): write_recipe(three, tmp_path/"a", "trl", stage=1)


def test_noise_and_passes(tmp_path):
    r = write_recipe(two, tmp_path/"a", "litgpt", seq_len=1000)
    assert r.loc["web", "noise"] == pytest.approx(np.sqrt(.21/500_000)) and r.loc["code", "passes"] == pytest.approx(1.5)
    assert "noise" not in write_recipe(two, tmp_path/"a", "megatron")           # built, not drawn


def test_tiny_weights_are_named(tmp_path):
    w = {"web": 1 - 2e-5 - 1e-9, "small": 2e-5, "dust": 1e-9}
    with pytest.warns(MixbookWarning) as seen: report = write_recipe(w, tmp_path/"b.txt", "megatron")
    text = " ".join(str(o.message) for o in seen)
    assert "'dust' round to zero" in text and "'small'" in text and "705" in text
    assert report.loc["dust", "realised"] == 0 and "dust" not in (tmp_path/"b.txt").read_text()
    assert "'dust'" in (tmp_path/"b.txt.about.txt").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_recipe({"web": .5, "code": .5, "none": 0.}, tmp_path/"b.txt", "megatron")


@pytest.mark.parametrize("call, error, part", [
    (dict(target="megatorn"), DataError, "did you mean 'megatron'"),
    (dict(target="deepspeed"), UnsupportedError, "Mix before it"),
    (dict(target="hf", recipe={"a": 1.}), UnsupportedError, "tokens and docs unknown"),
    (dict(target="energon", recipe={"a": 1.}), UnsupportedError, "tokens and budget unknown"),
    (dict(target="llama_factory", recipe=two.replace(weights={"a,b": .5, "c": .5}, tokens={"a,b": 1, "c": 1}, docs={"a,b": 1, "c": 1})), UnsupportedError, "separates names by commas"),
    (dict(target="nanotron", recipe=staged), UnsupportedError, "needs `budget`"),
    (dict(target="nanotron", recipe=staged, batch=10**6), UnsupportedError, "same step"),
    (dict(target="hf", recipe=staged), UnsupportedError, "cannot change the mixture"),
    (dict(target="litgpt", recipe=staged, stage=2), DataError, "unknown stage 2"),
    (dict(target="litgpt", paths="/data/x"), DataError, "pattern with {domain}"),
    (dict(target="litgpt", paths={"web": "caf\udce9", "code": "c"}), DataError, "in Unicode"),
    (dict(target="llm_foundry_choose", budget=100), UnsupportedError, "nothing is left"),
])
def test_errors_leave_the_old_file(call, error, part, tmp_path):
    file = tmp_path/"f"
    file.write_text("old")
    with pytest.raises(error) as e: write_recipe(**{"recipe": two, "path": file, **call})
    assert part in str(e.value)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name, text, part", [
    ("f.yaml", "sources: [{source_name: a}]", "another structure"), ("f.yaml", "a: [", "syntax error"), ("f.yaml", "x: 1", "cannot tell which trainer"),
    ("f.txt", "0.5 a 0.5", "pairs of weight and path"), ("f.csv", "domian,weight\na,1\n", "did you mean 'domian'"), ("f.json", "{", "megatron_json"),
    ("f.yaml", "mix: {a: {weight: 0.0}}", "sum to 0"), ("f.yaml", "train: 3", "another structure"),
])
def test_broken_files(name, text, part, tmp_path):
    (tmp_path/name).write_text(text)
    with pytest.raises(DataError) as e: read_recipe(tmp_path/name)
    assert part in str(e.value)


def test_one_stage_at_a_time(tmp_path):
    first, second = (write_recipe(staged, tmp_path/f"s{i}.txt", "megatron", stage=i) for i in (0, 1))
    assert first.loc["maths", "written"] == 0 and second.loc["maths", "written"] == .3
    assert "stage 1 of 2, from 75% to 100%" in (tmp_path/"s1.txt.about.txt").read_text()
    assert write_recipe(staged, tmp_path/"s.txt", "megatron", stage="average").loc["maths", "written"] == pytest.approx(.075)


def levanter_deals(weights, block):
    "Counts per block as levanter.data.mixture computes them: cut down, remainder to the largest."
    counts = {d: int(w/sum(weights.values())*block) for d, w in weights.items()}
    counts[max(counts, key=counts.get)] += block - sum(counts.values())
    return pd.Series(counts)/block


def test_levanter_sees_what_is_reported(tmp_path):
    w = pd.Series(np.random.default_rng(2).dirichlet(np.ones(17)/4), index=[f"d{i}" for i in range(17)])
    with pytest.warns(MixbookWarning, match="multiples of 1/2048"): report = write_recipe(Recipe(weights=w), tmp_path/"f.yaml", "levanter")
    data = yaml.safe_load((tmp_path/"f.yaml").read_text())["data"]
    got = levanter_deals(data["train_weights"], data["mixture_block_size"])
    assert (got.reindex(w.index).fillna(0) == report["realised"]).all()
    report = write_recipe(staged, tmp_path/"s.yaml", "levanter", batch=48)
    starts = [s for s, _ in yaml.safe_load((tmp_path/"s.yaml").read_text())["data"]["train_weights"]]
    assert starts[0] == 0 and starts[1]*48 % 2048 == 0 and abs(starts[1]*48*2048/5e8 - .75) < .01


def test_table_of_targets():
    t = recipe_targets()
    assert t.loc["axolotl", "meaning"] == "kept" and not t.loc["axolotl", "repeat"] and t.loc["nanotron", "stage"] and t.loc["olmo_core", "cap"]
    assert (t["note"].str.len() > 10).all()
