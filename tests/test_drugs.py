"""Compounds, doses and times.

1. One amount has one spelling, whatever its unit; what is not an amount is refused by name.
2. Columns of dose, time and SMILES say the same as labels that carry them, and survive writing and reading.
3. The composer reads log dose and time; at the start they change nothing, and where there are none nothing is added.
4. A memory answers for doses between those it has seen, and for a compound it has not.
5. Splits by compound, scaffold, dose, and line and compound hold out what they say; a planted leak of each is found.
6. The simulated screen is what its truth says, and its molecules tell the target only where they are meant to."""
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from biojepa.actions.action_tokens import action_batch
from biojepa.actions.banks import FeatureBank
from biojepa.actions.describe import compound_features, default_features
from biojepa.actions.featurizers import featurize
from biojepa.actions.memory import fit_memory, row_correlations
from biojepa.actions.vocabulary import ActionTable, Modality
from biojepa.config import DataConfig, preset
from biojepa.core import n_params
from biojepa.data.conditions import (
    SchemaError, amounts_of, condition_name, name_of, parse_condition, parse_treatments, parts_of
)
from biojepa.data.datasets import load_dataset
from biojepa.data.drugs import DrugSpec, load_drugs, occupancy, simulate_drugs
from biojepa.data.leakage import LeakageError, check_leakage
from biojepa.data.means import group_means
from biojepa.data.network import SimulationSpec, plant_network
from biojepa.data.preprocess import prepare
from biojepa.data.schema import validate
from biojepa.data.splits import make_split
from biojepa.evaluate.cases import case_data, dataset_cases, simulated_cases
from biojepa.evaluate.doses import dose_response
from biojepa.model.biojepa import BioJEPA
from biojepa.model.composer import ActionComposer
from biojepa.plots.responses import plot_volcano
from biojepa.predict.baselines import oracle
from biojepa.predict.methods import run_baselines
from biojepa.predict.regressors import tanimoto, target_features
from biojepa.predict.sets import test_set as template_of
from biojepa.predict.told import told_table

MOLECULES = dict(aspirin="CC(=O)Oc1ccccc1C(O)=O", caffeine="Cn1c(=O)c2c(ncn2C)n(C)c1=O")


