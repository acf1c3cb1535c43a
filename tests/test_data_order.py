"""The order of cells and genes in a file means nothing.

1. A place by name is one of n, whatever the order, and looks random.
2. A simulated screen and the same screen with cells and genes permuted give the same batches, pairs, test sets, halves,
   baselines and variable genes, cell by cell and gene by gene.
3. They train the same model, to rounding: as released, and with the memory and the switches of the default run."""
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest

from biojepa.config import preset
from biojepa.data.controls import by_name, match_controls, name_ranks
from biojepa.data.datasets import load_dataset
from biojepa.data.loaders import Roster, cell_loader, pair_loader
from biojepa.data.network import SimulationSpec
from biojepa.data.preprocess import prepare
from biojepa.data.simulate import simulate_perturb_seq
from biojepa.data.splits import make_split
from biojepa.evaluate import cases, retrieval, sheets
from biojepa.evaluate.counted import count_responses, replicate_responses
from biojepa.evaluate.uncertainty import dealt_variance, error_and_variance, uncertainty_table
from biojepa.explore import representations
from biojepa.explore.gene_probes import gene_probe
from biojepa.explore.probes import label_parts
from biojepa.explore.released import random_vectors
from biojepa.explore.screen import draw_source
from biojepa.model.biojepa import BioJEPA
from biojepa.predict import anndata as predict_module, peers
from biojepa.predict.baselines import additive, half_of_the_cells, train_mean, with_own_gene
from biojepa.predict.model import predictions
from biojepa.predict.sets import test_set as held_out_set  # a name that pytest does not collect
from biojepa.training.run import STAGES, run_stages

sys.path.insert(0, str(Path(__file__).parent))
from training_cases import OPTIONS, small_data, small_experiment


@pytest.fixture(scope="module")
def loaded():
    spec = SimulationSpec(n_genes=80, n_cells=900, n_targets=12, n_modules=4, n_batches=3)
    return load_dataset(simulate_perturb_seq(spec), unknown_targets="allow")


@pytest.fixture(scope="module", params=["cells", "genes", "both"])
def two(loaded, request):
    "The screen and its permutation, prepared, and a split of each."
    rng, names = np.random.default_rng(5), sorted(set(loaded.obs["condition"]) - {"ctrl"})
    cells, genes = np.arange(loaded.n_obs), np.arange(loaded.n_vars)
    if request.param != "genes": cells = rng.permutation(cells)
    if request.param != "cells": genes = rng.permutation(genes)
    parts = dict(train=names[:7], val=names[7:9], test=names[9:])
    screens = prepare(loaded), prepare(loaded[cells][:, genes].copy())
    return [(a, make_split(a, "custom", held_out=parts)) for a in screens]


def by_gene(adata, x): return pd.DataFrame(np.asarray(x), columns=adata.var_names).sort_index(axis=1).to_numpy()


def same(make, two, exact=True):
    "What `make` says of both, which must be equal."
    one, other = (make(adata, split) for adata, split in two)
    for a, b in zip(one, other, strict=True):
        if exact: np.testing.assert_array_equal(a, b)
        else: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- names
# -----------------------------------------------------------------------------------------------------------

def test_a_place_by_name_follows_the_name_and_looks_random():
    names = np.array([f"cell{i}" for i in range(5000)])
    rank, order = name_ranks(names), np.random.default_rng(0).permutation(5000)
    np.testing.assert_array_equal(np.sort(rank), np.arange(5000))
    np.testing.assert_array_equal(name_ranks(names[order]), rank[order])
    assert abs(np.corrcoef(rank, np.arange(5000))[0, 1]) < 4/5000**.5
    assert kstest(rank[:500]/5000, "uniform").pvalue > 1e-3
    assert name_ranks(["b", "a"]).tolist() == [1 - x for x in name_ranks(["a", "b"]).tolist()]
    assert len(name_ranks([])) == 0


def test_rows_by_name_are_the_same_rows(loaded):
    rows = np.arange(3, 400, 2)
    found = by_name(loaded, rows)
    np.testing.assert_array_equal(np.sort(found), rows)
    np.testing.assert_array_equal(by_name(loaded, rows[::-1]), found)
    np.testing.assert_array_equal(by_name(loaded, rows, name_ranks(loaded.obs_names)), found)


# --- two orders of one screen
# --------------------------------------------------------------------------------------

@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("fixed", [False, True])
def test_training_batches_hold_the_same_pairs(two, part, fixed):
    def batches(adata, split):
        loader = pair_loader(adata, split, part, batch_size=32, seed=2, fixed_controls=fixed, training=True)
        for epoch in (0, 3):
            loader.set_epoch(epoch)
            for b in loader:
                yield from (adata.obs_names[b.pert].tolist(), adata.obs_names[b.ctrl].tolist())
                yield from (by_gene(adata,
                                    b.x_pert), by_gene(adata,
                                                       b.x_ctrl), b.log_library_size_ctrl, b.perturbation)
    same(batches, two)


