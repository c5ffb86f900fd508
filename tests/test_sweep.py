"Sweep: designs within exact bounds, the greedy choice against a slow one, and runs under every executor, with failures."
import errno, os, signal, threading, time, warnings
from concurrent.futures import Future, ThreadPoolExecutor
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from mixbook import core, sweep
from mixbook.core import DataError, FitError, MixbookWarning, read_runs, weight_cols, weights_of
from mixbook.corpus import toy_corpus
from mixbook.proxy import ProxyConfig
from mixbook.sweep import (SweepPlan, WorkerDied, WorkerPool, choose_mixtures, choosers, design_report, design_summary, designs, mixture_features, repetition_caps, run_sweep,
                           sample_mixtures, simplex)


def natural(k, seed=0): return pd.Series(np.random.default_rng(seed).dirichlet(np.ones(k)), [f"d{i}" for i in range(k)])


@st.composite
def spaces(draw):
    "A bounded simplex that is not empty, and its seed."
    k, seed = draw(st.integers(2, 9)), draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    lo = rng.dirichlet(np.ones(k))*rng.choice([0., .3, .95])*rng.integers(0, 2, k)
    hi = np.minimum(1., np.maximum(lo, rng.dirichlet(np.ones(k))*rng.choice([1.01, 2., 30.])))
    hi = np.where(hi.sum() < 1, 1., hi)
    return simplex(natural(k, seed), floors=dict(zip(natural(k).index, lo)), caps=dict(zip(natural(k).index, hi))), rng


# ---- bounds

