"Schedules spend exactly their budget; quantised runs resume to the same bits, and branches equal whole runs."
import dataclasses, json
import numpy as np, pytest, torch
import mixbook.qat as mq
from mixbook.core import DataError, MixbookWarning, UnsupportedError, read_runs
from mixbook.corpus import toy_corpus
from mixbook.decoder import ProxyConfig
from mixbook.proxy import load_proxy, save_proxy, train_proxy
from mixbook.qat import _QATTraining, QATResult, QATSchedule, continue_qat, departure, qat_run_id, qat_schedule, qat_stage, qat_step_ratio, round_to_nearest, run_branches, train_qat, train_qats, train_trunk
from mixbook.qat_budget import optimal_fraction
from mixbook.quant import QATConfig, finalize_qat, outer_level

@pytest.fixture(scope="module")
def corpus(): return toy_corpus()

@pytest.fixture(scope="module")
def even(corpus): return {d: 1/len(corpus.domains) for d in corpus.domains}

pytestmark = pytest.mark.filterwarnings("ignore::mixbook.core.ExtrapolationWarning")

def config(steps, corpus, **kw): return ProxyConfig(depth=1, tokens=steps*8*32, seq_len=32, vocab=corpus.vocab_size, eval_windows=8, **kw)
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))
def total(p): return sum(v for k, v in p.row.items() if k.startswith("loss/") and not k.endswith("_se"))

@pytest.mark.parametrize("seed", range(40))
def test_schedules_spend_the_budget(seed, corpus):
    rng = np.random.default_rng(seed); n, f = int(rng.integers(2, 5000)), float(rng.uniform(0, .999)); c = config(n, corpus)
    for kind in ("classical", "fused"):
        s = qat_schedule(c, f, kind=kind); rates = np.array([s.rate(i) for i in range(n)])
        assert s.steps == n and abs((n - s.switch) - f*n) <= 1 and (rates > 0).all() and rates.max() <= 1 + 1e-12
        assert rates[-1] == pytest.approx(s.last) or n < 4
        if kind == "fused" and s.switch < n: assert s.rate(s.switch - 1) == pytest.approx(min(1, s.switch/s.warmup)) if s.switch else True
    a, b = (qat_schedule(c, f, kind=k) for k in ("classical", "fused")); assert a.switch == b.switch

@pytest.mark.parametrize("stop", [3, 19, 20, 21, 27])
@pytest.mark.parametrize("state", ["keep", "reset"])
def test_an_interrupted_run_ends_at_the_same_bits(stop, state, corpus, even, tmp_path, monkeypatch):
    c = config(30, corpus); plan, qat = qat_schedule(c, 1/3, warmup=2, state=state), QATConfig(bits=2); assert plan.switch == 20
    whole = train_qat(corpus, even, c, plan, qat, progress=False); real = mq._advance_qat
    class Killed(Exception): pass
    def advance(t):
        if t.step == stop: raise Killed
        return real(t)
    monkeypatch.setattr(mq, "_advance_qat", advance)
    with pytest.raises(Killed): train_qat(corpus, even, c, plan, qat, checkpoint=tmp_path/"c.safetensors", save_seconds=0, progress=False)
    monkeypatch.setattr(mq, "_advance_qat", real)
    again = train_qat(corpus, even, c, plan, qat, checkpoint=tmp_path/"c.safetensors", progress=False)
    assert same(whole, again) and whole.row["run"] == again.row["run"] and total(whole) == total(again)
    with pytest.raises(DataError, match="belongs to run"): train_qat(corpus, even, c, plan, QATConfig(bits=4), checkpoint=tmp_path/"c.safetensors", progress=False)

