"Routes: the algebra of ensembles and posteriors on planted losses, invariances, text centres, tables on untrained models, forgetting on planted rows."
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import t as student
from mixbook.core import DataError
from mixbook.corpus import toy_corpus
from mixbook.decoder import Decoder, ProxyConfig
from mixbook.domains import split_domains
from mixbook.route import centre_routing, compare_routes, ensemble_losses, fit_centres, forgetting, prefix_routing, routers, specialist_losses, true_routing
from mixbook.stream import heldout_batches

CONFIG = ProxyConfig(1, seq_len=24, batch=2)

@pytest.fixture(scope="module")
def toy(tmp_path_factory): return toy_corpus(tmp_path_factory.mktemp("toy"), size=20_000)

@pytest.fixture(scope="module")
def models(): return {d: Decoder(CONFIG, seed=i) for i, d in enumerate(("code", "prose", "tables"))}

def drawn(seed, K=4, n=7, T=9):
    rng = np.random.default_rng(seed)
    return rng.gamma(2., 1., (K, n, T)), rng.dirichlet(np.full(K, .5), n)

def says(text, f, *a, **kw):
    with pytest.raises(DataError, match=text): f(*a, **kw)

# ---------------------------------------------------------------- ensembles

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_ensemble_algebra(seed, top):
    L, w = drawn(seed); e = ensemble_losses(L, w, top=top)
    keep = np.argsort(-w, axis=1, kind="stable")[:, :top]
    for i in range(L.shape[1]):
        p = w[i, keep[i]]/w[i, keep[i]].sum()
        brute = -np.log((p[:, None]*np.exp(-L[keep[i], i])).sum(0))
        assert np.allclose(e[i], brute, atol=1e-12)
        assert (e[i] <= p @ L[keep[i], i] + 1e-12).all()  # Jensen
        assert (e[i] <= L[keep[i], i].max(0) + 1e-12).all() and (e[i] >= L[keep[i], i].min(0) - 1e-12).all()
    order = np.random.default_rng(seed).permutation(4)
    assert np.allclose(ensemble_losses(L[order], w[:, order], top=top), e, atol=1e-12)

def test_one_member_is_hard_routing_exactly():
    L, w = drawn(0)
    assert (ensemble_losses(L.astype(np.float32), w, top=1) == L.astype(np.float32)[w.argmax(1), np.arange(7)].astype(float)).all()
    hot = np.eye(4)[w.argmax(1)]
    for top in (1, 2, None): assert (ensemble_losses(L, hot, top=top) == ensemble_losses(L, w, top=1)).all()  # members of weight zero do nothing
    assert (ensemble_losses(L[[0, 0, 0, 0]], w) - L[0]).max() < 1e-12  # the same model four times

def test_far_losses_do_not_overflow():
    L = np.array([[[2000.]], [[1000.]]])
    assert ensemble_losses(L, [[.5, .5]])[0, 0] == 1000 + np.log(2)

def test_ties_go_to_the_first():
    L = np.arange(3.)[:, None, None]
    assert ensemble_losses(L, [[1/3]*3], top=1)[0, 0] == 0 and ensemble_losses(L[::-1], [[1/3]*3], top=1)[0, 0] == 2
    assert np.isclose(ensemble_losses(L, [[.2, .4, .4]], top=2)[0, 0], -np.log((np.exp(-1) + np.exp(-2))/2))

def test_bad_ensembles():
    L, w = drawn(1)
    says("expected losses", ensemble_losses, L[0], w); says("expected losses", ensemble_losses, L.astype(int), w); says("finite", ensemble_losses, np.where(L > 3, np.inf, L), w)
    says("found shape", ensemble_losses, L, w[:, :2]); says("sum to one", ensemble_losses, L, w/2); says("sum to one", ensemble_losses, L, -w); says("sum to one", ensemble_losses, L, w*np.nan)
    for top in (0, 5): says("from 1 to 4", ensemble_losses, L, w, top=top)

# ---------------------------------------------------------------- routers

