"""Compounds, doses and times.

1. One amount has one spelling, whatever its unit; what is not an amount is refused by name.
2. Columns of dose, time and SMILES say the same as labels that carry them, and survive writing and reading."""
import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from biojepa.data.conditions import (
    SchemaError, amounts_of, condition_name, name_of, parse_condition, parse_treatments, parts_of
)
from biojepa.data.datasets import load_dataset
from biojepa.data.preprocess import prepare
from biojepa.data.schema import validate

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