@pytest.mark.parametrize("kind, f", [("classical", .3), ("fused", .3), ("classical", 0)])
def test_a_branch_is_the_whole_run(kind, f, corpus, even):
    c = config(40, corpus); plan = qat_schedule(c, f, kind=kind, warmup=3); trunk = train_trunk(corpus, even, c, [departure(plan), 5], warmup=3, progress=False)
    assert same(train_qat(corpus, even, c, plan, QATConfig(bits=2), start=trunk[departure(plan)], progress=False), train_qat(corpus, even, c, plan, QATConfig(bits=2), progress=False))
    with pytest.raises(DataError, match="expected the state at step"): train_qat(corpus, even, c, plan, QATConfig(bits=2), start=trunk[5], progress=False)

@pytest.mark.parametrize("qat", [QATConfig(bits=b) for b in (1, 1.58, 2, 3, 4, 8)] + [QATConfig(bits=2, method="balanced"), QATConfig(bits=2, method="lsq"), QATConfig(bits=2, per="tensor"), QATConfig(bits=2, init="mse"), QATConfig(bits=2, skip=("blocks.0.*",))], ids=str)
def test_every_quantiser_trains(qat, corpus, even):
    c = config(60, corpus); p = train_qat(corpus, even, c, qat_schedule(c, .5), qat, progress=False)
    assert p.row["status"] == "done" and np.isfinite(total(p)) and p.row["bits"] == qat.bits and p.row["qat_tokens"] == 30*8*32

def test_training_beats_rounding(corpus, even):
    "2 bits, three seeds, equal tokens."
    c = config(300, corpus); gaps = []
    for seed in range(3):
        full = train_qat(corpus, even, c, qat_schedule(c, 0), QATConfig(bits=2), seed=seed, progress=False); trained = train_qat(corpus, even, c, qat_schedule(c, .3), QATConfig(bits=2), seed=seed, progress=False)
        rounded = sum(v for k, v in round_to_nearest(corpus, even, full, QATConfig(bits=2)).items() if k.startswith("loss/") and not k.endswith("_se")); gaps.append((rounded - total(trained), total(trained) - total(full)))
    assert min(g for g, _ in gaps) > .1 and min(d for _, d in gaps) > 0

def test_branches_resume_from_the_table(corpus, even, tmp_path):
    c = config(30, corpus); b = [(c, qat_schedule(c, f, warmup=2), QATConfig(bits=2)) for f in (0, .2, .5)]
    assert run_branches(corpus, even, b[:2], path=tmp_path, progress=False) > 0 and len(read_runs(tmp_path)) == 2
    left = run_branches(corpus, even, b, path=tmp_path, dry=True); assert 0 < left < 30 + 30
    run_branches(corpus, even, b, path=tmp_path, rounded=(2, 4), progress=False); rows = read_runs(tmp_path); assert len(rows) == 3 and rows["run"].is_unique
    other = train_qat(corpus, even, *b[2][:2], b[2][2], progress=False); assert np.isclose(rows.set_index("run").loc[other.row["run"], "loss/code"], other.row["loss/code"], rtol=0, atol=0)

def test_bad_input(corpus, even):
    c = config(30, corpus)
    for f, message in ((1., "below 1"), (-.1, "at least 0"), (float("nan"), "at least 0")):
        with pytest.raises(DataError, match=message): qat_schedule(c, f)
    with pytest.raises(DataError, match="expected a schedule of 30 steps, found 10"): train_qat(corpus, even, c, QATSchedule(10, 5), QATConfig(bits=2), progress=False)
    with pytest.raises(DataError, match="one model and one warm-up"): run_branches(corpus, even, [(c, qat_schedule(c, 0, warmup=w), QATConfig(bits=2)) for w in (1, 2)], path="nowhere", dry=True)

def test_a_quantised_step_is_not_much_slower():
    "Best of five: the machine may be busy."
    assert any(qat_step_ratio(ProxyConfig(depth=2, tokens=10**6), rounds=9) < 1.4 for _ in range(5))


# ---------------------------------------------------------------- many at once

