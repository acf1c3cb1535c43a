"Four stages in one folder: killed, shared among processes, called again, called wrongly."
import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from biojepa.actions.describe import describe_actions
from biojepa.actions.vocabulary import Modality, Mode
from biojepa.cli import experiment_of, main, parser
from biojepa.config import Columns, DataConfig, config_hash, named_experiment, preset, with_settings
from biojepa.core import PATHS, file_hash
from biojepa.data.compounds import KINDS
from biojepa.data.controls import name_ranks
from biojepa.data.datasets import load_dataset
from biojepa.data.loaders import Roster
from biojepa.data.network import SimulationSpec
from biojepa.data.preprocess import prepare
from biojepa.data.simulate import simulate_perturb_seq
from biojepa.data.splits import make_split
from biojepa.model.saving import from_pretrained
from biojepa.predict.model import predictions
from biojepa.training import run as run_module
from biojepa.training.checkpoints import Checkpointer, read_log, state_hash
from biojepa.training.loop import DivergedError, make_fabric
from biojepa.training.run import STAGES, data_hash, load_data, run_folder, run_identity, run_stages

sys.path.insert(0, str(Path(__file__).parent))
import training_cases
from training_cases import OPTIONS, small_data, small_experiment

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:latents collapse", "ignore:find_unused_parameters")


def program(*jobs, timeout=900):
    "Run tests/training_cases.py in a process of its own, which forks the runs of all jobs at once."
    words = json.dumps([[str(word) for word in job] for job in jobs])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, training_cases.__file__, words], capture_output=True, text=True,
                          timeout=timeout, cwd=PATHS.root, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


CASES = dict(tokens=({}, {}),
             cells=(dict(vicreg_over="cells", mask_kind="exact", latent_loss="mse"), {}),
             pieces=({}, dict(accumulate=2, stages=["pretrain"])))


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    "A run killed twice, and runs shared by two processes: folder, and what was said."
    folder = tmp_path_factory.mktemp("forked")
    for name in ("killed", "shared"): (folder/name).mkdir()
    said = program(("kill", folder/"killed", 2, "byte"), ("share", folder/"shared", json.dumps(CASES)))
    return folder, said


@pytest.fixture(scope="module")
def data(): return small_data()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    "A finished run, not to be changed."
    return run_stages(small_experiment(), **data, runs=tmp_path_factory.mktemp("runs"), **OPTIONS)


# killed

def check_kills(folder, said, n, damages):
    "What must hold after `n` kills."
    report = json.loads((folder/"report.json").read_text())
    plain, killed, kills = Path(report["plain"]), Path(report["killed"]), report["kills"]
    assert file_hash(plain/"model"/"model.safetensors") == file_hash(killed/"model"/"model.safetensors")
    for stage in STAGES:  # optimiser and generators, too
        mine, theirs = (Checkpointer(folder/stage/"checkpoints") for folder in (killed, plain))
        assert mine.steps() == theirs.steps()
        assert file_hash(mine.path(mine.steps()[-1], ".safetensors")) == file_hash(
            theirs.path(theirs.steps()[-1], ".safetensors"))
        rows = [[{k: v for k, v in r.items() if k != "cells_per_second"}
                 for r in read_log(folder/stage/"log.csv")] for folder in (killed, plain)]
        assert rows[0] == rows[1]
    for kill, following in zip(kills, [*kills[1:], dict(first=report["last_first"])]):
        stage, step = kill["checkpoint"]
        if kill["spoiled"]: stage, step = kill["spoiled"]["stage"], kill["spoiled"]["good"]
        if stage == STAGES[-1] and step == report["lengths"][stage]:
            expected = None  # killed after the last checkpoint: nothing is left to do
        elif stage is None or step == report["lengths"][stage]:
            expected = [STAGES[STAGES.index(stage) + 1] if stage else "pretrain", 0]
        else:
            expected = [stage, step]
        assert following["first"] == expected, "went on elsewhere than after the last good checkpoint"
        if kill["killed_at"][0] == kill["checkpoint"][0]:
            assert kill["killed_at"][1] - kill["checkpoint"][1] <= OPTIONS["checkpoint_every"]
    assert len(kills) == n and not report["never_spoiled"]
    assert said.count("damaged checkpoint") >= len(damages)
    return report


def test_killed_twice_ends_with_the_same_bits(forked):
    folder, said = forked
    check_kills(folder/"killed", said, 2, ["byte"])


# shared

def test_two_processes_give_the_losses_of_one_with_twice_the_batch(forked):
    tmp_path = forked[0]/"shared"
    for case in CASES:
        one, first, second = (json.loads((tmp_path/f"{name}.json").read_text())
                              for name in (f"one-{case}-0", f"two-{case}-0", f"two-{case}-1"))
        assert first["weights"] == second["weights"] and first["teacher"] == second["teacher"] and first[
            "log"] == second["log"]
        a, b = (pd.DataFrame(json.loads(x["log"])) for x in (one, first))
        if case == "pieces":
            a, b = a[:-1], b[:-1]  # the last batch cannot be cut into the same pieces
        else:
            assert {"rank_teacher", "rank_predicted", "val_top10", "collapsed"} <= set(a.columns) and len(
                [*Path(first["folder"]).glob("*/log.csv")]) == 4
        pd.testing.assert_frame_equal(a, b, rtol=2e-5, atol=1e-6)
        assert (a[a.stage == "pretrain"].loss.diff().abs().dropna() > 1e-4).all()  # the losses do move


