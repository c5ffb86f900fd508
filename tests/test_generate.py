"Text goes in and comes out the same; two witnesses write one text; documents keep to their schema; faults are caught."
import contextlib, importlib.util, inspect, io, itertools, json, re, sys, types
from types import SimpleNamespace
import jsonschema, numpy as np, pandas as pd, pytest, torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
import mixbook.generate as mg
from mixbook.core import DataError, UnsupportedError
from mixbook.corpus import read_corpus, toy_corpus
from mixbook.decoder import Decoder, ProxyConfig
from mixbook.device import DeviceConfig, quantized_of
from mixbook.generate import (Generation, PackageRunner, Sizes, TorchRunner, generate_tokens, json_schema_mask, open_tokenizer, python_generate, read_json, save_tokenizer, stream_text, stream_tokens,
    swift_generate)
from mixbook.package import read_package, seed_fault
from mixbook.quant import QATConfig, finalize_qat, prepare_qat

EVERY = "".join(chr(i) for i in [*range(0x250), *range(0x250, 0x110000, 61)] if not 0xD800 <= i < 0xE000) + "don't  stop .  Now , \r\n\t 12,345.6 I've"
CONFIG = DeviceConfig(context=64, chunk=16)

@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    toy = toy_corpus()
    docs = pd.DataFrame([dict(domain=d, text=t) for d in toy.domains for t in toy.texts(d)])
    return dict(bytes=toy, bpe=read_corpus(docs, tmp_path_factory.mktemp("c")/"bpe", tokenizer="bpe", vocab_size=600, near=False, progress=False))

def decoder(seed=0, vocab=256, **kw): return Decoder(ProxyConfig(**(dict(depth=2, width=64, heads=2, kv_heads=1, vocab=vocab, tokens=10_000) | kw)), seed=seed)

@pytest.fixture(scope="module")
def runner(): return TorchRunner(loud(decoder()), CONFIG)

def loud(model, times=30., inside=6.):
    "A random model that listens: greedy texts depend on every token before, and choices are no ties."
    with torch.no_grad():
        model.embed.weight.mul_(times)
        for b in model.blocks:
            for l in (b.attn.out, b.mlp.down, b.attn.q if b.attn.shared else b.attn.qkv): l.weight.mul_(inside)
    return model

# ---------------------------------------------------------------- tokenizer

@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_files_give_the_ids_of_the_corpus(kind, corpora, tmp_path):
    corpus = corpora[kind]
    assert save_tokenizer(corpus, tmp_path/"m.mlpackage") == tmp_path and {f.name for f in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "config.json"}
    plain, ours = Tokenizer.from_file(str(tmp_path/"tokenizer.json")), open_tokenizer(tmp_path/"m.mlpackage")
    assert (ours.vocab_size, ours.end) == (corpus.vocab_size, corpus.eot) == (plain.get_vocab_size(), corpus.eot)
    for d, side in itertools.product(corpus.domains, ("train", "heldout")):
        ids = corpus.tokens(d, side).tolist()[:20_000]
        ids = ids[:len(ids) - ids[::-1].index(corpus.eot)]
        texts = list(itertools.islice(corpus.texts(d, side), ids.count(corpus.eot)))
        for tok in (ours.encode, lambda t: np.array(plain.encode(t, add_special_tokens=False).ids)): assert [i for t in texts for i in tok(t).tolist() + [corpus.eot]] == ids
        assert [ours.decode(ours.encode(t)) for t in texts] == texts == [plain.decode(plain.encode(t).ids) for t in texts]
    assert ours.decode(ours.encode(EVERY)) == EVERY.replace("\0", "" if kind == "bytes" else "\0") and plain.decode(plain.encode(EVERY).ids) == EVERY
    assert ours.decode([corpus.eot]) == "" and (kind == "bytes") == (plain.encode(EVERY).ids == list(EVERY.encode()))