@settings(max_examples=60, deadline=None)
@given(spaces())
def test_closing_is_exact_and_idempotent(case):
    space, rng = case
    W = space.close(rng.dirichlet(np.full(space.k, .2), 50))
    assert np.abs(W.sum(1) - 1).max() < 1e-12 and (W >= space.lo).all() and (W <= space.hi).all()
    np.testing.assert_allclose(space.close(W), W, atol=1e-12)
    order = rng.permutation(space.k)
    other = sweep.Simplex(tuple(np.array(space.domains)[order]), space.natural[order], space.lo[order], space.hi[order])
    V = rng.dirichlet(np.ones(space.k), 20)
    np.testing.assert_allclose(other.close(V[:, order]), space.close(V)[:, order], atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(spaces())
def test_closing_is_the_nearest_point_in_relative_entropy(case):
    space, rng = case
    v = rng.dirichlet(np.ones(space.k))
    kl = lambda w: np.sum(np.where(w > 0, w*np.log(np.maximum(w, 1e-300)/v), 0))
    best = kl(space.close(v)[0])
    assert all(kl(w) >= best - 1e-9 for w in space.close(rng.dirichlet(np.full(space.k, .7), 200)))


def test_zeros_stay_and_inside_points_do_not_move():
    space = simplex(natural(4), caps=.6)
    np.testing.assert_array_equal(space.close([[.9, .1, 0, 0]])[0][2:], [0, 0])
    np.testing.assert_allclose(space.close([.4, .3, .2, .1])[0], [.4, .3, .2, .1], rtol=1e-15)
    np.testing.assert_allclose(space.close([[1, 0, 0, 0]]).sum(), 1, atol=1e-12)      # forced beyond its zeros


@pytest.mark.parametrize("kw, message", [
    (dict(caps=.1), "caps sum to 0.4, below 1"), (dict(floors=.3), "floors sum to 1.2, above 1"), (dict(floors={"d1": .5}, caps={"d1": .4}), "floor of 'd1' is 0.5, above its cap"),
    (dict(caps={"d9": .5}), "domain in the caps 'd9'"), (dict(floors=-.1), "between 0 and 1"), (dict(caps=np.nan), "finite")])
def test_impossible_bounds_do_the_sum(kw, message):
    with pytest.raises(DataError, match=message): sample_mixtures(natural(4), 10, **kw)


@pytest.mark.parametrize("bad", [{}, {"a": np.nan}, {"a": -1, "b": 2}, {"a": 0., "b": 0.}])
def test_bad_natural_mixtures(bad):
    with pytest.raises(DataError, match="natural mixture"): sample_mixtures(bad, 5)


# ---- designs

@settings(max_examples=40, deadline=None)
@given(spaces(), st.sampled_from(sorted(designs)), st.integers(3, 12))
def test_every_design_is_closed_bounded_and_repeatable(case, how, n):
    space, rng = case
    if how == "corners": n = min(n, 2**space.k - 1 + 2)
    draw = lambda seed: sample_mixtures(pd.Series(space.natural, list(space.domains)), n, how=how, floors=pd.Series(space.lo, list(space.domains)), caps=pd.Series(space.hi, list(space.domains)), seed=seed)
    try: out = draw(3)
    except DataError as e:
        assert "distinct mixtures" in str(e)            # bounds so tight that the choice has nothing to choose from
        return
    same = how == "d-optimal" and np.allclose(*space.close([space.natural, np.ones(space.k)]), atol=1e-9)
    assert out.shape == (n, space.k) and out.index.is_unique and list(out.index[:2 - same]) == ["natural", "uniform"][:2 - same]
    W = out.to_numpy()
    assert np.abs(W.sum(1) - 1).max() < 1e-12 and (W >= space.lo).all() and (W <= space.hi).all()
    pd.testing.assert_frame_equal(out, draw(3))


def test_design_shapes():
    corners = sample_mixtures(natural(4), 10, how="corners", include=())
    assert sorted((corners > 0).sum(axis=1)) == [1]*4 + [2]*6
    assert set(np.unique(sample_mixtures(natural(3), 10, how="lattice", include=()).round(9))) <= {0, round(1/3, 9), round(2/3, 9), 1}
    near = sample_mixtures(natural(5), 200, how="natural", include=())
    assert np.abs(near.mean() - natural(5)).max() < .02
    with pytest.raises(DataError, match="centroid design over 3 domains has 7"): sample_mixtures(natural(3), 9, how="corners", include=())
    sparse, dense = (sample_mixtures(natural(6), 300, how="dirichlet", strengths=[s], include=()) for s in (.1, 50.))
    assert (sparse == 0).mean().mean() > .5 > .2 > (dense == 0).mean().mean()
    assert list(sample_mixtures(["a", "b"], 3, include="uniform").iloc[0]) == [.5, .5]


def test_mixtures_of_a_design_keep_apart():
    R = np.sqrt(sample_mixtures(natural(3), 14, seed=2).to_numpy()/2)
    assert min(np.linalg.norm(R[i] - R[j]) for i in range(14) for j in range(i)) > .07


def test_domains_of_share_zero_may_be_sampled_by_no_error():
    out = sample_mixtures({"a": .5, "b": .5, "c": 0.}, 12, seed=0)
    assert np.isfinite(out.to_numpy()).all()


# ---- choosing

def pool(n=60, k=5, seed=0): return pd.DataFrame(np.random.default_rng(seed).dirichlet(np.full(k, .5), n), [f"p{i}" for i in range(n)], [f"d{j}" for j in range(k)])


def test_greedy_choice_equals_the_slow_one():
    P = pool()
    F, M, slow = mixture_features(P), 1e-2*np.eye(6), []
    for _ in range(20):
        value = [np.linalg.slogdet(M + np.outer(f, f))[1] if i not in slow else -np.inf for i, f in enumerate(F)]
        slow.append(int(np.argmax(value)))
        M = M + np.outer(F[slow[-1]], F[slow[-1]])
    assert list(choose_mixtures(P, 20)) == list(P.index[slow])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(8, 30))
def test_choice_properties(seed, n):
    P, rng = pool(seed=seed), np.random.default_rng(seed)
    chosen = choose_mixtures(P, n)
    assert chosen.is_unique and len(chosen) == n
    assert list(choose_mixtures(P, 8)) == list(chosen[:8])                                                   # nested
    assert list(choose_mixtures(P[P.columns[rng.permutation(5)]].add_prefix("w/"), n)) == list(chosen)       # domain order and prefixes mean nothing
    assert list(choose_mixtures(P, n, start=chosen[:5])) == list(chosen)
    log_det = lambda labels: np.linalg.slogdet(mixture_features(P.loc[labels]).T@mixture_features(P.loc[labels]))[1]
    assert log_det(choose_mixtures(P, n, refine=True)) >= log_det(chosen) - 1e-9
    assert log_det(chosen) > log_det(choose_mixtures(P, n, how="random", seed=seed))


