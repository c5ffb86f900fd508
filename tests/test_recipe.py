"The recipe: exact feasibility, planted optima, honest comparisons."
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
import mixbook.recipe as R
from mixbook.core import DataError
from mixbook.recipe import Recipe, baselines, compare_recipes, confirm, label_runs, next_mixtures, propose, search_cost
from mixbook.surrogate import fit_surrogate, planted_surface

DOMAINS = ["prose", "code", "tables", "wiki", "mail"]

class Truth:
    "A known surface (additive law, 2507.09404) with the API of a surrogate; draws move its coefficients."
    kind, targets, n, noise = "truth", {"loss/all": 1.0}, 20, 0.002
    def __init__(self, domains=DOMAINS, spread=0.1, seed=0):
        r, k = np.random.default_rng(seed), len(domains)
        self.domains, self.spread = list(domains), spread
        self.C, self.gamma = np.exp(r.normal(0, 0.4, (k, k))) + 2*np.eye(k), r.uniform(0.3, 0.7, (k, k))
        w = r.dirichlet(np.ones(k), self.n)
        self.observed = pd.DataFrame(w, columns=self.domains).assign(target=self.loss(w))
    def loss(self, w, C=None):
        w = w[self.domains].to_numpy() if hasattr(w, "columns") else np.atleast_2d(np.asarray(w, float))
        return np.mean([1.5 + 1/(w**g @ c) for c, g in zip(self.C if C is None else C, self.gamma)], axis=0)
    def predict(self, w): return pd.DataFrame({"mean": self.loss(w), "sd": 0.01})
    def sample(self, w, n, seed):
        r = np.random.default_rng(seed)
        return np.stack([self.loss(w, self.C*np.exp(r.normal(0, self.spread, self.C.shape))) for _ in range(n)])
    def minimum(self):
        lo, hi = R._limits(self.domains)
        return R._minimise(R._objective(self, None, 0, 0), R._pool(np.full(len(self.domains), 1/len(self.domains)), lo, hi, 2000, 0), lo, hi)[:2]

class Stairs(Truth):
    "A surface of steps: every slope is zero, as with boosted trees."
    def loss(self, w, C=None): return np.round(super().loss(w, C), 2)

@st.composite
def boxes(draw, k=None):
    k = draw(st.integers(2, 9)) if k is None else k
    share = st.floats(0, 1)
    lo = np.array(draw(st.lists(share, min_size=k, max_size=k)))
    lo = lo/max(lo.sum(), 1e-9)*draw(st.floats(0, 1)) if lo.sum() > 1e-9 else np.zeros(k)
    hi = np.minimum(lo + np.array(draw(st.lists(share, min_size=k, max_size=k))), 1)
    if hi.sum() < 1: hi = np.ones(k)
    return lo, hi

@settings(max_examples=150, deadline=None)
@given(boxes(), st.integers(0, 10**6), st.sampled_from([0.05, 0.5, 5.0]))
def test_projection_is_feasible_to_the_last_digit(box, seed, alpha):
    lo, hi = box
    v = np.random.default_rng(seed).gamma(alpha, size=(20, len(lo)))
    v[0], v[1] = np.eye(len(lo))[0], 0
    w = R._project(v, lo, hi)
    assert np.abs(w.sum(1) - 1).max() < 1e-12 and (w >= lo).all() and (w <= hi).all()
    np.testing.assert_allclose(R._project(w, lo, hi), w, atol=1e-7)

def test_projection_keeps_the_ratios_of_weights_that_meet_no_limit():
    w = R._project([[0.8, 0.1, 0.06, 0.04]], np.zeros(4), np.array([0.5, 1, 1, 1]))[0]
    assert w[0] == 0.5 and w[1:] == pytest.approx(np.array([0.1, 0.06, 0.04])*2.5)

