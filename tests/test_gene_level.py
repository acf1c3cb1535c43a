"""Directions and rankings of genes: sklearn and slow forms, perfect predictions, shuffled ones, exact chance
levels, bad input."""
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, ndcg_score

from biojepa.evaluate import directions as d, gene_level as g
from biojepa.evaluate.differential import DETable
from biojepa.evaluate.metrics import METRICS
from biojepa.predict.sets import PredictionSet, Pseudobulk

C, G = 24, 300


def example(seed=0, noise=.3):
    "Predictions related to the truth; condition i targets gene i, gene C + i is in no condition's target."
    rng = np.random.default_rng(seed)
    observed = rng.normal(0, .3, (C, G))*(rng.random((C, G)) < .6)
    names = [f"G{i}" for i in range(G)]
    conditions = pd.DataFrame(
        dict(condition=[f"G{i}+ctrl" for i in range(C)],
             cell_type="K562",
             targets=[(f"G{i}", ) for i in range(C)],
             n_cells=10))
    return Pseudobulk("guess", tuple(names), conditions, observed,
                      .5*observed + rng.normal(0, noise, (C, G)), np.ones((C, G)), None, np.zeros(G))


@pytest.fixture(scope="module")
def pb(): return example()


def others(pb, i): return np.arange(G) != i


def largest(pb, i, n):
    used = np.flatnonzero(others(pb, i))
    return used[np.argsort(-np.abs(pb.observed[i, used]), kind="stable")[:n]]


# --- directions
# -------------------------------------------------------------------------------------------------------

def test_direction_against_sklearn(pb):
    for i in range(C):
        used = others(pb, i)
        o, p = d.direction(pb.observed[i], .2), d.direction(pb.predicted[i], .2)
        assert d.direction_accuracy(pb, .2)[i] == pytest.approx(accuracy_score(o[used], p[used]))
        assert d.direction_balanced(pb, .2)[i] == pytest.approx(balanced_accuracy_score(o[used], p[used]))
        top = largest(pb, i, 50)
        assert d.direction_accuracy(pb, .2, top=50)[i] == pytest.approx(accuracy_score(o[top], p[top]))


def test_counts_are_a_confusion_matrix(pb):
    used = ~np.eye(C, G, dtype=bool)
    o, p = d.direction(pb.observed, .2)[used], d.direction(pb.predicted, .2)[used]
    table = d.direction_counts(pb, .2)
    expected = confusion_matrix(o, p, labels=[-1, 0, 1])
    assert (table["n"].to_numpy().reshape(3, 3) == expected).all() and table["n"].sum() == C*(G - 1)
    assert table["share"].to_numpy().reshape(3, 3) == pytest.approx(expected/expected.sum(1, keepdims=True))


@pytest.mark.parametrize("top", [None, 50])
def test_chance_of_direction_is_the_mean_of_dealt_classes(pb, top):
    rng, seen = np.random.default_rng(1), []
    for _ in range(400):
        dealt = pb.predicted.copy()
        for i in range(C): dealt[i, others(pb, i)] = rng.permutation(dealt[i, others(pb, i)])
        seen.append(d.direction_accuracy(pb._replace(predicted=dealt), .2, top))
    seen = np.array(seen)
    error = seen.std(0)/np.sqrt(len(seen))
    assert (np.abs(seen.mean(0) - d.direction_chance(pb, .2, top)) < 4.5*error + 1e-12).all()


def test_bins_by_effect_hold_every_gene_once_and_average_to_the_accuracy(pb):
    table = d.direction_by_effect(pb, .2)
    assert (table.groupby("condition")["n_genes"].sum() == G - 1).all()
    mean = table.assign(right=table["value"]*table["n_genes"]).groupby("condition",
                                                                       sort=False)["right"].sum()/(G - 1)
    assert mean.to_numpy() == pytest.approx(d.direction_accuracy(pb, .2))
    low = table[table["high"] <= .2]     # only "unchanged" is observed below the threshold
    unchanged = [(d.direction(pb.predicted[i, others(pb, i)], .2) == 0).mean() for i in range(C)]
    assert low["chance"].to_numpy() == pytest.approx(
        np.array(unchanged)[low["condition"].str.extract(r"G(\d+)", expand=False).astype(int)])


def test_target_counts_only_if_asked(pb):
    moved = pb.predicted.copy()
    moved[np.arange(C), np.arange(C)] += 5
    other = pb._replace(predicted=moved)
    assert d.direction_accuracy(other) == pytest.approx(d.direction_accuracy(pb))
    assert g.gene_rankings(other)["value"].to_numpy() == pytest.approx(g.gene_rankings(pb)["value"].to_numpy())
    assert (d.direction_accuracy(other, keep_target=True) != d.direction_accuracy(pb, keep_target=True)).any()
    assert (g.gene_rankings(other, keep_target=True)["value"]
            != g.gene_rankings(pb, keep_target=True)["value"]).any()


def test_class_that_is_not_observed_leaves_the_balance_undefined(pb):
    up = np.abs(pb.observed)
    assert np.isnan(d.direction_balanced(pb._replace(observed=up))).all() and np.isfinite(
        d.direction_accuracy(pb._replace(observed=up))).all()


