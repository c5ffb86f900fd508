"Quantisers: properties over random matrices, gradients against the surrogate, stacks, types, compilation, files and bad input."
import copy, math
import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from mixbook.core import DataError, MixbookError, UnsupportedError
from mixbook.decoder import AutogradStep, Decoder, ProxyConfig, gradients
from mixbook.proxy import flatten
from mixbook.quant import (FakeQuantized, QATConfig, QuantizedModel, SCALE_FLOOR, clip_search, decay_groups, fake_quantize, finalize_qat, floor_scales, grid_levels, initial_scale, pack_codes, palettize,
                           pick_quantizer, prepare_qat, quantize, quantize_grads, quantizers, recover_codes, unpack_codes)
from mixbook.adapters import Ema, LoraConfig, adapter_parameters, add_adapters, load_adapters, save_adapters

KINDS = [(1, "binary"), (1.58, "seq"), (2, "seq"), (2, "balanced"), (2, "lsq"), (3, "lsq"), (4, "lsq"), (8, "lsq")]
each_kind = pytest.mark.parametrize("bits, method", KINDS, ids=[f"{m}{b}" for b, m in KINDS])
kind, per = st.sampled_from(KINDS), st.sampled_from(["row", "tensor"])
sizes = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))


def matrix(rows, cols, seed, dtype=torch.float64, models=None):
    w = torch.randn(*([models] if models else []), rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (w*torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).add(.1)).to(dtype)


# ---------------------------------------------------------------- the map

@given(kind, per, sizes, st.sampled_from([torch.float64, torch.float32]), st.sampled_from(["max", "mse"]))
@settings(max_examples=150, deadline=None)
def test_codes_levels_and_scales_are_the_forward_pass_to_the_bit(k, per, size, dtype, init):
    (bits, method), w = k, matrix(*size, dtype)
    q = quantize(w, bits, method=method, per=per, init=init)
    wq = fake_quantize(w, q.scale, bits, method)
    assert torch.equal(q.dequantize(), wq) and wq.dtype == dtype
    assert q.codes.dtype == torch.uint8 and int(q.codes.max()) < len(q.levels) <= 2**q.code_bits
    assert torch.equal(fake_quantize(wq, q.scale, bits, method), wq)  # idempotent at the same scale
    assert torch.equal(quantize(wq, bits, method=method, scale=q.scale).codes, q.codes)
    assert all(len(r.unique()) <= len(q.levels) for r in wq)


@given(kind, sizes, st.floats(1e-3, 1e3))
@settings(max_examples=80, deadline=None)
def test_scale_equivariance(k, size, c):
    (bits, method), w = k, matrix(*size)
    a = initial_scale(w, bits, method, init="mse")
    assume(float((c*a).min()) > SCALE_FLOOR)
    torch.testing.assert_close(fake_quantize(c*w, c*a, bits, method), c*fake_quantize(w, a, bits, method), rtol=1e-12, atol=0)