@settings(max_examples=12, deadline=None)
@given(boxes(k=5), st.integers(0, 100))
def test_recipes_keep_floors_and_caps_exactly(box, seed):
    lo, hi = (pd.Series(b, DOMAINS) for b in box)
    r = propose(Truth(), floors=lo, caps=hi, seed=seed, draws=20)
    assert abs(r.weights.sum() - 1) < 1e-12 and (r.weights >= lo).all() and (r.weights <= hi).all()
    assert (r.lo <= r.weights).all() and (r.weights <= r.hi).all()
    assert (r.lo >= lo - 1e-9).all() and (r.hi <= hi + 1e-9).all()

@pytest.mark.parametrize("kind", [Truth, Stairs])
@pytest.mark.parametrize("caps", [None, 0.3])
def test_never_worse_than_a_large_random_pool(kind, caps):
    m = kind(seed=3)
    lo, hi = R._limits(DOMAINS, None, caps)
    r = propose(m, caps=caps, risk=0, draws=0)
    rival = R._pool(np.full(5, 0.2), lo, hi, 20000, 77)
    slack = 0 if kind is Truth else 0.011                  # one step of the stairs
    assert m.loss(r.weights)[0] <= m.loss(rival).min() + slack

@pytest.mark.parametrize("k", [3, 7, 17])
def test_the_minimiser_is_a_minimum(k):
    from scipy.optimize import minimize
    m = Truth([f"d{i}" for i in range(k)], seed=k)
    w, j = m.minimum()
    soft = lambda x: m.loss(np.exp(x)/np.exp(x).sum())[0]
    rival = min(minimize(soft, np.random.default_rng(s).normal(size=k), method="L-BFGS-B").fun for s in range(3))
    assert j <= rival + 1e-6

def test_order_of_domains_is_not_meaning():
    a = Truth(seed=5)
    b = Truth(seed=5)
    order = [3, 0, 4, 2, 1]
    b.domains, b.C, b.gamma = [DOMAINS[i] for i in order], a.C[:, order], a.gamma[:, order]
    b.observed = a.observed[b.domains + ["target"]]
    x = propose(a, floors={"mail": 0.3}, caps={"code": 0.1}, draws=0, risk=0).weights
    y = propose(b, floors={"mail": 0.3}, caps={"code": 0.1}, draws=0, risk=0).weights
    np.testing.assert_allclose(y[DOMAINS], x, atol=2e-3)

def test_without_draws_the_same_recipe_without_intervals():
    _, s = planted_fit(2)
    a, b = propose(s, seed=1), propose(s, seed=1, draws=0)
    assert (a.weights == b.weights).all() and b.lo is None and b.predicted == pytest.approx({k: a.predicted[k] for k in ("mean", "sd")}) and a.provenance == b.provenance

def test_the_leash_is_monotone_and_ends_at_natural():
    m, natural = Truth(seed=2), pd.Series([0.6, 0.2, 0.1, 0.05, 0.05], DOMAINS)
    far = [R._kl(propose(m, natural=natural, kl=kl, draws=0).weights.to_numpy(), natural.to_numpy()) for kl in (0, 0.01, 0.05, 0.2, 100)]
    assert all(b < a for a, b in zip(far, far[1:])) and far[-1] < 1e-5

def test_flat_region_holds_what_it_says():
    m = Truth(seed=4)
    r = propose(m, risk=0, draws=20)
    flat, base = r.predicted["flat"], m.loss(r.weights)[0]
    for d in DOMAINS:
        for end in ("lo", "hi"):
            w = r.weights*(1 - flat[end][d])/(1 - r.weights[d])
            w[d] = flat[end][d]
            assert m.loss(w)[0] - base <= m.noise + 1e-9
    assert sum(flat["hi"][d] - flat["lo"][d] for d in DOMAINS) > 0.05

def planted_fit(seed, k=4, n=24, noise=0.008):
    surface = planted_surface(k, seed=seed)
    return surface, fit_surrogate(surface.runs(n, noise=noise, seed=seed), [f"loss/{d}" for d in surface.domains])

