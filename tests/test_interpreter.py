"The interpreter against coremltools' own numpy, op by op; states, functions and compressed weights; what it refuses."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mixbook.constants import TensorType, constexprs, quiet
from mixbook.core import DataError, UnsupportedError
from mixbook.interpreter import Interpreter, interpret, ops, ops_of
from mixbook.package import ALLOWED_OPS, dense_value, read_package
from programs import compiled, ct, packed_type

pytest.importorskip("coremltools", reason="coremltools is not installed")


def rng(seed=0): return np.random.default_rng(seed)


DTYPE = {"float16": "fp16", "float32": "fp32", "int32": "int32", "bool": "bool", "int16": "int16", "uint16": "uint16", "int8": "int8", "uint8": "uint8"}


# ---------------------------------------------------------------- the cases

f16 = lambda *s, seed=0, lo=-3., hi=3.: rng(seed).uniform(lo, hi, s).astype(np.float16)
i32 = lambda *s, seed=0, lo=-9, hi=9: rng(seed).integers(lo, hi, s).astype(np.int32)
b1 = lambda *s, seed=0: rng(seed).integers(0, 2, s).astype(bool)
small = lambda *s, seed=0: (rng(seed).normal(size=s)*.1).astype(np.float16)
i = lambda *v: np.array(v, np.int32)


