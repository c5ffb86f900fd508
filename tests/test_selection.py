"Weights of tokens and documents: exact algebra, gradients against finite differences, ranking, resumption, and what must be refused."
import numpy as np, pandas as pd, pytest, torch
import mixbook.selection as ms
from mixbook.core import DataError, UnsupportedError
from mixbook.corpus import toy_corpus
from mixbook.decoder import AutogradStep, Decoder, HandStep, ProxyConfig, gradients, token_losses
from mixbook.importance import ClusterWeights, SubCorpus, cluster_weights, dsir_weights, embed_ngrams, gumbel_top, hashed_ngrams, kl_reduction, nested_clusters, passage_weights, passages, select_dsir
from mixbook.proxy import _batch, flatten, train_proxies, train_proxy
from mixbook.selection import (Objective, TokenTable, balance_weights, contributions, excess_loss, item_gradients, moore_lewis, reference_losses, replay_mixture, target_gradient, token_scores, top_tokens,
                               train_weighted, weighted_gradients)
from mixbook.stream import Stream


@pytest.fixture(scope="module")
def corpus(): return toy_corpus()

@pytest.fixture(scope="module")
def even(corpus): return {d: 1/3 for d in corpus.domains}

@pytest.fixture(scope="module")
def parent(corpus, even): return train_proxy(corpus, even, config(60, corpus), progress=False)

@pytest.fixture(scope="module")
def table(corpus, parent): return reference_losses(train_proxy(corpus, {"tables": 1.}, config(60, corpus), progress=False), corpus, 32)

def config(steps, corpus, **kw): return ProxyConfig(**{**dict(depth=1, tokens=steps*8*32, seq_len=32, vocab=corpus.vocab_size, eval_windows=8), **kw})
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))
def training(corpus, even, objective, seeds=(0,), starts=None, **kw): return ms._WeightedTraining(corpus, [even]*len(seeds), config(4, corpus, **kw), objective, list(seeds), starts, "cpu", 1, "auto")
def double(M=None, T=12, **kw):
    model = Decoder(ProxyConfig(depth=2, width=16, heads=2, vocab=20, seq_len=T, tokens=10**4, **kw), M, 3 if M is None else list(range(M))).double()
    return model, *flatten(model)


# ---------------------------------------------------------------- the step

@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("kind", [ms._WeightedHand, ms._WeightedAutograd])
def test_weighted_gradients_are_those_of_the_weighted_mean(models, kind):
    "Against finite differences, with weights that are held constant."
    M = models or 1; model, flat, grad = double(models); g = torch.Generator().manual_seed(0)
    x, w = torch.randint(0, 20, (M, 4, 13), generator=g), torch.rand(M, 4, 12, generator=g, dtype=torch.float64)
    step = kind(model, 4, 12); step.weigh = lambda windows, losses: w
    loss = step(x); exact = grad.clone(); plain = step.losses(x)
    assert torch.allclose(loss, (w*plain).mean((1, 2))) and torch.allclose(plain, (HandStep if kind is ms._WeightedHand else AutogradStep)(model, 4, 12).losses(x), atol=1e-12)
    for j in np.random.default_rng(0).choice(flat.shape[1], 25, replace=False):
        with torch.no_grad():
            flat[:, j] += 1e-6; up = (w*step.losses(x)).mean((1, 2)); flat[:, j] -= 2e-6; down = (w*step.losses(x)).mean((1, 2)); flat[:, j] += 1e-6
        assert torch.allclose((up - down)/2e-6, exact[:, j], atol=1e-7)

@pytest.mark.parametrize("models", [None, 2])
def test_weights_of_one_change_no_bit(models):
    M = models or 1; x = torch.randint(0, 20, (M, 4, 13), generator=torch.Generator().manual_seed(1)); found = []
    for make in (lambda m: gradients(m, 4, 12), lambda m: weighted_gradients(m, 4, 12, lambda x, l: torch.ones_like(l))):
        model = Decoder(ProxyConfig(depth=2, width=16, heads=2, vocab=20, seq_len=12, tokens=10**4), models, 3 if models is None else [0, 1]); _, grad = flatten(model)
        loss = make(model)(x); found.append((grad.clone(), loss.clone()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])