@given(sizes, kind)
@settings(max_examples=60, deadline=None)
def test_every_weight_goes_to_the_nearest_level(size, k):
    (bits, method), w = k, matrix(*size)
    a = initial_scale(w, bits, method)
    gap = (w[..., None] - a[..., None]*grid_levels(pick_quantizer(bits, method)[2], torch.float64)).abs()
    torch.testing.assert_close((fake_quantize(w, a, bits, method) - w).abs(), gap.amin(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bits, levels", [(1, 2), (1.58, 3), (2, 4)])
def test_no_further_level_at_the_maximum(bits, levels):
    w = matrix(64, 512, 0)
    a = w.abs().amax(1, keepdim=True)
    assert {len(r.unique()) for r in fake_quantize(w, a, bits)/a} <= {levels, levels + 1} and {len(r.unique()) for r in quantize(w, bits, scale=a).codes} == {levels}


# ---------------------------------------------------------------- gradients

def surrogate(w, a, w0, a0, bits, method):
    "W_q with rounding residuals and clipped set held at (w0, a0): what the straight-through gradient is the gradient of."
    g = pick_quantizer(bits, method)[2]
    x0, q0 = w0/a0, fake_quantize(w0, a0, bits, method)/a0
    inside = (x0 >= g.lo) & (x0 <= g.hi)
    return torch.where(inside, w + a*(q0 - x0), a*q0*g.outer)


@pytest.mark.parametrize("bits, method", KINDS[1:], ids=[f"{m}{b}" for b, m in KINDS[1:]])
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_gradient_is_that_of_the_surrogate(bits, method, per):
    w, v = matrix(5, 30, 3), matrix(5, 30, 4)
    a = initial_scale(w, bits, method, per=per, init="mse")*.8
    dw, da = quantize_grads(w, a, v, bits, method)
    f = lambda w1, a1: (surrogate(w1, a1, w, a, bits, method)*v).sum()
    g, e = pick_quantizer(bits, method)[2], 1e-6
    s = 1 if g.gain is None else (w.numel()*g.gain)**-.5
    for i in range(len(a)):
        d = torch.zeros_like(a); d[i] = e
        assert float(da[i]) == pytest.approx(float(f(w, a + d) - f(w, a - d))/(2*e)*s, rel=1e-5, abs=1e-8)
    for i, j in [(0, 0), (1, 7), (4, 29)]:
        d = torch.zeros_like(w); d[i, j] = e
        assert float(dw[i, j]) == pytest.approx(float(f(w + d, a) - f(w - d, a))/(2*e), rel=1e-5, abs=1e-8)


def published(w, alpha, g, bits):
    "Forward and gradients as the released code of ParetoQ writes them, line by line."
    a = alpha.clamp_min(1e-5)
    if bits in (1.58, 2):
        n, h, c = (2, .5, .99) if bits == 2 else (1.5, 0., .99)
        x = w/a
        q = (torch.round(torch.clamp(x, -c, c)*n - h) + h)/n
        small, big = (x < -c).double(), (x > c).double()
        Q = (n - h)/n
        da = ((small*-Q + big*Q + (1 - small - big)*(q - x))*g).sum(-1, keepdim=True)/w.numel()**.5
        return q*a, (1 - small - big)*g, da
    if bits == 1:
        q = torch.where(w >= 0, 1., -1.).double()
        return a*q, g*((w/a).abs() <= 1), (q*g).sum(-1, keepdim=True)/w.numel()**.5
    Qn, Qp = -2**(bits - 1), 2**(bits - 1) - 1
    x = w/a
    small, big = (x < Qn).double(), (x > Qp).double()
    da = ((small*Qn + big*Qp + (1 - small - big)*(x.round() - x))*g).sum(-1, keepdim=True)/(w.numel()*Qp)**.5
    return x.round().clamp(Qn, Qp)*a, (1 - small - big)*g, da


@given(st.sampled_from([1, 1.58, 2, 3, 4, 8]), sizes, st.floats(.2, 2))
@settings(max_examples=120, deadline=None)
def test_the_released_code(bits, size, factor):
    w, g = matrix(*size), matrix(*size[:2], size[2] + 5)
    a = initial_scale(w, bits)*factor
    a[0] = -.3  # a negative scale acts as the floor
    wq, dw, da = published(w, a, g, bits)
    torch.testing.assert_close(fake_quantize(w, a, bits), wq, rtol=1e-12, atol=1e-15)
    mine = quantize_grads(w, a, g, bits)
    torch.testing.assert_close(mine[0], dw, rtol=0, atol=0)
    torch.testing.assert_close(mine[1][1:], da[1:], rtol=1e-9, atol=1e-10)


@each_kind
def test_gradient_counts_the_whole_matrix(bits, method):
    w, g = matrix(1, 64, 0), matrix(1, 64, 1)
    a = initial_scale(w, bits, method)
    one, two = quantize_grads(w, a, g, bits, method)[1], quantize_grads(w.repeat(2, 1), a.repeat(2, 1), g.repeat(2, 1), bits, method)[1]
    torch.testing.assert_close(two, one.expand(2, 1)*(1 if method == "balanced" else 2**-.5))


@each_kind
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_stack_is_one_by_one(bits, method, per):
    w, g = matrix(6, 20, 0, models=3), matrix(6, 20, 9, models=3)
    a = initial_scale(w, bits, method, per=per)
    assert a.shape == (3, 6 if per == "row" else 1, 1)
    dw, da = quantize_grads(w, a, g, bits, method)
    q = quantize(w, bits, method=method, per=per)
    for m in range(3):
        assert torch.equal(fake_quantize(w, a, bits, method)[m], fake_quantize(w[m], a[m], bits, method))
        x, y = quantize_grads(w[m], a[m], g[m], bits, method)
        assert torch.equal(x, dw[m])
        torch.testing.assert_close(y, da[m], rtol=1e-12, atol=1e-14)
        assert torch.equal(quantize(w[m], bits, method=method, per=per).codes, q.codes[m])


@each_kind
def test_autograd_and_kernels_agree_in_place(bits, method):
    w, g = matrix(6, 20, 0).requires_grad_(), matrix(6, 20, 9)
    a = initial_scale(w.detach(), bits, method).requires_grad_()
    fake_quantize(w, a, bits, method).backward(g)
    wq, grad, work = torch.empty(6, 20, dtype=torch.float64), g.clone(), torch.empty(6, 20, dtype=torch.float64)
    with torch.no_grad():
        assert fake_quantize(w, a, bits, method, out=wq) is wq
        dw, da = quantize_grads(w, a, grad, bits, method, wq=wq, out=grad, scratch=work)
    assert dw is grad and torch.equal(dw, w.grad)
    torch.testing.assert_close(da, a.grad, rtol=1e-11, atol=1e-14)


# ---------------------------------------------------------------- types, compilation, scales

@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_rounded_in_float32(bits, method, dtype):
    w = matrix(4, 33, 0, dtype).requires_grad_()
    a = initial_scale(w.detach(), bits, method).requires_grad_()
    assert a.dtype == torch.float32
    wq = fake_quantize(w, a, bits, method)
    assert wq.dtype == dtype and torch.equal(wq, fake_quantize(w.detach().float(), a.detach(), bits, method).to(dtype))
    wq.backward(torch.ones_like(wq))
    want = quantize_grads(w.detach().float(), a.detach(), torch.ones(4, 33), bits, method)
    assert w.grad.dtype == dtype and a.grad.dtype == torch.float32
    torch.testing.assert_close(a.grad, want[1])
    out = torch.empty_like(w, requires_grad=False)
    assert torch.equal(fake_quantize(w, a, bits, method, out=out), wq)


@pytest.mark.filterwarnings("error::UserWarning:mixbook")
@pytest.mark.parametrize("bits, method", [(1.58, "seq"), (2, "seq"), (4, "lsq")])
def test_compiled_without_breaks(bits, method):
    w, a = matrix(8, 32, 0, torch.float32).requires_grad_(), torch.ones(8, 1, requires_grad=True)
    f = lambda w, a: (fake_quantize(w, a, bits, method)*w.detach()).sum()
    torch._dynamo.reset()
    torch.compile(f, backend="aot_eager", fullgraph=True)(w, a).backward()
    got = w.grad.clone(), a.grad.clone()
    w.grad = a.grad = None
    f(w, a).backward()
    torch.testing.assert_close(got, (w.grad, a.grad))


def test_prepared_model_compiles():
    model = prepare_qat(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), QATConfig(2))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for p, g in zip(model.parameters(), got): torch.testing.assert_close(g, p.grad)


def test_bfloat16_products_train():
    model = prepare_qat(Decoder(ProxyConfig(depth=2)), QATConfig(2))
    flatten(model)
    step = gradients(model, 2, 8, torch.bfloat16)
    loss = step(torch.zeros(1, 2, 9, dtype=torch.long))
    assert type(step) is AutogradStep and torch.isfinite(loss).all() and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_scales_below_the_floor_act_as_the_floor_and_recover():
    w = matrix(3, 8, 0)
    for bad in (-1., 0., 1e-9):
        a = torch.full((3, 1), bad, dtype=torch.float64)
        assert torch.equal(fake_quantize(w, a), fake_quantize(w, torch.full_like(a, SCALE_FLOOR)))
        assert torch.isfinite(quantize_grads(w, a, w)[1]).all()
    model = prepare_qat(nn.Linear(4, 4), QATConfig(2))
    model.scale.data.fill_(-3.)
    assert (finalize_qat(model)["model"].scale >= SCALE_FLOOR).all()
    floor_scales(model)
    assert (model.scale == SCALE_FLOOR).all()


def test_rows_of_zeros_stay_finite():
    for bits, method in KINDS:
        for init in ("max", "mse"):
            q = quantize(torch.zeros(2, 5), bits, method=method, init=init)
            assert torch.isfinite(q.dequantize()).all() and q.dequantize().abs().max() <= 1.5*SCALE_FLOOR
            assert torch.equal(quantize(torch.zeros(2, 5), bits, method=method, scale=q.scale).dequantize(), q.dequantize())


@given(kind, sizes)
@settings(max_examples=50, deadline=None)
def test_search_never_rises_and_beats_the_maximum(k, size):
    (bits, method), w, trace = k, matrix(*size), []
    a = clip_search(w, bits, method, trace=trace)
    mse = lambda a: (fake_quantize(w, a, bits, method) - w).square().mean(-1)
    assert (np.diff(trace) <= 1e-12).all() and (mse(a) <= mse(initial_scale(w, bits, method, init="max"))*(1 + 1e-9) + 1e-12).all()


# ---------------------------------------------------------------- models

def test_stacked_decoder_trains_as_its_models():
    c, x = ProxyConfig(depth=2, seq_len=8, batch=2), torch.randint(0, 256, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    stack = prepare_qat(Decoder(c, 3, [0, 1, 2]), QATConfig(2))
    flatten(stack)
    loss = AutogradStep(stack, 2, 8)(x)
    for m in range(3):
        one = prepare_qat(Decoder(c, None, m), QATConfig(2))
        flatten(one)
        torch.testing.assert_close(AutogradStep(one, 2, 8)(x[m:m + 1])[0], loss[m], rtol=1e-5, atol=1e-5)
        for p, q in zip(one.parameters(), stack.parameters()): torch.testing.assert_close(p.grad, q.grad[m], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("per", ["row", "tensor"])
@pytest.mark.parametrize("bits", [1.58, 2, 4])
def test_a_prepared_stack_has_a_scale_per_model_and_row(bits, per):
    c = ProxyConfig(depth=2, seq_len=8, batch=2)
    plan = QATConfig(bits, per=per, init="mse")
    stack = Decoder(c, 3, [0, 1, 2])
    stack.blocks[0].mlp.up.weight.data.mul_(1 + torch.arange(3.)[:, None, None])  # models of different sizes
    latent = [p.detach().clone() for p in stack.parameters()]
    prepare_qat(stack, plan)
    codes = finalize_qat(stack)
    for m in range(3):
        one = Decoder(c)
        for p, w in zip(one.parameters(), latent): p.data.copy_(w[m])
        one = finalize_qat(prepare_qat(one, plan))
        for n in one:
            rows = codes[n].codes.shape[-2]
            assert codes[n].scale.shape == (3, rows if per == "row" else 1, 1) and torch.equal(codes[n].codes[m], one[n].codes)
            torch.testing.assert_close(codes[n].scale[m], one[n].scale)
    up = codes["blocks.0.mlp.up"].scale
    assert not torch.equal(up[0], up[1])


def test_a_prepared_decoder_compiles_alone_and_in_a_stack():
    torch._dynamo.reset()
    for models in (None, 2):
        model = prepare_qat(Decoder(ProxyConfig(depth=1), models), QATConfig(2))
        x = torch.randint(0, 256, (*([models] if models else []), 2, 8), generator=torch.Generator().manual_seed(0))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        grads = []
        for f in (compiled, model):
            model.zero_grad()
            y = f(x)
            y.square().sum().backward()
            grads.append((y.detach(), *(p.grad.clone() for p in model.parameters())))
        for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_products_of_a_stack_are_those_of_its_models():
    c, x = ProxyConfig(depth=2, seq_len=8, batch=2), torch.randint(0, 256, (2, 2, 9), generator=torch.Generator().manual_seed(0))
    stack = prepare_qat(Decoder(c, 2, [0, 1]), QATConfig(2))
    flatten(stack)
    loss = gradients(stack, 2, 8, torch.bfloat16)(x)
    for m in range(2):
        one = prepare_qat(Decoder(c, None, m), QATConfig(2))
        flatten(one)
        torch.testing.assert_close(gradients(one, 2, 8, torch.bfloat16)(x[m:m + 1])[0], loss[m], rtol=2e-3, atol=2e-3)
        for p, q in zip(one.parameters(), stack.parameters()):
            assert p.dtype == torch.float32 and torch.isfinite(q.grad[m]).all() and float((p.grad - q.grad[m]).norm()) <= .05*float(p.grad.norm()) + 1e-6


def test_no_copy_of_the_weights_stays():
    model = prepare_qat(Decoder(ProxyConfig(depth=2)), QATConfig(2))
    held = sum(t.numel() for m in model.modules() for t in [*m._parameters.values(), *m._buffers.values()] if t is not None)
    assert held == sum(p.numel() for p in model.parameters()) == 32768 + sum(m.scale.numel() for m in model.modules() if isinstance(m, FakeQuantized))
    assert not any(torch.is_tensor(v) for m in model.modules() for v in vars(m).values())


def test_scales_are_never_decayed_and_training_lowers_the_loss():
    torch.manual_seed(0)
    model, x = prepare_qat(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), QATConfig(2, init="mse")), torch.randn(64, 16)
    y = torch.sin(x @ torch.randn(16, 4))
    opt, first = torch.optim.AdamW(decay_groups(model, .1), lr=3e-3), None
    assert {id(p) for p in opt.param_groups[1]["params"]} == {id(model[0].scale), id(model[2].scale)} and opt.param_groups[1]["weight_decay"] == 0
    for _ in range(150):
        loss = (model(x) - y).square().mean()
        first = first or loss.item()
        opt.zero_grad(); loss.backward(); opt.step()
    assert loss.item() < .5*first


def test_skip_bits_and_parts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok, self.body, self.lm_head, self.keep = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20), nn.Linear(8, 8)
    net = prepare_qat(Net(), QATConfig(2, head_bits=8, embedding_bits=3, skip="keep", per="tensor"))
    assert [(m.quantizer.bits, m.quantizer.part) for m in (net.tok, net.body, net.lm_head)] == [(3, "embedding"), (2, "body"), (8, "head")]
    assert type(net.keep) is nn.Linear and net.body.scale.shape == (1, 1)
    q = finalize_qat(net)
    assert set(q.others) == {"body.bias", "lm_head.bias", "keep.weight", "keep.bias"} and list(q.report().index) == ["embedding", "body", "head", "not quantised", "total"]


def test_a_module_used_twice_is_one_matrix(tmp_path):
    lin = nn.Linear(6, 6)
    net = prepare_qat(nn.Sequential(lin, nn.ReLU(), lin), QATConfig(2))
    q = finalize_qat(net)
    assert list(q) == ["0"] and q.tied == {"2": "0"} and q["2"] is q["0"] and len(list(net.parameters())) == 3
    fresh = nn.Linear(6, 6)
    again = QuantizedModel.load(q.save(tmp_path / "q.safetensors")).apply(nn.Sequential(fresh, nn.ReLU(), fresh), codes=True)
    x = torch.randn(2, 6)
    assert torch.equal(again(x), net(x))


@given(st.integers(1, 8), st.integers(1, 300), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_packing_round_trip(bits, n, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, n, dtype=np.uint8))
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, (n,)), codes)


