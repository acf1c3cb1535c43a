"""Weighted errors and the interpolated duplicate.

1. t against all other cells is scanpy's, weights follow their formula, one cell and constant genes get none.
2. WMSE is a weighted mean, R²w is scikit-learn's; the train mean is at 0 or below.
3. The duplicate reads no cell it is judged on, is the half where a response is sure and the mean where there is none.
4. A weighted metric has more room between a mean and a repeat than a plain one."""
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from scipy import stats
from screens import held_out_screen
from sklearn.metrics import r2_score

from biojepa.data.network import SimulationSpec
from biojepa.evaluate.challenge import CHALLENGE
from biojepa.evaluate.metrics import METRICS, evaluate
from biojepa.evaluate.weighted import (
    dynamic_range, field_scores, field_table, interpolated_duplicate, moments, r2_weighted, response_weights,
    t_against_others, wmse
)
from biojepa.predict.baselines import HalvesError, half_of_the_cells, train_mean
from biojepa.predict.sets import pseudobulk, test_set


@pytest.fixture(scope="module")
def case():
    spec = dict(n_genes=120, n_cells=2400, n_targets=24, n_cell_types=2, n_modules=6, effect_size=.7, seed=4)
    return held_out_screen(SimulationSpec(**spec), 8)


def test_t_is_that_of_scanpy():
    rng = np.random.default_rng(0)
    X = sp.csr_matrix(rng.poisson(1, (90, 25)).astype(np.float32))
    code = np.repeat([0, 1, 2, -1], [20, 30, 10, 30])
    t, p = t_against_others(X[:60], code[:60], 3, moments(X, np.arange(60, 90)))
    cells = AnnData(X,
                    obs=pd.DataFrame(dict(group=pd.Categorical(code.astype(str))),
                                     index=np.arange(90).astype(str)))
    sc.tl.rank_genes_groups(cells,
                            "group",
                            groups=["0", "1", "2"],
                            method="t-test_overestim_var",
                            reference="rest")
    for g in "012":
        found = sc.get.rank_genes_groups_df(cells, g).set_index("names")
        np.testing.assert_allclose(t[int(g)], found["scores"].reindex(cells.var_names), rtol=1e-4)
        np.testing.assert_allclose(p[int(g)], found["pvals"].reindex(cells.var_names), rtol=1e-4)


def test_one_cell_and_constant_genes_are_not_tested():
    X = np.random.default_rng(1).poisson(2, (12, 5)).astype(np.float32)
    X[:, 0] = 3
    t, p = t_against_others(sp.csr_matrix(X), np.r_[0, np.ones(11, int)], 2)
    assert (t == 0).all() and (p == 1).all()    # the other group's rest is one cell
    t, p = t_against_others(sp.csr_matrix(X), np.repeat([0, 1], 6), 2)
    assert (t[:, 0] == 0).all() and (t[:, 1:] != 0).all()


def test_weights_by_hand(case):
    adata, split, template = case
    weights, bulk = response_weights(template, adata), pseudobulk(template)
    np.testing.assert_allclose(weights.sum(1), 1)
    X, obs = adata.to_df(), adata.obs
    for i in (0, 9):
        condition, line = bulk.conditions.loc[i, ["condition", "cell_type"]]
        here = (obs["cell_type"] == line) & (obs["condition"] != "ctrl")
        a, b = X[here & (obs["condition"] == condition)], X[here & (obs["condition"] != condition)]
        size = np.abs((a.mean() - b.mean())/np.sqrt((a.var() + b.var())/len(a))).to_numpy()
        w = ((size - size.min())/(size.max() - size.min()))**2
        np.testing.assert_allclose(weights[i], w/w.sum(), rtol=1e-3, atol=1e-6)


def test_weighted_errors_by_hand(case):
    adata, split, template = case
    rng = np.random.default_rng(2)
    bulk = pseudobulk(template.with_prediction("x", rng.normal(0, .3, template.delta.shape)))
    weights = rng.random(bulk.observed.shape)
    weights /= weights.sum(1, keepdims=True)
    for i, w in enumerate(weights):
        assert wmse(bulk, weights)[i] == pytest.approx(
            np.average((bulk.predicted[i] - bulk.observed[i])**2, weights=w))
        seen, said = bulk.observed[i] - bulk.train_delta, bulk.predicted[i] - bulk.train_delta
        assert r2_weighted(bulk, weights)[i] == pytest.approx(r2_score(seen, said, sample_weight=w))
    flat = bulk._replace(predicted=np.tile(bulk.train_delta, (len(weights), 1)))
    assert (r2_weighted(flat, weights) <= 1e-12).all()
    assert r2_weighted(flat._replace(predicted=bulk.observed), weights).tolist() == [1]*len(weights)


