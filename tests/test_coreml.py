"Core ML: codes of every way read back from saved bytes, logits by interpretation, faults that must be caught, exports that are refused, killed or damaged."
import importlib.util, os, platform, shutil, signal, sys, time
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from mixbook.adapters import LoraConfig, adapter_parameters, add_adapters, save_adapters
from mixbook.core import DataError, MixbookError, UnsupportedError
from mixbook.decoder import Decoder, ProxyConfig
from mixbook.device import DeviceConfig
from mixbook.quant import QATConfig, finalize_qat, prepare_qat, quantize
from mixbook.ways import snap_matrix, store_matrix, ways
import mixbook.coreml as coreml
import mixbook.device as device

pytest.importorskip("coremltools", reason="coremltools is not installed")
from mixbook.coreml import Export, coreai_witness, export_coreml, python_snippet, read_export, size_report, swift_snippet, verify_export
from mixbook.package import read_package, seed_fault

SMALL = DeviceConfig(64, chunk=32)


def decoder(depth=1, width=64, *, bits=2, heads=2, seed=0, **kw):
    qat = {k: kw.pop(k) for k in ("per", "embedding_bits", "skip", "method") if k in kw}
    return prepare_qat(Decoder(ProxyConfig(depth=depth, width=width, heads=heads, **kw), seed=seed), QATConfig(bits=bits, **qat))


def with_adapter(model, rank=8, seed=1):
    g, tuned = torch.Generator().manual_seed(seed), add_adapters(finalize_qat(model).apply(Decoder(model.config), codes=True), LoraConfig(rank, seed=seed))
    with torch.no_grad():
        for p in adapter_parameters(tuned).values(): p.copy_(torch.randn(p.shape, generator=g)*.05)
    return tuned


def checked(model, path, *, tokens=96, steps=24, **kw):
    "Export and prove; returns both."
    kw = dict(config=SMALL, progress=False, overwrite=True) | kw
    e = export_coreml(model, path, **kw)
    p = verify_export(e, model, tokens=tokens, steps=steps, adapters=kw.get("adapters"), progress=False)
    assert p.ok, p.table[p.table.ok.eq(False)].to_string()
    assert p.weights.equal.sum() == p.weights.codes.sum() > 0 and p.weights.table.all() and p.weights.scale.all()
    assert verify_export(e).ok
    return e, p


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A package of two functions, and its model."
    folder, model = tmp_path_factory.mktemp("base"), decoder(2)
    return export_coreml(model, folder/"model.mlpackage", config=SMALL, progress=False), model


# ---------------------------------------------------------------- what is stored

@given(st.sampled_from("abcd"), st.sampled_from([1, 1.58, 2, 3, 4, 8]), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31), st.floats(1e-2, 1e3))
@settings(max_examples=200, deadline=None)
def test_stored_numbers_are_the_weights_to_the_bit(way, bits, rows, cols, seed, size):
    g = torch.Generator().manual_seed(seed)
    q = quantize(torch.randn(rows, cols, generator=g)*size, bits, per="tensor" if way == "d" else "row", name="m")
    try: s = snap_matrix(q, way)
    except DataError:  # refused only where fp16 ends
        assert float(q.scale.min())*float(q.levels.abs()[q.levels != 0].min()) < 2**-13
        assume(False)
    assert torch.equal(s.codes, q.codes)
    order = torch.randperm(rows, generator=g).numpy()
    put = store_matrix(s, way, rows=order)
    assert np.array_equal(put.dense(), s.dequantize().numpy()[order])
    for part in (put.table, put.inside, put.outside): assert part is None or part.dtype == np.float16 and np.isfinite(part).all()
    assert np.array_equal(put.weight().astype(np.float16).astype(np.float32), put.weight())  # the dense weight is an fp16 number too
    change = (s.dequantize() - q.dequantize()).abs() <= q.dequantize().abs()*(2**-10.9 if way == "c" else 2**-8.9 if bits <= 2 else 2**-7.9 if bits <= 4 else 2**-3.9) + 1e-12
    assert change.all()


