"Distances: textbook values, brute force, tests that hold their level, and a predictor table that finds what was planted."
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from mixbook.core import DataError
from mixbook.distances import a_distance, cross_gap, distance_table, frontier_integral, js_bias, mauve, mauve_gap, mauve_of, mmd2, mmd_test, predictor_table, sample_distances
from mixbook.domains import divergence, divergences

shares = st.lists(st.floats(0, 1), min_size=6, max_size=6).filter(lambda v: sum(v) > .1)
NAMES = ["sea", "law", "code", "news"]

def test_golden_values():
    assert abs(divergence([1, 0], [0, 1]) - np.log(2)) < 1e-12 and abs(divergence([.5, .5], [.9, .1]) - .101749) < 1e-6
    assert abs(divergence([1, 0], [0, 1], how="hellinger") - 1) < 1e-12
    for p, q, want in (([.5, .5], [.5, .5], 1), ([.5, .5], [.6, .4], .998354), ([.5, .5], [.9, .1], .671096), ([1, 0], [0, 1], .004072)):
        assert abs(mauve(p, q) - want) < 1e-6 and abs(mauve_gap(p, q) - (1 - want)) < 1e-6
    assert abs(mauve([1, 0], [0, 1], points=50_000) - 1 / 252) < 1e-5
    assert abs(frontier_integral([.5, .5], [.9, .1]) - .137560) < 1e-6 and frontier_integral([1, 0], [0, 1]) == 1
    assert abs(mmd2([0, 1], [0, 2], sigma=1.) + .432332) < 1e-6
    assert abs(js_bias(np.full(1000, 10), np.full(1000, 10)) - .0250) < 1e-4

@settings(max_examples=60, deadline=None)
@given(shares, shares)
def test_histogram_properties(a, b):
    for how in ("mauve", "frontier", "hellinger", "js"):
        assert abs(divergence(a, b, how=how) - divergence(b, a, how=how)) < 1e-9 and -1e-9 <= divergence(a, b, how=how) <= 1 + 1e-9
        assert divergence(a, a, how=how) < 1e-9
    order = np.random.default_rng(0).permutation(6)
    assert abs(mauve(np.array(a)[order], np.array(b)[order]) - mauve(a, b)) < 1e-9
    assert abs(divergence(a, b, how="frontier", base="bits") - frontier_integral(a, b)) < 1e-12  # no unit, no conversion

def test_frontier_is_the_integral():
    from scipy.integrate import quad
    rng = np.random.default_rng(0)
    kl = lambda p, r: (p * np.log(p / r)).sum()
    for _ in range(3):
        p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
        f = lambda l: (lambda r: l * kl(p, r) + (1 - l) * kl(q, r))(l * p + (1 - l) * q)
        assert abs(2 * quad(f, 0, 1)[0] - frontier_integral(p, q)) < 1e-7

