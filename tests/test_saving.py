"""A model in one folder.

1. What is read is what was written: tensors, genes, actions, what the cells held, the features' hashes.
2. No file of the folder can be changed, removed or added unnoticed.
3. Cells of another scale are refused, and answers are labelled with what the model was trained on.
4. A model that does not fit into memory is refused by arithmetic."""
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file

from biojepa.actions.banks import FeatureBank
from biojepa.actions.vocabulary import Modality
from biojepa.config import preset
from biojepa.core import content_hash, object_hash
from biojepa.data.loaders import Roster
from biojepa.data.preprocess import TARGET_SUM, prepare
from biojepa.explore.states import target_state
from biojepa.model.biojepa import BioJEPA
from biojepa.model.saving import (
    cell_space, check_space, from_pretrained, require_memory, save_pretrained, seal
)
from biojepa.predict.anndata import predict
from biojepa.predict.model import predictions
from biojepa.training.run import run_stages

sys.path.insert(0, str(Path(__file__).parent))
from training_cases import small_data, small_experiment

G = 40
SMALL = small_experiment().model


@pytest.fixture(scope="module")
def data(): return small_data()


def proteins(width=24):
    rows = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    return FeatureBank(("A", "B", "C"), rows, Modality.PROTEIN, dict(featurizer="drawn"))


@pytest.fixture
def saved(data, tmp_path):
    torch.manual_seed(0)
    return save_pretrained(BioJEPA(SMALL), tmp_path/"model", data["adata"].var_names, ["A+ctrl"], [proteins()],
                           cell_space(data["adata"]))


# 1

def test_what_is_read_is_what_was_written(saved, data):
    torch.manual_seed(0)
    original, found = BioJEPA(SMALL), from_pretrained(saved)
    assert all(torch.equal(a, b) for a, b in zip(original.state_dict().values(), found.model.state_dict().values()))
    assert found.genes == [*data["adata"].var_names] and found.actions == ["A+ctrl"]
    counts = data["adata"].layers["counts"]
    assert found.cells[:3] == ("log1p", TARGET_SUM, "the sum of the counts")
    assert counts.shape[1] == G and abs(found.cells.total/TARGET_SUM - 1) < 1e-5
    (bank,) = found.features
    assert bank["values"] == content_hash(proteins().values) and bank["provenance"] == dict(featurizer="drawn")
    assert FeatureBank.load(saved/"features_protein.safetensors").keys == ("A", "B", "C")


def test_the_folder_can_be_read_with_safetensors_and_json_alone(saved):
    assert sorted(p.name for p in saved.iterdir()) == [
        "actions.json", "config.json", "features_protein.safetensors", "genes.json", "model.safetensors"]
    about = json.loads((saved/"config.json").read_text())
    assert about["model"]["d_model"] == SMALL.d_model and about["cells"]["expression_space"] == "log1p"
    assert load_file(saved/"model.safetensors").keys() == BioJEPA(SMALL).state_dict().keys()


def test_saving_again_with_other_features_leaves_none_of_the_old(saved, data):
    save_pretrained(BioJEPA(SMALL), saved, data["adata"].var_names)
    assert not [*saved.glob("features_*")] and from_pretrained(saved).features == ()


# 2

def edit(path, change):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content), indent=1))


def not_a_number(folder):
    state = load_file(folder/"model.safetensors")
    next(t for t in state.values() if t.is_floating_point())[..., 0] = torch.nan
    save_file(state, folder/"model.safetensors")


def resealed(change):
    "A change by somebody who writes the hashes anew: what is left to notice is the content."
    def damage(folder):
        change(folder)
        about = json.loads((folder/"config.json").read_text())
        seal(folder, {k: v for k, v in about.items() if k not in ("format", "hash", "files")})
    return damage


def switch(folder): edit(folder/"config.json", lambda c: c | dict(model=c["model"] | dict(mask_context=False)))
def deeper(folder): edit(folder/"config.json", lambda c: c | dict(model=c["model"] | dict(n_encoder_layers=3)))
def of_before(folder): edit(folder/"config.json", lambda c: c | dict(format=1))
def other_cells(folder): edit(folder/"config.json", lambda c: c | dict(cells=c["cells"] | dict(total=1e6)))
def reversed_genes(folder): edit(folder/"genes.json", lambda g: g[::-1])
def fewer_genes(folder): edit(folder/"genes.json", lambda g: g[1:])
def cut(folder): (folder/"model.safetensors").write_bytes((folder/"model.safetensors").read_bytes()[:-100])


