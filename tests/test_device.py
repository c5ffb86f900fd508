"Keys and values that are shared in training, and the decoder rewritten for the device: the same logits in every form, and faults that are seen."
import itertools, json

import pytest
import torch

from mixbook.adapters import LoraConfig, add_adapters, save_adapters
from mixbook.core import DataError, UnsupportedError, run_id
from mixbook.corpus import toy_corpus
from mixbook.decoder import AutogradStep, Decoder, HandStep, ProxyConfig, count_params, flops_per_token, gradients, kv_shared, token_losses
from mixbook.device import DeviceConfig, DeviceModel, device_functions, kv_bytes, kv_int8, quantized_of, run_device, snap_scales
from mixbook.proxy import flatten, proxy_run_id, train_proxies, train_proxy
from mixbook.qat import _begin, _QATTraining, qat_schedule, round_to_nearest, train_qat
from mixbook.quant import QATConfig, QuantizedModel, finalize_qat, prepare_qat

torch.set_num_threads(1)
CONFIG = ProxyConfig(depth=4, width=64, heads=2, kv_layers=2, seq_len=32, batch=2, vocab=96)
corpus = pytest.fixture(scope="module")(lambda: toy_corpus())
mix = lambda corpus: {d: 1/len(corpus.domains) for d in corpus.domains}
text = lambda n, batch=1, vocab=96, seed=0: torch.randint(0, vocab, (batch, n), generator=torch.Generator().manual_seed(seed))
far = lambda a, b: float((a - b).abs().max())


def example(config=CONFIG, qat=QATConfig(bits=2), seed=0):
    "A prepared decoder whose attention is sharp, and the decoder with exactly the weights of its codes."
    model = Decoder(config, seed=seed)
    with torch.no_grad():
        for b in model.blocks: (b.attn.q if b.attn.shared else b.attn.qkv).weight.mul_(2)
    if qat is None: return model, model.requires_grad_(False)
    return prepare_qat(model, qat), quantized_of(model).apply(Decoder(config)).requires_grad_(False)


# ---------------------------------------------------------------- sharing keys and values in training

@pytest.mark.parametrize("sizes", [dict(depth=8), dict(depth=8, width=96, heads=6, kv_heads=2), dict(depth=3, vocab=500), dict(depth=1)])
def test_counts_of_sharing(sizes):
    own = ProxyConfig(**sizes)
    c = own.replace(kv_layers=kv_shared(own.depth))
    s, saved = c.shape, own.n_params - c.n_params
    assert saved == (s.depth - s.kv_layers)*2*s.width*s.kv_heads*s.head_dim
    assert sum(p.numel() for p in Decoder(c).parameters()) == c.n_params == count_params(c)["total"]
    assert flops_per_token(own) - flops_per_token(c) == 6*saved
    assert kv_bytes(c, 64)*s.depth == kv_bytes(own, 64)*s.kv_layers
    assert ("blocks with keys and values" in c._repr_markdown_()) == (s.kv_layers < s.depth)
    assert ProxyConfig.from_json(c.to_json()) == c


def test_eight_blocks_have_five_caches(): assert (kv_shared(8), kv_bytes(ProxyConfig(depth=8, kv_layers=5), 32)/kv_bytes(ProxyConfig(depth=8), 32)) == (5, 5/8)


@pytest.mark.parametrize("spread", [1e-3, 1., 1e3])
def test_keys_and_values_in_eight_bits(spread):
    "Symmetric, one scale per token and head: half a step at most, and 44.5 dB on Gaussians of 64 numbers."
    x = torch.randn(4, 2000, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)*spread
    codes, scale = kv_int8(x)
    assert codes.dtype == torch.int8 and scale.shape == (4, 2000, 1) and int(codes.min()) == -127 and int(codes.max()) == 127
    assert ((codes*scale - x).abs() <= scale/2*(1 + 1e-9)).all()
    assert abs(float(10*torch.log10(x.square().mean()/(codes*scale - x).square().mean())) - 44.5) < .2
    whole = x.abs().amax()/127  # one scale for everything loses a decibel and more
    assert float(10*torch.log10(x.square().mean()/((x/whole).round()*whole - x).square().mean())) < 43


