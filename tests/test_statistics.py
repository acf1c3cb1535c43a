"Intervals against scipy and simulation; differences, seeds, scaled scores and the table."
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats

from biojepa.data.datasets import load_dataset
from biojepa.data.network import SimulationSpec
from biojepa.data.preprocess import prepare
from biojepa.data.simulate import simulate_perturb_seq
from biojepa.data.splits import make_split
from biojepa.evaluate.metrics import METRICS, evaluate
from biojepa.evaluate.statistics import (
    _draw_means, _draws, bootstrap_ci, hierarchical_bootstrap, paired_bootstrap, verdict
)
from biojepa.evaluate.summary import BOUNDS, noise_ceilings, scaled_score, summarise
from biojepa.predict.baselines import HalvesError, half_of_the_cells, noise_ceiling
from biojepa.predict.sets import Pseudobulk, pseudobulk, test_set


def test_interval_is_scipys():
    values = np.random.default_rng(0).gamma(2, .2, 80)
    found = bootstrap_ci(values)
    scipys = stats.bootstrap((values, ), np.mean, n_resamples=10_000, method="percentile",
                             random_state=1).confidence_interval
    assert found.estimate == pytest.approx(values.mean()) and found.n == 80 and np.isnan(found.p)
    assert found[1:3] == pytest.approx(tuple(scipys), abs=.005)


def test_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [i.low <= 2 <= i.high for i in (bootstrap_ci(rng.gamma(2, 1, 60), 500, .9, s) for s in range(400))]
    assert np.mean(inside) == pytest.approx(.9, abs=.04)


@pytest.mark.parametrize("k", [1, 50, 300])
def test_draws_kept_or_in_pieces_are_the_same(k):
    "However the draws are stored or cut, their means are those of the multinomial written out."
    values = np.random.default_rng(0).normal(size=k)
    counts = np.random.default_rng(1).multinomial(k, np.full(k, 1/k), size=4000)
    naive = [row @ values/k for row in counts.astype(float)]
    for options in ({}, dict(size=170), dict(keep=0), dict(keep=0, size=170)):
        np.testing.assert_allclose(_draw_means(values, 4000, 1, **options), naive, rtol=0, atol=1e-12)
    assert _draws(k, 4000, 1).sum(1).tolist() == [k]*4000


def test_a_table_draws_once():
    _draws.cache_clear()
    rng = np.random.default_rng(0)
    tidy = pd.DataFrame([dict(method=m, metric="r_delta", condition=f"G{i}", cell_type="a", value=rng.normal())
                         for m in ("train_mean", "ridge", "forest", "noise_ceiling") for i in range(40)])
    summarise(tidy)
    assert _draws.cache_info().misses == 1 and _draws.cache_info().hits > 10


def test_level_and_seed():
    values = np.random.default_rng(0).normal(size=100)
    narrow, wide = bootstrap_ci(values, level=.5), bootstrap_ci(values, level=.99)
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    assert bootstrap_ci(values, seed=3) == bootstrap_ci(values, seed=3) != bootstrap_ci(values, seed=4)


def test_undefined_values():
    found = bootstrap_ci([np.nan, 1, 2, np.nan])
    assert (found.estimate, found.n) == (1.5, 2)
    nothing = bootstrap_ci([np.nan]*3)
    assert np.isnan(nothing.estimate) and nothing.n == 0
    assert paired_bootstrap([1, np.nan, 3], [0, 0, np.nan]).n == 1
    with pytest.raises(ValueError, match="2 infinite values"): bootstrap_ci([np.inf, 1, -np.inf])


def test_refusals():
    with pytest.raises(ValueError, match="n: found 10 draws"): bootstrap_ci([1, 2], n=10)
    with pytest.raises(ValueError, match="level: found 95"): bootstrap_ci([1, 2], level=95)
    with pytest.raises(ValueError, match="found 2 and 3 values"): paired_bootstrap([1, 2], [1, 2, 3])


def test_p_value():
    rng = np.random.default_rng(0)
    d = rng.normal(.15, 1, 200)
    assert paired_bootstrap(d, np.zeros(200)).p == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=.02)
    assert paired_bootstrap(d + 5, np.zeros(200), n=1000).p == pytest.approx(2/1001)  # never zero
    assert paired_bootstrap(d, np.zeros(200)).p == pytest.approx(paired_bootstrap(np.zeros(200), d).p)
    uniform = [paired_bootstrap(rng.normal(size=40), np.zeros(40), 500, seed=s).p for s in range(300)]
    assert np.mean(np.array(uniform) < .05) == pytest.approx(.05, abs=.035)