def test_posterior_is_calibrated_on_planted_sources():
    "Tokens drawn from known sources with known shares: the posterior is right as often as it says."
    rng = np.random.default_rng(0); K, V, P, n = 3, 6, 5, 20_000; share = np.array([.6, .3, .1]); source = rng.dirichlet(np.ones(V), K)
    k = rng.choice(K, n, p=share); x = (rng.random((n, P, 1)) > source.cumsum(1)[k][:, None]).sum(2).clip(max=V - 1)
    L = -np.log(source)[:, x]; p = prefix_routing(L, prior=share, prefix=P + 1)
    assert np.allclose(p.mean(0), share, atol=.02)
    for lo in (.2, .5, .7, .9):
        some = (p[:, 0] > lo) & (p[:, 0] <= lo + .1); assert abs((k[some] == 0).mean() - p[some, 0].mean()) < .05
    best = (p.argmax(1) == k).mean()
    assert best > (prefix_routing(L, prefix=P + 1).argmax(1) == k).mean() > (prefix_routing(L, prefix=2).argmax(1) == k).mean()

def test_posterior_by_hand_and_invariant():
    L, _ = drawn(2); prior = np.array([.1, .2, .3, .4]); p = prefix_routing(L, prior=prior, prefix=6)
    brute = prior*np.exp(-L[:, :, :5].sum(2)).T; brute /= brute.sum(1, keepdims=True)
    assert np.allclose(p, brute) and np.allclose(prefix_routing(L, prior=prior*7, prefix=6), p)
    assert np.allclose(prefix_routing(L[::-1], prior=prior[::-1], prefix=6), p[:, ::-1])
    assert np.allclose(prefix_routing(L + 1000., prior=prior, prefix=6), p)  # the same for all models, and no underflow
    assert np.allclose(prefix_routing(L[:, :, :5], prior=prior, prefix=6), p)  # what is behind the prefix is not looked at
    assert (prefix_routing(L, prior=[0, 1, 0, 0], prefix=9)[:, 1] == 1).all()
    assert np.allclose(prefix_routing(L, prior=prior, prefix=1), prior)
    for P in (0, 11): says("prefix of 1 to 10", prefix_routing, L, prefix=P)
    for bad in ([1, 2], [0]*4, [1, 1, 1, -1], [1, 1, 1, np.nan]): says("a prior of 4", prefix_routing, L, prior=bad, prefix=3)

def test_centres_find_domains_and_depend_on_temperature(toy):
    c = fit_centres(toy, prefix=24, n_windows=64); held = heldout_batches(toy, seq_len=24, n_windows=30)
    for unit in ("char", "word"):
        f = fit_centres(toy, prefix=24, unit=unit); hit = np.mean([np.mean(np.array(f.domains)[centre_routing([toy.decode(w) for w in x], centres=f).argmax(1)] == d) for d, x in held.items()])
        assert hit > .9, unit
    text = [toy.decode(w) for w in held["code"][:9]]; p = {t: centre_routing(text, centres=c, temperature=t) for t in (.01, .1, 100.)}
    assert (p[.01].max(1) >= p[.1].max(1)).all() and np.allclose(p[100.], 1/3, atol=.01) and (p[.01].argmax(1) == p[.1].argmax(1)).all()
    assert np.allclose(np.linalg.norm(c.centres, axis=1), 1) and np.allclose(c.centres, fit_centres(toy, prefix=24, n_windows=64).centres)
    f = c.embed.transform(text); f /= np.linalg.norm(f, axis=1, keepdims=True)
    brute = np.exp(-((f[:, None] - c.centres)**2).sum(2)/.1); assert np.allclose(brute/brute.sum(1, keepdims=True), p[.1])

def test_centres_of_groups_atlas_and_nothing(toy):
    c = fit_centres(toy, prefix=24); text = ["value = 3", "", "   "]; groups = {"words": ["prose"], "signs": ["tables", "code"]}
    p, q = centre_routing(text, centres=c), centre_routing(text, centres=c, groups=groups)
    assert np.allclose(q[:, 0], p[:, 1]) and np.allclose(q.sum(1), 1) and np.allclose(p[1], 1/3)
    one = centre_routing(text, centres=c, groups={"a": ["prose"], "b": ["code"]})  # without 'tables': closed again
    assert np.allclose(one.sum(1), 1) and np.allclose(one[:, 0]/one[:, 1], p[:, 1]/p[:, 0])
    atlas = split_domains({d: [toy.decode(w) for w in x] for d, x in heldout_batches(toy, seq_len=64, n_windows=20).items()})
    assert np.allclose(centre_routing(text, centres=atlas), atlas.routing(text, temperature=.1).to_numpy())
    says("at least one text", centre_routing, [], centres=c); says("temperature above zero", centre_routing, text, centres=c, temperature=0); says("several texts", centre_routing, "x", centres=c)
    says("did you mean 'prose'", centre_routing, text, centres=c, groups={"a": ["prosa"]}); says("unknown unit", fit_centres, toy, unit="byte"); says("at least 1 token", fit_centres, toy, prefix=0)
    assert (true_routing(["code", "prose"], groups=groups) == [[0, 1], [1, 0]]).all() and true_routing([], groups=groups).shape == (0, 2)