def cases():
    "(operation, tensors, attributes)"
    for op in ("abs", "ceil", "cos", "exp", "exp2", "floor", "relu", "round", "sign", "sin", "square", "tan", "tanh", "sigmoid", "softplus", "erf", "identity"):
        for shape in ((5,), (3, 4), (2, 1, 3, 5)): yield op, dict(x=f16(*shape)), {}
    for shape in ((7,), (2, 3, 4)):
        yield "sqrt", dict(x=f16(*shape, lo=0, hi=900)), {}
        for eps in (1e-3, 1e-2): yield "rsqrt", dict(x=f16(*shape, lo=1e-3, hi=90)), dict(epsilon=np.float16(eps))
        for eps in (0, 1e-3): yield "inverse", dict(x=f16(*shape, lo=.1, hi=90)), dict(epsilon=np.float16(eps))
        yield "log", dict(x=f16(*shape, lo=.1, hi=90)), dict(epsilon=np.float16(1e-3))
        yield "clip", dict(x=f16(*shape)), dict(alpha=np.float16(-.7), beta=np.float16(1.3))
    yield "logical_not", dict(x=b1(3, 4)), {}
    for op in ("add", "sub", "mul", "real_div", "maximum", "minimum"):
        for a, b in (((4,), (4,)), ((2, 3, 4), (3, 4)), ((2, 1, 4), (1, 3, 1))): yield op, dict(x=f16(*a), y=f16(*b, seed=1, lo=.5)), {}
        yield op, dict(x=f16(3, 4)), dict(y=np.float16(1.7))
        if op != "real_div": yield op, dict(x=i32(3, 4), y=i32(4, seed=1)), {}
    for op in ("mod", "floor_div"): yield op, dict(x=i32(3, 4), y=i32(4, seed=1, lo=1)), {}
    yield "pow", dict(x=f16(3, 4, lo=.1), y=f16(4, seed=1)), {}
    for op in ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal"):
        yield op, dict(x=f16(3, 4).round(), y=f16(4, seed=1).round()), {}
        yield op, dict(x=i32(3, 1), y=i32(1, 4, seed=1)), {}
    for op in ("logical_and", "logical_or", "logical_xor"): yield op, dict(x=b1(3, 4), y=b1(4, seed=1)), {}
    for x in (f16(2, 3), i32(2, 3)):
        for to in ("fp16", "fp32", "int32", "bool"): yield "cast", dict(x=x), dict(dtype=to)
    yield "cast", dict(x=b1(5)), dict(dtype="fp16")
    for op in ("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_sum_square", "reduce_l2_norm", "reduce_l1_norm"):
        for axes, keep in ((i(-1), True), (i(1), False), (i(0, 2), True), (i(-1, -2), False)): yield op, dict(x=(i32(3, 4, 8, lo=0, hi=8)/16).astype(np.float16)), dict(axes=axes, keep_dims=keep)  # sums that are exact in any order
    yield "reduce_prod", dict(x=f16(3, 4, lo=.9, hi=1.1)), dict(axes=i(-1), keep_dims=False)
    yield "reduce_log_sum_exp", dict(x=f16(3, 4)), dict(axes=i(-1), keep_dims=True)
    for op in ("reduce_argmax", "reduce_argmin"):
        for keep in (True, False): yield op, dict(x=f16(3, 40)), dict(axis=1, keep_dims=keep)
    for axis in (-1, 0, 1): yield "softmax", dict(x=f16(3, 4, 33)), dict(axis=axis)
    for a, b in (((3, 8), False), ((2, 5, 8), True), ((1, 1, 8), True)):
        yield "linear", dict(x=small(*a)), dict(weight=small(6, 8, seed=1), **(dict(bias=small(6, seed=2)) if b else {}))
    for a, b, tx, ty in (((3, 8), (8, 5), False, False), ((2, 3, 8), (2, 5, 8), False, True), ((2, 4, 8, 3), (2, 4, 8, 5), True, False), ((2, 1, 8, 3), (4, 5, 8), True, True)):
        yield "matmul", dict(x=small(*a), y=small(*b, seed=1)), dict(transpose_x=tx, transpose_y=ty)
    yield "einsum", dict(values=(small(2, 5, 3, 7), small(2, 7, 3, 4, seed=1))), dict(equation="nchw,nwhu->nchu")
    yield "einsum", dict(values=(small(5, 3, 7), small(7, 3, 4, seed=1))), dict(equation="chw,whr->chr")
    for axes in (i(-1), i(1, 2)):
        yield "layer_norm", dict(x=f16(2, 4, 16)), dict(axes=axes, epsilon=np.float16(1e-3))
        yield "layer_norm", dict(x=f16(2, 4, 16)), dict(axes=axes, epsilon=np.float16(1e-3), gamma=f16(*(2, 4, 16)[3 - len(axes):]), beta=f16(*(2, 4, 16)[3 - len(axes):], seed=1))
    for mask in (None, b1(4, 6) | (np.arange(6) == 0), small(2, 1, 4, 6)): yield "scaled_dot_product_attention", dict(query=small(2, 3, 4, 8), key=small(2, 3, 6, 8, seed=1), value=small(2, 3, 6, 8, seed=2), **({} if mask is None else dict(attn_mask=mask))), {}
    for to in (i(4, 6), i(2, -1), i(0, 12), i(1, 24, 1)): yield "reshape", dict(x=f16(2, 12)), dict(shape=to)
    for perm in (i(2, 0, 1), i(-1, 1, 0), i(0, 1, 2)): yield "transpose", dict(x=f16(2, 3, 4)), dict(perm=perm)
    for axes in (i(0), i(-1), i(1, 3), i(-1, 0)): yield "expand_dims", dict(x=f16(2, 3)), dict(axes=axes)
    for axes in (i(0), i(-1, 0), None): yield "squeeze", dict(x=f16(1, 2, 3, 1)), {} if axes is None else dict(axes=axes)
    for axis in (0, -1): yield "concat", dict(values=(f16(2, 2), f16(2, 2, seed=1), f16(2, 2, seed=2))), dict(axis=axis)
    yield "concat", dict(values=(i32(2, 3), i32(4, 3))), dict(axis=0)
    for axis in (0, 2, -1): yield "stack", dict(values=(f16(2, 3), f16(2, 3, seed=1))), dict(axis=axis)
    yield "split", dict(x=f16(6, 4)), dict(num_splits=3, axis=0)
    yield "split", dict(x=f16(2, 9)), dict(split_sizes=i(2, 3, 4), axis=1)
    for reps in (i(1, 3), i(2, 2)): yield "tile", dict(x=f16(2, 3)), dict(reps=reps)
    for axes in (i(0), i(0, 1)): yield "reverse", dict(x=f16(3, 4)), dict(axes=axes)
    x = f16(5, 6, 4)
    none, both = [False]*3, [True]*3
    for begin, end, more in ((i(1, 0, 2), i(4, 6, 4), {}), (i(0, -3, 0), i(-1, -1, 4), {}), (i(1, 5, 0), i(5, 0, 4), dict(stride=i(2, -2, 1), end_mask=[False, True, False])), (i(0, 0, 0), i(0, 0, 0), dict(begin_mask=both, end_mask=both)),
                             (i(2, 1, 0), i(0, 5, 4), dict(squeeze_mask=[True, False, False])), (i(-1, 1, 0), i(0, 5, 4), dict(squeeze_mask=[True, False, False])), (i(4, 3, 2), i(0, 0, 0), dict(begin_mask=[True, False, False], end_mask=[True, True, True], stride=i(-1, 1, 2)))):
        yield "slice_by_index", dict(x=x), dict(begin=begin, end=end, **more)
    yield "slice_by_index", dict(x=i32(7)), dict(begin=i(2), end=i(5))
    for begin, size in ((i(1, 0, 2), i(2, 3, 1)), (i(-2, 3, 0), i(1, -1, -1))): yield "slice_by_size", dict(x=x), dict(begin=begin, size=size)
    for begin, end, more, shape in ((i(1, 0, 2), i(3, 6, 4), {}, (2, 6, 2)), (i(0, -3, 0), i(5, -1, 4), {}, (5, 2, 4)), (i(2, 0, 0), i(0, 6, 4), dict(squeeze_mask=[True, False, False]), (6, 4)), (i(0, 0, 0), i(0, 0, 4), dict(end_mask=[True, True, False], stride=i(2, 3, 1)), (3, 2, 4))):
        yield "slice_update", dict(x=x, update=f16(*shape, seed=9)), dict(begin=begin, end=end, **more)
    for axis, indices in ((0, i(1, 3, 0)), (1, i(5)), (-1, i32(2, 3, lo=0, hi=4))): yield "gather", dict(x=x, indices=np.asarray(indices)), dict(axis=axis)
    yield "gather", dict(x=x), dict(indices=np.int32(2), axis=0)
    yield "gather", dict(x=f16(2, 5, 3), indices=i32(2, 4, lo=0, hi=5)), dict(axis=1, batch_dims=1)
    yield "gather", dict(x=x, indices=np.array([1, 2], np.uint16)), dict(axis=1)
    yield "gather_along_axis", dict(x=f16(3, 5), indices=i32(3, 4, lo=0, hi=5)), dict(axis=1)
    yield "select", dict(cond=b1(3, 4), a=f16(3, 4), b=f16(3, 4, seed=1)), {}
    yield "select", dict(cond=b1(3, 4), a=f16(3, 4), b=f16(4, seed=1)), {}
    for lo, up in ((-1, 0), (0, -1), (1, 2)): yield "band_part", dict(x=f16(2, 5, 6)), dict(lower=lo, upper=up)
    yield "cumsum", dict(x=i32(3, 5)), dict(axis=1, reverse=True)
    yield "cumsum", dict(x=f16(3, 5).round()), dict(axis=0)
    yield "shape", dict(x=f16(3, 4, 5)), {}
    yield "fill", {}, dict(shape=i(2, 3), value=np.float16(1.5))
    yield "range_1d", {}, dict(start=np.int32(2), end=np.int32(11), step=np.int32(3))
    for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"): yield "gelu", dict(x=f16(3, 4)), dict(mode=mode)