@pytest.mark.slow
def test_torchrun_and_the_module_itself_start_two_processes(tmp_path):
    sizes = [f"{s}.epochs=1" for s in STAGES] + [
        "pretrain.batch_size=256", "dynamics.batch_size=256", "readout.batch_size=256", "data.split=guide",
        "model.d_model=8"
    ]
    command = [
        "-m", "biojepa.cli", "--preset", "smoke", "--accelerator", "cpu", "--no-progress", "--set", *sizes
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = {}
    for name, start in dict(one=[sys.executable, *command],
                            two=[sys.executable, *command, "--devices", "2"],
                            torchrun=[
                                sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                                *command, "--devices", "2"
                            ]).items():
        done = subprocess.run([*start, "--runs", str(tmp_path/name)],
                              capture_output=True,
                              text=True,
                              cwd=PATHS.root,
                              env=environment,
                              timeout=900)
        assert done.returncode == 0 and "finished: " in done.stderr, done.stderr[-2000:]
        folder = Path(done.stderr.split("finished: ")[1].split("\n")[0])
        logs[name] = [read_log(folder/s/"log.csv")[-1]["loss"] for s in STAGES]
    np.testing.assert_allclose(logs["two"], logs["torchrun"], rtol=1e-6)
    np.testing.assert_allclose(logs["one"], logs["two"],
                               rtol=.05)  # the last, short batch of an epoch is shared out equally


# one folder

def test_a_run_leaves_what_it_was_made_of(finished, data):
    folder = finished.folder
    assert folder.name == f"{config_hash(small_experiment())}-0"
    assert json.loads((folder/"config.json").read_text()) == small_experiment().model_dump(mode="json")
    about = json.loads((folder/"run.json").read_text())
    assert about["identity"]["data"] == data_hash(
        data["adata"]) and about["identity"]["split"] == data["split"].hash
    assert about["versions"]["torch"] == torch.__version__.split(
        "+")[0] or about["versions"]["torch"] == torch.__version__
    assert about["history"] == [str(line)
                                for line in data["adata"].uns["biojepa"]["history"]] and about["history"]
    assert json.loads((folder/"split.json").read_text())["hash"] == data["split"].hash
    saved = from_pretrained(folder/"model",
                            genes=list(data["adata"].var_names),
                            config=small_experiment().model)
    assert state_hash(saved.model) == state_hash(finished.model)
    assert [*finished.log.stage.unique()] == list(STAGES) and finished.log.columns[0] == "stage"
    assert len(finished.actions.features) == len(finished.table)


def test_finished_stages_are_only_read(finished, data, monkeypatch):
    def never(*_): raise AssertionError("a step was done")
    monkeypatch.setattr("biojepa.training.loop.take_step", never)
    again = run_stages(small_experiment(), **data, runs=finished.folder.parent, **OPTIONS)
    assert state_hash(again.model) == state_hash(finished.model)
    pd.testing.assert_frame_equal(again.log, finished.log)


def test_stages_can_be_added_later(data, finished, tmp_path):
    first = run_stages(small_experiment(), **data, runs=tmp_path, stages=STAGES[:2], **OPTIONS)
    assert [*first.log.stage.unique()] == ["pretrain", "align"]
    whole = run_stages(small_experiment(), **data, runs=tmp_path, **OPTIONS)
    assert state_hash(whole.model) == state_hash(finished.model)
    with pytest.raises(ValueError, match=r"stages: found \['dynamics'\]; each needs those before it"):
        run_stages(small_experiment(), **data, runs=tmp_path, stages=["dynamics"])


def test_equal_runs_leave_equal_files(data, finished, tmp_path):
    "In one go, and stage by stage; only speed.csv holds what a clock says."
    for n in range(1, 5): again = run_stages(small_experiment(), **data, runs=tmp_path, stages=STAGES[:n], **OPTIONS)
    def files(folder):
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert {k for k in found if k.endswith("speed.csv")} == {f"{s}/speed.csv" for s in STAGES}
        return {k: v for k, v in found.items() if not k.endswith("speed.csv")}
    one, other = files(finished.folder), files(again.folder)
    assert len(one) == len(other) == 30 and not [k for k in one if one[k] != other[k]]
    sets = [predictions(r, progress=False).save(tmp_path/f"{k}.h5ad") for k, r in enumerate((finished, again))]
    assert sets[0].read_bytes() == sets[1].read_bytes()


def failing(kind, stage, patch):
    "The disk of one stage's folder is full, or may not be written, in three places of three kinds."
    def inside(path): return stage in Path(path).parts
    if kind == "full":
        patch.setattr("biojepa.core.free_space", lambda folder: 0 if inside(folder) else 10**12)
        return "cannot write the checkpoint of step \\d+ .No space left on device.: 0 bytes are free, .* are missing"
    if kind == "read-only":
        mkdir = Path.mkdir
        def refuse(self, *args, **options):
            if inside(self) and self.name == "checkpoints":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
            mkdir(self, *args, **options)
        patch.setattr(Path, "mkdir", refuse)
        return "cannot write the checkpoint .*Read-only file system.: allow this user to write in .*checkpoints"
    move = os.replace
    def denied(part, path):
        if inside(path): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        move(part, path)
    patch.setattr(os, "replace", denied)
    return "cannot write the log .Permission denied.: allow this user to write in"


@pytest.mark.parametrize("kinds", [["full"], pytest.param(["full", "read-only", "denied"], marks=pytest.mark.slow)])
def test_a_disk_fault_in_any_stage_is_named_and_costs_nothing(kinds, data, finished, tmp_path):
    "Four or twelve failures in one folder; the run that is called again ends with the same bits."
    for stage in STAGES:
        for kind in kinds:
            with pytest.MonkeyPatch.context() as patch, \
                    pytest.raises(OSError, match=f"{failing(kind, stage, patch)}.*/{stage}/"):
                run_stages(small_experiment(), **data, runs=tmp_path, **OPTIONS)
    whole = run_stages(small_experiment(), **data, runs=tmp_path, **OPTIONS)
    assert state_hash(whole.model) == state_hash(finished.model)
    assert not [*tmp_path.rglob(".*.tmp*")]


@pytest.mark.parametrize("what", ["lock", "run.json", "split", "model"])
def test_what_is_written_around_the_stages_is_named_too(what, data, tmp_path, monkeypatch):
    move = os.replace
    def full(part, path):
        if what in str(path): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        move(part, path)
    monkeypatch.setattr(os, "replace", full)
    if what == "lock": (tmp_path/"runs").write_text("")
    message = f"cannot write .*No space left.*{what}"
    if what == "lock": message = "the lock of the folder .Not a directory.: a file stands where"
    with pytest.raises(OSError, match=message):
        run_stages(small_experiment(epochs=(1, 1, 1, 1)), **data, runs=tmp_path/"runs", stages=STAGES[:1], **OPTIONS)


def test_two_trainings_at_once_take_turns(data, finished, tmp_path):
    "The second is told for whom it waits, does no step of its own, and has the same weights."
    runs = tmp_path/"runs"
    pid = training_cases.in_child(lambda: training_cases.run(runs, data, tmp_path/"first"))
    folder = run_folder(small_experiment(), runs)
    training_cases.wait_for((folder/".owner.json").exists)
    with pytest.warns(UserWarning, match=f"process {pid} on .* has worked here since .*; waiting"):
        mine = run_stages(small_experiment(), **data, runs=runs, **OPTIONS)
    assert os.waitpid(pid, 0)[1] == 0 and state_hash(mine.model) == state_hash(finished.model)
    for stage in STAGES:
        steps = [row["step"] for row in read_log(folder/stage/"log.csv")]
        assert steps == sorted({*steps}), "the log holds rows of two trainings"


def test_what_a_killed_run_left_is_swept_everywhere(data, tmp_path):
    small = small_experiment(epochs=(1, 1, 1, 1))
    run = run_stages(small, **data, runs=tmp_path, stages=STAGES[:1], **OPTIONS)
    left = [run.folder/f".run.{2**22 + 1}.tmp.json", run.folder/"pretrain"/f".log.{2**22 + 1}.tmp.csv",
            run.folder/"pretrain"/"checkpoints"/f".step-000000004.{2**22 + 1}.tmp.safetensors",
            run.folder/"model"/f".features_dna.{2**22 + 1}.tmp.safetensors"]
    for path in left: path.write_text("half")
    run_stages(small, **data, runs=tmp_path, stages=STAGES[:1], **OPTIONS)
    assert not [p for p in left if p.exists()]


def test_a_rate_that_diverges_is_an_error_with_the_stage_and_the_setting(data, tmp_path):
    experiment = small_experiment(epochs=(1, 1, 8, 1))
    wild = experiment.changed(dynamics=experiment.dynamics.changed(lr=1., lr_composer=1., clip_norm=None))
    for _ in range(2):
        with pytest.raises(DivergedError, match="stage 'dynamics': .* at step .*Lower dynamics.lr .now 1., clip"):
            run_stages(wild, **data, runs=tmp_path, **OPTIONS)
    assert not [*tmp_path.glob("*/model")]
    kept = Checkpointer(next(tmp_path.glob("*/dynamics"))/"checkpoints").latest()
    assert all(t.isfinite().all() for t in kept.tensors.values() if t.is_floating_point())


def test_each_stage_changes_only_its_parts(data, tmp_path):
    states = [
        run_stages(small_experiment(epochs=(1, 1, 1, 1)),
                   **data,
                   runs=tmp_path,
                   stages=STAGES[:n],
                   **OPTIONS).model for n in (1, 2, 3, 4)
    ]
    hashes = [{n: state_hash(m) for n, m in model.named_children()} for model in states]
    changed = [{n for n in a if a[n] != b[n]} for a, b in zip(hashes, hashes[1:])]
    assert changed == [{"composer"}, {"predictor", "composer"}, {"readout"}]


def swapped(text, a, b): return text.replace(a, "\0").replace(b, a).replace("\0", b)


def with_column(adata, column):
    "Cells with other values in one column of obs, as a file could have them."
    other, values, treated = adata.copy(), adata.obs[column], (adata.obs["condition"] != "ctrl").to_numpy()
    if column in ("condition", "perturbation"):     # two targets take each other's names
        a, b = sorted({c.split("+")[0] for c in adata.obs["condition"].astype(str)[treated]})[:2]
        for name in ("condition", "perturbation", "guide_id"):
            other.obs[name] = pd.Categorical([swapped(v, a, b) for v in adata.obs[name].astype(str)])
    elif column == "guide_id":      # two guides of one target do
        a, b = sorted({*values.astype(str)[treated]})[:2]
        other.obs[column] = pd.Categorical([swapped(v, a, b) for v in values.astype(str)])
    elif values.dtype.kind == "f": other.obs[column] = values + np.float32(.1)
    elif column in ("batch", "cell_type"):
        half = np.where(np.arange(len(values)) % 2, "one", "two")
        other.obs[column] = pd.Categorical(half if values.nunique() == 1 else np.roll(values.astype(str), 1))
    else:   # what belongs to a perturbation changes for one of them
        one = (adata.obs["perturbation"] == adata.obs["perturbation"][treated].iloc[0]).to_numpy()
        new = {"mode": "crispra"}.get(column, "ACGTACGTACGTACGTACGT")
        other.obs[column] = pd.Categorical(np.where(one, new, values.astype(str)))
    return other


def identity_of(adata, split, features):
    return run_identity(Roster(adata, split), describe_actions(adata, split, features))


def columns_read(adata, function):
    "Columns of obs that a call reads, from whatever copy of the table."
    read, get = set(), pd.DataFrame.__getitem__
    def watching(self, key):
        read.update(k for k in (key if isinstance(key, list) else [key]) if isinstance(k, str))
        return get(self, key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pd.DataFrame, "__getitem__", watching)
        function()
    return read & set(adata.obs.columns)


def test_every_column_that_a_run_reads_makes_another_run(data, finished, tmp_path):
    "Columns are not listed: they are watched while all stages run."
    adata, split, features = data["adata"], data["split"], data["features"]
    small = small_experiment(epochs=(1, 1, 1, 1))
    small = small.changed(model=small.model.changed(predicts="change", intervenes=True),
                          dynamics=small.dynamics.changed(target="mean"))
    read = columns_read(adata, lambda: run_stages(small, **data, runs=tmp_path, **OPTIONS))
    assert {"mode", "batch", "cell_type", "perturbation", "log_library_size", "guide_id", "guide_seq_a"} <= read
    before = identity_of(adata, split, features)
    assert before == identity_of(adata.copy(), split, features)
    unseen = [c for c in sorted(read) if identity_of(with_column(adata, c), split, features) == before]
    assert not unseen, f"cells that differ in {unseen} are taken for the same"


def other_inputs(data):
    "Each input of a run changed once: name -> adata, split, features."
    adata, split, features = data["adata"], data["split"], data["features"]
    bank, moved = features[0], adata.copy()
    values = bank.values.copy(); values[3, 5] += .25
    moved.X.data[-1] += 1e-3
    named = adata.copy(); named.var_names = [*named.var_names[:-1], "other"]
    space = adata.copy(); space.uns["biojepa"] = space.uns["biojepa"] | dict(expression_space="log1p_twice")
    controls = np.flatnonzero(adata.obs["condition"] == "ctrl")
    lane = adata.obs["batch"].astype(str).to_numpy().copy()
    lane[controls[0]] = next(b for b in set(lane) if b != lane[controls[0]])
    paired = adata.copy(); paired.obs["batch"] = pd.Categorical(lane)
    train = np.flatnonzero(adata.obs["condition"].isin(split.train))
    label = adata.obs["perturbation"].astype(str).to_numpy()
    one, two = next((a, b) for a in train for b in train if label[a] != label[b] and lane[a] == lane[b])
    swapped_cells = adata.copy()
    for c in ("perturbation", "condition", "guide_id", "guide_seq_a", "guide_seq_b"):   # two cells change places
        held = adata.obs[c].astype(str).to_numpy().copy()
        held[[one, two]] = held[[two, one]]
        swapped_cells.obs[c] = pd.Categorical(held)
    dna = features[1]
    return dict(label=(swapped_cells, split, features),
        mode=(with_column(adata, "mode"), split, features), guide=(with_column(adata, "guide_seq_a"), split, features),
        feature=(adata, split, [type(bank)(bank.keys, values, bank.modality, bank.provenance), dna]),
        fewer_features=(adata, split, [bank]), control=(paired, split, features),
        split=(adata, replace(split, train=split.train[1:]), features), value=(moved, split, features),
        gene_order=(adata[:, ::-1].copy(), split, features), gene_name=(named, split, features),
        cell_order=(adata[::-1].copy(), split, features), cells=(adata[:-1].copy(), split, features),
        space=(space, split, features))


def test_each_input_changed_once_is_another_run(data):
    cases = {name: identity_of(*case) for name, case in other_inputs(data).items()}
    cases["as it was"] = identity_of(**data)
    assert len({tuple(c.values()) for c in cases.values()}) == len(cases) == 14
    assert {k for k, v in cases["mode"].items() if v != cases["as it was"][k]} == {"actions"}
    assert {k for k, v in cases["control"].items() if v != cases["as it was"][k]} == {"pairing"}


def test_lines_count_where_every_pool_of_controls_is_the_same(data):
    "What a perturbation does to its own gene is learned line by line."
    one = data["adata"][np.argsort(data["adata"].obs["batch"].astype(str), kind="stable")].copy()
    names = np.array([f"cell {i}" for i in range(one.n_obs)])
    one.obs_names = names[np.argsort(name_ranks(names))]    # pools are in the order of names: here that of lanes
    two = one.copy()
    two.obs["cell_type"] = one.obs["batch"].astype(str).to_numpy()
    pools = [Roster(a, data["split"])["train"].pools for a in (one, two)]
    own = [[p.pool[a:a + n].tolist() for a, n in zip(p.start, p.size)] for p in pools]
    assert own[0] == own[1]
    first, second = (identity_of(a, data["split"], data["features"]) for a in (one, two))
    assert {k for k in first if first[k] != second[k]} == {"pairing"}


@pytest.mark.parametrize("what, key", dict(mode="actions", control="pairing", value="data", split="split",
                                           feature="features").items())
def test_other_inputs_never_reuse_a_run(what, key, finished, data):
    adata, split, features = other_inputs(data)[what]
    before = {p: file_hash(p) for p in finished.folder.rglob("*") if p.is_file()}
    message = f"this configuration was run on something else: .*{key} .* there, .* now; choose another folder"
    with pytest.raises(ValueError, match=message):
        run_stages(small_experiment(), adata, split, finished.folder.parent, features, **OPTIONS)
    assert before == {p: file_hash(p) for p in finished.folder.rglob("*") if p.is_file()}


def test_the_identity_of_a_default_run_takes_less_than_a_second():
    adata = prepare(load_dataset("simulated"))
    targets = sorted({*adata.obs.condition} - {"ctrl"})
    split = make_split(adata, "custom", held_out=dict(test=targets[:9], val=targets[9:12], train=targets[12:]))
    roster, actions = Roster(adata, split), describe_actions(adata, split)
    start = time.perf_counter()
    run_identity(roster, actions)
    assert time.perf_counter() - start < 1


def test_another_configuration_is_another_folder():
    folders = {
        run_folder(e) for e in (small_experiment(), small_experiment(epochs=(3, 8, 2, 2)),
                                small_experiment(mask_ratio=.5), small_experiment().changed(seed=1))
    }
    assert len(folders) == 4 and all(f.parent == PATHS.runs for f in folders)


def test_other_versions_are_reported_and_a_damaged_record_is_named(finished, data, tmp_path, monkeypatch):
    runs = tmp_path/"runs"
    run_stages(small_experiment(epochs=(1, 1, 1, 1)), **data, runs=runs, stages=STAGES[:1], **OPTIONS)
    monkeypatch.setattr(run_module, "version", lambda package: "0.0")
    with pytest.warns(UserWarning, match="begun with other versions: biojepa .* there, 0.0 now"):
        run_stages(small_experiment(epochs=(1, 1, 1, 1)), **data, runs=runs, stages=STAGES[:1], **OPTIONS)
    record = next(runs.glob("*/run.json"))
    about = json.loads(record.read_text())
    del about["identity"]["actions"], about["identity"]["pairing"]
    record.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="begun by an earlier version, which did not look at pairing, actions"):
        run_stages(small_experiment(epochs=(1, 1, 1, 1)), **data, runs=runs, stages=STAGES[:1], **OPTIONS)
    record.write_text("{")
    with pytest.raises(ValueError, match="run.json: not readable as JSON"):
        run_stages(small_experiment(epochs=(1, 1, 1, 1)), **data, runs=runs, stages=STAGES[:1], **OPTIONS)


