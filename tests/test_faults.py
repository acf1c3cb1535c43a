"""A hostile day, in minutes: `pytest -m slow -k fault`.

Training is killed, interrupted and shared while it works, at random moments and at each place where it writes; what is
called again ends with the weights of an undisturbed run, and nothing is left over. The same is done to the paper
notebook under papermill, from its first import to its last figure. Disks that fail in any stage are in
tests/test_run.py, under the figures in tests/test_report.py, libraries that meet a limit in tests/test_core.py, odd
inputs in tests/test_odd_files.py.

what was tried                                      before                    now
20 × SIGKILL of training, damaged checkpoints       two clear refusals        the same bits
20 × SIGINT of training                             not tried                 the same bits, says how to go on
10 × SIGKILL at a place where it writes             temporary files left      the same files, nothing left
20 × SIGKILL while predictions, banks are written   not atomic                what was there before
12 × a paper notebook: all, its kernel, Ctrl-C      not tried                 the same Table 1 and files
the first of two trainings, killed                  rows of log.csv mixed     the second goes on
four trainings of one run                           rows of log.csv mixed     trained once
two evaluations, two paper notebooks of one run     entries of the list lost  equal files, all of them listed
disk full, read-only, denied in each of four stages errors without a path     path, content, what is missing
disk full, read-only under figures and their list   path, but not what        path, content, what is missing"""
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from test_run import check_kills, program

from biojepa.core import PATHS, file_hash
from biojepa.predict.model import predictions
from biojepa.predict.sets import PredictionSet
from biojepa.report.manifest import check_manifest, read_manifest
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


# --- a paper notebook
# ----------------------------------------------------------------------------------------------------------

SMALL = dict(n_genes=60, n_cells=600, n_targets=20, n_modules=4, n_batches=2, control_fraction=.2)


class Paper:
    "`papermill nbs/90_eval.ipynb` on a small screen, in a folder of its own."
    def __init__(self, folder):
        self.folder, self.figures = folder, folder/"figures"
        (folder/"cards").mkdir(parents=True, exist_ok=True)
        names = (PATHS.cards/"simulated.toml").read_text().partition("[columns]")[2]
        fields = "\n".join(f"{k} = {v}" for k, v in SMALL.items())
        (folder/"cards"/"small.toml").write_text(f'name = "small"\ntitle = "a small screen"\nlicence = "none"\n'
                                                 f"[simulate]\n{fields}\n[columns]{names}")

    def start(self, name="out"):
        moved = {f"BIOJEPA_{k.upper()}": str(self.folder/k) for k in ("cards", "raw", "splits", "processed")}
        given = dict(preset="smoke", dataset="small", runs=self.folder/"runs", out_folder=self.figures)
        words = [word for k, v in given.items() for word in ("-p", k, str(v))]
        files = [str(PATHS.nbs/"90_eval.ipynb"), str(self.folder/f"{name}.ipynb")]
        call = [sys.executable, "-m", "papermill", *files, "--no-progress-bar", *words]
        environment = {**os.environ, **moved, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        with open(self.folder/f"{name}.txt", "w") as said:
            return subprocess.Popen(call, stdout=said, stderr=said, cwd=PATHS.root, start_new_session=True,
                                    env=environment)

    def finish(self, name="out"):
        "To the end; what it wrote, but for what a clock says and the time a stage took."
        assert self.start(name).wait(600) == 0, (self.folder/f"{name}.txt").read_text()[-3000:]
        return self.files()

    def reached(self):
        "How many files there are."
        return sum(p.is_file() and p.name[0] != "." for where in ("runs", "figures")
                   for p in (self.folder/where).rglob("*"))

    def files(self):
        listed = check_manifest(self.figures)
        assert (listed.state == "as listed").all(), listed
        assert nothing_left(self.folder)
        clock = ("training_log.csv", "training_time.csv", "training.png")     # cells and seconds
        found = {p.name: p.read_bytes() for p in self.figures.glob("[!.]*")
                 if p.is_file() and p.name not in (*clock, "MANIFEST.json")}
        [model] = self.folder.glob("runs/*/model/model.safetensors")
        made_from = read_manifest(self.figures)["notebooks"]["90_eval"]["made_from"]
        return found | dict(weights=file_hash(model), made_from=made_from)


def ended(process, how):
    "A signal to the command, to its kernel, or to both at once as a power failure would."
    kernel = psutil.Process(process.pid).children(recursive=True)
    if how == "interrupt": process.send_signal(signal.SIGINT)
    elif how == "all" or not kernel: process.send_signal(signal.SIGKILL)
    for p in kernel if how != "interrupt" else []:
        with suppress(psutil.NoSuchProcess): p.kill()
    status = process.wait(120)
    gone, alive = psutil.wait_procs(kernel, 30)
    assert not alive, "a kernel is left behind"
    return status


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    "Undisturbed, and what it wrote."
    p = Paper(tmp_path_factory.mktemp("paper"))
    return p, p.finish()


def test_fault_a_paper_notebook_is_ended_twelve_times_and_has_the_same_table(paper, tmp_path):
    "At moments spread over all that it writes; a second call in the same folder finishes."
    whole, expected = paper
    rng, n = random.Random(0), 12
    for k in range(n):
        how, p = ("all", "interrupt", "kernel")[k % 3], Paper(tmp_path/str(k))
        process, place = p.start("first"), (k + rng.random())/n*(whole.reached() - 4)
        while process.poll() is None and p.reached() < place: time.sleep(.01)
        time.sleep(rng.random()*(3 if k == 0 else .3))  # the first one while it imports
        assert process.poll() is None, "it was finished before it was ended"
        assert ended(process, how) != 0
        found = p.finish("second")
        assert found["table1_published_protocol.csv"] == expected["table1_published_protocol.csv"]
        assert found.keys() == expected.keys() and not [k for k in found if found[k] != expected[k]]


def test_fault_two_paper_notebooks_evaluate_one_run(paper, tmp_path):
    "Begun at once, into one folder of figures: the run is trained once, no entry of the list is lost."
    p, expected = Paper(tmp_path), paper[1]
    both = [p.start("a"), p.start("b")]
    assert [process.wait(600) for process in both] == [0, 0], (tmp_path/"a.txt").read_text()[-2000:]
    assert p.files() == expected and len([*tmp_path.glob("runs/*-0")]) == 1


def test_fault_a_paper_notebook_that_cannot_write_its_figures_says_where_and_is_finished_later(paper, tmp_path):
    p = Paper(tmp_path)
    p.figures.write_text("a file stands where the folder belongs")
    assert p.start("first").wait(600) != 0
    said = (tmp_path/"first.txt").read_text()
    assert "cannot write table 'architecture_boxes' (" in said and "a file stands where a folder belongs" in said
    assert str(p.figures) in said
    p.figures.unlink()
    assert p.finish("second") == paper[1]
