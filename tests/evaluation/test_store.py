"""The folder of an evaluation's results: kept to one run, and whole after any end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from xkv import InputError
from xkv.evaluation.store import RESULTS, Key, Store


def test_killed_process_resumes(tmp_path):
    command = [sys.executable, "-m", "xkv.evaluate", "--tasks", "needle", "--lengths", "300"]
    command += ["--methods", "rotating", "--ratios", "2", "--samples", "30", "--out", str(tmp_path)]
    results = tmp_path / RESULTS
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not results.exists() or results.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # as a kill in the middle of a write would leave it
    whole = results.read_text()
    results.write_text(whole + whole[:50])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = results.read_text()
    assert after.startswith(whole)
    keys = [tuple(json.loads(line)[name] for name in Key._fields) for line in after.splitlines()]
    assert len(keys) == len(set(keys)) == 20
    assert "30 questions a cell" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.jsonl",
        "run.json",
        "summary.csv",
        "summary.md",
        "summary.png",
        "tasks.json",
    }


def test_a_folder_keeps_to_one_run(tmp_path):
    Store(str(tmp_path), {"model": "a"}).close()
    with pytest.raises(InputError, match=r"results of another run: model a \(now b\)"):
        Store(str(tmp_path), {"model": "b"})


def test_full_disk_is_one_sentence_and_keeps_what_was_done(tmp_path):
    with Store(str(tmp_path), {}) as store:
        store.add(Key("needle", 1, 1, "full", None), {"answers": []})
        store._file.close()
        store._file = open("/dev/full", "w")  # noqa: SIM115
        with pytest.raises(InputError, match="No space left on device; what was done"):
            store.add(Key("needle", 1, 2, "full", None), {"answers": []})
        store._file = open(os.devnull, "w")  # noqa: SIM115
    with Store(str(tmp_path), {}) as store:
        assert store.is_done(Key("needle", 1, 1, "full", None), 0)
        assert not store.is_done(Key("needle", 1, 2, "full", None), 0)