# --- rankings
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ties", [False, True])
def test_ndcg_against_sklearn(pb, ties):
    pb = pb._replace(predicted=pb.predicted.round(1)) if ties else pb
    table = g.gene_rankings(pb, ks=(7, 100)).query("quantity == 'ndcg'")
    for k in (7, 100):
        for i in range(C):
            used = others(pb, i)
            expected = ndcg_score(np.abs(pb.observed[i:i + 1, used]), np.abs(pb.predicted[i:i + 1, used]), k=k)
            assert table.query("k == @k")["value"].iloc[i] == pytest.approx(expected), (i, k)


def test_precision_and_overlap_are_counts_of_sets(pb):
    table = g.gene_rankings(pb, ks=(20,), n_relevant=50)
    for i in range(C):
        used = np.flatnonzero(others(pb, i))
        listed = set(used[np.argsort(-np.abs(pb.predicted[i, used]))[:20]])
        row = table[table["condition"] == f"G{i}+ctrl"].set_index("quantity")["value"]
        assert row["precision"] == pytest.approx(len(listed & set(largest(pb, i, 50)))/20)
        assert row["overlap"] == pytest.approx(len(listed & set(largest(pb, i, 20)))/20)


def test_ties_are_the_mean_over_random_orders():
    rng = np.random.default_rng(3)
    size, weight = rng.integers(0, 4, 30).astype(float), g._discount(30, 12)
    seen = np.mean([g.rank_weights(size + 1e-6*rng.random(30), weight) for _ in range(6000)], 0)
    assert g.rank_weights(size, weight) == pytest.approx(seen, abs=.03)
    assert g.rank_weights(size, weight).sum() == pytest.approx(weight.sum())


def test_significant_genes_are_relevant(pb):
    p = np.ones((C, G))
    p[:, 100:110] = .001
    p[3] = 1.   # nothing is significant
    de = DETable(pb.genes, pb.conditions.assign(n_controls=5), p, p)
    table = g.gene_rankings(pb, ks=(20,), de=de).query("quantity == 'precision'")
    size = np.abs(pb.predicted[0, others(pb, 0)])
    assert table["value"].iloc[0] == pytest.approx(np.isin(np.argsort(-size)[:20], np.arange(99, 109)).mean())
    assert np.isnan(table["value"].iloc[3]
                    ) and table["best"].iloc[0] == .5 and table["chance"].iloc[0] == pytest.approx(10/299)


def test_constant_prediction_gets_chance_exactly(pb):
    table = g.gene_rankings(pb._replace(predicted=np.zeros((C, G))))
    assert table["value"].to_numpy() == pytest.approx(table["chance"].to_numpy())


# --- the best value, and chance
# ---------------------------------------------------------------------------------------

def test_perfect_prediction_gets_the_best_value(pb):
    perfect = pb._replace(predicted=pb.observed)
    table = g.gene_rankings(perfect)
    assert table["value"].to_numpy() == pytest.approx(table["best"].to_numpy())
    assert table.query("quantity != 'precision'")["best"].to_numpy() == pytest.approx(1)
    assert (d.direction_by_effect(perfect)["value"] == 1).all()
    for name in ("direction_all", "direction_top50", "direction_balanced", "top_overlap_20", "ndcg_50"):
        assert METRICS[name].function(perfect) == pytest.approx(METRICS[name].best), name


def test_prediction_shuffled_over_genes_is_chance_within_its_interval():
    "Over many seeds a 99.9 % interval of the mean holds zero difference to chance."
    differences = {}
    for seed in range(12):
        pb, rng = example(seed), np.random.default_rng(100 + seed)
        pb = pb._replace(predicted=np.stack([rng.permutation(r) for r in pb.predicted]))
        tables = pd.concat([
            g.gene_rankings(pb),
            d.direction_by_effect(pb),
            pd.DataFrame(dict(metric="balanced", value=d.direction_balanced(pb), chance=1/3))
        ])
        for name, rows in tables.groupby("metric"):
            differences.setdefault(name, []).append((rows["value"] - rows["chance"]).to_numpy())
    for name, values in differences.items():
        values = np.concatenate(values)
        assert abs(values.mean()) < stats.norm.ppf(.99995)*stats.sem(values), name
    assert len(differences) == 4*3 + 6 + 1


# --- summaries and bad input
# ------------------------------------------------------------------------------------------

def test_means_with_intervals_and_chance(pb):
    table = pd.concat(
        [g.gene_rankings(pb),
         g.gene_rankings(pb._replace(name="train_mean", predicted=np.zeros((C, G))))])
    curves = g.mean_curves(table, ["method", "quantity", "k"], n=200)
    row = curves.query("method == 'guess' and quantity == 'overlap' and k == 20").iloc[0]
    values = table.query("method == 'guess' and metric == 'overlap@20'")["value"]
    assert row["mean"] == pytest.approx(
        values.mean()) and row["low"] < row["mean"] < row["high"] and row["n"] == C
    summary = g.with_chance(table, n=200).set_index(["metric", "method"])
    assert summary.loc[("overlap@20", "guess"), "difference"] == pytest.approx(values.mean() - 20/(G - 1))
    assert summary.loc[("overlap@20", "train_mean"),
                       "mean"] == pytest.approx(summary.loc[("overlap@20", "train_mean"), "chance"])


