"The action table against plain loops over cells, and every way in which it can be refused."
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import biojepa.actions.vocabulary as vocabulary
from biojepa.actions.vocabulary import ActionTable, Modality, Mode
from biojepa.data.batches import ActionBatch
from biojepa.data.conditions import parse_condition
from biojepa.data.datasets import load_dataset
from biojepa.data.loaders import action_loader, pair_loader
from biojepa.data.network import SimulationSpec
from biojepa.data.preprocess import prepare
from biojepa.data.simulate import simulate_perturb_seq


@pytest.fixture(scope="module")
def adata():
    return simulate_perturb_seq(
        SimulationSpec(n_genes=200, n_cells=600, n_targets=10, n_doubles=3, crispra_fraction=.3))


@pytest.fixture(scope="module")
def table(adata): return ActionTable.from_anndata(adata)


def small(**columns):
    obs = pd.DataFrame(dict(condition=["B+ctrl", "ctrl", "A+B", "B+ctrl", "ctrl", "A+B"]) | columns,
                       index=[f"cell{i}" for i in range(6)])
    if "perturbation" not in obs: obs["perturbation"] = obs.condition.astype("category")
    return ad.AnnData(np.zeros((6, 2), np.float32), obs=obs)


# --- the fixed numbers
# --------------------------------------------------------------------------------------------------

def test_numbers_are_those_of_the_release():
    released = [
        "crispri", "crispra", "overexpression", "knockout", "inhibitor", "agonist", "degrader", "binder",
        "control", "unknown"
    ]
    assert [str(Mode(i)) for i in range(10)] == released and len(Mode) == 10
    assert [m.name
            for m in Modality] == ["PROTEIN", "CHEMICAL", "DNA"] and [int(m)
                                                                      for m in Modality] == [0, 1, 2]
    assert torch.nn.Embedding(10, 64)(torch.tensor([Mode.CONTROL])).shape == (1, 64)


@pytest.mark.parametrize("value,mode", [("CRISPRi", 0), (" crispra ", 1), ("UNKNOWN", 9), (Mode.BINDER, 7),
                                        (3, 3), (np.int64(8), 8)])
def test_modes_are_read(value, mode):
    assert Mode.parse(value) is Mode(mode)


@pytest.mark.parametrize("value", ["CRISPR", "", 10, -1, 1.0, None, True])
def test_other_modes_are_refused(value):
    with pytest.raises(ValueError, match="mode: found .* choose one of crispri, crispra, .*, unknown"):
        Mode.parse(value)


# --- from cells
# ---------------------------------------------------------------------------------------------------------

def test_rows_are_categories_and_tell_what_the_cells_say(adata, table):
    assert list(table.perturbation) == list(adata.obs.perturbation.cat.categories)
    for i, name in enumerate(table.perturbation):
        cells = adata.obs[adata.obs.perturbation == name]
        first = cells.iloc[0]
        assert table.n_cells[i] == len(
            cells) and table.condition[i] == first.condition and table.targets[i] == parse_condition(
                first.condition)
        if table.is_control[i]:
            assert (table.guide_id[i], table.guide_seqs[i], table.mode[i],
                    table.targets[i]) == ("", (), Mode.CONTROL, ())
        else:
            assert (table.guide_id[i], table.guide_seqs[i],
                    table.mode[i]) == (first.guide_id, (first.guide_seq_a, first.guide_seq_b),
                                       Mode[first["mode"].upper()])
    assert table.is_control.sum() == 1 and {len(t) for t in table.targets} == {0, 1, 2} and {
        Mode.CRISPRI, Mode.CRISPRA
    } < set(table.mode)
    assert table.genes == tuple(sorted({t for c in adata.obs.condition for t in parse_condition(c)}))


def test_a_batch_indexes_the_table(adata, table):
    ready = prepare(
        load_dataset(adata,
                     condition="condition",
                     control="ctrl",
                     batch="batch",
                     cell_type="cell_type",
                     guide="guide_id"))
    split = SimpleNamespace(cells=lambda a, part: np.flatnonzero(a.obs.condition != "ctrl"),
                            controls=lambda a, part: np.flatnonzero(a.obs.condition == "ctrl"))
    for batch in pair_loader(ready, split):
        for code, cell in zip(batch.perturbation.tolist(), batch.pert.tolist()):
            assert table.perturbation[code] == ready.obs.perturbation.iloc[cell] and table.condition[
                code] == ready.obs.condition.iloc[cell]


def test_category_order_wins_over_sorting():
    cells = small(perturbation=pd.Categorical(["B+ctrl", "ctrl", "A+B"]*1 + ["B+ctrl", "ctrl", "A+B"],
                                              categories=["ctrl", "B+ctrl", "A+B"]))
    table = ActionTable.from_anndata(cells)
    assert table.perturbation == ("ctrl", "B+ctrl", "A+B") and table.codes(cells).tolist() == [1, 0, 2]*2
    assert table.mode == (Mode.CONTROL, Mode.UNKNOWN,
                          Mode.UNKNOWN) and table.guide_seqs == ((), (), ()) and table.n_cells == (2, 2, 2)


