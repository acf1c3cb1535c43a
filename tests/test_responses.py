"""Pictures of responses: each table against loops or scipy, each figure against the numbers it was given.

1. Which rows and genes are drawn follows from the observed responses, never from the prediction.
2. Every number of a table equals one that a naive computation gives.
3. What is drawn is what the table holds, in its order, with the same colours in both halves.
4. A figure in few colours falsifies no colour scale.
"""
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from matplotlib.patches import Rectangle
from PIL import Image
from scipy import stats
from scipy.spatial.distance import pdist

from biojepa.core import PATHS
from biojepa.evaluate.differential import observed_de
from biojepa.evaluate.pictures import (
    cluster_order, forest_table, largest_responses, latents_table, pairs_table, plane_table, response_table,
    row_names, similarity_table, top_genes_table, volcano_table
)
from biojepa.plots import responses as drawn
from biojepa.predict.sets import PredictionSet, pseudobulk

GENES = ("A", "B", "C", *(f"G{i}" for i in range(3, 40)))
CONDITIONS = ("A+ctrl", "B+ctrl", "A+B", "A+C", "G7+ctrl")


@pytest.fixture(scope="module")
def ps():
    "Two lines, five conditions of 12 to 40 cells, two guides each, a Δ of its own predicted for every cell."
    rng = np.random.default_rng(4)
    base = {line: rng.gamma(2, .6, len(GENES)) for line in ("K562", "RPE1")}
    shift = {c: rng.normal(0, .8, len(GENES))*(rng.random(len(GENES)) < .5) for c in CONDITIONS}
    cells, x, control = [], [], []
    for line in base:
        for k, condition in enumerate(CONDITIONS):
            for i in range(12 + 7*k):
                cells.append((f"{condition}|g{i % 2}", condition, "0", line, f"control{i}"))
                x.append(base[line] + shift[condition] + rng.normal(0, .4, len(GENES)))
                control.append(base[line] + rng.normal(0, .4, len(GENES)))
    columns = ["perturbation", "condition", "batch", "cell_type", "control"]
    cells = pd.DataFrame(cells, columns=columns, index=[f"cell{i}" for i in range(len(x))])
    grouped = cells.groupby(["perturbation", "condition", "cell_type"])
    groups = grouped.size().rename("n_cells").reset_index()
    x, control = (sp.csr_matrix(np.maximum(0, v).astype(np.float32)) for v in (x, control))
    mean = np.stack([base[line]
                     for line in groups["cell_type"]]) + rng.normal(0, .05, (len(groups), len(GENES)))
    delta = np.stack([shift[c] for c in groups["condition"]])*.6 + rng.normal(0, .1, mean.shape)
    code = grouped.ngroup()
    cell_delta = (delta[code] + rng.normal(0, .1, x.shape)).astype(np.float32)
    return PredictionSet("guess", GENES, cells.assign(group=code), x, control, groups, mean, delta,
                         rng.normal(0, .2, len(GENES)), "log1p", cell_delta)


@pytest.fixture(scope="module")
def pb(ps): return pseudobulk(ps)


def naive_delta(ps, condition, line):
    "Δ of every cell of a condition in a line, by a loop over cells."
    rows = [i for i, c in enumerate(ps.cells.itertuples()) if c.condition == condition and c.cell_type == line]
    return np.stack([ps.observed[i].toarray()[0] - ps.control_mean[ps.group[i]] for i in rows])


def row_of(pb, condition, line):
    about = pb.conditions
    return int(np.flatnonzero((about["condition"] == condition) & (about["cell_type"] == line))[0])


def test_choice_and_order_do_not_know_the_prediction(ps, pb):
    other = pseudobulk(ps.with_prediction("other", np.random.default_rng(0).normal(0, 9, ps.delta.shape)))
    assert (largest_responses(pb, 5) == largest_responses(other, 5)).all()
    a, b = response_table(pb, 4, 10), response_table(other, 4, 10)
    pd.testing.assert_frame_equal(a.drop(columns=["predicted", "r"]), b.drop(columns=["predicted", "r"]))
    assert (similarity_table(pb)[["a", "b", "observed"]] == similarity_table(other)[["a", "b",
                                                                                     "observed"]]).all(None)


def test_strongest_is_the_largest_effect_among_those_with_enough_cells(ps, pb):
    effect = {(c, l): np.sqrt((naive_delta(ps, c, l).mean(0)**2).mean())
              for c in CONDITIONS for l in ("K562", "RPE1")}
    found = [(r.condition, r.cell_type) for r in pb.conditions.iloc[largest_responses(pb, 10)].itertuples()]
    few = [key for key in found if key[0] in ("A+ctrl", "B+ctrl")]     # 12 and 19 cells
    assert found[-4:] == sorted(few, key=effect.get, reverse=True)
    assert found[:6] == sorted(found[:6], key=effect.get, reverse=True) and len(set(found)) == 10