# ---------------------------------------------------------------- models

def test_losses_of_models(toy, models):
    x = np.concatenate(list(heldout_batches(toy, seq_len=24, n_windows=5).values())); L = specialist_losses(models, x)
    assert L.shape == (3, 15, 24) and L.dtype == np.float32 and specialist_losses({"a": Decoder(CONFIG).double()}, x[:1]).dtype == np.float64
    for b in (1, 4, 100): assert np.allclose(specialist_losses(models, x, batch=b), L, atol=1e-5)
    assert np.allclose(specialist_losses(dict(reversed(models.items())), x), L[::-1], atol=1e-6) and np.allclose(specialist_losses(models, x[:, :13]), L[:, :, :12], atol=1e-5)
    import torch
    with torch.no_grad(): logp = torch.log_softmax(models["prose"](torch.from_numpy(x[:2, :-1].astype(np.int64))), -1)
    assert np.allclose(-np.take_along_axis(logp.numpy(), x[:2, 1:, None].astype(np.int64), 2)[..., 0], L[1, :2], atol=1e-5)

def test_losses_that_do_not_fit(toy, models):
    x = heldout_batches(toy, seq_len=24, n_windows=5)["code"]
    for bad in (x[0], x[:0], x.astype(float)): says("whole numbers", specialist_losses, models, bad)
    says("2 to 25", specialist_losses, models, x[:, :1]); says("2 to 25", specialist_losses, models, np.zeros((2, 26), int)); says("another tokenizer", specialist_losses, models, x.astype(int) - 300)
    says("one shape", specialist_losses, {**models, "z": Decoder(ProxyConfig(2, seq_len=24))}, x); says("a stack of 2", specialist_losses, {"s": Decoder(CONFIG, 2, [0, 1])}, x)
    says("at least one entry", specialist_losses, {}, x); says("found list", specialist_losses, list(models.values()), x); says("Proxy or a Decoder for 'a', found str", specialist_losses, {"a": "x"}, x)
    sick = Decoder(CONFIG); sick.embed.weight.data[3] = float("inf"); says("model 'sick'", specialist_losses, {**models, "sick": sick}, x); says("`batch`", specialist_losses, models, x, batch=0)

def test_table_is_invariant_and_adds_up(toy, models):
    kw = dict(prefix=12, n_windows=20, top=[1, 2, 3]); t = compare_routes(models, models["prose"], toy, **kw)
    back = compare_routes(dict(reversed(models.items())), models["prose"], toy, **kw); pd.testing.assert_frame_equal(t, back)
    r = t.set_index(["router", "top"]); w = toy.natural
    assert list(r.index) == [("generalist", 1), ("domain", 1), *((k, n) for k in ("centre", "prefix") for n in (1, 2, 3))]
    assert np.allclose(r["loss"], sum(w[d]*r[f"loss/{d}"] for d in toy.domains)) and np.allclose(r["difference"], r["loss"] - r.loc[("generalist", 1), "loss"])
    assert (t["lo"].dropna() <= t["difference"][1:]).all() and (t["hi"].dropna() >= t["difference"][1:]).all()
    assert r.loc[("domain", 1), "loss/prose"] == r.loc[("generalist", 1), "loss/prose"] and r.loc[("domain", 1), "accuracy"] == 1
    assert np.allclose(r["experts"], [1, 1, 1, 2, 3, 1 + 2*11/24, 2 + 11/24, 3]) and (r["windows"] == 60).all()
    same = compare_routes(dict.fromkeys(models, models["code"]), models["code"], toy, **kw)  # equal models: no way differs
    assert np.allclose(same["difference"], 0, atol=1e-7) and np.allclose(same["loss"], same["loss"][0])

