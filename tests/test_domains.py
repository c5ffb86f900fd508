"Domains: planted divisions are found, divergences have their textbook values, an atlas travels, copies and leaks are found."
import tracemalloc
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from mixbook.atlas import DomainCount, axis_dof, compare_axes, count_domains, cross_domains, factor_weights, grid_mixtures, grid_weights, stream_domains
from mixbook.core import DataError
from mixbook.corpus import toy_corpus
from mixbook.dedup import _bands, _signatures, _windows, candidate_chance, jaccard, near_duplicates, signature
from mixbook.domains import Atlas, divergence, divergence_matrix, overlap, score_texts, split_domains, splitters
from mixbook.leakage import LeakRule, Mosaic, bench_domains, clean_split, duplicate_matrix, find_leaks, leak_report, leak_rules, longest_match, nearest_items, normal_words

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
    (lambda: divergence("abc", "abd", base="nat"), "did you mean 'nats'"), (lambda: overlap(["a"]), "mapping of domain to texts"),
    (lambda: split_domains(pd.DataFrame(dict(text=["a", "b", "c"], domain=["x", None, np.nan]))), "none in 2 of 3"), (lambda: split_domains({"a": ["text"], "b": []}), "in domain 'b'"),
    (lambda: split_domains(["a", "b"], by="cluster", n=2, embed=np.array([[1, 2], [np.inf, 0]])), "NaN or infinity in 1 of 2 rows"), (lambda: split_domains(["a", "b"], by="cluster", n=2, embed=np.ones((3, 2))), "expected 2 vectors"),
    (lambda: split_domains(["a", "b"], by="cluster", n=2, embed=lambda t: ["x", "y"]), "array of numbers"), (lambda: split_domains(["a", "b"], by="cluster", n=1), "between 2 and 2"),
    (lambda: score_texts(["a", "b"], "hardness"), "unknown score"), (lambda: score_texts(["a", "b"], {"x": [1, np.nan]}), "finite numbers for the score 'x'"),
    (lambda: count_domains(["a b c"] * 9, [2, 99]), "between 2 and"), (lambda: count_domains(["a b c"] * 9, seeds=1), "at least 2 seeds"),
    (lambda: cross_domains(["a", "b"], ["x"]), "same documents"), (lambda: cross_domains(["a", None], ["x", "y"]), "a concept for every document"), (lambda: cross_domains(["a", "b"], ["x", "y"], size=[1, np.nan]), "finite sizes"),
    (lambda: grid_weights([.5, .5], [1, np.nan]), "shares of the tasks"), (lambda: grid_weights([.5, .5], [.5, .5], a=[1, 1]), "both a and b"), (lambda: grid_weights([.5, .5], [.5, .5], a=[1, 1, 1], b=[1, 1]), r"a of \(r, 2\)"),
    (lambda: factor_weights([[1, 0], [1, 1]]), "positive weights"), (lambda: stream_domains(iter(["a"])), "read twice"), (lambda: stream_domains("abc"), "one string"), (lambda: stream_domains(["a", "b"], n=3), "between 2 and 2"),
    (lambda: near_duplicates(["a"], bands=64, rows=4), "at most 128"), (lambda: duplicate_matrix({}), "found an empty one"), (lambda: duplicate_matrix({"a": ["x"], "b": []}), "in domain 'b'"),
    (lambda: clean_split({"a": ["the same document"] * 4}), r"fewer in \['a'\]"), (lambda: clean_split({"a": ["x", "y"]}, heldout=1), "between 0 and 1"),
    (lambda: find_leaks("text", ["item"]), "one string"), (lambda: find_leaks(["text"]), "Pass a Corpus"), (lambda: find_leaks(["text"], []), "at least one text"), (lambda: find_leaks(["text"], [None]), "found NoneType"),
    (lambda: find_leaks(["text"], ["item"], rules="gtp3"), "did you mean 'gpt3'"), (lambda: leak_report(find_leaks(["text"], ["item"] * 3), [1, 0]), "none for item 2"),
    (lambda: Mosaic(10, {"a": ["too short"]}), "fragments of each kind"),
    (lambda: split_domains(7), "found int. Pass a list"), (lambda: split_domains({1: ["one"], "1": ["another"]}), r"'1' twice \(as int and str\)"), (lambda: split_domains(["a", "b"], by=lambda t: None if t == "b" else "x"), "for 1 of 2"),
    (lambda: split_domains({"a": ["text", 3.5]}), "in domain 'a', found float at position 1"), (lambda: split_domains({"a": None}), "in domain 'a', found NoneType"), (lambda: split_domains({}), "at least one text"),
    (lambda: divergence(["text", None], "other"), "NoneType at position 1"), (lambda: divergence("text", "other", n=0), "at least 1 byte"), (lambda: divergence("text", "other", buckets=1), "at least 2 buckets"),
    (lambda: divergence_matrix({"a": ["some text", "more text"], "tiny": ["x"]}), "each half of domain 'tiny'"), (lambda: divergence_matrix({"a": iter(["text", None])}), "in domain 'a', found NoneType at position 1"), (lambda: divergence_matrix({1: ["text"], "1": ["text"]}), "'1' twice"),
    (lambda: overlap({"a": ["text"], "b": []}), "in domain 'b'"), (lambda: overlap({"a": 5}), "found int"), (lambda: duplicate_matrix({1: ["text"], "1": ["text"]}), "'1' twice"), (lambda: clean_split({"a": ["x y", None]}), "in domain 'a', found NoneType"),
    (lambda: count_domains(["a b c"] * 9, [2], embed=np.full((9, 2), np.nan)), "NaN or infinity in 9 of 9"), (lambda: count_domains(["a", None] * 9), "NoneType at position 1"),
    (lambda: stream_domains(pd.DataFrame(dict(text=["a"]))), "Pass its text column"), (lambda: stream_domains(["a", None], n=2), "NoneType at position 1"), (lambda: stream_domains({"a": ["x"], "b": ["y", 3]}, n=2), "int at position 2"), (lambda: stream_domains([], n=2), "between 2 and 0"),
    (lambda: stream_domains(["a", "b", "c"], n=2, embed=np.ones((3, 2))), "as a function"), (lambda: stream_domains(["a", "b", "c"], n=2, embed=lambda t: np.full((len(t), 2), np.nan)), "NaN or infinity"), (lambda: stream_domains(5), "found int"),
    (lambda: stream_domains({1: ["a"], "1": ["b"]}, n=2), "'1' twice"), (lambda: grid_mixtures(cross_domains(["a", "b"], ["x", "y"]), 0), "at least one mixture"), (lambda: cross_domains(["a", np.nan], ["x", "y"]), "a concept for every document"),
    (lambda: find_leaks(["text", None], ["item"]), "NoneType at position 1"), (lambda: find_leaks(pd.DataFrame(dict(text=["a"])), ["item"]), "Pass its text column"), (lambda: find_leaks(5, ["item"]), "found int"), (lambda: find_leaks({"a": ["t", 1.]}, ["item"]), "in domain 'a', found float"),
    (lambda: find_leaks(["text"], {1: ["x"], "1": ["y"]}), "'1' twice"), (lambda: nearest_items(["text", 3], ["item"]), "int at position 1"), (lambda: nearest_items(["text"], ["item"], embed=lambda t: np.full((len(t), 2), np.inf)), "NaN or infinity"),
    (lambda: leak_report(find_leaks(["text"], ["item"] * 2), [1, np.nan]), "some of them NaN")])
