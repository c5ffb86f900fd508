"Every registered law is recovered from planted runs, its intervals cover, and bad tables are refused with one clear line."
import itertools, json, warnings
import numpy as np, pandas as pd, pytest
from mixbook.core import DataError, ExtrapolationWarning, FitWarning
from mixbook.formula import law_forms, law_value
from mixbook.laws import Law, _variables, fit_law, fit_laws
from mixbook.validate import holdout_by_scale, planted_runs

pytestmark = pytest.mark.filterwarnings("ignore::mixbook.core.ExtrapolationWarning")

# ---------------------------------------------------------------- planted tables, one per law

def grid(**axes): return pd.DataFrame(list(itertools.product(*axes.values())), columns=list(axes))
def shares(n, k, seed=0, floor=.03): return floor + (1 - k*floor)*np.random.default_rng(seed).dirichlet(np.ones(k), n)
def mixtures(n, k=3, **axes):
    w = shares(n, k); rows = grid(m=range(n), **axes) if axes else pd.DataFrame(dict(m=range(n)))
    return pd.concat([rows.drop(columns="m")] + [pd.Series(w[rows.m, i], name=f"w/{d}") for i, d in enumerate("abcdefg"[:k])], axis=1)

SIZES, TOKENS = np.geomspace(2e7, 2e9, 6), np.geomspace(1e9, 1e11, 7)
ND = dict(n_params=SIZES, tokens=TOKENS)
chin = dict(E=1.8, A=480., B=2100., alpha=.35, beta=.37)
split = grid(n_params=np.geomspace(3e7, 3e9, 4), tokens=np.geomspace(5e8, 3.2e10, 6), split_tokens=[1e7, 5e7, 2e8, 1e9, 4e9])