def test_interval_is_that_of_windows(toy, models):
    t = compare_routes(models, models["prose"], toy, prefix=5, n_windows=12, by=[]).set_index("router"); held = heldout_batches(toy, seq_len=24, n_windows=12); v, m = [], 0
    for d, x in held.items():
        L = specialist_losses({k: models[k] for k in (d, "prose")}, x)[:, :, 4:].astype(float).mean(2); diff = (L[0] - L[-1]); m += toy.natural[d]*diff.mean(); v.append(toy.natural[d]**2*diff.var(ddof=1)/len(x))
    df = sum(v)**2/sum(o**2/11 for o in v); v = sum(v)
    assert np.isclose(t.loc["domain", "difference"], m, atol=1e-6) and np.isclose(t.loc["domain", "se"], v**.5, atol=1e-6)
    assert np.isclose(t.loc["domain", "hi"] - t.loc["domain", "difference"], student.ppf(.975, df)*v**.5, rtol=1e-3) and 11 <= df <= 33

def test_groups_weights_and_own_router(toy, models):
    two = {"words": models["prose"], "rest": models["code"]}; groups = {"words": "prose", "rest": ["code", "tables"]}
    r = compare_routes(two, models["prose"], toy, groups=groups, prefix=12, n_windows=10, weights={"prose": .5, "code": .25, "tables": .25}).set_index(["router", "top"])
    assert np.isclose(r.loc[("generalist", 1), "loss"], r.filter(like="loss/").loc[("generalist", 1)] @ [.25, .5, .25])
    routers.register("rest", lambda prior: np.tile([1., 0.], (30, 1)), replace=True); routers.register("bad", lambda texts: np.ones((len(texts), 2)), replace=True); routers.register("asks", lambda pixels: 0, replace=True)
    go = lambda by: compare_routes(two, models["prose"], toy, groups=groups, prefix=12, n_windows=10, by=by, top=[1])
    try:
        assert np.isclose(go("rest").set_index("router").loc["rest", "accuracy"], 1 - toy.natural["prose"])
        says("sum to one", go, "bad"); says("input of router 'asks'", go, "asks")
    finally:
        for k in ("rest", "bad", "asks"): del routers._items[k]
    seen = []; routers.register("spy", lambda losses, texts: (seen.append((losses.shape, [len(o) for o in texts])), np.full((30, 2), .5))[1], replace=True)
    try: assert go("spy")["experts"].iloc[-1] > 1 and seen[0][0] == (2, 30, 11) and max(seen[0][1]) <= 12  # nothing behind the prefix
    finally: del routers._items["spy"]
    bare = compare_routes(models, models["prose"], toy, by="prefix", prefix=1, n_windows=10, weights={"code": .2, "prose": .2, "tables": .6}).set_index(["router", "top"])
    assert np.isclose(bare.loc[("prefix", 1), "accuracy"], .6)  # no loss yet: the prior alone
    half = compare_routes({k: models[k] for k in ("code", "prose")}, models["prose"], toy, weights={"code": .5, "prose": .5}, prefix=12, n_windows=10)
    assert "loss/tables" not in half and half["windows"].eq(20).all()

def test_comparisons_that_do_not_fit(toy, models):
    go = lambda s=models, **kw: compare_routes(s, models["code"], toy, **{"n_windows": 4, "prefix": 8, **kw})
    for P in (0, 25): says("prefix of 1 to 24", go, prefix=P)
    says("at least two specialists", go, {"code": models["code"]}); says("at least two specialists", go, list(models.values())); says("did you mean 'centre'", go, by="center")
    says("did you mean 'prose'", go, {**models, "prosa": models["prose"]}); says("none for 'tables'", go, {k: models[k] for k in ("code", "prose")})
    says("'tables' of weight", go, {k: models[k] for k in ("code", "prose")}, groups={"code": "code", "prose": "prose"}); says("from 1 to 3", go, top=[4]); says("must sum to 1", go, weights={"code": .4})
    sick = Decoder(CONFIG); sick.embed.weight.data[:] = float("nan"); says("model 'prose'", go, {**models, "prose": sick})

# ---------------------------------------------------------------- forgetting

