"Baselines against scikit-learn, loops and planted answers; none sees a test cell; the known answers of the twin."
import sys
import time
import tracemalloc
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

from biojepa.actions.banks import FeatureBank
from biojepa.actions.gene_tables import spectral_embedding
from biojepa.actions.vocabulary import ActionTable, Modality
from biojepa.core import keep_freed_memory
from biojepa.data.datasets import load_dataset
from biojepa.data.means import group_means, train_mean_delta
from biojepa.data.network import SimulationSpec
from biojepa.data.preprocess import prepare
from biojepa.data.simulate import simulate_perturb_seq
from biojepa.data.splits import make_split
from biojepa.predict import baselines, regressors
from biojepa.predict.baselines import (
    Training, additive, control_mean, half_of_the_cells, line_likeness, nearest_line, noise_ceiling, oracle,
    same_elsewhere, train_mean, training_deltas, with_own_gene
)
from biojepa.predict.methods import amplified, run_baselines, with_cost
from biojepa.predict.model import error_of_mean
from biojepa.predict.processes import (
    diffusion_kernel, feature_kernel, gaussian_process, graph_neighbours, leave_one_out, related
)
from biojepa.predict.regressors import (
    Bilinear, Forest, bilinear, choose, nearest_neighbours, random_forest, response_rows, ridge,
    shuffle_features, sum_features, tanimoto, tanimoto_neighbours, target_features
)
from biojepa.predict.sets import PredictionSet, pseudobulk, test_set
from biojepa.predict.told import METHODS, told, told_table
from biojepa.report.cost import method_costs


def simulated(**options):
    adata = simulate_perturb_seq(
        SimulationSpec(**dict(n_genes=120,
                              n_cells=2000,
                              n_targets=24,
                              n_modules=4,
                              n_doubles=8,
                              n_batches=2,
                              control_fraction=.2,
                              seed=1) | options))
    adata.uns["biojepa"] = dict(schema_version=1,
                                source="simulated",
                                expression_space="counts",
                                history=np.array([], dtype=object))
    return prepare(adata)


@pytest.fixture(scope="module")
def case():
    "A screen of two lines with doubles, its split, its template, features, a graph."
    adata = simulated(n_cell_types=2)
    conditions = np.random.default_rng(0).permutation(sorted(set(adata.obs["condition"]) - {"ctrl"})).tolist()
    split = make_split(adata,
                       "custom",
                       held_out=dict(train=conditions[8:], test=conditions[:8]),
                       allow_empty_val=True)
    genes = ActionTable.from_anndata(adata).genes
    features = pd.DataFrame(np.random.default_rng(1).normal(size=(len(genes), 6)), index=genes)
    module = pd.Series(adata.uns["truth"]["module"], index=adata.var_names)
    relations = pd.DataFrame([(a, b) for a in genes for b in genes if a < b and module[a] == module[b]],
                             columns=["a", "b"])
    return adata, split, test_set(adata, split), features, relations


def makers(features, relations):
    return dict(train_mean=train_mean,
                ridge=lambda *g: ridge(*g, features),
                bilinear=lambda *g: bilinear(*g, features),
                own_responses=bilinear,
                nearest_neighbours=lambda *g: nearest_neighbours(*g, features),
                tanimoto_neighbours=lambda *g: tanimoto_neighbours(*g, (features > 0).astype(float)),
                same_elsewhere=same_elsewhere,
                nearest_line=nearest_line,
                random_forest=lambda *g: random_forest(*g, features, Forest(trees=10)),
                gaussian_process=lambda *g: gaussian_process(*g, feature_kernel(features)),
                graph=lambda *g: gaussian_process(*g, diffusion_kernel(relations, features.index)),
                graph_neighbours=lambda *g: graph_neighbours(*g, relations),
                additive=additive)


def blank(conditions, n_genes):
    "A template with one cell per condition and nothing expressed."
    n, genes = len(conditions), tuple(f"g{i}" for i in range(n_genes))
    about = dict(perturbation=conditions, condition=conditions, cell_type="a")
    cells = pd.DataFrame(about | dict(batch="0", group=np.arange(n), control="c"),
                         index=[f"cell{i}" for i in range(n)])
    none, zero = sp.csr_matrix((n, n_genes), dtype=np.float32), np.zeros((n, n_genes))
    return PredictionSet("control_mean", genes, cells, none, none, pd.DataFrame(about | dict(n_cells=1)),
                         zero, zero, np.zeros(n_genes), "log1p")


NAMES = ("train_mean", "ridge", "bilinear", "own_responses", "nearest_neighbours", "tanimoto_neighbours",
         "same_elsewhere", "nearest_line", "random_forest", "gaussian_process", "graph", "graph_neighbours",
         "additive")


@pytest.mark.parametrize("name", NAMES)
def test_no_baseline_sees_a_test_cell_and_each_sees_training(case, name):
    adata, split, template, features, relations = case
    make = makers(features, relations)[name]
    def with_values(rows, value):
        changed, x = adata.copy(), adata.X.toarray()
        x[rows] = value
        changed.X = sp.csr_matrix(x)
        return make(test_set(changed, split), changed, split)
    before, after = make(template, adata, split), with_values(split.cells(adata, "test"), 5.)
    np.testing.assert_array_equal(before.delta, after.delta)
    if before.delta_variance is not None:
        np.testing.assert_array_equal(before.delta_variance, after.delta_variance)
    assert np.abs(with_values(split.cells(adata, "train")[:300], 5.).delta - before.delta).max() > .1
    assert before.cell_delta is None and (before.cells == template.cells).all().all()


