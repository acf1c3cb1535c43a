"""What every other module stands on.

1. A content hash tells apart whatever differs, and nothing else.
2. A file appears whole or not at all; what a killed process left is removed by the next, and only that.
3. A file that cannot be written is named, with what it was, what is missing and what to do.
4. One process at a time in a folder; a dead one holds nothing."""
import errno
import json
import os
import re
import resource
import signal
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file

from biojepa.core import (
    HOST, atomic_path, content_hash, free_memory, free_space, in_words, object_hash, sweep, writing
)
from biojepa.locks import InUseError, only_one

NOBODY = 2**22 + 1  # no process has so high a number


# 1

class Pair(NamedTuple):
    x:object
    y:object = None


@dataclass
class Record:
    x:object
    y:object = None


def different():
    a = np.arange(6, dtype=np.float32)
    values = [a, a.reshape(2, 3), a.reshape(3, 2), a.astype(np.float64), a.astype(np.int32), a[:5], a + 1e-7*(a == 3),
              a[::-1], a.tolist(), "abc", b"abc", ["abc"], ["a", "bc"], ["ab", "c"], None, [], {}, [None], 1, 1., "1",
              True, dict(a=1), dict(a="1"), dict(b=1), [dict(a=1)], torch.arange(6), torch.arange(6).bool(),
              torch.arange(6.).bfloat16(), sp.csr_matrix(a.reshape(2, 3)), sp.csr_matrix(a.reshape(3, 2)),
              Pair(1, 2), Pair(2, 1), Record(1, Pair(a)), Record(1, Pair(a + 1)), np.array(["a", "b"], object),
              np.array(["a", "c"], object), np.zeros(0), np.zeros((0, 3))]
    return values


def test_whatever_differs_has_another_hash():
    hashes = [content_hash(v) for v in different()]
    assert len(set(hashes)) == len(hashes), [i for i, h in enumerate(hashes) if h in hashes[:i]]
    assert hashes == [content_hash(v) for v in different()]


def test_how_something_is_held_does_not_count():
    a = np.arange(6.).reshape(2, 3)
    assert content_hash(a) == content_hash(torch.from_numpy(a)) == content_hash(np.asfortranarray(a))
    assert content_hash(a[:, ::2]) == content_hash(a[:, ::2].copy())
    assert content_hash(torch.from_numpy(a).T) == content_hash(a.T.copy())
    assert content_hash(dict(a=1, b=2)) == content_hash(dict(b=2, a=1)) and content_hash((1, 2)) == content_hash([1, 2])


@given(arrays(np.float32, st.integers(1, 30)), st.integers(0, 2**31))
def test_one_flipped_bit_is_another_hash(x, at):
    other = x.copy()
    other.view(np.uint32)[at % len(x)] ^= np.uint32(1 << at % 32)
    assert content_hash(x) != content_hash(other)


# 2

def left(folder, name, age=0.):
    path = folder/name
    path.write_text("half")
    os.utime(path, (time.time() - age,)*2)
    return path


def test_only_what_nobody_writes_any_more_is_removed(tmp_path):
    day, mine, parent = 25*3600, os.getpid(), os.getppid()
    gone = [left(tmp_path, f".table.{NOBODY}@{HOST}.tmp.csv"), left(tmp_path, f".table.{NOBODY}.tmp.csv"),
            left(tmp_path, f".v1.0.{NOBODY}@{HOST}.tmp"), left(tmp_path, f".a.{NOBODY}@elsewhere.tmp.csv", day),
            left(tmp_path, f".b.{parent}@{HOST}.tmp.csv", day), left(tmp_path, f".c.{mine}@{HOST}.tmp.csv", 20*3600)]
    kept = [left(tmp_path, f".table.{parent}@{HOST}.tmp.csv"), left(tmp_path, f".d.{NOBODY}@elsewhere.tmp.csv"),
            left(tmp_path, f".e.{mine}@{HOST}.tmp.csv"), left(tmp_path, "table.csv", day),
            left(tmp_path, f"table.{NOBODY}.tmp.csv", day), left(tmp_path, ".hidden.csv", day),
            left(tmp_path, ".notes.tmp.csv", day)]
    with atomic_path(tmp_path/"new.txt") as part: part.write_text("new")
    assert not [p for p in gone if p.exists()] and all(p.exists() for p in kept)


