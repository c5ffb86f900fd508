"Domains: planted divisions are found, divergences have their textbook values, an atlas travels."
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from mixbook.core import DataError
from mixbook.corpus import toy_corpus
from mixbook.domains import Atlas, divergence, divergence_matrix, overlap, split_domains

@pytest.fixture(scope="module")
def toy(tmp_path_factory): return toy_corpus(tmp_path_factory.mktemp("toy")/"c")

shares = st.lists(st.floats(0, 1), min_size=5, max_size=5).filter(lambda v: sum(v) > .1)

@settings(max_examples=100, deadline=None)
@given(shares, shares, shares)
def test_divergence_properties(a, b, c):
    js = divergence(a, b)
    assert -1e-12 <= js <= np.log(2) + 1e-12 and abs(js - divergence(b, a)) < 1e-12
    assert divergence(a, a) == 0 and abs(divergence(a, b, base="bits") * np.log(2) - js) < 1e-12
    assert np.sqrt(js) <= np.sqrt(divergence(a, c)) + np.sqrt(divergence(c, b)) + 1e-7 # the square root is a metric
    assert 0 <= divergence(a, b, how="hellinger") <= 1 + 1e-12 and divergence(a, b, how="kl") >= -1e-12
    assert abs(divergence(np.array(a) * 7, b) - js) < 1e-12

def test_bias_formula():
    rng, S = np.random.default_rng(1), 300
    p = rng.dirichlet(np.ones(S) * 5)
    sim = np.mean([divergence(rng.multinomial(20_000, p), rng.multinomial(40_000, p)) for _ in range(100)])
    assert abs(sim / ((S - 1) / 8 * (1 / 20_000 + 1 / 40_000)) - 1) < .1

def test_clusters_recover_planted_domains(toy):
    from sklearn.metrics import adjusted_rand_score
    texts = {d: list(toy.texts(d)) for d in toy.domains}
    flat, truth = [t for v in texts.values() for t in v], np.repeat(toy.domains, [len(v) for v in texts.values()])
    a = split_domains(flat, by="cluster", n=3)
    assert adjusted_rand_score(truth, a.assignment) > .95 and a.stability > .95
    held = [t for d in toy.domains for t in toy.texts(d, "heldout")]
    assert adjusted_rand_score(np.repeat(toy.domains, toy.table["heldout_docs"]), a.assign(held)) > .95
    assert a.table["bytes"].sum() == toy.table["bytes"].sum() and a.table["tokens"].sum() == toy.table["tokens"].sum()

def test_every_source_gives_the_same_atlas(toy):
    texts = {d: list(toy.texts(d)) for d in toy.domains}
    frame = pd.DataFrame([dict(domain=d, text=t) for d, v in texts.items() for t in v], index=pd.RangeIndex(100, 100 + sum(map(len, texts.values()))))
    a, b, c = split_domains(toy), split_domains(texts), split_domains(frame)
    pd.testing.assert_frame_equal(a.table, b.table); pd.testing.assert_frame_equal(a.table, c.table)
    assert c.assignment.index[0] == 100 and set(a.table["words"].iloc[0].split())

def test_atlas_travels(toy):
    a = split_domains(toy)
    b = Atlas.from_json(a.to_json())
    pd.testing.assert_frame_equal(a.table, b.table, check_names=False)
    text = list(toy.texts("code", "heldout"))
    assert b.assign(text).eq("code").mean() > .95 and np.allclose(b.routing(text).sum(axis=1), 1)
    assert np.allclose(a.routing(text), b.routing(text)) and a.routing(text, temperature=1e-4).max(axis=1).min() > .9
    assert "<i>" not in split_domains({"<i>|a": ["one text"], "b": ["another text"]})._repr_markdown_().replace("\\<i\\>", "")

def test_duplicates_are_counted():
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho".split()
    t = " ".join(words * 3)
    a = split_domains({"a": [t, t, "something of another kind entirely, with its own words"], "b": [t.replace("alpha", "omega") + " and some more words at the end of it all", "numbers 1 2 3 4 5 6 7 8 9"]})
    assert a.table["duplicates"].tolist() == [1, 0] or a.table["duplicates"].sum() == 2

def test_overlap_and_matrix(toy):
    o = overlap({"small": "every word of this stands in the other text as well", "large": ["every word of this stands in the other text as well", "and here is much more that does not " * 3]})
    assert o.loc["small", "large"] == 1 and o.loc["large", "small"] < .8
    d = divergence_matrix(toy)
    assert (np.diag(d) < d.where(~np.eye(3, dtype=bool)).min()).all() and np.allclose(d, d.T)
    assert divergence_matrix(toy, unit="word", how="hellinger").shape == (3, 3)

@pytest.mark.parametrize("call, message", [
    (lambda: split_domains(["a", "b"]), "expected a label"), (lambda: split_domains([]), "at least one text"), (lambda: split_domains("abc"), "one string"),
    (lambda: split_domains(["a", None]), "found NoneType at position 1"), (lambda: split_domains(["a", "b"], by="cluster", n=3), "number of texts"),
    (lambda: split_domains(["a"], by="clster"), "did you mean 'cluster'"), (lambda: split_domains(pd.DataFrame(dict(txt=["a"]))), "missing column 'text'; did you mean 'txt'"),
    (lambda: divergence([1, 2], [1, 2, 3]), "one length"), (lambda: divergence([-1, 2], [1, 2]), "not negative"), (lambda: divergence("", "abc"), "at least 2 bytes"),
    (lambda: divergence("abc", "abd", base="nat"), "did you mean 'nats'"), (lambda: overlap(["a"]), "mapping of domain to texts")])
def test_errors(call, message):
    with pytest.raises(DataError, match=message): call()