def plate(n=24, seed=0):
    "Counts of wells: DMSO, and two compounds at three doses for two times."
    rng, drug = np.random.default_rng(seed), np.resize(["DMSO", "aspirin", "caffeine"], n)
    obs = pd.DataFrame(dict(drug=drug, conc=np.resize([.1, 1., 10.], n//3).repeat(3), hours=np.resize([6, 24], n)),
                       index=[f"w{i}" for i in range(n)])
    obs["molecule"] = obs["drug"].map(MOLECULES)
    X = sp.csr_matrix(rng.poisson(2., (n, 9)).astype("float32"))
    return ad.AnnData(X, obs, pd.DataFrame(index=[f"G{i}" for i in range(9)]))


NAMED = dict(condition="drug", control="DMSO", dose="conc", time="hours", smiles="molecule")


@pytest.mark.parametrize("text, micromolar, hours", [
    ("D@10uM", 10, None), ("D@10µM", 10, None), ("D@10 μM", 10, None), ("D@10000nM", 10, None), ("D@.01 mM", 10, None),
    ("D@1e4nM", 10, None), ("D@3pM@2d", 3e-6, 48), ("D@90min@1uM", 1, 1.5), ("D@24h", None, 24), ("D", None, None)])
def test_an_amount_has_one_spelling(text, micromolar, hours):
    done, = parse_treatments(text)
    assert done == ("D", micromolar, hours) and parse_condition(text) == ("D",)
    again = condition_name([done])
    assert parse_treatments(again) == (done,) and condition_name(parse_treatments(again)) == again
    log = [np.log10(micromolar or 1), np.log10((hours or 24)/24)]
    part, = parts_of(text)
    assert name_of(part) == "D" and np.allclose(amounts_of(part), log, atol=1e-5)


@pytest.mark.parametrize("text, message", [
    ("D@10", "found '10' after '@'; write a number and its unit"), ("D@uM", "found 'uM' after"),
    ("D@10mg", "dose in pM, nM, uM"), ("D@0uM", "a cell without the compound is a control"),
    ("D@1uM@2nM", "a second dose, 2nM"), ("@1uM", "no name before the '@'"), ("D@1uM@", "found '' after"),
    ("D@9999mM", "below 1e6 µM"), ("A@1uM+A@2uM", "the same target twice")])
def test_what_is_no_amount_is_refused_by_name(text, message):
    with pytest.raises(SchemaError, match=message): parse_treatments(text)


def test_a_gene_cluster_keeps_its_sign():
    assert parse_condition("IGH@") == parts_of("IGH@") == ("IGH@",) and name_of("IGH@") == "IGH@"
    assert condition_name(["IGH@"]) == "IGH@+ctrl"


def test_columns_of_amounts_say_what_labels_say(tmp_path):
    wells = plate()
    by_columns = load_dataset(wells, **NAMED)
    labelled = wells.copy()
    labelled.obs["drug"] = [d if d == "DMSO" else f"{d} @ {1000*c:g} nM @ {h} h"
                            for d, c, h in zip(wells.obs["drug"], wells.obs["conc"], wells.obs["hours"])]
    by_label = load_dataset(labelled, condition="drug", control="DMSO")
    columns = ["condition", "perturbation", "dose", "time"]
    pd.testing.assert_frame_equal(by_columns.obs[columns], by_label.obs[columns])
    assert set(by_label.obs["condition"]) >= {"ctrl", "aspirin@0.1uM@24h", "caffeine@10uM@6h"}
    assert by_columns.obs["dose"].isna().equals(by_columns.obs["condition"] == "ctrl")
    assert by_columns.uns["compounds"]["smiles"].to_dict() == MOLECULES
    by_columns.write_h5ad(tmp_path/"again.h5ad")
    again = load_dataset(tmp_path/"again.h5ad")
    pd.testing.assert_frame_equal(again.obs, by_columns.obs)
    pd.testing.assert_frame_equal(again.uns["compounds"], by_columns.uns["compounds"])
    validate(prepare(again), "prepared")


def test_a_compound_is_no_unmeasured_gene(recwarn):
    load_dataset(plate(), **NAMED)
    assert not recwarn.list, [str(w.message) for w in recwarn]


@pytest.mark.parametrize("change, message", [
    (dict(conc="10"), "dose='conc': condition 'aspirin@10': found '10' after"), (dict(conc=0.), "the dose 0uM"),
    (dict(conc=np.nan), "says nothing of any perturbed cell"), (dict(drug="A+B"), "stands beside 'A\\+B'"),
    (dict(molecule=np.nan), "names no molecule"), (dict(drug="A@1uM"), "a second dose")])
def test_columns_that_say_nothing_clear_are_refused(change, message):
    wells = plate()
    treated = (wells.obs["drug"] != "DMSO").to_numpy()
    for name, value in change.items():
        wells.obs[name] = wells.obs[name].astype(object).where(~treated, value)
    if "conc" in change and change["conc"] != "10": wells.obs["conc"] = wells.obs["conc"].astype(float)
    with pytest.raises(SchemaError, match=message): load_dataset(wells, **NAMED)


def test_logarithms_to_the_base_of_two_become_natural_ones():
    wells, rng = plate(), np.random.default_rng(0)
    intensity = rng.lognormal(6, 1, wells.shape) + 1
    wells.X = sp.csr_matrix(np.log2(intensity).astype("float32"))
    adata = prepare(load_dataset(wells, values="log2", **NAMED))
    assert np.allclose(adata.X.toarray(), np.log(intensity), atol=1e-5)
    assert adata.uns["biojepa"]["expression_space"] == "log1p"
    wells.X = wells.X*100
    with pytest.raises(SchemaError, match="values='log2', but X goes from"): load_dataset(wells, values="log2", **NAMED)


def actions_of(*conditions, **options):
    table = ActionTable.from_conditions(conditions, "inhibitor")
    bank = compound_features(pd.DataFrame(dict(smiles=MOLECULES)), table)
    return table, action_batch(table, bank, **options)


def test_actions_carry_log_dose_and_time():
    table, actions = actions_of("ctrl", "aspirin", "aspirin@30nM", "caffeine@10uM@6h", genes=["caffeine", "G1"])
    assert table.condition == ("ctrl", "aspirin+ctrl", "aspirin@0.03uM", "caffeine@10uM@6h")
    expected = [[0, 0], [0, 0], [np.log10(.03), 0], [1, np.log10(.25)]]
    assert np.allclose(actions.amounts[:, 0], expected) and actions.features.shape == (4, 1, 768)
    assert torch.equal(actions.features[1], actions.features[2])
    assert actions.genes.tolist() == [[-1]]*4      # a compound is no gene, whatever its name
    assert actions_of("aspirin", "caffeine")[1].amounts is None


def test_a_compound_and_a_gene_have_a_token_each():
    table = ActionTable.from_conditions(["G1+aspirin@10uM", "G1+G2"])
    proteins = FeatureBank(("G1", "G2"), np.eye(2, 5), Modality.PROTEIN, {})
    molecules = compound_features(pd.DataFrame(dict(smiles=MOLECULES)), table)
    actions = action_batch(table, [proteins, molecules])
    assert actions.modality.tolist() == [[Modality.PROTEIN, Modality.CHEMICAL], [Modality.PROTEIN]*2]
    assert actions.amounts.tolist() == [[[0, 0], [1, 0]], [[0, 0], [0, 0]]]


def test_a_composer_with_doses_begins_as_one_without():
    _, actions = actions_of("aspirin@1uM", "aspirin@10uM", "caffeine@10uM@6h")
    def composer(n):
        torch.manual_seed(0)
        return ActionComposer(d_action=16, d_mode=4).reading_amounts(n)
    plain, dosed = composer(0), composer(2)
    assert torch.equal(plain(actions._replace(amounts=None)), dosed(actions))
    assert {k for k, _ in dosed.named_parameters()} - {k for k, _ in plain.named_parameters()} == {"amounts"}
    dosed(actions).square().sum().backward()
    assert dosed.amounts.grad.abs().sum() > 0
    with torch.no_grad(): dosed.amounts.normal_()
    said, content = dosed(actions)[:, 0], dosed.content["CHEMICAL"](actions.features[:, 0])
    for row, (c, q) in enumerate(zip(content, actions.amounts[:, 0])):      # S q and T q by hand
        scale, shift = (q[0]*dosed.amounts[0] + q[1]*dosed.amounts[1]).split(16)
        assert torch.allclose(said[row], c*(1 + scale) + shift, atol=1e-5)
    with pytest.raises(ValueError, match="trained on conditions without any"): plain(actions)
    with pytest.raises(ValueError, match="need \\(3, 1, 2\\) finite"):
        dosed(actions._replace(amounts=actions.amounts*float("nan")))


def test_the_published_model_has_no_weight_for_doses():
    with torch.device("meta"): model = BioJEPA(preset("paper").model)
    assert n_params(model.composer) == 882_880 and model.composer.amounts is None
    with torch.device("meta"): more = BioJEPA(preset("paper").model.changed(n_amounts=2))
    assert n_params(more) - n_params(model) == 2*2*320


def test_a_memory_answers_between_doses_and_for_a_new_compound():
    rng = np.random.default_rng(0)
    kind, way = np.repeat([0, 1], 8), 7*np.linalg.qr(rng.normal(size=(50, 2)))[0].T
    shape = np.eye(2)[kind] + .1*rng.normal(size=(16, 2))
    bank = FeatureBank(tuple(f"D{d}" for d in range(16)), shape, Modality.CHEMICAL, dict(featurizer="shape"))
    parts = [f"D{d}@{dose}uM" for d in range(16) for dose in ("0.1", "1", "10")]
    effect = np.stack([way[kind[int(name_of(p)[1:])]]*(2 + amounts_of(p)[0]) for p in parts])
    effect += .2*rng.normal(size=effect.shape)
    seen = np.array([name_of(p) != "D0" and p != "D9@1uM" for p in parts])
    memory = fit_memory([(p,) for p, s in zip(parts, seen) if s], effect[seen], bank)
    size = memory.answer([("D0@1uM",), ("D0@10uM",), ("D9@1uM",), ("D9@3uM",)]).delta @ way.T/np.square(way).sum(1)
    assert np.allclose(size, [[2, 0], [3, 0], [0, 2], [0, 2.5]], atol=.25)
    assert memory.block_weights["amounts"] > 0
    assert memory.answer([("D0@1uM",), ("D99@1uM",)]).known.tolist() == [True, False]


@pytest.mark.parametrize("table, message", [
    (dict(smiles=["C"]), "none of its compounds"), (dict(name=["x"]), "give a column smiles, or columns of numbers")])
def test_tables_of_compounds_that_say_nothing_are_refused(table, message):
    names = ["aspirin"] if "name" in table else ["water"]
    with pytest.raises(ValueError, match=message):
        compound_features(pd.DataFrame(table, index=names), ActionTable.from_conditions(["aspirin@1uM"]))


def test_any_table_of_numbers_describes_compounds(tmp_path):
    weights = pd.DataFrame(dict(drug=["caffeine", "aspirin"], weight=[194.2, 180.2], note="x"))
    weights.to_csv(tmp_path/"t.csv", index=False)
    adata = prepare(load_dataset(plate(), **NAMED))
    bank, = default_features(adata, ActionTable.from_anndata(adata), DataConfig(compounds=str(tmp_path/"t.csv")))
    assert bank.modality is Modality.CHEMICAL and np.allclose(bank.rows(["aspirin", "caffeine"])[:, 0], [180.2, 194.2])


RINGS = dict(benzene="c1ccccc1", pyridine="c1ccncc1", indole="c1ccc2[nH]ccc2c1", morpholine="C1COCCN1", chain="CCCCCN")


def library(lines=("A", "B"), doses=("0.1", "1", "10", "100")):
    "Three compounds of each of four ring systems and a chain, at four doses in two lines."
    smiles = {f"{ring}-{k}": tail + s for ring, s in RINGS.items() for k, tail in enumerate(("C", "CC", "OCC"))}
    wells = [(line, f"{name}@{dose}uM") for line in lines for name in smiles for dose in doses]
    wells += [(line, "ctrl") for line in lines for _ in range(3)]
    obs = pd.DataFrame(wells, columns=["line", "label"], index=[f"w{i}" for i in range(len(wells))])
    X = sp.csr_matrix(np.random.default_rng(0).poisson(2., (len(wells), 5)).astype("float32"))
    adata = load_dataset(ad.AnnData(X, obs, pd.DataFrame(index=list("VWXYZ"))), condition="label", cell_type="line")
    adata.uns["compounds"] = pd.DataFrame(dict(smiles=smiles))
    return adata


def compounds(values): return {v.split("|")[-1].partition("@")[0] for v in values}


KINDS_OF_COMPOUNDS = ("drug", "scaffold", "dose_between", "dose_beyond", "line_drug")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS_OF_COMPOUNDS)
def test_splits_of_compounds_are_whole_and_repeatable(kind, seed):
    adata = library()
    split = make_split(adata, kind, seed)
    parts = [set(split.train), set(split.val), set(split.test)]
    assert all(parts) and not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    column = adata.obs["cell_type"].astype(str) + "|" + adata.obs["condition"].astype(str)
    values = set(column if kind == "line_drug" else adata.obs["condition"])
    assert parts[0] | parts[1] | parts[2] == {v for v in values if not v.endswith("ctrl")}
    assert split == make_split(adata[np.random.default_rng(seed).permutation(adata.n_obs)].copy(), kind, seed)
    report = check_leakage(adata, split)
    assert report["passed"].all()
    rows = {p: set(split.cells(adata, p)) for p in ("train", "val", "test")}
    assert sum(map(len, rows.values())) == (adata.obs["condition"] != "ctrl").sum() == len(set().union(*rows.values()))
    assert len(split.controls(adata, "test")) == 6


def test_what_each_kind_holds_out():
    adata = library()
    drug = make_split(adata, "drug", 1)
    assert len(compounds(drug.test)) == 4 and not compounds(drug.test) & compounds([*drug.train, *drug.val])
    rings = lambda names: {n.partition("-")[0] if not n.startswith("chain") else n for n in names}
    frames = make_split(adata, "scaffold", 1)
    assert not rings(compounds(frames.test)) & rings(compounds([*frames.train, *frames.val]))
    order = ("0.1uM", "1uM", "10uM", "100uM")
    between, beyond = (make_split(adata, k, 1) for k in ("dose_between", "dose_beyond"))
    assert {v.partition("@")[2] for v in between.test} <= set(order[1:3])
    assert {v.partition("@")[2] for v in (*beyond.test, *beyond.val)} == {order[3]}
    assert compounds(between.test) <= compounds(between.train) and compounds(beyond.test) <= compounds(beyond.train)
    lines = make_split(adata, "line_drug", 1)
    pairs = lambda values: {tuple(v.partition("@")[0].split("|")) for v in values}
    assert not pairs(lines.test) & pairs(lines.train) and compounds(lines.test) <= compounds(lines.train)


@pytest.mark.parametrize("kind, check", [("drug", "targets"), ("scaffold", "scaffolds"), ("dose_between", "doses"),
                                         ("dose_beyond", "doses"), ("line_drug", "lines of compounds")])
def test_a_planted_leak_of_each_kind_is_found(kind, check):
    adata = library()
    split = make_split(adata, kind, 1)
    if kind == "dose_between":      # everything below a held-out dose is taken out of training
        name = split.test[0].partition("@")[0]
        gone = [v for v in split.train if v.startswith(f"{name}@0.1uM") or v.startswith(f"{name}@1uM")]
        leaky = replace(split, train=tuple(v for v in split.train if v not in gone))
    elif kind == "dose_beyond":     # a lower dose is tested, the highest is seen
        low = next(v for v in split.train if v.partition("@")[0] == split.test[0].partition("@")[0])
        leaky = replace(split, train=tuple({*split.train, split.test[0]} - {low}), test=(low, *split.test[1:]))
    else:
        whole = split.test[:4] if kind == "scaffold" else split.test[:1]
        leaky = replace(split, train=(*split.train, *whole), test=tuple(v for v in split.test if v not in whole))
    with pytest.raises(LeakageError) as error: check_leakage(adata, leaky)
    assert check in set(error.value.report.query("~passed")["check"])


@pytest.mark.parametrize("kind, change, message", [
    ("drug", lambda a: a[~a.obs["condition"].str.contains("@")].copy(), "controls only"),
    ("scaffold", lambda a: a.uns.pop("compounds") is None or a, "no SMILES of benzene-0"),
    ("dose_between", lambda a: a[a.obs["condition"].isin(["ctrl", "chain-0@1uM", "chain-0@10uM"])].copy(),
     "at 3 doses"),
    ("line_drug", lambda a: a[a.obs["cell_type"] == "A"].copy(), "two lines")])
def test_questions_that_the_data_cannot_answer(kind, change, message):
    with pytest.raises(ValueError, match=message): make_split(change(library()), kind, 1)


def test_a_screen_of_genes_has_no_compound():
    adata = library()
    genes = adata.obs["condition"].astype(str).str.replace("@.*", "", regex=True).replace("ctrl", "G")
    adata.obs["condition"] = pd.Categorical(genes.where(genes == "ctrl", genes + "+ctrl"))
    adata.uns.pop("compounds")
    with pytest.raises(ValueError, match="holds no compound"): make_split(adata, "drug", 1)


def test_compounds_to_test_can_be_named():
    adata = library()
    assert compounds(make_split(adata, "drug", held_out=["indole-1"]).test) == {"indole-1"}
    assert make_split(adata, "dose_beyond", held_out=["indole-1"]).test == ("indole-1@100uM",)
    assert {v.split("@")[0] for v in make_split(adata, "line_drug", held_out=["A|indole-1"]).test} == {"A|indole-1"}
    frames = make_split(adata, "scaffold", held_out=["c1ccncc1"])
    assert compounds(frames.test) == {f"pyridine-{k}" for k in range(3)}


SMALL = DrugSpec(n_genes=60, n_targets=4, n_drugs=16, doses=(.1, 1., 10.), cells=6, controls=60)


def test_half_of_the_target_is_occupied_at_ec50_and_the_curve_is_hills():
    c, ec50, h = np.array([.01, .5, 3., 40.]), 3., 1.7
    assert np.allclose(occupancy(c, np.log10(ec50), h), c**h/(c**h + ec50**h))


def test_log_folds_of_a_screen_follow_from_its_drugs():
    truth = simulate_drugs(SMALL).uns["truth"]
    place, genes = {c: i for i, c in enumerate(truth["condition"])}, list(truth["gene"])
    network = plant_network(SimulationSpec(n_genes=60, n_targets=4, n_modules=4, n_cell_types=2, n_cells=1000))
    response = np.linalg.solve(np.eye(60) - network.matrix(1).toarray(), np.eye(60))    # not by iteration
    for name, drug in truth["drugs"].iloc[:4].iterrows():
        expected = np.zeros(60)
        for target, ec50 in ((drug["target"], drug["log_ec50"]), (drug["off_target"], drug["off_log_ec50"])):
            k = genes.index(target)
            own = response[:, k]/response[k, k]
            own[k] = 0
            expected -= 2*own/(1 + (10**ec50/10)**drug["hill"])
        found = truth["log_fold_by_cell_type"][1, place[f"{name}@10uM"]]
        assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("informative, least, most", [(True, .9, 1), (False, 0, .4)])
def test_molecules_tell_the_target_only_where_they_are_meant_to(informative, least, most):
    pytest.importorskip("rdkit")
    spec = replace(SMALL, n_drugs=40, informative=informative)
    drugs = simulate_drugs(spec).uns["truth"]["drugs"]
    bank = featurize("morgan", drugs["smiles"].to_dict(), cache=False, progress=False)
    alike = tanimoto(bank.values, bank.values)
    np.fill_diagonal(alike, 0)
    target = drugs.loc[list(bank.keys), "target"].to_numpy()
    assert least <= (target[alike.argmax(1)] == target).mean() <= most


def test_a_screen_of_drugs_is_read_with_its_truth_and_repeats():
    adata = load_drugs(SMALL)
    assert (adata.X != load_drugs(SMALL).X).nnz == 0 and (adata.X != load_drugs(replace(SMALL, seed=1)).X).nnz
    assert set(adata.obs["condition"]) == {"ctrl", *adata.uns["truth"]["condition"]}
    assert adata.obs.groupby(["condition", "cell_type"], observed=True).size().drop("ctrl").eq(6).all()
    adata = prepare(adata)
    split = make_split(adata, "drug", 1)
    asked = template_of(adata, split)
    assert row_correlations(oracle(asked, adata).delta, asked.observed_mean() - asked.control_mean).mean() > .4
    with pytest.raises(ValueError, match="there are 12 ring systems"): DrugSpec(n_targets=13)


def test_baselines_of_doses_know_the_dose_and_those_of_genes_are_unchanged():
    adata = prepare(load_drugs(replace(SMALL, n_cell_types=1, doses=(.1, 1., 10., 100.))))
    split = make_split(adata, "dose_between", 1)
    asked = template_of(adata, split)
    table = ActionTable.from_anndata(adata)
    banks = default_features(adata, table)
    features = target_features(banks, table)
    assert set(features.index) == {p for parts in table.parts for p in parts}
    made = run_baselines(asked, adata, split, dict(molecule=features), progress=False)
    observed = asked.observed_mean() - asked.control_mean
    beyond = {n: row_correlations(s.delta - s.train_delta, observed - s.train_delta).mean()
              for n, s in made.items() if n != "half_of_the_cells"}
    assert beyond["other_doses"] > .3 and beyond["ridge, molecule"] > .2 and beyond["tanimoto_neighbours"] > .2
    means = template_means(adata, split)
    for k, condition in enumerate(asked.groups["condition"]):       # by hand: the two doses beside it, half of each
        name, _, dose = condition.partition("@")
        low, high = (means[f"{name}@{float(dose.removesuffix('uM'))*f:g}uM"] for f in (.1, 10))
        assert np.allclose(made["other_doses"].delta[k], (low + high)/2)
    assert set(told_table(made).index) == set(made)


def template_means(adata, split):
    "Mean Δ of each training condition."
    means = group_means(adata, split.cells(adata, "train"), split.controls(adata, "train"))
    return dict(zip(means.groups["condition"], means.delta))


def test_cases_of_drugs_ask_what_they_say():
    cases = {c.name: c for c in simulated_cases(preset("smoke"))}
    for name, kind in (("unseen drugs", "drug"), ("unseen doses, beyond", "dose_beyond"),
                       ("unseen doses, between", "dose_between"), ("unseen line × drug", "line_drug")):
        adata, split = case_data(cases[name])
        assert split.kind == kind and check_leakage(adata, split)["passed"].all() and adata.n_vars == 60


def test_a_screen_of_compounds_of_ones_own_is_asked_about_compounds():
    adata = prepare(library())
    names = {c.name for c in dataset_cases(preset("smoke"), adata)[0]}
    assert {"unseen drugs", "unseen scaffolds", "unseen doses, between", "unseen line × drug"} <= names
    del adata.uns["compounds"]
    cases, left_out = dataset_cases(preset("smoke"), adata)
    assert "unseen drugs" not in {*(c.name for c in cases), *left_out["case"]}


def test_a_bulk_profile_has_no_gene_to_test_and_its_picture_says_so():
    columns = ["perturbation", "gene", "observed", "predicted", "p_adjusted", "target"]
    figure = plot_volcano(pd.DataFrame(columns=columns).astype(dict(observed=float, predicted=float, p_adjusted=float)))
    assert figure.axes[0].get_title() == "too few cells: no gene could be tested"


def test_the_size_of_a_planted_response_is_one_at_the_highest_dose_and_follows_the_dose():
    adata = prepare(load_drugs(replace(SMALL, n_cell_types=1, off_target=0.)))
    first, *rest = sorted(set(adata.obs["condition"]) - {"ctrl"})
    split = make_split(adata, "custom", held_out=dict(train=[first], test=rest), allow_empty_val=True)
    asked = template_of(adata, split)
    planted = oracle(asked, adata, as_delta=False)      # folds, which are the occupancy times one direction
    curve = dose_response(planted, planted)
    drugs = adata.uns["truth"]["drugs"].loc[curve["compound"]]
    theta = occupancy(curve["dose"].to_numpy(), drugs["log_ec50"].to_numpy(), drugs["hill"].to_numpy())
    top = occupancy(10., drugs["log_ec50"].to_numpy(), drugs["hill"].to_numpy())
    assert np.allclose(curve["predicted"], theta/top, atol=1e-4)
    assert np.allclose(dose_response(planted.with_prediction("half", planted.delta/2), planted)["predicted"],
                       theta/top/2, atol=1e-4)