def test_means(case):
    adata, split, template, *_ = case
    assert not control_mean(template).delta.any()
    ps = train_mean(template, adata, split)
    np.testing.assert_array_equal(ps.delta, np.tile(train_mean_delta(adata, split), (len(ps.groups), 1)))
    rows = group_means(adata, split.cells(adata, "train"), split.controls(adata, "train"), "condition").delta
    np.testing.assert_allclose(ps.delta_variance[0], rows.var(0), rtol=1e-9)
    assert train_mean(template).delta_variance is None


def one_line(seed=0, noise=.1, **options):
    "A screen of one line, singles only, whose training responses are linear in features: expression is overwritten."
    adata = simulated(n_cell_types=1, n_doubles=0, **options)
    targets = sorted(set(adata.obs["condition"]) - {"ctrl"})
    split = make_split(adata,
                       "custom",
                       held_out=dict(train=targets[6:], test=targets[:6]),
                       allow_empty_val=True)
    rng = np.random.default_rng(seed)
    features = pd.DataFrame(rng.normal(size=(len(targets), 3)), index=[t.split("+")[0] for t in targets])
    weight = rng.normal(size=(3, adata.n_vars))
    row = adata.obs["condition"].astype(str).str.split("+").str[0].map(
        {g: i for i, g in enumerate(features.index)})
    effect = np.where(row.notna().to_numpy()[:, None],
                      features.to_numpy()[row.fillna(0).astype(int)]@weight, 0)
    adata.X = sp.csr_matrix((8 + effect/3 + noise*rng.normal(size=adata.shape)).astype(np.float32))
    return adata, split, test_set(adata, split), features, targets


def test_ridge_is_scikit_learns_at_its_penalty():
    adata, split, template, features, targets = one_line()
    training = training_deltas(template, adata, split)
    X, Q = (features.loc[[c.split("+")[0] for c in groups["condition"]]].to_numpy()
            for groups in (training.groups, template.groups))
    X, Q = ((z - X.mean(0))/np.sqrt(((X - X.mean(0))**2).sum(1).mean()) for z in (X, Q))
    for penalty in (.1, 3.):
        ps = ridge(template, adata, split, features, penalties=(penalty,))
        np.testing.assert_allclose(ps.delta, Ridge(alpha=penalty).fit(X, training.delta).predict(Q), atol=1e-8)
    best = ridge(template, adata, split, features)
    bulk = pseudobulk(best)
    assert np.corrcoef(bulk.observed.ravel(), bulk.predicted.ravel())[0, 1] > .99
    scores = best.provenance["lines"]["line1"]["cross_validation"]
    assert best.provenance["lines"]["line1"]["chosen"] == float(max(scores, key=scores.get)) <= .1


def test_shuffled_features_tell_nothing():
    adata, split, template, features, _ = one_line()
    bulk = pseudobulk(ridge(template, adata, split, shuffle_features(features)))
    assert np.mean([
        np.corrcoef(o - bulk.train_delta, p - bulk.train_delta)[0, 1]
        for o, p in zip(bulk.observed, bulk.predicted)
    ]) < .5
    dealt = shuffle_features(features, seed=3)
    assert not (dealt.to_numpy() == features.to_numpy()).all(1).any() and sorted(dealt[0]) == sorted(
        features[0]) and (dealt.index == features.index).all()


def test_neighbours_are_scikit_learns():
    adata, split, template, features, _ = one_line()
    training = training_deltas(template, adata, split)
    X, Q = (features.loc[[c.split("+")[0] for c in groups["condition"]]].to_numpy()
            for groups in (training.groups, template.groups))
    nearest = NearestNeighbors(n_neighbors=4,
                               metric="cosine").fit(X - X.mean(0)).kneighbors(Q - X.mean(0),
                                                                              return_distance=False)
    ps = nearest_neighbours(template, adata, split, features, k=(4,), shrink=.3)
    np.testing.assert_allclose(ps.delta,
                               .7*training.delta[nearest].mean(1) + .3*training.delta.mean(0),
                               atol=1e-9)
    assert ps.provenance["lines"]["line1"]["chosen"] == 4


def test_the_best_value_is_the_one_that_predicts_left_out_rows_best():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(20, 30))
    seen = []
    def fit(value, train, asked):
        assert not set(train) & set(asked) and len(train) + len(asked) == 20
        seen.append((value, tuple(asked)))
        return truth[asked] + value*rng.normal(size=(len(asked), 30))
    value, scores = choose((5., .1, 1.), fit, truth)
    assert value == .1 and scores["0.1"] > scores["1.0"] > scores["5.0"]
    assert sorted(i for v, rows in seen if v == .1 for i in rows) == list(range(20))
    assert choose((1, 2, 3), None, truth[:5]) == (2, {})


