"Schedules spend exactly their budget; quantised runs resume to the same bits, and branches equal whole runs."
import numpy as np, pytest, torch
import mixbook.qat as mq
from mixbook.core import DataError, read_runs
from mixbook.corpus import toy_corpus
from mixbook.decoder import ProxyConfig
from mixbook.qat import QATSchedule, departure, qat_schedule, qat_step_ratio, round_to_nearest, run_branches, train_qat, train_trunk
from mixbook.quant import QATConfig

@pytest.fixture(scope="module")
def corpus(): return toy_corpus()

@pytest.fixture(scope="module")
def even(corpus): return {d: 1/len(corpus.domains) for d in corpus.domains}

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

def test_a_quantised_step_is_not_much_slower(): assert qat_step_ratio(ProxyConfig(depth=2, tokens=10**6), rounds=9) < 1.4