def test_k_centre_covers_and_random_depends_on_the_seed():
    P = pool(200)
    R = np.sqrt(P.to_numpy())
    reach = lambda labels: np.min(np.linalg.norm(R[:, None] - R[P.index.get_indexer(labels)], axis=-1), axis=1).max()
    assert reach(choose_mixtures(P, 20, how="k-centre")) < min(reach(choose_mixtures(P, 20, how="random", seed=s)) for s in range(10))
    a, b = (choose_mixtures(P, 20, how="random", seed=s) for s in (0, 1))
    assert set(a) != set(b) and list(a) == list(choose_mixtures(P, 20, how="random", seed=0))


@pytest.mark.parametrize("how", sorted(choosers))
def test_copies_come_last(how):
    P = pool(10)
    twice = pd.concat([P, P.set_axis([f"copy {i}" for i in P.index])])
    if how != "random": assert twice.loc[choose_mixtures(twice, 10, how=how)].round(9).drop_duplicates().shape[0] == 10
    assert choose_mixtures(twice, 20, how=how).is_unique


def test_choice_errors():
    for call, message in ((lambda: choose_mixtures(pool(), 61), "between 1 and 60"), (lambda: choose_mixtures(pool(), 0), "between 1 and 60"), (lambda: choose_mixtures(pool().to_numpy(), 5), "as a DataFrame"),
                          (lambda: choose_mixtures(pool()*2, 5), "sum to one"), (lambda: choose_mixtures(pool().assign(name="x"), 5), "one number a domain"),
                          (lambda: choose_mixtures(pool(), 5, how="doptimal"), "did you mean 'd-optimal'"), (lambda: choose_mixtures(pool(), 5, start=["p99"]), "not a label")):
        with pytest.raises(DataError, match=message): call()


def test_a_large_choice_is_quick_enough_to_be_exact():
    P = pd.DataFrame(np.random.default_rng(0).dirichlet(np.ones(30)*.3, 20_000))
    start = time.process_time()
    assert len(choose_mixtures(P, 64)) == 64
    assert time.process_time() - start < 20


def test_reports():
    P = pool(40)
    table = design_report(P, natural(5), available=natural(5)*1e6, tokens=10_000)
    assert list(table.columns) == ["natural", "min", "median", "max", "zeros", "passes"]
    np.testing.assert_allclose(table["passes"], P.max()*10_000/(natural(5)*1e6))
    assert np.isneginf(design_summary(P.iloc[:3])["log_det"])
    assert design_summary(P, natural(5))["distance"] > design_summary(pd.DataFrame([natural(5)]*8), natural(5))["distance"] == 0


# ---- running

CONFIG = ProxyConfig(depth=1, tokens=2_048, batch=4, seq_len=32, eval_windows=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory): return toy_corpus(tmp_path_factory.mktemp("corpus")/"toy", size=30_000)


@pytest.fixture(scope="module")
def mixtures(corpus): return sample_mixtures(corpus, 5)


@pytest.fixture(scope="module")
def serial(corpus, mixtures, tmp_path_factory): return run_sweep(corpus, mixtures, CONFIG, path=tmp_path_factory.mktemp("serial"), progress=False)


def lasting(runs): return runs.drop(columns=[c for c in ("seconds", "created", "study") if c in runs])


class DaskLike:
    "Futures that know `done` and `result` only, finished out of order by a thread; no registration with concurrent.futures."
    class Promise:
        def __init__(self, call): self.call, self.polls = call, 0
        def done(self): self.polls += 1; return self.polls > 2
        def result(self): return self.call()
    def submit(self, fn, *args): return self.Promise(lambda: fn(*args))


def test_a_sweep_is_the_same_however_it_is_run(corpus, mixtures, serial, tmp_path):
    assert list(serial["mixture"]) == list(mixtures.index) and set(serial["status"]) == {"done"}
    np.testing.assert_allclose(weights_of(serial)[mixtures.columns], mixtures, atol=1e-12)
    with ThreadPoolExecutor(2) as threads:
        for name, kw in {"threads": dict(submit=threads), "bare": dict(submit=threads.submit), "dask": dict(submit=DaskLike())}.items():
            pd.testing.assert_frame_equal(lasting(run_sweep(corpus, mixtures, CONFIG, path=tmp_path/name, progress=False, **kw)), lasting(serial))
    stacked = run_sweep(corpus, mixtures, CONFIG, path=tmp_path/"stacked", how="stacked", progress=False)
    losses = [c for c in serial if c.startswith("loss/")]
    np.testing.assert_allclose(stacked[losses], serial[losses], atol=1e-4)
    assert list(stacked["run"]) == list(serial["run"])
    assert len(list((tmp_path/"stacked").glob("*.parquet"))) == 5