def test_seeds_written_out():
    rng = np.random.default_rng(0)
    effect = rng.normal(0, .5, 30)
    values = {(s, p): effect[p] + shift + rng.normal(0, .1) for s, shift in zip((7, 8, 9), (0, .2, .6))
              for p in range(30) if not (s == 9 and p < 10)}  # one seed lacks a third
    means = []
    for _ in range(4000):
        seeds, units = rng.choice([7, 8, 9], 3), rng.integers(30, size=30)
        means.append(np.mean([np.mean([values[s, p] for p in units if (s, p) in values]) for s in seeds]))
    found = hierarchical_bootstrap(list(values.values()), [s for s, _ in values], [p for _, p in values])
    assert found.estimate == pytest.approx(
        np.mean([np.mean([v for (t, _), v in values.items() if t == s])
                 for s in (7, 8, 9)]))  # seeds count alike
    assert found[1:3] == pytest.approx(np.quantile(means, [.025, .975]), abs=.04) and found.n == 30


def test_seeds_do_not_multiply_perturbations():
    values = np.random.default_rng(1).normal(.4, .2, 40)
    one = bootstrap_ci(values)
    for k in (1, 5):
        assert hierarchical_bootstrap(np.tile(values, k), np.repeat(range(k), 40),
                                      np.tile(range(40), k))[:4] == pytest.approx(one[:4], abs=.01)