PLANTED = {
    "chinchilla": (chin, grid(**ND), {}),
    "chinchilla-tied": (dict(E=1.8, A=480., B=1500., alpha=.35), grid(**ND), {}),
    "kaplan": (dict(N_c=6.4e13, D_c=1.8e13, alpha_N=.076, alpha_D=.103), grid(**ND), {}),
    "overtraining": (dict(E=1.6, a=150., b=900., eta=.3), grid(**ND), {}),
    "repeated": (dict(R_D=12., R_N=5.), grid(n_params=np.geomspace(1e8, 5e9, 5), tokens=[5e9, 2e10, 8e10], unique_tokens=[1e9, 4e9]), {}),
    "kumar": (dict(chin, gamma_w=2.2), grid(n_params=SIZES, tokens=TOKENS[::2], bits=[2, 3, 4, 6, 8]), {}),
    "kumar-ptq": (dict(chin, C_T=.06, gamma_D=.5, gamma_N=.34, gamma_post=.6), grid(n_params=SIZES, tokens=TOKENS, bits=[3, 4, 5, 6]), {}),
    "chen": (dict(chin, k=.16, gamma_N=.22, gamma_D=.08, gamma_G=.8), grid(n_params=SIZES, tokens=TOKENS[::2], group_size=[32, 128, 512, 4096]), {}),
    "quest": (dict(E=1.5, A=300., B=2100., alpha=.3, beta=.37, eff=[.15, .45, .7, 1.]), grid(n_params=SIZES, tokens=TOKENS[::2], precision=["2", "3", "4", "bf16"]), dict(fixed={"eff[bf16]": 1.})),
    "fp-qat": (dict(chin, theta=.3, kappa=1.1, phi=1.5, chi=.6, psi=.1, omega=.35, lam=.8, mu=.7, nu=.08, xi=.3, rho=.12),
               grid(n_params=np.geomspace(3e7, 1e9, 4), tokens=np.geomspace(1e9, 3e10, 4), bits=[1, 2, 4, 6], f=[.05, .1, .2, .35, .5, .7]).assign(qat_tokens=lambda d: d.f*d.tokens).drop(columns="f"), {}),
    "ptq": (dict(C=.02, gamma_D=.52, gamma_N=.23, gamma_P=5.5), grid(n_params=SIZES, tokens=TOKENS, bits=[2, 3, 4]), {}),
    "ptq-loss": (dict(N_c=4.74e19, D_c=7.63e10, a_N=.045, a_D=.399, C=.017, gamma_D=.5251, gamma_N=.2261, gamma_P=5.4967), grid(n_params=SIZES, tokens=TOKENS, bits=[2, 3, 4]), {}),
    "log-linear": (dict(c=2., t=[-1.2, .1, .3]), mixtures(30), {}),
    "mixture": (dict(E=2., C=[1.1, .6, .8], g=[.4, .2, .3]), mixtures(40), {}),
    "effective-data": (dict(E=1.5, C=[2.5, .4, .8], g=.5), mixtures(30), {}),
    "bimix": (dict(B=30., C=2., alpha=.08, beta=.2), grid(**{"w/own": [.03, .1, .2, .4, .8], "tokens": TOKENS}), {}),
    "additive": (dict(E=1., C=[1.1, .6, .8], g=[.4, .2, .3], A=300., alpha=.33, B=900., beta=.34), mixtures(12, n_params=SIZES[::2], tokens=TOKENS[::2]), {}),
    "joint": (dict(E=1., C=[1.1, .6, .8], g=[.4, .2, .3], CA=[250., 400., 300.], gA=1.05, alpha=.33, CB=[900., 500., 1200.], gB=.95, beta=.34), mixtures(12, n_params=SIZES[::2], tokens=TOKENS[::2]), {}),
    "split-pooled": (dict(E=1.5, A=300., alpha=.33, B=1200., beta=.35, tau=.15), split, {}),
    "split-pooled-concave": (dict(E=1.5, A=300., alpha=.33, B=1200., beta=.35, tau=30., kappa=.7), split, {}),
    "split-additive": (dict(E=1.2, A=300., alpha=.33, B=400., beta=.28, C=20., gamma=.2, d=2e8), split, {}),
    "split-product": (dict(E=1.2, A=300., alpha=.33, B=6000., beta=.3, gamma=.1, d=2e8), split, {}),
    "split-floored": (dict(E=1.2, A=300., alpha=.33, delta=.3, B=100., beta=.28, gamma=.15, d=2e8), split, {}),
    "injection-target": (dict(E=1., A=60., alpha=.1, beta=.12), grid(n_params=SIZES, split_tokens=np.geomspace(3e5, 3e7, 6)), {}),
    "injection-forgetting": (dict(A=.2, alpha=.2, beta=.2, B=900.), grid(n_params=SIZES, split_tokens=np.geomspace(3e5, 3e7, 5), replay=[0, .001, .005, .05]).assign(start_loss=lambda d: 2 + 300/d.n_params**.33), {}),
    "filter-rate": (dict(a=4e-5, b=.25), grid(flops=np.geomspace(1e19, 1e23, 12)), {}),
}

def at(law, params, frame):
    data, _ = _variables(frame, law_forms[law], law_forms[law].data)
    return law_value(law, params, **data)

def test_every_law_is_planted():
    missing = [n for n in law_forms if n not in PLANTED and n != "loss-to-accuracy" and not n.startswith("planted")]
    assert not missing, f"laws without a recovery test: {missing}"

@pytest.mark.parametrize("law", list(PLANTED))
def test_recovers_planted_predictions(law):
    "0.3 % noise: predictions within 0.5 %; 90 % intervals of predictions cover 85 to 95 % over 200 draws."
    params, design, kw = PLANTED[law]
    draws = 200; runs = planted_runs(law, params, design, noise=.003, draws=draws, seed=1); cols = [f"loss/{i}" for i in range(draws)]
    big = sum(np.size(v) for v in params.values()) > 12
    fits = fit_laws(runs, law, cols, n_starts=2 if big else 4, start=params if big else None, **kw)
    truth = at(law, params, design); said = [f.predict(design) for f in fits.values()]
    error = np.abs(np.stack([s["mean"] for s in said])/truth - 1); inside = np.stack([(s.lo <= truth) & (truth <= s.hi) for s in said])
    rms, cover = float(np.sqrt((error**2).mean())), float(inside.mean())
    print(f"\n{law}: rms error {100*rms:.3f} %, 95th percentile {100*np.quantile(error, .95):.3f} %, coverage {cover:.3f}")
    assert np.quantile(error, .95) < .005
    assert .85 <= cover <= .95