def test_ids_of_plain_models_are_as_they_were(corpus):
    "The id is a hash of the fields that were there before sharing; what is the same model has the same id."
    for c in (ProxyConfig(), ProxyConfig(depth=3, lr=.01, tokens=50_000)):
        old = {k: v for k, v in json.loads(c.to_json()).items() if k not in ("type", "kv_layers")}
        want = run_id({"proxy": 1, "corpus": corpus.hash, "weights": {d: round(v, 12) for d, v in mix(corpus).items()}, "seed": 0, "unique_tokens": None,
                       "config": {**old, "shape": list(c.shape)[:6], "steps": c.steps, "lr": c.peak_lr}})
        assert proxy_run_id(corpus, mix(corpus), c) == want == proxy_run_id(corpus, mix(corpus), c.replace(kv_layers=c.depth))
        assert proxy_run_id(corpus, mix(corpus), c.replace(kv_layers=1, tokens=c.train_tokens)) != proxy_run_id(corpus, mix(corpus), c.replace(tokens=c.train_tokens))


def test_blocks_read_the_keys_of_the_last_block_that_has_its_own():
    "Written out by hand, in double precision."
    model = Decoder(CONFIG, seed=1).double()
    kept, x = [], text(12, 2)
    hook = lambda m, args, out: kept.append((args[3], out[1]))
    for b in model.blocks: b.attn.register_forward_hook(hook)
    with torch.no_grad(): model(x)
    assert kept[2][0] is kept[1][1] and kept[3][0] is kept[1][1] and kept[1][1] is not kept[0][1]


def test_a_shared_model_is_trained_by_autograd_and_stacks_like_one():
    model = Decoder(CONFIG, models=2, seed=[3, 4])
    flatten(model)
    step, x = gradients(model, 2, 32), text(33, 2)[None].expand(2, -1, -1)
    assert type(step) is AutogradStep
    loss, one = step(x), Decoder(CONFIG, seed=4)
    flatten(one)
    assert far(gradients(one, 2, 32)(x[:1]), loss[1:]) < 1e-5
    for p, q in zip(model.parameters(), one.parameters()): assert far(p.grad[1], q.grad) < 1e-5
    with pytest.raises(UnsupportedError, match="found 2 of 4"): HandStep(one, 2, 32)
    assert type(gradients(flatten(plain := Decoder(CONFIG.replace(kv_layers=None))) and plain, 2, 32)) is HandStep
    with pytest.raises(DataError, match="kv_layers"): ProxyConfig(depth=2, kv_layers=0)


def test_gradient_of_sharing_against_finite_differences():
    model, x = Decoder(CONFIG, seed=2).double(), text(9, 2)
    loss = lambda: token_losses(model, x).mean()
    for name in ("blocks.1.attn.qkv", "blocks.3.attn.q"):
        w = model.get_parameter(name + ".weight")
        g, = torch.autograd.grad(loss(), w)
        d = torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            w += 1e-5*d; up = loss(); w -= 2e-5*d; down = loss(); w += 1e-5*d
        assert abs(float((up - down)/2e-5 - (g*d).sum())) < 1e-7


def test_quantised_training_of_a_shared_model(corpus):
    c = CONFIG.replace(depth=3, vocab=256, tokens=24*64, eval_windows=8)
    p = train_qat(corpus, mix(corpus), c, qat_schedule(c, .5), QATConfig(bits=2), progress=False)
    assert p.row["status"] == "done" and p.row["n_params"] == c.n_params and hasattr(p.model.blocks[2].attn, "q")
    full = train_proxy(corpus, mix(corpus), c, progress=False)
    rounded = round_to_nearest(corpus, mix(corpus), full, QATConfig(bits=2))
    assert all(abs(rounded[k] - full.row[k]) > 0 for k in full.row if k.startswith("loss/") and not k.endswith("_se"))
    two = train_proxies(corpus, [mix(corpus)]*2, c, seeds=[0, 1], how="stacked", progress=False)
    assert max(far(a.detach(), b.detach()) for a, b in zip(two[0].model.parameters(), full.model.parameters())) < 1e-4