def test_one_mode_for_all_and_a_column_of_modes():
    assert ActionTable.from_anndata(small(), mode="CRISPRi").mode == (Mode.CRISPRI, Mode.CRISPRI, Mode.CONTROL)
    column = ["knockout", "control", "CRISPRa", "knockout", "knockout",
              "CRISPRa"]  # a control's label does not matter
    assert ActionTable.from_anndata(small(mode=column)).mode == (Mode.CRISPRA, Mode.KNOCKOUT, Mode.CONTROL)
    assert ActionTable.from_anndata(small(mode=column),
                                    mode=Mode.DEGRADER).mode == (Mode.DEGRADER, Mode.DEGRADER, Mode.CONTROL)


def test_missing_guides_are_no_guides():
    table = ActionTable.from_anndata(
        small(guide_seq_a=["ACGT", np.nan, "GGGG", "ACGT", "TTTT", "GGGG"],
              guide_seq_b=["", "", "CCCC", "", "", "CCCC"]))
    assert table.guide_seqs == (("GGGG", "CCCC"), ("ACGT",), ()) and table.guide_id == ("", "", "")


@pytest.mark.parametrize("columns,message", [
    (dict(guide_seq_a=["ACGT", "", "GGGG", "ACGA", "", "GGGG"]),
     r"adata.obs\['guide_seq_a'\]: 1 perturbations "
     r"have more than one value, first 'B\+ctrl' "
     r"with 'ACGT', 'ACGA'"),
    (dict(guide_seq_a=["ACGT", "", "GGGG", np.nan, "", "GGGG"]), "first 'B\\+ctrl' with 'ACGT', ''"),
    (dict(guide_id=["g1", "", "g2", "g3", "", "g2"]), r"adata.obs\['guide_id'\]: 1 perturbations"),
    (dict(mode=["crispri", "control", "crispra", "crispri", "control", "crispri"]),
     r"adata.obs\['mode'\]: 1 "
     r"perturbations have more "
     r"than one value, "
     r"first 'A\+B'"),
    (dict(mode=["crispr"]*6), "mode: found 'crispr'; choose one of"),
    (dict(guide_seq_b=["MKLV"]*6), "guide sequence 'MKLV' of 'A\\+B' is not DNA"),
    (dict(perturbation=["x", "ctrl", "x", "x", "ctrl", "x"]),
     r"adata.obs\['condition'\]: 1 perturbations have "
     r"more than one value, first 'x' with "
     r"'B\+ctrl', 'A\+B'"),
    (dict(perturbation=pd.Categorical(["x"]*6, categories=["x", "y", "z"]), condition=["A+ctrl"]*6), "2 "
     "categories have no cell, first 'y'"),
    (dict(perturbation=["x", None, "x", "x", "x", "x"]),
     r"adata.obs\['perturbation'\]: 1 cells have no value"),
    (dict(condition=["A++B"]*6, perturbation=["x"]*6), "A\\+\\+B"),
])
def test_cells_that_disagree(columns, message):
    with pytest.raises(ValueError, match=message): ActionTable.from_anndata(small(**columns))


def test_a_missing_column():
    for column in ("condition", "perturbation"):
        cells = small()
        del cells.obs[column]
        with pytest.raises(ValueError, match=f"adata.obs: no column '{column}'"):
            ActionTable.from_anndata(cells)


def test_unknown_targets_are_named():
    assert len(ActionTable.from_anndata(small(), known=["A", "B", "C"])) == 3
    with pytest.raises(ValueError, match=r"1 targets are not among the 2 known genes: A \(in 'A\+B'\)"):
        ActionTable.from_anndata(small(), known=["B", "C"])
    with pytest.raises(ValueError,
                       match=r"12 targets are not among the 1 known genes: G0 .in 'G0'., .* and 4 more"):
        ActionTable.from_conditions([f"G{i}" for i in range(12)], known=["A"])


# --- the table
# ----------------------------------------------------------------------------------------------------------

def test_a_table_cannot_be_edited(table):
    with pytest.raises(FrozenInstanceError): table.mode = ()
    frame = table.frame
    frame.loc[0, "condition"] = "changed"
    assert table.frame.condition[0] != "changed" and hash(table) == hash(table.select(range(len(table))))


def test_equal_targets_have_equal_codes(table):
    codes = table.target_codes
    for i in range(len(table)):
        for j in range(len(table)): assert (codes[i] == codes[j]) == (table.targets[i] == table.targets[j])
    assert codes.dtype == np.int64 and set(codes) == set(range(len(set(table.targets))))