# data and actions

def test_data_hash_sees_values_and_names_and_not_how_they_are_stored(data, tmp_path):
    adata = data["adata"]
    same = adata.copy()
    same.write_h5ad(tmp_path/"cells.h5ad")
    backed = ad.read_h5ad(tmp_path/"cells.h5ad", backed="r")
    assert data_hash(adata) == data_hash(backed) == data_hash(adata, block=7)
    backed.file.close()
    value, gene, cell = (adata.copy() for _ in range(3))
    value.X.data[-1] += 1e-3
    gene.var_names = [*gene.var_names[:-1], "other"]
    cell.obs_names = [*cell.obs_names[:-1], "other"]
    assert len({data_hash(a) for a in (adata, value, gene, cell)}) == 4


def test_actions_are_described_as_released_unless_told_otherwise(data):
    adata, split, features = data["adata"], data["split"], data["features"]
    described = describe_actions(adata, split, features)
    assert described.actions.features.shape[1] == 1 and set(
        described.actions.modality[described.actions.present].tolist()) == {Modality.DNA}
    assert set(described.anchor.mode[described.anchor.present].tolist()) == {Mode.CONTROL} and set(
        described.anchor.modality[described.anchor.present].tolist()) == {Modality.PROTEIN}
    train = set(adata.obs.perturbation.iloc[split.cells(adata, "train")])
    assert {described.table.perturbation[i] for i in described.aligned("train")} == train
    both = describe_actions(adata, split, features, DataConfig(tokens=("protein", "dna")))
    assert both.actions.present.sum(1).max() == 2 and both.hash != described.hash
    assert describe_actions(adata, split, features[:1]).actions.modality.max() == Modality.PROTEIN
    with pytest.raises(ValueError, match="tokens: no features of chemical; found protein, dna"):
        describe_actions(adata, split, features, DataConfig(tokens=("chemical", )))


