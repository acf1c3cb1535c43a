"""Claims about the figures, checked on the committed numbers:

1. a method has one look: colour, marker, dashes and one spelling; what was broken is paler;
2. no text of a figure leaves it, and no two texts of a figure lie on each other;
3. marks stand where the tables say, and the better direction is that of the metric;
4. names that would collide are moved apart, in order and by no less than the gap;
5. a table that lacks a column is refused by the column's name.
"""
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from biojepa.core import PATHS
from biojepa.evaluate.metrics import METRICS
from biojepa.evaluate.transfer import SCORED
from biojepa.plots.architecture import draw_architecture
from biojepa.plots.data import plot_data_overview, plot_training
from biojepa.plots.questions import plot_gene_level, plot_retrieval, plot_uncertainty
from biojepa.plots.scores import (
    plot_by_effect, plot_metric_strips, plot_predicted_against_observed, plot_transfer
)
from biojepa.plots.search import plot_screen, plot_search
from biojepa.plots.spaces import plot_gene_probe, plot_probes, plot_relations, plot_set_similarity
from biojepa.plots.style import BLUE, LOOKS, Scale, apart, draw_rows, look, write_scale

STRIPS = ("r_delta", "r_delta_perturbed_mean", "r_top20_without_target", "pds", "de_overlap_50",
          "energy_distance")
MATRICES = ("features", "action_latents", "predicted_responses", "observed_responses")
RECALLS = {"recall@1": "recall among the first 1", "recall@5": "recall among the first 5"}


def csv(name): return pd.read_csv(PATHS.figures/f"{name}.csv")


SEARCH = pd.DataFrame(dict(step=range(6), gain=[0, .04, .07, .09, .1, .1]))
NEAREST = pd.DataFrame(dict(perturbation=[f"G{i}_1" for i in range(6)] + ["(found by gradient)"],
                            condition=[f"G{i}+ctrl" for i in range(6)] + [""],
                            cosine=[.8, .7, .6, .5, .4, .3, 1], gain=[.09, .02, .05, .01, 0, 0, .1]))


def modules(name): return csv(f"pathway_similarity_{name}").set_index("module")


def screen():
    found = csv("screen_ranking")
    return plot_screen(found, found.condition[:1].tolist(), title="an effect as the wanted state")


FIGURES = {  # name -> the figure, drawn from the numbers that are committed beside it
    "architecture": draw_architecture,
    "data_overview": lambda: plot_data_overview(csv("data_overview_cells"), csv("data_overview_genes"),
                                                csv("data_overview_conditions"), "a screen"),
    "training": lambda: plot_training(csv("training_log"), "a run"),
    "metric_strips": lambda: plot_metric_strips(csv("scores"), csv("metric_strips_summary"),
                                                {m: METRICS[m] for m in STRIPS}, "held-out perturbations"),
    "predicted_against_observed":
        lambda: plot_predicted_against_observed(csv("predicted_against_observed_genes"), "a screen"),
    "by_effect_size": lambda: plot_by_effect(csv("by_effect_size_scores"), "r of Δ", title="a screen"),
    "transfer": lambda: plot_transfer(csv("transfer_table"), {m: METRICS[m] for m in SCORED}, "transfer"),
    "gene_level": lambda: plot_gene_level(csv("gene_level_by_effect"), csv("gene_level_lists"), .1, "a screen"),
    "retrieval": lambda: plot_retrieval(csv("retrieval_curves"), csv("retrieval_scores"), title="which?"),
    "screen_recovery": lambda: plot_retrieval(csv("screen_recovery_curves"), csv("screen_recovery_scores"),
                                              RECALLS, "found?"),
    "predicted_variance": lambda: plot_uncertainty(csv("predicted_variance_coverage"),
                                                   csv("predicted_variance_errors"),
                                                   csv("predicted_variance_risks"), "how sure?"),
    "batch_effects": lambda: plot_probes(csv("batch_effects"), "probes"),
    "pathways": lambda: plot_relations(csv("pathways"), "pathways"),
    "mechanism": lambda: plot_relations(csv("mechanism"), "guides"),
    "pathway_similarity": lambda: plot_set_similarity({n: modules(n) for n in MATRICES}, "sets"),
    "essentiality": lambda: plot_gene_probe(csv("essentiality"), csv("essentiality_genes"),
                                            "gene embedding", "summed |weight| of its edges", "genes"),
    "screen": screen,
    "screen_search": lambda: plot_search(SEARCH, NEAREST, title="way"),
}