def test_errors(call, message):
    with pytest.raises(DataError, match=message): call()


# ---------------------------------------------------------------- ways to make domains

def planted(n=60, seed=0, kinds=3, words=40):
    rng = np.random.default_rng(seed)
    vocabulary = [[f"{'abcdefgh'[k]}word{i}" for i in range(40)] + [f"shared{i}" for i in range(20)] for k in range(kinds)]
    return {f"kind{k}": [" ".join(rng.choice(v, rng.integers(words // 2, 2 * words))) for _ in range(n)] for k, v in enumerate(vocabulary)}

def flat_of(texts): return [t for v in texts.values() for t in v], np.repeat(list(texts), [len(v) for v in texts.values()])

def test_balanced_clusters_hold_equal_bytes():
    texts, truth = flat_of({k: v[:n] for (k, v), n in zip(planted(200).items(), (200, 100, 60))})
    size = pd.Series([len(t) for t in texts])
    a = split_domains(texts, by="balanced", n=4)
    assert (a.table["bytes"] / size.sum() - .25).abs().max() < .02 and a.stability is not None
    plain = split_domains(texts, by="cluster", n=4).table["bytes"] / size.sum()
    assert (plain - .25).abs().max() > .05
    same = ["the very same document"] * 40
    with pytest.warns(Warning): assert split_domains(same, by="balanced", n=2).table["documents"].sum() == 40  # nothing to tell apart: no crash

def test_a_tree_is_nested():
    texts, truth = flat_of(planted(40))
    three, seven = (pd.Series(split_domains(texts, by="hierarchical", n=n).assignment) for n in (3, 7))
    assert seven.nunique() == 7 and (pd.crosstab(seven, three) > 0).sum(axis=1).max() == 1 and all(a.startswith(b) for a, b in zip(seven, three))
    from sklearn.metrics import adjusted_rand_score
    assert adjusted_rand_score(truth, three) > .95
    with pytest.warns(Warning): assert split_domains(["one text"] * 9, by="hierarchical", n=4).table["documents"].sum() == 9

def test_any_embedding_makes_domains():
    texts, truth = flat_of(planted(30))
    from sklearn.metrics import adjusted_rand_score
    code = {k: np.eye(3)[i] for i, k in enumerate(sorted(set(truth)))}
    given = np.stack([code[k] for k in truth]) * 7 + .01 * np.random.default_rng(0).normal(size=(90, 3))
    a = split_domains(texts, by="cluster", n=3, embed=given)
    assert adjusted_rand_score(truth, a.assignment) == 1 and a.stability == 1
    embed = lambda ts: np.array([[t.count("aword"), t.count("bword"), t.count("cword")] for t in ts], float)
    b = Atlas.from_json(split_domains(texts, by="cluster", n=3, embed=embed).to_json())
    assert adjusted_rand_score(truth, b.assign(texts, embed=embed)) == 1 and np.allclose(b.routing(texts[:3], embed=embed(texts[:3])).sum(axis=1), 1)
    with pytest.raises(DataError, match="given vectors"): b.assign(texts)

def test_scores_names_and_quantiles():
    plain = "The people of the town have said that it is to be rebuilt with stone and wood, and they want to see it done before winter. " * 3
    odd = "### ... ### 123 456 ### \n" * 20
    s = score_texts([plain, odd])
    assert s["quality"][0] > s["quality"][1] and s["quality"].between(0, 1).all()
    texts, _ = flat_of(planted(20))
    rare = score_texts(texts + [" ".join(f"never{i}" for i in range(30))])["difficulty"]
    assert rare.idxmax() == len(texts)
    a = split_domains(texts, by="cluster", n=3, names=2, scores=["difficulty", "compression"])
    assert a.table.index.is_unique and set(a.assignment) == set(a.table.index) and {"difficulty", "compression"} <= set(a.table)
    assert np.isclose((a.table["difficulty"] * a.table["documents"]).sum() / len(texts), score_texts(texts)["difficulty"].mean())
    assert Atlas.from_json(a.to_json()).table["compression"].tolist() == a.table["compression"].tolist()
    assert split_domains(texts, by="difficulty", n=4).table["documents"].tolist() == [15] * 4
    assert split_domains(["x", "x"], by=lambda t: "d", names=3).domains == ["d"]  # no word: the name stays

def test_empty_texts_are_documents_of_their_own_kind():
    texts, _ = flat_of(planted(20))
    a = split_domains(texts + ["", "  "], by="cluster", n=3, names=2, scores=["quality", "difficulty", "compression"])
    assert a.table["documents"].sum() == 62 and np.isfinite(a.table[["quality", "difficulty", "compression"]].to_numpy()).all() and a.assign(["", "text"]).isin(a.domains).all()
    assert stream_domains(texts + [""], n=3, batch=16).table["documents"].sum() == 61
    with pytest.warns(Warning): assert split_domains([""] * 4, by="cluster", n=2).table["documents"].sum() == 4  # sklearn says that there is nothing to tell apart
    assert find_leaks([""], ["", "an item"])["flagged"].sum() == 0 and near_duplicates([""] * 3)["position"].tolist() == [1, 2]

def test_all_documents_of_a_corpus_are_counted():
    class Many:
        domains = ["a", "b"]
        def texts(self, d, split="train"): return (f"document {i} of {d}, which has some words of its own such as {i * 7919}" for i in range(2_600 if d == "a" else 30))
    assert split_domains(Many()).table["documents"].tolist() == [2_600, 30]

def test_one_domain_is_a_result():
    a = split_domains({"only": ["one text", "another text"]})
    assert a.domains == ["only"] and a.assign(["a third"]).tolist() == ["only"] and divergence_matrix({"only": ["one text", "another text"]}).shape == (1, 1)

# ---------------------------------------------------------------- atlas

@pytest.mark.parametrize("kinds", [2, 4])
def test_the_number_of_domains_is_found(kinds):
    texts, _ = flat_of(planted(40, kinds=kinds, words=60))
    c = count_domains(texts, range(2, 7), seeds=3)
    assert c.best == kinds and c.table.loc[kinds, "stability"] > .95
    again = DomainCount.from_json(c.to_json())
    assert again.best == c.best and count_domains(texts, range(2, 7), seeds=3).table.equals(c.table)

def test_no_number_for_one_kind_of_text():
    rng = np.random.default_rng(0)
    c = count_domains([" ".join(rng.choice([f"w{i}" for i in range(200)], 60)) for _ in range(100)], range(2, 5), seeds=3)
    assert "no number reaches stability" in c.reason or c.table["gain"].max() < .02

def test_grid_counts_and_forms():
    rng = np.random.default_rng(0)
    a, b, size = rng.choice(list("xyz"), 200), rng.choice(list("pq"), 200), rng.integers(1, 50, 200)
    g = cross_domains(a, b, size=size)
    assert g.tokens.loc["x", "q"] == size[(a == "x") & (b == "q")].sum() and g.documents.to_numpy().sum() == 200 and abs(sum(g.margins[0]) - 1) < 1e-12
    assert set(g.assignment) == set(g.cells) and g.flat()["z.p"] == g.tokens.loc["z", "p"]
    w = rng.dirichlet(np.ones(12)).reshape(4, 3)
    for rank in range(3):
        f = factor_weights(w, rank)
        back = grid_weights(f["u"], f["v"], f["a"], f["b"]) if rank else grid_weights(f["u"], f["v"])
        assert abs(back.to_numpy().sum() - 1) < 1e-12 and np.allclose(back, w) == (rank == 2)
    assert [axis_dof(10, 5), axis_dof(10, 5, 1), axis_dof(10, 5, None), axis_dof(4, 3, 9)] == [13, 25, 49, 11]
    m = grid_mixtures(g, 30, rank=1, tokens=g.tokens.to_numpy().sum(), passes=2, seed=3)
    assert np.allclose(m.sum(axis=1), 1) and (m * g.tokens.to_numpy().sum() <= 2 * g.flat() * (1 + 1e-6)).all(axis=None) and m.equals(grid_mixtures(g, 30, rank=1, tokens=g.tokens.to_numpy().sum(), passes=2, seed=3))
    with pytest.raises(DataError, match="Train on fewer tokens"): grid_mixtures(g, 2, tokens=1e9, passes=.1)

def test_the_joint_form_frees_every_cell():
    g = cross_domains(np.repeat(list("abc"), 40), np.tile(list("xy"), 60))
    product, joint = (grid_mixtures(g, 40, rank=r, seed=1).to_numpy().reshape(40, 3, 2) for r in (0, None))
    rank1 = lambda w: np.array([np.linalg.svd(o)[1][1] for o in w])
    assert rank1(product).max() < 1e-12 and rank1(joint).mean() > .02 and np.allclose(joint.sum((1, 2)), 1)
    near = grid_mixtures(g, 40, rank=None, concentration=(1e4, 1e4))
    assert np.abs(near - g.flat(g.natural)).max(axis=None) < .03
    m = grid_mixtures(cross_domains(["a", "a", "b"], ["x", "y", "x"]), 5, rank=None)
    assert (m["b.y"] == 0).all() and np.allclose(m.sum(axis=1), 1)

def test_an_empty_cell_stays_empty():
    g = cross_domains(["a", "a", "b"], ["x", "y", "x"])
    m = grid_mixtures(g, 5)
    assert (m["b.y"] == 0).all() and np.allclose(m.sum(axis=1), 1)

def test_interaction_is_found_where_it_is():
    g = cross_domains(np.repeat(list("abcd"), 3), np.tile(list("xyz"), 4))
    m = grid_mixtures(g, 90, seed=2)
    W, rng = m.to_numpy().reshape(90, 4, 3), np.random.default_rng(1)
    P, Q = np.sqrt(W.sum(2)), np.sqrt(W.sum(1))
    plain = 2 - P @ [.2, .1, 0, .3] - Q @ [.1, .2, 0] + .01 * rng.normal(size=90)
    t = compare_axes(m, plain, g)
    assert t.loc["rank 1", "lo"] < 0.02 and t.loc["axes", "unexplained"] < .2
    t = compare_axes(m, plain + (P @ [1, 0, -1, 0]) * (Q @ [0, 1, -1]), g)
    assert t.loc["rank 1", "lo"] > .5 and t["dof"].tolist() == [5, 9, 11]

def test_stream_agrees_with_memory_and_stays_flat():
    from sklearn.metrics import adjusted_rand_score
    texts, truth = flat_of(planted(150))
    a = stream_domains(texts, n=3, batch=50, sample=200)
    assert adjusted_rand_score(truth, a.assignment) > .95 and a.table["bytes"].sum() == sum(map(len, texts)) and a.table["documents"].sum() == 450
    assert adjusted_rand_score(truth, a.assign(texts)) > .95 and (a.assign(texts).to_numpy() == a.assignment.astype(str).to_numpy()).mean() > .98
    order = np.random.default_rng(0).permutation(450)
    shuffled = stream_domains([texts[i] for i in order], n=3, batch=50, sample=450).assignment.to_numpy()
    whole = stream_domains(texts, n=3, batch=50, sample=450).assignment.to_numpy() # sorted by kind: k-means that follows the stream would end elsewhere
    assert adjusted_rand_score(whole[order], shuffled) == 1 and adjusted_rand_score(whole, split_domains(texts, by="cluster", n=3).assignment) == 1
    assert stream_domains({"a": texts[:200], "b": texts[200:]}, n=3).table["documents"].sum() == 450
    twice = stream_domains(texts + texts[:20], n=3, batch=64, duplicates=True)
    assert twice.table["duplicates"].sum() >= 20
    calls = iter([texts, texts[:100]])
    with pytest.raises(DataError, match="same stream twice"): stream_domains(lambda: iter(next(calls)), n=3)
    peak = []
    for n in (1_500, 6_000):
        source = Mosaic(n, texts_for_mosaic())
        tracemalloc.start()
        stream_domains(source, n=2, sample=300, batch=300)
        peak.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peak[1] - peak[0] < 4_500 * 40  # bytes per further document: its label, its size, its place in the atlas

def texts_for_mosaic(seed=0):
    rng = np.random.default_rng(seed)
    return {d: [" ".join("".join(rng.choice(list(letters), rng.integers(3, 9))) for _ in range(3000))] for d, letters in (("a", "abcdefghij"), ("b", "klmnopqrst"))}

# ---------------------------------------------------------------- copies and leaks

def test_candidates_follow_the_formula():
    assert np.allclose(candidate_chance([.5, .6, .7, .75, .8, .85, .9]), [.0533, .2111, .5645, .7716, .9235, .9884, .9996], atol=1e-4)
    rng, pairs, n = np.random.default_rng(7), 600, 400
    for j in (.5, .7, .8, .9):
        both = round(2 * n * j / (1 + j))
        a, b = [], []
        for _ in range(pairs):
            h = rng.integers(0, 2**64, 2 * n - both, dtype=np.uint64)
            a.append(signature(h[:n])); b.append(signature(np.r_[h[:both], h[n:]]))
        for bands, rows in ((14, 8), (32, 4), (20, 5)):
            found, p = (_bands(np.stack(a), bands, rows) == _bands(np.stack(b), bands, rows)).any(1).mean(), candidate_chance(both / (2 * n - both), bands, rows)
            assert abs(found - p) < 3.5 * (p * (1 - p) / pairs)**.5 + 2 / pairs, (j, bands, found, p)
    h = rng.integers(0, 2**64, (400, 300), dtype=np.uint64)
    keys = _bands(np.stack([signature(o) for o in h]), 14, 8)
    assert not any(len(np.unique(k)) < 400 for k in keys.T)  # unrelated documents are never candidates

def test_false_positives_on_shuffled_text_are_those_of_the_formula():
    "The same words in another order share the windows inside words: similar, but no copy."
    rng = np.random.default_rng(5)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(14, 26))) for _ in range(400)]
    base = [rng.choice(words, 50, replace=False) for _ in range(500)]
    texts = [" ".join(w) for w in base] + [" ".join(rng.permutation(w)) for w in base]
    j = np.array([jaccard(texts[i], texts[i + 500]) for i in range(500)])
    assert .1 < j.mean() < .5 and j.max() < .7
    sigs = _signatures(texts)
    for bands, rows in ((32, 4), (14, 8), (32, 2)):
        keys, p = _bands(sigs, bands, rows), candidate_chance(j, bands, rows)
        rate = (keys[:500] == keys[500:]).any(1).mean()
        assert abs(rate - p.mean()) < 4 * (p * (1 - p)).sum()**.5 / 500 + 1 / 500, (bands, rows, rate, p.mean())
    assert not len(near_duplicates(texts))  # each candidate is compared exactly

def test_datasketch_finds_the_same():
    from datasketch import MinHash, MinHashLSH
    rng = np.random.default_rng(3)
    words = [f"word{i}" for i in range(300)]
    base = [" ".join(rng.choice(words, 60)) for _ in range(40)]
    texts = base + [t.replace(t.split()[5], "other").replace(t.split()[30], "another") for t in base]
    grams = [{t[i:i+16].encode() for i in range(len(t) - 15)} for t in texts]
    theirs, lsh = MinHash.bulk([list(g) for g in grams], num_perm=112, seed=1), MinHashLSH(params=(14, 8), num_perm=112)
    for i, m in enumerate(theirs): lsh.insert(str(i), m)
    ours = _signatures(texts)
    j = np.array([jaccard(texts[i], texts[i + 40]) for i in range(40)])
    assert np.abs((ours[:40] == ours[40:]).mean(1) - j).mean() < .04 and np.abs(np.array([theirs[i].jaccard(theirs[i + 40]) for i in range(40)]) - j).mean() < .04
    theirs = np.mean([str(i + 40) in lsh.query(theirs[i]) for i in range(40)])
    keys = _bands(ours, 14, 8)
    assert abs((keys[:40] == keys[40:]).any(1).mean() - theirs) < .25

def test_duplicates_through_files_are_the_same_and_memory_is_flat():
    source = Mosaic(3_000, texts_for_mosaic())
    texts = list(source)
    pd.testing.assert_frame_equal(near_duplicates(texts, .6, bands=14, rows=8), near_duplicates(iter(texts), .6, bands=14, rows=8))
    assert near_duplicates(iter(["an é", "", "x" * 40, "x" * 40, "\ud800 odd"]))["position"].tolist() == [3]
    peak = []
    for n in (3_000, 12_000):
        tracemalloc.start()
        near_duplicates(iter(Mosaic(n, texts_for_mosaic(), copies=0.)), bands=14, rows=8)
        peak.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peak[1] - peak[0] < 9_000 * 60  # bytes per further document; its text and signature are ten times as large

def test_bench_finds_what_it_planted():
    t = bench_domains(4_000, texts=texts_for_mosaic())
    assert t.loc["cluster", "agreement"] > .95 and abs(t.loc["duplicates", "recall"] - t.loc["duplicates", "expected"]) < 4 * (.25 / t.loc["duplicates", "planted"])**.5
    assert (t[["seconds", "cpu_seconds"]] > 0).all(axis=None) and t.loc["duplicates", "planted"] > 100 and t.loc["all", "seconds"] == pytest.approx(t.loc[["cluster", "duplicates"], "seconds"].sum())

def test_exact_copies_across_domains():
    texts = planted(30)
    texts["kind2"] = texts["kind2"] + texts["kind0"][:7] + texts["kind2"][:3]
    m = duplicate_matrix(texts)
    assert m.loc["kind2", "kind0"] == 7 and m.loc["kind2", "kind2"] == 3 and m[list(texts)].to_numpy().sum() == 10
    c = clean_split(texts, heldout=.3)
    assert c.report.loc["kind2", ["within", "across"]].tolist() == [3, 7] and (c.report["leak_after"] == 0).all()
    near = {d: v + [t + " and a few more words" for t in v] for d, v in planted(30, words=60).items()}  # the hash of the text keeps exact copies together, near ones it does not
    report = clean_split(near, heldout=.3).report
    assert (report["leak_before"] > .2).all() and (report["leak_after"] == 0).all() and (report["within"] == 30).all()
    train, held = ({t for v in side.values() for t in v} for side in (c.train, c.heldout))
    assert not train & held and len(train) + len(held) == 90
    more = clean_split({**texts, "kind1": texts["kind1"] + ["one more document that is new"]}, heldout=.3)
    assert not ({t for v in more.train.values() for t in v} & held)  # no document changes sides

WORDS = [f"word{i}" for i in range(500)]
def test_rules_on_planted_leaks():
    rng = np.random.default_rng(0)
    item = [list(rng.permutation(WORDS)[:50]) for _ in range(6)]
    noise = lambda: " ".join(rng.permutation(WORDS)[:80])
    say = lambda w: noise() + " " + " ".join(w) + " " + noise()
    slips = item[2][:]
    for i in (12, 16, 20, 24): slips[i] = "slip"
    train = [say(item[0]), say(item[1][:30]), say(slips), say(item[3][:10]), noise()]
    t = find_leaks(train, [" ".join(i) for i in item], rules=list(leak_rules)).set_index(["item", "rule"])
    f, score = t["flagged"].unstack(), t["score"].unstack()
    assert f.loc[0].all() and np.allclose(score.loc[0].drop("gpt3"), 1) and not f.loc[4:].any(axis=None)
    assert np.isclose(score.loc[1, "palm"], 23 / 43) and not f.loc[1, "palm"] and np.isclose(score.loc[1, "llama2"], .6) and np.isclose(score.loc[1, "llama3"], .6) and f.loc[1, "phi"]
    assert np.isclose(score.loc[2, "llama2"], 1) and np.isclose(score.loc[2, "gpt3"], (50 - 24 - 13) / 38) # slips are passed over; after the last there are 25 words
    assert np.isclose(score.loc[3, "llama2"], .2) and f.loc[3, "llama2"] and not f.loc[3, "gpt3"] and np.isclose(score.loc[3, "palm"], 3 / 43)
    assert t["document"].unstack()["palm"].tolist() == [0, 1, 2, 3, -1, -1]

def test_a_match_does_not_cross_documents():
    w = WORDS[:12]
    assert not find_leaks([" ".join(w[:6]), " ".join(w[6:])], [" ".join(w)], rules=["gpt3", "gpt4"])["flagged"].any()
    assert find_leaks([" ".join(w)], [" ".join(w)], rules=["gpt3", "gpt4"])["flagged"].all()

def test_batches_do_not_matter():
    rng = np.random.default_rng(1)
    docs = [" ".join(rng.choice(WORDS, 4000)) for _ in range(60)]  # more than a megabyte
    items = [" ".join(docs[k].split()[100:140]) for k in (0, 31, 59)]
    t = find_leaks(iter(docs), items)
    assert t["flagged"].all() and t.groupby("item")["document"].unique().map(list).tolist() == [[0], [31], [59]]

def test_normalisation():
    a = "Naïve Façade: the ﬁrst “test”, 1,000 times!"
    assert normal_words(a) == ["naive", "facade", "the", "first", "test", "1", "000", "times"] == normal_words("  NAIVE   facade\nthe first test 1 000 TIMES")
    long = " ".join(WORDS[:30])
    assert find_leaks([long.upper().replace(" ", ",\n ")], [long])["flagged"].all()

def test_short_items_and_small_sets():
    t = find_leaks(["yes and no and maybe"], ["yes", "no and", "?!"])
    assert t["score"].isna().all() and not t["flagged"].any() and (leak_report(t)["judged"] == 0).all()
    assert find_leaks([], ["an item of several words, long enough to be judged by all rules that there are"])["flagged"].sum() == 0
    assert longest_match("", "abc")["longest"] == 0 and longest_match("abc def", "xx ABC, def yy")["longest"] == 1

def test_test_set_inside_training_is_reported(toy):
    t = find_leaks(toy, {d: list(toy.texts(d))[:20] for d in toy.domains})
    assert t.groupby("rule")["flagged"].mean().gt(.9).all() and set(t["domain"]) == set(toy.domains)
    r = leak_report(t, np.ones(60))
    assert (r["all"] == 1).all() and r["clean"].isna().sum() + (r["clean"] == 1).sum() == len(r)
    assert find_leaks(toy)["item"].nunique() == toy.table["heldout_docs"].sum()

def test_a_rule_of_your_own():
    leak_rules.register("mine", LeakRule(4, lambda f: f.hits.sum(), 2))
    try: assert find_leaks(["one two three four five six"], ["one two three four five", "one two three four"], rules="mine")["flagged"].tolist() == [True, False]
    finally: leak_rules._items.pop("mine")

def test_nearest_items_are_listed():
    rng = np.random.default_rng(2)
    docs = [" ".join(rng.choice(WORDS, 40)) for _ in range(50)]
    shuffled = " ".join(rng.permutation(docs[17].split()))
    t = nearest_items(docs, [" ".join(rng.choice(WORDS, 40)), shuffled], most=1)
    assert t["item"].tolist() == [1] and t["document"].tolist() == [17] and not find_leaks(docs, [shuffled])["flagged"].any()
    own = nearest_items(docs, docs[:3], embed=lambda ts: np.array([[len(t), t.count("1"), t.count("2")] for t in ts]))
    assert np.allclose(own["cosine"], 1)
