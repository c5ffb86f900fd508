"The proxy: gradients against finite differences, stacked against single, and runs that survive a kill."
import json, os, random, subprocess, sys, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from mixbook.core import DataError, check_runs
from mixbook.decoder import AutogradStep, Decoder, HandStep, Linear, ProxyConfig, count_params, flops_per_token
from mixbook import proxy as proxy_module
from mixbook.proxy import adamw, choose_way, estimate_seconds, flatten, one_thread, pick_dtype, load_proxy, proxy_run_id, save_proxy, schedule_at, train_proxies, train_proxy

pytestmark = pytest.mark.filterwarnings("ignore::mixbook.core.MixbookWarning")


class Planted:
    "Three Markov chains, without files."
    def __init__(self, seed=0, vocab=64):
        self.domains, self.hash, self.vocab_size = ["a", "b", "c"], f"planted{seed}", vocab
        rng = np.random.default_rng(seed)
        self._t = {}
        for d in self.domains:
            rows, x = rng.dirichlet(np.full(vocab, .03), vocab).cumsum(1), [0]
            for u in rng.random(12_000): x.append(min(vocab - 1, int(np.searchsorted(rows[x[-1]], u))))
            self._t[d] = np.array(x, np.uint8)
    def tokens(self, domain, split="train"): return self._t[domain][:10_000] if split == "train" else self._t[domain][10_000:]
    def bytes_per_token(self, domain, split="train"): return 2.


CORPUS = Planted()
MIX = {"a": .5, "b": .3, "c": .2}
TINY = ProxyConfig(depth=1, tokens=40*4*16, seq_len=16, batch=4, vocab=64, eval_windows=12)
train = lambda mix=MIX, config=TINY, **kw: train_proxy(CORPUS, mix, config, **{"progress": False} | kw)
weights = lambda p: [o.detach() for o in p.model.parameters()]
same = lambda p, q: all(torch.equal(a, b) for a, b in zip(weights(p), weights(q)))


def both_steps(config, models=None, spans=None, seed=0):
    model = Decoder(config, models, list(range(models or 1))).double()
    _, grad = flatten(model)
    x = torch.randint(0, config.vocab, (models or 1, config.batch, config.seq_len + 1), generator=torch.Generator().manual_seed(seed))
    return model, grad, x, HandStep(model, config.batch, config.seq_len, spans), AutogradStep(model, config.batch, config.seq_len)


@pytest.mark.parametrize("models", [None, 2])
def test_hand_gradient_against_finite_differences(models):
    model, grad, x, hand, _ = both_steps(ProxyConfig(depth=2, width=16, heads=4, kv_heads=2, vocab=24, seq_len=7, batch=2), models)
    hand(x)
    g, rng, h = [p.grad.clone() for p in model.parameters()], random.Random(0), 1e-5
    for p, gp in zip(model.parameters(), g):
        for i in rng.sample(range(p.numel()), 12):
            at, loss = np.unravel_index(i, p.shape), []
            for step in (h, -2*h):
                p.data[at] += step
                loss.append(hand(x).sum().item())
            p.data[at] += h
            assert (loss[0] - loss[1])/(2*h) == pytest.approx(gp[at].item(), abs=2e-9, rel=2e-5)


@given(st.integers(1, 2), st.sampled_from([(16, 2, 1), (24, 2, 2), (32, 4, 2), (48, 6, 2), (24, 4, 1)]), st.integers(1, 40), st.integers(1, 3), st.integers(1, 6), st.sampled_from([None, 1, 3]))
@settings(max_examples=20, deadline=None)
def test_hand_gradient_against_autograd(depth, sizes, T, batch, spans, models):
    width, heads, kv = sizes
    _, grad, x, hand, auto = both_steps(ProxyConfig(depth=depth, width=width, heads=heads, kv_heads=kv, hidden=20, vocab=40, seq_len=T, batch=batch, tokens=10**4), models, min(spans, T))
    a, ga = auto(x), grad.clone()
    grad.fill_(float("nan"))  # whatever was there must not matter
    b = hand(x)
    assert torch.allclose(a, b, atol=1e-12) and torch.allclose(ga, grad, atol=1e-12)
    assert torch.allclose(auto.losses(x), hand.losses(x), atol=1e-12)