def test_a_weight_that_depends_on_the_loss_has_no_gradient():
    "Weights made of the losses themselves: the gradient is that of weights held constant, and differs from the one that would run through them."
    model, flat, grad = double(); x = torch.randint(0, 20, (1, 4, 13), generator=torch.Generator().manual_seed(2)); both = []
    for kind in (ms._WeightedHand, ms._WeightedAutograd):
        step = kind(model, 4, 12); step.weigh = lambda windows, losses: losses**2; step(x); both.append(grad.clone())
    assert torch.allclose(*both, atol=1e-12)
    through = torch.cat([g.flatten() for g in torch.autograd.grad((token_losses(model, x[0])**3).mean(), list(model.parameters()))])
    assert not torch.allclose(both[0][0], through, rtol=.1) and torch.allclose(3*both[0][0], through, atol=1e-10)  # d(l²·l) = 3 l² dl

def test_shared_keys_and_unknown_steps(corpus, monkeypatch):
    model = Decoder(ProxyConfig(depth=3, width=32, heads=2, vocab=20, seq_len=12, tokens=10**4, kv_layers=2)); flatten(model)
    assert type(weighted_gradients(model, 4, 12, None)) is ms._WeightedAutograd
    class Other: pass
    monkeypatch.setattr(ms, "gradients", lambda *a: Other())
    with pytest.raises(UnsupportedError, match="Weights are known for"): weighted_gradients(model, 4, 12, None)


# ---------------------------------------------------------------- ranking

@pytest.mark.parametrize("seed", range(20))
def test_top_tokens_is_a_stable_sort(seed):
    rng = np.random.default_rng(seed); shape = (2, int(rng.integers(1, 5)), int(rng.integers(1, 30))); keep = float(rng.uniform(.05, 1))
    s = torch.from_numpy(rng.integers(0, 4, shape).astype(float)); part = torch.from_numpy(rng.random(shape) < .8)
    got = top_tokens(s, keep, part).flatten(1).numpy()
    for m in range(2):
        open_ = np.flatnonzero(part[m].numpy().ravel()); n = max(1, int(np.round(keep*len(open_)))) if len(open_) else 0
        want = open_[np.argsort(-s[m].numpy().ravel()[open_], kind="stable")[:n]]
        assert set(np.flatnonzero(got[m])) == set(want)
    assert (top_tokens(s, 1.).all())

def test_scores_below_zero_are_ranked_by_sign():
    "Clipping at zero would make the last three tie, and keep the earlier one."
    loss, ref = torch.tensor([[1., 1., 1., 1.]]), torch.tensor([[.5, 3., 2., 1.5]])
    assert top_tokens(excess_loss(loss, ref), .5).tolist() == [[True, False, False, True]]
    assert top_tokens(excess_loss(loss, ref).clamp_min(0), .5).tolist() == [[True, True, False, False]]