@pytest.mark.parametrize("bits", [1, 1.58, 3, 8])
def test_other_widths(bits, tmp_path):
    e, p = checked(decoder(bits=bits, embedding_bits=8), tmp_path/"m.mlpackage", functions=("decode",), tokens=16)
    assert set(p.weights.bits) == {{1.58: 2}.get(bits, bits), 8}


def test_bits_per_weight_at_width_512(tmp_path):
    e, p = checked(decoder(1, 512, heads=8, vocab=512), tmp_path/"m.mlpackage", functions=("decode",), tokens=8)
    assert size_report(e).bits_per_weight["body"] <= 2.05


@pytest.mark.parametrize("way", ["c", "d"])
def test_old_target_holds_one_function_and_a_cache_that_goes_in_and_out(way, tmp_path):
    e, p = checked(decoder(per="tensor" if way == "d" else "row"), tmp_path/"m.mlpackage", target="iOS16", way=way, config=DeviceConfig(64, cache="io"))
    package = read_package(e.path)
    assert package.spec == 7 and list(package.functions) == ["main"] and e.functions == {"decode": 1} and not package.states
    assert "k_cache_out" in python_snippet(e) and "makeState" not in swift_snippet(e)


def test_both_forms_share_keys_and_skip(tmp_path):
    checked(decoder(3, kv_layers=2), tmp_path/"m.mlpackage", config=DeviceConfig(64, chunk=32, form="ane", skip=True), tokens=120)


def test_batch_and_cache_as_inputs(tmp_path):
    checked(decoder(), tmp_path/"m.mlpackage", config=DeviceConfig(64, chunk=32, batch=2, cache="io", write="slice"), tokens=160)


def test_embedding_that_training_left_alone(tmp_path):
    model = decoder(skip=("embed",))
    e = export_coreml(model, tmp_path/"dense.mlpackage", functions=("decode",), config=SMALL, progress=False)
    assert size_report(e).measured["not quantised"] == 2*256*64 + 64 and verify_export(e).ok
    e, p = checked(model, tmp_path/"m.mlpackage", functions=("decode",), tokens=24, embedding_bits=8)
    assert set(p.weights.part) == {"embedding", "body"} and read_export(e.path).embedding_bits == 8


# ---------------------------------------------------------------- the proof, and that it can fail

def test_proof_of_a_sound_package(base):
    e, model = base
    p = verify_export(e, model, tokens=400, progress=False)
    found = p.table.found
    assert p.ok and found["codes equal"] == 1 and found["dense in place of codes"] == 0 and found["lint findings"] == 0
    assert found["float32, prefill: largest difference"] < 1e-5 and found["float32, decode: largest difference"] < 1e-5
    assert found["float16: largest difference over sigma"] <= 2e-2 and found["float16: infinite or NaN"] == 0
    assert found["size against prediction"] <= .03 and "holds" in repr(p)
    assert p.table.ok["Core ML runtime"] is None or platform.system() == "Darwin"
    assert size_report(e).measured[["embedding", "body", "tables"]].equals(size_report(e).predicted[["embedding", "body", "tables"]])


@pytest.mark.parametrize("kind", ["code", "table", "scale", "rows"])
def test_seeded_faults_are_caught(base, kind, tmp_path):
    e, model = base
    for weight in ("embed", "blocks_1_attn_qkv"):
        name = f"{weight}_scale" + ("" if weight == "embed" else "_to_fp16") if kind == "scale" else f"{weight}_weight_to_fp16"
        bad = seed_fault(e.path, kind, weight=name, to=tmp_path/f"{weight}.mlpackage")
        alone, proof = verify_export(bad), verify_export(bad, model, tokens=64, progress=False)
        assert not alone.ok and not alone.table.ok["program as it was written"] and not proof.ok
        assert not proof.table.ok["codes equal" if kind in ("code", "rows") else "tables and scales equal"]
        assert not alone.table.ok["codes equal" if kind in ("code", "rows", "table") else "tables and scales equal"]
        assert max(proof.table.found[f"float32, {k}: largest difference"] for k in ("prefill", "decode")) > 1e-4
    assert kind != "code" or (proof.weights.codes - proof.weights.equal).sum() == 2  # one per function