def test_the_duplicate_is_the_half_where_it_is_sure(case):
    adata, split, template = case
    duplicate = interpolated_duplicate(template, adata, split, 3)
    half = half_of_the_cells(template, adata, split, 3)
    assert duplicate.cells.index.equals(half.cells.index)
    cells, X = template.cells, pd.DataFrame.sparse.from_spmatrix(adata.X, adata.obs_names, adata.var_names)
    for i in (0, 21):
        group, obs = half.groups.loc[i], adata.obs
        own = (cells[["condition", "cell_type"]] == group[["condition", "cell_type"]]).all(axis=1)
        first = X.loc[cells.index[own & ~cells.index.isin(half.cells.index)]].to_numpy()
        rest = X[((obs["cell_type"] == group["cell_type"]) & (obs["condition"] != "ctrl")).to_numpy()
                 & ~obs["condition"].isin(template.groups["condition"]).to_numpy()]
        others = cells[(cells["cell_type"] == group["cell_type"]) & (cells["condition"] != group["condition"])]
        rest = np.r_[rest.to_numpy(), X.loc[others.index[~others.index.isin(half.cells.index)]].to_numpy()]
        n = len(first)
        p = stats.ttest_ind_from_stats(first.mean(0), first.std(0, ddof=1), n, rest.mean(0),
                                       rest.std(0, ddof=1), n, False)[1]
        alpha = 1 - stats.false_discovery_control(np.nan_to_num(p, nan=1.))
        expected = alpha*half.delta[i] + (1 - alpha)*half.train_delta
        np.testing.assert_allclose(duplicate.delta[i], expected, atol=2e-3)
        assert alpha.max() > .9 and alpha.min() < .2


def test_the_duplicate_reads_no_cell_it_is_judged_on(case):
    "Other values in the second half of the cells change nothing of the prediction."
    adata, split, template = case
    first = interpolated_duplicate(template, adata, split)
    other = adata.copy()
    rows = adata.obs_names.isin(first.cells.index)
    X = other.X.toarray()
    X[rows] = np.random.default_rng(0).permuted(X[rows], axis=1)
    other.X = sp.csr_matrix(X)
    again = interpolated_duplicate(test_set(other, split), other, split)
    assert again.cells.index.equals(first.cells.index)
    np.testing.assert_allclose(again.delta, first.delta, atol=1e-5)


def test_room_of_a_metric(case):
    adata, split, template = case
    room = dynamic_range(template, adata, split, ["mse_delta", "r2_weighted", "wmse", "pds"],
                         deals=2).set_index("metric")
    assert room.loc["wmse", "share"] > room.loc["mse_delta", "share"] and room.loc["r2_weighted", "share"] > 0
    row = room.loc["wmse"]
    assert row["share"] == pytest.approx(1 - row["interpolated_duplicate"]/row["train_mean"])
    half = half_of_the_cells(template, adata, split, 0), half_of_the_cells(template, adata, split, 1)
    by_hand = np.mean([
        evaluate(train_mean(h), ["wmse"], weights=response_weights(h, adata))["value"].mean() for h in half
    ])
    assert row["train_mean"] == pytest.approx(by_hand)
    with pytest.raises(ValueError, match="wmse needs weights"): evaluate(template, ["wmse"])
    assert METRICS["wmse"].standard.anchors == ("train_mean", "interpolated_duplicate")


def test_the_table_of_the_field_stands_between_mean_and_replicate(case):
    adata, split, template = case
    scores = field_scores([template, train_mean(template), half_of_the_cells(template, adata, split)], adata, split,
                          progress=False)
    table = field_table(scores)
    scaled = table.loc[["train_mean", "replicate"], [*CHALLENGE]].dropna(axis=1)    # some metrics find no response here
    assert scaled.shape[1] > 2
    np.testing.assert_allclose(scaled, [[0]*scaled.shape[1], [1]*scaled.shape[1]], atol=1e-9)
    own = scores[(scores.metric == "wmse") & (scores.method == "train_mean")]["value"].mean()
    pb = pseudobulk(train_mean(template))
    assert table.loc["train_mean", "wmse"] == own == pytest.approx(wmse(pb, response_weights(template, adata)).mean())


def test_without_halves_only_weighted_metrics_are_left(case, monkeypatch):
    adata, split, template = case
    def none(*_): raise HalvesError("one cell each")
    monkeypatch.setattr("biojepa.evaluate.weighted.interpolated_duplicate", none)
    with pytest.warns(UserWarning, match="no replicate, and so none of the challenge's metrics: one cell each"):
        scores = field_scores([template, train_mean(template)], adata, split, progress=False)
    assert {*field_table(scores).columns} == {"wmse", "r2_weighted"}
