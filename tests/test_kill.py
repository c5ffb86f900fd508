"kill -9 at random moments of a sweep: no finished run is lost or trained again, and the table ends the same."
import json, subprocess, sys, textwrap
import pytest

# One fresh process imports torch once; every life of the sweep is a fork of it, so that twenty kills cost seconds.
SCRIPT = textwrap.dedent("""
    import json, os, pathlib, random, signal, sys, time
    import pandas as pd, torch
    from mixbook.core import read_runs
    from mixbook.corpus import toy_corpus
    from mixbook.proxy import ProxyConfig
    from mixbook.sweep import run_sweep, sample_mixtures
    torch.set_num_threads(1)
    folder, rng = pathlib.Path(sys.argv[1]), random.Random(0)
    corpus = toy_corpus(folder/"corpus", size=30_000)
    config = ProxyConfig(depth=1, tokens=8_192, batch=4, seq_len=32, eval_windows=4)
    mixtures = sample_mixtures(corpus, 20)

    def life(path, seeds):
        "Start the sweep in a child."
        pid = os.fork()
        if pid: return pid
        code = 1
        try: run_sweep(corpus, mixtures, config, path=path, seeds=seeds, progress=False); code = 0
        finally: os._exit(code)

    files = lambda path: {f.name: f.stat().st_mtime_ns for f in path.glob("*.parquet")}
    start = time.perf_counter()
    whole = os.waitpid(life(folder/"whole", [0]), 0)[1]
    per_run = (time.perf_counter() - start)/len(mixtures)
    kills, lives, seeds, scale, report = 0, 0, [0], 1.6*per_run, {"whole": whole, "lost": 0, "rewritten": 0, "gained": []}
    while True:
        path, before = folder/"killed", files(folder/"killed")
        pid, lives = life(path, seeds), lives + 1
        if kills < 24 and lives < 60:
            time.sleep(rng.uniform(0, scale))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        after = files(path)
        kills += os.WIFSIGNALED(status)
        report["lost"] += len(before.keys() - after.keys())
        report["rewritten"] += sum(before[f] != after[f] for f in before.keys() & after.keys())
        report["gained"].append(len(after) - len(before))
        scale *= .8 if report["gained"][-1] > 1 else 1.5 if not any(report["gained"][-2:]) else 1    # however busy the machine, about one run a life
        if not os.WIFSIGNALED(status):
            if kills >= 20 or lives >= 60: break
            seeds = [*seeds, len(seeds)]          # done too soon: more runs
    os.waitpid(life(folder/"whole", seeds), 0)
    a, b = (read_runs(folder/p).sort_values("run", ignore_index=True).drop(columns=["seconds", "created"]) for p in ("whole", "killed"))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    print(json.dumps(report | {"kills": kills, "runs": len(b), "files": len(files(folder/"killed")), "wanted": len(mixtures)*len(seeds), "last": status}))
""")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_twenty_kills_lose_nothing(tmp_path):
    out = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=280, env={**__import__("os").environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-2000:]
    report = json.loads(out.stdout.splitlines()[-1])
    assert report["kills"] >= 20, report
    assert report["lost"] == report["rewritten"] == 0 == report["whole"] == report["last"], report
    assert report["runs"] == report["files"] == report["wanted"], report          # one file a run: none was trained twice once finished
    assert sum(g > 0 for g in report["gained"][:-1]) >= 3, report    # the kills fell among finished runs, not all before the first