@pytest.mark.parametrize("shape, noise, objective", [((3, 3), .003, "huber"), ((3, 3), .03, "huber"), ((4, 4), .01, "huber"), ((6, 6), .01, "huber"), ((3, 3), .003, "absolute"), ((4, 4), .003, "squares")])
def test_intervals_do_not_collapse_with_few_rows(shape, noise, objective):
    "Curves and single runs, from nine rows up and with noise far beyond delta: coverage of 90 % at least 0.85."
    design = grid(n_params=np.geomspace(2e7, 2e9, shape[0]), tokens=np.geomspace(1e9, 1e11, shape[1])); runs = planted_runs("chinchilla", chin, design, noise=noise, draws=100, seed=5)
    fits = fit_laws(runs, "chinchilla", [f"loss/{i}" for i in range(100)], objective=objective, n_starts=3)
    truth = at("chinchilla", chin, design); new = truth*np.exp(noise*np.random.default_rng(9).standard_normal((100, len(design)))); inside = lambda p, y: ((p.lo <= y) & (y <= p.hi)).mean()
    curve = np.mean([inside(f.predict(design), truth) for f in fits.values()]); single = np.mean([inside(f.predict(design, of="run"), y) for f, y in zip(fits.values(), new)])
    assert .85 <= curve <= .99 and .85 <= single <= .99

def test_bootstrap_covers():
    runs = planted_runs("chinchilla", chin, noise=.003, draws=40, seed=2); fits = fit_laws(runs, "chinchilla", [f"loss/{i}" for i in range(40)], bootstrap=200, n_starts=3)
    truth = at("chinchilla", chin, runs); assert .8 <= np.mean([((p := f.predict(runs)).lo <= truth) & (truth <= p.hi) for f in fits.values()]) <= .97

def test_a_long_law_is_found_without_the_truth_as_a_start():
    params, design, kw = PLANTED["joint"]; runs = planted_runs("joint", params, design, noise=.003, seed=4)
    law = fit_law(runs, "joint", **kw); best = fit_law(runs, "joint", start=params, n_starts=1, **kw); assert law.objective <= 1.01*best.objective

def test_recovers_an_accuracy_curve():
    x = np.linspace(.3, 2, 25); truth = dict(c1=.6, c2=.25, k=-5., L0=.9)
    rng = np.random.default_rng(0); inside = []
    y = law_value("loss-to-accuracy", truth, x=x)
    for _ in range(40):
        law = fit_law(pd.DataFrame(dict(loss=x, accuracy=y + .003*rng.standard_normal(25))), "loss-to-accuracy", loss="accuracy", on="loss", objective="squares")
        p = law.predict(pd.DataFrame(dict(loss=x))); inside.append(((p.lo <= y) & (y <= p.hi)).mean()); assert np.abs(p["mean"] - y).max() < .02
    assert .8 <= np.mean(inside) <= .97

@pytest.mark.parametrize("objective, on", list(itertools.product(("huber", "squares", "absolute"), ("log", "loss"))))
def test_every_objective_finds_the_truth_without_noise(objective, on):
    runs = planted_runs("chinchilla", chin, noise=0)
    law = fit_law(runs, "chinchilla", objective=objective, on=on)
    assert np.abs(law.predict(runs)["mean"]/runs.loss - 1).max() < 1e-6

# ---------------------------------------------------------------- arguments

@pytest.fixture(scope="module")
def runs(): return planted_runs("chinchilla", chin, noise=.003, seed=3)