def test_planted_optimum_is_recovered_from_noisy_runs():
    hits, gains, regrets, uniform = [], [], [], []
    for seed in range(8):
        f, s = planted_fit(seed)
        w, r = f.minimum, propose(s, seed=seed)
        hits += list((r.lo - 1e-9 <= w) & (w <= r.hi + 1e-9))
        regrets.append(f(r.weights)[0] - f.best)
        uniform.append(f(np.full(4, 0.25))[0] - f.best)
        g = r.predicted["uniform"]
        gains.append(g["lo"] <= uniform[-1] - regrets[-1] <= g["hi"])
    assert 0.75 <= np.mean(hits) and np.mean(gains) >= 0.7          # 90 % nominal, 32 weights and 8 gains
    assert np.mean(regrets) < 0.002 and np.mean(regrets) < 0.1*np.mean(uniform)

def test_same_seed_same_recipe():
    _, s = planted_fit(1)
    assert propose(s, seed=3) == propose(s, seed=3)
    pd.testing.assert_frame_equal(next_mixtures(s, 3, seed=2), next_mixtures(s, 3, seed=2))

names = st.text(min_size=1, max_size=12)
@settings(max_examples=60, deadline=None)
@given(st.lists(names, min_size=1, max_size=6, unique=True), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_json_is_lossless(domains, seed, staged, full):
    r = np.random.default_rng(seed)
    mix = lambda: dict(zip(domains, map(float, r.dirichlet(np.ones(len(domains))))))
    kw = {"stages": ((0.0, mix()), (0.8, mix()))} if staged else {"weights": mix()}
    a = Recipe(**kw)
    if full: a = a.replace(lo=a.weights*0.9, hi=a.weights, natural=mix(), tokens=dict.fromkeys(domains, 123456789.0), budget=10**15, predicted={"mean": 0.1 + 0.2, "uniform": {"gain": 1e-17}}, provenance={"seed": seed})
    b = Recipe.from_json(a.to_json())
    assert b == a and (b.weights == a.weights).all() and b.stages == a.stages and b.domains == domains

def test_markdown_escapes_domain_names():
    text = Recipe(weights={"<script>|x": 0.5, "b": 0.5})._repr_markdown_()
    assert "<script>" not in text and "\\|x" in text

@pytest.mark.parametrize("kw,message", [
    (dict(), "expected `weights` or `stages`"),
    (dict(weights={"a": 0.5, "b": 0.6}), "must sum to 1, found 1.1"),
    (dict(weights={"a": 1.5, "b": -0.5}), "not negative"),
    (dict(weights={"a": float("nan"), "b": 1.0}), "finite"),
    (dict(weights=[0.5, 0.5]), "order is not meaning"),
    (dict(weights={"a": 1.0}, lo={"a": 1.0}), "both `lo` and `hi`"),
    (dict(weights={"a": 0.5, "b": 0.5}, natural={"a": 1.0}), "lacks domain 'b'"),
    (dict(weights={"a": 1.0}, tokens={"a": 0}), "positive `tokens`"),
    (dict(weights={"a": 1.0}, unit="document"), "unknown unit"),
    (dict(weights={"a": 1.0}, budget=0), "positive budget"),
    (dict(stages=((0.1, {"a": 1.0}),)), "must start at 0"),
    (dict(weights={"a": 0.5, "b": 0.5}, stages=((0.0, {"a": 0.9, "b": 0.1}),)), "average over `stages`"),
])
def test_a_recipe_that_contradicts_itself_is_refused(kw, message):
    with pytest.raises(DataError, match=message.replace("(", r"\(")): Recipe(**kw)

@pytest.mark.parametrize("kw,message", [
    (dict(floors=0.3), "floors sum to 1.5 > 1"),
    (dict(caps=0.1), "caps sum to 0.5 < 1"),
    (dict(floors={"cod": 0.1}), "did you mean 'code'"),
    (dict(caps={"code": 0.1}, floors={"code": 0.2}), "floor 0.2 > cap 0.1"),
    (dict(caps={"code": float("nan")}), "must be numbers"),
    (dict(floors="much"), "expected `floors` as a number"),
    (dict(kl=1.0), "expected `natural`"),
    (dict(natural={"prose": 1.0}), "lacks domain"),
])
def test_impossible_wishes_are_named(kw, message):
    with pytest.raises(DataError, match=message): propose(Truth(), **kw)

def test_baselines_are_always_there():
    r = propose(Truth(), natural=dict(zip(DOMAINS, [0.2]*5)), draws=20)
    assert {"natural", "uniform", "best of swarm"} <= set(r.predicted)
    assert r.predicted["natural"]["gain"] == pytest.approx(r.predicted["uniform"]["gain"])
    best = baselines(Truth())["best of swarm"]
    assert Truth().loss(best)[0] == pytest.approx(Truth().observed["target"].min())

def test_fantasies_condition_as_a_gaussian_process_does():
    r = np.random.default_rng(0)
    x = np.sort(r.uniform(0, 4, 40))
    K, mean, noise, kappa = np.exp(-0.5*(x[:, None] - x)**2/0.3), 0.2*np.sin(3*x) + 0.05*x, 0.05, 2.0
    f = np.linalg.cholesky(K + 1e-9*np.eye(40))@r.standard_normal((40, 40000))
    free = np.ones(40, bool)
    def take(score):
        i = int(np.where(free, score, np.inf).argmin()); free[i] = False
        return i
    got, want, C = R._ucb(mean, f.T, 4, kappa, noise, 1, take), [], K.copy()
    open_ = np.ones(40, bool)
    for _ in range(4):
        i = int(np.where(open_, mean - kappa*np.sqrt(np.diag(C).clip(0)), np.inf).argmin()); open_[i] = False
        want.append(i)
        C = C - np.outer(C[:, i], C[i])/(C[i, i] + noise**2)
    assert np.abs(x[got] - x[want]).max() < 0.15 and got[0] == want[0]

@pytest.mark.parametrize("how", ["ucb", "thompson"])
def test_next_mixtures_from_a_pool_keep_their_names_and_are_new(how):
    m = Truth(seed=1)
    pool = pd.DataFrame(np.random.default_rng(1).dirichlet(np.ones(5), 60), [f"p{i}" for i in range(60)], DOMAINS)
    seen = pool.iloc[:20]
    m.observed = seen.assign(target=m.loss(seen))
    got = next_mixtures(m, 10, how=how, pool=pool, caps={"prose": 0.5})
    assert len(set(got.index)) == 10 and not set(got.index) & set(seen.index) and (got["prose"] <= 0.5).all()
    pd.testing.assert_frame_equal(got, pool.loc[got.index])

def null_runs(n_seeds, r, gain=0.0):
    shared = r.normal(0, 0.1, n_seeds)
    return pd.DataFrame([{"run": f"{c}{s}", "seed": s, "recipe": c, "loss/x": 2 + shared[s] + r.normal(0, 0.01) - gain*(c == "b")} for c in "ab" for s in range(n_seeds)])

@pytest.mark.parametrize("n_seeds", [3, 5])
def test_no_evidence_under_the_null_at_the_nominal_rate(n_seeds):
    r = np.random.default_rng(n_seeds)
    verdicts = [compare_recipes(null_runs(n_seeds, r), baseline="a", targets="loss/x")["verdict"].iloc[0] for _ in range(500)]
    assert 0.025 < np.mean([v != "no evidence" for v in verdicts]) < 0.08

def test_a_planted_gain_is_found_and_measured():
    r = np.random.default_rng(0)
    c = pd.concat([compare_recipes(null_runs(5, r, gain=0.05), baseline="a", targets="loss/x") for _ in range(100)])
    assert (c["verdict"] == "better").mean() > 0.95 and c["mean"].mean() == pytest.approx(-0.05, abs=0.003)
    assert ((c["lo"] < -0.05) & (-0.05 < c["hi"])).mean() > 0.9

def test_comparison_edges():
    r = np.random.default_rng(0)
    one = compare_recipes(null_runs(1, r, gain=1.0), baseline="a", targets="loss/x")
    assert one["verdict"].tolist() == ["no evidence"] and one["lo"].isna().all()
    apart = null_runs(2, r).query("not (recipe == 'a' and seed == 0) and not (recipe == 'b' and seed == 1)")
    with pytest.raises(DataError, match="share no seed"): compare_recipes(apart, baseline="a", targets="loss/x")
    score = null_runs(5, r).rename(columns={"loss/x": "score/x"})
    score.loc[score["recipe"] == "b", "score/x"] += 1
    assert compare_recipes(score, baseline="a", targets="score/x")["verdict"].tolist() == ["better"]
    steps = pd.concat([null_runs(4, np.random.default_rng(1)).assign(step=1, **{"loss/x": 9.0}), null_runs(4, np.random.default_rng(1), gain=0.5).assign(step=2)])
    assert compare_recipes(steps, baseline="a", targets="loss/x")["value"].iloc[0] < 3

def test_confirm_trains_each_mixture_once_and_names_every_recipe(monkeypatch):
    seen = {}
    def fake(corpus, mixtures, config, *, path, seeds, study, n_workers, dry, **kw):
        seen.update(n=len(mixtures), study=study)
        return pd.DataFrame([{"run": f"{i}-{s}", "seed": s, "step": 1, "loss/x": 1.0, **{f"w/{d}": v for d, v in m.items()}} for i, m in mixtures.reset_index(drop=True).iterrows() for s in seeds])
    monkeypatch.setattr(R, "run_sweep", fake)
    corpus = type("C", (), {"domains": ["a", "b"]})()
    same = {"a": 0.5, "b": 0.5}
    runs = confirm(corpus, {"recipe": Recipe(weights={"b": 0.9, "a": 0.1}), "uniform": same, "best of swarm": same}, None, path="x")
    assert seen == {"n": 2, "study": "confirm"} and runs.groupby("recipe").size().to_dict() == {"recipe": 3, "uniform": 3, "best of swarm": 3}
    assert (runs.loc[runs["recipe"] == "recipe", "w/b"] == 0.9).all()
    with pytest.raises(DataError, match="unknown domain 'c'"): confirm(corpus, {"x": {"a": 0.5, "c": 0.5}}, None, path="x")
    with pytest.raises(DataError, match="Was its training interrupted"): label_runs(runs, {"other": {"a": 0.3, "b": 0.7}})

def curves(gain, exponent=0.1, seeds=3, wobble=0.0):
    rows = [{"run": f"{c}{s}", "seed": s, "step": i, "recipe": c, "tokens": t, "flops": t*100, "loss/x": 10*t**-exponent*(1 - gain*(c == "recipe")) + (wobble*(s - 1) + 1e-6*s)*(c == "recipe")}
            for c in ("natural", "recipe") for s in range(seeds) for i, t in enumerate((2e5, 4e5, 6e5, 8e5, 1e6))]
    return pd.DataFrame(rows)

def test_search_cost_measures_the_exponent_and_the_ratio():
    swarm = pd.DataFrame({"run": ["a", "a", "b"], "step": [1, 2, 1], "flops": [1e6, 2e6, 2e6]})
    c = search_cost(swarm, curves(0.05), targets="loss/x", target_flops=1e12)
    assert c["exponent"] == pytest.approx(0.1, abs=1e-3) and c["ratio"] == pytest.approx(0.95**-10, rel=0.02)
    assert c["spent"] == 4e6 + 6*1e8 and c["net"] == pytest.approx((c["ratio"] - 1)*1e12 - c["spent"])
    assert c["ratio_lo"] <= c["ratio"] <= c["ratio_hi"]
    for gain, word in ((0.0, "Cannot say"), (-0.05, "saves nothing")):
        c = search_cost(swarm, curves(gain, wobble=0.01 if gain == 0 else 0.0), targets="loss/x", target_flops=1e12)
        assert c["saved"] is None and c["net"] is None and word in c["statement"]