def test_evaluation_pairs_each_cell_with_the_same_control(two):
    def pairs(adata, split):
        batches = list(pair_loader(adata, split, "test", batch_size=50, seed=2))
        rows = (torch.cat([getattr(b, name) for b in batches]) for name in ("pert", "ctrl"))
        return zip(*sorted(zip(*(adata.obs_names[r] for r in rows))))
    same(pairs, two)


@pytest.mark.parametrize("options", [dict(part="train"), dict(part="val", training=True, with_controls=True)])
def test_batches_of_cells_are_the_same(two, options):
    def batches(adata, split):
        for b in cell_loader(adata, split, batch_size=64, seed=4, **options):
            yield from (adata.obs_names[b.cell].tolist(), by_gene(adata, b.x))
    same(batches, two)
    same(lambda adata, split: [adata.obs_names[next(iter(cell_loader(adata, seed=1))).cell].tolist()], two)


def test_a_roster_and_a_split_draw_alike(two):
    for adata, split in two:
        a, b = (next(iter(pair_loader(adata, s, batch_size=20, seed=1))) for s in (Roster(adata, split), split))
        assert torch.equal(a.ctrl, b.ctrl) and torch.equal(a.pert, b.pert)


def test_pools_hold_their_controls_in_one_order(two):
    def pools(adata, split):
        p = match_controls(adata, split.cells(adata, "train"), split.controls(adata, "train"))
        of = lambda start, n: adata.obs_names[p.pool[start:start + n]].tolist()
        found = {adata.obs_names[c]: of(start, n) for c, start, n in zip(p.cells, p.start, p.size)}
        return [sorted(found), *(found[k] for k in sorted(found))]
    same(pools, two)


def test_test_sets_and_baselines_say_the_same(two):
    def answers(adata, split):
        template = held_out_set(adata, split, "test", seed=3)
        yield template.cells.sort_index()["control"].tolist()
        methods = [template, train_mean(template, adata, split), additive(template, adata, split),
                   with_own_gene(train_mean(template, adata, split), adata, split)]
        for ps in (*methods, half_of_the_cells(template, adata, split, seed=1)):
            yield ps.groups.drop(columns="n_cells").to_numpy().astype(str).tolist()
            for x in (ps.delta, ps.control_mean): yield by_gene(adata, x).round(6).tolist()
    one, other = (list(answers(adata, split)) for adata, split in two)
    for a, b in zip(one, other, strict=True):
        if isinstance(a[0], list) and isinstance(a[0][0], float): np.testing.assert_allclose(a, b, atol=3e-6)
        else: assert a == b


DRAWS = dict(
    controls_of_predict=lambda a, s: predict_module._draw_controls(a, predict_module.PredictOptions(n_cells=7)),
    controls_of_a_sheet=lambda a, s: sheets.some_controls(a, s, "test", a.obs["cell_type"].iloc[0], 9, 0),
    first_halves=lambda a, s: s.cells(a, "train")[retrieval._first_half(a, s.cells(a, "train"), "condition", 0)],
    cells_of_a_component=lambda a, s: representations._some(a, s.cells(a, "train"), 50, 0),
    probed_cells=lambda a, s: representations.probed_cells(a, s, "train", 60, 0)[0],
    controls_of_gears=lambda a, s: peers._task(a, s, None, ["G001+ctrl"], peers.Gears())[0].train.base[:60])


@pytest.mark.parametrize("name", DRAWS)
def test_draws_from_rows_follow_names(two, name):
    one, other = ([*a.obs_names[DRAWS[name](a, s)]] for a, s in two)
    if name in ("probed_cells", "controls_of_gears"): assert one == other   # in this order
    assert sorted(one) == sorted(other) and len(set(one)) > 5


def test_cells_that_are_probed_are_dealt_to_the_same_parts(two):
    def dealt(adata, split):
        rows, _ = representations.probed_cells(adata, split, "train", 100, 0)
        return [f"{n} {p}" for n, p in zip(adata.obs_names[rows], label_parts(adata.obs["condition"].iloc[rows]))],
    same(dealt, two)


def test_a_search_starts_from_the_same_cells(two):
    found = [draw_source(adata, 12, 0) for adata, _ in two]
    one, other = (np.sort(x.numpy().sum(1)) for x, _ in found)
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_sketches_of_latents_and_shares_of_genes_follow_names(two):
    def seen(adata, split):
        small = preset("smoke").model.changed(n_genes=adata.n_vars, library_norm=(8., 1.))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = BioJEPA(small).follow_names_(adata.var_names)
        rows = by_name(adata, np.arange(adata.n_obs))
        z = representations.latent_components(model, adata, rows[:20], rows[20:200], 3, 100)
        return np.abs(z), sorted(cases.some_genes(adata, .3, 1).var_names)
    one, other = (seen(*x) for x in two)
    np.testing.assert_allclose(one[0], other[0], atol=1e-3*one[0].max())
    assert one[1] == other[1]


