"Packages as they are read: codes to the bit, hostile files refused, every finding of the lint provoked, faults of one code."
import dataclasses, json, shutil, struct, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixbook.constants import TensorType, unpack_bits, _pack_bits, quiet
from mixbook.core import DataError, MixbookError, UnsupportedError
from mixbook.interpreter import Interpreter
from mixbook.package import ALLOWED_OPS, dense_value, faults, lint_package, lints, read_package, seed_fault, stored_weights
from programs import built, compiled, ct, packed_type, saved, traced

pytest.importorskip("coremltools", reason="coremltools is not installed")

LEVELS = np.float16([-1.5, -.5, .5, 1.5])
MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
rng = np.random.default_rng


def codes(*shape, bits=2, seed=0): return rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def package(ct, folder):
    "One matrix of each kind: a table (in the program), a table per row (in the weight file), codes of 8 and 4 bits with scales, plain numbers."
    from coremltools.converters.mil.mil import Builder as mb
    def build(x, count):
        L = lambda c, t, n: mb.constexpr_lut_to_dense(indices=c.astype(packed_type("uint2")), lut=t, name=n)
        rows = (LEVELS[None]*rng(1).uniform(.1, .9, (48, 1))).astype(np.float16)
        a = L(codes(64, 48), LEVELS.reshape(1, 1, 4, 1), "table")
        b = L(codes(48, 64, seed=1), rows[:, None, :, None], "rows")
        c = mb.constexpr_blockwise_shift_scale(data=rng(2).integers(-127, 128, (64, 48)).astype(np.int8), scale=rng(3).uniform(.01, .02, (64, 1)).astype(np.float16), name="bytes")
        d = mb.constexpr_blockwise_shift_scale(data=rng(4).integers(-8, 8, (48, 64)).astype(np.int8).astype(packed_type("int4")), scale=rng(5).uniform(.1, .2, (48, 4)).astype(np.float16), name="nibbles")
        h = mb.linear(x=mb.linear(x=x, weight=a), weight=b)
        h = mb.linear(x=mb.linear(x=mb.mul(x=h, y=np.float16(.01)), weight=c), weight=d)
        mb.coreml_update_state(state=count, value=mb.add(x=mb.read_state(input=count), y=np.float16(1)))
        return mb.linear(x=h, weight=(rng(6).normal(size=(8, 48))*.1).astype(np.float16), name="y")
    from coremltools.converters.mil.mil import types
    return saved(ct, build, [((1, 48), "fp16")], folder / "all.mlpackage", states=[(32, 32)])


def run(package): return Interpreter(package).predict({"x": np.linspace(-1, 1, 48)[None]}, {"count": torch.zeros(32, 32)})["y"]


# ---------------------------------------------------------------- what stands there