def test_gaussian_process_is_scikit_learns():
    adata, split, template, features, _ = one_line(noise=.3)
    training, kernel = training_deltas(template, adata, split), feature_kernel(features)
    X, Q = (features.loc[[c.split("+")[0] for c in groups["condition"]]].to_numpy()
            for groups in (training.groups, template.groups))
    distance = ((features.to_numpy()[:, None] - features.to_numpy())**2).sum(-1)
    length = np.sqrt(np.median(distance[~np.eye(len(features), dtype=bool)]))
    process = GaussianProcessRegressor(RBF(length), alpha=.2,
                                       optimizer=None).fit(X, training.delta - training.delta.mean(0))
    mean, sd = process.predict(Q, return_std=True)
    ps = gaussian_process(template, adata, split, kernel, noise=.2, components=1000)
    np.testing.assert_allclose(ps.delta, training.delta.mean(0) + mean, atol=1e-8)
    ratio = ps.delta_variance/(sd.reshape(len(mean), -1)[:, :1]**2 + .2)
    np.testing.assert_allclose(ratio, np.tile(ratio[0], (len(mean), 1)),
                               rtol=1e-6)  # the same up to each gene's scale


def test_leaving_one_out_in_closed_form_is_leaving_it_out():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 2))
    K, Y = np.exp(-((x[:, None] - x)**2).sum(-1)) + .3*np.eye(9), rng.normal(size=(9, 4))
    mean, variance = leave_one_out(K, Y)
    for i in range(9):
        o = np.arange(9) != i
        np.testing.assert_allclose(mean[i], K[i, o] @ np.linalg.inv(K[np.ix_(o, o)]) @ Y[o])
        np.testing.assert_allclose(variance[i], K[i, i] - K[i, o] @ np.linalg.inv(K[np.ix_(o, o)]) @ K[o, i])


def test_the_predicted_variance_of_the_process_covers():
    inside = []
    for seed in range(3):
        adata, split, template, features, _ = one_line(seed, noise=2., n_targets=30)
        bulk = pseudobulk(gaussian_process(template, adata, split, feature_kernel(features)))
        inside.append(np.abs(bulk.observed - bulk.predicted) < np.sqrt(bulk.variance))
    assert .6 < np.mean(inside) < .76   # 0.68 for a Gaussian


def test_diffusion_is_a_sum_of_matrix_powers():
    edges = pd.DataFrame(dict(a=list("ABCAXB"), b=list("BCDDYA")))  # A-B twice; X-Y apart
    A, names = related(edges)
    assert A.max() == 1 and list(names) == list("ABCDXY")
    A = A.toarray()
    W = A/np.sqrt(np.outer(A.sum(0), A.sum(0)))
    K = sum(.5**t*np.linalg.matrix_power(W, t) for t in range(4))
    K = K/np.sqrt(np.outer(np.diag(K), np.diag(K)))
    got = diffusion_kernel(edges, ["D", "nobody", "A", "X"], alpha=.5, steps=3)
    assert list(got.index) == ["D", "A", "X"]
    np.testing.assert_allclose(got, K[np.ix_([3, 0, 4], [3, 0, 4])])


def test_graph_neighbours_are_those_of_a_loop(case):
    adata, split, template, _, relations = case
    ps = graph_neighbours(template, adata, split, relations, shrink=.25)
    training = training_deltas(template, adata, split)
    pairs = {frozenset(p) for p in relations.to_numpy()}
    near = lambda s, t: any(a == b or frozenset((a, b)) in pairs for a in s for b in t)
    for p, group in template.groups.iterrows():
        targets = set(group.condition.split("+")) - {"ctrl"}
        rows = [i for i, t in enumerate(training.targets) if training.groups.cell_type[i] == group.cell_type]
        like, mean = [i for i in rows if near(targets, training.targets[i])], training.delta[rows].mean(0)
        np.testing.assert_allclose(ps.delta[p],
                                   .75*training.delta[like].mean(0) + .25*mean if like else mean,
                                   atol=1e-12)


def test_additive_is_the_sum_of_what_training_shows_alone(case):
    adata, conditions = case[0], sorted(set(case[0].obs["condition"]) - {"ctrl"})
    doubles = [c for c in conditions if "ctrl" not in c]
    hidden = [*doubles[:4],
              doubles[0].split("+")[0] + "+ctrl"]  # one member of the first double is never seen
    split = make_split(adata,
                       "custom",
                       held_out=dict(train=[c for c in conditions if c not in hidden], test=hidden),
                       allow_empty_val=True)
    template = test_set(adata, split)
    ps, training = additive(template, adata, split), training_deltas(template, adata, split)
    checked = set()
    for p, group in template.groups.iterrows():
        mine = training.groups.cell_type == group.cell_type
        alone = {t[0]: training.delta[i] for i, t in enumerate(training.targets) if mine[i] and len(t) == 1}
        targets = sorted(set(group.condition.split("+")) - {"ctrl"})
        seen = [t in alone for t in targets]
        mean = np.mean(list(alone.values()), 0)
        want = sum(alone.get(t, mean) for t in targets) if any(seen) else training.delta[mine].mean(0)
        np.testing.assert_allclose(ps.delta[p], want, atol=1e-12)
        checked.add(tuple(sorted(seen)))
    assert {(True, True), (False, True), (False,)} <= checked
    assert ps.provenance["fallback"] == [hidden[-1]]


def test_additive_beats_the_mean_on_additive_doubles():
    adata = simulated(interaction=0., n_doubles=12, n_cells=6000, n_cell_types=1)
    doubles = sorted(c for c in set(adata.obs["condition"]) if "+" in c and "ctrl" not in c)
    split = make_split(adata, "combination", held_out=doubles[:6], allow_empty_val=True)
    template = test_set(adata, split)
    r = {
        s.name: np.mean([np.corrcoef(o, p)[0, 1] for o, p in zip(b.observed, b.predicted)])
        for s in (train_mean(template), additive(template, adata, split)) for b in [pseudobulk(s)]
    }
    assert r["additive"] > r["train_mean"] + .2