def test_without_guides_alignment_is_left_out_with_a_warning(data, tmp_path):
    with pytest.warns(UserWarning, match="'align' is left out"):
        run = run_stages(small_experiment(epochs=(1, 1, 1, 1)), data["adata"], data["split"], tmp_path,
                         data["features"][:1], **OPTIONS)
    assert [*run.log.stage.unique()] == ["pretrain", "dynamics", "readout"]


def test_a_target_without_a_protein_stays_out_of_the_pairs_only(data):
    adata, split, (protein, dna) = data["adata"], data["split"], data["features"]
    lacking = describe_actions(adata, split, data["features"]).table.targets
    gene = next(t[0] for t, p in zip(lacking,
                                     describe_actions(adata, split, data["features"]).table.perturbation)
                if t and f"{t[0]}+ctrl" in split.train)
    described = describe_actions(adata, split, [protein.select([k for k in protein.keys if k != gene]), dna])
    assert all(described.table.targets[i] != (gene, )
               for i in described.pairs) and described.actions.present.any(1).sum() == 24


def test_relations_and_proteins_come_from_files(data, tmp_path):
    adata, genes = data["adata"], describe_actions(data["adata"], data["split"], data["features"]).table.genes
    edges = pd.DataFrame([(a, b) for i, a in enumerate(genes[:-1])
                          for b in (*genes[i + 1:i + 3], *(f"other{j}" for j in range(400)))],
                         columns=["a", "b"])
    edges.to_csv(tmp_path/"edges.csv", index=False)
    with pytest.warns(
            UserWarning,
            match=f"1 of {len(genes)} targets have no diffusion feature and get the mean one: {genes[0]}"):
        pd.concat([edges[(edges.a != genes[0]) & (edges.b != genes[0])]]).to_csv(tmp_path/"fewer.csv",
                                                                                 index=False)
        described = describe_actions(adata,
                                     data["split"],
                                     data=DataConfig(relations=str(tmp_path/"fewer.csv"),
                                                     tokens=("protein", "dna")))
    width, bank = described.widths["protein"], described.banks[0]
    assert width == 128 and described.actions.present.any(1).sum() == 24
    assert {"other7", *genes[1:]} < set(bank.keys), "every gene of the table can be asked about later"
    row = described.table.targets.index((genes[0],))
    mean = bank.rows([k for k in bank.keys if k != genes[0]]).mean(0)
    np.testing.assert_allclose(described.actions.features[row, 0, :width].numpy(), mean, atol=1e-6)
    eigenvectors = describe_actions(adata, data["split"], data=DataConfig(
        relations=str(tmp_path/"edges.csv"), relation_features="spectral", tokens=("protein",)))
    assert eigenvectors.widths["protein"] == 320
    pd.DataFrame(dict(gene=genes, sequence=[adata.uns["protein_sequences"][g]
                                            for g in genes])).to_csv(tmp_path/"proteins.csv", index=False)
    bare = adata.copy()
    del bare.uns["protein_sequences"]
    assert describe_actions(bare,
                            data["split"],
                            data=DataConfig(proteins=str(
                                tmp_path/"proteins.csv"), tokens=("protein", ))).hash == describe_actions(
                                    adata, data["split"], data=DataConfig(tokens=("protein", ))).hash
    with pytest.raises(ValueError, match="text columns"):
        describe_actions(bare, data["split"], data=DataConfig(
            proteins=str(tmp_path/"none.csv"))) if (tmp_path/"none.csv").write_text("a,b\n1,2\n") else None