def planted(seeds=(0, 1, 2), replay=(0., .01), noise=.02, b=.3, spare=.5):
    "Rows of branches whose own loss falls by a tenth and whose other losses rise by `b` with each step of D′."
    rng, rows = np.random.default_rng(0), []
    for s in seeds:
        start = dict(zip("xyz", 2 + rng.normal(size=3)))
        for d in "xyz":
            for p in replay:
                for j in range(4):
                    loss = {k: v + (0 if j == 0 else (-.1*j if k == d else b*j*(spare if p else 1)) + noise*rng.normal()) for k, v in start.items()}
                    rows.append(dict(run=f"{s}{d}{p}", step=10 + j, seed=s, parent=f"trunk{s}", domain=d, replay=p, n_params=100, tokens=1000 + 100*j, split_tokens=100*j, **{f"loss/{k}": v for k, v in loss.items()}, **{f"loss/{k}_se": .1 for k in loss}))
    return pd.DataFrame(rows)

def test_forgetting_recovers_what_was_planted():
    f = forgetting(planted()).set_index(["replay", "split_tokens"])
    assert len(f) == 8 and (f["seeds"] == 3).all() and (f.xs(0, level="split_tokens")[["own", "other", "own_lo", "other_hi"]] == 0).all(axis=None)
    for p in (0., .01):
        for j in (1, 2, 3):
            r = f.loc[(p, 100*j)]; assert abs(r["own"] + .1*j) < .05 and abs(r["other"] - .3*j*(.5 if p else 1)) < .05 and r["other_lo"] < r["other"] < r["other_hi"]
    assert abs(f.loc[(.01, 300), "spared"] - .45) < .05 and f.loc[0., "spared"].isna().all()

def test_forgetting_does_not_depend_on_order_or_on_where_the_trunk_stands():
    rows = planted(); want = forgetting(rows); pd.testing.assert_frame_equal(forgetting(rows.sample(frac=1, random_state=0)), want)
    first = rows[rows["split_tokens"] == 0].drop_duplicates("seed"); trunk = first.assign(run=first["parent"], parent="", domain="", replay=0.)
    bare = pd.concat([rows[rows["split_tokens"] > 0], trunk]); pd.testing.assert_frame_equal(forgetting(bare), want[want["split_tokens"] > 0].reset_index(drop=True))
    assert np.allclose(forgetting(rows, each=True).groupby(["replay", "split_tokens"])["other"].mean(), want.set_index(["replay", "split_tokens"])["other"])
    one = forgetting(planted(seeds=(0,), replay=(0.,))); assert one["other_lo"].isna().all() and one["spared"].isna().all()
    later = planted(b=.1).assign(run=lambda t: "later" + t["run"], tokens=lambda t: t["tokens"] + 5000).assign(**{"loss/x": lambda t: t["loss/x"] - 1})
    twice = forgetting(pd.concat([rows, later])); assert len(twice) == 16  # two states of one trunk
    pd.testing.assert_frame_equal(twice[twice["trunk_tokens"] == 1000].reset_index(drop=True), want); assert twice.query("split_tokens == 300 and replay == 0")["other"].round(1).tolist() == [.9, .3]
    only = forgetting(rows, domains=["x", "y"], groups={"x": ["x"], "y": ["y"], "z": ["x"]}); assert len(only) == len(want)
    both = forgetting(rows[rows["domain"] == "x"], groups={"x": ["x", "y"]}); assert (both["own"].iloc[1:4] > want["own"].iloc[1:4]).all()

def test_forgetting_of_bad_tables():
    rows = planted()
    says("missing column 'replay'", forgetting, rows.drop(columns="replay")); says("rows of branches", forgetting, rows.assign(domain=""))
    says("Put 0 among", forgetting, rows[rows["split_tokens"] > 0]); says("unknown domain of branch 'x'", forgetting, rows.drop(columns="loss/x")); says("unknown domain with a loss 'xx'", forgetting, rows, domains=["xx"])
    says("beside those of branch", forgetting, rows, groups={k: list("xyz") for k in "xyz"}); says("unknown group 'z'", forgetting, rows, groups={"x": "x", "y": "y"})
    says("finite losses", forgetting, rows.assign(**{"loss/x": rows["loss/x"].where(rows["step"] < 12)})); says("same branches for each seed", forgetting, rows[(rows["seed"] != 1) | (rows["domain"] != "y")])
    says("one row for each", forgetting, pd.concat([rows, rows.assign(run=rows["run"] + "cool")]))
