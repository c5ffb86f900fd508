"Interop: joins, repairs and refusals on made-up tables; published rows through a stand-in for the authors' server."
import hashlib
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from mixbook import interop
from mixbook.core import DataError, MixbookWarning, read_runs, weight_cols, weights_of, write_runs
from mixbook.interop import from_olmix, from_regmix, from_table, from_wide, published, regmix_natural


def wide(n=4, k=3, seed=0):
    rng = np.random.default_rng(seed)
    names, domains = [f"r{i}" for i in range(n)], [f"d{j}" for j in range(k)]
    return (pd.DataFrame(rng.dirichlet(np.ones(k), n), names, domains), pd.DataFrame(rng.uniform(1, 3, (n, k)), names, domains))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6), st.floats(-9e-3, 9e-3))
def test_join_is_by_label_and_closes(n, k, seed, off):
    w, y = wide(n, k, seed)
    order = np.random.default_rng(seed).permutation(n)
    runs = from_wide(w*(1 + off), y.iloc[order])
    assert list(runs["run"]) == list(w.index)
    np.testing.assert_allclose(weights_of(runs), w, atol=1e-12)
    np.testing.assert_allclose(weights_of(runs).sum(axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(runs[[f"loss/{c}" for c in y]], y)
    assert runs.attrs["rescaled"] == (n if abs(off) > 1e-6 else 0)


def test_prefixes_are_kept_and_the_table_survives_storage(tmp_path):
    w, y = wide()
    y = y.rename(columns={"d0": "bpb/d0", "d1": "loss/d1"}).assign(d2_se=.1)
    runs = from_wide(w.add_prefix("w/"), y, kind="score", n_params=5)
    assert weight_cols(runs) == ["w/d0", "w/d1", "w/d2"] and {"bpb/d0", "loss/d1", "score/d2", "score/d2_se"} <= set(runs)
    write_runs(runs, tmp_path)
    pd.testing.assert_frame_equal(read_runs(tmp_path)[weight_cols(runs)], runs[weight_cols(runs)])


def test_rows_of_one_table_only_are_left_out_with_a_warning():
    w, y = wide()
    with pytest.warns(MixbookWarning, match="2 rows stand in only one"): runs = from_wide(w.iloc[:3], y.iloc[1:])
    assert list(runs["run"]) == ["r1", "r2"]


@pytest.mark.parametrize("spoil, message", [
    (lambda w: w.assign(d0=np.nan), "sum to one"), (lambda w: w*1.02, "sum to one"), (lambda w: w*0, "sum to one"),
    (lambda w: w.assign(d0=-1., d1=2. - w["d2"]), "not negative"), (lambda w: w.assign(d0="many"), "numbers"), (lambda w: [1, 2], "expected a pandas DataFrame")])
def test_bad_weights_are_refused(spoil, message):
    w, y = wide()
    with pytest.raises(DataError, match=message): from_wide(spoil(w), y)


def test_files_in_and_their_errors(tmp_path):
    w, y = wide()
    w.to_csv(tmp_path/"w.csv"); y.to_parquet(tmp_path/"y.parquet")
    both = w.add_prefix("mix_").join(y.add_prefix("loss_")).rename_axis("name").reset_index()
    both.to_csv(tmp_path/"all.csv", index=False)
    runs = from_table(tmp_path/"all.csv", run="name", weights="mix_*", losses="loss_*")
    pd.testing.assert_frame_equal(runs, from_wide(tmp_path/"w.csv", y), rtol=1e-12)
    (tmp_path/"empty.csv").write_text(""); (tmp_path/"head.csv").write_text("run,a\n"); (tmp_path/"latin.csv").write_bytes("run,é\n1,2\n".encode("latin-1"))
    for f, message in (("none.csv", "could not read"), ("empty.csv", "could not read"), ("head.csv", "only a header"), ("latin.csv", "UTF-8")):
        with pytest.raises(DataError, match=message): from_olmix(tmp_path/f, tmp_path/"w.csv")


def test_olmix_files_with_their_unnamed_column(tmp_path):
    (tmp_path/"ratios.csv").write_text(",run,name,index,games,health\n0,19g3guks,swarm-0000,0,0.7000000000000001,0.3\n1,d4nbvsr7,swarm-0001,1,0.4,0.6\n")
    (tmp_path/"metrics.csv").write_text(",run,name,index,arc:rc::olmes\n1,d4nbvsr7,swarm-0001,1,1.42\n0,19g3guks,swarm-0000,0,1.61\n")
    runs = from_olmix(tmp_path/"ratios.csv", tmp_path/"metrics.csv").set_index("run")
    assert runs.loc["19g3guks", "bpb/arc:rc::olmes"] == 1.61 and runs.attrs["rescaled"] == 0


def upstream(folder):
    "RegMix's files as their authors lay them out, rebuilt from rows that convert to known small tables."
    small = {"train_mixture_1m.csv": "index,train_the_pile_a,train_the_pile_b\n1,0.25,0.75\n2,0.5,0.501\n",
             "train_pile_loss_1m.csv": "index,metric/the_pile_a_val_loss\n1,2.9710326194763184\n2,3.04\n"}
    small |= {"test_mixture_60m.csv": small["train_mixture_1m.csv"], "test_mixture_1B.csv": small["train_mixture_1m.csv"],
              "test_pile_loss_1m.csv": small["train_pile_loss_1m.csv"],
              "test_pile_loss_60m.csv": "index,metric/the_pile_a_val_loss\n" + "".join(f"{i},{i/7!r}\n" for i in range(1, 257))}
    for name, text in small.items(): (folder/name).write_text(text)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    "A download folder, an empty cache, no data folder above; checksums of the stand-in's converted files."
    up, work = tmp_path/"upstream", tmp_path/"work"
    up.mkdir(); work.mkdir()
    upstream(up)
    files = {ours: (theirs, rows, hashlib.sha256(interop._convert_regmix((up/theirs).read_bytes(), rows)).hexdigest()) for ours, (theirs, rows, _) in interop.REGMIX_FILES.items()}
    monkeypatch.setattr(interop, "REGMIX_FILES", files)
    monkeypatch.setenv("MIXBOOK_CACHE", str(tmp_path/"cache"))
    monkeypatch.delenv("MIXBOOK_DATA", raising=False)
    monkeypatch.chdir(work)
    return up


def test_download_converts_verifies_and_is_used_again(stand_in, tmp_path):
    folder = published("regmix", url=stand_in.as_uri())
    assert (folder/"train_loss_1m.csv").read_text() == "index,a\n1,2.971033\n2,3.040000\n"
    assert len((folder/"dev_loss_60m.csv").read_text().splitlines()) == 129
    assert published("regmix", url="file:///nowhere") == folder
    runs = from_regmix("train", folder)
    assert list(runs["run"]) == ["train-001", "train-002"] and runs.attrs["rescaled"] == 1


def test_wrong_checksum_keeps_nothing(stand_in, tmp_path):
    f = stand_in/"test_mixture_1B.csv"
    f.write_text(f.read_text().replace("0.25", "0.26"))
    with pytest.raises(DataError, match="wrong checksum for test_mixture_1B.csv"): published("regmix", url=stand_in.as_uri())
    assert not list(tmp_path.glob("cache/**/*.csv"))


def test_no_network_says_what_to_do(stand_in, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="MIXBOOK_DATA"): published("regmix", url=(tmp_path/"nowhere").as_uri())
    monkeypatch.setenv("MIXBOOK_DATA", str(tmp_path/"data"))
    (tmp_path/"data"/"mine").mkdir(parents=True)
    assert published("mine") == tmp_path/"data"/"mine"
    (tmp_path/"work"/"shared"/"data"/"near").mkdir(parents=True)
    assert published("near").name == "near"


def test_conversion_gives_the_rows_at_hand_byte_for_byte():
    "The authors' mixtures differ from ours in the header only, so their file can be rebuilt: 46,412 bytes, as stored upstream."
    try: ours = (published("regmix")/"train_mixture_1m.csv").read_bytes()
    except DataError: pytest.skip("no RegMix rows on this machine and no network")
    head, _, body = ours.partition(b"\n")
    theirs = b",".join(c if c == b"index" else b"train_the_pile_" + c for c in head.split(b",")) + b"\n" + body
    assert len(theirs) == 46_412 and interop._convert_regmix(theirs, None) == ours
    assert hashlib.sha256(ours).hexdigest() == interop.REGMIX_FILES["train_mixture_1m.csv"][2]


def test_natural_is_the_published_prior():
    try: folder = published("regmix")
    except DataError: pytest.skip("no RegMix rows on this machine and no network")
    prior = pd.read_csv(folder/"prior.csv", index_col=0)["weight"]
    pd.testing.assert_series_equal(regmix_natural(), prior/prior.sum(), check_names=False)