@pytest.mark.parametrize("models", [None, 2])
def test_single_step_leaves_no_trace(models):
    _, grad, x, hand, _ = both_steps(ProxyConfig(depth=2, vocab=40, seq_len=9, batch=2), models)
    hand(x)
    first = grad.clone()
    hand.losses(x.flip(1))
    hand(x.roll(1, -1))
    hand(x)
    assert torch.equal(first, grad)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_counts_are_those_of_the_model(depth):
    c = ProxyConfig(depth=depth, vocab=300)
    assert c.n_params == sum(p.numel() for p in Decoder(c).parameters()) == count_params(c)["total"]
    assert c.n_nonembed == sum(m.weight.numel() for b in Decoder(c).blocks for m in b.modules() if isinstance(m, Linear))
    assert flops_per_token(c) > 6*c.n_params


@given(st.sampled_from(["wsd", "cosine"]), st.integers(1, 400), st.floats(0, .5), st.floats(0, 1))
@settings(deadline=None)
def test_schedule_stays_between_zero_and_one(kind, steps, warmup, decay):
    c = ProxyConfig(schedule=kind, tokens=steps*1024, warmup=warmup, decay=decay)
    lr = [schedule_at(c, i) for i in range(c.steps)]
    assert min(lr) > 0 and max(lr) <= 1
    peak = int(np.argmax(lr))
    assert (np.diff(lr[:peak + 1]) >= 0).all() and (np.diff(lr[peak:]) <= 1e-12).all()


@pytest.mark.parametrize("bad", [dict(depth=0), dict(tokens=10), dict(schedule="linear"), dict(width=30, heads=4), dict(vocab=0)])
def test_bad_configs_are_refused(bad):
    with pytest.raises(DataError): ProxyConfig(**bad)


def test_stack_is_its_models():
    config = TINY.replace(depth=2, tokens=50*4*16)
    mixes, seeds, lrs = [MIX, {"a": 1.}, {"c": .9, "b": .1}], [0, 5, 5], [None, .004, .01]
    stack = train_proxies(CORPUS, mixes, config, seeds=seeds, lrs=lrs, how="stacked", progress=False)
    for p, mix, seed, lr in zip(stack, mixes, seeds, lrs):
        alone = train(mix, config if lr is None else config.replace(lr=lr), seed=seed)
        assert p.row["run"] == alone.row["run"] == proxy_run_id(CORPUS, mix, config if lr is None else config.replace(lr=lr), seed)
        for d in CORPUS.domains: assert p.row[f"loss/{d}"] == pytest.approx(alone.row[f"loss/{d}"], abs=1e-4)
        assert {k for k in p.row} == {k for k in alone.row}
    assert len({p.row["run"] for p in stack}) == 3
    sequential = train_proxies(CORPUS, mixes, config, seeds=seeds, lrs=lrs, how="sequential", progress=False)
    assert [p.row["run"] for p in sequential] == [p.row["run"] for p in stack]