def test_the_quantised_step_of_a_shared_model_is_that_of_a_prepared_one(corpus):
    c = CONFIG.replace(vocab=256, tokens=20*64)
    t = _QATTraining(corpus, [mix(corpus)], c, qat_schedule(c, .5), QATConfig(bits=2), [0], [None], "cpu")
    t.step = t.schedule.switch
    _begin(t)
    model, x = prepare_qat(Decoder(c, seed=0), QATConfig(bits=2)), text(33, 2, 256)
    loss = token_losses(model, x).mean()
    assert abs(float(t.gradients(x[None])) - float(loss.detach())) < 1e-6
    named = dict(model.named_parameters())
    grads = dict(zip(named, torch.autograd.grad(loss, named.values())))
    for n, p in t.model.named_parameters(): assert far(p.grad, grads[n]) < 1e-6, n
    assert len(t.gradients.todo) == len(finalize_qat(model)) == 1 + 4*4
    t.use(torch.bfloat16)  # products in bfloat16, as on a GPU
    assert abs(float(t.gradients(x[None])) - float(loss.detach())) < .05


def test_codes_of_a_shared_model_are_saved_and_applied(tmp_path):
    model, exact = example()
    q = QuantizedModel.load(quantized_of(model).save(tmp_path/"q.safetensors"))
    (tmp_path/"plain").touch()
    assert (tmp_path/"q.safetensors").stat().st_mode == (tmp_path/"plain").stat().st_mode  # as the umask says, not private
    assert q.hash == quantized_of(model).hash and "blocks.2.attn.q" in q and "blocks.2.attn.qkv" not in q
    assert torch.equal(q.apply(Decoder(CONFIG), codes=True)(text(8)), exact(text(8)))
    with pytest.raises(DataError, match="another architecture"): q.apply(Decoder(CONFIG.replace(kv_layers=None)))


# ---------------------------------------------------------------- the same logits

FORMS = list(itertools.product(("plain", "ane"), ("state", "io"), ("onehot", "slice")))

@pytest.mark.parametrize("form,cache,write", FORMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_form_gives_the_logits_of_the_decoder(form, cache, write, batch):
    model, exact = example()
    f = device_functions(model, DeviceConfig(64, chunk=16, form=form, cache=cache, write=write, batch=batch))
    x = text(41, batch)
    want = exact(x)
    for steps in (0, 9, 41): assert far(run_device(f, x, steps=steps), want) < 1e-5
    assert far(run_device(f, x[:, :7], steps=2), want[:, :7]) < 1e-5  # from an empty cache again


@pytest.mark.parametrize("form", ["plain", "ane"])
@pytest.mark.parametrize("sizes", [dict(heads=4, kv_heads=2, width=128), dict(heads=4, kv_heads=4, width=128), dict(heads=3, kv_heads=1, width=96), dict(heads=1, width=64), dict(kv_layers=None), dict(kv_layers=1)])
def test_groups_and_heads(form, sizes):
    config = CONFIG.replace(depth=2, kv_layers=None).replace(**sizes)
    model, exact = example(config)
    x = text(37, 2)
    assert far(run_device(device_functions(model, DeviceConfig(64, chunk=16, form=form, batch=2)), x, steps=5), exact(x)) < 1e-5


@pytest.mark.parametrize("qat", [None, QATConfig(bits=1), QATConfig(bits=1.58), QATConfig(bits=3), QATConfig(bits=4), QATConfig(bits=2, method="balanced"), QATConfig(bits=2, method="balanced", per="tensor"),
                                 QATConfig(bits=2, per="tensor", embedding_bits=8), QATConfig(bits=2, skip=("blocks.0.*", "embed"))], ids=str)
@pytest.mark.parametrize("multiply", [True, False])
def test_every_quantiser(qat, multiply):
    model, exact = example(qat=qat)
    f, x = device_functions(model, DeviceConfig(32, chunk=8), multiply=multiply), text(30)
    assert far(run_device(f, x, steps=3), exact(x)) < 1e-5
    codes = quantized_of(model) if qat else {}
    for n, l in f["prefill"].linears().items():
        q = codes[n] if n in codes else None
        dense = l.matrix if l.row_scale is None else l.matrix*l.row_scale
        assert torch.equal(dense, (exact.get_submodule(n).weight if q is None else q.dequantize())[l.rows])
        assert (l.row_scale is None) == (q is None or not multiply or n == "embed")
        if l.row_scale is not None: assert torch.equal(torch.searchsorted(q.levels, l.matrix).to(torch.uint8), q.codes[l.rows]) and torch.equal(l.row_scale.half().float(), l.row_scale)


def test_coded_and_prepared_models_are_one():
    model, exact = example()
    coded = quantized_of(model).apply(Decoder(CONFIG), codes=True)
    a, b = (DeviceModel(m, DeviceConfig(32, chunk=8)) for m in (model, coded))
    assert a.codes_hash == b.codes_hash == quantized_of(model).hash
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(sorted(a.named_buffers()), sorted(b.named_buffers())))
    assert all(p.requires_grad for p in model.parameters())  # the trained model is left alone


