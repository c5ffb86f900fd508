"Corpora: every kind of input, no leak, no lost work, bounded memory, clear errors."
import bz2, gzip, itertools, json, lzma, os, random, shutil, signal, subprocess, sys, time, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, zstandard
from hypothesis import given, settings, strategies as st
import mixbook.corpus as mc, mixbook.dedup as md, mixbook.installed as mi
from mixbook.core import DataError, MixbookWarning
from mixbook.corpus import contamination, installed_corpus, open_corpus, read_corpus, toy_corpus
from mixbook.dedup import jaccard, near_duplicates, shingles, signature

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "st", "rm", "ck", "lt")]

def doc(rng, n=120): return " ".join(rng.choices(WORDS, k=n))
def edited(rng, text, n):
    "`text` with `n` words exchanged."
    w = text.split()
    for i in rng.sample(range(len(w)), n): w[i] = rng.choice(WORDS)
    return " ".join(w)

@pytest.fixture
def records():
    rng = random.Random(0)
    return [dict(domain=d, text=f"{d} {i}: {doc(rng, 60)} é ∞", key=f"{d}{i}") for d in ("näme/with <b>|*", "b", "c") for i in range(40)]

def quiet(*a, **k): return read_corpus(*a, progress=False, **k)

# ---------------------------------------------------------------- near duplicates

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(5, 150))
def test_signature_estimates_jaccard(seed, n, words):
    rng = random.Random(seed)
    a = doc(rng, words); b = edited(rng, a, min(n, words))
    j, est = jaccard(a, b), (signature(shingles(a)) == signature(shingles(b))).mean()
    assert abs(est - j) <= 5 * np.sqrt(max(j * (1 - j), .01) / min(128, len(shingles(a)))) + 1e-9

def test_signature_is_unbiased():
    rng, err = random.Random(1), []
    for _ in range(400):
        a = doc(rng, 100); b = edited(rng, a, rng.randrange(20))
        err.append((signature(shingles(a)) == signature(shingles(b))).mean() - jaccard(a, b))
    assert abs(np.mean(err)) < 4 * np.std(err) / 20

def test_agrees_with_datasketch():
    from datasketch import MinHash
    rng, ours, theirs = random.Random(2), [], []
    for n in (0, 2, 5, 10, 20, 40):
        a = doc(rng); b = edited(rng, a, n)
        m = [MinHash(num_perm=256) for _ in "ab"]
        for o, t in zip(m, (a, b)): o.update_batch([t[i:i+16].encode() for i in range(len(t) - 15)])
        ours.append(jaccard(a, b)); theirs.append(m[0].jaccard(m[1]))
    assert np.abs(np.array(ours) - theirs).max() < .12

def test_near_duplicates_against_brute_force():
    rng = random.Random(3)
    base = [doc(rng) for _ in range(60)]
    texts = base + [edited(rng, t, rng.choice([0, 1, 3, 6, 12])) for t in base for _ in range(2)]
    rng.shuffle(texts)
    found = near_duplicates(texts)
    kept = [i for i in range(len(texts)) if i not in set(found["position"])]
    sets = [shingles(t) for t in texts]
    assert max(jaccard(sets[i], sets[j]) for i, j in itertools.combinations(kept, 2)) < .7
    for i in found["position"]: assert max(jaccard(sets[i], s) for j, s in enumerate(sets) if j != i) >= .7
    assert (found["of"] < found["position"]).all()

def test_small_changes_of_form_do_not_hide_a_copy():
    t = "The quick brown fox jumps over the lazy dog, again and again."
    assert jaccard(t, t.upper().replace(" ", "\n  ")) == 1
    assert len(near_duplicates([t, "something else entirely, of no importance", "  " + t.upper()])) == 1
    assert len(near_duplicates(["", "a", "b"])) == 0 and len(near_duplicates([])) == 0

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=60), st.integers(1, 13))
def test_groups_do_not_depend_on_partitions(keys, rows):
    keys = np.array(keys, np.uint64)
    say = lambda r: sorted(tuple(map(int, g)) for g in md._groups(lambda lo, hi: keys[lo:hi], len(keys), r))
    assert say(rows) == say(10**6)

# ---------------------------------------------------------------- inputs

