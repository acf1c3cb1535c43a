"What peers are given and what is made of their answers; the slow tests train GEARS as shipped."
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from biojepa.core import PATHS
from biojepa.data.datasets import load_dataset
from biojepa.data.network import SimulationSpec
from biojepa.data.preprocess import prepare
from biojepa.data.simulate import simulate_perturb_seq
from biojepa.data.splits import make_split
from biojepa.evaluate.metrics import pds
from biojepa.predict import peers
from biojepa.predict.methods import run_baselines
from biojepa.predict.outside import outside_answers, read_answer, task_of, write_task
from biojepa.predict.peers import Gears, coexpression, gears_predictions, relation_graph
from biojepa.predict.sets import pseudobulk, test_set
from biojepa.predict.told import told


def screen(**options):
    cells = simulate_perturb_seq(
        SimulationSpec(**(dict(n_genes=120, n_cells=900, n_targets=16, n_modules=4, seed=2) | options)))
    return prepare(load_dataset(cells, batch="batch", cell_type="cell_type", guide="guide_id"))


def holding(adata, val=True):
    names = sorted(set(adata.obs["condition"]) - {"ctrl"})
    return make_split(adata,
                      kind="custom",
                      held_out=dict(train=names[7:], val=names[5:7] if val else [], test=names[:5]),
                      allow_empty_val=not val)


@pytest.fixture(scope="module")
def adata(): return screen()


@pytest.fixture
def spy(monkeypatch):
    "Stands for cell-gears: remembers what it was given, answers with the number of the first node."
    seen = {}

    class Network(torch.nn.Module):
        def forward(self, batch):
            seen.setdefault("asked", []).extend(batch.pert_idx)
            x = batch.x.reshape(len(batch.pert_idx), -1)
            return x + torch.tensor([float(sum(p)) for p in batch.pert_idx])[:, None]

    def fake(task, *settings):
        seen.update(task._asdict(), settings=settings)
        return Network(), [2., 1., 3.]
    monkeypatch.setattr(peers, "_gears", fake)
    return seen


# ---- graphs ----

def slow_graph(relations, genes, k, above):
    "Sets, gene by gene."
    near = {}
    for a, b in relations[["a", "b"]].itertuples(index=False):
        near.setdefault(a, {a}).add(b); near.setdefault(b, {b}).add(a)
    nodes, edges = sorted(g for g in set(genes) if g in near), {}
    for t in nodes:
        weights = sorted(((len(near[s] & near[t])/len(near[s] | near[t]), s) for s in nodes), reverse=True)
        edges |= {(s, t): w for w, s in weights[:k + 1] if w > above}
    return edges


def test_relation_graph_is_jaccard_of_neighbours():
    rng = np.random.default_rng(0)
    relations = pd.DataFrame(rng.choice([f"g{i}" for i in range(25)], (60, 2)),
                             columns=["a", "b"]).assign(db="x")
    genes = [f"g{i}" for i in range(20)] + ["unrelated"]
    found = relation_graph(relations, genes, k=50, above=.1)
    assert found.set_index(["source", "target"])["importance"].to_dict() == pytest.approx(
        slow_graph(relations, genes, 50, .1))
    assert "unrelated" not in set(found["source"])
    fewer = relation_graph(relations, genes, k=3, above=.1)
    assert fewer.groupby("target").size().max() == 4 and (fewer["source"] == fewer["target"]).sum() == 20
    pd.testing.assert_frame_equal(
        found,
        relation_graph(pd.concat([relations, relations.rename(columns=dict(a="b", b="a"))]), genes, k=50))


def test_relation_graph_refuses():
    with pytest.raises(ValueError, match=r"found columns \['gene'\]"):
        relation_graph(pd.DataFrame(dict(gene=["A"])), ["A"])
    with pytest.raises(ValueError, match="none of the 1 genes wanted"):
        relation_graph(pd.DataFrame(dict(a=["A"], b=["B"])), ["ENSG1"])


def test_coexpression_is_pearsons(adata):
    X = adata.X.toarray().astype(float)
    X[:, 3] = 0
    found = coexpression(sp.csr_matrix(X.astype(np.float32)), block=111)
    with np.errstate(invalid="ignore"): naive = np.abs(np.nan_to_num(np.corrcoef(X.T)))
    assert np.abs(found - naive).max() < 1e-4 and (found[3] == 0).all()