def test_data_without_sequences_asks_for_features(data):
    bare = data["adata"].copy()
    del bare.uns["protein_sequences"]
    bare.obs = bare.obs.drop(columns=["guide_seq_a", "guide_seq_b"])
    with pytest.raises(ValueError, match="features: the data hold neither .* --features bank.safetensors"):
        describe_actions(bare, data["split"])


def test_sizes_follow_the_data_with_a_warning(data, tmp_path):
    experiment = small_experiment(epochs=(1, 1, 1, 1), n_genes=50, d_dna=1536)
    with pytest.warns(
            UserWarning,
            match=
            "model.n_genes: 50 in the configuration, 40 as the data have; model.d_dna: 1536 in the "
            "configuration, 20"
    ):
        run = run_stages(experiment, **data, runs=tmp_path, stages=STAGES[:1], **OPTIONS)
    assert run.model.config.n_genes == 40 and run.experiment.model.d_dna == 20 and run.folder == run_folder(
        run.experiment, tmp_path)


def test_leaking_alignment_pairs_are_refused(data, tmp_path, monkeypatch):
    describe = run_module.describe_actions
    monkeypatch.setattr(
        run_module, "describe_actions",
        lambda *a: describe(*a)._replace(train=np.flatnonzero(~describe(*a).table.is_control)))
    with pytest.raises(ValueError, match="pairs"):
        run_stages(small_experiment(), **data, runs=tmp_path, **OPTIONS)