def test_many_targets_equal_one_by_one(runs):
    two = runs.assign(**{"loss/a": runs.loss, "loss/b": runs.loss*1.1}).drop(columns="loss")
    both = fit_laws(two, "chinchilla", ["a", "loss/b"])
    for l in ("loss/a", "loss/b"): assert np.allclose(list(both[l].params.values()), list(fit_law(two, "chinchilla", loss=l).params.values()), rtol=2e-3)

def test_missing_cells_leave_only_their_loss(runs):
    two = runs.assign(other=runs.loss.where(runs.index != 4)); laws = fit_laws(two, "chinchilla", ["loss", "other"])
    assert laws["loss"].n_rows == len(runs) and laws["other"].n_rows == len(runs) - 1 == len(laws["other"].rows)

def test_weights_are_counts(runs):
    w = np.ones(len(runs)); w[:5] = 3
    a = fit_law(runs, "chinchilla", weights=w); b = fit_law(pd.concat([runs, runs.head(5), runs.head(5)], ignore_index=True), "chinchilla")
    assert np.isclose(a.objective, b.objective, rtol=1e-6) and np.allclose(a.flat, b.flat, rtol=1e-2)
    zero = fit_law(runs.assign(w=(runs.index > 2)*1.), "chinchilla", weights="w"); assert zero.n_rows == len(runs) - 3

def test_fixed_and_tied(runs):
    law = fit_law(runs, "chinchilla", fixed=dict(E=1.8, alpha=.35)); assert law.params["E"] == pytest.approx(1.8) and law.params["alpha"] == pytest.approx(.35)
    assert np.isnan(law.conf_int().loc["E", "lo"]) and law.dof == len(runs) - 3
    with pytest.raises(DataError, match="cannot fix 'gamma'"): fit_law(runs, "chinchilla", fixed=dict(gamma=1))

def test_clusters_are_resampled_together(runs):
    copies = pd.concat([runs.assign(run=i) for i in range(1)] + [runs.assign(run=i) for i in range(1, 4)], ignore_index=True)
    copies["run"] = np.tile(np.arange(len(runs)), 4)     # every run logged four times
    naive = fit_law(copies, "chinchilla", bootstrap=300); honest = fit_law(copies, "chinchilla", bootstrap=300, cluster="run")
    width = lambda l: np.diff(l.bootstrap["alpha"].quantile([.05, .95]))[0]
    assert width(honest) > 1.5*width(naive)

def test_travels_as_json(runs, tmp_path):
    law = fit_law(runs, "chinchilla", bootstrap=20); law.to_json(tmp_path/"law.json"); again = Law.from_json(tmp_path/"law.json")
    assert again.params == law.params and np.allclose(again.predict(runs), law.predict(runs)) and json.loads((tmp_path/"law.json").read_text())["law"] == "chinchilla"
    (tmp_path/"odd.json").write_text((tmp_path/"law.json").read_text().replace('"law": "chinchilla"', '"law": "chinchila"'))
    with pytest.raises(DataError, match="did you mean 'chinchilla'"): Law.from_json(tmp_path/"odd.json").predict(runs)

def test_two_basins_are_both_reported():
    d = pd.DataFrame(dict(n_params=np.tile(np.geomspace(1e8, 1e10, 6), 6), tokens=np.repeat(np.geomspace(1e9, 1e11, 6), 6), unique_tokens=2e9))
    law = fit_law(planted_runs("repeated", dict(R_D=12., R_N=5.), d), "repeated", n_starts=16)
    assert law.basins.objective.is_monotonic_increasing and law.basins.objective.iloc[0] == law.objective

def test_profile_agrees_with_the_covariance_where_the_law_is_well_determined(runs):
    law = fit_law(runs, "chinchilla", objective="squares"); p = law.profile("beta"); ci = law.conf_int().loc["beta"]
    assert not (p.open_below or p.open_above) and abs(np.log((p.hi - p.lo)/(ci.hi - ci.lo))) < .35
    with pytest.raises(DataError, match="did you mean 'alpha'"): law.profile("alhpa")