@pytest.mark.parametrize("bits, method", KINDS)
def test_file_round_trip(tmp_path, bits, method):
    model = prepare_qat(Decoder(ProxyConfig(depth=2), 2, [0, 1]), QATConfig(bits, method=method))
    q = finalize_qat(model)
    back = QuantizedModel.load(q.save(tmp_path / "m.safetensors"))
    assert back.hash == q.hash and back.report("layer").equals(q.report("layer"))
    dense = back.apply(Decoder(ProxyConfig(depth=2), 2))
    for n, m in model.named_modules():
        if isinstance(m, FakeQuantized): assert torch.equal(dense.get_submodule(n).weight, m.weight)
    assert not list(tmp_path.glob(".*"))


def test_exact_codes_are_recovered_or_refused():
    for bits, method in KINDS:
        q = quantize(matrix(5, 60, 1, torch.float32), bits, method=method)
        torch.testing.assert_close(recover_codes(q.dequantize(), bits, method=method).dequantize(), q.dequantize(), rtol=1e-6, atol=0)
        assert torch.equal(recover_codes(q.dequantize(), bits, method=method, scale=q.scale).codes, q.codes)
    with pytest.raises(DataError, match="averaged"): recover_codes(torch.randn(4, 50), 2)


def test_average_bits_of_palettes_with_and_without_tables():
    "Sum of bits times weights over the weights; a table of 2**bits levels for each 16 rows on top."
    w = {"a": matrix(32, 48, 0, torch.float32), "b": matrix(64, 24, 1, torch.float32)}
    model = QuantizedModel({"a": palettize(w["a"], 2), "b": palettize(w["b"], 4)}, {}, {})
    n = {k: x.numel() for k, x in w.items()}
    tables = 2*4*16 + 4*16*16
    total = model.report().loc["total"]
    assert total["bits_per_weight"] == pytest.approx((2*n["a"] + 4*n["b"])/sum(n.values()))
    assert total["with_overhead"] == pytest.approx((2*n["a"] + 4*n["b"] + tables)/sum(n.values())) and total["bytes"] == math.ceil((2*n["a"] + 4*n["b"] + tables)/8)
    for k, b in (("a", 2), ("b", 4)): assert palettize(w[k], b).mse <= palettize(w[k], b, rows=None).mse + 1e-7


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("bits", [0, 16, 9, 2.5, -1, math.nan, math.inf, "two", None, 1e30])
def test_bits_that_do_not_exist(bits):
    with pytest.raises(UnsupportedError, match="expected bits"): quantize(torch.ones(2, 2), bits)
    if bits is not None:
        with pytest.raises(MixbookError): QATConfig(bits=bits)