def test_row_is_a_valid_row_with_exact_counts():
    p = train(evals=4)
    runs = check_runs(p.curve)
    assert runs["step"].tolist() == [10, 20, 30, 40] and (runs["tokens"] == runs["step"]*64).all()
    assert p.row["flops"] == p.row["tokens"]*flops_per_token(TINY)
    assert p.row["loss/a"] < runs["loss/a"].iloc[0] and 0 < p.row["loss/a_se"] < .5
    assert p.row["bpb/a"] == pytest.approx(p.row["loss/a"]/np.log(2)/2)
    assert p.row["unique_tokens"] <= p.row["tokens"] and p.row["passes/b"] == pytest.approx(.3*40*4/(9999//16), rel=.05)
    json.dumps(p.row)


def test_repetition_of_the_target_is_matched():
    p = train(config=TINY.replace(target_tokens=20*TINY.train_tokens, tokens=200*64))
    for d, w in MIX.items(): assert p.row[f"passes/{d}"] == pytest.approx(w*20*TINY.train_tokens/10_000, rel=.15)


def test_a_diverged_model_fails_alone_and_is_told():
    with pytest.warns(UserWarning, match="NaN or infinite at step"):
        a, b, c = train_proxies(CORPUS, [MIX]*3, TINY, seeds=[0, 1, 0], lrs=[None, 1e30, None], how="stacked", progress=False)
    assert [p.row["status"] for p in (a, b, c)] == ["done", "failed", "done"]
    assert same(a, c) and np.isnan(b.row["loss/a"]) and "smaller `lr`" in b.message
    assert a.row["loss/a"] == pytest.approx(train().row["loss/a"], abs=1e-4)
    check_runs(pd.DataFrame([a.row, b.row]))
    lone = train(config=TINY.replace(lr=1e30, tokens=400*64))
    assert lone.row["status"] == "failed" and lone.row["step"] < 400  # a lost run is not carried to its end


def test_bfloat16_is_close_and_said():
    a, b = train(dtype="float32"), train(dtype="bfloat16")
    assert b.row["device"] == "cpu bfloat16" and b.row["loss/a"] == pytest.approx(a.row["loss/a"], abs=.05)
    assert pick_dtype("cpu") == torch.float32


def test_a_replaced_matrix_trains():
    class Rounded(Linear):
        def forward(self, x): return x @ (self.weight + ((self.weight*64).round()/64 - self.weight).detach()).mT
    c = TINY
    model = Decoder(c)
    model.blocks[0].mlp.up.__class__ = Rounded
    flat, grad = flatten(model)
    step, m, v = proxy_module.gradients(model, c.batch, c.seq_len), torch.zeros_like(flat), torch.zeros_like(flat)
    from mixbook.stream import Stream
    s, losses = Stream(CORPUS, MIX, seq_len=16, batch=4), []
    for i in range(40):
        losses.append(float(step(torch.from_numpy(s.batch_at(i).astype(np.int64))[None])))
        adamw(flat, grad, m, v, torch.tensor([[.01]]), i, c)
    assert isinstance(step, AutogradStep) and np.mean(losses[-5:]) < losses[0] - .5


def test_threads_are_restored_and_probes_answer():
    n = torch.get_num_threads()
    with one_thread(): assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == n
    assert choose_way(TINY, 3)[0] in ("stacked", "sequential") and choose_way(TINY, 1)[0] == "sequential"
    assert 0 < estimate_seconds(TINY, CORPUS, n=2) and "one model fills" in choose_way(ProxyConfig(depth=6), 8)[1]
    assert [p.how for p in train_proxies(CORPUS, [MIX, MIX], TINY, how="auto", progress=False)] in (["stacked"]*2, ["sequential"]*2)


@pytest.mark.parametrize("how", ["stacked", "sequential"])
def test_interrupted_anywhere_ends_the_same(tmp_path, monkeypatch, how):
    many = lambda **kw: train_proxies(CORPUS, [MIX, {"b": 1.}], TINY, seeds=[1, 2], how=how, progress=False, evals=2, **kw)
    whole, advance, left = many(), proxy_module._advance, [0]
    def stopping(t):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        return advance(t)
    monkeypatch.setattr(proxy_module, "_advance", stopping)
    rng, stops = random.Random(0), 0
    while True:
        left[0] = rng.randrange(1, 12)
        try: got = many(checkpoint=tmp_path, save_seconds=0)
        except KeyboardInterrupt: stops += 1
        else: break
    assert stops > 3 and all(same(p, q) for p, q in zip(whole, got))
    drop = ["seconds", "created"]
    for p, q in zip(whole, got): pd.testing.assert_frame_equal(p.curve.drop(columns=drop), q.curve.drop(columns=drop))


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path):
    file = tmp_path/"c.safetensors"
    done = train(checkpoint=file)
    assert same(done, train(checkpoint=file))  # a finished run is only read
    for other in (dict(seed=1), dict(mix={"a": 1.}), dict(config=TINY.replace(tokens=80*64)), dict(config=TINY.replace(weight_decay=0.)), dict(unique_tokens={"a": 160})):
        with pytest.raises(DataError, match="belongs to run"): train(**other, checkpoint=file)
    whole, rng = file.read_bytes(), random.Random(0)
    for n in [0, 1, 8, 100, *(rng.randrange(len(whole)) for _ in range(10)), len(whole) - 1]:
        file.write_bytes(whole[:n])
        with pytest.raises(DataError, match="Delete it"): train(checkpoint=file)
    assert not [f for f in tmp_path.iterdir() if f != file]


KILL = '''
import os, random, signal, sys, time, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from test_proxy import TINY, CORPUS, MIX, train, train_proxies
from safetensors import safe_open
config, file = TINY.replace(tokens=150*64), sys.argv[2]
go = lambda: train(config=config, checkpoint=file, save_seconds=0)
kills, rng = 0, random.Random(0)
while True:
    pid = os.fork()
    if not pid:
        try: go()
        finally: os._exit(0)
    seen = lambda: os.stat(file).st_mtime_ns if os.path.exists(file) else 0
    early, first, status = rng.random() < .25, seen(), 0  # most kills come after some progress, a quarter anywhere in the start
    end = time.monotonic() + (rng.uniform(0, .05) if early else 60)
    while time.monotonic() < end and not status:
        status = os.waitpid(pid, os.WNOHANG)[0]
        if seen() != first and end > time.monotonic() + 1: end = time.monotonic() + rng.uniform(0, .04)
        time.sleep(.0005)
    if not status:
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0); kills += 1
        continue
    if kills >= 20: break
    os.remove(file)
print(kills, flush=True)
'''

def test_killed_twenty_times_ends_with_the_same_bits(tmp_path):
    file = tmp_path/"run.safetensors"
    out = subprocess.run([sys.executable, "-c", KILL, str(Path(__file__).parent), str(file)], capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0 and int(out.stdout) >= 20, out.stderr
    config = TINY.replace(tokens=150*64)
    whole = train(config=config)
    assert same(whole, train(config=config, checkpoint=file))
    with safe_open(file, "pt") as f: assert json.loads(f.metadata()["mixbook"])["step"] == 150
    assert list(tmp_path.iterdir()) == [file]


# ---------------------------------------------------------------- a file that stands alone

def test_a_saved_proxy_is_the_proxy(tmp_path):
    for p in (train(evals=3), train(config=TINY.replace(target_tokens=4*TINY.train_tokens, depth=2)), train_proxies(CORPUS, [MIX, {"a": 1.}], TINY, how="stacked", progress=False)[1]):
        q = load_proxy(save_proxy(p, tmp_path/"p.safetensors"))
        assert same(p, q) and (q.row, q.config, q.how, q.message, q.unique_tokens) == (p.row, p.config, p.how, p.message, p.unique_tokens)
        pd.testing.assert_frame_equal(q.curve, p.curve)
        assert (p.moments is None) == (q.moments is None) and all(torch.equal(p.moments[k], q.moments[k]) and p.moments[k].shape == (p.config.n_params,) for k in p.moments or {})
        x = torch.randint(0, 64, (2, 9))
        with torch.no_grad(): assert torch.equal(p.model(x), q.model(x))
    assert list(tmp_path.iterdir()) == [tmp_path/"p.safetensors"]
    (tmp_path/"p.safetensors").write_bytes(b"")  # what was read does not live in the file
    assert torch.isfinite(q.model.embed.weight).all()


def test_saved_proxies_that_are_refused(tmp_path):
    from safetensors.torch import save_file
    file, p, rng = tmp_path/"p.safetensors", train(), random.Random(0)
    whole = save_proxy(p, file).read_bytes()
    for n in [0, 1, 8, 100, *(rng.randrange(len(whole)) for _ in range(8)), len(whole) - 1]:
        file.write_bytes(whole[:n])
        with pytest.raises(DataError, match="damaged"): load_proxy(file)
    for at in (9, 60, 300, len(whole)//2, len(whole) - 3):  # one flipped bit in the header, the row or a tensor
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        with pytest.raises(DataError): load_proxy(file)
    with pytest.raises(DataError, match="no such file"): load_proxy(tmp_path/"absent")
    with pytest.raises(DataError, match="damaged"): load_proxy(tmp_path)
    for meta, said in ((None, "weights of another program"), ({"format": "pt"}, "weights of another program"), ({"mixbook": '{"quantized": 1}'}, "QuantizedModel.load"), ({"mixbook": "{]"}, "damaged"), ({"mixbook": '{"proxy": 9}'}, "newer mixbook")):
        save_file({"a": torch.ones(2)}, file, meta)
        with pytest.raises(DataError, match=said): load_proxy(file)
    train(checkpoint=tmp_path/"run.safetensors")
    with pytest.raises(DataError, match="not finished"): load_proxy(tmp_path/"run.safetensors")
    save_proxy(p, file)
    with pytest.raises(DataError, match="Delete it"): train(checkpoint=file)  # nor is it the checkpoint of a run


def test_a_proxy_that_diverged_or_does_not_fit_is_not_saved(tmp_path):
    p = train()
    file = save_proxy(p, tmp_path/"p.safetensors"); before = file.read_bytes()
    bad = load_proxy(file); bad.model.embed.weight.data[1, 1] = float("inf")
    with pytest.raises(DataError, match="1 of .* NaN or infinite in 'weights/embed.weight'"): save_proxy(bad, file)
    lone = train(config=TINY.replace(lr=1e30))
    with pytest.raises(DataError, match="Did the training diverge"): save_proxy(lone, file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    import dataclasses
    with pytest.raises(DataError, match="do not belong together"): load_proxy(save_proxy(dataclasses.replace(p, config=TINY.replace(depth=2)), tmp_path/"q.safetensors"))


def test_a_save_that_is_interrupted_leaves_what_was_there(tmp_path, monkeypatch):
    import mixbook.core as core
    file = save_proxy(train(), tmp_path/"p.safetensors"); before = file.read_bytes()
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(core.os, "fsync", full)
    with pytest.raises(DataError, match="No space left"): save_proxy(train(seed=1), file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
