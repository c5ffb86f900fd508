"Proofs end to end: all ways on eight blocks, a trained model over real text, many steps of decoding; and each check of a proof fails where it must."
import shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from mixbook.constants import quiet
from mixbook.core import UnsupportedError
from mixbook.decoder import Decoder, ProxyConfig
from mixbook.device import DeviceConfig, run_device
from mixbook.quant import QATConfig, finalize_qat, prepare_qat
from mixbook.ways import weight_pass, ways
import mixbook.coreml as coreml
import mixbook.device as device

pytest.importorskip("coremltools", reason="coremltools is not installed")
from mixbook.coreml import export_coreml, size_report, verify_export
from mixbook.package import dense_value, read_package

SMALL = DeviceConfig(64, chunk=32)


def decoder(depth=1, *, per="row", **kw): return prepare_qat(Decoder(ProxyConfig(**(dict(depth=depth, width=64, heads=2) | kw)), seed=0), QATConfig(bits=2, per=per))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = decoder()
    return export_coreml(model, tmp_path_factory.mktemp("base")/"m.mlpackage", config=SMALL, progress=False), model


def as_coremltools_reads(path):
    "Name → dense weight, by coremltools' own loader of programs."
    from mixbook.constants import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load
    with quiet(): prog = load(coremltools().models.MLModel(str(path), skip_model_load=True).get_spec(), 9, str(Path(path)/"Data"/"com.apple.CoreML"/"weights"))
    return {o.outputs[0].name: o.materialized_val_inference() for f in prog.functions.values() for o in f.operations if o.op_type.startswith("constexpr_")}


def test_every_code_of_eight_layers_in_every_way(tmp_path):
    rows = {}
    for way in ways:
        model = decoder(8, per="tensor" if way == "d" else "row")
        e = export_coreml(model, tmp_path/f"{way}.mlpackage", way=way, functions=("decode",), config=DeviceConfig(32, chunk=32), progress=False)
        p, trained, package = verify_export(e, model, tokens=16, progress=False), finalize_qat(model), read_package(e.path)
        ops, found = p.weights[p.weights.part == "body"].op.unique(), p.table.found
        f = package.function()
        assert all(np.array_equal(v, dense_value(f, n)) for n, v in as_coremltools_reads(e.path).items())
        held = [w for w in package.weights().values() if w.codes is not None]
        assert {(w.bits, w.levels.shape[-2] if w.levels.ndim > 1 else len(w.levels), w.sources["codes"].const.type.dtype) for w in held} == {(2, 4, "uint2"), (4, 16, "uint4")}
        rows[way] = dict(ok=p.ok, matrices=len(p.weights), codes=p.weights.codes.sum(), equal=p.weights.equal.sum(), trained=sum(q.codes.numel() for q in trained.values()), op=" ".join(ops), changed=e.changed,
                         tables=p.weights.table.all(), scales=p.weights.scale.all(), dense=found["dense in place of codes"], logits=found["float32, decode: largest difference"], bits_per_weight=size_report(e).bits_per_weight["body"], spec=package.spec)
    t = pd.DataFrame(rows).T
    print(t.to_string())
    assert list(t.index) == list("abcd") and t[["ok", "tables", "scales"]].all(axis=None) and (t.matrices == 33).all() and (t.dense == 0).all()
    assert (t.equal == t.codes).all() and (t.codes == t.trained).all() and (t.codes > 400_000).all() and (t.logits < 1e-5).all()
    assert t.op.to_dict() == {w: "constexpr_blockwise_shift_scale" if w == "a" else "constexpr_lut_to_dense" for w in ways}
    assert t.bits_per_weight.to_dict() == pytest.approx(dict(a=2 + 7/24, b=2 + 11/12, c=2 + 7/24, d=2 + 1/24)) and (t.spec == 9).all()  # codes, tables, scales, padding at width 64
    assert (t.changed > 0).all() and (t.changed <= 2**-9).all() and t.changed["c"] <= 2**-11  # of the weights as trained


# ---------------------------------------------------------------- trained, on real text

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A small model with 2-bit weights, trained on docstrings and code of this installation, its package, and held-out text."
    from mixbook.corpus import installed_corpus
    from mixbook.qat import qat_schedule, train_qat
    folder = tmp_path_factory.mktemp("trained")
    corpus = installed_corpus(folder/"corpus", max_bytes=150_000, domains=["code", "docstrings"], progress=False)
    config = ProxyConfig(depth=2, width=64, heads=2, tokens=300_000, eval_windows=16)
    made = train_qat(corpus, {d: .5 for d in corpus.domains}, config, qat_schedule(config, .3, kind="fused"), QATConfig(bits=2), progress=False)
    text = np.concatenate([corpus.tokens(d, "heldout")[:1024] for d in corpus.domains]).astype(np.int64)
    return export_coreml(made.model, folder/"m.mlpackage", config=DeviceConfig(256), progress=False), made, text