def test_a_split_is_made_once_and_read_back(tmp_path, monkeypatch):
    config = DataConfig(split="guide", split_seed=3)
    first = load_data(config, runs=tmp_path)[1]
    assert len([*(tmp_path/"splits").glob("simulated-guide-3-*.json")]) == 1
    def never(*a, **k): raise AssertionError("made again")
    monkeypatch.setitem(KINDS, "guide", (never, KINDS["guide"][1]))
    assert load_data(config, runs=tmp_path)[1].hash == first.hash


# the command line

def test_options_reach_the_configuration(tmp_path):
    parse = lambda text: experiment_of(parser().parse_args(text.split()))
    assert parse("") == preset("laptop")
    assert parse("--preset paper") == preset("paper")
    found = parse(
        "--preset paper --data cells.h5ad --condition gene --control nt --batch lane --cell-type line --guide "
        "sgrna --seed 4 --tokens protein dna"
    )
    said = Columns(condition="gene", control="nt", batch="lane", cell_type="line", guide="sgrna")
    assert (found.data.columns, found.data.dataset, found.data.tokens, found.seed) == (
        said, "cells.h5ad", ("protein", "dna"), 4)
    found = parse(
        "--set model.vicreg_over=cells model.library_norm=[9,0.5] pretrain.epochs=3 data.n_top_genes=200 "
        "readout.clip_norm=null"
    )
    assert (found.model.vicreg_over, found.model.library_norm, found.pretrain.epochs,
            found.data.n_top_genes, found.readout.clip_norm) == ("cells", (9., .5), 3, 200, None)
    text = "model.vicreg_over=cells model.library_norm=[9,0.5] pretrain.epochs=3 readout.clip_norm=null"
    assert named_experiment("paper", settings=text) == parse(f"--preset paper --set {text}")
    assert named_experiment("paper", seed=1, dataset="a.h5ad",
                            settings="seed=2 data.dataset=b.h5ad").data.dataset == "b.h5ad"
    for wrong in ("epochs", "=3", "pretrain.epochs = 3"):
        with pytest.raises(ValueError, match="settings .--set.: found .*; write field=value"):
            named_experiment(settings=wrong)
    with pytest.raises(ValueError, match="found 'seed=1' beside run 'of-mine'.*give one of the two"):
        named_experiment(run="of-mine", settings="seed=1")
    (tmp_path/"config.json").write_text(json.dumps(preset("smoke").changed(seed=5).model_dump(mode="json")))
    assert parse(f"--config {tmp_path/'config.json'}") == preset("smoke").changed(seed=5)