def test_each_byte_is_its_own_id(tmp_path):
    save_tokenizer("bytes", tmp_path); tok = Tokenizer.from_file(str(tmp_path/"tokenizer.json"))
    assert sorted(tok.get_vocab().values()) == list(range(256)) and tok.get_vocab_size() == 256
    for b in range(128): assert tok.encode(chr(b)).ids == [b] and tok.decode([b]) == chr(b)
    for b in range(128, 256): assert tok.decode([b]) == "\ufffd" and len(tok.id_to_token(b)) == 1

class SwiftReader:
    "What the sources of swift-transformers 1 do with the three files, said in Python: sections around added tokens, pre-tokenizer, merges by rank, decoder, clean-up."
    def __init__(self, folder):
        data, self.config, _ = (json.loads((folder/f).read_text(encoding="utf-8")) for f in ("tokenizer.json", "tokenizer_config.json", "config.json"))
        assert self.config["tokenizer_class"].replace("Fast", "") in ("PreTrainedTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer") and data["model"]["type"] == "BPE"
        assert data["pre_tokenizer"]["type"] == data["decoder"]["type"] == "ByteLevel" and data["normalizer"] is None and data["post_processor"] is None
        self.added = sorted((t["content"] for t in data["added_tokens"]), key=len, reverse=True)
        self.ids = data["model"]["vocab"] | {t["content"]: t["id"] for t in data["added_tokens"]}
        self.tokens, self.ranks = {i: t for t, i in self.ids.items()}, {tuple(m.split(" ") if isinstance(m, str) else m): r for r, m in enumerate(data["model"]["merges"])}
        self.split = pre_tokenizers.Split(Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated") if data["pre_tokenizer"]["use_regex"] else None
        alphabet, rest = [*range(33, 127), *range(161, 173), *range(174, 256)], itertools.count(256)
        self.byte = [chr(b) if b in alphabet else chr(next(rest)) for b in range(256)]
    def word(self, chars):
        while pairs := [(self.ranks[p], p) for p in zip(chars, chars[1:]) if p in self.ranks]:
            (a, b), out = min(pairs)[1], []
            while chars:
                two = chars[:2] == [a, b]
                out.append(a + b if two else chars[0]); chars = chars[1 + two:]
            chars = out
        return chars
    def encode(self, text):
        sections = re.split("(" + "|".join(map(re.escape, self.added)) + ")", text) if self.added else [text]
        out = []
        for x in filter(None, sections):
            if x in self.added: out.append(self.ids[x]); continue
            for w in ([w for w, _ in self.split.pre_tokenize_str(x)] if self.split else [x]): out += [self.ids[t] for t in (self.word([self.byte[b] for b in w.encode()]) if self.ranks else map(self.byte.__getitem__, w.encode()))]
        return out
    def decode(self, ids):
        text, back = "", {c: b for b, c in enumerate(self.byte)}
        for is_added, ts in itertools.groupby((self.tokens[i] for i in ids), lambda t: t in self.added): text += "".join(ts) if is_added else bytes(back[c] for t in ts for c in t).decode("utf-8", "replace")
        if self.config.get("clean_up_tokenization_spaces", True):
            for a, b in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")): text = text.replace(a, b)
        return text

@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_reader_with_the_rules_of_swift_agrees(kind, corpora, tmp_path):
    corpus, ours = corpora[kind], open_tokenizer(corpora[kind])
    save_tokenizer(corpus, tmp_path); swift = SwiftReader(tmp_path)
    for text in [EVERY, *itertools.islice(corpus.texts("code"), 3), *itertools.islice(corpus.texts("tables"), 3), *itertools.islice(corpus.texts("prose"), 3)]:
        ids = ours.encode(text).tolist()
        assert swift.encode(text) == ids and swift.decode(ids) == text
    assert len(ours.encode(EVERY)) > 20_000
    del swift.config["clean_up_tokenization_spaces"]
    assert swift.decode(ours.encode("stop .").tolist()) == "stop.", "the reader above would not notice that the clean-up is on"

def test_text_is_text_even_where_it_names_the_end(corpora):
    for c in corpora.values():
        tok, text = open_tokenizer(c), "a<|endoftext|>b"
        assert tok.end not in tok.encode(text) and tok.decode(tok.encode(text)) == text

def test_parts_that_swift_lacks_are_refused(corpora, tmp_path):
    def odd(**parts):
        t = Tokenizer.from_file(corpora["bpe"].tokenizer)
        for k, v in parts.items(): setattr(t, k, v)
        return t
    inside = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(), pre_tokenizers.Sequence([pre_tokenizers.UnicodeScripts()])])
    for o, said in ((odd(pre_tokenizer=inside), "UnicodeScripts"), (odd(normalizer=normalizers.Sequence([normalizers.Nmt()])), "Nmt"), (odd(decoder=decoders.CTC()), "CTC"), (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "only BPE")):
        with pytest.raises(UnsupportedError, match=said): save_tokenizer(o, tmp_path/"o")
    assert not (tmp_path/"o").exists()
    fine = odd(post_processor=processors.ByteLevel(), normalizer=normalizers.NFC())
    assert open_tokenizer(save_tokenizer(fine, tmp_path/"fine")).end == corpora["bpe"].eot