def test_two_thousand_tokens_of_real_text_by_a_trained_model(trained):
    e, made, text = trained
    assert len(text) == 2048 and max(made.row["loss/code"], made.row["loss/docstrings"]) < 3.2  # it has learnt something
    p = verify_export(e, made.model, tokens=text, progress=False)
    found = p.table.found
    print(p.table[["found", "bound", "ok", "note"]].to_string())
    assert p.ok and found["codes equal"] == 1 and float(p.table.note["float16: largest difference over sigma"].split()[-1]) > 1.5
    assert max(found["float32, prefill: largest difference"], found["float32, decode: largest difference"]) <= 1e-4
    assert found["float16: largest difference over sigma"] <= 2e-2 and found["float16: infinite or NaN"] == 0
    assert found["float16: top token equal"] >= .995 and p.table.note["float16: top token equal"].endswith("of 2,048 differ")
    assert found["change by rounding scales, over sigma"] < 1e-2


def test_decoding_with_a_state_is_the_full_forward(base):
    "Forty steps after a padded chunk, and sixty-four from nothing."
    e, model = base
    job, x = coreml._job(model, "c", "iOS18", SMALL, None, None), coreml._sample_text(256, 64)[None]
    want = job.model(x).detach()
    for precision, bound in (("float32", 1e-5), ("float16", 1e-2)):
        f = coreml._interpreted(read_package(e.path), e, precision)
        for steps in (40, 64): assert float((run_device(f, x, steps=steps) - want).abs().max()) <= bound
        assert list(f["decode"].held["state"]) == ["k_cache", "v_cache"] and f["decode"].held is f["prefill"].held  # one state for both


# ---------------------------------------------------------------- each check can fail

def _rotary(f): f["decode"]._buffers["turn"] = f["decode"].turn.roll(1, 0)
def _eps(f):
    for m in f.values(): m._buffers["eps"] = m.eps*30

def _forgets(end):
    "The last layer's new values are not written."
    def forgetful(self):
        self.new[1][-1] = self.old[1][len(self.new[1]) - 1]
        return end(self)
    return forgetful


@pytest.mark.parametrize("fault", ["rotary", "norm", "mask", "write"])
def test_wrong_programs_are_caught(fault, tmp_path, monkeypatch):
    model, make = decoder(), device.device_functions
    with monkeypatch.context() as m:
        if fault in ("rotary", "norm"): m.setattr(coreml, "device_functions", lambda *a, **kw: ({"rotary": _rotary, "norm": _eps}[fault](f := make(*a, **kw)), f)[1])
        elif fault == "mask": m.setattr(device.torch, "gt", torch.ge)
        else: m.setattr(device._Cache, "end", _forgets(device._Cache.end))
        if fault == "mask":
            with pytest.raises(UnsupportedError, match="computes something else"): export_coreml(model, tmp_path/"m.mlpackage", config=SMALL, progress=False)
        m.setattr(coreml, "_check_same", lambda *a: None)
        e = export_coreml(model, tmp_path/"m.mlpackage", config=SMALL, progress=False)
    p = verify_export(e, model, tokens=64, progress=False)
    alone = verify_export(e).table  # the weights are right, the program is not
    assert p.table.ok["codes equal"] and not p.ok and set(alone.index[alone.ok.eq(False)]) <= ({"size against prediction"} if fault == "rotary" else set())  # a second table of positions
    assert not p.table.ok["float32, decode: largest difference"] and bool(p.table.ok["float32, prefill: largest difference"]) == (fault == "rotary")


def test_a_dense_weight_in_place_of_codes_is_caught(tmp_path, monkeypatch):
    "The numbers are right and the logits are, but the weight is sixteen bits wide."
    model, path, lies = decoder(), tmp_path/"m.mlpackage", False
    def leaky(stored, version):
        put, found = weight_pass({n: s for n, s in stored.items() if n != "blocks.0.mlp.up"}, version)
        if lies: found.update(stored)
        return put, found
    with monkeypatch.context() as m:
        m.setattr(coreml, "weight_pass", leaky)
        with pytest.raises(UnsupportedError, match="1 of 5 quantised matrices, such as 'blocks.0.mlp.up', did not arrive"): export_coreml(model, path, config=SMALL, functions=("decode",), progress=False)
        assert not list(tmp_path.iterdir())
        lies = True
        export_coreml(model, path, config=SMALL, functions=("decode",), progress=False)
    for p in (verify_export(path), verify_export(path, model, tokens=16, progress=False)):
        assert not p.ok and p.table.found["dense in place of codes"] == 1 and not p.table.ok["codes equal"] and p.table.found["lint findings"] == 1 and "blocks_0_mlp_up" in p.table.note["lint findings"]
    assert p.table.ok["float32, decode: largest difference"] and not p.table.ok["size against prediction"]


def test_sizes_and_infinities_are_caught(base, tmp_path):
    e, model = base
    path = shutil.copytree(e.path, tmp_path/"fat.mlpackage")
    with open(path/"Data"/"com.apple.CoreML"/"weights"/"weight.bin", "ab") as f: f.write(bytes(64*200))
    p = verify_export(path)
    assert list(p.table.index[p.table.ok.eq(False)]) == ["size against prediction"]
    loud = decoder()
    with torch.no_grad(): loud.blocks[0].mlp.down.scale.mul_(3e5)
    p = verify_export(export_coreml(loud, tmp_path/"loud.mlpackage", config=SMALL, functions=("decode",), progress=False), loud, tokens=16, progress=False)
    assert not p.ok and p.table.ok["codes equal"] and not p.table.ok["float16: infinite or NaN"] and not p.table.ok["float16: largest difference over sigma"]