def test_alignment_rows_come_from_training_cells_only(adata, table):
    held_out = table.genes[3]
    split = SimpleNamespace(cells=lambda a, part: np.flatnonzero(
        [bool(t) and (held_out in t) == (part == "test") for t in map(parse_condition, a.obs.condition)]))
    allowed = table.rows(adata, split, "train")
    plain = [i for i, t in enumerate(table.targets) if t and held_out not in t]
    assert allowed.tolist() == plain
    n = len(table)
    tokens = ActionBatch(
        torch.arange(n).float().reshape(n, 1, 1),
        torch.zeros(n, 1).long(),
        torch.zeros(n, 1).long(),
        torch.tensor(~table.is_control)[:, None])
    seen = torch.cat([
        b.anchor.features.flatten()
        for b in action_loader(tokens, tokens, table.target_codes, allowed, batch_size=4)
    ])
    assert sorted(seen.int().tolist()) == plain


def test_a_table_of_other_cells_is_refused(adata, table):
    fewer = adata[adata.obs.condition != table.condition[0]].copy()
    with pytest.raises(ValueError, match=r"33 rows|rows, but adata.obs\['perturbation'\] has"):
        table.codes(fewer)
    other_order = adata.copy()
    other_order.obs["perturbation"] = other_order.obs["perturbation"].cat.reorder_categories(
        table.perturbation[::-1])
    with pytest.raises(ValueError, match="or another order"): table.codes(other_order)


def test_select(table):
    two = table.select(np.array([4, 0]))
    assert two.perturbation == (table.perturbation[4], table.perturbation[0]) and two.frame.equals(
        table.frame.iloc[[4, 0]].reset_index(drop=True))
    assert len(table.select([])) == 0


def test_labels_become_a_table():
    table = ActionTable.from_conditions(["control", "TP53", "TP53+MYC"], mode="CRISPRa")
    assert table.perturbation == table.condition == ("ctrl", "TP53+ctrl", "MYC+TP53") and table.mode == (
        Mode.CONTROL, Mode.CRISPRA, Mode.CRISPRA) and table.n_cells == (0, 0, 0)
    with pytest.raises(ValueError, match="single label 'TP53'"): ActionTable.from_conditions("TP53")
    with pytest.raises(ValueError, match=r"'A\+B' stands twice"): ActionTable.from_conditions(["A+B", "B+A"])


# --- on disk
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_round_trip(table, tmp_path, suffix):
    with_na = ActionTable.from_conditions(["NA", "nan1+None",
                                           "ctrl"])  # names that a careless reader takes for missing values
    for t in (table.select([]), with_na, table):
        t.save(tmp_path/f"actions{suffix}")
        assert ActionTable.load(tmp_path/f"actions{suffix}") == t
    assert all(type(m) is Mode for m in ActionTable.load(tmp_path/f"actions{suffix}").mode)
    assert [p.name for p in tmp_path.iterdir()] == [f"actions{suffix}"]


def test_files_that_are_no_table(table, tmp_path):
    with pytest.raises(ValueError, match=r"found suffix '\.tsv'"): table.save(tmp_path/"a.tsv")
    with pytest.raises(ValueError, match=r"found suffix '\.pkl'"): ActionTable.load(tmp_path/"a.pkl")
    (tmp_path/"a.csv").write_text("gene,cells\nA,3\n")
    with pytest.raises(
            ValueError,
            match=r"a\.csv: found columns gene, cells; an action table has perturbation, condition"):
        ActionTable.load(tmp_path/"a.csv")
    table.frame.assign(mode="crispr", targets="A", guide_seqs="").to_csv(tmp_path/"b.csv", index=False)
    with pytest.raises(ValueError, match="mode: found 'crispr'"): ActionTable.load(tmp_path/"b.csv")


# --- real files
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,columns,expected", [
    ("k562_essential_twin",
     dict(condition="condition",
          control="ctrl",
          batch="gem_group",
          cell_type="cell_type",
          guide="guide_id",
          guide_seq=("guide_seq_a", "guide_seq_b"),
          mode="crispri"), (652, {Mode.CRISPRI})),
    ("papalexi21_thp1_crisprko",
     dict(condition="perturbation", control="control", batch="batch", guide="guide", mode="knockout"),
     (25, {Mode.KNOCKOUT})),
    ("norman19_mcfaline23_hvg500",
     dict(condition="condition",
          control="control",
          batch="dataset",
          cell_type="cell_type",
          mode="perturbation_type"), (31, {Mode.CRISPRI, Mode.CRISPRA})),
])
def test_real_files(shared, name, columns, expected):
    table = ActionTable.from_anndata(
        cells := load_dataset(shared/f"{name}.h5ad", unknown_targets="allow", **columns))
    assert (len(table.genes), set(table.mode) - {Mode.CONTROL}) == expected and sum(
        table.n_cells) == cells.n_obs
    if name == "k562_essential_twin":
        assert all(len(s) == 2 for s, c in zip(table.guide_seqs, table.is_control) if not c)