def test_every_kind_of_input_gives_the_same_corpus(tmp_path, records):
    import datasets
    plain = [dict(domain=r["domain"].replace("/", "-"), text=r["text"]) for r in records]
    lines = "".join(json.dumps(r) + "\n" for r in plain).encode()
    for i, r in enumerate(plain):
        f = tmp_path/"folder"/r["domain"]/"deep"/f"{i}.txt"
        f.parent.mkdir(parents=True, exist_ok=True); f.write_text(r["text"], encoding="utf-8")
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress), ("a.jsonl.bz2", bz2.compress), ("a.ndjson.xz", lzma.compress)): (tmp_path/name).write_bytes(pack(lines))
    pd.DataFrame(plain).to_parquet(tmp_path/"a.parquet", row_group_size=7)
    ds = datasets.Dataset.from_list(plain)
    by = {d: [r for r in plain if r["domain"] == d] for d in {r["domain"] for r in plain}}
    sources = dict(folder=tmp_path/"folder", frame=pd.DataFrame(plain), odd_index=pd.DataFrame(plain, index=range(5, 125)), list=plain, stream=iter(plain), dataset=ds, iterable=ds.to_iterable_dataset(),
                   splits=datasets.DatasetDict({k: datasets.Dataset.from_list(v).remove_columns("domain") for k, v in by.items()}), mapping={k: [dict(text=r["text"]) for r in v] for k, v in by.items()},
                   **{n: tmp_path/n for n in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.ndjson.xz", "a.parquet")})
    hashes = {k: quiet(s, tmp_path/"out"/k).hash for k, s in sources.items()}
    assert len(set(hashes.values())) == 1, hashes

def test_text_survives(tmp_path, records):
    for tokenizer in ("bytes", "bpe"):
        c = quiet(records, tmp_path/tokenizer, tokenizer=tokenizer, vocab_size=600, min_tokens=100)
        got = {d: sorted(t for s in ("train", "heldout") for t in c.texts(d, s)) for d in c.domains}
        assert got == {d: sorted(r["text"] for r in records if r["domain"] == d) for d in c.domains}
        assert all(c.tokens(d, s).dtype == (np.uint8 if tokenizer == "bytes" else np.uint16) for d in c.domains for s in ("train", "heldout"))
        assert all((c.tokens(d) == c.eot).sum() == c.table.loc[d, "docs"] for d in c.domains)
        assert abs(c.bytes_per_token("b", "train") - c.table.loc["b", "bytes"] / len(c.tokens("b"))) < 1e-12
        assert c.tokens("b").max() < c.vocab_size and abs(c.natural.sum() - 1) < 1e-12
        assert all(Path(c.path/e[s]["file"]).name.isascii() and "/" not in e[s]["file"] and "<" not in e[s]["file"] for e in c.manifest["domains"] for s in ("train", "heldout"))
        assert "<b>" not in c._repr_markdown_().replace("\\<b\\>", "")

def test_bpe_is_deterministic_and_can_be_used_again(tmp_path, records):
    a, b = (quiet(records, tmp_path/n, tokenizer="bpe", vocab_size=500, min_tokens=100) for n in "ab")
    assert a.hash == b.hash
    c = quiet(records, tmp_path/"c", tokenizer=a.tokenizer, min_tokens=100)
    assert all((c.tokens(d) == a.tokens(d)).all() for d in a.domains)
    text = "näme <|endoftext|> é"
    assert (mc.count_tokens([text], a.tokenizer) > 3).all() and mc.count_tokens("é").tolist() == [3]

def test_long_documents_are_cut_and_stay_on_one_side(tmp_path, monkeypatch):
    import mixbook.readers as mr
    monkeypatch.setattr(mr, "_PIECE", 4096); monkeypatch.setattr(mc, "_PIECE", 4096)
    rng = random.Random(0)
    for i in range(30):
        (tmp_path/"in/d").mkdir(parents=True, exist_ok=True)
        (tmp_path/"in/d"/f"{i}.txt").write_text("\n".join(f"∀{i} " + doc(rng, 30) for _ in range(60)), encoding="utf-8")
    c = quiet(tmp_path/"in", tmp_path/"out", heldout=.2)
    side = {s: {t.split()[0] for text in c.texts("d", s) for t in text.splitlines() if t.startswith("∀")} for s in ("train", "heldout")}
    assert not side["train"] & side["heldout"] and len(side["train"] | side["heldout"]) == 30 and side["heldout"]
    assert c.table.loc["d", "docs"] > 60
    whole = sorted("".join(sorted(c.texts("d", "train")) + sorted(c.texts("d", "heldout"))))
    assert whole == sorted("".join((tmp_path/"in/d"/f"{i}.txt").read_text(encoding="utf-8") for i in range(30)))

def test_small_files_are_read_together(tmp_path):
    import mixbook.readers as mr
    for i in range(200):
        f = tmp_path/"in"/"ab"[i % 2]/f"{i}.txt"; f.parent.mkdir(parents=True, exist_ok=True); f.write_text(doc(random.Random(i)))
    sources = list(mr._sources(tmp_path/"in", mr._Reading()))
    assert len(sources) == 4 and sum(1 for s in sources for _ in s.docs()) == 200
    stamp = sources[0].stamp
    (tmp_path/"in/a/0.txt").write_text("changed")
    assert next(iter(mr._sources(tmp_path/"in", mr._Reading()))).stamp != stamp

# ---------------------------------------------------------------- split and leaks

def leaks(c):
    "The highest exact Jaccard similarity of a held-out document with any training document, by brute force."
    train = [set(shingles(t).tolist()) for d in c.domains for t in c.texts(d)]
    held = [set(shingles(t).tolist()) for d in c.domains for t in c.texts(d, "heldout")]
    return max(len(h & t) / len(h | t) for h in held for t in train)

@pytest.mark.parametrize("near", [True, False])
def test_planted_near_duplicates_never_cross(tmp_path, near):
    rng = random.Random(5)
    base = [doc(rng) for _ in range(80)]
    rows = [dict(domain=rng.choice("ab"), text=t) for b in base for t in [b, b] + [edited(rng, b, n) for n in (1, 2, 4)]]
    rng.shuffle(rows)
    c = quiet(rows, tmp_path/"c", heldout=.25, near=near)
    assert leaks(c) < .7 and c.table["exact_dups"].sum() == 80
    assert (c.table["near_dups"].sum() > 200) == near
    report = contamination(c)
    assert report["near_dups"].sum() == 0 and report["docs"].sum() == c.table["heldout_docs"].sum()

def test_contamination_finds_what_is_planted():
    rng = random.Random(6)
    train = [doc(rng) for _ in range(50)]
    test = [doc(rng), edited(rng, train[3], 2), train[7], "intro " + train[9] + " " + doc(rng, 500)]
    r = contamination(train, test).loc["test"]
    assert (r["docs"], r["near_dups"], r["nearest"]) == (4, 2, 1)
    assert .2 < r["copied"] < .5 and contamination(train, [doc(rng)]).loc["test", "copied"] == 0

def test_split_is_by_content_and_order_of_inputs_does_not_matter(tmp_path, records):
    a = quiet(records, tmp_path/"a"); b = quiet(records[::-1], tmp_path/"b"); s = quiet(records, tmp_path/"s", seed=1)
    assert a.hash == b.hash != s.hash
    held = lambda c: sorted(t for d in c.domains for t in c.texts(d, "heldout"))
    assert held(a) == held(s) and (a.table["heldout_bytes"] / (a.table["bytes"] + a.table["heldout_bytes"])).min() >= .05
    more = quiet(records + [dict(domain="b", text="one more document of some length")], tmp_path/"m")
    assert len(set(held(a)) ^ set(held(more))) <= 2

def test_installed_corpus_small(tmp_path):
    c = installed_corpus(tmp_path/"a", max_bytes=150_000, progress=False)
    assert len(c.domains) >= 6 and leaks(c) < .7 and contamination(c)["near_dups"].sum() == 0
    texts = [t for d in c.domains for s in ("train", "heldout") for t in c.texts(d, s)]
    assert len(texts) == len(set(texts))
    assert installed_corpus(tmp_path/"b", max_bytes=150_000, progress=False).hash == c.check().hash

def test_installed_corpus_full(tmp_path):
    c = installed_corpus(tmp_path/"a", progress=False)
    assert len(c.domains) >= 6 and (c.table["bytes"] + c.table["heldout_bytes"]).sum() >= 20_000_000
    assert contamination(c, sample=50)["near_dups"].sum() == 0

def test_installed_corpus_lean(tmp_path, monkeypatch):
    root = tmp_path/"site"
    rng = random.Random(0)
    for i in range(60):
        (root/"pkg").mkdir(parents=True, exist_ok=True)
        (root/"pkg"/f"m{i}.py").write_text(f'"""{doc(rng, 60)}"""\nimport os\n\ndef f{i}(x):\n    # ' + doc(rng, 20) + f"\n    return {doc(rng, 80).split()}\n")
    (root/"pkg"/"README.md").write_text(doc(rng, 50))
    monkeypatch.setattr(mi, "_roots", lambda: {"site": root})
    with pytest.warns(MixbookWarning, match="readmes"): c = installed_corpus(tmp_path/"out", max_bytes=50_000, progress=False)
    assert set(c.domains) == {"code", "docstrings", "comments", "names"}

def test_python_parts_share_nothing():
    code, docs, notes = mi.split_python('"""Module\ndocs of some length, longer than sixty characters, to be kept at all."""\n# Copyright nobody\nimport os\nx = """\nnot a docstring\n"""\n\ndef f():\n    "Short."\n    # a note that is long enough to be kept as a comment, with its\n    # second line\n    return "# no note" # trailing\n')
    assert "not a docstring" in code and '"# no note" # trailing' in code and "Short" not in code and "note that" not in code
    assert docs.startswith("Module\ndocs") and notes.endswith("with its\nsecond line") and "Copyright" not in code + docs + notes

# ---------------------------------------------------------------- bad input

def bad(tmp_path, files):
    for name, data in files.items():
        f = tmp_path/"in"/name; f.parent.mkdir(parents=True, exist_ok=True); f.write_bytes(data)
    return tmp_path/"in"

GOOD = {f"d/{i}.txt": doc(random.Random(i)).encode() for i in range(12)}

@pytest.mark.parametrize("name, data, message, counted", [
    ("d/latin.txt", "caf\xe9 ".encode("latin-1") * 50, "latin.txt, found byte 0xe9 at 3", "other encodings"),
    ("d/pic.txt", b"\x89PNG\0\0", "zero byte at 4", "binary"),
    ("d/late.txt", b"x" * 2_000_000 + b"\xff", "byte 0xff at 2000000", "other encodings"),
    ("d/x.jsonl", b'{"text": "fine", "domain": "d"}\n{"text": ', "line 2 is not JSON", "bad JSON"),
    ("d/x.jsonl", b'[1]\n', "a JSON object on line 1", "bad JSON"),
    ("d/x.jsonl", b'{"text": 5}\n', "found int", "not text"),
    ("d/x.jsonl", b'{"text": "a \\ud800 b"}\n', "half a surrogate", "other encodings"),
    ("d/x.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 1000, mtime=0)[:-20], "could not read", "unreadable"),
    ("d/x.jsonl.zst", b"not zstd", "could not read", "unreadable"),
    ("d/x.parquet", b"PAR1 no", "expected a Parquet file", "unreadable")],
    ids=["latin", "picture", "late", "half a line", "a list", "a number", "a surrogate", "cut gzip", "not zstd", "not parquet"])
def test_bad_files_are_named_or_counted(tmp_path, name, data, message, counted):
    source = bad(tmp_path, {**GOOD, name: data})
    with pytest.raises(DataError, match=message): quiet(source, tmp_path/"a")
    with pytest.warns(MixbookWarning, match=counted): c = quiet(source, tmp_path/"b", errors="skip")
    assert sum(c.table["docs"] + c.table["heldout_docs"]) >= 12

def test_replace_keeps_the_rest_of_a_file(tmp_path):
    source = bad(tmp_path, {**GOOD, "d/latin.txt": b"caf\xe9 au lait" * 20})
    with pytest.warns(MixbookWarning, match="replaced"): c = quiet(source, tmp_path/"b", errors="replace")
    assert any("caf\ufffd au lait" in t for s in ("train", "heldout") for t in c.texts("d", s))

def test_nothing_to_read(tmp_path, records):
    (tmp_path/"in").mkdir()
    for source, message in ((tmp_path/"in", "an empty folder"), (tmp_path/"none", "found nothing"), ([], "found none"), (5, "found int"), ([5], "found int"), ([dict(text=" ", domain="d")], "1 empty documents"), ([dict(text="a b")], "expected a domain for record 0")):
        with pytest.raises(DataError, match=message): quiet(source, tmp_path/"out")
    for kw, message in ((dict(text="txt"), "did you mean 'text'"), (dict(domain="domian"), "did you mean 'domain'"), (dict(id="kee"), "did you mean 'key'"), (dict(errors="ignore"), "errors policy"), (dict(heldout=1.5), "between 0 and 1"), (dict(tokenizer="none.json"), "could not read it")):
        for source in (records, pd.DataFrame(records)):
            with pytest.raises(DataError, match=message): quiet(source, tmp_path/"out", **kw)

def test_unreadable_file(tmp_path, monkeypatch):
    import mixbook.readers as mr
    real = mr._open
    def refuse(path):
        if path.name == "3.txt": raise PermissionError(13, "Permission denied")
        return real(path)
    monkeypatch.setattr(mr, "_open", refuse)
    with pytest.raises(DataError, match="3.txt: Permission denied"): quiet(bad(tmp_path, GOOD), tmp_path/"a")
    with pytest.warns(MixbookWarning, match="1 unreadable"): quiet(tmp_path/"in", tmp_path/"b", errors="skip")

def test_ids_small_domains_and_lonely_documents(tmp_path, records):
    with pytest.raises(DataError, match="the same id in document 0 of .* and document 120"): quiet(records + [dict(records[0], text="another text of its own")], tmp_path/"a", id="key")
    with pytest.warns(MixbookWarning, match="1 documents with a repeated id"): c = quiet(records + [dict(records[0], text="another text of its own")], tmp_path/"b", id="key", errors="skip")
    assert c.hash == quiet(records, tmp_path/"c", id="key").hash
    tiny = records + [dict(domain="tiny", text=f"few words {i}") for i in range(3)]
    with pytest.raises(DataError, match="at least 1024 training tokens in every domain, found .* 'tiny'"): quiet(tiny, tmp_path/"d")
    with pytest.warns(MixbookWarning, match="tiny"): assert quiet(tiny, tmp_path/"e", errors="skip").domains == c.domains
    with pytest.raises(DataError, match="two different documents in domain 'one'"): quiet(records + [dict(domain="one", text="x y z")] * 3, tmp_path/"f")
    assert "one" in quiet(records + [dict(domain="one", text="x y z")] * 3, tmp_path/"g", heldout=0, min_tokens=1).domains

def test_damaged_shards_are_found(tmp_path, records):
    c = quiet(records, tmp_path/"c")
    file = c.path/c.manifest["domains"][0]["train"]["file"]
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(DataError, match="expected .* bytes in shard"): open_corpus(c.path)
    file.write_bytes(data[:-1] + b"x")
    with pytest.raises(DataError, match="content has changed"): open_corpus(c.path).check()
    file.unlink()
    with pytest.raises(DataError, match="no file"): open_corpus(c.path)
    with pytest.raises(DataError, match="did you mean 'b'|unknown domain"): c.tokens("bb")
    with pytest.raises(DataError, match="unknown split"): c.tokens("b", "test")

def test_another_corpus_is_never_overwritten(tmp_path, records):
    f = pd.DataFrame(records)
    c = quiet(f, tmp_path/"c")
    assert quiet(f, tmp_path/"c").hash == c.hash
    with pytest.raises(DataError, match="another one"): quiet(f, tmp_path/"c", seed=3)
    with pytest.raises(DataError, match="another one"): quiet(f.assign(text=f["text"].where(f.index != 77, "changed")), tmp_path/"c")
    with pytest.raises(DataError, match="a stream cannot be compared"): quiet(iter(records), tmp_path/"c")

def test_full_disk_keeps_what_is_done_and_resumes(tmp_path, monkeypatch):
    import mixbook.readers as mr
    monkeypatch.setattr(mr, "_FILES", 1)
    files = bad(tmp_path, {f"d{i % 2}/{i}.txt": doc(random.Random(i), 400).encode() for i in range(30)})
    want = quiet(files, tmp_path/"want").hash
    def fill(m, name, after):
        real, calls = getattr(mc, name), []
        def broken(*a, **k):
            calls.append(name)
            if len(calls) == after: raise OSError(28, "No space left on device")
            return real(*a, **k)
        m.setattr(mc, name, broken)
    for name, after in (("_ingest", 12), ("_write_bands", 1), ("_write_shard", 2)):
        with monkeypatch.context() as m:
            fill(m, name, after)
            with pytest.raises(DataError, match="No space left on device.*Free some space"): quiet(files, tmp_path/"out")
        with pytest.raises(DataError, match="unfinished build"): open_corpus(tmp_path/"out")
    seen = []
    ingest = mc._ingest
    with monkeypatch.context() as m:
        m.setattr(mc, "_ingest", lambda s, *a: (seen.append(s.name), ingest(s, *a))[1])
        assert quiet(files, tmp_path/"out").hash == want
    assert not seen, "inputs were read again"

def test_interrupt_is_resumable(tmp_path):
    def stream(stop):
        rng = random.Random(4)
        for i in range(12_000):
            if i == stop: raise KeyboardInterrupt
            yield dict(domain="ab"[i % 2], text=f"{i} {doc(rng, 12)}")
    with pytest.raises(KeyboardInterrupt) as e: quiet(stream(11_000), tmp_path/"a")
    assert "goes on from there" in e.value.__notes__[0]
    done = sorted(f.name for f in (tmp_path/"a/.work").glob("0*.json"))
    assert len(done) == 2
    assert quiet(stream(None), tmp_path/"a").hash == quiet(stream(None), tmp_path/"b").hash

# ---------------------------------------------------------------- kills and memory

def run(*args): return subprocess.Popen([sys.executable, "-c", *map(str, args)], stdout=subprocess.PIPE, text=True)

@pytest.mark.parametrize("tokenizer, kills", [("bytes", 20), ("bpe", 10)])
def test_kill_9_at_random_moments(tmp_path, tokenizer, kills):
    "A fork server that has imported mixbook makes an attempt cost nothing but the build."
    import multiprocessing
    ctx = multiprocessing.get_context("forkserver"); ctx.set_forkserver_preload(["mixbook.corpus", "tokenizers"])
    rng = random.Random(7)
    for i in range(640): # ten sources
        f = tmp_path/"in"/f"d{i % 3}"/f"{i}.jsonl"; f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text("".join(json.dumps(dict(text=doc(rng))) + "\n" for _ in range(4)))
    def attempt(out, after=None):
        p = ctx.Process(target=read_corpus, args=(tmp_path/"in", tmp_path/out), kwargs=dict(tokenizer=tokenizer, vocab_size=500, progress=False))
        t = time.monotonic(); p.start(); p.join(after)
        if p.is_alive(): p.kill(); p.join()
        return p.exitcode, time.monotonic() - t
    attempt("warm")
    code, whole = attempt("want")
    assert code == 0
    codes, finished = [], 0
    for i in range(kills):
        codes.append(attempt("out", whole * rng.random() * (.5 if i % 2 else .9))[0])
        if (tmp_path/"out/manifest.json").exists(): # it was faster than the kill: check, and start anew
            assert open_corpus(tmp_path/"out").hash == open_corpus(tmp_path/"want").hash
            shutil.rmtree(tmp_path/"out"); finished = 0
            continue
        done = sum(1 for _ in (tmp_path/"out/.work").glob("0*.json")) if (tmp_path/"out/.work").exists() else 0
        assert done >= finished
        finished = done
    assert codes.count(-signal.SIGKILL) >= kills // 2 and attempt("out")[0] == 0
    assert open_corpus(tmp_path/"out").check().hash == open_corpus(tmp_path/"want").hash

STREAM = """
import random, resource, sys
from mixbook.corpus import read_corpus
def texts(n):
    rng = random.Random(0)
    while n > 0:
        t = rng.randbytes(1500).hex(); n -= len(t)
        yield dict(text=t, domain=rng.choice('abc'))
c = read_corpus(texts(int(sys.argv[1])), sys.argv[2], progress=False)
print(c.table['bytes'].sum(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 if sys.platform != 'darwin' else 1024))
"""

def test_memory_does_not_grow_with_the_corpus(tmp_path):
    out = [tuple(map(int, run(STREAM, n * 1_000_000, tmp_path/str(n)).communicate()[0].split())) for n in (40, 240)]
    (small, rss), (large, more) = out
    assert large > 5.5 * small and more < 1_000_000, out
    assert more - rss < 40_000, out # KB, for 190 MB more text

def test_toy_corpus(tmp_path):
    t = time.perf_counter(); a = toy_corpus(tmp_path/"a"); t = time.perf_counter() - t
    assert a.hash == toy_corpus(tmp_path/"b").hash != toy_corpus(tmp_path/"c", seed=1).hash
    assert a.domains == ["code", "prose", "tables"] and 200_000 < a.table["bytes"].sum() + a.table["heldout_bytes"].sum() < 400_000
    assert t < 5 # a second on an idle machine