@pytest.mark.parametrize("weight", [torch.zeros(0, 4), torch.zeros(4, 0), torch.full((2, 2), torch.nan), torch.full((2, 2), torch.inf), torch.ones(2, 2, dtype=torch.long), torch.ones(2, 2, 2, 2)])
def test_weights_that_cannot_be_quantised(weight):
    with pytest.raises(DataError): quantize(weight, 2)
    with pytest.raises(DataError): quantize(torch.ones(2, 2), 2, scale=torch.nan)


def test_a_refused_model_is_as_it_was():
    model = Decoder(ProxyConfig(depth=2))
    model.blocks[1].mlp.down.weight.data[0, 0] = torch.inf
    before = {n: (type(m), id(m)) for n, m in model.named_modules()}
    with pytest.raises(DataError, match="blocks.1.mlp.down"): prepare_qat(model)
    assert {n: (type(m), id(m)) for n, m in model.named_modules()} == before and not any(n.endswith("scale") for n, _ in model.named_parameters())


def test_models_with_nothing_to_quantise():
    for model in (nn.ReLU(), nn.Sequential(nn.Conv1d(2, 2, 1)), nn.LayerNorm(3)):
        with pytest.raises(DataError, match="found none"): prepare_qat(model)
        with pytest.raises(DataError, match="prepare_qat"): finalize_qat(model)
    with pytest.raises(DataError, match="skipped by"): prepare_qat(nn.Sequential(nn.Linear(2, 2)), QATConfig(skip="*"))
    with pytest.raises(UnsupportedError, match="max_norm"): prepare_qat(nn.Sequential(nn.Embedding(4, 4, max_norm=1.)))


