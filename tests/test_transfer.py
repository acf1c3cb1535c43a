"""Cases of transfer: what differs between them, what each is compared with, and what perfect and shuffled answers
score."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from biojepa.config import config_hash, preset
from biojepa.data.leakage import check_leakage
from biojepa.evaluate.cases import (
    case_data, dataset_cases, scaled_screen, simulated_cases, some_genes, transfer_cases, unseen_targets,
    variants
)
from biojepa.evaluate.metrics import METRICS
from biojepa.evaluate.statistics import bootstrap_ci, paired_bootstrap
from biojepa.evaluate.transfer import (
    REFERENCE, SCORED, on_genes, run_cases, score_case, seen_elsewhere, transfer_reading, transfer_table,
    wide_table
)
from biojepa.plots.scores import plot_transfer
from biojepa.predict.baselines import oracle
from biojepa.predict.sets import pseudobulk, test_set as template_of

CASES = {c.name: c for c in simulated_cases(preset("smoke"))}
DATA = {}


def data(name):
    "Cells and split of a case, made once."
    if name not in DATA: DATA[name] = case_data(CASES[name])
    return DATA[name]


def template(name): return template_of(*data(name))


def observed_delta(ps): return ps.observed_mean() - ps.control_mean


def test_every_case_has_a_configuration_of_its_own_and_differs_from_the_reference_in_one_thing():
    cases = list(CASES.values())
    assert len({config_hash(c.experiment) for c in cases}) == len(cases)
    reference = cases[0]
    for c in cases[1:]:
        changed = [
            c.experiment.model != reference.experiment.model, c.experiment.data.n_top_genes is not None,
            c.genes != 1, c.experiment.data.split != reference.experiment.data.split
        ]
        assert sum(changed) == 1, c.name
        assert (c.group == "same cells") == (c.screen == reference.screen
                                             and c.experiment.data.split == reference.experiment.data.split)


@pytest.mark.parametrize(
    "name",
    ["unseen targets", "unseen guides of known targets", "unseen combinations", "an unseen cell line"])
def test_what_is_held_out_is_what_the_name_says(name):
    adata, split = data(name)
    check_leakage(adata, split)
    obs = adata.obs.astype({c: str for c in ("condition", "perturbation", "cell_type")})
    train, test = (obs.iloc[split.cells(adata, p)] for p in ("train", "test"))
    assert (name == "unseen targets") == (not set(train.condition) & set(test.condition)
                                          and not any(c.count("+ctrl") == 0 for c in test.condition))
    if name.startswith("unseen guides"):
        assert set(test.condition) <= set(
            train.condition) and not set(test.perturbation) & set(train.perturbation)
    if name.startswith("unseen comb"):
        assert not any(c.endswith("+ctrl")
                       for c in test.condition) and not set(train.condition) & set(test.condition)
    if name == "an unseen cell line":
        assert set(test.condition) <= set(
            train.condition) and not set(train.cell_type) & set(test.cell_type)


def test_screens_share_one_network_and_a_seed_changes_it():
    plain, doubles = (data(n)[0].uns["truth"] for n in ("unseen targets", "unseen combinations"))
    assert (plain["module"] == doubles["module"]).all()
    assert config_hash(simulated_cases(preset("smoke"), seed=1)[0].experiment) != config_hash(
        simulated_cases(preset("smoke"))[0].experiment)
    with pytest.raises(ValueError, match="scale: found 0.01"):
        scaled_screen(CASES["unseen targets"].screen, .01)


def test_unseen_targets_are_drawn_by_seed_and_refuse_combinations():
    adata, _ = data("unseen targets")
    assert unseen_targets(adata, 1).test == unseen_targets(adata, 1).test != unseen_targets(adata, 2).test
    with pytest.raises(ValueError, match="found the combination"):
        unseen_targets(data("unseen combinations")[0])


def test_gene_sets_keep_the_values_and_the_truth_of_their_genes():
    whole, split = data("unseen targets")
    for name in (n for n, c in CASES.items() if c.genes < 1 or c.experiment.data.n_top_genes):
        adata, same = data(name)
        at = whole.var_names.get_indexer(adata.var_names)
        assert same.hash == split.hash and 0 < adata.n_vars < whole.n_vars and (at >= 0).all()
        assert (whole.X[:, at] != adata.X).nnz == 0
        mine, full = (oracle(template_of(a, split), a).delta for a in (adata, whole))
        np.testing.assert_allclose(mine, full[:, at])
    assert list(some_genes(whole, .5, 1).var_names) == list(some_genes(whole, .5, 1).var_names) != list(
        some_genes(whole, .5, 2).var_names)


def test_choosing_variable_genes_leaves_the_number_of_threads_alone():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        case_data(next(c for c in CASES.values() if c.experiment.data.n_top_genes))
        assert torch.get_num_threads() == 1
    finally: torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unseen targets", "unseen guides of known targets", "an unseen cell line"])
def test_seen_elsewhere_against_the_slow_form(name):
    adata, split = data(name)
    ps = template(name)
    answer = seen_elsewhere(ps, adata, split)
    X = adata.X.toarray().astype(float)
    obs = adata.obs.astype({c: str for c in ("condition", "cell_type")}).reset_index(drop=True)
    train, controls = obs.iloc[split.cells(adata, "train")], obs.iloc[split.controls(adata, "train")]
    effect = {}
    for (condition, line), rows in train.groupby(["condition", "cell_type"]).groups.items():
        effect.setdefault(
            condition, []).append(X[rows].mean(0) - X[controls.index[controls.cell_type == line]].mean(0))
    for i, condition in enumerate(ps.groups["condition"]):
        slow = np.mean(effect[condition], 0) if condition in effect else np.mean(
            [d for ds in effect.values() for d in ds], 0)
        np.testing.assert_allclose(answer.delta[i], slow, atol=1e-5)
    assert (answer.provenance["n_fallback"] > 0) == (name == "unseen targets")


def scored(name, answers, reference=None, case=None):
    "Scores of a case with a given delta for the model, beside the train mean."
    adata, split = data(name)
    ps = template(name)
    mean = ps.with_prediction("train_mean", np.tile(ps.train_delta, (len(ps.groups), 1)))
    return score_case(case or CASES[name], [ps.with_prediction("biojepa", answers(ps)), mean], split, reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unseen targets", "unseen combinations", "an unseen cell line"])
def test_perfect_answers_score_the_best_value_and_shuffled_ones_chance(name):
    best = transfer_table(scored(name, observed_delta))
    for r in best[best.n > 1].itertuples():
        assert r.mean == pytest.approx(METRICS[r.metric].best, abs=1e-6) and r.low == pytest.approx(
            r.mean, abs=1e-6)

    ps, rng, means = template(name), np.random.default_rng(0), []
    bulk = pseudobulk(ps)
    row = {c: i for i, c in enumerate(bulk.conditions["condition"])}
    own = np.array([row[c] for c in ps.groups["condition"]])
    for _ in range(60):     # each condition answered with the effect of one drawn at random
        order = rng.permutation(len(row))
        scores = score_case(CASES[name], [ps.with_prediction("biojepa", bulk.observed[order[own]])],
                            data(name)[1],
                            metrics=("pds", ))
        means.append(scores.value[scores.case == name].mean())
    chance = bootstrap_ci(means, level=.99)
    assert chance.low < METRICS["pds"].chance < chance.high and chance.high - chance.low < .2


def test_table_takes_the_best_baseline_and_pairs_the_differences():
    scores = scored("an unseen cell line", lambda ps: .5*observed_delta(ps) + .5*ps.train_delta)
    ps = template("an unseen cell line")
    extra = score_case(CASES["an unseen cell line"], [seen_elsewhere(ps, *data("an unseen cell line"))],
                       data("an unseen cell line")[1])
    bound = extra.assign(method="noise_ceiling", value=1.)
    table = transfer_table(pd.concat([scores, extra, bound])).set_index("metric")
    row = table.loc["r_delta"]
    wide = pd.concat([scores, extra]).query("metric == 'r_delta'").pivot(index="condition",
                                                                         columns="method",
                                                                         values="value")
    assert row.best == "seen_elsewhere" and row.best_mean == pytest.approx(
        wide.seen_elsewhere.mean()) and row.noise_ceiling == 1
    expected = paired_bootstrap(wide.biojepa, wide.seen_elsewhere)
    assert (row.difference_best, row.difference_low_best, row.difference_high_best) == pytest.approx(
        expected[:3])
    assert table.against["r_delta"] == "train_mean" and table.against[
        "r_delta_perturbed_mean"] == "chance" and table.train_mean["r_delta_perturbed_mean"] == 0
    claim = transfer_reading(table.reset_index()).claim[0]
    assert "better than the train mean" in claim and "seen elsewhere" in claim
    assert wide_table(table.reset_index()).shape == (1, 4)


def test_reference_is_cut_to_the_genes_of_the_case():
    adata, split = data("unseen targets")
    ps = template("unseen targets")
    noisy = ps.with_prediction("biojepa",
                               observed_delta(ps) + np.random.default_rng(0).normal(0, .1, ps.delta.shape))
    name = next(n for n, c in CASES.items() if c.genes < 1)
    scores = scored(name, observed_delta, reference=noisy)
    got = scores.query("method == @REFERENCE and metric == 'r_delta'").set_index("condition").value
    at = pd.Index(ps.genes).get_indexer(data(name)[0].var_names)
    bulk = pseudobulk(noisy)
    for i, c in enumerate(bulk.conditions["condition"]):
        assert got[c] == pytest.approx(np.corrcoef(bulk.predicted[i, at], bulk.observed[i, at])[0, 1])
    assert REFERENCE not in set(scored("unseen targets", observed_delta,
                                       reference=noisy).method)  # other cells, or the reference itself
    assert transfer_table(scores).query(
        "metric == 'r_delta'").difference_reference.iloc[0] == pytest.approx(1 - got.mean())
    with pytest.raises(ValueError, match="1 are not among"): on_genes(ps, [*ps.genes[:3], "nobody"])


def test_combinations_are_also_scored_by_how_many_members_training_has_seen():
    scores, (_, split) = scored("unseen combinations", observed_delta), data("unseen combinations")
    groups = {k: v for k, v in split.subgroups["test"].items() if k.startswith("combo_seen")}
    for k, v in groups.items():
        assert set(
            scores.condition[scores.case == f"unseen combinations, {k[-1]} of 2 members seen"]) == set(v)
    assert len(groups) > 1


def test_a_dataset_is_asked_only_what_it_holds():
    adata, _ = data("unseen guides of known targets")
    single = adata.copy()
    single.obs["perturbation"] = single.obs["condition"].astype(str).astype("category")
    cases, left_out = dataset_cases(preset("smoke"), adata)
    fewer, more = dataset_cases(preset("smoke"), single)
    assert cases[0].experiment == preset("smoke") and cases[
        0].name == "unseen targets"  # a finished run is found under its own configuration
    assert [c.name for c in cases if c.group == "unseen"][1:] == ["unseen guides of known targets"] and len(
        [c for c in cases if c.group == "same cells"]) == 4
    assert cases[1].experiment.data.split == "guide" and cases[1].experiment.name != cases[0].experiment.name
    assert set(left_out["case"]) == {"unseen combinations", "an unseen cell line"
                                     } and left_out.reason.str.contains("kind='c").all()
    assert set(more["case"]) - set(left_out["case"]) == {"unseen guides of known targets"
                                                         } and "no target has two guides" in more.reason[0]
    del single.obs["guide_id"]
    assert "obs['guide_id']: missing" in dataset_cases(preset("smoke"), single)[1].reason[0]


def test_lists_can_be_shortened_and_wrong_parameters_are_named():
    chosen, left_out = transfer_cases(preset("smoke"), only=["an unseen"])
    assert [c.name for c in chosen] == ["unseen targets", "an unseen cell line"] and set(
        left_out.reason) == {"not asked for"}
    with pytest.raises(ValueError, match="only: found 'magic'"): transfer_cases(preset("smoke"), only=["magic"])
    with pytest.raises(ValueError, match="Case.genes: found 0"): replace(chosen[0], genes=0.)
    with pytest.raises(ValueError, match="Case.group"): replace(chosen[0], group="new")
    with pytest.raises(ValueError, match="gene_share: found 1"): variants(chosen[0], 60, gene_share=1)
    with pytest.raises(ValueError, match="no baseline beside biojepa"):
        transfer_table(scored("unseen targets", observed_delta).query("method == 'biojepa'"))


@pytest.mark.slow
def test_a_list_that_is_run_again_only_reads(tmp_path):
    cases, _ = transfer_cases(preset("smoke"), only=["width 8"])
    first = run_cases(cases, tmp_path, progress=False)
    models = {
        p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")
        if p.suffix == ".safetensors" and "model" not in p.parts
    }
    again = run_cases(cases, tmp_path, progress=False)
    assert models and {p: p.stat().st_mtime_ns for p in models} == models
    pd.testing.assert_frame_equal(first.scores, again.scores)
    assert set(first.scores.metric) == set(SCORED) and set(first.identity) == {c.name for c in cases}
    table = transfer_table(first.scores)
    assert table[table.group == "same cells"].reference.notna().all()
    figure = plot_transfer(table, {m: METRICS[m] for m in SCORED}, "test")
    names = [t.get_text() for ax in figure.axes for t in ax.get_yticklabels()]
    assert names == [f"{c.name} (n = 5)" for c in cases]
