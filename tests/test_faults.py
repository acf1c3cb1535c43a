"""A hostile day, in minutes: `pytest -m slow -k fault`.

Training is killed, interrupted and shared while it works, at random moments and at each place where it writes; what is
called again ends with the weights of an undisturbed run, and nothing is left over. Disks that fail in any stage are in
tests/test_run.py, libraries that meet a limit in tests/test_core.py."""
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from test_run import check_kills, program

from biojepa.core import file_hash
from biojepa.predict.model import predictions
from biojepa.predict.sets import PredictionSet
from biojepa.training.checkpoints import read_log, state_hash
from biojepa.training.run import STAGES, run_folder, run_stages

sys.path.insert(0, str(Path(__file__).parent))
import training_cases
from training_cases import OPTIONS, small_data, small_experiment, steps_of

torch.set_num_threads(1)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:latents collapse", "ignore:.*waiting until")]


@pytest.fixture(scope="module")
def data(): return small_data()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    return run_stages(small_experiment(), **data, runs=tmp_path_factory.mktemp("runs"), **OPTIONS)


def nothing_left(folder):
    "No half-written file, and no owner."
    return not [*folder.rglob(".*.tmp*"), *folder.rglob(".owner.json")]


def same_files(one, other):
    "Files of two run folders that differ; speed.csv holds what a clock says."
    names = {p.relative_to(f) for f in (one, other) for p in f.rglob("*") if p.is_file() and p.name != "speed.csv"}
    return [str(n) for n in sorted(names) if not (one/n).is_file() or file_hash(one/n) != file_hash(other/n)]


def test_fault_killed_twenty_times_ends_with_the_same_bits(tmp_path):
    damages = ["byte", "short", "json"]
    said = program(("kill", tmp_path, 20, ",".join(damages)))
    report = check_kills(tmp_path, said, 20, damages)
    assert {k["killed_at"][0] for k in report["kills"]} == set(STAGES)
    assert {k["spoiled"]["how"] for k in report["kills"] if k["spoiled"]} == {"byte", "short", "json"}
    assert nothing_left(tmp_path/"killed")


def test_fault_interrupted_twenty_times_ends_with_the_same_bits(tmp_path):
    "Ctrl-C in the middle of whatever it is; what it was doing is tidied up at once."
    said = program(("interrupt", tmp_path, 20, ""))
    check_kills(tmp_path, said, 20, [])
    assert said.count("start again to go on from there") + said.count("no checkpoint yet") >= 10
    assert nothing_left(tmp_path/"killed")


def test_fault_killed_while_it_writes_ends_with_the_same_files(tmp_path):
    "At an fsync or a rename of a checkpoint, a log, a configuration, weights, features."
    program(("write", tmp_path, 45))
    report = json.loads((tmp_path/"report.json").read_text())
    assert report["kills"] >= 10
    assert not same_files(Path(report["plain"]), Path(report["killed"])) and nothing_left(tmp_path/"killed")


def test_fault_the_first_of_two_trainings_is_killed_and_the_second_goes_on(data, finished, tmp_path):
    runs, folder = tmp_path/"runs", run_folder(small_experiment(), tmp_path/"runs")
    first, second = (training_cases.in_child(lambda t=t: training_cases.run(runs, data, tmp_path/t)) for t in "ab")
    training_cases.wait_for(lambda: steps_of(tmp_path/"a") or steps_of(tmp_path/"b"))
    owner, other = (first, second) if steps_of(tmp_path/"a") else (second, first)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    assert os.waitpid(other, 0)[1] == 0
    again = run_stages(small_experiment(), **data, runs=runs, **OPTIONS)
    assert state_hash(again.model) == state_hash(finished.model) and not same_files(finished.folder, folder)


def test_fault_four_processes_ask_for_one_run(data, finished, tmp_path):
    "Each ends with the run, which was trained once."
    runs, traces = tmp_path/"runs", [tmp_path/f"{k}.trace" for k in range(4)]
    children = [training_cases.in_child(lambda t=t: training_cases.run(runs, data, t)) for t in traces]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0]*4
    steps = [s[1:] for t in traces for s in steps_of(t)]
    assert len(steps) == len(set(steps)), "a step was done twice"
    folder = run_folder(small_experiment(), runs)
    assert not same_files(finished.folder, folder)
    for stage in STAGES:
        rows = [r["step"] for r in read_log(folder/stage/"log.csv")]
        assert rows == sorted(set(rows))


def test_fault_two_evaluations_write_one_file(data, finished, tmp_path):
    "Of the same run, to the same place: one of two equal files stays."
    path, expected = tmp_path/"answers.h5ad", predictions(finished, progress=False)
    def evaluate():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = run_stages(small_experiment(), **data, runs=finished.folder.parent, **OPTIONS)
        for _ in range(5): predictions(run, progress=False).save(path)
    children = [training_cases.in_child(evaluate) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    found = PredictionSet.load(path)
    assert (found.delta == expected.delta).all() and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_fault_predictions_and_banks_are_killed_while_they_are_written(data, finished, tmp_path):
    "What was there before stays readable, at ten moments each."
    answers, bank = predictions(finished, progress=False), data["features"][0]
    for thing, path in ((answers, tmp_path/"answers.h5ad"), (bank, tmp_path/"bank.safetensors")):
        thing.save(path)
        before = path.read_bytes()
        def endless():
            while True: thing.save(path)
        for k in range(10):
            pid = training_cases.in_child(endless)
            time.sleep(.02 + .004*k)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            assert path.read_bytes() == before
        thing.save(path)
        assert nothing_left(tmp_path)