def test_files_of_something_else(tmp_path):
    q = finalize_qat(prepare_qat(Decoder(ProxyConfig(depth=2))))
    f = q.save(tmp_path / "q.safetensors")
    whole = f.read_bytes()
    with pytest.raises(DataError): QuantizedModel.load(tmp_path / "absent.safetensors")
    for n in (0, 5, 100, len(whole)//2, len(whole) - 1):
        f.write_bytes(whole[:n])
        with pytest.raises(DataError, match="damaged"): QuantizedModel.load(f)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    f.write_bytes(flipped)
    with pytest.raises(DataError): QuantizedModel.load(f)
    from safetensors.torch import save_file
    save_file({"a": torch.ones(2)}, f)
    with pytest.raises(DataError): QuantizedModel.load(f)
    with pytest.raises(DataError): load_adapters(q.apply(Decoder(ProxyConfig(depth=2)), codes=True), f)
    for other in (Decoder(ProxyConfig(depth=3)), Decoder(ProxyConfig(depth=2, hidden=32)), nn.Linear(2, 2), Decoder(ProxyConfig(depth=2), 2)):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(DataError, match="architecture"): q.apply(other)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), other.state_dict().values()))
    with pytest.raises(DataError, match="was prepared for"): q.apply(prepare_qat(Decoder(ProxyConfig(depth=2)), QATConfig(4)))