@pytest.mark.parametrize("qat", [QATConfig(bits=2), QATConfig(bits=1.58), QATConfig(bits=4, per="tensor"), QATConfig(bits=2, method="balanced")], ids=str)
def test_a_stack_is_its_models(qat, corpus, tmp_path, monkeypatch):
    "50 steps, different mixtures, seeds and learning rates; also killed and resumed."
    c = config(50, corpus); plan = qat_schedule(c, .5, warmup=2); mixes = [{"prose": 1.}, {"code": .5, "tables": .5}, {"code": .2, "prose": .8}]; seeds, lrs = [0, 3, 3], [None, .004, None]
    stack = train_qats(corpus, mixes, c, plan, qat, seeds=seeds, lrs=lrs, how="stacked", progress=False)
    for p, m, s, lr in zip(stack, mixes, seeds, lrs):
        one = train_qat(corpus, m, c if lr is None else c.replace(lr=lr), plan, qat, seed=s, progress=False)
        assert p.row["run"] == one.row["run"] and p.row.keys() == one.row.keys() and p.row["bits"] == qat.bits and p.how == "stacked"
        for d in corpus.domains: assert p.row[f"loss/{d}"] == pytest.approx(one.row[f"loss/{d}"], abs=1e-4)
        a, b = finalize_qat(p.model), finalize_qat(one.model)
        for n in a: assert a[n].scale.shape == b[n].scale.shape and (a[n].codes != b[n].codes).float().mean() < .01
    real = mq._advance_qat
    def advance(t):
        if t.step == 30: raise KeyboardInterrupt
        return real(t)
    monkeypatch.setattr(mq, "_advance_qat", advance); again = dict(seeds=seeds, lrs=lrs, how="stacked", checkpoint=tmp_path, save_seconds=0, progress=False)
    with pytest.raises(KeyboardInterrupt): train_qats(corpus, mixes, c, plan, qat, **again)
    monkeypatch.setattr(mq, "_advance_qat", real)
    assert all(same(p, q) for p, q in zip(stack, train_qats(corpus, mixes, c, plan, qat, **again)))

def test_a_stack_is_watched_model_by_model(corpus, even):
    c = config(100, corpus); plan = qat_schedule(c, .8)
    stack = train_qats(corpus, [even]*2, c, plan, QATConfig(bits=2), seeds=[0, 1], how="stacked", watch=True, progress=False)
    for p, s in zip(stack, (0, 1)):
        one = train_qat(corpus, even, c, plan, QATConfig(bits=2), seed=s, watch=True, progress=False)
        assert p.row["movement"] == pytest.approx(one.row["movement"], rel=1e-3) and p.row["spikes"] == one.row["spikes"]
    with pytest.raises(DataError, match="not in the checkpoint"): train_qats(corpus, [even], c, plan, QATConfig(bits=2), watch=True, checkpoint="nowhere")

def test_one_model_of_a_stack_diverges_alone(corpus, even):
    c = config(30, corpus); plan = qat_schedule(c, .5)
    with pytest.warns(MixbookWarning, match="NaN"): good, bad = train_qats(corpus, [even]*2, c, plan, QATConfig(bits=2), lrs=[None, 1e30], how="stacked", progress=False)
    assert good.row["status"] == "done" and bad.row["status"] == "failed" and total(good) == pytest.approx(total(train_qat(corpus, even, c, plan, QATConfig(bits=2), progress=False)), abs=1e-3)
    with pytest.raises(DataError): finalize_qat(bad.model)

def test_bfloat16_products_in_a_stack(corpus, even):
    c = config(12, corpus); plan = qat_schedule(c, .5); p, q = train_qats(corpus, [even]*2, c, plan, QATConfig(bits=2), seeds=[0, 1], how="stacked", dtype="bfloat16", progress=False)
    one = train_qat(corpus, even, c, plan, QATConfig(bits=2), seed=1, dtype="bfloat16", progress=False)
    assert np.isfinite(total(p)) and total(q) == pytest.approx(total(one), abs=.05) and "bfloat16" in q.row["device"]