def test_a_name_that_is_taken_and_ids_with_gaps(corpora, tmp_path):
    t = Tokenizer.from_file(corpora["bpe"].tokenizer); t.add_special_tokens(["<|endoftext|>"])
    tok = open_tokenizer(save_tokenizer(t, tmp_path)); assert tok.end == t.get_vocab_size() and json.loads((tmp_path/"tokenizer_config.json").read_text())["eos_token"] == "<|endoftext_of_corpus|>"
    assert t.get_vocab_size() == tok.end, "the caller's tokenizer has changed"
    with pytest.raises(UnsupportedError, match="without gaps"): open_tokenizer(Tokenizer(models.BPE({"a": 0, "b": 5}, [])))

def test_files_that_are_absent_damaged_or_foreign(tmp_path):
    with pytest.raises(DataError, match="save_tokenizer"): open_tokenizer(tmp_path)
    with pytest.raises(DataError, match="could not read"): open_tokenizer(tmp_path/"none.json")
    with pytest.raises(DataError, match="expected a corpus"): open_tokenizer(3)
    save_tokenizer("bytes", tmp_path)
    for text, said in (("{", "config.json"), ("[]", "eos_token_id"), ('{"eos_token_id": 999}', "do not belong together"), ('{"eos_token_id": null}', "do not belong together")):
        (tmp_path/"config.json").write_text(text)
        with pytest.raises(DataError, match=said): open_tokenizer(tmp_path)
    (tmp_path/"config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match="config.json of another model"): save_tokenizer("bytes", tmp_path)
    (tmp_path/"config.json").unlink(); save_tokenizer("bytes", tmp_path); save_tokenizer("bytes", tmp_path)
    with pytest.raises(DataError, match="surrogate"): open_tokenizer("bytes").encode("a\ud800")

@pytest.mark.parametrize("text", ["plain", "ä ß 日本 🙂", "e\u0301🏴‍☠️", ""])
def test_pieces_are_the_text(text):
    tok = open_tokenizer("bytes"); pieces = list(stream_text(tok.encode(text), tok))
    assert "".join(pieces) == text and all("\ufffd" not in p for p in pieces)
    for cut in range(len(text.encode())): assert "".join(stream_text(tok.encode(text)[:cut], tok)) == tok.decode(tok.encode(text)[:cut])
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.choice([65, 0xC3, 0x9F, 0xF0, 0x9F, 0x99, 0x82, 0xFF, 0], 20).tolist()
        assert "".join(stream_text(ids, tok)) == tok.decode(ids)

# ---------------------------------------------------------------- tokens

def greedy(model, prompt, n):
    "Everything read anew for each token by the model that was trained."
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n): ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return tuple(ids[len(prompt):])