def test_bounds_are_kept():
    x = np.linspace(.3, 2, 25); y = law_value("loss-to-accuracy", dict(c1=.9, c2=.25, k=-5., L0=.9), x=x)
    with pytest.warns(FitWarning, match="bound"): law = fit_law(pd.DataFrame(dict(loss=x, accuracy=1.3*y)), "loss-to-accuracy", loss="accuracy", on="loss", objective="squares")
    assert law.params["c1"] <= 1 + 1e-9 and law.params["c2"] <= 1 + 1e-9

def test_a_prior_is_resampled_too(runs):
    few = runs.iloc[::3]; kw = dict(prior=dict(alpha=(.30, .02))); width = lambda l: np.diff(l.conf_int().loc["alpha"])[0]
    assert .4 < width(fit_law(few, "chinchilla", bootstrap=300, **kw))/width(fit_law(few, "chinchilla", **kw)) < 2.5

def test_weights_are_precisions():
    design = grid(**ND); sd = np.where(design.n_params < 1e8, .02, .002); rng = np.random.default_rng(0); truth = at("chinchilla", chin, design)
    runs = design.assign(**{f"loss/{i}": truth*np.exp(sd*rng.standard_normal(len(design))) for i in range(100)})
    fits = fit_laws(runs, "chinchilla", [f"loss/{i}" for i in range(100)], objective="squares", weights=1/sd**2*1e-6, n_starts=3)
    assert .85 <= np.mean([((p := f.predict(design)).lo <= truth) & (truth <= p.hi) for f in fits.values()]) <= .95

def test_profile_of_what_vanishes_and_of_absolute_errors(runs):
    low = fit_law(planted_runs("chinchilla", {**chin, "E": 1e-3}, noise=.01, seed=2), "chinchilla"); p = low.profile("E"); assert p.open_below and p.hi < 1
    law = fit_law(runs, "chinchilla", objective="absolute"); p, ci = law.profile("beta"), law.conf_int().loc["beta"]
    assert abs(np.log((p.hi - p.lo)/(ci.hi - ci.lo))) < 1

# ---------------------------------------------------------------- bad tables