@pytest.mark.parametrize("call, message", [
    (lambda pb: d.direction_accuracy(pb, 0.), "threshold"),
    (lambda pb: d.direction(pb.observed, -1), "threshold"),
    (lambda pb: d.direction_by_effect(pb, edges=(0, 2, 1)), "edges"),
    (lambda pb: g.gene_rankings(pb, ks=(1000,)), "ks"),
    (lambda pb: g.gene_rankings(pb, de=DETable(("X",), pb.conditions, *[np.ones((C, 1))]*2)), "de: was made "
                                                                                              "for "
                                                                                              "other genes"),
    (lambda pb: g.mean_curves(pd.DataFrame(dict(value=[1.])), ["method"]), "method"),
])
def test_bad_input_is_named(pb, call, message):
    with pytest.raises(ValueError, match=message): call(pb)


# --- as released
# ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def released_sets():
    "Two guides a target, each cell beside its own control; Δ by cell for one method, by guide for the constants."
    rng, n_genes, n_cells = np.random.default_rng(3), 80, 9
    names = [(f"T{t}+ctrl|g{i}", f"T{t}+ctrl") for t in range(6) for i in range(2)]
    group = np.repeat(np.arange(len(names)), n_cells)
    groups = pd.DataFrame(names, columns=["perturbation", "condition"]).assign(cell_type="K562",
                                                                               n_cells=n_cells)
    cells = groups.loc[group, ["perturbation", "condition", "cell_type"]].assign(batch="0",
                                                                                 group=group,
                                                                                 control="c")
    cells.index = [f"cell{i}" for i in range(len(cells))]
    base, shift = rng.gamma(2, .5, n_genes), rng.normal(0, .5, (len(names), n_genes))
    x, c = (np.maximum(0, base + s + rng.normal(0, .5, (len(cells), n_genes))) for s in (shift[group], 0))
    genes = (*(f"T{t}" for t in range(6)), *(f"G{i}" for i in range(n_genes - 6)))
    mean = np.tile(base, (len(names), 1))
    observed, controls = sp.csr_matrix(np.float32(x)), sp.csr_matrix(np.float32(c))
    control = PredictionSet("control_mean", genes, cells, observed, controls, groups, mean, np.zeros_like(mean),
                            train_delta=shift.mean(0), expression_space="log1p")
    train = control.with_prediction("train_mean", np.tile(control.train_delta, (len(names), 1)))
    by_cell = .5*shift[group] + rng.normal(0, .2, x.shape) - .1
    model = control.with_prediction("model", .3*shift, by_cell.astype(np.float32))
    return model, control, train


def test_released_quantities_by_plain_loops(released_sets):
    "Mean over cells of unclipped Δ to one control cell, threshold 0.25, the target kept, lists of twenty compared."
    table = g.released_gene_level(released_sets).set_index("quantity")
    def classes(d): return ["up" if v >= .25 else "down" if v <= -.25 else "same" for v in d]
    for s in released_sets:
        x, c = s.observed.toarray().astype(float), s.control.toarray().astype(float)
        all_genes, top50, precision = [], [], []
        for p in range(len(s.groups)):
            rows = [i for i in range(len(s)) if s.group[i] == p]
            observed = np.mean([x[i] - c[i] for i in rows], 0)
            said = [
                s.control_mean[p] + s.delta[p] - c[i] if s.cell_delta is None else s.cell_delta[i]
                for i in rows
            ]
            predicted = np.mean(said, 0)
            right = np.array([a == b for a, b in zip(classes(observed), classes(predicted))])
            by_size = lambda d, k: set(np.argsort(-np.abs(d))[:k].tolist())
            all_genes.append(right.mean()); top50.append(right[sorted(by_size(observed, 50))].mean())
            precision.append(len(by_size(observed, 20) & by_size(predicted, 20))/20)
        expected = [np.mean(all_genes), np.mean(top50), np.mean(precision)]
        assert table[s.name].to_numpy() == pytest.approx(expected, abs=1e-6), s.name
    assert (table["model"] > table["no change"]).iloc[1:].all()


def test_no_change_is_the_majority_and_the_chance_of_the_released_quantities(released_sets):
    table = g.released_gene_level(released_sets).set_index("quantity")
    observed = g.paired_pseudobulk(released_sets[0]).observed
    assert table.loc["direction, all genes", "no change"] == pytest.approx((np.abs(observed) < .25).mean())
    assert table.loc["precision@20", "no change"] == pytest.approx(20/80)
    assert table.loc["direction, all genes", "released"] < table.loc["direction, all genes",
                                                                     "released, no change"]
    with pytest.raises(ValueError, match="'control_mean'.*'train_mean'.*not among"):
        g.released_gene_level(released_sets[:1])
