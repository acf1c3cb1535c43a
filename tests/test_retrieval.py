"""Retrieval: places against a loop, ties against all orders, exact chance, the model's sheet against the naive
form, a library of measurements, bad input."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from biojepa.actions.action_tokens import action_batch
from biojepa.actions.banks import FeatureBank
from biojepa.actions.vocabulary import ActionTable, Modality
from biojepa.config import ModelConfig
from biojepa.data.batches import dense_rows
from biojepa.data.datasets import load_dataset
from biojepa.data.network import SimulationSpec
from biojepa.data.preprocess import prepare
from biojepa.data.simulate import simulate_perturb_seq
from biojepa.data.splits import make_split
from biojepa.evaluate import retrieval as r, sheets
from biojepa.model.biojepa import BioJEPA
from biojepa.predict.baselines import oracle, train_mean
from biojepa.predict.regressors import ridge, target_features
from biojepa.predict.sets import pseudobulk, test_set

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def case():
    "Two lines, 20 targets with two guides each, 120 genes."
    cells = simulate_perturb_seq(
        SimulationSpec(n_genes=120, n_cells=1200, n_targets=20, n_modules=4, n_cell_types=2, n_batches=2))
    adata = prepare(load_dataset(cells, batch="batch", cell_type="cell_type", guide="guide_id", keep=["truth"]))
    names = sorted(set(adata.obs["condition"]) - {"ctrl"})
    split = make_split(adata,
                       kind="custom",
                       held_out=dict(train=names[8:], val=[], test=names[:8]),
                       allow_empty_val=True)
    table = ActionTable.from_anndata(adata)
    bank = FeatureBank(table.genes,
                       np.random.default_rng(0).normal(size=(len(table.genes), 5)), Modality.PROTEIN,
                       dict(featurizer="random"))
    template = test_set(adata, split)
    return adata, split, table, bank, template, sheets.action_sheet(template, table)


@pytest.fixture(scope="module")
def queries(case): return r.responses(pseudobulk(case[4]), "observed")


def random_responses(n=30, genes=40, lines=("x", "y"), seed=0, targets=True):
    rng = np.random.default_rng(seed)
    about = pd.DataFrame([
        dict(label=f"P{i}",
             condition=f"P{i}",
             cell_type=l,
             targets=(f"g{i}", ) if targets else (),
             n_cells=5) for l in lines for i in range(n)
    ])
    return r.Responses("guess", tuple(f"g{i}" for i in range(genes)), about,
                       rng.normal(size=(len(about), genes)), rng.normal(0, .3, genes))


def asked(candidates, rows, noise=1., seed=1):
    delta = candidates.delta[rows] + np.random.default_rng(seed).normal(
        0, noise, (len(rows), candidates.delta.shape[1]))
    return candidates._replace(about=candidates.about.iloc[rows].reset_index(drop=True), delta=delta)


# --- places
# -----------------------------------------------------------------------------------------------------------

MEASURES = dict(cosine=lambda a, b, o: np.dot(a - o, b - o)/np.linalg.norm(a - o)/np.linalg.norm(b - o),
                pearson=lambda a, b, o: stats.pearsonr(a, b)[0],
                l1=lambda a, b, o: -np.abs(a - b).mean())


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("among", ["all", "held_out"])
@pytest.mark.parametrize("keep", [False, True])
def test_places_are_those_of_a_loop(measure, among, keep):
    candidates = random_responses()
    rows = np.array([31, 2, 45, 7, 33])     # both lines, mixed
    queries = asked(candidates, rows)
    table = r.rank_candidates(queries, candidates, measure, among, keep)
    genes = np.ones(40, bool) if keep else np.arange(40) >= 30
    for i, right in enumerate(rows):
        line = candidates.about["cell_type"].iloc[right]
        pool = [
            c for c in (range(60) if among == "all" else rows)
            if candidates.about["cell_type"].iloc[c] == line
        ]
        s = {
            c:
            MEASURES[measure](queries.delta[i, genes], candidates.delta[c, genes],
                              queries.train_delta[genes]) for c in pool
        }
        row = table.iloc[i]
        assert (row["label"], row["cell_type"]) == (candidates.about["label"].iloc[right], line)
        assert row["rank"] == 1 + sum(s[c] > s[right] for c in pool) and row["n_candidates"] == len(pool)
        assert row["nearest"] == candidates.about["label"].iloc[max(s, key=s.get)]


def test_scores_with_ties_are_means_over_all_orders():
    ranks = pd.DataFrame(
        dict(method="m",
             label="a",
             cell_type="x",
             n_cells=3,
             better=[0, 2, 0, 4, 1],
             tied=[0, 0, 9, 3, 8],
             n_candidates=10))
    table = r.retrieval_scores(ranks, (1, 5)).set_index("metric")
    for i, row in ranks.iterrows():
        places = row.better + 1 + np.arange(row.tied + 1)
        expected = dict(MRR=np.mean(1/places), rank=places.mean(), PDS=np.mean(1 - (places - 1)/9)) | {
            f"recall@{k}": np.mean(places <= k) for k in (1, 5)
        }
        for metric, value in expected.items():
            assert table.loc[metric, "value"].iloc[i] == pytest.approx(value), metric
    places = np.arange(1, 11)
    assert table.loc["MRR", "chance"].iloc[0] == pytest.approx(np.mean(
        1/places)) and table.loc["rank", "chance"].iloc[0] == 5.5
    curve = r.recall_curve(ranks)
    assert curve["value"].iloc[[0, 4]].to_numpy() == pytest.approx([
        table.loc["recall@1", "value"].mean(), table.loc["recall@5", "value"].mean()
    ]) and curve["value"].iloc[-1] == 1
    assert curve["chance"].to_numpy() == pytest.approx(places/10)


def test_one_candidate_has_no_discrimination():
    one = random_responses(1, lines=("x",))
    table = r.retrieval_table(r.rank_candidates(one, one, keep_targets=True), n=200).set_index("metric")
    assert np.isnan(table.loc["PDS", "mean"]) and table.loc["MRR", "mean"] == 1


# --- the best value, and chance
# ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("measure", MEASURES)
def test_perfect_candidates_are_found_first(queries, measure):
    candidates = queries._replace(name="perfect")
    table = r.retrieval_table(r.rank_candidates(queries, candidates, measure),
                              n=200).set_index("metric")["mean"]
    assert table.to_dict() == {"MRR": 1, "recall@1": 1, "recall@5": 1, "recall@10": 1, "rank": 1, "PDS": 1}


def test_the_same_answer_for_all_is_chance_exactly(case, queries):
    table = r.retrieval_scores(
        r.rank_candidates(queries, r.responses(pseudobulk(train_mean(case[5])), "predicted")))
    assert table["value"].to_numpy() == pytest.approx(table["chance"].to_numpy())


def test_dealt_labels_are_chance_within_its_interval():
    "Of 60 shuffles, about 95 % lie in the 95 % interval of guessing, for every score; and their mean is chance."
    candidates, inside, means = random_responses(25, lines=("x",), targets=False), {}, {}
    queries = asked(candidates, np.arange(20), noise=.5)
    for seed in range(60):
        table = r.retrieval_table(r.rank_candidates(queries, r.dealt_anew(candidates, seed=seed)),
                                  n=400,
                                  seed=seed)
        for row in table.itertuples():
            inside.setdefault(row.metric, []).append(row.chance_low <= row.mean <= row.chance_high)
            means.setdefault(row.metric, []).append(row.mean - row.chance)
    for metric in inside:
        assert np.mean(inside[metric]) >= .85, metric
        if metric != "rank":
            assert abs(np.mean(
                means[metric])) < 4*stats.sem(means[metric]), metric  # of a rank it is the median
    found = r.retrieval_table(r.rank_candidates(queries, candidates), n=400).set_index("metric")
    assert found.loc["PDS", "mean"] > found.loc["PDS", "chance_high"] and found.loc[
        "rank", "mean"] < found.loc["rank", "chance_low"]


def test_dealing_stays_in_the_line_and_moves_guides_of_a_target_together():
    base = random_responses(6, lines=("x", "y"))
    two = base.about.loc[base.about.index.repeat(2)].reset_index(drop=True)
    two["label"] += np.tile(["|1", "|2"], 12)
    candidates = base._replace(about=two, delta=np.arange(24.)[:, None]*np.ones((1, 40)))
    moved = 0
    for seed in range(5):
        dealt = r.dealt_anew(candidates, seed=seed).delta[:, 0].astype(int)
        source = two.iloc[dealt].reset_index(drop=True)
        assert sorted(dealt) == list(range(24)) and (source["cell_type"] == two["cell_type"]).all()
        assert (source.groupby([two["condition"], two["cell_type"]])["condition"].nunique() == 1).all()
        moved += (source["condition"] != two["condition"]).sum()
        some = r.dealt_anew(candidates, ["P0", "P1", "P2"], seed=seed).delta[:, 0].astype(int)
        kept = ~two["condition"].isin(["P0", "P1", "P2"])
        assert (some[kept] == np.arange(24)[kept]).all() and set(
            two["condition"].iloc[some[~kept]]) == {"P0", "P1", "P2"}
    assert moved > 60


# --- the sheet
# --------------------------------------------------------------------------------------------------------

def test_sheet_asks_for_every_action_in_every_line(case):
    adata, split, table, bank, template, sheet = case
    assert len(sheet.groups) == 2*(~table.is_control).sum() and set(
        sheet.groups["cell_type"]) == {"line1", "line2"}
    for line in ("line1", "line2"):
        own = template.control_mean[(template.groups["cell_type"] == line).to_numpy()]
        assert sheet.control_mean[(sheet.groups["cell_type"] == line).to_numpy()] == pytest.approx(
            np.tile(own[:1], (len(sheet.groups) // 2, 1)))


def test_baselines_answer_the_sheet_as_they_answer_the_test_set(case):
    adata, split, table, bank, template, sheet = case
    features = target_features([bank], table)
    for make in (lambda t: ridge(t, adata, split, features), lambda t: oracle(t, adata)):
        a, b = make(template), make(sheet)
        key = ["perturbation", "cell_type"]
        rows = pd.MultiIndex.from_frame(b.groups[key]).get_indexer(pd.MultiIndex.from_frame(a.groups[key]))
        assert b.delta[rows] == pytest.approx(a.delta)


def test_known_effect_is_found_and_the_wrong_one_is_not(case, queries):
    found = r.responses(pseudobulk(oracle(case[5], case[0])), "predicted")
    right = r.retrieval_table(r.rank_candidates(queries, found), n=300).set_index("metric")
    assert right.loc["PDS", "mean"] > .8 and right.loc["PDS", "low"] > right.loc["PDS", "chance_high"]
    assert (right["n"] == 16).all() and (right["n_candidates"] == 20).all()


@pytest.fixture(scope="module")
def model(case):
    torch.manual_seed(0)
    model = BioJEPA(
        ModelConfig(n_genes=120,
                    d_model=8,
                    n_heads=2,
                    n_encoder_layers=1,
                    n_masked_predictor_layers=1,
                    n_predictor_layers=1,
                    d_protein=5))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.2*torch.randn_like(p))
    return model.eval()


def test_model_answers_as_the_naive_form_and_encodes_each_cell_once(case, model, monkeypatch):
    adata, split, table, bank, template, sheet = case
    actions, encoded = action_batch(table, bank), []
    forward = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda x, *a, **k:
                        (encoded.append(len(x)), forward(x, *a, **k))[1])
    run = SimpleNamespace(model=model, adata=adata, split=split, actions=actions, table=table)
    answer = sheets.answer_sheet(sheet, run, n_controls=3, batch_size=7, progress=False)
    assert sum(encoded) == 6    # three of each line
    monkeypatch.undo()
    for line in ("line1", "line2"):
        controls = sheets.some_controls(adata, split, "test", line, 3, 0)
        x = dense_rows(adata.X, controls)
        size = torch.from_numpy(adata.obs["log_library_size"].to_numpy(np.float32)[controls])
        for i in np.flatnonzero((sheet.groups["cell_type"] == line).to_numpy())[::9]:
            p = table.perturbation.index(sheet.groups["perturbation"].iloc[i])
            with torch.no_grad():
                predicted = model.predict_latent(x,
                                                 size,
                                                 actions.take(torch.full((3, ), p)),
                                                 collapse=False).mean
                control = getattr(model, model.config.delta_from)(x, size, None, False).x
                expected = model.readout.delta(predicted, control).mean(0)
            assert answer.delta[i] == pytest.approx(expected.numpy(), abs=1e-5)


# --- a library of measurements
# ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("by", ["condition", "perturbation"])
def test_library_is_made_of_other_cells_than_its_queries(case, by):
    adata, split, table, bank, template, sheet = case
    queries, library = r.measured_library(template, adata, split, by)
    rows = np.flatnonzero((adata.obs["condition"] != "ctrl").to_numpy())
    first = r._first_half(adata, rows, by, 0)
    controls = np.sort(split.controls(adata, "test"))
    own = r._first_half(adata, controls, "batch", 0)
    obs, x = adata.obs.astype(str), adata.X.toarray().astype(float)
    for made, cells, refs in ((library, rows[first], controls[own]), (queries, rows[~first], controls[~own])):
        for i in (0, len(made.about) - 1):
            label, line = made.about.loc[i, ["label", "cell_type"]]
            mine = cells[(obs[by].iloc[cells] == label) & (obs["cell_type"].iloc[cells] == line)]
            theirs = refs[obs["cell_type"].iloc[refs] == line]
            assert made.delta[i] == pytest.approx(x[mine].mean(0) - x[theirs].mean(0),
                                                  abs=1e-5) and made.about.loc[i, "n_cells"] == len(mine)
    counts = obs.iloc[rows].groupby([by, "cell_type"]).size()
    halves = obs.iloc[rows[first]].groupby([by, "cell_type"]).size().reindex(counts.index, fill_value=0)
    assert (halves == counts//2).all()
    assert set(queries.about["condition"]) <= set(split.test) and len(library.about) > len(queries.about)
    assert r.retrieval_table(r.rank_candidates(queries, library),
                             n=200).set_index("metric").loc["PDS", "mean"] > .6


# --- bad input
# --------------------------------------------------------------------------------------------------------

def a_run(case, **changed):
    "An untrained model and all that it needs to answer."
    model = BioJEPA(ModelConfig(n_genes=120, d_model=8, n_heads=2))
    held = dict(model=model,
                adata=case[0],
                split=case[1],
                actions=action_batch(case[2], case[3]),
                table=case[2])
    return SimpleNamespace(**held | changed)


@pytest.mark.parametrize("call, message", [
    (lambda c, q: r.responses(pseudobulk(c[4]), "both"), "which: found 'both'"),
    (lambda c, q: r.rank_candidates(q, q, "l3"), "measure: found 'l3'"),
    (lambda c, q: r.rank_candidates(q, q, among="some"), "among: found 'some'"),
    (lambda c, q: r.rank_candidates(q, q._replace(genes=q.genes[::-1])), "candidates.genes"),
    (lambda c, q: r.rank_candidates(
        q, q._replace(about=q.about[3:].reset_index(drop=True), delta=q.delta[3:])), "candidates: lack"),
    (lambda c, q: r.rank_candidates(
        q, q._replace(about=pd.concat([q.about]*2, ignore_index=True), delta=np.tile(q.delta, (2, 1)))),
     "stands twice"),
    (lambda c, q: r.rank_candidates(q, q._replace(about=q.about.assign(targets=[q.genes]*len(q.about)))),
     "every gene is a target"),
    (lambda c, q: sheets.answer_sheet(c[5], a_run(c), n_controls=0), "n_controls: found 0"),
    (lambda c, q: sheets.answer_sheet(c[5], a_run(c, table=c[2].select([0, 1]))), "table: lacks"),
    (lambda c, q: sheets.action_sheet(c[4], c[2].select(np.flatnonzero(c[2].is_control))), "holds no "
     "action but "
     "controls"),
])
def test_bad_input_is_named(case, queries, call, message):
    with pytest.raises(ValueError, match=message): call(case, queries)