def test_every_kind_of_weight_is_recovered(package):
    w = package.weights()
    plain = next(k for k in w if w[k].op == "const")
    assert list(w) == ["table", "rows", "bytes", "nibbles", plain]
    assert np.array_equal(w["table"].codes, codes(64, 48)) and np.array_equal(w["rows"].codes, codes(48, 64, seed=1))
    assert w["table"].codes.dtype == np.uint8 and [w[k].bits for k in w] == [2, 2, 8, 4, 16]
    assert np.array_equal(w["table"].dense(), LEVELS[codes(64, 48)])
    assert np.array_equal(w["rows"].dense(), np.take_along_axis(w["rows"].levels[:, 0, :, 0], codes(48, 64, seed=1).astype(int), 1))
    assert np.array_equal(w["bytes"].codes, rng(2).integers(-127, 128, (64, 48))) and np.array_equal(w["bytes"].dense(), w["bytes"].codes.astype(np.float16)*w["bytes"].scale)
    assert np.array_equal(w["nibbles"].codes, rng(4).integers(-8, 8, (48, 64))) and np.array_equal(w["nibbles"].dense(), w["nibbles"].codes.astype(np.float16)*np.repeat(w["nibbles"].scale, 16, 1))
    assert np.array_equal(w[plain].dense(), (rng(6).normal(size=(8, 48))*.1).astype(np.float16)) and w[plain].codes is None
    assert {k: v.nbytes for k, v in w.items()} == {"table": 64*48//4 + 8, "rows": 48*64//4 + 48*8, "bytes": 64*48 + 128, "nibbles": 48*32 + 48*8, plain: 8*48*2}
    assert len(stored_weights(package, min_size=10**6)) == 4


def test_the_parts_of_a_package(package):
    f = package.function()
    assert package.inputs == f.inputs == {"x": TensorType("fp16", (1, 48))} and package.states == {"count": TensorType("fp16", (32, 32), True)} and package.outputs == {"y": TensorType("fp16", (1, 8))}
    assert set(package.files) == {MODEL, WEIGHTS, "Manifest.json"} and package.spec == 9 and package.nbytes == sum((package.path / k).stat().st_size for k in package.files)
    assert all(v in f.types for o in f.ops for vs in o.args.values() for v in vs if isinstance(v, str)) and all(f.makers[k].outputs[k] == t for k, t in f.types.items() if k in f.makers)
    assert [u.type for u in f.users["count"]] == ["read_state", "write_state"]
    with pytest.raises(DataError, match="unknown function of the package 'decode'"): package.function("decode")


def test_buffers_that_the_converter_reads(ct, folder):
    "Codes from torch, by three ways: one table, a table per row, a table and a scale; all codes back from the saved bytes."
    kinds = dict(tensor={}, row={}, scale={})
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            for n, k in enumerate(kinds):
                c, s = codes(64, 64, seed=n), (2.**-rng(n).integers(2, 6, (64, 1))).astype(np.float32)*(1.25 if k != "tensor" else 1)
                scale = torch.from_numpy(s if k != "tensor" else s[:1])
                lin = nn.Linear(64, 64, bias=False)
                lin.weight.data = torch.from_numpy(LEVELS.astype(np.float32)[c])*scale
                lut = torch.from_numpy(LEVELS.astype(np.float32)).view(1, 1, 4, 1)
                buffers = dict(compression_type=torch.tensor([2]), lut=lut if k == "scale" else lut*scale.view(-1, 1, 1, 1), **({"palettization_scale": scale} if k == "scale" else {}))
                for b, v in buffers.items(): lin.register_buffer(f"_COREML_/weight/{b}", v)
                self.add_module(k, lin)
                kinds[k] = dict(codes=c, dense=lin.weight.detach().numpy().copy())
            self.register_buffer("_COREML_/metadata_version", torch.tensor(1))
        def forward(self, x): return self.tensor(x) + torch.tanh(self.row(x)) + torch.sigmoid(self.scale(x))
    p = traced(ct, Three(), dict(x=(1, 64)), folder / "three.mlpackage")
    found = {k: w for k, w in p.weights().items() if w.op != "const"}
    assert len(found) == 3
    for k, want in kinds.items():
        w = next(w for n, w in found.items() if n.startswith(k))
        assert np.array_equal(w.codes, want["codes"]) and w.bits == 2, k
        assert np.array_equal(w.dense().astype(np.float32), want["dense"]), k


def test_ios_16_codes_among_the_attributes(ct, folder):
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.optimize import _utils as cu
    build = lambda x: mb.linear(x=x, weight=mb.constexpr_lut_to_dense(indices=cu.pack_elements_into_bits(codes(32, 16), 2), lut=LEVELS, shape=np.uint32([32, 16]), name="w"), name="y")
    p = saved(ct, build, [((1, 16), "fp16")], folder / "old.mlpackage", target=ct.target.iOS16)
    w = p.weights()["w"]
    assert p.spec == 7 and np.array_equal(w.codes, codes(32, 16)) and w.bits == 2 and w.nbytes == 32*16//4 + 8
    bad = read_package(seed_fault(p.path, "code", weight="w", seed=3)).weights()["w"]
    assert (bad.codes != w.codes).sum() == 1


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("n", [1, 7, 8, 1000, (1 << 20) + 5])
def test_bits(bits, n):
    c = codes(n, bits=bits, seed=n)
    packed = _pack_bits(c, bits)
    assert packed.size == (n*bits + 7)//8 and np.array_equal(unpack_bits(packed, bits, n), c)
    if bits == 2 and n > 4: assert packed[0] == c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6


def test_the_reader_agrees_with_that_of_coremltools(ct, folder, package):
    "A second opinion on the whole file: coremltools' own loader of programs."
    from coremltools.converters.mil.frontend.milproto.load import load
    with quiet(): prog = load(ct.models.MLModel(str(package.path), skip_model_load=True).get_spec(), 9, str(package.path / WEIGHTS.rsplit("/", 1)[0]))
    seen = 0
    for op in prog.functions["main"].operations:
        if op.op_type.startswith("constexpr_"):
            assert np.array_equal(op.materialized_val_inference(), dense_value(package.function(), op.outputs[0].name))
            seen += 1
    assert seen == 4


# ---------------------------------------------------------------- coremltools itself

def test_reading_does_not_import_it_and_importing_it_later_works(package):
    code = f"""
import sys
from mixbook.package import read_package, coremltools
p = read_package({str(package.path)!r})
assert 'coremltools' not in sys.modules and 'torch' not in sys.modules
ct = coremltools()
import io, contextlib
assert ct.models.MLModel(str(p.path), skip_model_load=True).get_spec().specificationVersion == p.spec
assert repr(read_package(p.path)) == repr(p)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr[-2000:]


def test_without_coremltools(package, monkeypatch):
    for k in [k for k in sys.modules if k.split(".")[0] in ("coremltools", "_mixbook_proto")]: monkeypatch.delitem(sys.modules, k)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    from mixbook.constants import coremltools
    for f in (coremltools, lambda: read_package(package.path)):
        with pytest.raises(UnsupportedError, match=r"coremltools is not installed; pip install 'mixbook\[coreml\]'"): f()


# ---------------------------------------------------------------- strangers

@pytest.fixture
def copy(package, tmp_path):
    def make(name=None, change=None):
        to = tmp_path / "copy.mlpackage"
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(package.path, to)
        if name: change(to / name)
        return to
    return make


def refused(path, match=None):
    with pytest.raises(DataError, match=match) as e: read_package(path)
    said = str(e.value)
    assert "expected" in said and "found" in said, said


def test_cut_weight_files(copy, package):
    whole = (package.path / WEIGHTS).read_bytes()
    for n in [0, 1, 63, 64, 100, 128, len(whole)//3, len(whole)//2, len(whole) - 800]: refused(copy(WEIGHTS, lambda f: f.write_bytes(whole[:n])), r"weight\.bin|weight file")


def test_cut_models(copy, package):
    whole = (package.path / MODEL).read_bytes()
    for n in [0, 1, 2, 10, *rng(0).integers(0, len(whole), 40)]: refused(copy(MODEL, lambda f: f.write_bytes(whole[:n])))


def changed_bytes(data, at, new): return data[:at] + new + data[at + len(new):]


def test_headers_that_lie(copy, package):
    whole = (package.path / WEIGHTS).read_bytes()
    first = whole.index(b"\xef\xbe\xad\xde")
    for at, new, said in [(first, b"\0\0\0\0", "the magic number 0xdeadbeef"), (first + 4, struct.pack("<I", 99), "elements of type uint2"), (first + 8, struct.pack("<Q", 5), r"768 bytes for uint2\[64, 48\]"),
                          (first + 8, struct.pack("<Q", 2**62), "bytes for"), (first + 16, struct.pack("<Q", len(whole) - 10), "Is weight.bin complete"), (first + 16, struct.pack("<Q", 2**63), "Is weight.bin complete"), (4, struct.pack("<I", 7), "version 2")]:
        refused(copy(WEIGHTS, lambda f: f.write_bytes(changed_bytes(whole, at, new))), said)


def test_places_that_lie(copy, package):
    "Offsets beyond the file, and files outside the package, in the program."
    from mixbook.constants import _proto
    def edit(change):
        def do(f):
            m = _proto().Model_pb2.Model()
            m.ParseFromString(f.read_bytes())
            fn = m.mlProgram.functions["main"]
            change(m, fn, fn.block_specializations[fn.opset])
            f.write_bytes(m.SerializeToString())
        return copy(MODEL, do)
    first = lambda b: next(o for o in b.operations if o.type.startswith("constexpr_")).inputs["indices"].arguments[0].value
    const = lambda b: next(o for o in b.operations if o.type == "const")
    def put(o, **k):
        for a, v in k.items(): setattr(o, a, v)
    def dims(t, n): t.dimensions[0].constant.size = n
    for change, said in [
        (lambda m, f, b: put(first(b).blobFileValue, offset=10**9), "one at byte 1000000000"), (lambda m, f, b: put(first(b).blobFileValue, offset=2**64 - 1), "found one at byte"), (lambda m, f, b: put(first(b).blobFileValue, offset=70), "the magic number"),
        (lambda m, f, b: put(first(b).blobFileValue, fileName="@model_path/../../../../secret"), "inside the package"), (lambda m, f, b: put(first(b).blobFileValue, fileName="/etc/hostname"), "inside the package"),
        (lambda m, f, b: put(first(b).blobFileValue, fileName="@model_path/weights"), "no such file"), (lambda m, f, b: put(first(b).blobFileValue, fileName="@model_path/weights/other.bin"), "no such file"),
        (lambda m, f, b: put(first(b).type.tensorType, dataType=36000), "number 36000"), (lambda m, f, b: put(first(b).type.tensorType, dataType=40), "FLOAT8E4M3FN"), (lambda m, f, b: put(first(b).type.tensorType, rank=3), "expected 3 sizes, found 2"),
        (lambda m, f, b: dims(first(b).type.tensorType, 2**60), "sizes of reason"), (lambda m, f, b: dims(first(b).type.tensorType, 10**9), r"bytes for uint2\[1000000000, 48\]"),
        (lambda m, f, b: b.operations[-1].inputs["x"].arguments[0].__setattr__("name", "nobody"), "input 'x' to be defined earlier, found 'nobody'"), (lambda m, f, b: put(b.operations[-1].outputs[0], name="x"), "new names for its outputs, found {'x'}"),
        (lambda m, f, b: b.outputs.append("ghost"), "none for 'ghost'"), (lambda m, f, b: put(f, opset="CoreML99"), "a block for its operation set 'CoreML99'"), (lambda m, f, b: put(m.description, defaultFunctionName="gone"), "a function 'gone'"),
        (lambda m, f, b: m.mlProgram.functions.clear(), r"a function 'main', found \[\]"), (lambda m, f, b: const(b).attributes["val"].immediateValue.tensor.Clear(), r"elements for|bytes for"), (lambda m, f, b: const(b).attributes.pop("val"), "one output with a value"),
        (lambda m, f, b: m.neuralNetwork.SetInParent(), "found a model of type neuralNetwork"), (lambda m, f, b: m.Clear(), "found a model of type none")]: refused(edit(change), said)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"rootModelIdentifier": 1}', '{"rootModelIdentifier": "a", "itemInfoEntries": []}', '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": 3}}', '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {}}}',
                                  '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": 7}}}', '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "nothing"}}}', '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "../Manifest.json"}}}',
                                  '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "com.apple.CoreML"}}}', '{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "\\u0000"}}}', "["*100_000, b"\xff\xfe\x00"])
def test_manifests_that_say_nothing(copy, text):
    refused(copy("Manifest.json", lambda f: f.write_bytes(text if isinstance(text, bytes) else text.encode())))


def test_other_things(tmp_path, copy, ct):
    refused(tmp_path / "nothing"); refused(tmp_path, "a manifest")
    (tmp_path / "file.mlpackage").write_text("hello"); refused(tmp_path / "file.mlpackage", "found a file")
    (tmp_path / "empty.mlpackage").mkdir(); refused(tmp_path / "empty.mlpackage")
    refused(copy("Manifest.json", lambda f: f.unlink())); refused(copy(MODEL, lambda f: f.unlink()), "Is the copy complete"); refused(copy(WEIGHTS, lambda f: f.unlink()), "Is the copy complete")
    from coremltools.models.neural_network import NeuralNetworkBuilder
    from coremltools.models import datatypes
    with quiet():
        b = NeuralNetworkBuilder([("x", datatypes.Array(3))], [("y", datatypes.Array(3))])
        b.add_activation("relu", "RELU", "x", "y")
    refused(copy(MODEL, lambda f: f.write_bytes(b.spec.SerializeToString())), "an ML program .*found a model of type neuralNetwork")
    outside = copy(MODEL, lambda f: None)
    (outside / WEIGHTS).rename(tmp_path / "elsewhere.bin"); (outside / WEIGHTS).symlink_to(tmp_path / "elsewhere.bin")
    refused(outside, "inside the package")


def test_random_damage_is_never_more_than_an_error_of_ours(copy, package):
    "Two hundred models with some bytes changed: read, judged and called, or refused by us."
    whole, outcomes = (package.path / MODEL).read_bytes(), set()
    for seed in range(200):
        r, data = rng(seed), bytearray(whole)
        for at in r.integers(0, len(data), r.integers(1, 4)): data[at] = r.integers(256)
        path = copy(MODEL, lambda f: f.write_bytes(bytes(data)))
        try:
            p = read_package(path)
            lint_package(p), p.weights()
            run(p)
            outcomes.add("fine")
        except MixbookError as e: outcomes.add(type(e).__name__)
    assert {"fine", "DataError"} <= outcomes <= {"fine", "DataError", "UnsupportedError"}  # which bytes name an operation differs between conversions


def test_damaged_weights_are_read_as_they_are_or_refused(copy, package):
    whole = (package.path / WEIGHTS).read_bytes()
    for seed in range(60):
        data = bytearray(whole)
        for at in rng(seed).integers(0, len(data), 20): data[at] ^= 1 << rng(seed).integers(8)
        try: p = read_package(copy(WEIGHTS, lambda f: f.write_bytes(bytes(data))))
        except DataError: continue
        assert {w.shape for w in p.weights().values()} == {w.shape for w in package.weights().values()}


# ---------------------------------------------------------------- lint

def rules(p, **kw): return set(lint_package(p, **kw)["rule"])


def test_a_clean_package_has_no_findings(package):
    assert rules(package) == set() and list(lint_package(package).columns) == ["rule", "function", "where", "found", "expected"]
    assert rules(package, max_bytes=package.nbytes) == set()


def test_each_rule_is_provoked(ct, tmp_path, package):
    from coremltools.converters.mil.mil import Builder as mb, get_new_symbol
    one = lambda build, specs=(((4, 64), "fp16"),), **kw: compiled(ct, build, list(specs), tmp_path, **kw)
    described = lambda p: dataclasses.replace(p, described={"main": {k: _feature(p, k) for k in p.function().types if k in p.inputs | p.states | p.outputs}})
    from mixbook.package import Feature
    def _feature(p, k): return Feature("state" if k in p.states else "output" if k in p.outputs else "input", p.function().types[k])
    say = lambda p, rule, **kw: [tuple(r[2:]) for r in lint_package(p, rules=[rule], **kw).itertuples(index=False, name=None)]
    assert say(one(lambda x: mb.cumsum(x=x, axis=1, name="c")), "ops") == [("c", "cumsum", "an operation of the vetted set")]
    assert say(one(lambda x: mb.relu(x=x)), "ops", allowed=["const"])[0][1] == "relu"
    assert say(one(lambda x: mb.relu(x=x, name="r"), [((get_new_symbol(), 4), "fp16")]), "static") == [("x", "fp16[?, 4]", "a fixed shape"), ("r", "fp16[?, 4]", "a fixed shape")]
    flexible = dataclasses.replace(package, described={"main": {k: v._replace(flexible=k == "x") for k, v in package.described["main"].items()}})
    assert say(flexible, "static") == [("main", "x", "flexible shape", "one fixed shape")[1:]] and rules(flexible) == {"static"}
    # the wrong rank that coremltools declares for a select between two scalars
    masked = described(one(lambda x: mb.add(x=mb.select(cond=mb.greater(x=x, y=np.float16(0)), a=np.float16(0), b=np.float16(-1e4), name="s"), y=x)))
    assert ("s", "fp16[]", "fp16[4, 64], from the inputs of select") in say(masked, "types")
    with pytest.raises(DataError, match=r"output 's'\): declared fp16\[\], computed \[4, 64\]"): Interpreter(masked).predict({"x": np.ones((4, 64))})
    fine = described(one(lambda x: mb.relu(x=x, name="r")))
    assert say(fine, "types") == []
    for k, f, said in [("x", Feature("input", TensorType("fp32", (4, 64))), "described as fp32[4, 64]"), ("x", Feature("input", TensorType("fp16", (4, 32))), "described as fp16[4, 32]"), ("r", Feature("output", TensorType("int32", ())), "described as int32[]")]:
        assert [o[1] for o in say(dataclasses.replace(fine, described={"main": fine.described["main"] | {k: f}}), "types")] == [said]
    assert say(dataclasses.replace(fine, described={"main": {}}), "types")[0][1] == "not described"
    for shape, bad in (((32, 64), False), ((2, 3, 32, 32), False), ((32, 20), True), ((2, 33, 32), True), ((32, 32, 16), True)):
        p = one(lambda x, s: mb.add(x=x, y=mb.reduce_sum(x=mb.read_state(input=s))), states=[shape])
        assert bool(say(p, "state")) == bad, shape
    assert say(one(lambda x: mb.add(x=x, y=np.where(np.arange(64) < 9, 0, -np.inf).astype(np.float16)[None])), "mask")[0][1] == "largest value inf"
    assert say(one(lambda x: mb.add(x=x, y=np.full((1, 64), -1e9, np.float32)), [((4, 64), "fp32")]), "mask") and not say(one(lambda x: mb.add(x=x, y=np.full((1, 64), -1e4, np.float16))), "mask")
    dense = one(lambda x: mb.linear(x=x, weight=rng(0).normal(size=(64, 64)).astype(np.float16), name="y"))
    assert say(dense, "dense")[0][1] == "fp16[64, 64] of plain numbers in linear" and not say(dense, "dense", min_dense=5000)
    assert say(package, "size", max_bytes=package.nbytes - 1)[0][1] == f"{package.nbytes:,} bytes"
    assert say(dataclasses.replace(package, files=package.files | {WEIGHTS: 2**31}), "size") == [(WEIGHTS, "2,147,483,648 bytes", "files below 2 GB")]
    with pytest.raises(DataError, match="did you mean 'static'"): lint_package(package, rules=["statics"])


class Norms(nn.Module):
    "Five root mean squares; two of them are safe in fp16."
    def forward(self, x):
        hand = x*torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        built_in = F.rms_norm(x, (64,))
        length = x/torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        m = torch.maximum(x.abs().amax(-1, keepdim=True), torch.ones(1))
        y, e = x/m, 1e-3/m
        clamped = y*torch.rsqrt((y*y).mean(-1, keepdim=True) + e*e)
        layer = F.layer_norm(torch.cat((x, -x), -1), (128,))[..., :64]
        return hand, built_in, length, clamped, layer


class Rotary(nn.Module):
    "Rotary positions on neighbours, by a stride, and on halves."
    def forward(self, x, cos, sin):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        c, d = x.chunk(2, -1)
        return torch.stack((a*cos - b*sin, a*sin + b*cos), -1).flatten(-2), x[..., 0::2]*cos, torch.cat((c*cos - d*sin, c*sin + d*cos), -1)


def test_norms_that_are_unsafe_in_fp16(ct, folder):
    p = traced(ct, Norms(), dict(x=(2, 64)), folder / "norms.mlpackage", ["hand", "builtin", "length", "clamped", "layer"])
    found = lint_package(p, rules=["norm"])
    outputs = {o for w in found["where"] for o in _reached(p.function(), w)}
    assert len(found) == 3 and outputs & set(p.outputs) == {"hand", "builtin", "length"} and sum("unclamped maximum" in f for f in found["found"]) == 1
    big = {k: v for k, v in Interpreter(p, precision="float16").predict({"x": torch.full((2, 64), 300.)}).items()}
    assert (big["hand"] == 0).all() and all((big[k] - 1).abs().max() < .01 for k in ("clamped", "layer"))  # why it is a rule
    assert torch.isnan(Interpreter(p, precision="float16").predict({"x": torch.zeros(2, 64)})["builtin"]).all()


def _reached(f, name):
    "All values that depend on `name`."
    out, todo = set(), [name]
    while todo:
        v = todo.pop()
        if v not in out: out.add(v); todo += [k for o in f.users.get(v, ()) for k in o.outputs]
    return out


def test_rotary_pairs_of_neighbours(ct, folder):
    p = traced(ct, Rotary(), dict(x=(2, 64), cos=(2, 32), sin=(2, 32)), folder / "rotary.mlpackage", ["pairs", "strided", "halves"])
    where = lint_package(p, rules=["rope"])["where"]
    outputs = {o for w in where for o in _reached(p.function(), w)} & set(p.outputs)
    assert outputs == {"pairs", "strided"}


def test_a_further_rule_is_one_function(package):
    lints.register("short", lambda p, o: ((f.name, "", f"{len(f.ops)} operations", "at most 3") for f in p.functions.values() if len(f.ops) > 3))
    try: assert rules(package) == {"short"}
    finally: lints._items.pop("short")


# ---------------------------------------------------------------- faults

@pytest.mark.parametrize("weight, kind", [(w, k) for w in ("table", "rows") for k in ("code", "table", "rows")] + [(w, k) for w in ("bytes", "nibbles") for k in ("code", "scale", "rows")] + [("plain", "scale"), ("plain", "rows")])
@pytest.mark.parametrize("seed", [0, 1])
def test_one_fault_and_no_more(package, tmp_path, weight, kind, seed):
    w = package.weights()
    name = weight if weight in w else next(k for k in w if w[k].op == "const")
    before = {f: (package.path / f).read_bytes() for f in package.files}
    bad = read_package(seed_fault(package.path, kind, weight=name, seed=seed, to=tmp_path / "bad.mlpackage"))
    assert {f: (package.path / f).read_bytes() for f in package.files} == before and sorted(p.name for p in tmp_path.iterdir()) == ["bad.mlpackage"]
    b = bad.weights()
    for k in w: assert np.array_equal(w[k].dense(), b[k].dense()) == (k != name)
    differ, rows = w[name].dense() != b[name].dense(), (w[name].dense() != b[name].dense()).any(1).sum()
    if kind == "code": assert (w[name].codes != b[name].codes).sum() == differ.sum() == 1
    if kind == "rows": assert rows == 2 and np.array_equal(np.sort(w[name]._part("codes" if w[name].codes is not None else "dense"), 0), np.sort(b[name]._part("codes" if w[name].codes is not None else "dense"), 0))
    if kind == "table": assert np.array_equal(w[name].codes, b[name].codes) and np.array_equal(np.sort(w[name].levels, -2), np.sort(b[name].levels, -2)) and rows == (1 if weight == "rows" else 64)
    if kind == "scale": assert rows == 1 and (w[name].codes is None or np.array_equal(w[name].codes, b[name].codes) and (w[name].scale != b[name].scale).sum() == 1)
    assert lint_package(bad).empty and float((run(bad) - run(package)).abs().max()) > 1e-4  # the structure is in order; only the numbers tell
    again = read_package(seed_fault(package.path, kind, weight=name, seed=seed, to=tmp_path / "bad.mlpackage"))
    assert np.array_equal(again.weights()[name].dense(), b[name].dense())


def test_faults_that_are_impossible(package, tmp_path):
    for kw, said in [(dict(kind="bit", weight="table"), "unknown fault 'bit'"), (dict(kind="code", weight="tabel"), "did you mean 'table'"), (dict(kind="table", weight="bytes"), "needs levels"), (dict(kind="code", weight="rows", function="decode"), "unknown function")]:
        with pytest.raises(DataError, match=said): seed_fault(package.path, to=tmp_path / "bad", **kw)
    with pytest.raises(DataError, match="no such folder"): seed_fault(tmp_path / "nothing", "code", weight="w")
    assert not list(tmp_path.iterdir()) and set(faults) == {"code", "table", "scale", "rows"}