def test_lines_learn_from_their_own_rows_and_a_new_line_from_all(case):
    adata, split, template, *_ = case
    ps = ridge(template, adata, split, pd.DataFrame(np.ones((1, 2)),
                                                    index=["nobody"]))  # everything falls back
    training = training_deltas(template, adata, split)
    for line in ("line1", "line2"):
        mine = (template.groups.cell_type == line).to_numpy()
        np.testing.assert_allclose(
            ps.delta[mine],
            np.tile(training.delta[training.groups.cell_type == line].mean(0), (mine.sum(), 1)))
    assert ps.provenance["n_fallback"] == 8 and len(ps.provenance["fallback"]) == 8
    held_out = make_split(adata, "cell_type", held_out=["line2"], val_lines=0, allow_empty_val=True)
    other = test_set(adata, held_out)
    np.testing.assert_allclose(
        ridge(other, adata, held_out, pd.DataFrame(np.ones((1, 2)), index=["nobody"])).delta[0],
        training_deltas(other, adata, held_out).delta.mean(0))


def test_features_of_targets():
    adata = simulated(n_cell_types=1)
    table = ActionTable.from_anndata(adata)
    proteins = FeatureBank(table.genes[:-2],
                           np.random.default_rng(0).normal(size=(len(table.genes) - 2, 4)),
                           Modality.PROTEIN, {})
    keys = sorted({s for seqs in table.guide_seqs for s in seqs})
    guides = FeatureBank(tuple(keys), np.random.default_rng(1).normal(size=(len(keys), 3)), Modality.DNA, {})
    both = target_features([proteins, guides], table)
    assert both.shape == (len(table.genes) - 2, 7)
    g = both.index[3]
    mine = [s for t, seqs in zip(table.targets, table.guide_seqs) if t == (g,) for s in seqs]
    np.testing.assert_allclose(both.loc[g], np.r_[proteins.rows([g])[0], guides.rows(mine).mean(0)], rtol=1e-6)
    X, known = sum_features([(g,), (g, both.index[0]), (g, table.genes[-1]), ()], both)
    assert known.tolist() == [True, True, False, False] and not X[2].any()
    np.testing.assert_allclose(X[1], both.loc[g] + both.iloc[0])


# ---- the linear model with two embeddings, lines, compounds ----

def bare(n, G, lines=("a",), seed=0, control=None):
    "Training conditions T0, T1, … in some lines, with random effects."
    rng = np.random.default_rng(seed)
    table = pd.DataFrame([(f"T{i}+ctrl", l, 5) for l in lines for i in range(n)],
                         columns=["condition", "cell_type", "n_cells"])
    return Training(table, [(c.split("+")[0], ) for c in table["condition"]],
                    rng.normal(size=(len(table), G)), control)


def test_bilinear_is_the_equation():
    "Y = G W P' + b with both embeddings, all matrices written out."
    training, rng = bare(30, 50), np.random.default_rng(1)
    features = pd.DataFrame(rng.normal(size=(34, 4)), index=[f"T{i}" for i in range(34)])
    template = blank([f"T{i}+ctrl" for i in range(30, 34)], 50)
    found = bilinear(template, training, None, features, Bilinear(components=6, penalties=(.7,)))
    b = training.delta.mean(0)
    Y = (training.delta - b).T                                          # genes × targets
    G = np.linalg.svd(Y, full_matrices=False)[0][:, :6]
    P = features[:30].to_numpy() - features[:30].to_numpy().mean(0)
    scale = np.sqrt((P**2).sum(1).mean())
    P, asked = P/scale, (features[30:].to_numpy() - features[:30].to_numpy().mean(0))/scale
    W = np.linalg.inv(G.T@G + .7*np.eye(6))@G.T@Y@P@np.linalg.inv(P.T@P + .7*np.eye(4))
    np.testing.assert_allclose(found.delta, (G@W@asked.T).T + b, atol=1e-8)
    assert found.provenance["lines"]["a"]["chosen"] == .7 and found.provenance["components"] == 6


def test_a_target_without_features_stands_where_its_gene_does():
    training = bare(40, 12)
    rows = response_rows(training, [f"T{i}" for i in range(10)] + ["g10", "g11"], 5)
    V = np.linalg.svd(training.delta - training.delta.mean(0), full_matrices=False)[2][:5]
    np.testing.assert_allclose(np.abs(rows.loc["T3"]), np.abs(V[:, 3]))
    template = blank(["T3+ctrl", "T20+ctrl"], 12)
    template = PredictionSet(template.name, tuple(rows.index), *[getattr(template, f) for f in (
        "cells", "observed", "control", "groups", "control_mean", "delta", "train_delta", "expression_space")])
    found = bilinear(template, training, None)
    assert found.provenance["fallback"] == ["T20+ctrl"]     # not measured: the mean
    np.testing.assert_allclose(found.delta[1], training.delta.mean(0))