def test_names_tell_lines_apart_only_where_there_are_several(pb):
    names = row_names(pb)
    assert names[row_of(pb, "A+B", "RPE1")] == "A+B (RPE1)" and names[row_of(pb, "G7+ctrl",
                                                                             "K562")] == "G7 (K562)"
    one = pb.conditions["cell_type"] == "K562"
    few = pb._replace(conditions=pb.conditions[one].reset_index(drop=True))
    assert set(row_names(few)) == {"A", "B", "A+B", "A+C", "G7"}


def test_cluster_order_puts_copies_beside_each_other():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 9)).repeat(2, 0)[rng.permutation(12)]
    ordered = x[cluster_order(x)]
    assert np.allclose(ordered[::2], ordered[1::2]) and (pdist(ordered[::2]) > 1).all()
    assert list(cluster_order(x[:2])) == [0, 1]


def test_heat_map_table_holds_each_mean_once(ps, pb):
    table = response_table(pb, 6, 12)
    assert table.shape[0] == 6*12 and not table.duplicated(["perturbation", "gene"]).any()
    names = list(row_names(pb))
    for row in table.iloc[::7].itertuples():
        about, gene = pb.conditions.iloc[names.index(row.perturbation)], GENES.index(row.gene)
        cells = naive_delta(ps, about["condition"], about["cell_type"])
        assert row.observed == pytest.approx(cells[:, gene].mean(), abs=1e-6)
        groups = [(g.n_cells, ps.delta[i]) for i, g in enumerate(ps.groups.itertuples())
                  if g.condition == about["condition"] and g.cell_type == about["cell_type"]]
        predicted = sum(n*d for n, d in groups)/sum(n for n, _ in groups)
        assert row.predicted == pytest.approx(predicted[gene]) and row.train_mean == ps.train_delta[gene]
        assert row.r == pytest.approx(stats.pearsonr(predicted, cells.mean(0))[0], abs=1e-6)
        assert row.target == (row.gene in about["condition"].split("+"))
    shown = {g for name in set(table["perturbation"]) for g in name.split(" ")[0].split("+")}
    assert shown <= set(table["gene"]), "a target that was measured is always shown"


def test_boxes_are_quantiles_of_the_cells_and_their_mean_is_the_observed_change(ps, pb):
    row = row_of(pb, "A+B", "K562")
    table, cells = top_genes_table(ps, row, 8), naive_delta(ps, "A+B", "K562")
    assert list(table["gene"]) == [GENES[i] for i in np.argsort(-abs(cells.mean(0)))[:8]]
    at = [GENES.index(g) for g in table["gene"]]
    np.testing.assert_allclose(table["observed"], cells.mean(0)[at], atol=1e-6)
    for name, share in dict(q05=5, q25=25, q50=50, q75=75, q95=95).items():
        np.testing.assert_allclose(table[name], np.percentile(cells[:, at], share, axis=0), atol=1e-6)
    assert (table["n_cells"] == len(cells)).all() and list(
        table["target"]) == [g in "AB" for g in table["gene"]]


class Screen:
    "As much of a split as `observed_de` asks for."
    def __init__(self, controls): self.rows = controls
    def controls(self, adata, part): return self.rows


def test_volcano_has_the_p_values_of_scipy(ps, pb):
    rng = np.random.default_rng(7)
    lines = np.repeat(["K562", "RPE1"], 50)
    x = np.maximum(0, rng.normal(1, .5, (100, len(GENES)))).astype(np.float32)
    adata = AnnData(sp.csr_matrix(x),
                    obs=pd.DataFrame(dict(cell_type=lines), index=[f"c{i}" for i in range(100)]),
                    var=pd.DataFrame(index=list(GENES)))
    de = observed_de(ps, adata, Screen(np.arange(100)))
    table = volcano_table(pb, de, row_of(pb, "A+C", "RPE1"))
    mine = (ps.cells["condition"] == "A+C") & (ps.cells["cell_type"] == "RPE1")
    cells = ps.observed[mine.to_numpy()].toarray().astype(float)
    p = stats.ttest_ind(cells, x[lines == "RPE1"].astype(float), equal_var=False).pvalue
    np.testing.assert_allclose(table["p_adjusted"], stats.false_discovery_control(p), rtol=1e-3, atol=1e-40)
    assert list(table["gene"]) == list(GENES) and set(table.loc[table["target"], "gene"]) == {"A", "C"}
    with pytest.raises(ValueError, match="call observed_de on the same set"):
        volcano_table(pb, de._replace(genes=GENES[::-1]), 0)
    untested = de._replace(p_adjusted=np.where(np.arange(len(GENES)) == 3, np.nan, de.p_adjusted))
    assert "G3" not in set(volcano_table(pb, untested, 0)["gene"])