def texts(figure):
    "Bounding boxes of all texts that are seen, in pixels."
    FigureCanvasAgg(figure).draw()      # a closed figure has no canvas that draws
    seen = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    axes_of = {
        id(t): ax for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) for t in (tick.label1, tick.label2)
    }
    for t in seen:
        ax = axes_of.get(id(t))
        box = Text.get_window_extent(t)     # of an annotation: of its words, without its arrow
        if ax is not None:
            if not ax.axison: continue
            middle, frame = (box.x0 + box.x1)/2, ax.bbox
            if box.y1 <= frame.y0 and not frame.x0 - 1 <= middle <= frame.x1 + 1:
                continue  # a tick out of view
            if box.x1 <= frame.x0 and not frame.y0 - 1 <= (box.y0 + box.y1)/2 <= frame.y1 + 1: continue
        yield t.get_text(), box


@pytest.mark.parametrize("name", FIGURES)
def test_texts_stay_in_the_figure_and_off_each_other(name):
    figure = FIGURES[name]()
    found = list(texts(figure))
    assert len(found) > 5
    for text, box in found:
        assert box.x0 > -2 and box.y0 > -2, f"{text!r} leaves the figure"
        assert box.x1 < figure.bbox.x1 + 2 and box.y1 < figure.bbox.y1 + 2, f"{text!r} leaves the figure"
    for (a, one), (b, two) in combinations(found, 2):
        width = min(one.x1, two.x1) - max(one.x0, two.x0)
        height = min(one.y1, two.y1) - max(one.y0, two.y0)
        assert width < 1.5 or height < 1.5, f"{a!r} and {b!r} lie on each other"
    assert figure.number not in plt.get_fignums(), "a figure that stays open is shown twice"


def test_the_check_of_texts_finds_a_collision():
    figure, ax = plt.subplots()
    ax.text(.5, .5, "one")
    ax.text(.51, .5, "two")
    boxes = dict(texts(figure))
    assert boxes["one"].x1 > boxes["two"].x0
    plt.close(figure)


def test_methods_of_one_color_differ_in_marker_and_dashes():
    methods = [m for m in LOOKS if m not in ("control", "train", "val", "test")]
    for a, b in combinations(methods, 2):
        one, two = look(a), look(b)
        assert one.marker != two.marker or one.color != two.color, (a, b)
        assert one.label != two.label


@pytest.mark.parametrize("name, base", [
    ("biojepa, actions exchanged", "biojepa"), ("shuffled ridge, sequence", "ridge"),
    ("ridge, features dealt anew", "ridge"), ("energy in expression, no target genes", "energy in expression")
])
def test_what_was_broken_is_the_same_method_paler(name, base):
    broken, whole = look(name), look(base)
    assert broken.marker == whole.marker and broken.line != whole.line
    assert all(a > b for a, b in zip(to_rgb(broken.color), to_rgb(whole.color)))
    assert whole.label in broken.label


def test_a_name_is_spelled_once():
    assert look("biojepa").label == look("biojepa, seed 3").label.split(",")[0] == "BioJEPA-AC"
    assert look("half_of_the_cells").label == "half of the cells"
    rgb = to_rgb(look("half_of_the_cells").color)
    assert len(set(rgb)) == 1, "what is no bound is grey"
    assert look("a_method_of_mine").label == "a method of mine"
    assert look("gene embeddings").color == look("predicted, among observed responses").color == BLUE


def points(ax, color):
    "Places of the single marks of one color, from left to right."
    at = [line.get_xdata()[0] for line in ax.lines if line.get_color() == color and len(line.get_xdata()) == 1]
    return sorted(np.array(at, float)[np.isfinite(at)])