def three_lines():
    "Lines a, b and c; b responds as a does, c otherwise; T0 is held out in a, T1 was seen in a alone."
    training = bare(8, 20, "abc", control=np.random.default_rng(2).random((24, 20)))
    delta = training.delta.copy()
    delta[8:16] = delta[:8] + .1*np.random.default_rng(3).normal(size=(8, 20)) + 1.
    keep = ~((training.groups["cell_type"] == "a") & (training.groups["condition"] == "T0+ctrl")).to_numpy()
    keep &= ~((training.groups["cell_type"] != "a") & (training.groups["condition"] == "T1+ctrl")).to_numpy()
    training = Training(training.groups[keep].reset_index(drop=True),
                        [t for t, k in zip(training.targets, keep) if k], delta[keep],
                        training.control[keep])
    return blank(["T0+ctrl", "T1+ctrl", "T99+ctrl"], 20), training


def test_other_lines_by_a_loop():
    template, training = three_lines()
    def of(line): return [i for i, l in enumerate(training.groups["cell_type"]) if l == line]
    mean = {l: training.delta[of(l)].mean(0) for l in "abc"}
    seen = {(training.targets[i][0], training.groups["cell_type"][i]): training.delta[i]
            for i in range(len(training.delta))}
    alike = line_likeness(template, training).loc["a"]
    assert alike["b"] > .95 > .5 > alike["c"] and np.isnan(alike["a"])
    apart = [seen["T0", l] - mean[l] for l in "bc"]
    everywhere, near = same_elsewhere(template, training, None), nearest_line(template, training, None)
    np.testing.assert_allclose(everywhere.delta[0], mean["a"] + np.mean(apart, 0))
    np.testing.assert_allclose(near.delta[0], mean["a"] + apart[0])
    for s in (everywhere, near):    # seen in its own line only, or nowhere: the mean of the line
        np.testing.assert_allclose(s.delta[1:], [mean["a"]]*2)
        assert s.provenance["fallback"] == ["T1+ctrl", "T99+ctrl"]


def test_a_line_without_training_is_compared_by_its_controls():
    template, training = three_lines()
    rows = (training.groups["cell_type"] != "a").to_numpy()
    control = np.where((training.groups["cell_type"] == "c").to_numpy()[:, None], np.arange(20.),
                       np.arange(20.)[::-1])
    rest = Training(training.groups[rows].reset_index(drop=True),
                    [t for t, k in zip(training.targets, rows) if k], training.delta[rows], control[rows])
    asked = PredictionSet("control_mean", template.genes, template.cells,
                          template.observed, template.control, template.groups,
                          np.tile(np.arange(20.)**1.1,
                                  (3, 1)), template.delta, template.train_delta, "log1p")
    assert line_likeness(asked, rest).loc["a"].idxmax() == "c"
    near, c = nearest_line(asked, rest, None), rest.groups["cell_type"].to_numpy() == "c"
    t0 = [t == ("T0",) for t in rest.targets]
    home = np.mean([rest.delta[~c].mean(0), rest.delta[c].mean(0)], 0)
    np.testing.assert_allclose(near.delta[0], home + rest.delta[c & t0][0] - rest.delta[c].mean(0))


def test_what_is_carried_between_simulated_lines_beats_the_mean():
    adata = simulated(n_cell_types=3, n_doubles=0, n_cells=3000)
    held = sorted(set(adata.obs["cell_type"]))[-1]
    split = make_split(adata, "cell_type", held_out=[held], allow_empty_val=True)
    template = test_set(adata, split)
    r = lambda s: np.mean(
        [np.corrcoef(o, p)[0, 1] for b in [pseudobulk(s)] for o, p in zip(b.observed, b.predicted)])
    assert min(r(f(template, adata, split))
               for f in (same_elsewhere, nearest_line)) > r(train_mean(template)) + .05


def test_tanimoto_is_that_of_rdkit():
    from rdkit.DataStructs import CreateFromBitString, TanimotoSimilarity
    bits = (np.random.default_rng(0).random((5, 64)) < .3).astype(float)
    vectors = [CreateFromBitString("".join(str(int(x)) for x in row)) for row in bits]
    expected = [[TanimotoSimilarity(a, b) for b in vectors] for a in vectors]
    np.testing.assert_allclose(tanimoto(bits, bits), expected)
    assert tanimoto(bits[:1]*0, bits[:2]*0).tolist() == [[0, 0]]


def test_compounds_are_answered_by_the_most_alike():
    training, rng = bare(30, 40), np.random.default_rng(5)
    bits = pd.DataFrame((rng.random((33, 80)) < .2).astype(float), index=[f"T{i}" for i in range(33)])
    bits.iloc[31] = bits.iloc[4].where(np.arange(80) > 3, 1 - bits.iloc[4])     # nearly the fourth
    template = blank(["T30+ctrl", "T31+ctrl", "T32+ctrl", "T99+ctrl"], 40)
    found = tanimoto_neighbours(template, training, None, bits, k=(1,), shrink=.25)
    mean = training.delta.mean(0)
    np.testing.assert_allclose(found.delta[1], mean + .75*(training.delta[4] - mean))
    loop = [[(a*b).sum()/((a + b) > 0).sum() for b in bits[:30].to_numpy()] for a in bits[30:].to_numpy()]
    three = tanimoto_neighbours(template, training, None, bits, k=(3,), shrink=0.)
    for i in range(3):
        nearest = np.argsort(-np.array(loop[i]), kind="stable")[:3]
        np.testing.assert_allclose(three.delta[i], training.delta[nearest].mean(0))
    assert three.provenance["fallback"] == ["T99+ctrl"]
    np.testing.assert_allclose(three.delta[3], mean)