# ---- what it is given ----

def test_test_cells_are_never_given(adata, spy):
    split = holding(adata)
    gears_predictions(test_set(adata, split), adata, split)
    test = split.cells(adata, "test")
    given = [np.r_[m.rows, m.base] for m in (spy["train"], spy["val"])]
    assert not np.isin(np.concatenate(given), test).any()
    assert set(spy["train"].label) == set(split.train) | {"ctrl"} and set(spy["val"].label) == set(split.val)
    assert set(spy["expressed"]) == set(split.train)


def test_changed_test_cells_change_nothing(adata, spy):
    split = holding(adata)
    template = test_set(adata, split)
    gears_predictions(template, adata, split)
    before = dict(spy)
    other = adata.copy()
    x = other.X.toarray(); x[split.cells(adata, "test")] = 7.; other.X = sp.csr_matrix(x)
    gears_predictions(template, other, split)
    for a, b in zip(before["graphs"], spy["graphs"]): pd.testing.assert_frame_equal(a, b)
    assert before["train"].top == spy["train"].top and (before["train"].base == spy["train"].base).all()
    assert (before["control"] == spy["control"]).all()


def test_differential_genes_are_welchs(adata, spy):
    split = holding(adata)
    gears_predictions(test_set(adata, split), adata, split)
    control = adata.X[split.controls(adata, "train")].toarray().astype(float)
    for condition in split.train[:3]:
        x = adata.X[np.flatnonzero(adata.obs["condition"] == condition)].toarray().astype(float)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            t = np.abs(stats.ttest_ind(x, control, equal_var=False).statistic)
        assert set(spy["train"].top[condition]) == set(np.argsort(-np.nan_to_num(t), kind="stable")[:20])
        assert spy["expressed"][condition].tolist() == np.flatnonzero(x.sum(0)).tolist()


def test_pairs_are_of_one_line(spy):
    adata = screen(n_cell_types=2, n_batches=2)
    split = holding(adata)
    gears_predictions(test_set(adata, split), adata, split)
    line, control = adata.obs["cell_type"].to_numpy(), (adata.obs["condition"] == "ctrl").to_numpy()
    for m in (spy["train"], spy["val"]):
        assert (line[m.rows] == line[m.base]).all() and control[m.base].all()
    itself = spy["train"].label == "ctrl"
    assert itself.sum() == control.sum() and (spy["train"].rows[itself] == spy["train"].base[itself]).all()
    assert not (spy["val"].label == "ctrl").any()


