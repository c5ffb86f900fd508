"Figures: readable on both cards, nothing cut or overlapping, no side effects, numbers drawn as given."
import itertools
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from matplotlib.colors import to_rgb
from mixbook import plots as P
from mixbook.core import DataError

RNG = np.random.default_rng(0)
LONG = ["common-crawl-2024-10-quality-high-english-only-deduplicated", "$(rm) and $x_{y$", "two\nlines", "<script>", "a_b^c", *[f"domain_{i:02d}" for i in range(12)]]
THREE = ["prose", "code & configuration files", "tables-extracted-from-spreadsheets"]


class Bowl:
    "A planted surface."
    def __init__(self, domains, targets=None):
        self.domains, self.targets = list(domains), targets or {f"loss/{d}": 1/len(domains) for d in domains}
        self.bottom = pd.Series(1/len(domains), index=self.domains)
        self.observed = pd.DataFrame(RNG.dirichlet(np.ones(len(domains)), 30), columns=self.domains).assign(target=1.)
    def predict(self, weights):
        assert np.allclose(weights[self.domains].sum(axis=1), 1)
        far = ((weights[self.domains] - self.bottom)**2).sum(axis=1)
        return pd.DataFrame({"mean": 2 + far, "sd": .02 + .1*far})


class Recipe:
    "What plots need of a recipe."
    def __init__(self, domains):
        k = len(domains)
        self.weights = pd.Series(RNG.dirichlet(np.ones(k)), index=list(domains))
        self.lo, self.hi, self.natural = self.weights*.8, self.weights*1.2, pd.Series(RNG.dirichlet(np.ones(k)), index=list(domains))
    budget = 10**9
    def passes(self, budget): return self.weights*budget/1e8


def curves(domains):
    steps = 2**np.arange(14, 24)
    return pd.concat([pd.DataFrame({"run": f"{d}{s}", "recipe": d, "seed": s, "tokens": steps, "loss/a": 2 + .1*i + 30*steps**-.3 + .01*s}) for i, d in enumerate(domains) for s in range(3)])


def comparison(domains): return pd.DataFrame({"recipe": domains, "baseline": "natural", "mean": np.linspace(-.05, .05, len(domains))}).assign(lo=lambda f: f["mean"] - .02, hi=lambda f: f["mean"] + .02)


HELD = pd.DataFrame({"mean": RNG.normal(2, .3, 80), "sd": .05}).assign(observed=lambda f: f["mean"] + .05*RNG.standard_normal(80))
FIGURES = {
    "mixture": lambda ds, ax=None: P.plot_mixture(Recipe(ds), ax, title="A title that is of quite ordinary length"),
    "design": lambda ds, ax=None: P.plot_design(Bowl(ds).observed[list(ds)], ax, natural=Recipe(ds).natural),
    "surface": lambda ds, ax=None: P.plot_surface(Bowl(ds), ax, recipe=Recipe(ds)),
    "prediction": lambda ds, ax=None: P.plot_prediction(HELD, ax=ax),
    "coverage": lambda ds, ax=None: P.plot_coverage(HELD, ax),
    "curves": lambda ds, ax=None: P.plot_curves(curves(ds[:5]), ax),
    "confirmation": lambda ds, ax=None: P.plot_confirmation(comparison(ds), ax),
    "passes": lambda ds, ax=None: P.plot_passes(Recipe(ds), ax=ax),
}


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("plt.show was called"))
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before


def texts(fig):
    "(text, extent) of all texts that are drawn."
    fig.canvas.draw()
    r, found = fig.canvas.get_renderer(), [t for t in (fig._supxlabel, fig._supylabel, fig._suptitle) if t is not None]
    for a in fig.axes:
        found += [a.title, a._left_title, *a.texts, *(a.get_legend().get_texts() if a.get_legend() else [])]
        if a.axison: found += [t for axis in (a.xaxis, a.yaxis) for t in (axis.label, *(k.label1 for k in axis._update_ticks()), *(k.label2 for k in axis._update_ticks()))]
    return [(t, t.get_window_extent(r)) for t in found if t.get_visible() and t.get_text().strip()]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("domains", [THREE, LONG], ids=["three", "seventeen"])
@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_or_overlaps(name, domains, dark):
    with P.style(dark=dark) as theme:
        fig = FIGURES[name](domains).figure
        seen = texts(fig)
    assert len(seen) > 5
    for t, b in seen:
        assert b.x0 >= -1 and b.y0 >= -1 and b.x1 <= fig.bbox.x1 + 1 and b.y1 <= fig.bbox.y1 + 1, f"{t.get_text()!r} is cut"
        a, c = sorted([P._luminance(t.get_color()), P._luminance(theme.card)])
        assert (c + .05)/(a + .05) > 4.2, f"{t.get_text()!r} is hard to read"
    for (s, a), (t, b) in itertools.combinations(seen, 2):
        dx, dy = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert dx < 2 or dy < 2, f"{s.get_text()!r} overlaps {t.get_text()!r}"