def test_folders_within_are_swept_if_asked(tmp_path):
    (tmp_path/"a"/"b").mkdir(parents=True)
    deep = left(tmp_path/"a"/"b", f".x.{NOBODY}@{HOST}.tmp.npy")
    assert sweep(tmp_path) == [] and sweep(tmp_path, deep=True) == [deep] and not deep.exists()


def in_child(work):
    "A copy of this process that works, says when it has begun, and stays until it is killed; its id."
    ready, said = os.pipe()
    if pid := os.fork():
        os.close(said)
        with open(ready) as f: assert f.readline() == "now\n"
        return pid
    try: work(lambda: os.write(said, b"now\n"))
    finally: os._exit(0)


def ended(pid, sign=signal.SIGKILL):
    os.kill(pid, sign)
    return os.waitpid(pid, 0)[1]


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_for_long(tmp_path):
    def work(begun):
        with atomic_path(tmp_path/"a.csv") as part: part.write_text("half"); begun(); time.sleep(60)
    pid = in_child(work)
    with atomic_path(tmp_path/"b.csv") as part: part.write_text("b")
    assert len([*tmp_path.iterdir()]) == 2, "it is still being written"
    ended(pid)
    assert [p.suffix for p in tmp_path.iterdir() if p.name[0] == "."] == [".csv"]
    with atomic_path(tmp_path/"a.csv") as part: part.write_text("a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "b.csv"]


# 3

def no_room(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_with_path_content_and_room(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_room)
    (tmp_path/"old.csv").write_text("old")
    with pytest.raises(OSError) as error, atomic_path(tmp_path/"old.csv", "the log") as part: part.write_text("new")
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path/"old.csv")
    assert re.fullmatch(r"cannot write the log \(No space left on device\): [\d.e+]+ [kMGT]B are free; make room, or "
                        "choose another folder", error.value.strerror)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_what_is_missing_is_known_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("biojepa.core.free_space", lambda folder: 1_200_000)
    with pytest.raises(OSError, match="1.2 MB are free, 5.1 MB are needed, 3.9 MB are missing; make room"), \
            atomic_path(tmp_path/"w.safetensors", "weights", 5_100_000): raise AssertionError("written")
    with atomic_path(tmp_path/"w.safetensors", "weights", 1_100_000) as part: part.write_text("w")


LIBRARIES = dict(
    safetensors=lambda part: save_file({"x": np.zeros(10**5)}, part),
    h5ad=lambda part: AnnData(np.zeros((300, 300), np.float32)).write_h5ad(part),
    csv=lambda part: pd.DataFrame(np.zeros((10**4, 3))).to_csv(part),
    parquet=lambda part: pd.DataFrame(np.random.rand(10**4, 3)).to_parquet(part),
    numpy=lambda part: np.save(part, np.zeros(10**5)),
    text=lambda part: part.write_text("x"*10**5))


def test_libraries_that_meet_a_limit_are_understood(tmp_path):
    "A true limit on the size of files, met inside HDF5, Arrow, Rust and C: each error is turned into the same one."
    def work(begun):
        begun()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        found = {}
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        for name, write in LIBRARIES.items():
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            try:
                with atomic_path(tmp_path/f"{name}.npy", f"a table of {name}") as part: write(part)
            except Exception as error: found[name] = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        (tmp_path/"said.json").write_text(json.dumps(found))
    os.waitpid(in_child(work), 0)
    said = json.loads((tmp_path/"said.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["said.json"]
    for name in LIBRARIES:
        assert f"cannot write a table of {name} (" in said[name] and str(tmp_path/f"{name}.npy") in said[name]
        assert name == "numpy" or "(File too large): a limit on the files of this user is reached" in said[name]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch, code):
    def refuse(self, *_, **__): raise OSError(code, os.strerror(code), str(self))
    monkeypatch.setattr(Path, "mkdir", refuse)
    message = re.escape(f"cannot write run.json ({os.strerror(code)}): allow this user to write in {tmp_path/'runs'},")
    with pytest.raises(OSError, match=message), atomic_path(tmp_path/"runs"/"run.json", "run.json"): pass


def test_a_file_where_a_folder_belongs_is_named(tmp_path):
    (tmp_path/"runs").write_text("")
    with pytest.raises(OSError, match="cannot write a file .*(Not a directory|File exists).*runs"), \
            atomic_path(tmp_path/"runs"/"a"/"run.json"): pass


def test_other_errors_are_left_alone(tmp_path):
    for error in (ValueError("no"), FileNotFoundError(errno.ENOENT, "gone", "x"), KeyboardInterrupt(),
                  PermissionError(errno.EACCES, "denied", "/elsewhere/source.csv")):
        with pytest.raises(type(error)) as raised, writing(tmp_path/"a"): raise error
        assert raised.value is error


def test_sizes_are_written_as_they_are_read():
    assert [in_words(n) for n in (0, 999, 1000, 1_234_567, 5*10**9, 3*10**15)] == [
        "0 bytes", "999 bytes", "1 kB", "1.23 MB", "5 GB", "3e+03 TB"]
    assert free_space(Path("nothing")/"here") > 0 and free_memory() > 10**7


# 4

def holder(folder, seconds=60):
    def work(begun):
        with only_one(folder): begun(); time.sleep(seconds)
    return in_child(work)


def test_the_second_is_told_for_whom_it_waits_and_a_dead_owner_holds_nothing(tmp_path):
    pid = holder(tmp_path/"run")
    named = f"process {pid} on .* has worked here since 20..-..-.. ..:..:.."
    with pytest.raises(InUseError, match=f"run: {named}; wait until"), only_one(tmp_path/"run", wait=0): pass
    with pytest.warns(UserWarning, match=f"{named}; waiting"), pytest.raises(InUseError, match=named), \
            only_one(tmp_path/"run", wait=.1): pass
    ended(pid)
    assert (tmp_path/"run"/".owner.json").exists()  # it could not tidy up
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with only_one(tmp_path/"run", wait=0):
            assert json.loads((tmp_path/"run"/".owner.json").read_text())["pid"] == os.getpid()
    assert [p.name for p in (tmp_path/"run").iterdir()] == [".lock"]


def test_the_second_goes_on_when_the_first_is_done(tmp_path):
    pid, start = holder(tmp_path, .5), time.perf_counter()
    with pytest.warns(UserWarning, match="waiting"), only_one(tmp_path): waited = time.perf_counter() - start
    assert .2 < waited < 10 and os.waitpid(pid, 0)[1] == 0


def test_an_error_inside_gives_the_folder_back(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), only_one(tmp_path, wait=0): raise error
    with only_one(tmp_path, wait=0): pass


def test_threads_and_processes_never_overlap(tmp_path):
    inside, most = [], []
    def work():
        for _ in range(5):
            with warnings.catch_warnings(), only_one(tmp_path):
                inside.append(1); most.append(len(inside)); time.sleep(.002); inside.pop()
    with pytest.warns(UserWarning, match="waiting"):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert len(most) == 20 and max(most) == 1


def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path/"run").write_text("")
    message = "cannot write the lock of the folder .File exists.: a file stands where a folder"
    with pytest.raises(OSError, match=message), only_one(tmp_path/"run"): pass


def test_object_hashes_are_those_of_before():
    assert object_hash({"a": 1, "b": [2]}) == "0855bfc20eb6"