# ---------------------------------------------------------------- from a checkpoint

@pytest.fixture(scope="module")
def trained(corpus, even): return train_proxy(corpus, even, config(60, corpus), progress=False)

STAGE = dict(tokens=20*8*32, progress=False)

@pytest.fixture(scope="module")
def wholes(trained, corpus): return {state: continue_qat(corpus, trained, state=state, **STAGE) for state in ("keep", "reset")}

@pytest.mark.parametrize("stop", [60, 61, 71, 79])
@pytest.mark.parametrize("state", ["keep", "reset"])
def test_an_interrupted_stage_ends_at_the_same_bits(stop, state, trained, wholes, corpus, tmp_path, monkeypatch):
    whole, real, file = wholes[state], mq._advance_qat, tmp_path/"c.safetensors"; assert whole.stage.steps == 20
    def advance(t):
        if t.step == stop: raise KeyboardInterrupt
        return real(t)
    monkeypatch.setattr(mq, "_advance_qat", advance)
    with pytest.raises(KeyboardInterrupt): continue_qat(corpus, trained, state=state, checkpoint=file, save_seconds=0, **STAGE)
    monkeypatch.setattr(mq, "_advance_qat", real); assert file.exists() == (stop > 60)
    fresh = load_proxy(save_proxy(trained, tmp_path/"trained.safetensors"))  # from the file, as another process would
    again = continue_qat(corpus, fresh, state=state, checkpoint=file, **STAGE)
    assert same(whole.proxy, again.proxy) and whole.quantized.hash == again.quantized.hash and whole.stage == again.stage and total(whole.proxy) == total(again.proxy)

def test_the_file_of_a_stage_is_of_that_stage(trained, corpus, tmp_path):
    go = lambda **kw: continue_qat(corpus, trained, checkpoint=tmp_path/"c.safetensors", **{**STAGE, **kw}); go()
    other = dataclasses.replace(trained, moments={k: x*1.01 for k, x in trained.moments.items()})
    for kw in (dict(tokens=21*8*32), dict(state="reset"), dict(qat=QATConfig(bits=4)), dict(qat_lr=.5), dict(weights={"prose": 1.}), dict(proxy=other)):
        with pytest.raises(DataError, match="belongs to run"): continue_qat(corpus, kw.pop("proxy", trained), checkpoint=tmp_path/"c.safetensors", **{**STAGE, **kw})

def test_a_stage_is_the_end_of_a_whole_run(corpus, even):
    "Constant rate, saved, continued fused: bit by bit the run that never stopped; so data order, moments and rates go on."
    long = config(50, corpus); plan = qat_schedule(long, .4, kind="fused", warmup=2); assert plan.switch == 30
    first = train_proxy(corpus, even, config(30, corpus, decay=0., warmup=2/30), progress=False); whole = train_qat(corpus, even, long, plan, QATConfig(bits=2), progress=False)
    stage = continue_qat(corpus, first, QATConfig(bits=2), fraction=.4, kind="fused", progress=False)
    assert stage.stage.steps == 20 and same(stage.proxy, whole) and total(stage.proxy) == total(whole) and stage.proxy.row["tokens"] == whole.row["tokens"]

def test_rows_of_a_stage(trained, corpus, even):
    r = continue_qat(corpus, trained, fraction=.5, control=True, evals=3, progress=False); f = r.table
    assert list(f.index) == ["full precision", "2 bits, rounded to nearest", "2 bits, trained (QAT)", "full precision, the same tokens"] and f["tokens"].tolist() == [60*256, 60*256, 120*256, 120*256]
    for d in corpus.domains: assert f.loc["full precision", d] == pytest.approx(trained.row[f"loss/{d}"], abs=1e-6)
    assert f.loc["2 bits, rounded to nearest", "mean"] == pytest.approx(total(type(trained)(round_to_nearest(corpus, even, trained, QATConfig(bits=2)), None, None, None))/3)
    assert f["mean"].iloc[2] < f["mean"].iloc[1] and list(r.proxy.curve["step"]) == [80, 100, 120] and set(r.rows["parent"]) == {trained.row["run"]} and r.rows["run"].is_unique
    assert f["mean"].to_numpy() == pytest.approx(f[list(corpus.domains)].mean(axis=1)) and r.rows["schedule"].tolist() == ["full precision", "round to nearest", "classical", "classical"]