CASES = list(cases())
LOOSE = {"linear": 5e-4, "matmul": 5e-4, "einsum": 5e-4, "scaled_dot_product_attention": 5e-4}  # the order of additions in fp16
# softmax over another axis than the last: numpy adds row by row in fp16
DOUBLE = {"layer_norm": 4e-3, "gelu": 2e-3}  # the reference goes on in float64 from its first constant


def emit(mb, op, tensors, attributes): return getattr(mb, op)(**tensors, **attributes)


@pytest.fixture(scope="module")
def results(ct, tmp_path_factory):
    "For every case: the reference, and what the interpreter computes, in fp16 and with everything in fp32."
    from coremltools.converters.mil.mil import Builder as mb, Function
    out = {}
    for wide in (False, True):
        up = lambda a: a.astype(np.float32) if wide and getattr(a, "dtype", None) == np.float16 else a
        data = [(op, {k: tuple(map(up, v)) if isinstance(v, tuple) else up(v) for k, v in t.items()}, {k: up(v) for k, v in a.items()}) for op, t, a in CASES]
        flat = [v for _, t, _ in data for vs in t.values() for v in (vs if isinstance(vs, tuple) else (vs,))]
        def build(**given):
            it, made = iter(given.values()), []
            for op, t, a in data:
                t = {k: tuple(next(it) for _ in v) if isinstance(v, tuple) else next(it) for k, v in t.items()}
                y = emit(mb, op, t, a)
                made.append(mb.stack(values=y, axis=0) if isinstance(y, (tuple, list)) and len({v.shape for v in y}) == 1 else mb.concat(values=y, axis=a["axis"]) if isinstance(y, (tuple, list)) else y)
            return tuple(made)
        names = [f"v{n}" for n in range(len(flat))]
        namespace = {}
        exec(f"def named({', '.join(names)}): return build({', '.join(f'{n}={n}' for n in names)})", dict(build=build), namespace)
        with quiet():
            package = compiled(ct, namespace["named"], [(v.shape, DTYPE[v.dtype.name]) for v in flat], tmp_path_factory.mktemp("ops"))
            i = Interpreter(package, precision="float32" if wide else "float16")
            got = list(i.predict({n: torch.from_numpy(v.astype(np.int32) if v.dtype == np.uint16 else v) for n, v in zip(names, flat)}).values())
            refs = []
            for op, t, a in data:
                with Function({}, opset_version=ct.target.iOS18):
                    y = emit(mb, op, t, a)
                    refs.append(None if any(v.val is None for v in (y if isinstance(y, (tuple, list)) else (y,))) else np.stack([v.val for v in y]) if isinstance(y, (tuple, list)) and len({v.shape for v in y}) == 1
                                else np.concatenate([v.val for v in y], a["axis"]) if isinstance(y, (tuple, list)) else np.asarray(y.val))
        out[wide] = list(zip(refs, got))
    return out