def test_plane_is_fitted_to_observed_cells_and_predicted_ones_are_put_into_it(ps, pb):
    rows = [row_of(pb, "A+C", "K562"), row_of(pb, "G7+ctrl", "RPE1")]
    table = plane_table(ps, rows, most=1000)
    at = np.concatenate([np.flatnonzero((ps.cells["condition"] == c) & (ps.cells["cell_type"] == l))
                         for c, l in (("A+C", "K562"), ("G7+ctrl", "RPE1"))])
    control, observed = ps.control[at].toarray(), ps.observed[at].toarray()
    both = np.concatenate([control, observed])
    _, size, axes = np.linalg.svd(both - both.mean(0), full_matrices=False)
    predicted = np.clip(control + ps.cell_delta[at], 0, None)
    for kind, x in dict(control=control, observed=observed, predicted=predicted).items():
        xy = (x - both.mean(0)) @ axes[:2].T
        mine = table[table["kind"] == kind][["x", "y"]].to_numpy()
        np.testing.assert_allclose(abs(mine), abs(xy), atol=1e-3)      # a component's sign is free
    np.testing.assert_allclose(table[["x_share", "y_share"]].iloc[0], (size**2/(size**2).sum())[:2], rtol=1e-4)
    changed = ps.with_prediction("wild", ps.delta*9, ps.cell_delta*9)
    same = plane_table(changed, rows, most=1000)
    pd.testing.assert_frame_equal(same[same["kind"] != "predicted"], table[table["kind"] != "predicted"])
    assert (plane_table(ps, rows, most=5).groupby(["panel", "kind"]).size() == 5).all()


def test_similarity_is_numpys_correlation_and_undefined_for_a_constant(ps, pb):
    table, names = similarity_table(pb, 7), list(row_names(pb))
    for half in ("observed", "predicted"):
        r = np.corrcoef(getattr(pb, half))
        expected = [r[names.index(a), names.index(b)] for a, b in zip(table["a"], table["b"])]
        np.testing.assert_allclose(table[half], expected, atol=1e-12)
    flat = similarity_table(pseudobulk(ps.with_prediction("flat", np.zeros_like(ps.delta))))
    assert flat["predicted"].isna().all() and len(flat) == 100


def test_latents_are_components_of_all_cells_whatever_is_drawn():
    rng = np.random.default_rng(2)
    z = rng.normal(size=(300, 6))*[5, 3, 1, 1, 1, 1]
    labels = dict(batch=rng.integers(3, size=300).astype(str), perturbation=np.arange(300).astype(str))
    few, all_ = (latents_table({"z": z}, labels, most) for most in (40, 300))
    _, size, axes = np.linalg.svd(z - z.mean(0), full_matrices=False)
    np.testing.assert_allclose(abs(all_[["x", "y"]]), abs((z - z.mean(0)) @ axes[:2].T), atol=1e-8)
    np.testing.assert_allclose(all_[["x_share", "y_share"]].iloc[0], (size**2/(size**2).sum())[:2])
    assert len(few) == 40 and (all_["perturbation"].astype(int) == np.arange(300)).all()
    where = few["perturbation"].astype(int)
    np.testing.assert_allclose(few[["x", "y"]], all_[["x", "y"]].iloc[where])
    assert list(few["batch"]) == list(labels["batch"][where])


@pytest.fixture(scope="module")
def screen():
    "Single perturbations of A and B in both lines, of C only in RPE1, a pair, and controls."
    rng = np.random.default_rng(3)
    kinds = [("A+ctrl", "K562"), ("B+ctrl", "K562"), ("A+ctrl", "RPE1"), ("B+ctrl", "RPE1"), ("C+ctrl", "RPE1"),
             ("B+C", "K562"), ("ctrl", "K562"), ("ctrl", "RPE1")]
    obs = pd.DataFrame([k for k in kinds for _ in range(6)], columns=["condition", "cell_type"])
    obs = obs.assign(perturbation=obs["condition"], batch="0").set_axis([f"s{i}" for i in range(len(obs))])
    x = sp.csr_matrix(rng.gamma(1, 1, (len(obs), len(GENES))).astype(np.float32))
    return AnnData(x, obs=obs, var=pd.DataFrame(index=list(GENES)))