def test_batches(adata, spy):
    split = holding(adata)
    gears_predictions(test_set(adata, split), adata, split)
    train, seen = spy["train"], []
    loader = peers._Loader(train, 32, np.random.default_rng(0), train=True)
    first, second, third = ([b for b in loader] for _ in range(3))
    assert (len(first), len(second), len(third)) == (len(train.rows)//32, 1, len(train.rows)//32)
    for batch in first:
        assert batch.x.shape == (32*adata.n_vars, 1) and batch.y.shape == (32, adata.n_vars)
        assert [train.nodes[c]
                for c in batch.pert] == batch.pert_idx and all(len(d) == 20 for d in batch.de_idx)
        seen += batch.pert
    val = peers._Loader(spy["val"], 32, np.random.default_rng(0))
    rows = np.concatenate([b.y.numpy() for b in val])
    assert len(rows) == len(spy["val"].rows) == sum(len(b.pert)
                                                    for b in val)  # every validation cell, in every pass
    assert np.sort(rows.sum(1)) == pytest.approx(np.sort(
        np.asarray(adata.X[spy["val"].rows].sum(1)).ravel()),
                                                 rel=1e-5)


# ---- what is made of its answers ----

def test_answers_are_read_by_condition(adata, spy):
    split = holding(adata)
    template = test_set(adata, split)
    found = gears_predictions(template, adata, split)
    number = {g: i for i, g in enumerate(spy["nodes"])}
    expected = [number[c.removesuffix("+ctrl")] for c in template.groups["condition"]]
    assert found.delta == pytest.approx(np.tile(np.array(expected, float)[:, None], (1, adata.n_vars)))
    assert found.name == "gears" and found.provenance["best_epoch"] == 2 and found.provenance[
        "outside_graph"] == []
    assert template.name == "control_mean" and (template.delta == 0).all()


def test_outside_the_graph_is_the_train_mean_by_name(adata, spy):
    split = holding(adata)
    template = test_set(adata, split)
    genes = [
        g for g in adata.var_names
        if g != split.test[0].removesuffix("+ctrl") and g != split.train[0].removesuffix("+ctrl")
    ]
    relations = pd.DataFrame(dict(a=genes, b=genes[1:] + genes[:1]))
    found = gears_predictions(template, adata, split, relations)
    assert found.provenance["outside_graph"] == [
        split.test[0].removesuffix("+ctrl")
    ] and found.provenance["n_fallback"] == 1 and found.provenance["fallback"] == "train mean"
    missed = (found.groups["condition"] == split.test[0]).to_numpy()
    assert missed.any() and (found.delta[missed]
                             == template.train_delta).all() and (found.delta[~missed]
                                                                 != template.train_delta).any(1).all()
    assert split.train[0] not in set(spy["train"].label)  # GEARS cannot learn from it either


def test_combinations_have_two_nodes(spy):
    adata = screen(n_doubles=6, n_cells=1200)
    doubles = sorted(c for c in set(adata.obs["condition"]) if "+" in c and not c.endswith("+ctrl"))
    rest = sorted(set(adata.obs["condition"]) - {"ctrl"} - set(doubles[:2]))
    split = make_split(adata, kind="custom", held_out=dict(train=rest, test=doubles[:2]), allow_empty_val=True)
    found = gears_predictions(test_set(adata, split), adata, split)
    number = {g: i for i, g in enumerate(spy["nodes"])}
    assert [sorted(a) for a in spy["asked"]] == [sorted(number[g] for g in c.split("+")) for c in doubles[:2]]
    assert any(len(n) == 2 for n in spy["train"].nodes.values()) and found.provenance["n_fallback"] == 0


def test_without_validation_a_tenth_is_spared(adata, spy):
    split = holding(adata, val=False)
    found = gears_predictions(test_set(adata, split), adata, split)
    assert found.provenance["spare_validation"] and len(set(spy["val"].label)) == 1
    assert not set(spy["val"].label) & set(spy["train"].label)


def test_refusals(adata, spy):
    split = holding(adata)
    template = test_set(adata, split)
    with pytest.raises(ValueError, match="are not the template's 120"):
        gears_predictions(template, adata[:, ::-1], split)
    with pytest.raises(ValueError, match="epochs: found 0"):
        gears_predictions(template, adata, split, settings=Gears(epochs=0))
    with pytest.raises(ValueError, match="batch_size: found 1; give at least 2"):
        gears_predictions(template, adata, split, settings=Gears(batch_size=1))


# ---- the shipped network ----

@pytest.mark.slow
def test_gears_leaves_no_trace_and_repeats(adata, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split = holding(adata)
    template, settings = test_set(adata, split), Gears(epochs=2, hidden=8)
    torch.manual_seed(5); np.random.seed(5); random.seed(5)
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    filters = list(warnings.filters)
    first = gears_predictions(template, adata, split, settings=settings, progress=False)
    assert torch.equal(states[0], torch.get_rng_state()) and (
        states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()
    assert warnings.filters == filters and os.listdir(tmp_path) == []
    again = gears_predictions(template, adata, split, settings=settings, progress=False)
    assert first.delta == pytest.approx(again.delta, abs=1e-6) and len(
        first.provenance["validation_error"]) == 2
    other = gears_predictions(template, adata, split, settings=settings._replace(seed=1), progress=False)
    assert np.abs(first.delta - other.delta).max() > 1e-3


@pytest.mark.slow
def test_gears_answer_does_not_depend_on_the_control_cell(adata, monkeypatch):
    split, networks = holding(adata), []
    keep = peers._gears
    monkeypatch.setattr(peers, "_gears", lambda *a: networks.append(keep(*a)) or networks[-1])
    gears_predictions(test_set(adata, split), adata, split, settings=Gears(epochs=1, hidden=8), progress=False)
    network = networks[0][0]
    nodes, cells = [[3], [5, 9], [40]], adata.X[split.controls(adata, "test")[:3]].toarray()
    empty = peers._ask(network, nodes, adata.n_vars, torch.device("cpu"))
    for cell in cells:
        assert peers._ask(network, nodes, adata.n_vars, torch.device("cpu"),
                          x=cell) == pytest.approx(empty, abs=1e-5)
    assert peers._ask(network, nodes, adata.n_vars, torch.device("cpu"),
                      batch_size=1) == pytest.approx(empty, abs=1e-5)


@pytest.mark.slow
def test_gears_learns_what_it_sees():
    "After four epochs the training conditions themselves are told apart."
    adata = screen(n_cells=2000, effect_size=3.)
    split = holding(adata)
    template = test_set(adata, split, part="train")
    found = gears_predictions(template, adata, split, settings=Gears(epochs=4, batch_size=8), progress=False)
    pb = pseudobulk(found)
    r = [np.corrcoef(p, o)[0, 1] for p, o in zip(pb.predicted, pb.observed)]
    assert np.mean(r) > .5 and np.mean(pds(pb)) > .7

# ---- peers with an environment of their own ----

STUB = '''
import json, sys
from pathlib import Path
import anndata as ad, numpy as np, pandas as pd
folder = Path(sys.argv[1])
cells, asked = ad.read_h5ad(folder/"cells.h5ad"), pd.read_csv(folder/"questions.csv", dtype=str)
x = pd.DataFrame(cells.X.toarray().astype(float), cells.obs_names, cells.var_names)
control = x[cells.obs["part"] == "control"].groupby(cells.obs["cell_type"], observed=True).mean()
seen = x[cells.obs["part"] == "train"].groupby([cells.obs["condition"], cells.obs["cell_type"]], observed=True).mean()
change = (seen - control.loc[seen.index.get_level_values(1)].to_numpy()).mean()
mean = control.loc[asked["cell_type"]].to_numpy() + change.to_numpy()
shuffled = np.random.default_rng(0).permutation(cells.n_vars)
answer = ad.AnnData(mean[::-1], obs=asked[["condition", "cell_type"]][::-1], var=cells.var)[:, shuffled].copy()
answer.uns |= dict(task=json.loads((folder/"task.json").read_text())["task"], name="state, stub", package="stub 1",
                   seconds=1.5, peak_gb=.25, settings=json.dumps(dict(steps=0)))
(folder/"stub").mkdir()
answer.write_h5ad(folder/"stub"/"answer.h5ad")
'''


@pytest.fixture(scope="module")
def elsewhere(adata, tmp_path_factory):
    "A task, its template, and the folder in which a stub has answered in a process of its own."
    split = holding(adata)
    template = test_set(adata, split)
    folder = write_task(tmp_path_factory.mktemp("task"), template, adata, split)
    subprocess.run([sys.executable, "-c", STUB, folder], check=True)
    return SimpleNamespace(adata=adata, split=split, template=template, folder=folder)


@pytest.fixture
def changed(elsewhere, tmp_path):
    "Reads the stub's answer after a change."
    def read(change=lambda a: a, template=elsewhere.template, **said):
        answer = change(ad.read_h5ad(elsewhere.folder/"stub"/"answer.h5ad")).copy()
        answer.uns = {k: v for k, v in (answer.uns | said).items() if v is not None}
        answer.write_h5ad(tmp_path/"answer.h5ad")
        return read_answer(tmp_path/"answer.h5ad", template)
    return read


def test_an_answer_from_elsewhere_scores_as_our_own(elsewhere):
    given = elsewhere.template, elsewhere.adata, elsewhere.split
    (found,), own = outside_answers(elsewhere.folder, elsewhere.template), run_baselines(*given, only=["train_mean"])
    own = own["train_mean"]
    assert found.name == "state, stub" and found.provenance["peer"] == "stub 1"
    assert (found.provenance["seconds"], found.provenance["peak_gb"]) == (1.5, .25)
    for field in ("observed", "control", "cells", "groups", "control_mean", "genes"):
        assert getattr(found, field) is getattr(elsewhere.template, field)
    assert found.delta == pytest.approx(own.delta, abs=1e-6) and np.abs(own.delta).max() > .1
    assert np.asarray(pds(pseudobulk(found))) == pytest.approx(np.asarray(pds(pseudobulk(own))), abs=1e-5)
    told(found.name)


def test_what_is_asked_about_cannot_be_read(elsewhere):
    cells = ad.read_h5ad(elsewhere.folder/"cells.h5ad")
    part = cells.obs["part"].astype(str).to_numpy()
    assert set(part) == {"train", "val", "test", "control"}
    assert not cells.X[part == "test"].count_nonzero()
    rest = cells[part != "test"]
    assert (rest.X != elsewhere.adata[rest.obs_names].X).count_nonzero() == 0
    asked = pd.read_csv(elsewhere.folder/"questions.csv")
    assert set(asked["condition"]) == set(elsewhere.split.test) == set(cells.obs["condition"][part == "test"])
    assert asked["n_cells"].sum() == (part == "test").sum()
    on_disk = set((elsewhere.folder).glob("*"))
    assert {p.name for p in on_disk} == {"cells.h5ad", "questions.csv", "split.json", "task.json", "stub"}


def test_an_answer_is_refused_by_name(elsewhere, changed):
    assert changed().name == "state, stub"
    first = elsewhere.template.genes[0]
    with pytest.raises(ValueError, match=rf"lacks 1 of 120 genes \({first}\)"):
        changed(lambda a: a[:, a.var_names != first])
    with pytest.raises(ValueError, match="no answer for .* in line1"): changed(lambda a: a[1:])
    def doubled(a): return ad.concat([a, a[:1]], merge="same", uns_merge="same", index_unique="-")
    with pytest.raises(ValueError, match="obs has .* twice"): changed(doubled)
    def spoiled(a): a.X[0, 3] = np.nan; return a
    with pytest.raises(ValueError, match="X has 1 NaN"): changed(spoiled)
    with pytest.raises(ValueError, match="obs lacks cell_type"):
        changed(lambda a: ad.AnnData(a.X, a.obs[["condition"]], a.var, a.uns))
    with pytest.raises(ValueError, match="uns lacks peak_gb"): changed(peak_gb=None)
    with pytest.raises(ValueError, match="seconds.* is .*nan"): changed(seconds=np.nan)
    with pytest.raises(ValueError, match="settings.* is not JSON"): changed(settings="small")
    with pytest.raises(ValueError, match="name.* is empty"): changed(name=" ")


def test_an_answer_to_another_run_is_refused(elsewhere, changed):
    "Another part, another split, other values: each is another question."
    adata, split = elsewhere.adata, elsewhere.split
    assert changed(template=test_set(adata, split, seed=3)).name == "state, stub"
    other, doubled = holding(adata, val=False), adata.copy()
    doubled.X = doubled.X*2
    for template in (test_set(adata, split, "val"), test_set(adata, other), test_set(doubled, split)):
        with pytest.raises(ValueError, match=f"answers task {task_of(elsewhere.template)}, this run asks"):
            changed(template=template)


def test_answers_of_a_folder(elsewhere, tmp_path):
    with pytest.raises(ValueError, match="holds no answer.h5ad"): outside_answers(tmp_path, elsewhere.template)
    for name in ("a", "b"):
        (tmp_path/name).mkdir()
        shutil.copy(elsewhere.folder/"stub"/"answer.h5ad", tmp_path/name)
    with pytest.raises(ValueError, match="two answers are named 'state, stub'"):
        outside_answers(tmp_path, elsewhere.template)
    alone, = outside_answers(tmp_path/"a", elsewhere.template)
    assert alone.name == "state, stub"


SCRIPTS = [PATHS.root/"peers"/f"{name}.py" for name in ("cpa", "state")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_peers_script_stands_alone(script):
    "It says what can be set without its package, imports nothing of ours, and its environment is pinned."
    imported = {name.split(".")[0] for node in ast.walk(ast.parse(script.read_text(), feature_version=(3, 11)))
                for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else
                             [node.module] if isinstance(node, ast.ImportFrom) else [])}
    assert "biojepa" not in imported
    said = subprocess.run([sys.executable, script, "--help"], check=True, capture_output=True, text=True).stdout
    assert "folder" in said and "--seed" in said
    lock = [line for line in script.with_suffix(".lock").read_text().splitlines() if not line.startswith("#")]
    assert len(lock) > 20 and all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", line) for line in lock)