def test_processes_and_the_death_of_one(corpus, mixtures, serial, tmp_path, monkeypatch):
    "Two worker processes; the first that shows up is killed in its first call. Its run is named, the others are done, and the next call mends it."
    class Doomed(WorkerPool):
        def _start(self):
            p = super()._start()
            if len(self.processes) == 1: p.kill()
            return p
    monkeypatch.setattr(sweep, "WorkerPool", Doomed)
    with pytest.warns(MixbookWarning, match="1 of 5 runs failed.*signal 9"): some = run_sweep(corpus, mixtures, CONFIG, path=tmp_path, n_workers=2, progress=False)
    assert len(some) == 4
    table = read_runs(tmp_path)
    assert sorted(table["status"]) == ["done"]*4 + ["failed"] and "WorkerDied" in table["error"].dropna().iloc[0]
    monkeypatch.undo()
    assert run_sweep(corpus, mixtures, CONFIG, path=tmp_path, dry=True).runs == 1
    pd.testing.assert_frame_equal(lasting(run_sweep(corpus, mixtures, CONFIG, path=tmp_path, progress=False)), lasting(serial), rtol=1e-6, check_like=True)
    assert set(read_runs(tmp_path)["status"]) == {"done"}


def test_errors_cross_the_process_border():
    with WorkerPool(1) as pool:
        assert isinstance(pool.submit(core.one_of, "a", ["b"]).exception(), DataError)
        assert pool.submit(print, "to standard error").result() is None
        assert pool.submit(os.getpid).result() != os.getpid()
        assert isinstance(pool.submit(os.kill, 0, "no signal").exception(), TypeError)
        assert isinstance(pool.submit(lambda: 0).exception(), Exception)       # cannot be pickled


def test_seeds_resume_and_duplicates(corpus, mixtures, tmp_path):
    first = run_sweep(corpus, mixtures.iloc[:2], CONFIG, path=tmp_path, seeds=(0, 1), progress=False)
    assert list(first["seed"]) == [0, 1, 0, 1] and first["run"].is_unique and first["loss/code"].is_unique
    class Never: submit = lambda self, fn, *args: pytest.fail("a finished run was trained again")
    again = run_sweep(corpus, pd.concat([mixtures.iloc[:2], mixtures.iloc[:1].set_axis(["copy"])]), CONFIG, path=tmp_path, seeds=(0, 1), submit=Never(), progress=False)
    pd.testing.assert_frame_equal(again, first)
    assert len(run_sweep(corpus, mixtures.iloc[:2].add_prefix("w/"), CONFIG, path=tmp_path, seeds=1, submit=Never(), progress=False)) == 2


def test_plan(corpus, mixtures, tmp_path):
    plan = run_sweep(corpus, mixtures, CONFIG, path=tmp_path/"none", n_workers=2, dry=True)
    assert (plan.runs, plan.done, plan.workers) == (5, 0, 2) and plan.seconds > 0 and not (tmp_path/"none").exists()
    np.testing.assert_allclose(plan.domains["passes"], mixtures.max()*CONFIG.train_tokens/corpus.table["tokens"])
    assert "5 runs to train, 0 done already" in str(plan) and "| tokens |" in plan._repr_markdown_()
    assert SweepPlan.from_json(plan.to_json()).todo.equals(plan.todo)


def test_a_loss_that_is_no_number_is_a_failed_run(corpus, mixtures, serial, tmp_path):
    class Spoils(DaskLike):
        calls = 0
        def submit(self, fn, *args):
            self.calls += 1
            spoil = self.calls == 2
            def call():
                rows = fn(*args)
                return [[r | ({"loss/code": float("nan")} if spoil else {}) for r in run] for run in rows]
            return self.Promise(call)
    with pytest.warns(MixbookWarning, match="uniform.*a loss is not finite"): good = run_sweep(corpus, mixtures, CONFIG, path=tmp_path, submit=Spoils(), progress=False)
    assert len(good) == 4 and read_runs(tmp_path).set_index("mixture").loc["uniform", "status"] == "failed"
    pd.testing.assert_frame_equal(lasting(run_sweep(corpus, mixtures, CONFIG, path=tmp_path, progress=False)), lasting(serial), check_like=True)