def test_seeds_refuse():
    with pytest.raises(ValueError, match="seeds: found 2 for 3 values"):
        hierarchical_bootstrap([1, 2, 3], [0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match="perturbations: found 1 for 3 values"):
        hierarchical_bootstrap([1, 2, 3], [0, 1, 1], [0])
    assert np.isnan(hierarchical_bootstrap([np.nan], [0], [0]).estimate)


@pytest.mark.parametrize("low, high, direction, words", [
    (.1, .2, "higher", "better than"), (.1, .2, "lower", "worse than"), (-.2, -.1, "higher", "worse than"),
    (-.2, -.1, "lower", "better than"), (-.1, .2, "lower", "cannot be told from"),
    (0., .2, "higher", "cannot be told from"), (np.nan, np.nan, "lower", "no interval against")
])
def test_verdict(low, high, direction, words):
    assert verdict(low, high, direction, "train_mean") == f"{words} train mean"


# --- the noise ceiling

def planted(signal, noise, seed=0):
    "A screen whose cells are a known effect (variance signal² over genes) plus noise of variance noise², far from 0."
    spec = SimulationSpec(n_genes=800, n_cells=1200, n_targets=14, n_cell_types=1, n_batches=1, n_doubles=0)
    adata = prepare(load_dataset(simulate_perturb_seq(spec), batch="batch", cell_type="cell_type"))
    condition, rng = adata.obs["condition"].astype(str).to_numpy(), np.random.default_rng(seed)
    targets = sorted(set(condition) - {"ctrl"})
    split = make_split(adata,
                       "custom",
                       held_out=dict(train=targets[8:], test=targets[:8]),
                       allow_empty_val=True)
    x = 30 + rng.normal(0, noise, adata.shape)
    truth = {c: rng.normal(0, signal, adata.n_vars) for c in targets}
    for c in targets: x[condition == c] += truth[c]
    adata.X = sp.csr_matrix(x.astype(np.float32))
    return adata, split, test_set(adata, split), truth


@pytest.mark.parametrize("signal, noise", [(1., 2.), (.3, 2.), (1., .1)])
def test_noise_ceiling_is_the_closed_form_and_where_the_truth_stands(signal, noise):
    adata, split, template, truth = planted(signal, noise)
    found = noise_ceilings(template, adata, split).query("metric == 'r_delta'").set_index("condition")
    bulk, m = pseudobulk(template), len(split.controls(adata, "test"))
    ratio = (noise/signal)**2*(1/bulk.conditions["n_cells"] + 1/m
                               )  # noise to signal, of the mean of all cells
    closed = pd.Series((1/np.sqrt(1 + ratio)).to_numpy(), bulk.conditions["condition"])
    reached = [np.corrcoef(truth[c], o)[0, 1] for c, o in zip(bulk.conditions["condition"], bulk.observed)]
    assert (found["value"] - closed).abs().max() < .05 and found["value"].mean() == pytest.approx(
        closed.mean(), abs=.015)
    assert found["value"].mean() == pytest.approx(np.mean(reached), abs=.02)
    assert found["n_cells"].to_dict() == bulk.conditions.set_index("condition")["n_cells"].to_dict()


def test_half_of_the_cells_is_below_the_ceiling_and_noise_has_none():
    adata, split, template, truth = planted(.5, 3.)
    half = evaluate(half_of_the_cells(template, adata, split), ["r_delta"])["value"].mean()
    ceiling = noise_ceilings(template, adata, split, ["r_delta"])["value"].mean()
    assert half < ceiling - .1 and ceiling == pytest.approx(noise_ceiling(half), abs=.05)
    adata, split, template, _ = planted(0., 1.)
    nothing = noise_ceilings(template, adata, split, ["r_delta"])["value"]
    assert nothing.min() == 0 and nothing.max() < .35 and nothing.mean() < .2   # roots of what ten deals leave


def test_ceiling_is_the_mean_of_ten_deals_before_the_formula():
    adata, split, template, _ = planted(.5, 2.)
    deals = [evaluate(half_of_the_cells(template, adata, split, seed), ["r_delta"]) for seed in range(10)]
    by_hand = noise_ceiling(np.mean([d["value"] for d in deals], 0))
    found = noise_ceilings(template, adata, split, ["r_delta", "pds"])
    np.testing.assert_allclose(found["value"], by_hand)
    assert set(found["metric"]) == {"r_delta"} and set(found["method"]) == {"noise_ceiling"} < set(BOUNDS)
    assert noise_ceilings(template, adata, split, "pds").empty


def test_only_metrics_that_declare_a_ceiling_have_one_and_only_those_are_scaled():
    declared = {m for m in METRICS if METRICS[m].ceiling}
    assert declared == {"r_delta", "r_delta_perturbed_mean", "r_top20", "r_top20_without_target"}
    rows = tidy(train_mean=dict(r_delta=.3, de_direction=.5), model=dict(r_delta=.4, de_direction=.6),
                half_of_the_cells=dict(r_delta=.35, de_direction=.515), noise_ceiling=dict(r_delta=.6))
    table = summarise(rows)
    assert table[table["scaled"].notna()]["metric"].unique().tolist() == ["r_delta"]


def test_what_cannot_be_halved_says_so():
    adata, split, template, _ = planted(1., 1.)
    first = adata.obs.groupby("perturbation", observed=True).head(1).index
    few = adata[adata.obs_names.isin(first) | (adata.obs["condition"] == "ctrl")].copy()
    with pytest.raises(HalvesError, match="two cells"): noise_ceilings(test_set(few, split), few, split)


# --- the table

@pytest.mark.parametrize("u, mean, ceiling, direction, score", [(.4, .3, .5, "higher", .5),
                                                               (.3, .3, .5, "higher", 0),
                                                               (.5, .3, .5, "higher", 1),
                                                               (.2, .3, .5, "higher", -.5),
                                                               (2, 3, 1, "lower", .5),
                                                               (.4, .5, .5, "higher", np.nan),
                                                               (.4, .5, .4, "higher", np.nan),
                                                               (2, 1, 3, "lower", np.nan),
                                                               (.8, .7, .9, "nominal", np.nan)])
def test_scaled_score(u, mean, ceiling, direction, score):
    assert scaled_score(u, mean, ceiling, direction) == pytest.approx(score, nan_ok=True)


def tidy(seed=0, n=30, **means):
    rng = np.random.default_rng(seed)
    easy = rng.normal(0, .1, n)
    part = lambda method, metric, values: pd.DataFrame(
        dict(method=method,
             metric=metric,
             condition=[f"G{i}+ctrl" for i in range(n)],
             cell_type="K562",
             value=values))
    return pd.concat([
        part(method, metric, mean + easy + rng.normal(0, .02, n)) for method, by in means.items()
        for metric, mean in by.items()
    ],
                     ignore_index=True)


def test_table():
    rows = tidy(train_mean=dict(r_delta=.3, mse_delta=3.),
                model=dict(r_delta=.4, mse_delta=2.),
                noise_ceiling=dict(r_delta=.5))
    table = summarise(rows).set_index(["metric", "method"])
    assert table.loc[("r_delta", "model"), "scaled"] == pytest.approx(.1/.2, abs=.05)
    assert table.loc["mse_delta", "scaled"].isna().all()    # a metric without a ceiling is not scaled
    value = lambda method, metric: rows[
        (rows["method"] == method) & (rows["metric"] == metric)]["value"].to_numpy()
    for metric in ("r_delta", "mse_delta"):
        row = table.loc[(metric, "model")]
        assert tuple(row[["mean", "low", "high"]]) == pytest.approx(bootstrap_ci(value("model", metric))[:3])
        assert tuple(row[["difference", "difference_low", "difference_high", "p"]]) == pytest.approx(
            np.take(paired_bootstrap(value("model", metric), value("train_mean", metric)), [0, 1, 2, 4]))
        assert row["against"] == "train_mean" and row["n"] == 30
    assert table.loc[("r_delta", "train_mean"), "difference"] == 0


def test_pairs_are_found_by_name_not_by_order():
    rows = tidy(train_mean=dict(r_delta=.3), model=dict(r_delta=.4))
    shuffled = pd.concat([
        rows[rows["method"] == "train_mean"], rows[rows["method"] == "model"].sample(frac=1, random_state=0)
    ])
    a, b = (summarise(r).set_index("method").loc["model"] for r in (rows, shuffled))
    assert b["difference_high"] - b["difference_low"] == pytest.approx(
        a["difference_high"] - a["difference_low"], rel=.1)
    assert a["difference_high"] - a["difference_low"] < .5*(a["high"] - a["low"])


def test_an_undefined_reference_stands_at_chance():
    rows = tidy(train_mean=dict(r_delta_perturbed_mean=0, mse_delta=3.),
                model=dict(r_delta_perturbed_mean=.2, mse_delta=2.),
                noise_ceiling=dict(r_delta_perturbed_mean=.4))
    rows.loc[(rows["method"] == "train_mean") & (rows["metric"] == "r_delta_perturbed_mean"), "value"] = np.nan
    row = summarise(rows).set_index(["metric", "method"]).loc[("r_delta_perturbed_mean", "model")]
    assert row["against"] == "chance" and row["difference"] == pytest.approx(
        row["mean"]) and row["scaled"] == pytest.approx(.2/.4, abs=.05)
    undefined = summarise(rows).set_index(["metric", "method"]).loc[("r_delta_perturbed_mean", "train_mean")]
    assert np.isnan(undefined["mean"]) and undefined["n"] == 0 and undefined["n_undefined"] == 30


def test_no_reference_and_no_chance_is_no_difference():
    rows = tidy(train_mean=dict(mse_delta=3.), model=dict(mse_delta=2.))
    rows.loc[rows["method"] == "train_mean", "value"] = np.nan
    row = summarise(rows).set_index("method").loc["model"]
    assert row["against"] == "" and np.isnan(row["difference"]) and np.isnan(row["scaled"])


def test_seeds_in_the_table():
    runs = pd.concat([
        tidy(s, train_mean=dict(r_delta=.3), model=dict(r_delta=.4 + .1*s)).assign(seed=s) for s in range(3)
    ])
    row = summarise(runs).set_index("method").loc["model"]
    value = runs[runs["method"] == "model"]
    assert row["seeds"] == 3 and row["n"] == 30
    assert tuple(row[["mean", "low", "high"]]) == pytest.approx(
        hierarchical_bootstrap(value["value"], value["seed"], value["condition"])[:3])
    assert row["difference"] == pytest.approx(
        .2, abs=.02) and row["difference_high"] - row["difference_low"] > .1


def test_table_refuses():
    rows = tidy(train_mean=dict(r_delta=.3), model=dict(r_delta=.4))
    with pytest.raises(ValueError, match=r"columns \['value'\] are missing"):
        summarise(rows.drop(columns="value"))
    with pytest.raises(ValueError, match="train_mean has two values of r_delta for G0"):
        summarise(pd.concat([rows, rows]))
    with pytest.raises(ValueError, match="'train_mean' is not among the methods"):
        summarise(rows[rows["method"] == "model"])


def test_panel_metric_in_the_table():
    one = lambda method, value: pd.DataFrame(
        [dict(method=method, metric="severity_r", condition="", cell_type="", value=value)])
    row = summarise(pd.concat([one("train_mean", np.nan), one("model", .6)])).set_index("method").loc["model"]
    assert row["mean"] == .6 and np.isnan(row["low"]) and np.isnan(
        row["difference_low"]) and row["against"] == "chance"