def test_mmd_brute_force_and_level():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(9, 2)), rng.normal(size=(6, 2)) + .5
    k = lambda a, b, s: np.exp(-((a - b)**2).sum() / 2 / s**2)
    z = np.vstack([x, y])
    s = np.median([np.linalg.norm(z[i] - z[j]) for i in range(15) for j in range(i)])
    brute = sum(k(a, b, s) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 72 + sum(k(a, b, s) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 30 - 2 * np.mean([k(a, b, s) for a in x for b in y])
    assert abs(mmd2(x, y) - brute) < 1e-12 and abs(mmd2(x, y) - mmd2(y, x)) < 1e-12
    p = [mmd_test(rng.normal(size=(15, 2)), rng.normal(size=(20, 2)), permutations=99, seed=i)["p"] for i in range(200)]
    assert np.mean(np.array(p) <= .05) < .1 and .4 < np.mean(p) < .6
    assert mmd_test(rng.normal(size=(60, 4)), rng.normal(size=(60, 4)) + 1, permutations=199)["p"] == 1 / 200
    assert mmd2(np.ones((4, 2)), np.ones((5, 2))) == 0  # one point, many times

def test_clouds_are_told_apart():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(80, 5)), rng.normal(size=(60, 5))
    assert a_distance(a, b + 10) == 2 and a_distance(a, b) < .5
    assert mauve_of(a, b) > .7 and mauve_of(a, b + 10) < .3 and abs(mauve_of(a, a) - 1) < 1e-9
    values = [mauve_of(a, b + s) for s in (0, 1, 4)]
    assert values == sorted(values, reverse=True) and mauve_of(a, b, seed=3) == mauve_of(a, b, seed=3)

def test_bias_counts_only_filled_buckets():
    rng, p = np.random.default_rng(3), np.r_[np.ones(200) / 200, np.zeros(800)]
    a, b = rng.multinomial(5_000, p), rng.multinomial(9_000, p)
    sim = np.mean([divergence(rng.multinomial(5_000, p), rng.multinomial(9_000, p)) for _ in range(100)])
    assert abs(js_bias(a, b) / sim - 1) < .1

def texts_of(seed=0, n=40):
    rng = np.random.default_rng(seed)
    words = {d: [f"{d}{i}" for i in range(30)] + [f"common{i}" for i in range(10 * (1 + j))] for j, d in enumerate(NAMES)}
    return {d: [" ".join(rng.choice(w, 40)) for _ in range(n)] for d, w in words.items()}

def test_table_has_every_pair_and_its_floor():
    t = distance_table(texts_of())
    assert len(t) == 7 * 12 and (t.groupby("distance")["above"].mean() > 0).all() and np.isfinite(t["value"]).all()
    m = t[t["distance"] == "mmd"].pivot(index="a", columns="b", values="value")
    assert np.allclose(m, m.T, equal_nan=True)
    kl = t[t["distance"] == "kl"].pivot(index="a", columns="b", values="value")
    assert not np.allclose(kl, kl.T, equal_nan=True)
    own = distance_table(texts_of(), hows="mmd", embed=lambda texts: np.array([[len(t), t.count("c")] for t in texts], float))
    assert set(own["distance"]) == {"mmd"}
    sample_distances.register("mean-gap", lambda x, y: float(np.linalg.norm(x.mean(0) - y.mean(0))))
    try: assert len(distance_table(texts_of(), hows=["mean-gap", "js"])) == 24
    finally: sample_distances._items.pop("mean-gap")

def test_gap_and_predictors_find_what_was_planted():
    rng, k = np.random.default_rng(4), 7
    names = [f"d{i}" for i in range(k)]
    at = rng.normal(size=(k, 2))
    true = pd.DataFrame(((at[:, None] - at[None])**2).sum(-1), index=names, columns=names).round(6)
    losses = true.add(rng.uniform(2, 4, k), axis=0)
    gaps = cross_gap(losses[names[::-1]]).round(6) # equal distances are equal ranks
    assert np.allclose(gaps.loc[names, names], true)
    noise = pd.DataFrame(rng.random((k, k)), index=names, columns=names)
    t = predictor_table({"true": true, "root": (true**.5).round(6), "noise": noise, "reverse": -true}, gaps, resamples=300)
    assert np.allclose(t.loc[["true", "root"], ["rho", "lo", "hi"]], 1) and np.allclose(t.loc["reverse", ["rho", "lo", "hi"]].astype(float), -1)
    assert t.loc["noise", "lo"] < 0 < t.loc["noise", "hi"] and (t["pairs"] == 42).all() and t.index[0] in ("true", "root")
    pairs = predictor_table({"noise": noise}, gaps, by="pairs", resamples=300).loc["noise"]
    assert pairs["hi"] - pairs["lo"] < t.loc["noise", "hi"] - t.loc["noise", "lo"]  # pairs share domains: drawing them one by one pretends to know more
    long = pd.concat([true.stack().rename("value").rename_axis(["a", "b"]).reset_index().assign(distance="true")])
    assert predictor_table(long, gaps, resamples=50).loc["true", "rho"] == pytest.approx(1)
    assert np.allclose(predictor_table({"true": true}, gaps.mask(np.eye(k, dtype=bool)), resamples=50)["rho"], 1)  # the diagonal is not used

def planted_pairs(k, rng, related):
    "Domains are points; the gap is their distance, or that of other points, with a part for each domain and noise."
    far = lambda: (lambda z: np.linalg.norm(z[:, None] - z[None], axis=-1))(rng.normal(size=(k, 2)))
    d = far()
    own = rng.normal(size=(2, k, 1)) * .5
    return [pd.DataFrame(o, index=range(k), columns=range(k)) for o in (d, (d if related else far()) + own[0] + own[1].T + .6 * rng.normal(size=(k, k)))]

def test_intervals_keep_their_promise_and_the_permutation_test_its_level():
    wide = ~np.eye(600, dtype=bool)
    goal = np.corrcoef(*(pd.Series(o.to_numpy()[wide]).rank() for o in planted_pairs(600, np.random.default_rng(9), True)))[0, 1]
    rows = []
    for s in range(100):
        rng = np.random.default_rng(s)
        D, G = planted_pairs(6, rng, True)
        t = predictor_table({"d": D}, G, resamples=100, permutations=199, seed=s).iloc[0]
        D, G = planted_pairs(6, rng, False)
        rows.append((t["lo"] <= goal <= t["hi"], t["p"] <= .05, predictor_table({"d": D}, G, resamples=2, permutations=199, seed=s)["p"].iloc[0] <= .05))
    covered, power, level = np.mean(rows, 0)
    assert covered > .88 and power > .5 and level < .13, (covered, power, level)

def test_mantel_counts_all_namings_of_few_domains():
    rng, names = np.random.default_rng(0), list("abcd")
    D, G = (pd.DataFrame(rng.random((4, 4)), names, names) for _ in range(2))
    i, j = np.nonzero(~np.eye(4, dtype=bool))
    rho = lambda o: pd.Series(D.to_numpy()[np.ix_(o, o)][i, j]).corr(pd.Series(G.to_numpy()[i, j]), method="spearman")
    from itertools import permutations
    every = np.array([rho(list(o)) for o in permutations(range(4))])
    t = predictor_table({"d": D, "same": G, "flat": D * 0}, G, resamples=10)
    assert t.loc["d", "p"] == pytest.approx((every >= every[0] - 1e-12).mean()) and t.loc["same", "p"] == pytest.approx(1 / 24) and t.loc["flat", "p"] == 1 and t.loc["flat", "rho"] == 0
    many = pd.DataFrame(rng.random((9, 9)))
    assert predictor_table({"same": many}, many, permutations=99, resamples=10)["p"].iloc[0] == pytest.approx(.01)

def test_lazy_names_stand_in_the_registry():
    assert {"js", "kl", "hellinger", "mauve", "frontier"} <= set(divergences) and divergences["mauve"] is mauve_gap

two = pd.DataFrame([[0., 1], [1, 0]], index=["a", "b"], columns=["a", "b"])
@pytest.mark.parametrize("call, message", [
    (lambda: mauve([1, 2], [1, 2, 3]), "one length"), (lambda: mauve([1, np.nan], [1, 1]), "finite"), (lambda: frontier_integral([0, 0], [1, 1]), "not all zero"),
    (lambda: mmd2(np.ones((3, 2)), [[np.inf, 0], [1, 1]]), "NaN or infinity in 1 of 2 rows"), (lambda: mmd2(np.ones((1, 2)), np.ones((3, 2))), "at least 2 vectors"),
    (lambda: mmd2(np.ones((3, 2)), np.ones((3, 3))), "one length"), (lambda: a_distance(np.ones((3, 2)), np.ones((9, 2))), "at least 5 vectors"), (lambda: mauve_of(np.ones((9, 2)), np.ones((9, 2)), buckets=99), "between 2 and 18"),
    (lambda: distance_table({"a": ["some text"]}), "at least 2 domains"), (lambda: distance_table({"a": ["some text"], "b": []}), "in domain 'b'"), (lambda: distance_table({}), "at least one domain"),
    (lambda: distance_table({"a": ["some text"] * 20, "b": ["other"] * 3}, hows="mmd"), r"fewer in \['b'\]"), (lambda: distance_table(texts_of(), hows="jss"), "did you mean 'js'"),
    (lambda: distance_table(texts_of(), hows="mmd", embed=lambda t: np.full((len(t), 2), np.nan)), "NaN or infinity"),
    (lambda: cross_gap(two.iloc[:1]), "same domains"), (lambda: cross_gap(two * np.nan), "finite losses"), (lambda: cross_gap([[0]]), "table of losses"),
    (lambda: predictor_table({"x": two}, two), "at least 3 domains"), (lambda: predictor_table({}, pd.DataFrame(np.ones((3, 3)), list("aab"), list("aab"))), "same domains"), (lambda: predictor_table({}, pd.DataFrame(np.ones((3, 3))), level=2), "level between 0 and 1"),
    (lambda: predictor_table({"x": pd.DataFrame(np.full((3, 3), np.nan))}, pd.DataFrame(np.ones((3, 3)))), "finite 'x'"), (lambda: predictor_table({"x": two}, pd.DataFrame([[0, 1, np.nan]] * 3)), "finite 'gap'"), (lambda: predictor_table(pd.DataFrame(dict(a=[1])), pd.DataFrame(np.ones((3, 3)))), "columns a, b, distance, value"),
    (lambda: distance_table({"a": ["some text"] * 20, "b": ["other", None] * 10}), "in domain 'b', found NoneType at position 1"), (lambda: distance_table({"a": ["some text"] * 4, "b": ["x"]}, hows="js"), "each half of domain 'b'"), (lambda: mmd_test([[1.]], [[2.], [3.]]), "at least 2 vectors"), (lambda: js_bias([1, 2], [1, 2, 3]), "one length")])
def test_errors(call, message):
    with pytest.raises(DataError, match=message): call()