@pytest.mark.parametrize("form,write", list(itertools.product(("plain", "ane"), ("onehot", "slice"))))
def test_prefill_may_skip_the_second_block(form, write):
    config = CONFIG.replace(depth=8, kv_layers=kv_shared(8))
    model, exact = example(config)
    x = text(48)
    want = exact(x)
    f = device_functions(model, DeviceConfig(64, chunk=16, form=form, write=write, skip=True))
    assert f["prefill"].cache_shape == (5, 1, 64, 32)
    for n, steps in ((32, 0), (41, 0), (48, 11), (9, 3)): assert far(run_device(f, x[:, :n], steps=steps), want[:, n - steps - 1:n]) < 1e-5
    with torch.no_grad(): assert f["prefill"](x[:, :16].int(), torch.zeros(1, dtype=torch.int32)).shape == (1, 1, 96)


@pytest.mark.parametrize("form", ["plain", "ane"])
def test_padding_leaves_no_trace(form):
    model, exact = example()
    x, want = text(32), None
    f = device_functions(model, DeviceConfig(32, chunk=24, form=form))
    at = lambda i: torch.tensor([i], dtype=torch.int32)
    with torch.no_grad():
        for pad in (0, 95):
            f["prefill"].reset()
            f["prefill"](x[:, :24].int(), at(0))
            last = torch.cat((x[:, 24:27], torch.full((1, 21), pad)), 1).int()  # 16 of the padded positions lie beyond the context
            out = [f["prefill"](last, at(24))[:, :3]] + [f["decode"](x[:, i:i + 1].int(), at(i)) for i in range(27, 32)]
            assert far(torch.cat(out, 1), exact(x)[:, 24:]) < 1e-5


def test_both_functions_have_one_cache_and_one_set_of_weights():
    f = device_functions(example()[0], DeviceConfig(32, chunk=8))
    a, b = f["prefill"], f["decode"]
    assert a.k_cache is b.k_cache and a.blocks is b.blocks and (a.tokens, b.tokens) == (8, 1) and (len(a.steps), len(b.steps)) == (8, 1)