@pytest.mark.parametrize("wide", [False, True], ids=["fp16", "fp32"])
@pytest.mark.parametrize("op", sorted({c[0] for c in CASES}))
def test_operation_agrees_with_its_reference(results, op, wide):
    seen = 0
    for (name, t, a), (ref, got) in zip(CASES, results[wide]):
        if name != op: continue
        assert ref is not None, f"{op} has no reference"
        assert got.shape == ref.shape, (t, a)
        diff = np.abs(ref.astype(np.float64) - got.double().numpy()).max()
        bound = (LOOSE | DOUBLE).get(op, 1e-3 if op == "softmax" and a["axis"] != -1 else 0.) if not wide else 2e-6*max(1, np.abs(ref.astype(np.float64)).max())
        assert diff <= bound, f"{op} {a}: {diff:.2e}"
        seen += 1
    assert seen


NO_REFERENCE = {"silu", "conv", "one_hot", "fill_like", "read_state", "write_state", "coreml_update_state"}


def test_every_operation_is_compared_with_something(ct):
    "Operations whose class in coremltools has no value inference are compared with torch below; all others with that inference above."
    from coremltools.converters.mil.mil.operation import Operation
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
    def has_reference(name):
        versions = [v for table in (SSAOpRegistry.core_ops, SSAOpRegistry.dialect_ops) for k, v in table.items() if k == name]
        classes = [c for v in versions for c in (v.values() if isinstance(v, dict) else [v])]
        return any(c.value_inference is not Operation.value_inference for c in classes)
    assert set(ops) - {c[0] for c in CASES} == NO_REFERENCE
    assert {o for o in NO_REFERENCE if has_reference(o)} <= {"fill_like"}  # its reference needs a shape that is a constant
    assert ALLOWED_OPS <= set(ops) | set(constexprs) | {"const"}


# ---------------------------------------------------------------- without a reference: against torch, shapes against coremltools