@pytest.mark.parametrize("form, cache, write, skip", [("plain", "state", "onehot", False), ("ane", "state", "onehot", False), ("plain", "io", "onehot", False), ("plain", "state", "slice", False), ("plain", "state", "onehot", True), ("ane", "io", "slice", True)])
@pytest.mark.parametrize("context", [64])
def test_every_form_writes_the_text_of_the_trained_model(form, cache, write, skip, context):
    model = loud(decoder(depth=2, kv_layers=1 if skip else None)); r = TorchRunner(model, DeviceConfig(context, chunk=32 if write == "slice" else 40, form=form, cache=cache, write=write, skip=skip))
    seen = set()
    for p in (1, 32, 39, 40, 41, context - 5, context):  # with chunks of 40 the padding of the last two reaches beyond the cache
        prompt = np.random.default_rng(p).integers(0, 256, p)
        made = generate_tokens(r, prompt, n=20); n = min(20, context - p + 1)
        assert made.tokens == greedy(model, prompt.tolist(), n) and made.reason == ("budget" if n == 20 else "context") and not made.complete
        seen |= set(made.tokens)
    assert len(seen) > 20, "texts that depend on nothing prove nothing"

def test_two_texts_at_the_same_time_do_not_mix(runner):
    a, b = [65, 66, 67], [200]*20
    whole = [list(stream_tokens(runner, p, n=15)) for p in (a, b)]
    s, t = stream_tokens(runner, a, n=15), stream_tokens(runner, b, n=15)
    assert list(map(list, zip(*zip(s, t)))) == whole

def test_a_fault_in_the_runner_changes_the_text(runner):
    "What the comparison of texts must be able to see."
    good = generate_tokens(runner, list(range(30, 60)), n=20).tokens
    class Late:
        sizes, start = runner.sizes, staticmethod(runner.start)
        def run(self, name, tokens, position, cache): return runner.run(name, tokens, position + (name == "decode"), cache)
    class Forgets:
        sizes, start = runner.sizes, staticmethod(runner.start)
        def run(self, name, tokens, position, cache): return runner.run(name, tokens, position, cache if name == "prefill" else runner.start())
    for broken in (Late(), Forgets()): assert generate_tokens(broken, list(range(30, 60)), n=20).tokens != good

class Table:
    "A runner with the same logits everywhere."
    def __init__(self, logits, context=10_000): self.logits, self.sizes, self.calls = np.asarray(logits, np.float32), Sizes(len(logits), context, 4), []
    def start(self): return []
    def run(self, name, tokens, position, cache): self.calls.append((name, tuple(tokens), position)); return np.tile(self.logits, (len(tokens), 1))

def test_the_calls_of_a_text():
    r = Table([0, 0, 5.]); assert generate_tokens(r, [0, 1, 0, 1, 1], n=3).tokens == (2, 2, 2)
    assert r.calls == [("prefill", (0, 1, 0, 1), 0), ("prefill", (1, 0, 0, 0), 4), ("decode", (2,), 5), ("decode", (2,), 6)]
    r = Table([0, 0, 5.]); r.sizes = Sizes(3, 100, 4, skip=True); generate_tokens(r, [0, 1, 0, 1, 1, 0], n=1)
    assert r.calls == [("prefill", (0, 1, 0, 1), 0), ("decode", (1,), 4), ("decode", (0,), 5)]

def frequencies(logits, n=4000, **how): return np.bincount(generate_tokens(Table(logits), [0], n=n, **how).tokens, minlength=len(logits))/n

@pytest.mark.parametrize("how, expected", [(dict(temperature=1.), [.5, .3, .15, .05]), (dict(temperature=.5), [.25, .09, .0225, .0025]), (dict(temperature=2.), np.sqrt([.5, .3, .15, .05])), (dict(temperature=1., top_k=2), [.5, .3, 0, 0]),
    (dict(temperature=1., top_p=.5), [1, 0, 0, 0]), (dict(temperature=1., top_p=.51), [.5, .3, 0, 0]), (dict(temperature=1., top_p=1.), [.5, .3, .15, .05]), (dict(temperature=1., top_k=3, top_p=.9), [.5, .3, .15, 0]), (dict(), [1, 0, 0, 0]),
    (dict(temperature=1., allow=lambda o: [False, True, True]), [0, .3, .15, 0]), (dict(allow=lambda o: [False, False, True, True, True]), [0, 0, 1, 0])])