@pytest.mark.parametrize("name", FIGURES)
def test_own_axes_are_used(name):
    fig, axes = plt.subplots(1, 2, figsize=(12, 6))
    assert FIGURES[name](THREE, axes[1]) is axes[1]
    assert FIGURES[name](LONG, axes[0]) is axes[0]
    assert plt.get_fignums() == [fig.number]
    free = fig.add_axes([.1, .1, .3, .3])
    assert FIGURES[name](LONG, free) is free


@pytest.mark.parametrize("name", FIGURES)
def test_axes_say_their_unit(name):
    ax = FIGURES[name](LONG)
    words = " ".join(t.get_text() for t, _ in texts(ax.figure))
    assert any(u in words for u in ("nats per token", "share of training tokens", "training tokens", "passes over", "nominal level")), words


def oklab(rgb):
    a = np.array([[.4122214708, .5363325363, .0514459929], [.2119034982, .6806995451, .1073969566], [.0883024619, .2817188376, .6299787005]])
    b = np.array([[.2104542553, .7936177850, -.0040720468], [1.9779984951, -2.4285922050, .4505937099], [.0259040371, .7827717662, -.8086757660]])
    return b @ np.cbrt(np.clip(a @ np.clip(rgb, 0, 1), 0, None))

EYES = {"normal": np.eye(3), "protan": [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
        "deutan": [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
        "tritan": [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]} # Machado et al. 2009, severity 1

@pytest.mark.parametrize("eye", EYES)
def test_first_eight_colours_are_told_apart(eye):
    linear = lambda h: np.where((c := np.array(to_rgb(h))) <= .04045, c/12.92, ((c + .055)/1.055)**2.4)
    seen = [oklab(np.array(EYES[eye]) @ linear(h)) for h in P._PALETTE[:P._RING]]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > .10


def test_colours_read_on_both_cards():
    contrast = lambda a, b: (max(P._luminance(a), P._luminance(b)) + .05)/(min(P._luminance(a), P._luminance(b)) + .05)
    assert min(contrast(c, card) for c in P._PALETTE for card in (P._LIGHT.card, P._DARK.card)) > 2.5


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=40, unique=True), st.randoms())
def test_colours_do_not_depend_on_order(names, r):
    want = P.domain_colours(names)
    mixed = names[:]
    r.shuffle(mixed)
    assert P.domain_colours(mixed) == want
    assert len(set(want.values())) == len(names)


def test_colour_is_stable_across_sessions():
    assert P.domain_colours(["prose", "code", "tables"]) == {"prose": "#9138a4", "code": "#32b57d", "tables": "#b62a12"}


def test_numbers_are_drawn_as_given():
    r = Recipe(THREE)
    ax = P.plot_mixture(r)
    order = r.weights.sort_values(ascending=False)
    assert np.allclose(ax.collections[-1].get_offsets()[:, 0], order)
    bars = [p.get_width() for p in ax.patches]
    assert np.allclose(bars, order)
    ax = P.plot_confirmation(comparison(["a", "b"]))
    assert [tuple(c.get_segments()[0][:, 0]) for c in ax.collections] == [pytest.approx((-.07, -.03)), pytest.approx((.03, .07))]


def test_coverage_counts():
    ax = P.plot_coverage(HELD)
    level, got = ax.lines[1].get_data()
    i = np.argmin(abs(level - .9))
    from scipy.stats import norm
    half = norm.ppf(.5 + level[i]/2)*HELD["sd"]
    assert got[i] == pytest.approx(((HELD["observed"] - HELD["mean"]).abs() <= half).mean())
    table = pd.DataFrame({"level": [.5, .9]*2, "coverage": [.5, .88, .4, .7], "kind": ["gp"]*2 + ["law"]*2})
    assert [t.get_text() for t in P.plot_coverage(table).get_legend().get_texts()] == ["gp", "law"]


def test_real_results_can_be_drawn():
    from mixbook.recipe import Recipe as Real
    r = Real(weights={"a": .5, "b": .5}, natural={"a": .9, "b": .1}, tokens={"a": 1e6, "b": 1e5}, budget=10**6)
    assert len(P.plot_mixture(r).get_yticklabels()) == 2
    assert [t.get_text() for t in P.plot_passes(r).texts] == ["5.0×", "0.50×"]
    assert r.plot() is not None


@pytest.mark.parametrize("call, part", [
    (lambda: P.plot_mixture([1, 2]), "expected a Recipe"), (lambda: P.plot_mixture({}), "at least one row"), (lambda: P.plot_design(pd.DataFrame()), "at least one mixture"),
    (lambda: P.plot_curves(pd.DataFrame({"run": ["a"], "tokens": [1]})), "outcome columns"), (lambda: P.plot_curves(pd.DataFrame({"run": ["a"]})), "'tokens'"),
    (lambda: P.plot_confirmation(pd.DataFrame({"mean": [1.], "low": [1.], "hi": [1.]})), "did you mean 'low'"), (lambda: P.plot_surface(Bowl(THREE), what="men"), "did you mean 'mean'"),
    (lambda: P.plot_coverage(pd.DataFrame({"levle": [1.]})), "expected a column"),
])
def test_errors_say_what_to_do(call, part):
    with pytest.raises(DataError) as e: call()
    assert part in str(e.value)