def test_another_model_is_not_proved(base):
    e, _ = base
    p = verify_export(e, decoder(2, seed=1), tokens=40, progress=False)
    assert not p.ok and not p.table.ok["codes are those of the model"] and not p.table.ok["codes equal"]
    with pytest.raises(DataError, match="expected the model of this package"): verify_export(e, decoder(3))
    for text in ([], [256], torch.zeros(9), 0, -5):
        with pytest.raises(DataError, match="Is it the tokenizer"): verify_export(e, decoder(2), tokens=text, progress=False)
    with pytest.raises(DataError, match="found a string"): verify_export(e, decoder(2), tokens="text", progress=False)


def test_a_model_that_is_another_on_long_texts_is_not_proved(base):
    "The proof compares with the stored numbers; that these are what the model computes is a row of its own."
    e, model = base
    hook = model.blocks[1].mlp.register_forward_hook(lambda m, a, y: y if a[0].shape[-2] < 20 else -y)
    try: p = verify_export(e, model, tokens=64, progress=False)
    finally: hook.remove()
    assert not p.ok and list(p.table.index[p.table.ok.eq(False)]) == ["change by rounding scales, over sigma"]


def test_real_runtime_is_asked_where_there_is_one(base, monkeypatch):
    e, model = base
    monkeypatch.setattr(coreml.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(coreml, "_native", lambda export, adapter="": coreml._interpreted(read_package(export.path), export, "float16", adapter))
    p = verify_export(e, model, tokens=64, progress=False)
    assert p.ok and p.table.found["Core ML runtime: signal over difference, dB"] > 40
    def refuses(export, adapter=""): raise RuntimeError("error code -14")
    monkeypatch.setattr(coreml, "_native", refuses)
    p = verify_export(e, model, tokens=64, progress=False)
    assert not p.ok and "error code -14" in p.table.note["Core ML runtime"]


def test_second_witness(base):
    e, model = base
    t = coreai_witness(e, model)
    assert t.ok.iloc[0] is None and "skipped" in t.note.iloc[0] if importlib.util.find_spec("coreai_torch") is None else t.ok.iloc[0]


# ---------------------------------------------------------------- adapters

def test_adapters_are_functions_of_one_package(tmp_path):
    model = decoder()
    tuned = {"first": with_adapter(model, seed=1), "second": with_adapter(model, seed=2)}
    file = save_adapters(tuned["second"], tmp_path/"second.safetensors")
    alone = export_coreml(model, tmp_path/"alone.mlpackage", config=SMALL, functions=("decode",), progress=False)
    e, p = checked(model, tmp_path/"m.mlpackage", functions=("decode",), adapters={"first": tuned["first"], "second": file}, tokens=24)
    assert list(e.functions) == ["decode", "decode_first", "decode_second"]
    assert p.table.found["float32, decode: largest difference (second)"] < 1e-4
    weights = lambda e: size_report(e).measured.drop(["program", "total"]).sum()
    adapters = sum(2*2*p.numel() for p in adapter_parameters(tuned["first"]).values())
    assert abs(weights(e)/(weights(alone) + adapters) - 1) < .05
    p = verify_export(e, model, tokens=24, progress=False)
    assert p.ok and "skipped" in p.table.note["logits (first)"]
    p = verify_export(e, model, tokens=24, adapters={"first": tuned["second"]}, progress=False)
    assert not p.ok and p.table.ok["float32, decode: largest difference"] and not p.table.ok["float32, decode: largest difference (first)"]
    with pytest.raises(DataError, match="did you mean 'first'"): verify_export(e, model, tokens=24, adapters={"frst": tuned["first"]})
    with pytest.raises(DataError, match="belong to codes"): export_coreml(decoder(seed=3), tmp_path/"x.mlpackage", adapters=tuned)
    with pytest.raises(DataError, match="beside the codes"): export_coreml(tuned["first"], tmp_path/"x.mlpackage")
    with pytest.raises(DataError, match="letters, digits"): export_coreml(model, tmp_path/"x.mlpackage", adapters={"a b": tuned["first"]})


# ---------------------------------------------------------------- refusals, before any converter

@pytest.mark.parametrize("kw, match", [
    (dict(bits=3, target="iOS16", config=DeviceConfig(cache="io")), "3 bits .* needs iOS18"),
    (dict(way="a", target="iOS17", config=DeviceConfig(cache="io")), "way 'a' .* needs iOS18"),
    (dict(way="b", target="macOS13", config=DeviceConfig(cache="io")), "way 'b' .* needs iOS18"),
    (dict(way="d"), "one scale per matrix"), (dict(way="e"), "unknown way 'e'"), (dict(target="iOS19"), "unknown target 'iOS19'; did you mean 'iOS1"),
    (dict(target="iOS16"), "a cache that is a state needs iOS18"), (dict(functions=("prefil",)), "did you mean 'prefill'"),
    (dict(embedding_bits=8), "embedding was trained at 4 bits"), (dict(path="model"), "ends in .mlpackage"),
    (dict(target="iOS17", config=DeviceConfig(cache="io"), functions=("prefill", "decode")), "several functions needs iOS18")])
def test_refused_before_the_converter(kw, match, tmp_path, monkeypatch):
    monkeypatch.setattr(coreml, "coremltools", lambda: pytest.fail("the converter was reached"))
    model, path = decoder(bits=kw.pop("bits", 2)), tmp_path/kw.pop("path", "m.mlpackage")
    with pytest.raises(MixbookError, match=match): export_coreml(model, path, progress=False, **kw)
    assert not list(tmp_path.iterdir())


class Winding(Decoder):
    "Control flow that no trace can follow."
    def forward(self, tokens): return super().forward(tokens) if int(tokens.sum())%2 else -super().forward(tokens)


def test_models_that_are_refused(tmp_path):
    config, path = ProxyConfig(depth=1, width=64, heads=2), tmp_path/"m.mlpackage"
    with pytest.raises(DataError, match="expected a model with quantised weights"): export_coreml(Decoder(config), path)
    with pytest.raises(UnsupportedError, match="found Sequential"): export_coreml(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    with pytest.raises(DataError, match="stack of 2"): export_coreml(prepare_qat(Decoder(config, 2), QATConfig()), path)
    with pytest.raises(UnsupportedError, match="Winding has a `forward` of its own"): export_coreml(prepare_qat(Winding(config), QATConfig()), path)
    odd = decoder()
    odd.forward = lambda tokens: Decoder.forward(odd, tokens)*(1 if tokens.shape[1] < 20 else -1)  # the same on short texts
    with pytest.raises(UnsupportedError, match="`forward` of its own"): export_coreml(odd, path)
    odd = decoder()
    odd.blocks[0].mlp.register_forward_hook(lambda m, a, y: 2*y)
    with pytest.raises(UnsupportedError, match="computes something else"): export_coreml(odd, path)
    for kw, said in ((dict(config={}), "expected a `DeviceConfig`, found dict"), (dict(adapters=[odd]), "expected adapters as name")):
        with pytest.raises(DataError, match=said): export_coreml(decoder(), path, **kw)
    model = decoder()
    with torch.no_grad(): model.blocks[0].mlp.up.scale.mul_(1e9)
    with pytest.raises(DataError, match="too large for fp16"): export_coreml(model, path)
    model = decoder()
    with torch.no_grad(): model.blocks[0].mlp.up.scale[:9] = 1e-5; model.blocks[0].mlp.up.scale[9:] = 30.
    with pytest.raises(DataError, match="Did a row collapse"): export_coreml(model, path)
    assert not list(tmp_path.iterdir())


def test_without_coremltools(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'mixbook\[coreml\]'"): export_coreml(decoder(), tmp_path/"m.mlpackage", config=SMALL, progress=False)
    e = export_coreml(decoder(), tmp_path/"m.mlpackage", config=SMALL, dry=True)
    assert "body" in capsys.readouterr().out and not list(tmp_path.iterdir()) and e.predicted["body"] > 12_000


# ---------------------------------------------------------------- one step or not at all

def test_nothing_is_left_by_an_error_and_what_stood_there_stays(base, tmp_path, monkeypatch):
    e, model = base
    path = shutil.copytree(e.path, tmp_path/"m.mlpackage")
    with pytest.raises(DataError, match="overwrite=True"): export_coreml(model, path, config=SMALL)
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        def fails(*a): raise error
        monkeypatch.setattr(coreml, "_merge", fails)
        monkeypatch.setattr(coreml, "_convert", lambda ct, n, m, job, to: to)
        with pytest.raises((KeyboardInterrupt, DataError)): export_coreml(model, path, config=SMALL, overwrite=True, progress=False)
        assert [p.name for p in tmp_path.iterdir()] == ["m.mlpackage"] and verify_export(path).ok


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_export_that_is_killed_leaves_no_package(tmp_path):
    model, child = decoder(2), os.fork()
    if not child:
        try: export_coreml(model, tmp_path/"m.mlpackage", config=SMALL, progress=False)
        finally: os._exit(0)
    while not list(tmp_path.rglob("prefill.mlpackage")): time.sleep(.02)  # the first function is being written
    os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    assert not (tmp_path/"m.mlpackage").exists() and list(tmp_path.iterdir())


def test_export_is_silent_and_overwrites(tmp_path, capfd):
    path = tmp_path/"m.mlpackage"
    path.mkdir(); (path/"old").touch()
    e = export_coreml(decoder(), path, config=SMALL, functions=("decode",), overwrite=True, progress=False)
    assert capfd.readouterr() == ("", "") and read_export(path).codes == e.codes and [p.name for p in tmp_path.iterdir()] == ["m.mlpackage"]
    before = os.umask(0o027)
    try: export_coreml(decoder(), path, config=SMALL, functions=("decode",), overwrite=True, progress=False)
    finally: os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in path.rglob("*") if f.is_file()} == {0o640} and {f.stat().st_mode & 0o777 for f in (path, *path.rglob("*")) if f.is_dir()} == {0o750}


# ---------------------------------------------------------------- damaged and foreign

def test_damaged_and_foreign_packages(base, tmp_path):
    e, model = base
    inside = Path("Data")/"com.apple.CoreML"
    for k, (file, keep) in enumerate({inside/"weights"/"weight.bin": .5, inside/"model.mlmodel": .7, Path("Manifest.json"): .5}.items()):
        path = shutil.copytree(e.path, tmp_path/f"{k}.mlpackage")
        data = (path/file).read_bytes()
        (path/file).write_bytes(data[:int(len(data)*keep)])
        with pytest.raises(DataError): verify_export(path, model)
    with pytest.raises(DataError): verify_export(tmp_path/"nothing.mlpackage")
    path = shutil.copytree(e.path, tmp_path/"foreign.mlpackage")
    import coremltools
    m = coremltools.proto.Model_pb2.Model()
    m.ParseFromString((path/inside/"model.mlmodel").read_bytes())
    del m.description.metadata.userDefined["mixbook"]
    (path/inside/"model.mlmodel").write_bytes(m.SerializeToString())
    with pytest.raises(DataError, match="written by `export_coreml`"): verify_export(path)


def test_description_goes_there_and_back(base):
    e, model = base
    assert read_export(e.path).to_json() == e.to_json() == Export.from_json(e.to_json()).to_json()
    assert read_export(e.path).config == SMALL and read_export(e.path).model == model.config
    compile(python_snippet(e), "snippet", "exec")
    assert 'functionName = "decode"' in swift_snippet(e) and "predicted" in e._repr_markdown_()


def test_casts_of_constants_with_one_element(monkeypatch):
    "numpy 2.4 refuses `int(array of one element)`, on which the converter relies."
    from mixbook.constants import coremltools
    ct = coremltools()
    from coremltools.converters.mil.frontend.torch import ops
    class Strict(int):
        def __new__(cls, x):
            assert np.ndim(x) == 0, "only 0-dimensional arrays can be converted to Python scalars"
            return super().__new__(cls, x)
    done = {}
    class X: val = np.array([3]); shape = (1,); can_be_folded_to_const = staticmethod(lambda: True)
    class Context: add = staticmethod(lambda var, name: done.update({name: var}))
    class Node: name = "n"
    monkeypatch.setattr(ops, "_get_inputs", lambda *a, **kw: [X])
    monkeypatch.setattr(ops.mb, "const", lambda val, name: val)
    with pytest.raises(AssertionError): ops._cast(Context, Node, Strict, "int32")
    with coreml._converter(ct): ops._cast(Context, Node, Strict, "int32")
    assert done == {"n": 3}