@pytest.mark.filterwarnings("ignore")
def test_divergence_is_reported_by_the_proxy_itself(corpus, mixtures, tmp_path):
    with pytest.raises(FitError, match="none of the 2 runs finished"): run_sweep(corpus, mixtures.iloc[:2], CONFIG.replace(lr=1e30), path=tmp_path, progress=False)
    table = read_runs(tmp_path)
    assert set(table["status"]) == {"failed"} and table["error"].str.contains("NaN").all()


def test_when_nothing_works_it_stops(corpus, mixtures, tmp_path):
    class Broken:
        calls = 0
        def submit(self, fn, *args):
            Broken.calls += 1
            f = Future()
            f.set_exception(RuntimeError("no such device"))
            return f
    with pytest.raises(FitError, match="first 3 runs all failed; the last one: RuntimeError: no such device"): run_sweep(corpus, mixtures, CONFIG, path=tmp_path, submit=Broken(), progress=False)


def test_ctrl_c_keeps_what_is_finished(corpus, mixtures, tmp_path, monkeypatch):
    kept, write = [], sweep.write_runs
    def slow_write(runs, path):
        write(runs, path)
        kept.append(runs["run"].iloc[0])
        if len(kept) == 2: threading.Timer(.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    monkeypatch.setattr(sweep, "write_runs", slow_write)
    with pytest.raises(KeyboardInterrupt, match=r"of 5 runs are finished and kept in .* The same call goes on"): run_sweep(corpus, mixtures, CONFIG.replace(tokens=60_000), path=tmp_path, progress=False)
    assert set(read_runs(tmp_path)["run"]) == set(kept)


def test_a_full_disk_is_said_and_loses_nothing(corpus, mixtures, tmp_path, monkeypatch):
    calls, to_parquet = [], pd.DataFrame.to_parquet
    def full(self, path, **kw):
        calls.append(path)
        if len(calls) == 3: raise OSError(errno.ENOSPC, "No space left on device")
        return to_parquet(self, path, **kw)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(DataError, match="No space left on device. Free some space"): run_sweep(corpus, mixtures, CONFIG, path=tmp_path, progress=False)
    monkeypatch.undo()
    assert len(read_runs(tmp_path)) == 2 and not list(tmp_path.glob(".*.tmp"))
    assert run_sweep(corpus, mixtures, CONFIG, path=tmp_path, dry=True).done == 2


def test_bad_input(corpus, mixtures, tmp_path):
    for call, message in ((dict(mixtures=mixtures*.9), "sum to one"), (dict(mixtures=mixtures.rename(columns={"code": "cod"})), "did you mean 'code'"), (dict(mixtures=mixtures.iloc[:0]), "at least one mixture"),
                          (dict(seeds=()), "one seed"), (dict(how="quick"), "unknown way"), (dict(config=CONFIG.replace(seq_len=40_000, tokens=400_000)), "too few tokens for one batch")):
        with pytest.raises(DataError, match=message): run_sweep(**{"corpus": corpus, "mixtures": mixtures, "config": CONFIG, "path": tmp_path/"x", "progress": False} | call)
    (tmp_path/"cut").mkdir()
    (tmp_path/"cut"/"a.parquet").write_bytes(b"PAR1 and then the power went")
    with pytest.raises(DataError, match="Delete the file"): run_sweep(corpus, mixtures, CONFIG, path=tmp_path/"cut", progress=False)


def test_caps_of_a_corpus(corpus):
    caps = repetition_caps(corpus, 10*int(corpus.table["tokens"].sum()), max_passes=12)
    out = sample_mixtures(corpus, 10, caps=caps)
    assert (design_report(out, corpus, tokens=10*int(corpus.table["tokens"].sum()))["passes"] <= 12 + 1e-9).all()
    with pytest.raises(DataError, match="above zero"): repetition_caps(corpus, 0)


@pytest.mark.parametrize("k", [2, 3])
def test_a_balanced_corpus_has_one_baseline_and_a_full_design(k):
    out = sample_mixtures(pd.Series(1/k, [f"d{i}" for i in range(k)]), 8, seed=0)
    assert len(out) == len(out.round(9).drop_duplicates()) == 8 and out.index[0] == "natural" and "uniform" not in out.index