def test_what_a_method_was_told_is_read_from_its_name():
    assert told("shuffled ridge, graph").target == "another's features" and told(
        "ridge, graph").features == "graph"
    assert told("train_mean, own gene")[:2] == ("own gene", "all") and told("half_of_the_cells").cells == "half"
    assert {n for n, m in METHODS.items() if m.cells} == {
        "half_of_the_cells", "interpolated_duplicate", "noise_ceiling", "oracle"}
    with pytest.raises(ValueError, match="found 'magic, graph'"): told("magic, graph")


# ---- ceiling and oracle ----

@pytest.mark.parametrize("control", ["cell_type", "batch"])
def test_halves_share_no_cell_and_are_the_means_they_say(case, control):
    adata, split, *_ = case
    template = test_set(adata, split, control=control)
    ps = half_of_the_cells(template, adata, split)
    rest = sorted(set(template.cells.index) - set(ps.cells.index))
    counts = template.cells.groupby(["perturbation", "cell_type"]).size()
    mine = ps.cells.groupby(["perturbation", "cell_type"]).size()
    assert ((counts - mine).between(mine - 1, mine)).all() and len(mine) == len(counts)
    assert set(ps.cells["control"]) <= set(adata.obs_names[split.controls(adata, "test")])
    if control == "cell_type":  # the two halves of the controls make up all of them
        x, p = adata.to_df(), 0
        group = ps.groups.iloc[p]
        first = [
            c for c in rest
            if (template.cells.loc[c, ["perturbation", "cell_type"]] == group[["perturbation", "cell_type"]]
                ).all()
        ]
        reference = x.loc[first].mean().to_numpy() - ps.delta[p]
        n = adata.obs.query("condition == 'ctrl' and cell_type == @group.cell_type").groupby(
            "batch", observed=True).size()
        whole = (reference*(n//2).sum() + ps.control_mean[p]*(n - n//2).sum())/n.sum()
        np.testing.assert_allclose(
            whole,
            template.control_mean[(template.groups.cell_type == group.cell_type).to_numpy()][0],
            rtol=1e-5)
        assert not np.allclose(reference, ps.control_mean[p], atol=1e-3)
    again = half_of_the_cells(template, adata, split, seed=1)
    assert set(again.cells.index) != set(ps.cells.index)


def test_pure_noise_has_no_ceiling_and_pure_signal_has_the_highest():
    adata, split, template, *_ = one_line(noise=1e-4)
    r = lambda s: np.mean(
        [np.corrcoef(o, p)[0, 1] for b in [pseudobulk(s)] for o, p in zip(b.observed, b.predicted)])
    assert r(half_of_the_cells(template, adata, split)) > .999
    adata.X = sp.csr_matrix(np.random.default_rng(0).random(adata.shape, dtype=np.float32))
    assert abs(r(half_of_the_cells(test_set(adata, split), adata, split))) < .1


def test_noise_ceiling_is_where_the_truth_stands():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 2000))
    halves = [truth + 2*rng.normal(size=truth.shape) for _ in range(2)]
    r = lambda a, b: np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)])
    assert abs(noise_ceiling(r(*halves)) - r(truth, np.mean(halves, 0))) < .01
    assert noise_ceiling([-.1, 0., 1.]).tolist() == [0, 0, 1]


def test_single_cells_cannot_be_halved():
    adata, split, template, *_ = one_line(n_cells=400)
    first = adata.obs.groupby("perturbation", observed=True).head(1).index
    few = adata[adata.obs_names.isin(first) | (adata.obs.condition == "ctrl")].copy()
    with pytest.raises(ValueError, match="no perturbation of this part has two cells"):
        half_of_the_cells(test_set(few, split), few, split)
    lone = adata.obs.query("condition == 'ctrl'").groupby("batch", observed=True).head(1).index
    some = adata[(adata.obs.condition != "ctrl") | adata.obs_names.isin(lone)].copy()
    with pytest.raises(ValueError, match="no gem group has two controls"):
        half_of_the_cells(test_set(some, split), some, split)


def test_oracle_reads_either_kind_of_truth(case):
    adata, split, template, *_ = case
    ps, truth = oracle(template, adata, as_delta=False), adata.uns["truth"]
    for p, group in template.groups.iterrows():
        line = list(truth["cell_type"]).index(group.cell_type)
        row = list(truth["condition"]).index(group.condition)
        np.testing.assert_array_equal(ps.delta[p], truth["log_fold_by_cell_type"][line, row])
    changed = oracle(template, adata)
    np.testing.assert_allclose(np.expm1(template.control_mean + changed.delta),
                               np.expm1(template.control_mean)*np.exp(ps.delta),
                               rtol=1e-9)
    genes = sorted({t for c in template.groups.condition for t in set(c.split("+")) - {"ctrl"}})
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(len(genes), adata.n_vars)),
                         index=genes,
                         columns=adata.var_names)
    named = oracle(template, adata, log_fold=table.iloc[:, ::-1], as_delta=False)
    double = next(i for i, c in enumerate(template.groups.condition) if "ctrl" not in c)
    np.testing.assert_allclose(named.delta[double],
                               table.loc[template.groups.condition[double].split("+")].sum(0))
    with pytest.raises(ValueError, match="no row for"): oracle(template, adata, log_fold=table.iloc[1:])
    with pytest.raises(ValueError, match="log_fold: 3 genes are missing"):
        oracle(template, adata, log_fold=table.iloc[:, 3:])
    bare = adata.copy()
    del bare.uns["truth"]
    with pytest.raises(ValueError, match="holds neither 'truth' nor 'true_log_fold'"): oracle(template, bare)