def test_an_uneven_mixture_goes_on_and_weighs_the_mean(corpus):
    mix = {"prose": .7, "code": .3, "tables": 0.}; c = config(40, corpus, target_tokens=400*8*32)
    p = train_proxy(corpus, mix, c, progress=False); r = continue_qat(corpus, p, tokens=2560, progress=False)
    assert p.unique_tokens and r.proxy.unique_tokens == p.unique_tokens and r.table["mean"].iloc[2] == pytest.approx(.7*r.table["prose"].iloc[2] + .3*r.table["code"].iloc[2]) and r.proxy.row["w/tables"] == 0

def test_a_stage_on_another_mixture_or_corpus(trained, corpus, tmp_path):
    r = continue_qat(corpus, trained, weights={"code": .9, "prose": .1}, tokens=2560, progress=False)
    assert r.rows["w/code"].tolist() == pytest.approx([1/3, 1/3, .9]) and r.rows["passes/tables"][0] == trained.row["passes/tables"]
    assert r.table["mean"].to_numpy() == pytest.approx(.9*r.table["code"] + .1*r.table["prose"])
    other = toy_corpus(tmp_path/"other", seed=3); assert other.hash != corpus.hash
    with pytest.raises(DataError, match="Pass that corpus, or `weights`"): continue_qat(other, trained, tokens=2560, progress=False)
    assert continue_qat(other, trained, weights={"code": 1.}, tokens=2560, progress=False).proxy.row["corpus_hash"] == other.hash

@pytest.mark.parametrize("seed", range(12))
def test_length_of_a_stage(seed, trained):
    rng = np.random.default_rng(seed); bits = float(rng.choice([1, 1.58, 2, 3, 4, 8])); qat = QATConfig(bits=bits); f = float(rng.uniform(.01, .99))
    s = qat_stage(trained, qat, fraction=f); assert abs(s.tokens - s.fp_tokens*f/(1 - f)) <= 128 and s.tokens == 256*s.steps and s.by == "fraction"
    s = qat_stage(trained, qat); assert s.by == "formula" and (s.tokens == 256 or abs(s.tokens - s.fp_tokens*s.formula/(1 - s.formula)) <= 128) and s.band[0] <= s.fp_tokens*s.formula/(1 - s.formula) <= s.band[1]
    assert s.formula == pytest.approx(optimal_fraction(s.fp_tokens/(1 - s.formula)/(s.n_params*(np.log2(3) if bits == 1.58 else bits)/8))) and "±" in str(s)

def test_dry_trains_nothing_and_says_the_time(trained, corpus):
    before = [p.clone() for p in trained.model.parameters()]; s = continue_qat(corpus, trained, tokens=256*4, dry=True)
    assert s.seconds > 0 and "minutes" in str(s) and "too few" in str(s) and s.run == continue_qat(corpus, trained, tokens=256*4, progress=False).stage.run and all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters()))