def test_draws_have_the_odds_that_were_asked_for(how, expected):
    order, expected = [2, 0, 3, 1], np.array(expected)/np.sum(expected)   # not sorted by odds
    place = lambda v: np.array([v[i] for i in order])
    if "allow" in how: order = [0, 1, 2, 3]
    found = frequencies(np.log(place([.5, .3, .15, .05])), **how, seed=3)
    assert np.abs(found - place(expected)).max() < .035 and (found[place(expected) == 0] == 0).all()

def test_seeds_and_stops(runner):
    f = lambda seed, **how: generate_tokens(runner, [65], n=30, seed=seed, temperature=3., **how).tokens
    assert f(1) == f(1) and len({f(s) for s in range(5)}) == 5
    made = f(1)
    for stop in (made[7], [made[7]], {np.int64(made[7])}):
        g = generate_tokens(runner, [65], n=30, seed=1, temperature=3., stop=stop); assert g.tokens == made[:made.index(made[7])] and g.reason == "stop" and g.complete
    assert Generation.from_json(g.to_json()).tokens == list(g.tokens) or Generation.from_json(g.to_json()) == g
    s = stream_tokens(Table([0, 9.], context=5), [0, 0], n=9); got = []
    with pytest.raises(StopIteration) as e:
        while True: got.append(next(s))
    assert e.value.value == "context" and len(got) == 5 - 2 + 1

def test_bad_calls_say_what_is_wrong(runner):
    bad = [(dict(prompt=[]), "at least one token id"), (dict(prompt=[[1, 2]]), "at least one token id"), (dict(prompt=[1.5]), "at least one token id"), (dict(prompt=[-1]), "from 0 to 255"), (dict(prompt=[256]), "from 0 to 255"), (dict(prompt=[1]*65), "at most 64"), (dict(n=0), "at least 1 token"),
        (dict(temperature=-1.), "temperature"), (dict(temperature=float("nan")), "temperature"), (dict(top_k=0), "top_k"), (dict(top_p=0.), "top_p"), (dict(top_p=1.1), "top_p"), (dict(stop="."), "token ids"), (dict(allow=lambda o: np.zeros(256, bool)), "found none")]
    for change, said in bad:
        kw = dict(prompt=[1], n=3) | change
        with pytest.raises(DataError, match=said): generate_tokens(runner, **kw)
    with pytest.raises(DataError, match="at most 64"): stream_tokens(runner, [1]*65, n=1)  # at the call, before the first token is asked for
    for broken in ([0, np.nan], [0, np.inf]):
        with pytest.raises(DataError, match="that are not"): generate_tokens(Table(broken), [0], n=1)
    assert generate_tokens(Table([-np.inf, 0.]), [0], n=1).tokens == (1,)
    with pytest.raises(UnsupportedError, match="one text at a time"): TorchRunner(decoder(), CONFIG.replace(batch=2))

# ---------------------------------------------------------------- JSON

SCHEMAS = dict(
    flat=dict(type="object", properties=dict(name=dict(type="string", maxLength=8), age=dict(type="integer", minimum=0, maximum=120), ok=dict(type="boolean")), required=["name", "age", "ok"], additionalProperties=False),
    nested=dict(type="object", properties=dict(p=dict(type="object", properties=dict(x=dict(type="number", minimum=-1, maximum=1, multipleOf=.01), y=dict(type="null")), required=["x", "y"], additionalProperties=False)), required=["p"], additionalProperties=False),
    array=dict(type="array", items=dict(enum=["red", "green", 3, None]), minItems=2, maxItems=5), choice=dict(anyOf=[dict(const="no"), dict(type="array", items=dict(type="integer", minimum=0, maximum=9), maxItems=3)]),
    words=dict(type="array", items=dict(type="string", maxLength=6), minItems=2, maxItems=4), pattern=dict(type="string", pattern="^[a-z]{2,4}-[0-9]{3}$"), number=dict(type="integer", minimum=10, maximum=99), umlaut=dict(type="object", properties={"größe": dict(enum=["groß", "🙂"])}, required=["größe"], additionalProperties=False),
    ref={"$defs": dict(leaf=dict(type="object", properties=dict(v=dict(enum=[1, 2])), required=["v"], additionalProperties=False)), "type": "array", "items": {"$ref": "#/$defs/leaf"}, "minItems": 1, "maxItems": 2})