# ---------------------------------------------------------------- averages and adapters

def test_average_of_two_models_has_four_levels_after_one_quantisation():
    a, b = (prepare_qat(Decoder(ProxyConfig(depth=2), seed=s), QATConfig(2)) for s in (0, 1))
    ema = Ema(a, decay=.5).update(b)
    with ema.swap(a): q = finalize_qat(a)["blocks.0.mlp.up"]
    assert all(len(r.unique()) <= 4 for r in q.dequantize())
    wrong = (a.blocks[0].mlp.up.weight + b.blocks[0].mlp.up.weight).detach()/2
    assert max(len(r.unique()) for r in wrong) > 4
    with pytest.raises(DataError, match="averaged"): recover_codes(wrong, 2)


def test_average_of_bfloat16_keeps_small_steps():
    lin = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    lin.weight.data.fill_(1.)
    ema = Ema(lin, decay=.999)
    lin.weight.data.fill_(2.)
    for _ in range(100): ema.update(lin)
    assert float(ema.averages["weight"][0, 0]) == pytest.approx(2 - .999**100, rel=1e-4)


@pytest.mark.parametrize("models", [None, 2])
def test_adapters_never_touch_the_codes(tmp_path, models):
    c = ProxyConfig(depth=2, seq_len=8, batch=2)
    q = finalize_qat(prepare_qat(Decoder(c, models), QATConfig(2)))
    model = add_adapters(q.apply(Decoder(c, models), codes=True), LoraConfig(rank=2))
    flat, grad = flatten(model)
    x = torch.randint(0, 256, (models or 1, 2, 9), generator=torch.Generator().manual_seed(0))
    step = gradients(model, 2, 8)
    first = step(x)
    for _ in range(20):
        step(x)
        flat.sub_(.5*grad)
    assert (step(x) < first).all() and finalize_qat(model).hash == q.hash and sum(p.numel() for p in model.parameters()) == flat.numel()
    f = save_adapters(model, tmp_path / "a.safetensors", dtype=None)
    twin = load_adapters(q.apply(Decoder(c, models), codes=True), f)
    assert all(torch.equal(a, b) for a, b in zip(adapter_parameters(model).values(), adapter_parameters(twin).values()))
    other = finalize_qat(prepare_qat(Decoder(c, models, [5]*models if models else 5), QATConfig(2))).apply(Decoder(c, models), codes=True)
    with pytest.raises(DataError, match="void on other codes"): load_adapters(other, f)
    assert not [p for p in other.parameters()] and other.blocks[0].mlp.up.codes is not None


def test_a_further_quantizer_is_one_function():
    from mixbook.quant import Grid
    quantizers.register("coarse", lambda bits: Grid(.5, .5, -2, 1, -4, 4, 4.) if bits == 2 else None)
    try: assert quantize(torch.tensor([[-9., -1., 1., 9.]]), 2, method="coarse", scale=1.).dequantize().tolist() == [[-3., -1., 1., 3.]]
    finally: quantizers._items.pop("coarse")
