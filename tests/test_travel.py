"""Models that travel: in the package, to a hub and back.

1. The demo model is small, has everything it needs, and is right about targets that it never saw.
2. A name is a folder, `demo`, or a model on a hub, whose commit stands in every prediction.
3. What is pushed is what is read back; the card beside it says data, split, scores, licence and limits.
4. Every failure says what was asked for."""
import json
import shutil
from types import SimpleNamespace

import httpx
import huggingface_hub
import numpy as np
import pytest
from typer.testing import CliRunner

from biojepa import datasets
from biojepa.actions.vocabulary import Modality
from biojepa.config import preset, with_settings
from biojepa.core import PATHS
from biojepa.data.datasets import load_dataset
from biojepa.data.download import list_cards, read_card
from biojepa.data.means import group_means
from biojepa.data.preprocess import prepare
from biojepa.model.saving import from_pretrained, model_folder
from biojepa.predict.anndata import own_memories, predict
from biojepa.report.card import push_to_hub
from biojepa.report.command import app
from biojepa.report.demo import demo_experiment
from biojepa.training.run import run_stages

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def cells():
    spec = dict(n_genes=40, n_cells=308, n_targets=12, n_modules=4, n_batches=2, control_fraction=.2)
    return prepare(load_dataset(read_card("simulated").changed(simulate=spec, cells=None, genes=None, targets=None)))


@pytest.fixture(scope="module")
def run(cells, tmp_path_factory):
    small = {"data.split": "guide", "model.d_model": 8, "model.n_heads": 2, "align.epochs": 1}
    runs = tmp_path_factory.mktemp("runs")
    return run_stages(with_settings(preset("smoke"), small), cells, runs=runs, progress=False)


class Hub:
    "A hub in a folder: repositories of one commit, in the layout of huggingface-hub's cache."
    def __init__(self, home): self.home, self.calls = home, []

    def snapshot_download(self, repo_id, revision=None, allow_patterns=None):
        self.calls.append((repo_id, revision))
        folder = self.home/repo_id.replace("/", "--")/"snapshots"/COMMIT
        if revision not in (None, "main", "v1", COMMIT) or not folder.is_dir():
            answer = SimpleNamespace(headers={}, request=None, status_code=404)
            raise huggingface_hub.errors.RepositoryNotFoundError(f"404: {repo_id}@{revision}", response=answer)
        near = self.home/"cache"/repo_id.replace("/", "--")/"snapshots"/COMMIT
        for path in folder.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                near.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, near)
        return str(near)

    def create_repo(self, name, private, exist_ok): self.private = private

    def create_commit(self, name, operations, commit_message):
        folder = self.home/name.replace("/", "--")/"snapshots"/COMMIT
        folder.mkdir(parents=True)
        for add in operations:
            with add.as_file() as f: (folder/add.path_in_repo).write_bytes(f.read())
        return SimpleNamespace(oid=COMMIT)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def origin(out): return json.loads(out.uns["biojepa"]["provenance"])


# in the package

def test_the_demo_model_is_small_and_right_about_targets_it_never_saw():
    files = {path.name: path.stat().st_size for path in PATHS.demo.iterdir()}
    assert sum(files.values()) < 2_000_000 and {"config.json", "model.safetensors", "memory.safetensors"} <= set(files)
    cells, targets = datasets.simulated(), ("G010", "G026")
    seen = {target for memory in own_memories("demo").of for names in memory.perturbations for target in names}
    assert not seen & set(targets) and len(seen) > 30
    rows = np.flatnonzero(cells.obs["condition"].isin([f"{t}+ctrl" for t in targets]))
    measured = group_means(cells, rows, np.flatnonzero(cells.obs["condition"] == "ctrl")).delta
    out = predict("demo", cells, targets, progress=False)
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(measured, out.layers["delta"])) > .4
    assert from_pretrained("demo").model.config.d_model == demo_experiment().model.d_model


