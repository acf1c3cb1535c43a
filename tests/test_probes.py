"""Probes against scikit-learn and slow forms; perfect representations get the best value, shuffled ones chance;
bad input by name."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from scipy import stats
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from biojepa.config import preset
from biojepa.data.batches import dense_rows
from biojepa.data.controls import name_ranks
from biojepa.explore import gene_probes as g, probes as p, released as old, representations as r
from biojepa.model.biojepa import BioJEPA
from biojepa.model.tokens import TokenSet

N, G = 400, 30


@pytest.fixture(scope="module")
def adata():
    """Cells of two lines and four gem groups that shift their own genes; three single targets, a double and
    controls; planted edges."""
    rng = np.random.default_rng(0)
    condition = rng.choice(["ctrl", "G1+ctrl", "G2+ctrl", "X+ctrl", "G1+G2"], N, p=[.3, .2, .2, .2, .1])
    batch, line = rng.integers(4, size=N), rng.choice(["K562", "RPE1"], N)
    x = np.maximum(0, rng.gamma(2, .6, G) + rng.normal(0, .3, (N, G)) + rng.normal(0, .6, (4, G))[batch])
    for gene in (1, 2): x[[f"G{gene}" in c for c in condition], gene] = 0
    x[condition == "G1+ctrl", 5:15] += .5
    genes = [f"G{i}" for i in range(G)]
    obs = pd.DataFrame(dict(condition=condition,
                            batch=[f"gem{b}" for b in batch],
                            cell_type=line,
                            log_library_size=rng.normal(9, .3, N).astype("float32")),
                       index=[f"c{i}" for i in range(N)])
    adata = AnnData(sp.csr_matrix(x.astype("float32")),
                    obs=obs.assign(perturbation=condition).astype(
                        {c: "category" for c in ("condition", "batch", "cell_type")}),
                    var=pd.DataFrame(dict(gene_name=genes), index=genes))
    adata.uns["biojepa"] = dict(schema_version=1,
                                source="test",
                                expression_space="log1p",
                                history=np.array(["made by hand"]))
    adata.uns["truth"] = dict(edges=dict(source=np.array(["G3", "G3", "G4"]),
                                         sink=np.array(["G5", "G6", "G3"]),
                                         weight=np.array([[1., -3.], [.5, .5], [-2., 2.]])))
    return adata


@pytest.fixture(scope="module")
def labels(): return np.random.default_rng(1).integers(4, size=N).astype(str)


def test_latents_are_the_mean_over_genes_of_the_naive_form(adata):
    torch.manual_seed(0)
    model = BioJEPA(preset("smoke").model.changed(n_genes=G))
    rows = np.array([7, 3, 200, 3])
    with torch.inference_mode():
        naive = model.teacher(dense_rows(adata.X, rows),
                              torch.tensor(adata.obs["log_library_size"].to_numpy()[rows]), None,
                              False).genes().mean(1).numpy()
    np.testing.assert_allclose(r.cell_latents(model, adata, rows, batch_size=3, progress=False),
                               naive,
                               atol=2e-6)
    one = r.cell_latents(model, adata, rows[:1], r.gene_sketch, progress=False)
    np.testing.assert_allclose(r.cell_latents(model, adata, rows, r.gene_sketch, progress=False)[:1],
                               one,
                               atol=1e-4)
    with pytest.raises(ValueError, match="found 29 genes, the model reads 30"):
        r.cell_latents(model, adata[:, :29].copy(), rows, progress=False)
    assert r.gene_embeddings(model).shape == (G, model.config.d_model)
    with torch.no_grad(): model.encoder.tokenizer.gene.weight += 1
    np.testing.assert_allclose(r.gene_embeddings(model) - r.gene_embeddings(model, "teacher"), 1, atol=1e-6)
    with pytest.raises(ValueError, match="part: found 'student'"): r.gene_embeddings(model, "student")


def test_a_sketch_keeps_scalar_products_on_average():
    torch.manual_seed(0)
    tokens = TokenSet(torch.randn(2, 20, 8))
    flat = tokens.x.flatten(1)
    products = np.array([(lambda s: float(s[0]@s[1]))(r.gene_sketch(tokens, 64, seed))
                         for seed in range(400)])
    error = products - float(flat[0] @ flat[1])
    assert abs(error.mean()) < 3*error.std()/20
    assert error.std() < 1.5*float(flat[0].norm()*flat[1].norm())*(2/64)**.5


def test_components_of_latents_see_only_the_cells_they_are_fitted_to(adata):
    torch.manual_seed(0)
    model, fit, rows = BioJEPA(preset("smoke").model.changed(n_genes=G)), np.arange(100), np.arange(200, 230)
    got, other = r.latent_components(model, adata, rows, fit, 4), adata.copy()
    other.X[300:] = other.X[300:]*3
    np.testing.assert_allclose(r.latent_components(model, other, rows, fit, 4), got, atol=1e-3)
    assert got.shape == (30, 4)
    with pytest.raises(ValueError, match="found 2 cells"):
        r.latent_components(model, adata, rows, fit[:2], 4)


def test_the_cells_that_are_probed(adata):
    class Split:
        def cells(self, adata, part):
            return np.flatnonzero(
                adata.obs.condition == dict(train="G1+ctrl", val="X+ctrl", test="G2+ctrl")[part])
        def controls(self, adata, part): return np.flatnonzero(adata.obs.condition == "ctrl")[:20]
    rows, fit = r.probed_cells(adata, Split(), "test", 15)
    assert len(set(rows)) == 15 and set(adata.obs.condition.iloc[rows]) == {"G2+ctrl"}
    assert set(adata.obs.condition.iloc[fit]) == {"G1+ctrl", "ctrl"} and len(
        r.probed_cells(adata, Split(), "all")[0]) == N
    with pytest.raises(ValueError, match="part: found 'held_out'"): r.probed_cells(adata, Split(), "held_out")


def test_components_are_scikit_learns_and_see_only_the_cells_they_are_fitted_to(adata):
    fit, rows = np.arange(0, 200), np.arange(200, 260)
    got = r.cell_components(adata, rows, fit, 5)
    want = PCA(5).fit(adata.X[fit].toarray()).transform(adata.X[rows].toarray())
    np.testing.assert_allclose(np.abs(got), np.abs(want), atol=1e-4)
    other = adata.copy()
    other.X[300:] = other.X[300:]*3
    np.testing.assert_allclose(r.cell_components(other, rows, fit, 5), got, atol=1e-5)
    loadings = r.gene_loadings(adata, fit, 200)   # all components: scalar products are covariances
    np.testing.assert_allclose(loadings @ loadings.T, np.cov(adata.X[fit].toarray().T), atol=1e-4)
    level = r.expression_level(adata, fit)
    np.testing.assert_allclose(
        level,
        np.stack([adata.X[fit].toarray().mean(0), (adata.X[fit].toarray() > 0).mean(0)], 1),
        atol=1e-5)
    with pytest.raises(ValueError, match="found 2 cells"): r.cell_components(adata, rows, fit[:2], 5)


def test_every_label_is_dealt_to_every_part(labels):
    parts = p.label_parts(labels, seed=3)
    counts = pd.crosstab(labels, parts)
    assert set(counts) == {
        "train", "val", "test"
    } and (np.abs(counts.div(counts.sum(1), axis=0) - [.2, .6, .2]) < .02).all(axis=None)
    assert (parts == p.label_parts(labels, seed=3)).all() and (parts != p.label_parts(labels, seed=4)).any()
    few = p.label_parts(["a"]*4 + ["b"]*5)
    assert set(few[:4]) == {""} and sorted(few[4:]) == ["test", "train", "train", "train", "val"]


def test_a_probe_is_logistic_regression_with_the_strength_that_validation_prefers(labels):
    rng = np.random.default_rng(2)
    x, parts = np.eye(4)[labels.astype(int)]*1.2 + rng.normal(size=(N, 4)), p.label_parts(labels)
    train, val, test = (parts == k for k in ("train", "val", "test"))
    scaler, scores = StandardScaler().fit(x[train]), {}
    for c in p.STRENGTHS:
        fitted = LogisticRegression(C=c, max_iter=500).fit(scaler.transform(x[train]), labels[train])
        scores[c] = fitted.score(scaler.transform(x[val]),
                                 labels[val]), fitted.predict(scaler.transform(x[test])) == labels[test]
    best = max(scores, key=lambda c: scores[c][0])
    found = p.fit_probe(x, labels, parts)
    assert found.strength == best and (found.correct == scores[best][1]).all()
    assert .3 < found.correct.mean() < .9


def test_perfect_representations_get_1_and_shuffled_ones_chance(labels):
    perfect, rng = np.eye(4)[labels.astype(int)], np.random.default_rng(3)
    table = p.probe_table(
        {"PCA": perfect[rng.permutation(N)], "perfect": perfect, "noise": rng.normal(size=(N, 6))},
        {"batch": labels, "line": np.full(N, "K562")},
        n_shuffles=4,
        progress=False)
    assert table["representation"].iloc[:3].tolist() == ["PCA", "perfect", "noise"]
    of = table.set_index("representation").loc[["PCA", "perfect", "noise"]]
    assert of.loc["perfect", ["accuracy", "low", "balanced"]].eq(1).all() and of.loc["perfect",
                                                                                     "difference_low"] > .5
    n = int(of.loc["noise", "n_test"])
    for name in ("PCA", "noise"):
        assert abs(of.loc[name, "accuracy"] -
                   .25) < 3*np.sqrt(.25*.75/n)  # 99.7 % of probes without information
    assert (np.abs(of["shuffled"] - .25) < .08).all() and (of["shuffled_high"] >= of["shuffled"]).all()
    assert (of["balanced_chance"]
            == .25).all() and (of.loc["PCA", ["difference", "difference_low", "difference_high"]]
                               == 0).all()
    assert table["note"].iloc[-1] == "left out: 1 label(s), 1 with enough cells" and np.isnan(
        table["accuracy"].iloc[-1])


def test_the_planted_batch_and_perturbation_are_found_in_components(adata):
    rows = np.arange(N)
    table = p.probe_table(
        {"PCA": r.cell_components(adata, rows, rows, 20), "depth": r.library_size(adata, rows)},
        {k: adata.obs[k].astype(str) for k in ("batch", "condition")},
        n_shuffles=1,
        progress=False)
    at = table.set_index(["question", "representation"])
    assert at.loc[("batch", "PCA"),
                  "accuracy"] > .95 and at.loc[("condition", "PCA"),
                                               "accuracy"] > at.loc[("condition", "PCA"), "majority"] + .2
    assert at.loc[("batch", "depth"), "low"] < .3


@pytest.mark.parametrize(
    "change, message",
    [(dict(x=np.ones((N - 1, 2))), "one row, label and part per cell"),
     (dict(x=np.full((N, 2), np.nan)), "NaN "
      "or "
      "infinite"), (dict(labels=np.full(N, "a")), "found 1 among the training cells"),
     (dict(parts=np.full(N, "train")), "no "
      "validation or no test cell"),
     (dict(labels=np.where(np.arange(N) == N - 1, "new", np.where(np.arange(N) % 2, "a", "b")),
           parts=np.repeat(["train", "val", "test"], [200, 100, 100])), "in no training cell")])
def test_probes_refuse_by_name(labels, change, message):
    given = dict(x=np.ones((N, 2)), labels=labels, parts=p.label_parts(labels)) | change
    with pytest.raises(ValueError, match=message): p.fit_probe(**given)


def test_scores_from_tables_and_from_data(adata, tmp_path):
    (tmp_path/"scores.csv").write_text("symbol,chronos\nG1,-1.5\nG2,\nG3,0.25\n")
    assert g.read_scores(tmp_path/"scores.csv", "symbol", "chronos").to_dict() == {"G1": -1.5, "G3": .25}
    for table, message in ((dict(gene=["A"], s=[1]), r"columns \['score'\] are missing"), (dict(
            gene=["A"], score=["high"]), "'high' in column 'score'"), (dict(
                gene=["A", "A"],
                score=[1, 2]), "'A' stands twice"), (dict(gene=["A"], score=[np.inf]), "infinite values")):
        with pytest.raises(ValueError, match=message):
            g.read_scores(pd.DataFrame(table))
    with pytest.raises(ValueError, match="no such file"): g.read_scores(tmp_path/"none.csv")
    planted = g.planted_scores(adata)
    assert planted[["G3", "G4", "G5"
                    ]].tolist() == [2.5, 2., 0.] and planted.index.tolist() == adata.var_names.tolist()
    plain = AnnData(adata.X, obs=adata.obs, var=adata.var)
    with pytest.raises(ValueError, match="no planted network"): g.planted_scores(plain)
    effects = g.effect_scores(adata)
    assert sorted(effects.index) == ["G1", "G2"]    # X is not measured, the double is no single
    rows = lambda c, line: adata.X[
        ((adata.obs.condition == c) & (adata.obs.cell_type == line)).to_numpy()].toarray().mean(0)
    expected = np.mean([
        np.sqrt((np.delete(rows("G1+ctrl", l) - rows("ctrl", l), 1)**2).sum()/G) for l in ("K562", "RPE1")
    ])
    assert effects["G1"] == pytest.approx(expected, rel=1e-5) and effects["G1"] > 2*effects["G2"]


def test_scores_of_the_genes_that_are_measured(adata, tmp_path):
    (tmp_path/"s.csv").write_text("gene,score\nG3,1\nG1,2\nTP53,5\n")
    score, meaning = g.gene_scores(adata, tmp_path/"s.csv", negate=True)
    assert score.to_dict() == {"G1": -2., "G3": -1.} and meaning == "− score (s.csv)"
    assert g.gene_scores(adata)[1].startswith("planted") and len(g.gene_scores(adata)[0]) == G
    plain = AnnData(adata.X, obs=adata.obs, var=adata.var, uns=dict(biojepa=adata.uns["biojepa"]))
    assert g.gene_scores(plain)[0].to_dict() == g.effect_scores(adata)[["G1", "G2"]].to_dict()
    (tmp_path/"s.csv").write_text("gene,score\nTP53,5\n")
    with pytest.raises(ValueError, match="none of 1 genes is among the 30 measured"):
        g.gene_scores(adata, tmp_path/"s.csv")


def test_representations_of_genes_are_rows_of_training_cells(adata):
    class Split:
        def cells(self, adata, part): return np.arange(50)
        def controls(self, adata, part): return np.arange(50, 80)
    model, other = BioJEPA(preset("smoke").model.changed(n_genes=G)), adata.copy()
    other.X[200:] = other.X[200:]*3
    got, same = (r.gene_representations(model, a, Split(), ["G5", "G0"]) for a in (adata, other))
    for name in got: np.testing.assert_allclose(got[name], same[name], atol=1e-5)
    np.testing.assert_allclose(got["gene embedding"], r.gene_embeddings(model)[[5, 0]])
    np.testing.assert_allclose(
        got["embedding and level"],
        np.concatenate(
            [got["gene embedding"], r.expression_level(adata, np.arange(80))[[5, 0]]], 1))
    with pytest.raises(ValueError, match="'TP53' is not measured"):
        r.gene_representations(model, adata, Split(), ["G1", "TP53"])


def gene_case(n=200, seed=0):
    rng = np.random.default_rng(seed)
    score = pd.Series(rng.gamma(2, 1, n), [f"g{i}" for i in range(n)])
    held = np.stack([score.to_numpy() + .01*rng.normal(size=n), rng.normal(size=n)], 1)
    return {
        "held": held, "dealt anew": held[rng.permutation(n)], "expression level": rng.normal(size=(n, 2))
    }, score


def test_gene_probes_find_a_score_and_nothing_in_shuffled_rows():
    representations, score = gene_case()
    result = g.gene_probe(representations, score, n_shuffles=6, n_draws=400, progress=False)
    at = result.table.set_index(["representation", "measure"])
    for measure, best in (("auroc", 1.), ("r", 1.), ("rho", 1.)):
        assert at.loc[("held", measure), "value"] > .98*best and at.loc[("held", measure),
                                                                        "difference_low"] > .2
        chance = at.loc[("dealt anew", measure), "chance"]
        assert at.loc[("dealt anew", measure), "low"] < chance < at.loc[("dealt anew", measure), "high"]
        assert abs(at.loc[("held", measure), "shuffled"] - chance) < .12
    assert (at["n_positive"] == 50).all() and len(result.genes) == 3*200
    assert result.genes.groupby(["representation", "fold"]).positive.sum().eq(10).all()


def test_gene_probe_values_are_scipys_and_scikit_learns_on_held_out_genes():
    representations, score = gene_case(seed=1)
    representations["held"] = representations["held"] + np.random.default_rng(5).normal(0, 2, (200, 2))
    result = g.gene_probe({k: representations[k] for k in ("held", "expression level")},
                          score,
                          n_shuffles=0,
                          n_draws=200,
                          progress=False)
    folds = [rows for _, rows in result.genes[result.genes.representation == "held"].groupby("fold")]
    at = result.table.set_index(["representation", "measure"])["value"]["held"]
    assert at["auroc"] == pytest.approx(np.mean([roc_auc_score(r.positive, r.probability) for r in folds]))
    assert at["r"] == pytest.approx(np.mean([stats.pearsonr(r.predicted, r.score)[0] for r in folds]))
    assert at["rho"] == pytest.approx(np.mean([stats.spearmanr(r.predicted, r.score)[0] for r in folds]))
    assert np.isnan(result.table["shuffled"]).all()


def test_bootstrap_weights_are_repeats():
    rng = np.random.default_rng(0)
    s, label, y = np.round(rng.normal(size=20), 1), rng.random(20) < .4, rng.normal(size=20)
    w = rng.multinomial(20, np.full(20, .05))
    again = np.repeat(np.arange(20), w)
    assert g._weighted_auroc(s, label, w[None])[0] == pytest.approx(roc_auc_score(label[again], s[again]))
    assert g._weighted_pearson(s, y, w[None])[0] == pytest.approx(stats.pearsonr(s[again], y[again])[0])
    assert np.isnan(g._weighted_auroc(s, label, (w*label)[None])[0])


@pytest.mark.parametrize(
    "change, message",
    [(dict(reference="level"), "'level' is not among"),
     (dict(threshold=99.), "0 of 200 genes are above 99"),
     (dict(score=gene_case()[1].iloc[:50]), "one row per gene"),
     (dict(score=gene_case()[1]*np.nan), "score: "
      "found NaN"),
     (dict(score=pd.Series(np.arange(200) < 5, dtype=float)), "5 of 200 genes are above 0.5")])
def test_gene_probes_refuse_by_name(change, message):
    representations, score = gene_case()
    with pytest.raises(ValueError, match=message):
        g.gene_probe(**(dict(representations=representations, score=score, n_shuffles=0, progress=False)
                        | change))


# --- as released
# ------------------------------------------------------------------------------------------------------

def adam_by_hand(x, gradient, shape, steps, clip, seed):
    "Weights and biases of a linear layer after each step of Adam (Kingma and Ba 2015, algorithm 1), in float64."
    torch.manual_seed(seed)
    layer = torch.nn.Linear(*shape[::-1])
    theta = [w.detach().numpy().astype(float) for w in (layer.weight, layer.bias)]
    m, v = ([np.zeros_like(w) for w in theta] for _ in range(2))
    for t in range(1, steps + 1):
        error = gradient(x @ theta[0].T + theta[1])     # of the loss by each output
        g = [error.T @ x, error.sum(0)]
        norm = np.sqrt(sum((part**2).sum() for part in g))
        for i, part in enumerate(g):
            part = part*min(1, clip/norm)
            m[i], v[i] = .9*m[i] + .1*part, .999*v[i] + .001*part**2
            theta[i] = theta[i] - .001*(m[i]/(1 - .9**t))/(np.sqrt(v[i]/(1 - .999**t)) + 1e-8)
        yield [w.copy() for w in theta]


def test_released_cell_probe_by_hand():
    "Four fifths, 100 steps of cross-entropy, and the best of five looks at the other fifth."
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], [30, 50, 40])
    x = rng.normal(size=(120, 300)) + .2*np.repeat(rng.normal(size=(3, 300)), [30, 50, 40], 0)
    train, test = train_test_split(np.arange(120), test_size=.2, random_state=5)
    code = np.searchsorted(["a", "b", "c"], labels)
    one_hot = np.eye(3)[code[train]]
    def gradient(z): return (softmax(z, axis=1) - one_hot)/len(train)
    steps = list(adam_by_hand(x[train], gradient, (3, 300), 100, np.inf, 5))
    looks = [((x[test] @ w.T + b).argmax(1) == code[test]).mean() for w, b in steps[19::20]]
    found = old.released_cell_probe(x, labels, 5)
    assert found["accuracy"] == pytest.approx(max(looks)) and len(looks) == 5
    assert max(looks) > found["majority"] == pytest.approx(50/120)
    assert (found["chance"], found["n_labels"], found["n_train"], found["n_test"]) == (pytest.approx(
        1/3), 3, 96, 24)


def test_released_gene_probe_by_hand():
    "500 steps of squared error with clipped gradients; AUROC and correlations for the other fifth."
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 12))
    score = 3*(x @ rng.normal(size=12)) + rng.normal(size=200)
    train, test = train_test_split(np.arange(200), test_size=.2, random_state=2)
    *_, (w, b) = adam_by_hand(x[train], lambda z: 2*(z - score[train, None])/len(train), (1, 12), 500, 1., 2)
    named, order = pd.Series(score, [f"G{i:03d}" for i in range(200)]), rng.permutation(200)
    guess, found = (x[test] @ w.T + b)[:, 0], old.released_gene_probe(x, named, 4., 2)
    assert old.released_gene_probe(x[order], named.iloc[order], 4., 2) == found     # the parts follow names
    assert found["r"] == pytest.approx(stats.pearsonr(guess, score[test])[0], abs=1e-4)
    assert found["rho"] == pytest.approx(stats.spearmanr(guess, score[test])[0], abs=5e-3)
    assert found["auroc"] == pytest.approx(roc_auc_score(score[test] > 4, guess), abs=5e-3)
    assert found["n_positive"] == (score[test] > 4).sum()
    assert np.isnan(old.released_gene_probe(x, named, 1e9, 2)["auroc"])


def test_released_probes_read_the_students_latents_of_the_paired_control_cells(adata, monkeypatch):
    torch.manual_seed(0)
    model = BioJEPA(preset("smoke").model.changed(n_genes=G))
    with torch.no_grad(): model.encoder.tokenizer.gene.weight.normal_()     # the teacher is another model now
    rows, ctrl = np.arange(50), np.flatnonzero(adata.obs["condition"] == "ctrl")[np.arange(50) % 7]
    labels = dict(batch=np.repeat(["a", "b"], 25), perturbation=np.tile(["x", "y"], 25))
    frame = pd.DataFrame(labels | dict(control=adata.obs_names[ctrl]), index=adata.obs_names[rows])
    seen = []
    def probe(x, labels, seed):
        seen.append((x, list(labels)))
        return dict(accuracy=0.)
    monkeypatch.setattr(old, "released_cell_probe", probe)
    table = old.released_cell_probes(model, adata, SimpleNamespace(cells=frame), progress=False)
    size = torch.tensor(adata.obs["log_library_size"].to_numpy())
    order = np.argsort(name_ranks(frame.index), kind="stable")     # cells are asked in the order of their names
    frame, ctrl, rows = frame.iloc[order], ctrl[order], rows[order]
    for got, cells in ((seen[0][0], ctrl), (seen[2][0], rows)):
        with torch.inference_mode():
            tokens = model.encoder(dense_rows(adata.X, cells), size[cells], None, False)
        np.testing.assert_allclose(got, tokens.genes().mean(1).numpy(), atol=2e-6)
    assert seen[0][1] == frame["batch"].tolist() and seen[3][1] == frame["perturbation"].tolist()
    assert seen[1][0].shape == seen[0][0].shape and table["representation"].eq("released run").sum() == 2
    assert table.groupby("question").size().eq(4).all()
    with pytest.raises(ValueError, match="part: found 'student'"):
        r.cell_latents(model, adata, rows, part="student", progress=False)