def test_silu_and_fill(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb
    x = f16(3, 50)
    p = compiled(ct, lambda x: (mb.silu(x=x), mb.fill_like(ref_tensor=x, value=np.float16(2.5))), [(x.shape, "fp16")], tmp_path)
    y, full = Interpreter(p, precision="float16").predict({"x": x}).values()
    want = F.silu(torch.from_numpy(x).float()).half().float()
    assert torch.equal(y, want) and (full == 2.5).all() and full.shape == y.shape


def test_one_hot(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb
    k = i32(2, 3, lo=0, hi=5)
    p = compiled(ct, lambda k: tuple(mb.one_hot(indices=k, one_hot_vector_size=5, axis=a, on_value=np.float16(2), off_value=np.float16(-1)) for a in (-1, 0, 1)), [(k.shape, "int32")], tmp_path)
    for a, y in zip((-1, 0, 1), Interpreter(p).predict({"k": k}).values()): assert torch.equal(y, (F.one_hot(torch.from_numpy(k).long(), 5)*3. - 1).movedim(-1, a))


def convolve(x, w, strides, before, after, dilations, groups):
    "Convolution by its definition."
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *zip(before, after)])
    n, spatial = len(strides), [(size - (k - 1)*d - 1)//s + 1 for size, k, d, s in zip(x.shape[2:], w.shape[2:], dilations, strides)]
    out, per, co = np.zeros((x.shape[0], w.shape[0], *spatial)), w.shape[1], w.shape[0]//groups
    for o in range(w.shape[0]):
        for pos in np.ndindex(*spatial):
            part = x[(slice(None), slice(o//co*per, o//co*per + per), *(slice(p*s, p*s + (k - 1)*d + 1, d) for p, s, k, d in zip(pos, strides, w.shape[2:], dilations)))]
            out[(slice(None), o, *pos)] = (part*w[o]).sum(tuple(range(1, n + 2)))
    return out


@pytest.mark.parametrize("shape, weight, kw, before, after", [
    ((1, 8, 1, 5), (6, 8, 1, 1), dict(), (0, 0), (0, 0)), ((2, 8, 3, 5), (6, 8, 1, 1), dict(), (0, 0), (0, 0)), ((1, 8, 1, 6), (6, 8, 1, 1), dict(strides=i(1, 2)), (0, 0), (0, 0)), ((1, 8, 4, 6), (6, 4, 1, 1), dict(groups=2), (0, 0), (0, 0)),
    ((1, 3, 5, 6), (4, 3, 3, 2), dict(), (0, 0), (0, 0)), ((1, 3, 5, 6), (4, 3, 3, 2), dict(pad_type="custom", pad=i(1, 0, 2, 1)), (1, 2), (0, 1)), ((1, 3, 5, 6), (4, 3, 3, 3), dict(pad_type="same", strides=i(1, 1)), (1, 1), (1, 1)),
    ((1, 3, 6, 6), (4, 3, 3, 3), dict(pad_type="same", strides=i(2, 2)), (0, 0), (1, 1)), ((1, 3, 6, 6), (4, 3, 3, 3), dict(pad_type="same_lower", strides=i(2, 2)), (1, 1), (0, 0)), ((1, 3, 9), (4, 3, 3), dict(dilations=i(2)), (0,), (0,)),
    ((1, 2, 4, 4, 4), (2, 2, 2, 2, 2), dict(), (0, 0, 0), (0, 0, 0)), ((1, 8, 1, 5), (6, 8, 1, 1), dict(pad_type="custom", pad=i(0, 0, 1, 0)), (0, 1), (0, 0))])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution(ct, tmp_path, shape, weight, kw, before, after, bias):
    from coremltools.converters.mil.mil import Builder as mb
    x, w, b = small(*shape), small(*weight, seed=1), small(weight[0], seed=2)
    p = compiled(ct, lambda x: mb.conv(x=x, weight=w, **kw, **(dict(bias=b) if bias else {})), [(shape, "fp16")], tmp_path)
    y, = Interpreter(p).predict({"x": x}).values()  # its shape is compared with the declared one
    n = len(shape) - 2
    want = convolve(x, w.astype(np.float64), kw.get("strides", [1]*n), before, after, kw.get("dilations", [1]*n), kw.get("groups", 1))
    np.testing.assert_allclose(y.numpy(), want + (b.astype(np.float64).reshape(-1, *[1]*n) if bias else 0), atol=1e-6)


# ---------------------------------------------------------------- compressed weights

def constants(ct, folder, build, target=None):
    "What coremltools says of its constexpr operations, and what is read from the protobuf and the weight file."
    from coremltools.converters.mil.mil import Builder as mb
    refs = []
    def prog(x):
        out = build(mb)
        refs.extend(np.asarray(v.op.materialized_val_inference()) if all(o.val is not None for o in v.op.inputs.values()) or v.op.op_type.endswith("scale") else None for v in out)
        return tuple(mb.add(x=mb.cast(x=v, dtype="fp32"), y=mb.reduce_sum(x=x)) for v in out)
    p = compiled(ct, prog, [((2,), "fp32")], folder, target)
    f = p.function()
    return refs, [dense_value(f, o.out) for o in f.ops if o.type.startswith("constexpr_") and any(not u.type.startswith("constexpr_") for u in f.users[o.out])], p


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_tables(ct, tmp_path, bits):
    codes = lambda *s: rng(bits).integers(0, 2**bits, s).astype(np.uint8).astype(packed_type(f"uint{bits}"))
    lut = lambda *s, dtype=np.float16: (rng(7).normal(size=s)*50).astype(dtype)
    def build(mb):
        L = lambda i, t, **k: mb.constexpr_lut_to_dense(indices=i, lut=t, **k)
        K = 2**bits
        return [L(codes(6, 8), lut(1, 1, K, 1)), L(codes(6, 8), lut(6, 1, K, 1)), L(codes(6, 8), lut(3, 1, K, 1)), L(codes(6, 8), lut(2, 4, K, 1)), L(codes(6, 8, 1, 1), lut(3, 1, 1, 1, K, 1)), L(codes(13), lut(1, K, 1)),
                L(codes(4, 6), lut(1, 1, K, 3), vector_axis=np.int32(0)), L(codes(4, 6), lut(2, 1, K, 2), vector_axis=np.int32(-1)), L(codes(4, 6), lut(1, 1, K, 1, dtype=np.int8)), L(codes(4, 6), lut(1, 1, K, 1, dtype=np.float32))]
    for ref, got in zip(*constants(ct, tmp_path, build)[:2], strict=True): assert got.dtype == ref.dtype and np.array_equal(ref, got)


@pytest.mark.parametrize("kind", ["int4", "uint4", "int8", "uint8", "fp16", "fp32"])
def test_scales(ct, tmp_path, kind):
    lo, hi = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}.get(kind, (-99, 99))
    np_type = packed_type(kind) if kind.endswith("4") else np.dtype({"fp16": np.float16, "fp32": np.float32}.get(kind, kind))
    whole = lambda *s: rng(3).integers(lo, hi, s).astype(np.int8 if lo < 0 else np.uint8).astype(np_type)
    def build(mb):
        S = lambda d, s, o=None: mb.constexpr_blockwise_shift_scale(data=d, scale=s, **({} if o is None else dict(offset=o)))
        out = [S(whole(6, 8), s(shape), o) for s in (lambda q: small(*q), lambda q: small(*q).astype(np.float32)) for shape in ((6, 1), (1, 1), (3, 4), (6, 8)) for o in (None, whole(*shape))]
        return out + [S(whole(6, 8, 1, 1), small(6, 1, 1, 1))]
    for ref, got in zip(*constants(ct, tmp_path, build)[:2], strict=True): assert np.array_equal(ref.astype(got.dtype), got)


def test_table_times_scale_and_scaled_tables(ct, tmp_path):
    codes, levels, scale = rng(1).integers(0, 4, (6, 8)).astype(np.uint8), np.float16([-1.5, -.5, .5, 1.5]), small(6, 1)
    def build(mb):
        dense = mb.constexpr_lut_to_dense(indices=codes.astype(packed_type("uint2")), lut=levels.reshape(1, 1, 4, 1))
        table = mb.constexpr_blockwise_shift_scale(data=np.tile(rng(2).integers(-9, 9, (1, 1, 4, 1)).astype(np.int8), (6, 1, 1, 1)), scale=scale.reshape(6, 1, 1, 1))
        return [mb.constexpr_blockwise_shift_scale(data=dense, scale=scale), mb.constexpr_lut_to_dense(indices=codes.astype(packed_type("uint2")), lut=table)]
    refs, got, p = constants(ct, tmp_path, build)
    table = np.repeat((rng(2).integers(-9, 9, 4).astype(np.float16))[None], 6, 0)*scale
    assert np.array_equal(refs[0], got[0]) and np.array_equal(got[0], levels[codes]*scale) and np.array_equal(got[1], np.take_along_axis(table, codes.astype(int), 1))
    w = list(p.weights().values())
    assert [sorted(o.sources) for o in w] == [["codes", "levels", "scale"]]*2 and all(np.array_equal(o.codes, codes) and o.bits == 2 for o in w)
    assert w[0].scale.shape == (6, 1) and w[1].scale.shape == (6, 1, 1, 1) and w[1].levels.dtype == np.int8


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_the_form_of_ios_16(ct, tmp_path, bits):
    "Codes that the operation packs by itself, among the attributes; and codes times a scale with a zero point."
    from coremltools.optimize import _utils as cu
    codes = rng(bits).integers(0, 2**bits, (5, 7)).astype(np.uint8)
    lut = rng(9).normal(size=2**bits).astype(np.float16)
    def build(mb):
        return [mb.constexpr_lut_to_dense(indices=cu.pack_elements_into_bits(codes, bits), lut=lut, shape=np.uint32([5, 7])),
                mb.constexpr_affine_dequantize(quantized_data=codes.astype(np.int8), zero_point=np.int8(1), scale=small(5), axis=np.int32(0))]
    refs, got, p = constants(ct, tmp_path, build, ct.target.iOS16)
    for a, b in zip(refs, got, strict=True): assert np.array_equal(a.astype(b.dtype), b)
    assert np.array_equal(got[0], lut[codes])
    w = next(iter(p.weights().values()))
    assert np.array_equal(w.codes, codes) and w.bits == bits and w.shape == (5, 7)


# ---------------------------------------------------------------- states, functions, values known only when called

class Cache(torch.nn.Module):
    "Rows written into a cache at a position, and read back."
    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros(32, 32))
        self.register_buffer("at", torch.arange(32, dtype=torch.int32))
    def forward(self, x, position):
        hit = (self.at[:, None] == (position + torch.arange(x.shape[0], dtype=torch.int32))[None]).float()
        self.rows[:] = self.rows*(1 - hit.sum(1, keepdim=True)) + hit @ x
        return torch.softmax(x @ self.rows.T, -1) @ self.rows


class Slices(torch.nn.Module):
    "The same, with a slice that starts where the position says."
    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros(32, 32))
    def forward(self, x, position):
        p = position[0]
        self.rows[p:p + x.shape[0]] = x
        return torch.softmax(x @ self.rows.T, -1) @ self.rows


def packaged(ct, module, folder, sizes):
    "A package with one function per number of rows."
    d = ct.utils.MultiFunctionDescriptor()
    for k, n in sizes.items():
        with quiet():
            t = torch.jit.trace(module().eval(), (torch.zeros(n, 32), torch.zeros(1, dtype=torch.int32)))
            m = ct.convert(t, inputs=[ct.TensorType("x", (n, 32), dtype=np.float32), ct.TensorType("position", (1,), dtype=np.int32)], outputs=[ct.TensorType("y", dtype=np.float32)],
                           states=[ct.StateType(ct.TensorType(shape=(32, 32), dtype=np.float16), "rows")], minimum_deployment_target=ct.target.iOS18)
            m.save(str(folder / f"{k}.mlpackage"))
        d.add_function(str(folder / f"{k}.mlpackage"), "main", k)
    d.default_function_name = next(iter(sizes))
    with quiet(): ct.utils.save_multifunction(d, str(folder / "all.mlpackage"))
    return read_package(folder / "all.mlpackage")


@pytest.mark.parametrize("module", [Cache, Slices])
def test_one_state_through_two_functions(ct, tmp_path, module):
    "Chunks of 8, the last one padded, then row by row: as the torch module does it, and as one pass over everything does it."
    package = packaged(ct, module, tmp_path, dict(prefill=8, decode=1))
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)).half().float()
    for precision, bound in (("float32", 1e-5), ("float16", 2e-2)):
        prefill, decode = (Interpreter(package, k, precision) for k in ("prefill", "decode"))
        state, model, found, want = prefill.new_state(), module(), [], []
        with torch.no_grad():
            for start in (0, 8):
                part = torch.zeros(8, 32)
                part[:min(8, 14 - start)] = x[start:min(start + 8, 14)]
                a = dict(x=part, position=torch.tensor([start], dtype=torch.int32))
                found.append(prefill.predict(a, state)["y"]); want.append(model(**a))
            for n in range(14, 20):
                a = dict(x=x[n:n + 1], position=torch.tensor([n], dtype=torch.int32))
                found.append(decode.predict(a, state)["y"]); want.append(model(**a))
        assert max(float((a - b).abs().max()) for a, b in zip(found, want)) <= bound
        assert torch.allclose(state["rows"], model.rows, atol=1e-2) and torch.equal(state["rows"][:20], x)  # padding was overwritten