DAMAGES = {
    "no weights": (lambda f: (f/"model.safetensors").unlink(), "model.safetensors: missing"),
    "no actions": (lambda f: (f/"actions.json").unlink(), "actions.json: missing"),
    "no config": (lambda f: (f/"config.json").unlink(), "config.json: missing"),
    "weights cut": (cut, "model.safetensors: damaged"),
    "not json": (lambda f: (f/"config.json").write_text("{"), "config.json: not readable"),
    "list": (lambda f: (f/"config.json").write_text("[]"), "config.json: not the configuration"),
    "format 1": (of_before, "format 2; one that was saved by an earlier version"),
    "switch": (switch, "config.json: its content is not what was written"),
    "cells": (other_cells, "config.json: its content is not what was written"),
    "genes reversed": (reversed_genes, "genes.json: damaged"),
    "NaN": (not_a_number, "model.safetensors: damaged"),
    "features": (lambda f: proteins(23).save(f/"features_protein.safetensors"), "features_protein.* damaged"),
    "more features": (lambda f: proteins().save(f/"features_dna.safetensors"), "features_dna.* does not belong"),
    "NaN, sealed": (resealed(not_a_number), "holds NaN or infinite values"),
    "layers, sealed": (resealed(deeper), "do not fit config.json"),
    "genes, sealed": (resealed(fewer_genes), "found 39 genes"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_nothing_in_the_folder_changes_unnoticed(saved, damage, message):
    from_pretrained(saved)
    damage(saved)
    with pytest.raises(ValueError, match=message): from_pretrained(saved)


def test_every_byte_of_every_file_counts(saved):
    "One flipped bit, in 60 places of all files: each is refused, whichever check it meets."
    rng = np.random.default_rng(0)
    for path in sorted(saved.iterdir()):
        content = path.read_bytes()
        for at in rng.integers(len(content), size=12):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
            with pytest.raises(ValueError): from_pretrained(saved)
        path.write_bytes(content)
    from_pretrained(saved)


def test_weights_that_are_not_numbers_are_not_saved(tmp_path):
    model = BioJEPA(SMALL)
    with torch.no_grad(): model.encoder.stack.norm.weight[0] = torch.inf
    with pytest.raises(ValueError, match="encoder.stack.norm.weight holds NaN or infinite"):
        save_pretrained(model, tmp_path/"model", [f"g{i}" for i in range(G)])
    assert not (tmp_path/"model").exists()


def test_two_equal_folders_are_equal_in_every_byte(saved, data, tmp_path):
    torch.manual_seed(0)
    again = save_pretrained(BioJEPA(SMALL), tmp_path/"again", data["adata"].var_names, ["A+ctrl"], [proteins()],
                            cell_space(data["adata"]))
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in saved.iterdir()}


# 3

def in_scale(adata, change):
    "Cells whose values are a function of what their counts per 10,000 are."
    other = adata.copy()
    del other.layers["counts"]
    other.X = sp.csr_matrix(change(np.expm1(adata.X.toarray().astype(np.float64))), dtype=np.float32)
    return other


SCALES = {
    "log1p twice": lambda x: np.log1p(np.log1p(x)), "per million": lambda x: np.log1p(100*x),
    "fractions": lambda x: x/1e4, "square roots": lambda x: np.log1p(np.sqrt(x)), "per 1,000": lambda x: np.log1p(x/10)
}


@pytest.mark.parametrize("scale", SCALES)
def test_cells_of_another_scale_are_refused(saved, data, scale):
    cells = in_scale(data["adata"], SCALES[scale])
    with pytest.raises(ValueError, match="cells: sum to .* after expm1, .* to 1e\\+04: a factor of"):
        predict(saved, cells, ["A"], proteins(), progress=False)
    same = in_scale(data["adata"], np.log1p)
    assert predict(saved, same, ["A"], proteins(), progress=False).n_obs == 1


def test_states_to_search_for_are_in_the_models_scale_too(saved, data):
    cells = in_scale(data["adata"], SCALES["per million"])
    with pytest.raises(ValueError, match="a factor of 100"): target_state(saved, cells[:9].copy())
    assert target_state(saved, data["adata"][:9].copy()).n_cells == 9


def test_cells_logged_twice_by_prepare_are_refused_by_name(saved, data):
    counts = data["adata"].copy()
    counts.X, counts.uns = counts.layers["counts"], dict(counts.uns)
    counts.uns["biojepa"] = dict(counts.uns["biojepa"], expression_space="counts")
    with pytest.raises(ValueError, match="cells: hold log1p_twice values, the model was trained on log1p"):
        predict(saved, prepare(counts, "log1p_twice"), ["A"], proteins(), progress=False)


def test_answers_are_labelled_with_what_the_model_knows(data, tmp_path):
    "Cells that came logged cannot say what they were scaled to; the model can."
    torch.manual_seed(0)
    model, adata = BioJEPA(SMALL), data["adata"]
    folder = save_pretrained(model, tmp_path/"m", adata.var_names, cells=cell_space(adata)._replace(target_sum=2e4))
    out = predict(folder, adata, ["A"], proteins(), progress=False).uns["biojepa"]
    assert out["values"].startswith("predicted log1p of counts per 20,000;")
    assert json.loads(out["provenance"])["cells"]["target_sum"] == 2e4


def test_a_run_is_asked_about_cells_of_its_own_scale_only(data, tmp_path):
    run = run_stages(small_experiment(epochs=(1, 1, 1, 1)), **data, runs=tmp_path, progress=False)
    about = from_pretrained(run.folder/"model")
    seen = cell_space(data["adata"], Roster(data["adata"], data["split"])["train"].seen)
    assert about.cells == seen and [f["modality"] for f in about.features] == ["protein", "dna"]
    cells = in_scale(data["adata"], SCALES["per million"])
    for ask in (lambda: predict(run, cells, [run.table.genes[0]], progress=False),
                lambda: predictions(run, cells, progress=False)):
        with pytest.raises(ValueError, match="cells: sum to .* a factor of 100, so they are logged or scaled"): ask()


def test_another_kind_of_library_size_is_a_warning(data):
    space, adata = cell_space(data["adata"]), data["adata"].copy()
    history = [str(h).replace("the sum of the counts", "the sum of the logged values") for h in
               adata.uns["biojepa"]["history"]]
    adata.uns["biojepa"] = dict(adata.uns["biojepa"], history=history)
    with pytest.warns(UserWarning, match="log1p of the sum of the logged values, in training of the sum of the counts"):
        check_space(space, adata)


def test_lines_that_express_other_genes_are_in_the_same_scale(data):
    "Half of a cell's counts on genes that the model does not read is no other scale."
    adata = data["adata"]
    check_space(cell_space(adata), in_scale(adata, lambda x: np.log1p(x/2)))


# 4

def test_a_width_of_a_million_is_refused_before_anything_is_made(data, tmp_path):
    huge = small_experiment(d_model=2**20)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"d_model=1048576, n_genes=40 need at least .* GB to be trained, .* are free"):
        run_stages(huge, **data, runs=tmp_path, progress=False)
    assert time.perf_counter() - start < 20 and not [*tmp_path.iterdir()]


def test_a_folder_that_asks_for_too_much_memory_is_refused(saved):
    edit(saved/"config.json", lambda c: c | dict(model=c["model"] | dict(d_model=2**20)))
    about = json.loads((saved/"config.json").read_text())
    seal(saved, {k: v for k, v in about.items() if k not in ("format", "hash", "files")})
    with pytest.raises(ValueError, match="need at least .* GB of memory"): from_pretrained(saved)


def test_presets_are_not_refused():
    for name in ("smoke", "laptop", "paper"): require_memory(preset(name).model, training=True)


def test_the_hash_is_the_hash_of_all_of_it(saved):
    about = json.loads((saved/"config.json").read_text())
    assert about["hash"] == object_hash({k: v for k, v in about.items() if k != "hash"}, 64)
    assert set(about["files"]) == {p.name for p in saved.iterdir()} - {"config.json"}