def test_every_card_is_a_function_of_datasets():
    assert all(callable(getattr(datasets, name)) for name in list_cards())


# names

def test_a_prediction_says_which_model_made_it(run, cells, tmp_path):
    target = run.table.targets[1][0]
    proteins = [bank for bank in run.features if bank.modality is not Modality.DNA]     # labels name no guides
    asked = dict(features=proteins, n_cells=4, progress=False)
    of_run, of_folder, of_model = (origin(predict(model, cells, [target], **asked))
                                   for model in (run, run.folder/"model", run.model))
    saved = json.loads((run.folder/"model"/"config.json").read_text())
    assert of_run["weights"] == of_folder["weights"] == of_model["weights"]
    assert of_run["run"] == of_folder["run"] == run.folder.name and of_model["run"] is None
    assert of_folder["saved"] == saved["hash"] and of_folder["revision"] is None
    shutil.copytree(run.folder/"model", tmp_path/"elsewhere")
    assert from_pretrained(tmp_path/"elsewhere").origin["run"] == run.folder.name, "a copy knows where it comes from"


def test_what_is_pushed_is_what_is_read_back(run, cells, hub):
    assert push_to_hub(run.folder, "lab/screen") == COMMIT and hub.private
    card = (hub.home/"lab--screen"/"snapshots"/COMMIT/"README.md").read_text()
    assert card.startswith("---\nlicense: ") and "biojepa predict lab/screen cells.h5ad" in card
    parts = "Data", "Split", "Scores on held-out", "Configuration", "Made from", "Must not be used for", "Licence"
    assert all(f"\n## {part}" in card for part in parts)
    target = run.table.targets[1][0]
    expected = predict(run.folder/"model", cells, [target], n_cells=4, progress=False)
    for name in ("lab/screen", "lab/screen@v1"):
        found = predict(name, cells, [target], n_cells=4, progress=False)
        np.testing.assert_array_equal(found.layers["delta"], expected.layers["delta"])
        assert origin(found)["revision"] == COMMIT and origin(found)["weights"] == origin(expected)["weights"]
    assert from_pretrained("lab/screen", revision="main").origin["revision"] == COMMIT
    assert hub.calls == [("lab/screen", None), ("lab/screen", "v1"), ("lab/screen", "main")], "asked once a prediction"


def test_the_command_pushes_and_copies_notebooks(run, hub, tmp_path, monkeypatch):
    said = CliRunner().invoke(app, ["push", str(run.folder), "lab/screen", "--public"])
    assert (said.exit_code, said.stdout) == (0, f"lab/screen@{COMMIT}\n") and not hub.private
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["notebooks", "90_eval"])
    assert said.exit_code == 0 and (tmp_path/"90_eval.ipynb").read_bytes() == (PATHS.nbs/"90_eval.ipynb").read_bytes()
    assert "is there already" in CliRunner().invoke(app, ["notebooks", "90_eval"]).stderr
    assert "99_screen" in CliRunner().invoke(app, ["notebooks"]).stdout


# what is refused

def test_models_that_are_not_there_are_named(hub, monkeypatch):
    with pytest.raises(ValueError, match="lab/nothing: no such folder, and not to be had from the hub .Repository"):
        model_folder("lab/nothing")
    for name in ("none", "./lab/screen", "/lab/screen", "a/b/c"):
        with pytest.raises(ValueError, match="no such folder; give one that save_pretrained made, 'demo'"):
            model_folder(name)
    def unplugged(**_): raise httpx.ConnectError("no route")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unplugged)
    with pytest.raises(ValueError, match="not to be had from the hub .ConnectError: no route"):
        model_folder("lab/screen")


def test_an_unfinished_run_is_not_pushed(run, hub, tmp_path):
    shutil.copytree(run.folder, tmp_path/"half", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(ValueError, match="holds no finished model"): push_to_hub(tmp_path/"half", "lab/half")
    assert not (hub.home/"lab--half").exists()