BAD = [
    ("not a table", lambda r: r.to_dict(), {}, "expected a DataFrame of runs, found dict"),
    ("too few", lambda r: r.head(4), {}, "expected at least 6 runs"),
    ("empty", lambda r: r.head(0), {}, "expected"),
    ("one size", lambda r: r[r.n_params == r.n_params.iloc[0]], {}, "n_params has one value only"),
    ("one length", lambda r: r[r.tokens == r.tokens.iloc[0]].loc[lambda d: d.index.repeat(2)], {}, "tokens has one value only"),
    ("isoflop only", lambda r: r.assign(tokens=1e20/r.n_params), dict(tied=dict(beta="alpha"), fixed=dict()), None),
    ("zero loss", lambda r: r.assign(loss=0.), {}, "expected positive losses"),
    ("negative loss", lambda r: r.assign(loss=-r.loss), {}, "expected positive losses"),
    ("infinite loss", lambda r: r.assign(loss=r.loss.where(r.index != 7, np.inf)), {}, "found infinity in row 7"),
    ("no finite loss", lambda r: r.assign(loss=np.nan), {}, "expected"),
    ("text", lambda r: r.assign(loss="low"), {}, "expected"),
    ("zero tokens", lambda r: r.assign(tokens=r.tokens.where(r.index != 3, 0)), {}, "expected positive tokens in 'tokens', found 0 in row 3"),
    ("negative size", lambda r: r.assign(n_params=-r.n_params), {}, "expected positive parameters"),
    ("mixed corpora", lambda r: r.assign(corpus_hash=["a", "b"]*18), {}, "one corpus_hash, found 2"),
    ("mixed tokenizers", lambda r: r.assign(tokenizer=["a", "b"]*18), {}, "one tokenizer, found 2"),
    ("unknown column", lambda r: r.rename(columns=dict(tokens="token")), {}, "did you mean 'token'"),
    ("unknown loss", lambda r: r, dict(loss="los"), "did you mean 'loss'"),
    ("negative weights", lambda r: r, dict(weights=-np.ones(36)), "weights of at least zero"),
    ("weights of another table", lambda r: r, dict(weights=np.ones(7)), "expected 36 weights"),
    ("unknown objective", lambda r: r, dict(objective="hubre"), "did you mean 'huber'"),
    ("unknown residual", lambda r: r, dict(on="logs"), "did you mean 'log'"),
    ("unknown variable", lambda r: r, dict(columns=dict(M="tokens")), "unknown variable"),
    ("misspelt tie", lambda r: r, dict(tied=dict(bta="alpha")), "did you mean 'beta'"),
    ("tied to nothing", lambda r: r, dict(tied=dict(beta="alfa")), "did you mean 'alpha'"),
    ("tied to itself", lambda r: r, dict(tied=dict(beta="beta")), "found itself"),
    ("misspelt prior", lambda r: r, dict(prior=dict(gamma=(1, 1))), "in `prior`"),
    ("prior without sd", lambda r: r, dict(prior=dict(alpha=.3)), "expected (mean, sd)"),
    ("prior of sd zero", lambda r: r, dict(prior=dict(alpha=(.3, 0))), "the sd of alpha"),
    ("misspelt start", lambda r: r, dict(start=dict(gamma=1)), "in `start`"),
    ("start that is no number", lambda r: r, dict(start=dict(E=np.nan)), "expected finite numbers"),
    ("negative parameter", lambda r: r, dict(fixed=dict(E=-1)), "expected finite numbers from 0"),
    ("text for a parameter", lambda r: r, dict(fixed=dict(E="low")), "expected numbers"),
    ("everything held", lambda r: r, dict(fixed=chin), "nothing is left to fit"),
    ("negative bootstrap", lambda r: r, dict(bootstrap=-5), "`bootstrap`"),
    ("delta of zero", lambda r: r, dict(delta=0), "`delta`"),
    ("no starts", lambda r: r, dict(n_starts=0), "`n_starts`"),
    ("infinite weights", lambda r: r, dict(weights=np.full(36, np.inf)), "finite weights"),
    ("two columns of one name", lambda r: pd.concat([r, r[["loss"]]], axis=1), {}, "'loss' twice"),
    ("half unknown corpora", lambda r: r.assign(dataset=["a"]*18 + [None]*18), {}, "one dataset, found 2"),
    ("several bits", lambda r: r.assign(bits=[2, 16]*18), {}, "one bits, found 2"),
    ("no cluster column", lambda r: r, dict(cluster="run"), "expected a column 'run'"),
    ("rows without a cluster", lambda r: r.assign(run=r.index.to_series().where(r.index > 3)), dict(cluster="run"), "4 rows without"),
]

@pytest.mark.parametrize("name, make, kw, message", BAD, ids=[b[0] for b in BAD])
def test_bad_tables_are_refused(name, make, kw, message, runs):
    if message is None: assert fit_law(make(runs), "chinchilla", **kw).n_rows == 36; return
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(DataError) as e: fit_law(make(runs), "chinchilla", **kw)
    assert message in str(e.value) and "\n" not in str(e.value)

def test_unknown_law(runs):
    with pytest.raises(DataError, match="did you mean 'chinchilla'"): fit_law(runs, "chinchila")

def test_failed_runs_are_left_out(runs): assert fit_law(runs.assign(status=["failed"]*3 + ["done"]*33), "chinchilla").n_rows == 33

def test_a_changed_form_is_not_taken_for_the_registered_one(runs):
    import dataclasses
    with pytest.raises(DataError, match="registered law"): fit_law(runs, dataclasses.replace(law_forms["chinchilla"], fixed=dict(E=1.)))