def test_marks_of_transfer_stand_at_the_means_of_the_table():
    table = csv("transfer_table")
    figure = plot_transfer(table, {m: METRICS[m] for m in SCORED})
    groups = list(dict.fromkeys(table.group))
    assert len(figure.axes) == len(groups)*len(SCORED)
    for k, ax in enumerate(figure.axes):
        group, metric = groups[k // len(SCORED)], list(SCORED)[k % len(SCORED)]
        rows = table[(table.group == group) & (table.metric == metric)]
        np.testing.assert_allclose(points(ax, BLUE), sorted(rows["mean"]))
        assert len(points(ax, look("train_mean").color)) == rows.train_mean.notna().sum()


def test_rows_are_drawn_in_order_with_their_bands():
    rows = pd.DataFrame(dict(name=["biojepa", "ridge"], value=[.7, .4], low=[.6, .3], high=[.8, .5],
                             null_low=.1, null_high=.2))
    figure, ax = plt.subplots()
    draw_rows(ax, rows, Scale("r", .15, "higher"))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["BioJEPA-AC", "ridge"]
    assert ax.get_ylim() == (1.5, -.5), "the first row is above"
    bands = [c.get_paths()[0].get_extents() for c in ax.collections]
    assert [(b.x0, b.x1) for b in bands] == [(.1, .2)]*2 and bands[0].y1 < bands[1].y0
    assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [.15]
    plt.close(figure)


@pytest.mark.parametrize("metric, arrow", [("pds", "↑"), ("mse_delta", "↓"), ("energy_distance", "↓")])
def test_an_arrow_points_to_what_is_better(metric, arrow):
    figure, ax = plt.subplots()
    write_scale(ax, METRICS[metric])
    assert ax.get_xlabel() == f"{METRICS[metric].label} {arrow}"
    assert (METRICS[metric].chance is None) == (not ax.lines)
    plt.close(figure)


def test_training_and_validation_have_an_axis_each():
    log = csv("training_log")
    figure = plot_training(log)
    n = log.stage.nunique()
    dynamics = [figure.axes[k] for k in range(len(figure.axes)) if k % n == 2]
    assert [ax.get_ylabel() for ax in dynamics] == ["training loss", "validation loss", "effective rank"]
    assert all(len(ax.lines) == 1 for ax in dynamics)
    readout = log[log.stage == "readout"].dropna(subset="val_mse_no_change").iloc[-1]
    drawn = {line.get_label().split(":")[0]: line.get_ydata()[-1] for line in figure.axes[3*n - 1].lines}
    for of in ("predicted", "observed"):
        expected = (readout.val_mse_no_change - readout[f"val_mse_{of}"])/readout.val_mse_no_change
        assert drawn[f"from {of}"] == pytest.approx(100*expected)


@pytest.mark.parametrize("seed", range(5))
def test_heights_are_apart_and_in_order(seed):
    heights = np.random.default_rng(seed).uniform(.2, .9, 8)
    found = apart(heights, .06)
    assert (np.argsort(found) == np.argsort(heights)).all() and np.diff(np.sort(found)).min() > .06 - 1e-12
    wide = np.array([.1, .5, .9])
    np.testing.assert_allclose(apart(wide, .06), wide)     # what does not collide stays
    assert len(apart(np.array([]))) == 0


@pytest.mark.parametrize("draw, missing", [
    (lambda: plot_training(csv("training_log").drop(columns="step")), "step"),
    (lambda: plot_metric_strips(csv("scores").drop(columns="value"), csv("scores"), {}), "value"),
    (lambda: plot_transfer(csv("transfer_table").drop(columns="best_low"), {}), "best_low"),
    (lambda: plot_retrieval(csv("retrieval_curves"),
                            csv("retrieval_scores").drop(columns="low")), "low"),
    (lambda: plot_relations(csv("mechanism").drop(columns="knn_best")), "knn_best"),
    (lambda: plot_search(SEARCH.drop(columns="gain"), NEAREST), "gain"),
],
                        ids=["training", "strips", "transfer", "retrieval", "relations", "search"])
def test_a_missing_column_is_named(draw, missing):
    with pytest.raises(ValueError, match=rf"columns \['{missing}'\] are missing"): draw()