def test_it_also_runs_in_fp16():
    "No infinity on the way, and errors of fp16's size: large activations, small embeddings."
    model, exact = example(CONFIG.replace(depth=2, kv_layers=1))
    with torch.no_grad(): exact.embed.weight.mul_(.1); exact.blocks[0].mlp.down.weight.mul_(300)
    x = text(40)
    want = exact(x)
    for form in ("plain", "ane"):
        f = device_functions(exact, DeviceConfig(64, chunk=16, form=form, cache="io"))
        for m in f.values(): m.half()
        got = run_device(f, x, steps=4)
        assert got.dtype == torch.float16 and torch.isfinite(got).all() and far(got.float(), want) < 2e-2*float(want.std())


# ---------------------------------------------------------------- adapters

@pytest.mark.parametrize("form", ["plain", "ane"])
def test_adapters_follow_the_rows(form, tmp_path):
    model, exact = example()
    coded = lambda: quantized_of(model).apply(Decoder(CONFIG), codes=True)
    adapted = add_adapters(coded(), LoraConfig(rank=3, alpha=6))
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if n.endswith("lora_up"): p.copy_(torch.randn(p.shape, generator=gen)*.02)
    file, x, c = save_adapters(adapted, tmp_path/"a.safetensors", dtype=None), text(30), DeviceConfig(32, chunk=8, form=form)
    want = adapted(x).detach()
    assert far(want, exact(x)) > .01
    for source, adapters in ((adapted, None), (coded(), file), (coded(), adapted), (model, adapted)):
        assert far(run_device(device_functions(source, c, adapters=adapters), x, steps=4), want) < 1e-5
    assert far(run_device(device_functions(adapted, c, adapters=False), x, steps=4), exact(x)) < 1e-5
    up = DeviceModel(adapted, c).blocks[0].attn["qkv"].up.flatten(1)
    adapted.blocks[0].attn.qkv.lora_up.data[:] = 0
    assert far(up, torch.zeros_like(up)) > 0  # a copy
    other = example(seed=5)[0]
    for adapters in (file, adapted):
        with pytest.raises(DataError, match="void on other codes"): DeviceModel(other, c, adapters=adapters)
    with pytest.raises(DataError, match="add_adapters"): DeviceModel(model, c, adapters=exact)
    with pytest.raises(DataError, match="prepare_qat"): DeviceModel(exact, c, adapters=file)


# ---------------------------------------------------------------- faults are seen

def _flip(f): f.blocks[1].mlp["up"].weight[3, 5] *= -1
def _scale(f): f.blocks[0].mlp["down"].scale[7] *= 1.05
def _rows(f): w = f.blocks[2].attn["q"].weight; w[[1, 2]] = w[[2, 1]]
def _turn(f): f.turn.copy_(f.turn.roll(1, 0))
def _low(f): f.turn[:, 64:] += 1e-3
def _mask(f): f.columns.add_(1)
def _norm(f): f.eps.mul_(30)
def _unordered(f): l = f.blocks[0].attn["qkv"]; back = torch.as_tensor(l.rows).argsort(); l.weight.copy_(l.weight[back]); l.scale.copy_(l.scale[back])
FAULTS = [_flip, _scale, _rows, _turn, _low, _mask, _norm, _unordered]

@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__[1:])
def test_faults_are_seen(fault):
    model, exact = example()
    f, x = device_functions(model, DeviceConfig(64, chunk=16)), text(40)
    assert far(run_device(f, x, steps=6), exact(x)) < 1e-5
    fault(f["prefill"])
    assert far(run_device(f, x, steps=6), exact(x)) > 1e-4


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_lost_write_is_seen(name):
    model, exact = example()
    f, x = device_functions(model, DeviceConfig(64, chunk=16)), text(40)
    run_device(f, x[:, :39])
    getattr(f["prefill"], name)[1, :, 38] = 0
    with torch.no_grad(): got = f["decode"](x[:, 39:].int(), torch.tensor([39], dtype=torch.int32))
    assert far(got[:, 0], exact(x)[:, 39]) > 1e-4


# ---------------------------------------------------------------- what is refused