def test_sums_are_of_members_measured_alone_in_the_same_line(ps, pb, screen):
    split = Screen(np.flatnonzero(screen.obs["condition"] == "ctrl"))
    table = pairs_table(ps, screen, split)
    assert set(table["pair"]) == {"A+B (K562)", "A+B (RPE1)", "A+C (RPE1)"}, "C was not measured alone in K562"

    def mean(condition, line):
        mine = (screen.obs["condition"] == condition) & (screen.obs["cell_type"] == line)
        return screen.X[mine.to_numpy()].toarray().astype(float).mean(0)

    for name, genes in table.groupby("pair"):
        members, line = name.split(" ")[0].split("+"), name.split("(")[1][:-1]
        total = sum(mean(f"{t}+ctrl", line) - mean("ctrl", line) for t in members)
        np.testing.assert_allclose(genes["total"], total, atol=1e-6)
        row = list(row_names(pb)).index(name)
        assert (genes["observed"].to_numpy() == pb.observed[row]).all()
        assert (genes["predicted"].to_numpy() == pb.predicted[row]).all() and list(genes["gene"]) == list(GENES)
    assert pairs_table(ps, screen, split, 1)["pair"].nunique() == 1
    unknown = screen[~screen.obs["condition"].isin(["A+ctrl", "B+ctrl", "C+ctrl"])].copy()
    nothing = pairs_table(ps, unknown, Screen(np.flatnonzero(unknown.obs["condition"] == "ctrl")))
    assert nothing.empty and "total" in nothing


def test_forest_reads_tables_of_scores_and_passes_over_others(tmp_path):
    scores = pd.DataFrame(dict(metric="r_delta", method=["biojepa", "train_mean", "ceiling"], mean=[.5, .3, .6],
                               low=.1, high=.9, n=8))
    scores.to_csv(tmp_path/"one_file.csv")
    scores.assign(mean=[.5, .3, -.1]).to_csv(tmp_path/"two.csv")
    pd.DataFrame(dict(file=["x"], mean=[1.])).to_csv(tmp_path/"forest_files.csv")
    table = forest_table(tmp_path).set_index("file")
    assert list(table.index) == ["one_file", "two"]
    assert table.loc["one_file", "noise_ceiling"] == pytest.approx(.75**.5)
    assert table.loc["two", "noise_ceiling"] == 0 and table.loc["two", "train_mean"] == .3
    given = scores.assign(method=["biojepa", "half_of_the_cells", "noise_ceiling"])
    given.to_csv(tmp_path/"given.csv")
    assert forest_table(tmp_path).set_index("file").loc[
        "given", "noise_ceiling"] == .6, "a row of its own comes first"
    given[:2].to_csv(tmp_path/"given.csv")
    assert forest_table(tmp_path).set_index("file").loc["given", "noise_ceiling"] == pytest.approx((.6/1.3)**.5)
    scores[1:].to_csv(tmp_path/"three.csv")
    with pytest.raises(ValueError, match="three.csv: lacks r_delta of biojepa"): forest_table(tmp_path)
    with pytest.raises(ValueError, match="no csv there is a table of summarise"):
        forest_table(PATHS.root/"tests")


def test_noise_ceiling_of_halves_is_the_correlation_with_the_truth():
    "Spearman and Brown on simulated cells: two halves say how far the mean of all cells is from the truth."
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(200, 400))
    a, b = (truth + rng.normal(0, 1.5, truth.shape) for _ in range(2))
    r = lambda x, y: np.mean([stats.pearsonr(*pair)[0] for pair in zip(x, y)])
    half = r(a, b)
    assert np.sqrt(2*half/(1 + half)) == pytest.approx(r((a + b)/2, truth), abs=.01)


def test_heat_map_shows_the_table(pb):
    table = response_table(pb, 6, 12)
    fig = drawn.plot_heat_map(table, "title")
    above, below, strip = fig.axes[:3]
    genes = list(table["gene"].unique())
    for ax, half in ((above, "observed"), (below, "predicted")):
        image = ax.images[0].get_array()
        for row in table.itertuples():
            y, x = list(table["perturbation"].unique()).index(row.perturbation), genes.index(row.gene)
            assert image[y, x] == getattr(row, half)
        boxed = {(int(p.get_x() + .5), int(p.get_y() + .5)) for p in ax.patches if isinstance(p, Rectangle)}
        assert len(boxed) == table["target"].sum() > 0
        assert all(table["target"].to_numpy().reshape(6, 12)[y, x] for x, y in boxed)
        assert [t.get_text() for t in ax.get_yticklabels()] == list(table["perturbation"].unique())
    limits = {image.get_clim() for ax in (above, below, strip) for image in ax.images}
    assert len(limits) == 1 and sum(limits.pop()) == 0, "one colour scale for all, white at 0"
    assert [t.get_text()
            for t in strip.get_xticklabels()] == genes and strip.images[0].get_array().shape == (1, 12)
    assert [t.get_text()
            for t in below.texts] == [f"{r:.2f}" for r in table.drop_duplicates("perturbation")["r"]]