def test_truth_follows_the_names_of_genes_conditions_and_lines(case):
    "The same file in another order has the same oracle; read by position, its r would fall from 0.7 to zero."
    adata, split, template, *_ = case
    order = np.random.default_rng(0).permutation(adata.n_vars)
    moved, truth = adata[:, order].copy(), dict(adata.uns["truth"])
    rows = np.random.default_rng(1).permutation(len(truth["condition"]))
    truth |= dict(condition=truth["condition"][rows], cell_type=truth["cell_type"][::-1],
                  log_fold_by_cell_type=truth["log_fold_by_cell_type"][::-1, rows])
    moved.uns["truth"] = truth
    plain, turned = oracle(template, adata), oracle(test_set(moved, split), moved)
    np.testing.assert_allclose(turned.delta, plain.delta[:, order], atol=1e-12)
    fewer = adata[:, order[:50]].copy()
    np.testing.assert_allclose(oracle(test_set(fewer, split), fewer).delta,
                               plain.delta[:, order[:50]],
                               atol=1e-12)
    alone = {c: dict(zip(adata.uns["truth"]["gene"], adata.uns["truth"]["log_fold_by_cell_type"][0, i]))
             for i, c in enumerate(adata.uns["truth"]["condition"])}
    folds = oracle(test_set(moved, split), moved, as_delta=False)
    p = int(np.flatnonzero(folds.groups["cell_type"] == "line1")[0])
    np.testing.assert_allclose(folds.delta[p], [alone[folds.groups["condition"][p]][g] for g in folds.genes])


# ---- together ----

def test_run_baselines_makes_what_the_data_allow(case):
    adata, split, template, features, relations = case
    sets = run_baselines(template, adata, split, dict(random=features), relations, progress=False)
    assert set(sets) == {
        "control_mean", "train_mean", "train_mean, own gene", "nearest_neighbours, random, own gene",
        "random_forest, random, own gene", "ridge, random", "nearest_neighbours, random",
        "random_forest, random", "gaussian_process, random", "shuffled ridge, random", "graph_neighbours",
        "gaussian_process, graph", "bilinear, random", "same_elsewhere", "nearest_line", "additive",
        "half_of_the_cells", "oracle"
    }
    about = told_table(list(sets))      # every method says what it was told
    assert about.loc["ridge, random", "features"] == "random" and (about["does"] != "").all()
    assert all(s.name == name and s.provenance["split"] == split.hash for name, s in sets.items())
    assert all(s.cost.seconds > 0 and s.cost.peak_gb >= s.cost.before_gb > 0 for s in sets.values())
    some = ["half_of_the_cells", "train_mean"]
    assert list(run_baselines(template, adata, split, only=some, progress=False)) == some
    with pytest.raises(ValueError, match="only: found ridge; these data allow control_mean"):
        run_baselines(template, adata, split, only=["ridge"])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak is never forgotten")
def test_a_cost_is_of_one_method_and_ratios_are_to_another(case):
    template = case[2]
    def slow(): time.sleep(.1); return template
    def large(): return replace(template, delta=template.delta + 0*np.ones(40_000_000).sum())    # 320 MB
    keep_freed_memory()
    np.ones(60_000_000).sum()       # left behind by others; nobody's need
    sets = [replace(with_cost(make), name=name) for name, make in
            dict(train_mean=slow, large=large, small=lambda: template).items()]
    waited, large, small = (s.cost for s in sets)
    assert waited.seconds > .1 > 2*waited.processor_seconds
    assert large.peak_gb - large.before_gb > .25 > .05 > small.peak_gb - small.before_gb
    table = method_costs(sets, dict(large=3.)).set_index("method")
    assert table.index[-1] == "large" and table.trained["large"] == 3
    assert table.seconds_to_train_mean["large"] == pytest.approx((3 + large.seconds)/waited.seconds)
    assert table.seconds_to_gears.isna().all()


def test_training_cells_are_read_once_and_nothing_is_learned_twice(case, monkeypatch):
    adata, split, template, features, relations = case
    read, grown = [], []
    means, forest = baselines.group_means, regressors.RandomForestRegressor
    monkeypatch.setattr(baselines, "group_means",
                        lambda adata, rows, *a: read.append(len(rows)) or means(adata, rows, *a))
    monkeypatch.setattr(regressors, "RandomForestRegressor",
                        lambda *a, **k: grown.append(a) or forest(*a, **k))
    names = [
        "train_mean, own gene", "ridge, x", "random_forest, x", "random_forest, x, own gene",
        "nearest_neighbours, x, own gene", "gaussian_process, x"
    ]
    sets = run_baselines(template, adata, split, dict(x=features), only=names, progress=False)
    assert read == [len(split.cells(adata, "train"))
                    ] and len(grown) == 2  # forests: one for each of the two lines
    given = template, adata, split
    for name, alone in {
            "ridge, x": ridge(*given, features), "train_mean, own gene":
            with_own_gene(train_mean(*given), adata, split), "random_forest, x, own gene": with_own_gene(
                random_forest(*given, features), adata, split)
    }.items():
        np.testing.assert_array_equal(sets[name].delta, alone.delta)
        assert sets[name].provenance.get("own_gene") == alone.provenance.get("own_gene")