llguidance = pytest.mark.skipif(not importlib.util.find_spec("llguidance"), reason="llguidance is not installed")

class Noise:
    "A runner without any sense: other logits at every call."
    def __init__(self, vocab, seed): self.sizes, self.rng = Sizes(vocab, 10_000, 16), np.random.default_rng(seed)
    def start(self): return []
    def run(self, name, tokens, position, cache): return self.rng.normal(size=(len(tokens), self.sizes.vocab))*3

@llguidance
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_documents_are_valid_whatever_the_model(name, kind, corpora):
    tok, schema, seen = open_tokenizer(corpora[kind]), SCHEMAS[name], set()
    allow = json_schema_mask(schema, tok)
    model = TorchRunner(loud(decoder(1, vocab=tok.vocab_size), 3., 1.), DeviceConfig(context=256, chunk=32))
    for r in (model, *(Noise(tok.vocab_size, s) for s in range(20))):
        made = generate_tokens(r, tok.encode("the"), n=200, temperature=1., allow=allow)
        assert (made.reason, made.complete) == ("stop", True) and tok.end not in made.tokens
        jsonschema.validate(read_json(made, tok), schema); seen.add(made.tokens)
    assert len(seen) > 1

@llguidance
def test_a_mask_depends_on_the_tokens_alone():
    tok = open_tokenizer("bytes"); allow, fresh = (json_schema_mask(SCHEMAS["flat"], tok) for _ in range(2))
    doc = list(b'{"name":"ab","age":7,"ok":true}')
    at = [allow(doc[:i]) for i in range(len(doc) + 1)]
    for i in (5, 30, 0, len(doc), 12): assert (allow(doc[:i]) == at[i]).all() and (fresh(doc[:i]) == at[i]).all()
    assert all(m[t] for m, t in zip(at, doc)) and np.flatnonzero(at[-1]).tolist() == [tok.end] and not any(m[tok.end] for m in at[:-1])
    assert allow.complete(doc) and not allow.complete(doc[:-1])
    with pytest.raises(DataError, match="token 1 it does not"): allow(list(b"{x"))
    assert (allow(doc[:5]) == at[5]).all(), "an error leaves the mask usable"

@llguidance
def test_a_budget_that_ends_early_is_said(runner):
    tok = open_tokenizer("bytes"); allow = json_schema_mask(SCHEMAS["flat"], tok)
    whole = generate_tokens(runner, [65], n=60, allow=allow); assert whole.complete
    for n in (1, 2, 9, len(whole) - 1):
        cut = generate_tokens(runner, [65], n=n, allow=allow); assert (cut.reason, cut.complete, cut.tokens) == ("budget", False, whole.tokens[:n])
        with pytest.raises(DataError, match="whole document"): read_json(cut, tok)
    last = generate_tokens(runner, [65], n=len(whole), allow=allow); assert (last.reason, last.complete) == ("budget", True) and read_json(last, tok) == read_json(whole, tok)
    full = generate_tokens(runner, [65]*60, n=60, allow=allow); assert (full.reason, full.complete) == ("context", False)
    with pytest.raises(DataError, match="json_schema_mask"): read_json(Generation((65, 66), "stop", True), tok)

@llguidance
def test_schemas_that_cannot_be_followed():
    tok = open_tokenizer("bytes")
    for bad in ("{", "[]", [], 3, None, dict(type="bogus"), dict(enum=[]), dict(type="object", properties=dict(a=3)), {"$ref": "#/nowhere"}, dict(type="array", minItems=3, maxItems=1), dict(type="string", pattern="[")):
        with pytest.raises(DataError, match="expected a JSON schema"): json_schema_mask(bad, tok)
    for odd in ({"not": dict(type="string")}, dict(type="array", uniqueItems=True), dict(type="string", format="nope")):
        with pytest.raises(UnsupportedError, match="token by token"): json_schema_mask(odd, tok)
    free, tight = (json_schema_mask(SCHEMAS["flat"], tok, spaces=s) for s in (True, False))
    assert free(list(b"{"))[ord(" ")] and not tight(list(b"{"))[ord(" ")]