def test_bad_sizes():
    for kw, said in (({"context": 48}, "Use 64"), ({"context": 32}, "found 64"), ({"chunk": 0}, "at least 1"), ({"batch": 1.5}, "whole number"), ({"form": "gpu"}, "unknown form"), ({"cache": "ram"}, "unknown cache"),
                     ({"write": "index"}, "unknown write"), ({"write": "slice", "chunk": 48}, "whole chunks")):
        with pytest.raises(DataError, match=said): DeviceConfig(**kw)


def test_models_that_cannot_be_rewritten():
    c = DeviceConfig(32, chunk=8)
    for model, config, said in ((torch.nn.Linear(2, 2), c, "expected a `Decoder`"), (Decoder(CONFIG, models=2), c, "stack of 2"), (Decoder(ProxyConfig(width=48, heads=2)), c, "width=64 at 2 heads"),
                                (Decoder(ProxyConfig(width=64, heads=4)), c, "heads=2, or with width=128 at 4 heads"), (Decoder(CONFIG.replace(kv_layers=None)), c.replace(skip=True), "kv_layers=2"), (Decoder(CONFIG), {}, "a `DeviceConfig`")):
        with pytest.raises(DataError, match=said): DeviceModel(model, config)
    x, narrow = text(20), example(ProxyConfig(width=32, vocab=96))
    assert far(run_device(device_functions(narrow[0], c.replace(cache="io")), x, steps=4), narrow[1](x)) < 1e-5  # heads of 16 numbers go in and out
    with pytest.raises(DataError, match="1 to 32 tokens"): DeviceModel(Decoder(CONFIG), c, 33)


def test_texts_that_do_not_fit():
    f = device_functions(example()[0], DeviceConfig(32, chunk=8, batch=2))
    for x, kw, said in ((text(33, 2), {}, "positions beyond the context"), (text(8), {}, r"shape \(2, n\)"), (text(8, 3), {}, "Set `batch`"), (text(8, 2) + 96, {}, "tokens from 0 to 95"), (text(8, 2).float(), {}, "float32"),
                        (text(8, 2), {"steps": 9}, "`steps` from 0 to 8"), (text(0, 2), {}, "1 to 32 tokens")):
        with pytest.raises(DataError, match=said): run_device(f, x, **kw)


def test_scales_that_fp16_cannot_hold():
    q = finalize_qat(example()[0])
    for bits in (1, 8, 11):
        snapped = snap_scales(q, bits=bits)
        for n in q:
            m, _ = torch.frexp(snapped[n].scale.double())
            assert torch.equal(m*2**bits, (m*2**bits).round()) and torch.equal(snapped[n].codes, q[n].codes) and float((snapped[n].scale/q[n].scale - 1).abs().max()) <= 2.**-bits
        assert snap_scales(snapped, bits=bits).hash == snapped.hash
    q.layers["blocks.0.attn.out"].scale.mul_(1e7)
    with pytest.raises(DataError, match="float16"): snap_scales(q)
    with pytest.raises(DataError, match="1 to 11"): snap_scales(q, bits=0)


# ---------------------------------------------------------------- what the converter sees

KNOWN = set("abs add amax arange cat chunk clone contiguous copy_ div embedding eq expand gt index_select linear matmul maximum mean mul narrow permute reshape rsqrt rsub select silu size slice softmax split squeeze stack sum t to transpose unsqueeze _convolution minimum Int".split())

@pytest.mark.parametrize("form,cache,write", FORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_operations_are_known_to_convert(form, cache, write):
    f = device_functions(example(CONFIG.replace(depth=2, kv_layers=1))[0], DeviceConfig(32, chunk=8, form=form, cache=cache, write=write, skip=True))
    for m in f.values():
        x = (torch.zeros(1, m.tokens, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)) + (() if cache == "state" else tuple(torch.zeros(m.cache_shape) for _ in range(2)))
        with torch.no_grad(): graph = torch.jit.trace(m, x, check_trace=False).inlined_graph
        seen = {n.kind().removeprefix("aten::") for n in graph.nodes() if n.kind().startswith("aten")}
        assert seen <= KNOWN, seen - KNOWN