def test_neighbours_and_ridge_need_no_array_of_pairs_and_genes():
    "With 40 neighbours the answers are sums of rows; the naive gather would take n × 40 × G numbers."
    rng, genes = np.random.default_rng(0), [f"G{i}" for i in range(400)]
    training = Training(
        pd.DataFrame(dict(condition=[f"{g}+ctrl" for g in genes[:300]], cell_type="a", n_cells=9)),
        [(g, ) for g in genes[:300]], rng.normal(size=(300, 2000)))
    features = pd.DataFrame(rng.normal(size=(400, 5)), index=genes)
    template = blank([f"{g}+ctrl" for g in genes[300:]], 2000)
    centred = (features - features[:300].mean()).to_numpy()
    unit = centred/np.linalg.norm(centred, axis=1)[:, None]
    nearest = np.argsort(-unit[300:] @ unit[:300].T, axis=1, kind="stable")[:, :40]
    mean = training.delta.mean(0)
    naive = mean + .8*(training.delta - mean)[nearest].mean(1)
    tracemalloc.start()
    found = nearest_neighbours(template, training, None, features, k=(40,))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(found.delta, naive, rtol=0, atol=1e-10)
    assert peak < 100*40*2000*8/2


def test_bad_input_is_refused_by_name(case):
    adata, split, template, features, relations = case
    other = make_split(adata,
                       "custom",
                       held_out=dict(train=list(split.train)[:-1], test=list(split.test)),
                       allow_empty_val=True)
    with pytest.raises(ValueError, match="split: has hash .* the template was made with"):
        additive(template, adata, other)
    with pytest.raises(ValueError, match="not the template's genes"):
        additive(template, adata[:, ::-1].copy(), split)
    with pytest.raises(ValueError, match="relations: found columns"):
        graph_neighbours(template, adata, split, relations.rename(columns={"a": "gene"}))
    with pytest.raises(ValueError, match="none of 1 targets is in the graph"):
        diffusion_kernel(relations, ["nobody"])
    bank = FeatureBank(("nobody",), np.ones((1, 3)), Modality.PROTEIN, {})
    with pytest.raises(ValueError, match="has no feature for any of"):
        target_features(bank, ActionTable.from_anndata(adata))


# ---- known answers, measured by hand on the twin (simulated cells, real means) ----

@pytest.mark.slow
def test_known_answers_of_the_twin(shared):
    adata = prepare(
        load_dataset(shared/"k562_essential_twin.h5ad",
                     condition="condition",
                     control="ctrl",
                     batch="gem_group",
                     cell_type="cell_type",
                     guide="guide_id"))
    fold = ad.read_h5ad(shared/"k562_essential_twin.h5ad", backed="r").uns["true_log_fold"]
    edges = pd.read_parquet(shared/"gene_relations.parquet").query("db == 'StringDB'")
    conditions = np.random.default_rng(0).permutation(sorted(set(adata.obs["condition"]) - {"ctrl"})).tolist()
    split = make_split(adata,
                       "custom",
                       held_out=dict(train=conditions[163:], test=conditions[:163]),
                       allow_empty_val=True)
    template, genes = test_set(adata, split), [c.split("+")[0] for c in conditions]
    def r(s, beyond=False):
        b = pseudobulk(s)
        ref = b.train_delta if beyond else 0
        return np.mean([
            np.corrcoef(o - ref, p - ref)[0, 1] for o, p in zip(b.observed, b.predicted)
            if np.ptp(p - ref) > 1e-9
        ])
    process = gaussian_process(template, adata, split, diffusion_kernel(edges, genes))
    assert r(train_mean(template)) == pytest.approx(.324, abs=.02)
    assert r(graph_neighbours(template, adata, split, edges)) == pytest.approx(.405, abs=.02)
    bank = spectral_embedding(edges, width=256)
    known = [g for g in genes if g in bank]
    places = pd.DataFrame(bank.rows(known), index=known)
    assert r(ridge(template, adata, split, places)) == pytest.approx(.395,
                                                                     abs=.035)  # its penalty is chosen here
    assert r(process) == pytest.approx(.439, abs=.02) and r(process, beyond=True) == pytest.approx(.310,
                                                                                                   abs=.03)
    assert r(oracle(template, adata, log_fold=fold, as_delta=False)) == pytest.approx(.500, abs=.02)


def test_a_wider_amplitude_is_further_from_the_train_mean_in_the_same_direction(case):
    adata, split, template, features, _ = case
    made = ridge(template, adata, split, features)
    wide = amplified(made, 1.25)
    np.testing.assert_allclose(wide.delta - template.train_delta, 1.25*(made.delta - template.train_delta))
    assert wide.name == f"{made.name} × 1.25" and told("biojepa × 1.25") == told("biojepa")


def test_the_error_of_a_mean_holds_what_was_added_to_the_memory_but_not_at_targeted_genes():
    added = np.array([[3., 0, 4]])
    found = error_of_mean(np.array([[4., 1, 3]]), added, [("a",)], ["a", "b", "c"])
    np.testing.assert_allclose(found, [[4., 1, 5]])
    assert added[0, 0] == 3     # left as it was