def test_names_of_columns_have_one_place_and_one_grammar(tmp_path):
    "Flag, parameter, `--set` and `settings` reach the same field; runs saved before `columns` are still read."
    parse = lambda text: experiment_of(parser().parse_args(text.split()))
    wanted = preset("smoke").changed(data=DataConfig(columns=Columns(condition="gene", keep=("a", "b"))))
    text = "data.columns.condition=gene data.columns.keep=a,b"
    assert parse(f"--preset smoke --set {text}") == named_experiment("smoke", settings=text) == wanted
    assert named_experiment("smoke", condition="gene", keep="a, b") == wanted
    assert parse("--preset smoke --condition gene --set data.columns.keep=[\"a\",\"b\"]") == wanted
    for field, value in dict(layer="counts", gene_name="symbol", values="log1p", batch_pattern="-(.)$").items():
        found = parse(f"--set data.columns.{field}={value}").data.columns
        assert found == Columns(**{field: value}) and config_hash(found) != config_hash(Columns())
    saved = wanted.model_dump(mode="json")
    saved["data"] |= saved["data"].pop("columns")
    (tmp_path/"config.json").write_text(json.dumps(saved))
    assert named_experiment(run=tmp_path) == wanted
    with pytest.raises(ValueError, match="no field 'data.columns.colour'; data.columns has condition"):
        named_experiment(settings="data.columns.colour=red")