def test_groups_are_names_not_types():
    params, design, kw = PLANTED["quest"]; d = planted_runs("quest", params, design).assign(precision=lambda r: r.precision.map({"2": 2, "3": 3, "4": 4, "bf16": 16}))
    law = fit_law(d, "quest", fixed={"eff[16]": 1.}); assert len(law.predict(d.assign(precision=d.precision.astype(float)))) == len(d)
    with pytest.raises(DataError, match="expected a group in every row"): fit_law(d.assign(precision=d.precision.where(d.index > 0)), "quest")

def test_what_predict_refuses(runs):
    law = fit_law(runs, "chinchilla"); f = lambda **kw: pd.DataFrame({"n_params": [1e9], "tokens": [1e10], **kw})
    for bad, message in ((f(tokens=[0]), "expected positive numbers"), (f(tokens=[-1e9]), "expected positive"), (f().head(0), "at least one row"), ({}, "expected a DataFrame")):
        with pytest.raises(DataError, match=message): law.predict(bad)
    with pytest.warns(ExtrapolationWarning): law.predict(pd.DataFrame(dict(n_params=[1e9, 1e9], tokens=[np.nan, 1e16])))

def test_a_line_of_runs_is_no_plane(runs):
    line = planted_runs("chinchilla", chin, pd.DataFrame(dict(n_params=np.geomspace(1e7, 1e10, 12), tokens=20*np.geomspace(1e7, 1e10, 12))), noise=.003)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning); law = fit_law(line, "chinchilla")
    with pytest.warns(ExtrapolationWarning, match="tokens per parameter"): law.predict(pd.DataFrame(dict(n_params=[1e9], tokens=[1e9])))

def test_tokens_in_billions_are_suspicious(runs):
    with pytest.warns(FitWarning, match="looks like units"): fit_law(runs.assign(tokens=runs.tokens/1e9), "chinchilla")
    with pytest.warns(FitWarning, match="looks like units"): fit_law(runs.assign(n_params=runs.n_params/1e6), "chinchilla")

def test_regimes_are_not_mixed():
    params, design, _ = PLANTED["fp-qat"]; d = planted_runs("fp-qat", params, design)
    for bad in (d.assign(qat_tokens=d.tokens), d.assign(qat_tokens=0.)):
        with pytest.raises(DataError): fit_law(bad, "fp-qat", n_starts=2)
    params, design, kw = PLANTED["quest"]; d = planted_runs("quest", params, design)
    with pytest.raises(DataError): fit_law(d.assign(qat_tokens=.3*d.tokens), "quest", **kw)

def test_shares_that_do_not_sum_to_one():
    params, design, _ = PLANTED["additive"]; d = planted_runs("additive", params, design)
    with pytest.raises(DataError, match="sum to one"): fit_law(d.assign(**{"w/a": d["w/a"] + .5}), "additive")

def test_extrapolation_is_warned_with_its_factor(runs):
    law = fit_law(runs, "chinchilla")
    with pytest.warns(ExtrapolationWarning, match="5 times beyond 2e"): law.predict(pd.DataFrame(dict(n_params=[1e10], tokens=[1e10])))

def test_a_law_of_ones_own_in_one_cell(runs):
    from mixbook.formula import law_form
    @law_form("planted test law", data=dict(N="n_params", D="tokens"), starts=dict(alpha=(.1, .8)))
    def mine(N, D, E, A, alpha, B): return E + A/N**alpha + B/D**.37
    law = fit_law(runs, "planted test law"); assert law.status == "converged" and holdout_by_scale(runs, "planted test law").mre < 1
    with pytest.raises(DataError, match="registered already"): law_form("planted test law", data=dict(N="n_params"), starts={})(lambda N, E: E + N)

def test_validation_keeps_the_callers_index(runs):
    named = runs.set_index(pd.Index([f"r{i}" for i in range(len(runs))])); v = holdout_by_scale(named, "chinchilla")
    assert set(v.table.index) <= set(named.index) and np.allclose(named.loss[v.table.index], v.table.observed)