def test_functions_share_decoded_weights(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb
    import dataclasses
    codes = rng().integers(0, 4, (16, 16)).astype(np.uint8)
    p = compiled(ct, lambda x: mb.linear(x=x, weight=mb.constexpr_lut_to_dense(indices=codes.astype(packed_type("uint2")), lut=small(1, 1, 4, 1)), name="y"), [((1, 16), "fp16")], tmp_path)
    two = dataclasses.replace(p, functions={"main": p.function(), "again": dataclasses.replace(p.function(), name="again")})
    matrix = lambda i: next(t for t in i.template if t is not None and t.shape == (16, 16))
    assert matrix(Interpreter(two)) is matrix(Interpreter(two, "again", "float16"))



def test_a_state_is_changed_by_a_call_and_kept_by_interpret(ct, tmp_path):
    package = packaged(ct, Cache, tmp_path, dict(decode=1))
    a = dict(x=np.ones((1, 32), np.float32), position=np.array([3], np.int32))
    y, state = interpret(package, inputs=a)
    assert (state["rows"][3] == 1).all() and state["rows"].abs().sum() == 32
    before = state["rows"].clone()
    _, again = interpret(package, inputs=a | dict(position=np.array([4], np.int32)), state=state)
    assert torch.equal(state["rows"], before) and again["rows"].sum() == 64
    i, shared = Interpreter(package), {"rows": before}
    i.predict(a | dict(position=np.array([9], np.int32)), shared)
    assert shared["rows"][9].sum() == 32 and torch.equal(before, state["rows"])  # a call replaces the tensors of a state, it never writes into them


def test_inputs_are_copied_and_outputs_are_their_own(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb
    p = compiled(ct, lambda x, s: (mb.coreml_update_state(state=s, value=x), mb.identity(x=x)), [((32, 32), "fp16")], tmp_path, states=[(32, 32)])
    x = torch.ones(32, 32)
    i = Interpreter(p)
    state = i.new_state()
    i.predict({"x": x}, state)
    x.zero_()
    assert (state["s"] == 1).all()


def test_operations_on_constants_are_carried_out_once(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb
    codes = rng().integers(0, 4, (8, 8)).astype(np.uint8)
    p = compiled(ct, lambda x: mb.add(x=x, y=mb.reduce_sum(x=mb.constexpr_lut_to_dense(indices=codes.astype(packed_type("uint2")), lut=small(1, 1, 4, 1)))), [((3,), "fp16")], tmp_path)
    i = Interpreter(p)
    assert len(i.steps) == 1 and sum(t is not None for t in i.template) == 1  # the sum is a constant; the matrix is not kept for the calls
    assert float(i.predict({"x": np.zeros(3)})["add_0"][0]) == pytest.approx(float(small(1, 1, 4, 1).reshape(-1)[codes].astype(np.float32).sum()), abs=1e-5)


def test_values_are_freed_after_their_last_use(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb
    def chain(x):
        for _ in range(30): x = mb.add(x=x, y=np.float32(1))
        return x
    p = compiled(ct, chain, [((64, 64), "fp32")], tmp_path)
    i, alive = Interpreter(p), []
    env = i.template.copy()
    env[i.inputs["x"]] = torch.zeros(64, 64)
    constants_ = {k for k, t in enumerate(env) if t is not None} - set(i.inputs.values())
    for run in i.steps:
        run(env)
        alive.append(sum(t is not None for k, t in enumerate(env) if k not in constants_))
    assert max(alive) == 1 and (i.predict({"x": torch.zeros(64, 64)})[next(iter(i.outputs))] == 30).all()


def test_rounding_after_every_operation(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb
    p = compiled(ct, lambda x: (mb.mul(x=mb.square(x=x), y=np.float16(.25), name="y"), mb.sub(x=mb.add(x=x, y=np.float16(.1)), y=x, name="z")), [((2,), "fp16")], tmp_path)
    x = np.float16([300, 1])
    exact, half = (Interpreter(p, precision=k).predict({"x": x}) for k in ("float32", "float16"))
    assert exact["y"].tolist() == [22500., .25] and half["y"].tolist() == [math.inf, .25]
    assert np.array_equal(half["z"].numpy(), ((x + np.float16(.1)) - x).astype(np.float32)) and abs(exact["z"][1] - float(np.float16(.1))) < 1e-6


# ---------------------------------------------------------------- what is refused

def wrong(package, n, **changes):
    "The package with one operation changed."
    f = package.function()
    changed = [o._replace(**changes) if i == n else o for i, o in enumerate(f.ops)]
    import dataclasses
    return dataclasses.replace(package, functions={"main": dataclasses.replace(f, ops=tuple(changed))}, cache={})


def test_contradictions_and_strangers_are_named(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb
    p = compiled(ct, lambda x: mb.cast(x=mb.greater(x=mb.matmul(x=x, y=x, transpose_y=True, name="m"), y=np.float16(0), name="g"), dtype="int32", name="y"), [((3, 4), "fp16")], tmp_path)
    at = {o.type: n for n, o in enumerate(p.function().ops)}
    x, op = {"x": np.ones((3, 4))}, lambda k: p.function().ops[at[k]]
    assert Interpreter(p).predict(x)["y"].dtype == torch.int32
    for changes, said in [(dict(outputs={"m": TensorType("fp16", (3, 4))}), r"\(matmul, output 'm'\): declared fp16\[3, 4\], computed \[3, 3\]"), (dict(outputs={"m": TensorType("fp16", ())}), r"declared fp16\[\], computed \[3, 3\]"),
                          (dict(outputs={"m": TensorType("int32", (3, 3))}), r"declared int32\[3, 3\], computed float32"), (dict(inputs={k: v for k, v in op("matmul").inputs.items() if k != "transpose_y"}), r"\(matmul, output 'm'\): RuntimeError")]:
        with pytest.raises(DataError, match=said): Interpreter(wrong(p, at["matmul"], **changes)).predict(x)
    for changes, error, said in [(dict(type="matmull"), UnsupportedError, "does not know this operation; did you mean 'matmul'"), (dict(blocks=2), UnsupportedError, "nested blocks"), (dict(inputs={"x": ("x",)}), DataError, "expected an input 'y'"),
                                 (dict(inputs=op("matmul").inputs | {"alpha": ("x",)}), UnsupportedError, "input 'alpha' is not known"), (dict(outputs={"m": TensorType("fp16", (3, 3)), "n": TensorType("fp16", (3,))}), DataError, "declared")]:
        with pytest.raises(error, match=said): Interpreter(wrong(p, at["matmul"], **changes)).predict(x)
    with pytest.raises(DataError, match=r"declared bool\[3, 3\], computed float32"): Interpreter(wrong(p, at["greater"], type="add", outputs={"g": TensorType("bool", (3, 3))})).predict(x)
    Interpreter(wrong(p, at["matmul"], outputs={"m": TensorType("fp16", (None, 3))})).predict(x)  # a size that is not fixed may be anything


@pytest.mark.parametrize("inputs, said", [({}, "found none"), ({"x": np.ones((3, 4)), "y": 1}, "found 'x', 'y'"), ({"x": np.ones((4, 3))}, r"input 'x' .* declared fp16\[3, 4\], computed \[4, 3\]"), ({"x": np.ones(12)}, r"computed \[12\]")])
def test_inputs_that_do_not_fit(ct, tmp_path, inputs, said):
    from coremltools.converters.mil.mil import Builder as mb
    p = compiled(ct, lambda x: mb.relu(x=x), [((3, 4), "fp16")], tmp_path)
    with pytest.raises(DataError, match=said): Interpreter(p).predict(inputs)
    with pytest.raises(DataError, match="expected no state"): Interpreter(p).predict({"x": np.ones((3, 4))}, {"k": 1})


def test_whole_numbers_stay_whole(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb
    p = compiled(ct, lambda t: mb.gather(x=f16(5, 4), indices=t, axis=0), [((2,), "int32")], tmp_path)
    assert torch.equal(Interpreter(p).predict({"t": [1, 4]})["gather_0"], torch.from_numpy(f16(5, 4)[[1, 4]]).float())
    with pytest.raises(DataError, match="within the range of int32, found 1 to 4294967297"): Interpreter(p).predict({"t": [1, 2**32 + 1]})
    with pytest.raises(DataError, match="Give whole numbers"): Interpreter(p).predict({"t": [1., 4.]})
    with pytest.raises(DataError, match=r"\(gather, output 'gather_0'\): IndexError"): Interpreter(p).predict({"t": [1, 5]})


def test_census(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb
    p = compiled(ct, lambda x: mb.add(x=mb.relu(x=x), y=mb.relu(x=x)), [((3,), "fp16")], tmp_path)
    assert ops_of(p).to_dict("index") == {"add": dict(main=1, known=True), "relu": dict(main=2, known=True)}
    assert not ops_of(wrong(p, 0, type="reluu")).loc["reluu", "known"]