def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'mixbook\[generate\]'"): json_schema_mask(SCHEMAS["flat"], "bytes")

# ---------------------------------------------------------------- packages

coreml = pytest.mark.skipif(not importlib.util.find_spec("coremltools"), reason="coremltools is not installed")
KINDS = dict(padded=dict(config=DeviceConfig(64, chunk=24, form="ane")), adapters=dict(config=DeviceConfig(64), functions=("decode",)), io_skip=dict(config=DeviceConfig(64, chunk=16, cache="io", skip=True), depth=2, kv_layers=1), alone=dict(config=DeviceConfig(64, cache="io"), target="iOS16"))

@pytest.fixture(scope="module")
def package(request, tmp_path_factory):
    "A package of one kind, runners of it, and decoders with its numbers."
    from mixbook.adapters import LoraConfig, adapter_parameters, add_adapters
    from mixbook.coreml import export_coreml
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    model, adapted = prepare_qat(loud(decoder(depth=kind.get("depth", 1), kv_layers=kind.get("kv_layers"))), QATConfig(bits=2)), None
    held = quantized_of(model).apply(Decoder(model.config), codes=True)
    if request.param == "adapters":
        given, adapted = (add_adapters(q.apply(Decoder(model.config), codes=True), LoraConfig(rank=4)) for q in (finalize_qat(model), quantized_of(model)))
        with torch.no_grad():
            for (n, p), o in zip(adapter_parameters(given).items(), adapter_parameters(adapted).values()): o.copy_(p.copy_((torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))/4).half().float()))
    path = export_coreml(model, folder/"my model.mlpackage", config=kind["config"], target=kind.get("target"), functions=kind.get("functions"), adapters=dict(polite=given) if adapted else None, progress=False).path
    save_tokenizer("bytes", path)
    return SimpleNamespace(kind=request.param, path=path, folder=folder, held=held, adapted=adapted, runner=PackageRunner(path), polite=PackageRunner(path, adapter="polite") if adapted else None)

each = pytest.mark.parametrize("package", KINDS, indirect=True)
PROMPTS = [[200], list(range(60, 76)), list(range(30, 61)), list(range(60))]

@coreml
@each
def test_a_package_writes_the_text_of_the_trained_model(package):
    seen = set()
    for prompt in PROMPTS:
        n = min(12, 64 - len(prompt) + 1); made = generate_tokens(package.runner, prompt, n=12); seen |= set(made.tokens)
        assert made.tokens == greedy(package.held, prompt, n) and made.reason == ("budget" if n == 12 else "context")
        if package.polite: assert generate_tokens(package.polite, prompt, n=12).tokens == greedy(package.adapted, prompt, n) != made.tokens
    assert len(seen) > 10, "texts that depend on nothing prove nothing"

@coreml
@pytest.mark.parametrize("package", ["padded"], indirect=True)
def test_rounding_to_fp16_changes_near_ties_at_most(package):
    rough, ids = PackageRunner(package.path, "float16"), np.random.default_rng(0).integers(0, 256, 24).tolist()
    a, b = (r.run("prefill", ids, 0, r.start()) for r in (rough, package.runner))
    assert 0 < np.abs(a - b).max() < .1*b.std() and (a.argmax(1) == b.argmax(1)).mean() > .9

class Interpreted:
    "Stands in for `coremltools.models.MLModel`."
    made = []
    def __init__(self, model, function_name=None):
        from mixbook.interpreter import Interpreter
        self.f = Interpreter(read_package(model), function_name); Interpreted.made.append(function_name)
    def make_state(self): return self.f.new_state()
    def predict(self, data, state=None):
        assert all(isinstance(v, np.ndarray) for v in data.values()) and data["tokens"].dtype == data["position"].dtype == np.int32
        return {k: v.numpy() for k, v in self.f.predict(data, state).items()}

def run_script(code, folder, monkeypatch):
    fake = types.ModuleType("coremltools.models"); fake.MLModel = Interpreted
    monkeypatch.setitem(sys.modules, "coremltools.models", fake)
    names, said = {}, io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said): exec(compile(code, "script", "exec"), names)
    return names, said.getvalue()