def test_bad_checkpoints_and_arguments(trained, corpus, even, tmp_path):
    go = lambda p=trained, **kw: continue_qat(corpus, p, progress=False, **kw)
    with pytest.raises(DataError, match="found both"): go(tokens=1000, fraction=.1)
    for kw in (dict(fraction=0.), dict(fraction=1.), dict(fraction=float("nan")), dict(tokens=0), dict(tokens=-5), dict(tokens=float("inf"))):
        with pytest.raises(DataError): go(**kw)
    with pytest.raises(DataError, match="did you mean 'fused'"): go(tokens=1000, kind="fusd")
    with pytest.raises(UnsupportedError, match="expected bits"): go(qat=QATConfig(bits=5.5))
    with pytest.raises(DataError, match="nothing|none beside"): go(qat=QATConfig(skip="*"), tokens=1000)
    broken = load_proxy(save_proxy(trained, tmp_path/"p.safetensors")); broken.model.blocks[0].mlp.up.weight.data[0, 0] = torch.nan
    with pytest.raises(DataError, match="NaN or infinite in 'blocks.0.mlp.up.weight'"): go(broken, tokens=1000)
    failed = dataclasses.replace(trained, row=trained.row | {"status": "failed"})
    for f in (go, lambda p: round_to_nearest(corpus, even, p, QATConfig(bits=2))):
        with pytest.raises(DataError, match="found status 'failed'"): f(failed)
    with pytest.raises(DataError, match="quantised already"): go(go(tokens=1000).proxy, tokens=1000)
    with pytest.raises(DataError, match="found another|domain"): go(weights={"poetry": 1.}, tokens=1000)

def test_a_folder_of_results(trained, corpus, tmp_path):
    r = continue_qat(corpus, trained, QATConfig(bits=1.58), tokens=2560, progress=False); r.save(tmp_path/"a"); back = QATResult.load(tmp_path/"a")
    assert back.quantized.hash == r.quantized.hash and same(back.proxy, r.proxy) and back.stage == r.stage and np.allclose(back.table, r.table) and list(back.table.index) == list(r.table.index)
    assert {p.name for p in (tmp_path/"a").iterdir()} == {"codes.safetensors", "model.safetensors", "runs", "stage.json"}
    for name in ("codes.safetensors", "model.safetensors", "stage.json"):
        whole = (tmp_path/"a"/name).read_bytes(); (tmp_path/"a"/name).unlink(); (tmp_path/"a"/name).write_bytes(whole[:-9])
        with pytest.raises(DataError): QATResult.load(tmp_path/"a")
        (tmp_path/"a"/name).write_bytes(whole)
    assert QATResult.load(tmp_path/"a").stage == r.stage


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_steps_move_the_outer_level_as_far_whatever_the_bits(bits, corpus, even):
    "A step of the optimiser changes the outer level by about the learning rate; stepping on the scale changes it by many times that."
    config, moved = ProxyConfig(depth=1, tokens=100*1024, vocab=corpus.vocab_size), {}
    s = qat_schedule(config, .9, warmup=1)
    for learn in ("outer", "scale"):
        q = QATConfig(bits=bits, embedding_bits=bits, learn=learn); t = _QATTraining(corpus, [even], config, s, q, [0], [None], "cpu"); t.step = s.switch
        t.advance(); a = [o[3].clone()/o[-1] for o in t.gradients.todo]
        t.step = s.switch + 40
        t.advance(); b = [o[3]/o[-1] for o in t.gradients.todo]
        moved[learn] = max(float((x - y).abs().max()) for x, y in zip(a, b))*outer_level(bits)
    assert moved["outer"] < 2*config.peak_lr
    ratio = moved["scale"]/moved["outer"]
    assert outer_level(bits)/2 < ratio < outer_level(bits)*2


def test_old_ids_are_those_of_steps_on_the_scale(corpus):
    "Rows that were stored before there was a choice are found again."
    from mixbook.core import run_id
    config = ProxyConfig(depth=1, tokens=10_240); s = qat_schedule(config, .5); q = QATConfig(bits=2, learn="scale"); old = json.loads(q.to_json()); del old["learn"]
    assert qat_run_id("x", s, q) == run_id({"qat": 1, "proxy": "x", "schedule": json.loads(s.to_json()), "config": old}) != qat_run_id("x", s, QATConfig(bits=2))