def test_a_law_is_compared_with_itself_held(runs):
    from mixbook.validate import compare_laws
    t = compare_laws(runs, {"free": dict(law="chinchilla"), "held": dict(law="chinchilla", fixed=dict(E=1.8)), "chinchilla-tied": {}})
    assert set(t.law) == {"free", "held", "chinchilla-tied"} and t.set_index("law").free["held"] == 4


# ---------------------------------------------------------------- when to start QAT

FP_QAT = dict(E=2., A=400., B=2000., alpha=.34, beta=.37, theta=.3, kappa=1., phi=6., chi=.6, psi=.15, omega=.4, lam=20., mu=.7, nu=.2, xi=.4, rho=.05)
FP_QAT_GRID = grid(n_params=[1e8, 2e8, 4e8, 8e8], tokens=[2e9, 8e9, 3e10, 1e11], bits=[1, 2, 4, 6], f=[.02, .1, .25, .5, .75, .95]).assign(qat_tokens=lambda d: d.f*d.tokens).drop(columns="f")

@pytest.mark.parametrize("omega, noise", [(.4, .002), (.4, .005), (.6, .002), (.6, .005)])
def test_the_best_fraction_is_found_from_noisy_rows(omega, noise):
    "384 rows: loss at three times the largest size within 1 %, best fraction within 0.05, and it rises or falls with the budget as planted (omega below or above xi + rho)."
    from mixbook.precision_laws import qat_fraction
    truth = {**FP_QAT, "omega": omega}; law = fit_law(planted_runs("fp-qat", truth, FP_QAT_GRID, noise=noise, seed=3), "fp-qat")
    held = pd.DataFrame([dict(n_params=2.4e9, tokens=D, bits=b, qat_tokens=f*D) for D in (1e10, 1e11) for b in (2, 4) for f in (.1, .3, .6)])
    assert np.abs(law.predict(held)["mean"]/at("fp-qat", truth, held) - 1).max() < .01
    budgets = np.array([8e9, 3e10, 1e11]); found, want = (qat_fraction(p, 4e8, budgets, 4) for p in (law, truth))
    assert np.abs(found - want).max() < .05 and (np.sign(np.diff(found)) == (1 if omega < .45 else -1)).all() and (np.sign(np.diff(want)) == np.sign(np.diff(found))).all()

def test_a_tied_law_has_a_best_fraction():
    from mixbook.precision_laws import qat_fraction
    from mixbook.qat_budget import allocate_qat
    truth = {**FP_QAT, "nu": FP_QAT["psi"], "beta": FP_QAT["alpha"]}
    law = fit_law(planted_runs("fp-qat", truth, FP_QAT_GRID, noise=.001, seed=0), "fp-qat", tied={"nu": "psi", "beta": "alpha"}); assert "nu" not in law.params
    assert qat_fraction(law, 4e8, [1e10, 1e11], 4) == pytest.approx(qat_fraction(truth, 4e8, [1e10, 1e11], 4), abs=.05)
    plan = allocate_qat(tokens=1e11, n_params=4e8, bits=4, law=law, draws=50); assert plan.table["fraction"][0] == pytest.approx(float(qat_fraction(law, 4e8, 1e11, 4)), abs=1e-4)

def test_the_published_fraction_everywhere():
    from mixbook.qat_budget import fraction_after, optimal_fraction, weight_bytes
    S = np.geomspace(1.02, 1e12, 4000); f = optimal_fraction(S); assert (np.diff(f) > 0).all() and (f > 0).all() and (f < 1).all()
    g = fraction_after(S, 4., 2.); assert (np.diff(g) >= 0).all() and np.abs(g - optimal_fraction(S/(1 - g))).max() < 1e-9
    for bad in (1., .3, 0., -1., np.nan, np.inf):
        with pytest.raises(DataError): optimal_fraction(bad)
        with pytest.raises(DataError): fraction_after(bad, 4., 2.)
    assert weight_bytes(10, 2, 4) == (6*2 + 4*4)/8 and weight_bytes(10, 8, 4) == 10
    with pytest.raises(DataError, match="embedding"): weight_bytes(10, 2, -1)