def test_counts_of_a_prediction_and_of_halves_are_drawn_by_name(two):
    def counted(adata, split):
        template = held_out_set(adata, split, "test", seed=3)
        said = count_responses(train_mean(template, adata, split), adata, split)
        half = replicate_responses(template, adata, split)
        for side in (said.predicted, half.predicted, half.observed):
            p = side.profiles["summed counts"]
            yield from (by_gene(adata, p.mean), by_gene(adata, np.nan_to_num(side.calls[0])))
    same(counted, two, exact=False)


def test_chance_of_uncertainty_follows_names(two):
    "What variances dealt anew would know, and the deal itself."
    def asked(adata, split):
        ps = train_mean(held_out_set(adata, split), adata, split)
        said = replace(ps, variance=.1 + (ps.control.toarray() - ps.observed.toarray())**2)
        dealt = dealt_variance(said, 3)
        by_cell = pd.Series(dealt.variance.sum(1), dealt.cells.index).sort_index()
        return uncertainty_table(error_and_variance(said), n=20).iloc[:, 3:], by_cell
    same(asked, two, exact=False)


def test_random_vectors_follow_names():
    names = [f"G{i}" for i in range(30)]
    order = np.random.default_rng(0).permutation(30)
    x, again = random_vectors(names, 5, 1), random_vectors([names[i] for i in order], 5, 1)
    np.testing.assert_array_equal(x[order], again)
    assert abs(x.std() - 1) < .2 and not np.allclose(x, random_vectors(names, 5, 2))


def test_folds_of_a_probe_of_genes_follow_names(two):
    def asked(adata, split):
        level = pd.Series(np.asarray(adata.X.mean(0)).ravel(), adata.var_names)
        x = dict(level=level.to_numpy()[:, None])
        return gene_probe(x, level, "level", n_shuffles=1, n_draws=20, progress=False).genes
    pd.testing.assert_frame_equal(*(asked(*x) for x in two), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", ["counts", "log1p"])
def test_variable_genes_are_the_same(loaded, values):
    "Of logarithms, twenty genes are copies of others, so that equals have to be told apart by name."
    adata = loaded.copy()
    if values == "log1p":
        adata.X[:, 60:] = adata.X[:, 40:60]
        adata.X = prepare(adata).X
        adata.uns["biojepa"] = {**adata.uns["biojepa"], "expression_space": "log1p"}
    order = np.random.default_rng(1).permutation(adata.n_vars)
    names = sorted(set(adata.obs["condition"]) - {"ctrl"})
    split = make_split(adata, "custom", held_out=dict(train=names[2:], val=names[:1], test=names[1:2]))
    for n in (5, 40) if values == "counts" else range(1, 60, 3):
        kept = [set(prepare(a, n_top_genes=n, split=split).var_names) for a in (adata, adata[:, order].copy())]
        assert kept[0] == kept[1] and len(kept[0]) == n


# --- two orders of one training
# --------------------------------------------------------------------------------------

def small_default():
    "The laptop's switches, memory and stages at the size of `small_experiment`; all that is learned is kept."
    e, small = preset("laptop"), small_experiment()
    sizes = ("n_genes", "d_model", "n_heads", "n_encoder_layers", "n_masked_predictor_layers", "n_predictor_layers",
             "d_action", "d_mode", "d_chemical", "d_protein", "d_dna")
    e = e.changed(model=e.model.changed(**{k: getattr(small.model, k) for k in sizes}))
    stages = {s: getattr(e, s).changed(batch_size=16, epochs=2, lr=1e-3) for s in STAGES}
    return e.changed(**stages | dict(dynamics=stages["dynamics"].changed(keeps="all")))


@pytest.mark.filterwarnings("ignore:latents collapse")
@pytest.mark.parametrize("make", [small_experiment, small_default])
def test_a_trained_model_predicts_the_same(make, tmp_path):
    "As drawn by position, the two orders of genes correlated with r = 0.06 here."
    data, rng, found = small_data(), np.random.default_rng(5), []
    adata = data.pop("adata")
    permuted = adata[rng.permutation(adata.n_obs)][:, rng.permutation(adata.n_vars)].copy()
    for name, screen in dict(one=adata, other=permuted).items():
        run = run_stages(make(), screen, **data, runs=tmp_path/name, **OPTIONS)
        ps = predictions(run, progress=False)
        delta = pd.DataFrame(ps.delta, ps.groups["perturbation"].astype(str), ps.genes)
        found.append((delta.sort_index().sort_index(axis=1), run.log.select_dtypes("number")))
    (one, log), (other, again) = found
    assert (one.index == other.index).all() and (one.columns == other.columns).all()
    np.testing.assert_allclose(one, other, atol=2e-4*one.abs().max().max())
    trained = log.drop(columns="cells_per_second")
    pd.testing.assert_frame_equal(trained, again[trained.columns], rtol=1e-3, atol=1e-4)