def test_hashes_of_the_presets_are_those_of_the_committed_figures():
    "Runs, figures and notes of before are found under the same names."
    assert [config_hash(preset(p)) for p in ("laptop", "smoke", "paper")] == [
        "1382e3f3f9fd", "cd82dcf5e563", "5ba4d9f4d641"]
    assert config_hash(with_settings(preset("laptop"),
                                     {})) == "1382e3f3f9fd"  # written out in full, and read again


def test_columns_of_the_configuration_reach_the_file(tmp_path):
    spec = dict(n_genes=60, n_cells=200, n_targets=8, n_modules=4, n_batches=1)
    screen = simulate_perturb_seq(SimulationSpec(**spec))
    lab = ad.AnnData(np.zeros(screen.shape),
                     obs=screen.obs[["condition"]].rename(columns=dict(condition="gene")).astype(str),
                     var=pd.DataFrame(dict(symbol=screen.var_names),
                                      index=[f"E{i}" for i in range(screen.n_vars)]),
                     layers=dict(counts=screen.X))
    lab.write_h5ad(tmp_path/"lab.h5ad")
    text = "data.columns.layer=counts data.columns.gene_name=symbol data.columns.values=counts"
    data = named_experiment(dataset=str(tmp_path/"lab.h5ad"),
                            condition="gene",
                            settings=f"{text} data.split=guide").data
    targets = sorted(set(screen.obs["condition"]) - {"ctrl"})
    split = make_split(screen, "custom", held_out=dict(train=targets[2:], val=targets[:1], test=targets[1:2]))
    adata, _ = load_data(data, split, tmp_path)
    assert [*adata.var_names] == [*screen.var_names] and (adata.layers["counts"] != screen.X).nnz == 0


def test_the_documented_command_is_understood():
    args = parser().parse_args(
        "--preset paper --data cells.h5ad --features esm2.safetensors ntv3.safetensors --devices 8 --nodes 2"
        .split())
    assert (args.devices, args.nodes, args.preset) == (8, 2, "paper")
    assert args.features == ["esm2.safetensors", "ntv3.safetensors"]
    args = parser().parse_args(
        "--accumulate 4 --precision bf16-mixed --stages pretrain align --early-stop 3:-val_top10 "
        "--checkpoint-every 500 --validate-every 100 --log-every 5 --tensorboard --no-progress"
        .split())
    assert (args.accumulate, args.precision, args.stages, args.early_stop, args.checkpoint_every,
            args.validate_every, args.log_every) == (4, "bf16-mixed", ["pretrain", "align"],
                                                     (3, "-val_top10"), 500, 100, 5)


MISSPELT = {
    "--preset papre": "invalid choice: 'papre'", "--early-stop soon":
    "found 'soon'; write it like 3:val_total", "--devices two": "invalid int", "--stages pretrian":
    "invalid choice"
}
WRONG = {
    "--set pretrain.epoch=3": "the configuration has no field 'pretrain.epoch'", "--set pretrain.epochs=0":
    "greater than 0", "--set epochs": "found 'epochs'; write field=value", "--set model.x.y=1":
    "no field 'model.x.y'", "--data none.h5ad": "'none.h5ad': neither a file nor a dataset",
    "--features none.safetensors": "none.safetensors: no such file"
}


@pytest.mark.parametrize("text, message", MISSPELT.items())
def test_wrong_options_are_refused_by_the_parser(text, message, capsys):
    with pytest.raises(SystemExit) as stop: main(text.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text, message", WRONG.items())
def test_wrong_input_is_one_line(text, message, capsys):
    with pytest.raises(SystemExit) as stop: main(f"--accelerator cpu --no-progress {text}".split())
    error = capsys.readouterr().err
    assert stop.value.code == 1 and message in error and "Traceback" not in error


def test_ctrl_c_on_the_command_line_says_where_it_stands(data, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__): raise KeyboardInterrupt("stage 'pretrain': interrupted at step 7")
    monkeypatch.setattr("biojepa.cli.run_stages", interrupted)
    with pytest.raises(SystemExit) as stop: main(["--preset", "smoke", "--accelerator", "cpu"])
    assert stop.value.code == 130 and capsys.readouterr().err == "stage 'pretrain': interrupted at step 7\n"


def test_many_devices_get_ddp_that_allows_idle_parameters():
    fabric = make_fabric(256, "cpu", devices=2, nodes=3, precision="32-true")
    assert type(fabric.strategy).__name__ == "DDPStrategy" and fabric.strategy._ddp_kwargs[
        "find_unused_parameters"] is True and fabric.strategy._num_nodes == 3 and fabric.world_size == 6