@coreml
def test_the_stand_in_has_the_signatures_of_coremltools():
    from mixbook.package import coremltools
    real = coremltools().models.MLModel
    for method in ("__init__", "predict", "make_state"):
        have, ours = (inspect.signature(getattr(c, method)).parameters for c in (real, Interpreted)); assert set(ours) <= set(have), method

@coreml
@each
def test_the_python_script_writes_the_text_of_the_package(package, monkeypatch):
    wanted = dict(padded=["prefill", "decode"], adapters=["decode"], io_skip=["prefill", "decode"], alone=[None])[package.kind]
    for prompt, n in (('She said "no\\n".\nÄ 🙂', 6), ("y"*60, 40)):
        ids = list(prompt.encode()); Interpreted.made.clear()
        names, said = run_script(python_generate(package.path, prompt=prompt, n=n), package.folder, monkeypatch)
        want = generate_tokens(package.runner, ids, n=n, stop=0).tokens
        assert tuple(names["ids"]) == (*ids, *want) and said == open_tokenizer("bytes").inner.decode([*ids, *want]) + "\n"
        assert len(want) == min(n, 65 - len(ids)) and Interpreted.made == wanted
    if package.polite:
        names, _ = run_script(python_generate(package.path, prompt="a", n=6, adapter="polite"), package.folder, monkeypatch)
        assert tuple(names["ids"][1:]) == generate_tokens(package.polite, [97], n=6).tokens and Interpreted.made[-1] == "decode_polite"

@coreml
@pytest.mark.parametrize("package", ["padded"], indirect=True)
def test_the_python_script_draws_and_refuses(package, monkeypatch):
    drawn = [run_script(python_generate(package.path, prompt="a", n=6, temperature=t), package.folder, monkeypatch)[0]["ids"] for t in (9., 9., 0.)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(AssertionError): run_script(python_generate(package.path, prompt="z"*65), package.folder, monkeypatch)

@coreml
@each
def test_the_swift_program_says_what_the_python_script_says(package):
    kind, text = package.kind, 'a "quoted" \\(1) ä\n\x01'
    swift, python = swift_generate(package.path, prompt=text, n=7), python_generate(package.path, prompt=text, n=7)
    assert all(swift.count(a) == swift.count(b) for a, b in ("{}", "()", "[]")) and "{{" not in swift
    numbers = re.search(r"context = (\d+), chunk = (\d+), end = (\d+)", swift).groups()
    assert numbers == re.search(r"context, chunk, end = (\d+), (\d+), (\d+)", python).groups() and '"my model.mlpackage"' in swift and '"my model.mlpackage"' in python
    assert r'"a \"quoted\" \\(1) ä\n\u{1}"' in swift
    assert ("makeState" in swift) == ("make_state" in python) == (kind in ("padded", "adapters")) and ("functionName = function" in swift) == (kind != "alone") and ("_out" in swift) == ("_out" in python) == (kind in ("io_skip", "alone"))
    assert ("one padded" in swift) == ("one padded" in python) == (kind == "padded") and ("iOS 16" in swift) == (kind == "alone")

@coreml
@pytest.mark.parametrize("package", ["padded"], indirect=True)
def test_a_damaged_package_writes_another_text_or_none(package, tmp_path):
    good = generate_tokens(package.runner, [200], n=30).tokens
    weight = next(w for w in read_package(package.path).weights() if "qkv" in w)
    for kind in ("table", "rows"):
        bad = seed_fault(package.path, kind, weight=weight, to=tmp_path/f"{kind}.mlpackage")
        assert generate_tokens(PackageRunner(bad), [200], n=30).tokens != good, kind
    with pytest.raises(DataError, match="no such folder"): PackageRunner(tmp_path/"none.mlpackage")
    with pytest.raises(DataError, match="expected a function 'decode_rude'"): PackageRunner(package.path, adapter="rude")
    with pytest.raises(DataError, match="save_tokenizer"): python_generate(bad)