def test_reducible_loss_and_moore_lewis_are_one_number():
    a, b = (torch.rand(7, 9, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(moore_lewis(b, a), (b.sum(1) - a.sum(1))/9) and torch.equal(moore_lewis(b, a), -excess_loss(a, b, per="example"))


# ---------------------------------------------------------------- objectives

@pytest.mark.parametrize("keep", [.3, .8])  # at 0.8 tokens of negative excess are ranked too
def test_the_divisor_is_the_number_of_kept_tokens(keep, corpus, even, table, parent):
    o = Objective(keep, reference=table); t = training(corpus, even, o, starts=[parent]); x = _batch(t); losses = t.gradients.losses(x).clone()
    kept = top_tokens(losses - torch.from_numpy(table.at(t.streams[0], 0))[None], keep); assert int(kept.sum()) == round(keep*8*32)
    loss = t.gradients(x); assert float(loss) == pytest.approx(float(losses[kept].mean()), rel=1e-5)
    ps = list(t.model.parameters()); want = torch.autograd.grad(token_losses(t.model, x[0])[kept[0]].mean(), ps)
    assert torch.allclose(t.grad[0], torch.cat([g.flatten() for g in want]), atol=1e-6)

@pytest.mark.parametrize("seeds", [(0,), (0, 5)])
def test_keeping_all_is_ordinary_training(seeds, corpus, even, table):
    c = config(25, corpus); plain = train_proxies(corpus, [even]*len(seeds), c, seeds=list(seeds), how="stacked" if len(seeds) > 1 else "sequential", progress=False)
    for o in (Objective(), Objective(.9999, reference=table), Objective(weights={d: 1. for d in corpus.domains}), Objective(padding=255)):  # 255 stands in no text
        got = train_weighted(corpus, even, c, o, seeds=seeds, progress=False)
        assert all(same(a, b) for a, b in zip(got, plain))
        assert all((a.row["run"] == b.row["run"]) == (not ms._say(o)) for a, b in zip(got, plain))
        assert all(a.row["loss/code"] == b.row["loss/code"] for a, b in zip(got, plain))

def test_padding_is_neither_ranked_nor_counted(corpus, even, parent, table):
    pad = int(np.bincount(corpus.tokens("prose")).argmax())
    for o in (Objective(padding=pad), Objective(.5, reference=table, padding=pad)):
        t = training(corpus, even, o, starts=[parent]); x = _batch(t); losses = t.gradients.losses(x).clone(); w = ms._weigh(t, x, losses); none = x[..., 1:] == pad
        assert none.any() and not w[none].any() and int((w > 0).sum()) == round(o.keep*int((~none).sum())) and float(w.mean()) == pytest.approx(1, rel=1e-5)
        assert float(t.gradients(x)) == pytest.approx(float((losses*(w > 0)).sum()/(w > 0).sum()), rel=1e-5)

def test_whole_domains_stay_out_of_the_ranking(corpus, even, parent, table):
    t = training(corpus, even, Objective(.25, reference=table, whole=["prose"]), starts=[parent]); x = _batch(t); w = ms._weigh(t, x, t.gradients.losses(x))[0]; prose = t.streams[0].domains_at(0) == "prose"
    assert prose.any() and (w[prose] > 0).all() and int((w[~prose] > 0).sum()) == round(.25*32*(~prose).sum())

def test_random_tokens_are_a_function_of_seed_and_step(corpus, even):
    def kept(seed, step): t = training(corpus, even, Objective(.4, score="random", seed=seed)); t.step = step; x = _batch(t); return ms._weigh(t, x, t.gradients.losses(x)) > 0
    assert torch.equal(kept(0, 1), kept(0, 1)) and not torch.equal(kept(0, 1), kept(0, 2)) and not torch.equal(kept(0, 1), kept(1, 1)) and int(kept(3, 0).sum()) == round(.4*256)

def test_a_model_as_reference_scores_like_its_table(corpus, even, parent, table):
    ref = train_proxy(corpus, {"tables": 1.}, config(60, corpus), progress=False); c = config(8, corpus); before = [p.clone() for p in ref.model.parameters()]
    a, b = (train_weighted(corpus, even, c, Objective(.6, reference=r), start=parent, progress=False)[0] for r in (ref, table))
    assert torch.allclose(a.model.embed.weight, b.model.embed.weight, atol=1e-5) and a.row["flops"] == b.row["flops"] > train_weighted(corpus, even, c, start=parent, progress=False)[0].row["flops"]
    assert all(torch.equal(p, q) for p, q in zip(before, ref.model.parameters())) and all(p.grad is None or not p.grad.any() for p in ref.model.parameters())

def test_a_reference_equal_to_the_model_still_trains(corpus, even, parent):
    "All scores tie at zero: the first tokens are kept, and their loss has a gradient."
    own = reference_losses(parent, corpus, 32); t = training(corpus, even, Objective(.25, reference=own), starts=[parent]); x = _batch(t)
    assert torch.equal(top_tokens(torch.zeros(1, 8, 32), .25)[0], torch.arange(256).view(8, 32) < 64)
    t.gradients(x); assert float(t.grad.norm()) > .01

def test_a_stack_is_its_models(corpus, even, parent, table):
    "Each model of a stack goes on from its own start, as it does alone."
    other = train_proxy(corpus, {"code": 1.}, config(60, corpus), seed=7, progress=False); c, o = config(3, corpus), Objective(.6, reference=table)
    both = train_weighted(corpus, even, c, o, seeds=(3, 4), start=[parent, other], progress=False); alone = [train_weighted(corpus, even, c, o, seeds=[s], start=p, progress=False)[0] for s, p in ((3, parent), (4, other))]
    for a, b in zip(both, alone): assert a.row["run"] == b.row["run"] and a.row["parent"] == b.row["parent"] and all(torch.allclose(p, q, atol=1e-4) for p, q in zip(a.model.parameters(), b.model.parameters()))
    assert both[0].row["parent"] != both[1].row["parent"]

@pytest.mark.parametrize("stop", [1, 13, 24])
def test_an_interrupted_run_ends_at_the_same_bits(stop, corpus, even, table, parent, tmp_path, monkeypatch):
    c, o = config(25, corpus), Objective(.6, reference=table, weights={"code": .5, "prose": 1., "tables": 1.5}); kw = dict(seeds=(3, 4), start=parent, progress=False)
    whole = train_weighted(corpus, even, c, o, **kw); real = ms._WeightedTraining.advance
    class Killed(Exception): pass
    def advance(t):
        if t.step == stop: raise Killed
        return real(t)
    monkeypatch.setattr(ms._WeightedTraining, "advance", advance)
    with pytest.raises(Killed): train_weighted(corpus, even, c, o, checkpoint=tmp_path/"c", save_seconds=0, **kw)
    monkeypatch.undo()
    again = train_weighted(corpus, even, c, o, checkpoint=tmp_path/"c", **kw)
    assert all(same(a, b) and a.row["run"] == b.row["run"] for a, b in zip(whole, again))
    with pytest.raises(DataError, match="belongs to run"): train_weighted(corpus, even, c, Objective(.5, reference=table), checkpoint=tmp_path/"c", **kw)

def test_run_ids_tell_all_that_decides(corpus, even, table, parent):
    c = config(2, corpus); other = TokenTable(table.corpus, {d: v + .1 for d, v in table.values.items()})
    made = [dict(), dict(start=parent), dict(objective=Objective(.6, reference=table)), dict(objective=Objective(.5, reference=table)), dict(objective=Objective(.6, reference=other)), dict(objective=Objective(.6, score="loss")), dict(objective=Objective(.6, score="random")),
            dict(objective=Objective(.6, score="random", seed=1)), dict(objective=Objective(weights={d: 2. for d in corpus.domains})), dict(objective=Objective(weights=table)), dict(objective=Objective(padding=0)), dict(objective=Objective(.6, reference=table, whole=("code",))), dict(objective=Objective(.6, reference=parent))]
    ids = [train_weighted(corpus, even, c, progress=False, **kw)[0].row["run"] for kw in made]
    assert len(set(ids)) == len(made) and ids == [train_weighted(corpus, even, c, progress=False, **kw)[0].row["run"] for kw in made]

def test_rows_are_runs(corpus, even, table, parent, tmp_path):
    from mixbook.core import read_runs, write_runs
    ps = train_weighted(corpus, even, config(10, corpus), Objective(.6, reference=table), seeds=(0, 1), start=parent, evals=2, progress=False)
    write_runs(pd.concat([p.curve for p in ps]), tmp_path); got = read_runs(tmp_path)
    assert len(got) == 4 and (got["parent"] == parent.row["run"]).all() and (got["keep"] == .6).all() and ps[0].how == "stacked" and len(ps[0].moments["v"]) == ps[0].config.n_params

def test_a_score_plugs_in(corpus, even, parent):
    token_scores.register("smallest", lambda losses, reference, noise: -losses)
    try:
        t = training(corpus, even, Objective(.2, score="smallest"), starts=[parent]); x = _batch(t); l = t.gradients.losses(x).clone(); kept = ms._weigh(t, x, l) > 0
        assert l[kept].max() <= l[~kept].min()
    finally: del token_scores._items["smallest"]

@pytest.mark.parametrize("make, said", [
    (lambda c, e, t: Objective(1.2), "at most 1"), (lambda c, e, t: Objective(float("nan")), "at most 1"), (lambda c, e, t: Objective(.5, score="exces"), "did you mean 'excess'"), (lambda c, e, t: Objective(weights={"code": -1.}), "not negative"),
    (lambda c, e, t: train_weighted(c, e, config(3, c), Objective(whole=("cod",))), "did you mean 'code'"), (lambda c, e, t: train_weighted(c, e, config(3, c), seeds=[]), "at least one seed"),
    (lambda c, e, t: train_weighted(c, e, config(3, c), Objective(.5, reference=TokenTable("another", t.values))), "found one of another"),
    (lambda c, e, t: train_weighted(c, e, config(3, c), Objective(.5, reference=TokenTable(t.corpus, {"code": t.values["code"]}))), "domain in the table of reference"),
    (lambda c, e, t: train_weighted(c, e, config(3, c), start=train_proxy(c, e, config(2, c, depth=2), progress=False)), "Take the sizes of its config"),
    (lambda c, e, t: excess_loss(torch.zeros(2, 3), torch.zeros(2, 4)), "same tokens")], ids=range(10))
def test_what_cannot_be_is_refused(make, said, corpus, even, table):
    with pytest.raises(DataError, match=said): make(corpus, even, table)


# ---------------------------------------------------------------- contributions

def test_contributions_are_directional_derivatives(corpus, even, parent):
    x = torch.from_numpy(Stream(corpus, even, seq_len=32, batch=6).batch_at(0).astype(np.int64)); y = torch.from_numpy(Stream(corpus, {"tables": 1.}, seq_len=32, batch=4).batch_at(0).astype(np.int64))
    direction = target_gradient(parent, y); got = contributions(parent, x, direction, batch=4); flat = torch.cat([g.flatten() for g in direction.values()])
    assert torch.allclose(got, item_gradients(parent, x, batch=4) @ flat, atol=1e-5) and torch.allclose(contributions(parent, y, direction).mean(), flat @ flat, rtol=1e-4)
    model = Decoder(parent.config).double(); step = 1e-5
    for p, q in zip(model.parameters(), parent.model.parameters()): p.data = q.detach().double()
    moved = []
    for sign in (1, -1):
        for p, g in zip(model.parameters(), direction.values()): p.data += sign*step*g.double()
        with torch.no_grad(): moved.append(token_losses(model, x))
        for p, g in zip(model.parameters(), direction.values()): p.data -= sign*step*g.double()
    assert torch.allclose(contributions(parent, x, direction, per="token").double(), (moved[0] - moved[1])/(2*step), atol=1e-3)
    adam = target_gradient(parent, y, adam=True); v = parent.moments["v"]
    assert torch.allclose(torch.cat([g.flatten() for g in adam.values()]), flat/(v.sqrt() + 1e-8), rtol=1e-4)

def test_first_order_holds_for_small_steps_and_fades(corpus, even, parent):
    y = torch.from_numpy(Stream(corpus, {"tables": 1.}, seq_len=32, batch=32).batch_at(0).astype(np.int64)); s = Stream(corpus, even, seq_len=32, batch=8, seed=5)
    G = torch.stack([item_gradients(parent, torch.from_numpy(s.batch_at(i).astype(np.int64))).mean(0) for i in range(24)]); predicted = G @ torch.cat([g.flatten() for g in target_gradient(parent, y).values()])
    ps = ms._params(parent.model); sizes = [p.numel() for p in ps.values()]
    def after(move): return float(ms._at(parent.model, {k: p - o.view(p.shape) for (k, p), o in zip(ps.items(), move.split(sizes))}, y).double().mean())
    with torch.no_grad(): fell = {eta: np.array([after(0*g) - after(eta*g) for g in G]) for eta in (.01, 3.)}
    r = {eta: np.corrcoef(f, predicted)[0, 1] for eta, f in fell.items()}
    assert r[.01] > .9 and (np.sign(fell[.01]) == np.sign(predicted.numpy())).mean() > .9 and r[3.] < r[.01] - .2


# ---------------------------------------------------------------- replay

@pytest.mark.parametrize("p", [0., .01, .3, 1.])
def test_weighted_and_sampled_replay_have_one_gradient(p, corpus, even, parent):
    "Sum over domains of wanted share times gradient, exactly, from one window of each domain read evenly."
    wanted = replay_mixture({"tables": 1.}, {"code": .25, "prose": .75}, p); w = balance_weights(even, wanted); assert sum(even[d]*w[d] for d in even) == pytest.approx(1)
    g = {d: item_gradients(parent, torch.from_numpy(Stream(corpus, {d: 1.}, seq_len=32, batch=8).batch_at(0).astype(np.int64))).mean(0) for d in even}
    assert torch.allclose(sum(even[d]*w[d]*g[d] for d in even), sum(wanted[d]*g[d] for d in even), atol=1e-6)
    if p in (0, 1): assert (w["tables"] == 0) == (p == 1) and (w["code"] == 0) == (p == 0)

def test_weighted_replay_agrees_in_expectation(corpus, even, parent):
    "Monte Carlo over steps of the stream: mean gradient of the weighted loss over an even mixture, against the sampled mixture."
    wanted = replay_mixture({"tables": 1.}, {"code": .5, "prose": .5}, .4); found = []
    for mix, weights in ((even, balance_weights(even, wanted)), (wanted, None)):
        t = ms._WeightedTraining(corpus, [mix], config(4, corpus, batch=32), Objective(weights=weights), [0], [parent], "cpu", 1, "auto"); gs = []
        for t.step in range(60): t.gradients(_batch(t)); gs.append(t.grad[0].clone())
        found.append(torch.stack(gs))
    a, b = found; gap = a.mean(0) - b.mean(0); error = (a.var(0)/60 + b.var(0)/60).sqrt()
    assert float((gap.abs() > 3*error + 1e-9).float().mean()) < .03 and float(gap.norm()) < .25*float(b.mean(0).norm())

def test_a_table_of_weights_is_a_weighted_loss(corpus, even, parent):
    rng = np.random.default_rng(0); base = reference_losses(parent, corpus, 32); table = TokenTable(corpus.hash, {d: rng.random(v.shape).astype(np.float32) for d, v in base.values.items()})
    t = training(corpus, even, Objective(weights=table), starts=[parent]); t.step = 3; x = _batch(t); losses = t.gradients.losses(x).clone()
    assert float(t.gradients(x)) == pytest.approx(float((losses[0]*torch.from_numpy(table.at(t.streams[0], 3))).mean()), rel=1e-5)


# ---------------------------------------------------------------- importance

def test_dsir_golden():
    assert dsir_weights(np.array([[3, 1]]), np.array([8, 2]), np.array([5, 5]))[0] == pytest.approx(.493720, abs=1e-5)
    assert dsir_weights(np.array([[3, 1]]), np.array([8, 2]), np.array([5, 5]), per="token")[0] == pytest.approx(.493720/4, abs=1e-5)
    assert dsir_weights(np.array([[3, 1]]), np.array([7, 1]), np.array([5, 5]), laplace=1.)[0] == pytest.approx(.493720, abs=1e-5)
    assert dsir_weights(np.array([[5, 5], [1, 9]]), np.array([6, 14])).tolist() == pytest.approx([0, 0], abs=1e-9)  # target equal to raw

def test_gumbel_top_samples_without_replacement():
    "The order in which two of four come, against the exact probabilities w_i w_j / (1 - w_i)."
    w = np.array([.5, .25, .15, .1]); seen = np.zeros((4, 4)); n = 6000
    for s in range(n): i, j = gumbel_top(np.log(w), 2, seed=s); seen[i, j] += 1/n
    want = w[:, None]*w/(1 - w[:, None])*(1 - np.eye(4))
    assert np.abs(seen - want).max() < 4*(want*(1 - want)/n).max()**.5 and (np.diag(seen) == 0).all()
    assert sorted(gumbel_top([0.]*5, 5)) == list(range(5)) and gumbel_top([0., 0., 0.], 2, seed=None).tolist() == [0, 1]

def test_ngrams_are_those_of_the_release():
    import hashlib
    got = hashed_ngrams(["Don't stop; don't!"], buckets=97); words = ["don", "'", "t", "stop", ";", "don", "'", "t", "!"]; want = np.zeros(97, int)
    for g in words + [" ".join(p) for p in zip(words, words[1:])]: want[int(hashlib.sha256(g.encode()).hexdigest(), 16)%97] += 1
    assert got.toarray()[0].tolist() == want.tolist() and hashed_ngrams(["a"], sizes=(2,)).sum() == 0 and hashed_ngrams([]).shape == (0, 10_000) and hashed_ngrams(["\ud800 x"]).sum() == 3

def test_selection_finds_what_was_planted(corpus):
    docs = [(d, t) for d in corpus.domains for t in corpus.texts(d)]; raw = hashed_ngrams(t for _, t in docs); name = np.array([d for d, _ in docs]); target = hashed_ngrams(corpus.texts("tables", "heldout")); n = 60
    got = select_dsir(raw, target, n, min_tokens=20); assert got["chosen"].sum() == n and (name[got["chosen"]] == "tables").mean() > .95
    random = np.random.default_rng(0).choice(len(docs), n, replace=False); gain = lambda i: kl_reduction(target, raw, raw[i])
    assert gain(np.flatnonzero(got["chosen"])) > max(0, gain(random)) and kl_reduction([target, raw], raw, raw) == 0
    assert got.loc[got["chosen"], "tokens"].min() >= 20 and not select_dsir(raw, target, 40, min_tokens=200)["chosen"][got["tokens"] < 200].any()
    a, b, c = (select_dsir(raw, target, n, min_tokens=20, per="token", seed=s)["chosen"] for s in (1, 2, 1)); assert a.equals(c) and not a.equals(b)
    with pytest.raises(DataError, match="Draw fewer"): select_dsir(raw, target, n, min_tokens=10**6)
    with pytest.raises(DataError, match="same `buckets`"): select_dsir(raw, hashed_ngrams(["x y"], buckets=50), n)

@pytest.mark.parametrize("seed", range(12))
def test_cluster_weights_average_to_one(seed):
    rng = np.random.default_rng(seed); k = int(rng.integers(1, 12)); general, target = rng.integers(0, k, 200), rng.integers(0, k + 2, int(rng.integers(1, 40)))
    kw = dict(smooth=float(rng.choice([.1, .5, 3])), prior=str(rng.choice(["uniform", "general"]))) | (dict(draws=150, max_repeats=float(rng.choice([.76, 1, 2]))) if rng.random() < .5 else {})
    c = cluster_weights(general, target, **kw); w = c.of(general)
    assert w.mean() == pytest.approx(1, abs=1e-12) and (w >= 0).all() and c.table["share_target"].sum() == pytest.approx(1) and c.ess == pytest.approx(w.sum()**2/(w**2).sum()) and 0 < c.ess <= 200 + 1e-9
    if "draws" in kw:
        assert (c.table["repeats"] <= kw["max_repeats"]*(1 + 1e-9)).all()
        drawn = np.bincount(c.draw(general, 150, seed), minlength=200); assert drawn.sum() == 150 and drawn.max() <= np.ceil(kw["max_repeats"]) + (kw["max_repeats"] < 1)
    assert ClusterWeights.from_json(c.to_json()).table.equals(c.table) or np.allclose(ClusterWeights.from_json(c.to_json()).table, c.table)

def test_capping_keeps_proportions_of_the_others():
    c = cluster_weights([0]*10 + [1]*60 + [2]*30, [0]*80 + [1]*10 + [2]*10, smooth=0, draws=100, max_repeats=2)
    assert c.table["share_target"].tolist() == pytest.approx([.2, .4, .4]) and c.table["repeats"].tolist() == pytest.approx([2, 2/3, 4/3])
    free = cluster_weights([0]*10 + [1]*60 + [2]*30, [0]*80 + [1]*10 + [2]*10, smooth=0); assert free.table["weight"].tolist() == pytest.approx([8, 1/6, 1/3])

def test_smoothing_is_the_formula():
    "(n_c + a)/(n + a C), and towards the general corpus (n_c + a C g_c)/(n + a C)."
    args = [0, 0, 0, 1, 2], [0, 0, 1]
    assert cluster_weights(*args, smooth=.5).table["share_target"].tolist() == pytest.approx([2.5/4.5, 1.5/4.5, .5/4.5])
    assert cluster_weights(*args, smooth=.5, prior="general").table["share_target"].tolist() == pytest.approx([2.9/4.5, 1.3/4.5, .3/4.5])

def test_resampling_and_reweighting_agree():
    "Monte Carlo over draws, and exactly in the expected number of readings of each document."
    rng = np.random.default_rng(0); general, target = rng.integers(0, 5, 80), rng.integers(0, 4, 30); c = cluster_weights(general, target); f = rng.normal(size=80) + general; n, R = 53, 3000
    read = np.zeros(80); means = []
    for s in range(R): i = c.draw(general, n, seed=s); read += np.bincount(i, minlength=80); means.append(f[i].mean())
    assert abs(np.mean(means) - (c.of(general)*f).mean()) < 4*np.std(means)/R**.5
    assert np.allclose(read/R, c.of(general)*n/80, atol=.06)

def test_what_general_text_cannot_stand_for_is_told():
    c = cluster_weights([0, 0, 1, 1], [0, 2, 2, 2], smooth=0); assert c.unreachable == pytest.approx(.75) and c.of([0, 0, 1, 1]).tolist() == [2, 2, 0, 0]
    with pytest.raises(DataError, match="clusters that the general corpus has"): cluster_weights([0, 1], [2, 2], smooth=0)
    with pytest.raises(DataError, match="`draws` and `max_repeats` together"): cluster_weights([0, 1], [1], draws=3)

@pytest.mark.parametrize("call, said", [
    (lambda: cluster_weights([0, None, 1], [0]), "general document as a whole number from 0, found None"), (lambda: cluster_weights([0, 1], [0, np.nan]), "target document"), (lambda: cluster_weights([0, -1], [0]), "found -1|found np.int64\\(-1\\)"),
    (lambda: cluster_weights(["a", "b"], ["a"]), "an array of shape"), (lambda: cluster_weights([[0, 1]], [0]), "an array of shape"), (lambda: cluster_weights([0, 1], []), "found 2 general and 0"), (lambda: cluster_weights([0, 1], [1]).of([2]), "from 0 to 1"),
    (lambda: cluster_weights([0, 1], [1]).draw([0, 0], 3), "that the weights were made for"), (lambda: cluster_weights([0, 1], [1]).draw([0, 1], 0), "at least one document"),
    (lambda: hashed_ngrams(["text", 3]), "int at position 1"), (lambda: hashed_ngrams(["text"], sizes=(0,)), "at least 1"), (lambda: select_dsir(["some text"], ["", ""], 1, min_tokens=1, laplace=0.), "n-grams in the target text"), (lambda: select_dsir([], ["text"], 1), "raw text"),
    (lambda: embed_ngrams(hashed_ngrams(["one"])), "at least two documents"), (lambda: nested_clusters(np.zeros((0, 3))), "found 0 documents"), (lambda: nested_clusters(np.ones((3, 2)), levels=()), "at least one level"), (lambda: nested_clusters(np.ones((3, 2)), [np.ones((3, 5))]), "finite vectors")])
def test_bad_clusters_and_texts_are_refused(call, said):
    with pytest.raises(DataError, match=said): call()

def test_nested_clusters_nest_and_place():
    rng = np.random.default_rng(0); centres = rng.normal(size=(6, 8))*10; truth = np.repeat(np.arange(6), 30); x = centres[truth] + rng.normal(size=(180, 8))*.1
    a, b = nested_clusters(x, [centres], levels=(6,)); assert len(set(a)) == 6 and all(len(set(a[truth == c])) == 1 and a[truth == c][0] == b[c] for c in range(6))
    coarse, fine = nested_clusters(x, levels=(3,))[0], nested_clusters(x, levels=(3, 4))[0]
    assert all(len(set(coarse[fine == c])) == 1 for c in set(fine)) and len(set(fine)) <= 12 and set(fine) == set(range(fine.max() + 1))
    assert nested_clusters(np.ones((9, 3)), levels=(4, 4))[0].tolist() == [0]*9  # nothing to divide
    with pytest.raises(DataError, match="not finite"): nested_clusters(np.where(np.eye(8) > 0, np.inf, 0.))

def test_a_sub_corpus_reads_what_it_says(corpus):
    table = passages(corpus, most=100); assert (table.groupby("domain").apply(lambda t: (t["stop"] - t["start"]).sum()) == pd.Series({d: len(corpus.tokens(d)) for d in corpus.domains})).all()
    part = table.iloc[[5, 5, 2, 400]]; sub = SubCorpus(corpus, {"b": part, "a": table[table["domain"] == "prose"]}); assert sub.domains == ["a", "b"]
    assert sub.tokens("b").tolist() == np.concatenate([corpus.tokens(d)[a:b] for d, a, b in part.itertuples(index=False)]).tolist() and np.array_equal(sub.tokens("a"), corpus.tokens("prose")) and np.array_equal(sub.tokens("a", "heldout"), corpus.tokens("prose", "heldout"))
    assert sub.bytes_per_token("a") == corpus.bytes_per_token("prose") and sub.hash == SubCorpus(corpus, dict(b=part, a=sub.parts["a"])).hash != SubCorpus(corpus, dict(b=part.iloc[1:], a=sub.parts["a"])).hash
    w = passage_weights(sub, {"b": [1., 2., 3., 4.]}, 16).values["b"]; n = (part["stop"] - part["start"]).to_numpy(); assert w.ravel().tolist() == np.repeat([1., 2., 3., 4.], n)[1:w.size + 1].tolist()
    with pytest.raises(DataError, match="finite weights"): passage_weights(sub, {"b": [1., 2., 3., np.nan]}, 16)
    with pytest.raises(DataError, match="did you mean|unknown"): passage_weights(sub, {"b": [1.]*4, "zz": []}, 16)