def test_top_genes_and_volcano_show_the_table(ps, pb):
    table = top_genes_table(ps, 0, 6)
    ax = drawn.plot_top_genes(table).axes[0]
    marks = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert list(marks["predicted"]) == list(table["predicted"])
    assert list(marks["train mean"]) == list(table["train_mean"])
    assert [t.get_text() for t in ax.get_xticklabels()] == list(table["gene"])
    volcano = pd.DataFrame(
        dict(perturbation="P",
             gene=list(GENES),
             observed=np.linspace(-1, 1, 40),
             predicted=np.linspace(-1, 2, 40),
             p_adjusted=np.r_[0., np.linspace(1e-9, 1, 39)],
             target=False))
    ax = drawn.plot_volcano(volcano, n_labels=3).axes[0]
    xy = ax.collections[0].get_offsets()
    assert len(xy) == 40 and xy[:, 1].max() == pytest.approx(300) and np.isfinite(
        xy).all(), "p = 0 is drawn at 1e-300"
    labelled = [t.get_text() for t in ax.texts]
    assert labelled == ["A", "B", "C"], "the most certain on the left; none on the right is certain enough"
    heights = [t.xyann[1] for t in ax.texts]
    assert (np.diff(heights) < 0).all() and -np.diff(heights).max() >= np.ptp(ax.get_ylim())/20
    crowd = volcano.assign(p_adjusted=.01)
    ax = drawn.plot_volcano(crowd).axes[0]
    heights = np.array([t.xyann[1] for t in ax.texts[:6]])
    assert (-np.diff(heights) >= np.ptp(ax.get_ylim())/20).all(), "names of one height are spread"
    assert (heights >= ax.get_ylim()[0]).all(), "and stay inside the axes"


def test_every_figure_is_closed_and_refuses_a_table_without_a_column(ps, pb, screen):
    pairs = pairs_table(ps, screen, Screen(np.flatnonzero(screen.obs["condition"] == "ctrl")))
    cells = latents_table({"z": ps.observed.toarray()}, dict(batch=np.arange(len(ps)) % 11))
    forest = pd.DataFrame(dict(file=["a_b", "c"], n=3, mean=.3, low=.1, high=.5, train_mean=.2,
                               noise_ceiling=[.8, np.nan]))
    given = [(drawn.plot_cells, plane_table(ps, [0, 1]), "kind"),
             (drawn.plot_similarity, similarity_table(pb), "b"), (drawn.plot_pairs, pairs, "total"),
             (drawn.plot_forest, forest, "noise_ceiling")]
    for plot, table, column in given:
        fig = plot(table)
        fig.canvas.draw()
        with pytest.raises(ValueError, match=f"columns \\['{column}'\\] are missing"):
            plot(table.drop(columns=column))
    fig = drawn.plot_latents(cells, ["batch"])
    assert fig.axes[0].get_legend().get_texts()[0].get_text() == "3 others", "eight of eleven are named"
    with pytest.raises(ValueError, match="'perturbation'"): drawn.plot_latents(cells, ["perturbation"])
    with pytest.raises(ValueError, match="holds no pair"): drawn.plot_pairs(pairs.iloc[:0])
    assert not plt.get_fignums()


def test_few_colours_falsify_no_colour(pb):
    fig = drawn.plot_heat_map(response_table(pb))
    fig.savefig(BytesIO(), dpi=fig.dpi)     # the layout settles in the first drawing
    light, full = drawn.light(fig).data, BytesIO()
    fig.savefig(full, format="png", dpi=fig.dpi)
    a, b = (np.asarray(Image.open(f).convert("RGB"), int) for f in (full, BytesIO(light)))
    assert a.shape == b.shape and abs(a - b).max() <= 12 and len(light) < len(full.getvalue())/2
    coarse = np.asarray(Image.open(BytesIO(drawn.light(fig, 16).data)).convert("RGB"), int)
    assert abs(a - coarse).max() > 30, "sixteen colours would"
