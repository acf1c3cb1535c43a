"""What a screen's file leaves out, against planted truths.

1. A workbook is read as it was written. 2. Guides are joined by name, or averaged over all pairs of the target.
3. Barcodes give a cell its own pair or none, and the values of the raw file are never read. 4. Proteins follow the
gene's primary name, then a synonym that one entry claims. 5. Companions are fetched like datasets. 6. What features
need is asked for before anything is trained, and nothing else is fetched.
"""
import gzip
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from biojepa.actions import pretrained
from biojepa.actions.action_tokens import action_batch
from biojepa.actions.describe import default_features, describe_actions
from biojepa.actions.featurizers import featurize
from biojepa.actions.pretrained import MissingWeightsError, pretrained_features
from biojepa.actions.vocabulary import ActionTable, Modality
from biojepa.cli import experiment_of, parser
from biojepa.config import DataConfig, named_experiment, preset
from biojepa.core import PATHS, file_hash
from biojepa.data import companions
from biojepa.data.companions import (
    fetch_companion, join_barcodes, join_guides, join_proteins, load_screen, read_barcodes, read_guides,
    read_proteins, read_table
)
from biojepa.data.conditions import SchemaError
from biojepa.data.datasets import load_dataset
from biojepa.data.download import Companion, DatasetCard, DownloadError, read_card
from biojepa.data.splits import make_split
from biojepa.training.run import load_data

sys.path.insert(0, str(Path(__file__).parent))
from random_esm2 import write_random_esm2
from test_datasets import Server, warned

RNG = np.random.default_rng(0)
DNA = ["".join(RNG.choice(list("ACGT"), 20)) for _ in range(40)]
TABLE_S1 = dict(guide=("sgID_A", "sgID_B"),
                gene="gene",
                sequence=("targeting sequence A", "targeting sequence B"))
SPELLED = Companion(file="t.csv", **TABLE_S1)
UNIPROT = dict(gene="Gene Names (primary)", sequence=("Sequence",))


def library(genes=None):
    "Genes A, B and C with one, two and three pairs, and a control; B's first pair is against two transcripts."
    names = ["A_P1", "B_E1,E2", "B_P2", "C_P1", "C_P2", "C_P3", "non-targeting_1"]
    return pd.DataFrame({"gene": genes or [n.split("_")[0] for n in names], "sgID_A": [f"{n}a" for n in names],
                         "sgID_B": [f"{n}b" for n in names],
                         "targeting sequence A": DNA[0:14:2], "targeting sequence B": DNA[1:14:2]})


def cells(conditions=("ctrl", "A+ctrl", "B+ctrl", "C+ctrl"), per=3):
    "A file in GEARS' shape: log values, targets, barcodes, and nothing about guides."
    conditions = np.repeat(conditions, per)
    barcodes = [f"ACGT{i:04d}-{1 + i % 2}" for i in range(len(conditions))]
    obs = pd.DataFrame(dict(condition=conditions, cell_type="K562"), index=barcodes)
    counts = np.random.default_rng(0).poisson(2., (len(obs), 5))
    X = sp.csr_matrix(np.log1p(counts*1.3).astype("float32"))
    return ad.AnnData(X, obs, pd.DataFrame(dict(gene_name=list("ABCDE")), index=list("ABCDE")))


def loaded(**names):
    return load_dataset(cells(**names), cell_type="cell_type", batch_pattern=r"-(\d+)$", mode="crispri",
                        unknown_targets="allow")


def history(adata): return list(adata.uns["biojepa"]["history"])


def quiet(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def kmers(sequence):
    return featurize("kmer", {"x": sequence}, modality=Modality.DNA, cache=False, progress=False).values[0]


# --- 1 tables
# ---------------------------------------------------------------------------------------------------------

def test_a_workbook_is_read_as_it_was_written(tmp_path):
    path = tmp_path/"t.xlsx"
    written = pd.DataFrame({"gene": ["TP53 & B", None], "n": [2.5, None], "both?": [True, False]})
    with pd.ExcelWriter(path) as book:
        written[:0].to_excel(book, sheet_name="TabA", index=False)
        written.to_excel(book, sheet_name="TabB", index=False)
    expected = pd.DataFrame({"gene": ["TP53 & B", np.nan], "n": ["2.5", np.nan], "both?": ["True", "False"]})
    pd.testing.assert_frame_equal(read_table(path, "TabB"), expected, check_dtype=False)
    assert list(read_table(path)) == ["gene", "n", "both?"] and not len(read_table(path))
    with pytest.raises(ValueError, match="t.xlsx: found no sheet 'TabC'; there are TabA, TabB"):
        read_table(path, "TabC")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="t.xlsx: not a readable workbook .BadZipFile"): read_table(path)


def test_every_kind_of_table_is_the_same_table(tmp_path):
    table = library()
    table.to_csv(tmp_path/"t.csv", index=False)
    table.to_csv(tmp_path/"t.csv.gz", index=False)
    table.to_csv(tmp_path/"t.tsv.gz", index=False, sep="\t")
    table.to_parquet(tmp_path/"t.parquet")
    for name in ("t.csv", "t.csv.gz", "t.tsv.gz", "t.parquet"):
        pd.testing.assert_frame_equal(read_table(tmp_path/name), table)


# --- 2 guides
# ---------------------------------------------------------------------------------------------------------

def test_without_guides_an_action_is_the_mean_over_all_pairs_of_its_target():
    plain = loaded()
    adata = join_guides(plain, read_guides(library(), SPELLED), "t")
    assert "guide_id" not in adata.obs and adata.obs["perturbation"].equals(plain.obs["perturbation"])
    assert [c for c in adata.obs if c.startswith("guide_seq")] == [f"guide_seq_{x}" for x in "abcdef"]
    assert (adata.X != plain.X).nnz == 0
    table = ActionTable.from_anndata(adata)
    features = default_features(adata, table)
    assert [b.modality for b in features] == [Modality.DNA]
    actions = action_batch(table, features)
    for gene, used in dict(A=DNA[0:2], B=DNA[2:6], C=DNA[6:12]).items():
        p = table.condition.index(f"{gene}+ctrl")
        found = actions.features[p, 0].numpy()
        assert table.guide_seqs[p] == tuple(used)
        by_pair = [(kmers(a) + kmers(b))/2
                   for a, b in zip(used[::2], used[1::2])]  # as the release averages a pair
        np.testing.assert_allclose(found, np.mean(by_pair, 0), atol=1e-6)
    assert not actions.present[table.condition.index("ctrl")].any()
    several = "2 have several pairs, whose features are averaged"
    assert history(adata)[-1] == f"guide_seq of t: 3 of 3 targets by gene; {several}"
    assert history(plain) == history(adata)[:-1], "the source is left as it was"


def test_what_was_joined_is_loaded_again(tmp_path):
    adata = join_guides(loaded(), read_guides(library(), SPELLED))
    adata.write_h5ad(tmp_path/"t.h5ad")
    again = load_dataset(tmp_path/"t.h5ad")
    pd.testing.assert_frame_equal(again.obs[list(adata.obs)], adata.obs, check_categorical=False)
    assert ActionTable.from_anndata(again).guide_seqs == ActionTable.from_anndata(adata).guide_seqs


def test_a_file_that_names_guides_is_joined_by_name_whatever_the_comma():
    screen = cells(("ctrl", "B+ctrl", "C+ctrl"), per=4)
    screen.obs["sgRNA"] = np.repeat(["", "B_E1-E2a|B_E1-E2b", "C_P2a|C_P2b"], 4)
    screen.obs.iloc[-1, -1] = ""                # one cell whose guide was not read
    screen.obs.iloc[-2, -1] = "C_P9a|C_P9b"     # and one whose guide is not in the library
    adata = load_dataset(screen, guide="sgRNA")
    with pytest.warns(UserWarning, match=r"found 2 of 3 guides by name, not C_P9a\|C_P9b"):
        adata = join_guides(adata, read_guides(library(), SPELLED), "t")
    rows = adata.obs.filter(like="guide_seq_").astype(str).itertuples(index=False)
    expected = [()]*4 + [tuple(DNA[2:4])]*4 + [tuple(DNA[8:10])]*2 + [(), tuple(DNA[6:12])]
    assert [tuple(filter(None, row)) for row in rows] == expected
    line = "guide_seq of t: 2 of 3 guides by name, not C_P9a|C_P9b; 1 of 1 targets by gene; 1 have several pairs"
    assert history(adata)[-1].startswith(line)
    with pytest.warns(UserWarning,
                      match=r"1 of 3 guides have no kmer feature and get the mean one: C_P9a\|C_P9b"):
        bank = default_features(adata, ActionTable.from_anndata(adata))[0]
    np.testing.assert_allclose(bank.rows(["C_P9a|C_P9b"])[0], bank.values[:-1].mean(0), atol=1e-6)


def test_targets_that_the_library_does_not_know_are_counted_and_ten_are_named():
    screen = loaded(conditions=["ctrl", "A+ctrl", *(f"X{i:02d}+ctrl" for i in range(14))])
    found = warned(lambda: join_guides(screen, read_guides(library(), SPELLED)))
    first = ", ".join(f"X{i:02d}" for i in range(10))
    assert [str(w.message) for w in found] == [f"guides: found 1 of 15 targets by gene, not {first} and 4 more"]


def test_a_table_of_ones_own_needs_no_card():
    own = pd.DataFrame(dict(guide_id=["g1", "g2"], gene=["A", "B"], guide_seq_a=DNA[:2]))
    adata = join_guides(loaded(conditions=("ctrl", "A+ctrl", "B+ctrl")), read_guides(own))
    assert set(adata.obs["guide_seq_a"]) == {"", *DNA[:2]} and "guide_seq_b" not in adata.obs
    assert read_guides(own.drop(columns="gene"))["gene"].tolist() == ["", ""]


def test_the_library_of_the_screen(shared):
    """On the twin, without its guides: every target gets its pairs, and one with a single pair just what the twin
    says."""
    with h5py.File(shared/"k562_essential_twin.h5ad") as f: obs = ad.io.read_elem(f["obs"])
    twin = ad.AnnData(sp.csr_matrix(np.ones((len(obs), 2), "float32")), obs, pd.DataFrame(index=["x", "y"]))
    plain = load_dataset(twin, batch="gem_group", cell_type="cell_type", unknown_targets="allow")
    path = shared/"k562_essential_guides_day6.csv.gz"
    adata = join_guides(plain, read_guides(path, read_card("replogle_k562_essential").companions["guides"]))
    assert "652 of 652 targets by gene" in history(adata)[-1]
    table = pd.read_csv(path)
    both = table[["targeting sequence A", "targeting sequence B"]]
    of_gene = {f"{g}+ctrl": set(t.to_numpy().ravel()) for g, t in both.groupby(table["gene"])}
    for condition, rows in adata.obs.astype(str).groupby("condition"):
        assert set(rows.iloc[0].filter(like="guide_seq_")) - {""} == of_gene.get(condition, set())
    once = table["gene"].value_counts().loc[lambda n: n == 1].index + "+ctrl"
    single = obs["condition"].isin(once) & (obs["guide_seq_a"].astype(str) != "nan"
                                            )  # the twin lacks one target's
    assert single.mean() > .5
    for name in ("guide_seq_a", "guide_seq_b"):
        assert (adata.obs.loc[single, name].astype(str) == obs.loc[single, name].astype(str)).all()


# --- 3 barcodes
# -------------------------------------------------------------------------------------------------------

def raw_file(path, screen, spoil=lambda obs: obs):
    "The raw file of the same cells: every cell of B and C alternates between its first two pairs."
    genes = screen.obs["condition"].astype(str).str.removesuffix("+ctrl").replace("ctrl", "non-targeting")
    label = (library()["sgID_A"] + "|" + library()["sgID_B"]).str.replace(",", "-")
    own = {g: list(names) for g, names in label.groupby(library()["gene"])}
    pairs = [own[g][i % min(2, len(own[g]))] for i, g in enumerate(genes)]
    obs = spoil(pd.DataFrame(dict(gene=genes, sgID_AB=pairs, UMI_count=1.), index=screen.obs_names))
    quiet(ad.AnnData, obs=obs.astype({"gene": "category", "sgID_AB": "category"})).write_h5ad(path)
    return obs


def test_barcodes_make_each_pair_a_perturbation(tmp_path):
    raw = raw_file(tmp_path/"raw.h5ad", cells(per=6), lambda obs: obs.sample(frac=1, random_state=0))
    with h5py.File(tmp_path/"raw.h5ad", "r+") as f:
        f.pop("X", None)
        f["X"] = np.full(3, np.nan)                              # values that nobody can read
    adata = join_barcodes(loaded(per=6), read_barcodes(tmp_path/"raw.h5ad"), "raw.h5ad")
    adata = join_guides(adata, read_guides(library(), SPELLED))
    assert (adata.obs["guide_id"].astype(str) == raw["sgID_AB"].reindex(adata.obs_names)).all()
    condition, guide = adata.obs["condition"].astype(str), adata.obs["guide_id"].astype(str)
    assert (adata.obs["perturbation"] == np.where(condition == "ctrl", "ctrl", condition + "|" + guide)).all()
    table = ActionTable.from_anndata(adata)
    assert sorted(len(s) for s in table.guide_seqs) == [0, 2, 2, 2, 2, 2] and len(set(table.guide_seqs)) == 6
    assert "guide_id of raw.h5ad: 24 of 24 guides of cells; 6 different guides" in history(adata)


def test_missing_ambiguous_and_contradicting_barcodes_leave_a_cell_without_a_guide(tmp_path):
    screen = cells(per=6)
    names = list(screen.obs_names)
    lost = [names[6], names[7], names[12], names[18]]
    def spoil(obs):
        obs = obs.drop(index=names[6:8])                          # A: two not there
        obs.loc[names[12], "gene"] = "C"                          # B: one of another target
        return pd.concat([obs, obs.loc[[names[18]]*2]])           # C: one three times
    raw_file(tmp_path/"raw.h5ad", screen, spoil)
    barcodes = quiet(read_barcodes, tmp_path/"raw.h5ad")
    with pytest.warns(UserWarning, match=f"found 20 of 24 guides of cells, not {', '.join(lost)}"):
        adata = join_barcodes(loaded(per=6), barcodes, "raw.h5ad")
    assert adata.obs_names[adata.obs["guide_id"] == ""].tolist() == lost
    named = adata.obs["perturbation"]
    assert named[names[12]] == "B+ctrl" and named[names[13]].startswith("B+ctrl|")
    for text in (f"2 barcodes not there, e.g. {names[6]}", f"1 barcodes there more than once, e.g. {names[18]}",
                 f"1 barcodes of another target, e.g. {names[12]}"): assert text in history(adata)[-1]


def test_a_raw_file_of_something_else_is_refused(tmp_path):
    raw_file(tmp_path/"raw.h5ad", cells(), lambda obs: obs.set_axis([f"T{i}" for i in range(len(obs))]))
    with pytest.raises(SchemaError,
                       match="raw.h5ad: none of its barcodes, such as T0, T1, is that of a cell of"):
        join_barcodes(loaded(), read_barcodes(tmp_path/"raw.h5ad"), "raw.h5ad")
    cells().write_h5ad(tmp_path/"plain.h5ad")
    with pytest.raises(SchemaError,
                       match="plain.h5ad: found no column sgID_AB, gene; there are condition, cell_type"):
        read_barcodes(tmp_path/"plain.h5ad")
    (tmp_path/"text.h5ad").write_text("no")
    with pytest.raises(SchemaError, match=r"text.h5ad: its table of cells \(obs\) cannot be read"):
        read_barcodes(tmp_path/"text.h5ad")
    offer = r"guides_from: none.h5ad: no such file; .*sgID_AB, gene; it can be had from https://.*10,661,879,995"
    with pytest.raises(SchemaError, match=offer):
        read_barcodes("none.h5ad", read_card("replogle_k562_essential").companions["barcodes"])


# --- 4 proteins
# -------------------------------------------------------------------------------------------------------

def uniprot(primary=("A1", "B; B2", "B", "C", "D", None)):
    "Six entries: A1 was A, B has two entries, one of them also for B2, two claim the name TWICE, one has no gene."
    return pd.DataFrame({"Entry": [f"P{i}" for i in range(6)], "Gene Names (primary)": primary,
                         "Gene Names (synonym)": ["A OLD", "", "", "TWICE A1", "TWICE", ""],
                         "Sequence": ["MAAA", "MB", "MBLONGER", "MC", "MD", "MNONE"]})


def test_proteins_by_primary_name_then_by_a_synonym_that_one_entry_claims(tmp_path):
    uniprot().to_csv(tmp_path/"u.tsv", sep="\t", index=False)
    found = read_proteins(tmp_path/"u.tsv", read_card("replogle_k562_essential").companions["proteins"])
    primary = dict(A1="MAAA", B="MBLONGER", B2="MB", C="MC",
                   D="MD")  # A1 is somebody's primary name: not C's
    assert found["sequence"].to_dict() == primary | dict(A="MAAA", OLD="MAAA")
    assert set(found.index[found["primary"]]) == set(primary)
    adata = quiet(join_proteins, loaded(conditions=("ctrl", "A+ctrl", "B+ctrl", "TWICE+ctrl")), found, "u.tsv")
    assert adata.uns["protein_sequences"] == dict(A="MAAA", B="MBLONGER")
    assert history(adata)[
        -1] == "protein_sequences of u.tsv: 2 of 3 targets, not TWICE; 1 of them by a synonym, e.g. A"
    assert set(read_proteins(uniprot().drop(columns="Gene Names (synonym)")).index) == set(primary)
    cut = pd.concat([uniprot(), pd.DataFrame({"Entry": ["Error encountered when streaming data."]})])
    with pytest.raises(SchemaError,
                       match="1 rows have no 'Sequence', the first begins with 'Error encountered"):
        read_proteins(cut)
    with pytest.raises(SchemaError,
                       match="u: knows none of the 3 targets, such as A; its own names begin with Z"):
        join_proteins(loaded(), pd.DataFrame(dict(sequence=["M"], primary=True), index=["Z"]), "u")


# --- 5 fetching
# -------------------------------------------------------------------------------------------------------

def small_card(**more):
    columns = dict(cell_type="cell_type", batch_pattern=r"-(\d+)$", mode="crispri")
    return DatasetCard(**(dict(name="small", title="small", columns=columns) | more))


def guides_at(url, file="g.csv", **more): return dict(guides=Companion(file=file, url=url, **TABLE_S1, **more))


@pytest.fixture
def place(tmp_path):
    "data/raw with the cells of the small card."
    (tmp_path/"raw/small").mkdir(parents=True)
    cells().write_h5ad(tmp_path/"raw/small/small.h5ad")
    return tmp_path/"raw"


def test_a_companion_is_fetched_like_a_dataset(tmp_path):
    body = gzip.compress(library().to_csv(index=False).encode())
    with Server(body, [503, "truncated", "short zip", "ok"]) as server:
        card = small_card(companions=guides_at(server.url, "library.csv.gz"))
        path = fetch_companion(card, "guides", tmp_path, attempts=4, wait=0., progress=False)
        assert server.requests == 4 and path.read_bytes() == body
    assert sorted(p.name for p in path.parent.iterdir()) == ["library.csv.gz", "library.csv.gz.record.json"]
    record = json.loads((tmp_path/"small/library.csv.gz.record.json").read_text())
    assert record["sha256"] == file_hash(path) and record["url"] == server.url
    assert fetch_companion(card, "guides", tmp_path, offline=True) == path
    path.write_bytes(body + b"x")
    with pytest.raises(DownloadError, match="its checksum .* delete it"):
        fetch_companion(card, "guides", tmp_path)


@pytest.mark.parametrize("file", ["t.csv", "t.csv.gz", "t.xlsx", "t.parquet"])
def test_a_web_page_instead_of_a_table_is_recognised(tmp_path, file):
    message = f"small, guides: the server sent 29 bytes that are no .*, beginning with .*robot.*the file as .*{file}"
    with Server(b"", ["page"]) as server:
        card = small_card(companions=guides_at(server.url, file))
        with pytest.raises(DownloadError, match=message):
            fetch_companion(card, "guides", tmp_path, progress=False)
        assert server.requests == 1 and not any(p.is_file() for p in tmp_path.rglob("*"))


def test_a_checksum_on_the_card_is_enforced_also_for_a_file_placed_by_hand(tmp_path):
    card = small_card(companions=guides_at(None, "t.csv", sha256="0"*64))
    with pytest.raises(DownloadError,
                       match=r"small, guides: its card has no url; put the file at .*small/t.csv"):
        fetch_companion(card, "guides", tmp_path)
    (tmp_path/"small").mkdir()
    library().to_csv(tmp_path/"small/t.csv")
    with pytest.raises(DownloadError, match="is not sha256:0000"): fetch_companion(card, "guides", tmp_path)


def test_addresses_and_names_on_the_cards():
    for name in ("replogle_k562_essential", "replogle_rpe1_essential"):
        guides = read_card(name).companions["guides"]
        assert guides.url.endswith("S0092867422005979-mmc1.xlsx") and guides.sheet.startswith("Tab")
    for name in ("norman", "adamson", "dixit", "replogle_k562_essential", "replogle_rpe1_essential"):
        assert read_card(name).companions["proteins"].url.startswith("https://rest.uniprot.org/")
        for companion in read_card(name).companions.values():
            assert companion.evidence != "unverified" and companion.licence != "not stated"
    with pytest.raises(ValueError, match="companions.proteinz"):
        small_card(companions=dict(proteinz=dict(file="x")))
    with pytest.raises(ValueError, match="pattern"): Companion(file="../x.csv")


# --- all of it by name
# ------------------------------------------------------------------------------------------------

def test_a_screen_comes_with_its_companions_and_tables_of_ones_own_take_their_place(place):
    first, second = library().to_csv(index=False), uniprot().to_csv(index=False, sep="\t")
    with Server(first.encode(), ["ok"]) as guides, Server(second.encode(), ["ok"]) as proteins:
        named = Companion(file="p.tsv", url=proteins.url, **UNIPROT)
        card = small_card(companions=guides_at(guides.url) | dict(proteins=named))
        adata = quiet(load_screen, card, folder=place, progress=False)
        own = dict(guides=library(["C", "A", "A", "B", "B", "B", "non-targeting"]),
                   proteins=pd.DataFrame(dict(gene=list("ABC"), sequence="MKV")))
        other = quiet(load_screen, card, **own, folder=place, offline=True)
        assert (guides.requests, proteins.requests) == (1, 1)
    assert set(adata.uns["protein_sequences"]) == {"B", "C"
                                                   } and "guide_seq_f" in adata.obs  # A only by a synonym
    assert other.uns["protein_sequences"] == dict.fromkeys("ABC", "MKV")
    assert set(other.obs.loc[other.obs["condition"] == "C+ctrl", "guide_seq_a"]) == {DNA[0]}
    raw_file(place/"raw.h5ad", cells())
    paired = quiet(load_screen, card, guides_from=place/"raw.h5ad", folder=place, offline=True)
    assert "guide_seq_c" not in paired.obs and paired.obs["perturbation"].nunique() == 6


def test_what_a_missing_companion_means_is_the_callers_choice(place):
    message = r"small, guides: the server answered HTTP 404.*the file as .*g.csv.*-p features kmer.*-p relations FILE"
    with Server(b"", [404]) as server:
        card = small_card(companions=guides_at(server.url))
        with pytest.raises(DownloadError, match=message): load_screen(card, folder=place, progress=False)
        with pytest.warns(UserWarning, match="HTTP 404.*; the guides are left out"):
            adata = load_screen(card, companions="warn", folder=place, progress=False)
        assert "guide_seq_a" not in adata.obs and server.requests == 2
        assert load_screen(card, companions="skip", folder=place).obs.equals(adata.obs) and server.requests == 2


# --- 6 features
# -------------------------------------------------------------------------------------------------------

CARD = """name = "small"
title = "small"
[columns]
cell_type = "cell_type"
mode = "crispri"
[companions.guides]
file = "g.csv"
guide = ["sgID_A", "sgID_B"]
gene = "gene"
sequence = ["targeting sequence A", "targeting sequence B"]
[companions.proteins]
file = "p.tsv"
gene = "Gene Names (primary)"
sequence = ["Sequence"]
"""
OF_FIVE = ["A", "B", "B", "C", "D", "E", "non-targeting"]    # genes of a library for the five targets


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "Folders of cards and downloads of this test, with a card `small` whose companions cannot be had."
    for name in ("cards", "raw", "processed"): monkeypatch.setattr(PATHS, name, tmp_path/name)
    (tmp_path/"cards").mkdir()
    (tmp_path/"cards/small.toml").write_text(CARD)
    (tmp_path/"raw/small").mkdir(parents=True)
    cells(["ctrl"]*3 + [f"{g}+ctrl" for g in "ABCDE"]).write_h5ad(tmp_path/"raw/small/small.h5ad")
    return tmp_path


def of_small(**more): return DataConfig(dataset="small", split="custom", **more)


def data_of(config, folder):
    "Cells as an experiment reads them, and a split."
    parts = dict(train=["A+ctrl", "B+ctrl"], val=["C+ctrl"], test=["D+ctrl", "E+ctrl"])
    split = make_split(load_dataset(ad.read_h5ad(PATHS.raw/"small/small.h5ad")), "custom", held_out=parts)
    return load_data(config, split, folder/"runs")[0], split


def test_released_features_ask_for_companions_before_the_cells_are_read(elsewhere, monkeypatch):
    monkeypatch.setattr(companions, "load_dataset", lambda *a, **k: pytest.fail("the cells were read first"))
    message = "small, guides: its card has no url; put the file at .*g.csv. .*-p features kmer.*-p relations FILE"
    with pytest.raises(DownloadError, match=message): load_data(of_small(features="pretrained"), runs=elsewhere)


def test_kmers_take_what_there_is_and_say_what_there_is_not(elsewhere):
    message = "features: the data hold neither .*-p features kmer.*-p guides TABLE.*-p relations FILE"
    found = warned(lambda: data_of(of_small(), elsewhere))
    texts = [str(w.message) for w in found if "left out" in str(w.message)]
    assert len(
        texts) == 2 and "g.csv; the guides are left out" in texts[0] and "p.tsv; the proteins" in texts[1]
    adata, split = quiet(data_of, of_small(), elsewhere)
    with pytest.raises(ValueError, match=message): describe_actions(adata, split)
    library(OF_FIVE).to_csv(elsewhere/"own.csv", index=False)
    adata, split = quiet(data_of, of_small(guides=str(elsewhere/"own.csv")), elsewhere)
    assert [b.modality for b in describe_actions(adata, split).banks] == [Modality.DNA]


def test_relations_need_no_sequences_and_fetch_none(elsewhere, monkeypatch):
    monkeypatch.setattr(companions, "fetch_file", lambda *a, **k: pytest.fail("a companion was asked for"))
    names = [*"ABCDE", *(f"x{i}" for i in range(400))]
    edges = pd.DataFrame([(a, b) for i, a in enumerate(names) for b in names[i + 1:i + 4]], columns=["a", "b"])
    edges.to_csv(elsewhere/"edges.csv", index=False)
    config = preset("paper").data.changed(dataset="small", split="custom", relations=str(elsewhere/"edges.csv"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adata, split = data_of(config, elsewhere)
        described = describe_actions(adata, split, data=config)
    assert config.features == "pretrained" and described.widths == dict(protein=128)
    assert described.actions.present.any(1).sum() == 5


def test_missing_weights_say_where_they_belong_and_what_would_do_instead(elsewhere, monkeypatch):
    def no_network(source): raise OSError("no network")
    monkeypatch.setattr(pretrained, "_download", no_network)
    library(OF_FIVE).to_csv(elsewhere/"raw/small/g.csv", index=False)
    uniprot([*"ABCDEF"]).to_csv(elsewhere/"raw/small/p.tsv", index=False, sep="\t")
    config = of_small(features="pretrained", pooling="tokens")
    adata, split = data_of(config, elsewhere)
    models = elsewhere/"raw/models"
    message = rf"esm2_t6_8M_UR50D.pt.*to {models}/esm2_t6_8M_UR50D.pt.*-p features kmer.*-p relations FILE"
    with pytest.raises(MissingWeightsError, match=message): describe_actions(adata, split, data=config)
    models.mkdir()
    write_random_esm2(elsewhere, layers=1)[1].rename(models/"esm2_t6_8M_UR50D")  # the other format is as good
    with pytest.raises(MissingWeightsError, match=r"NTv3_650M_pre.*gated.*-p features kmer"):
        describe_actions(adata, split, data=config)
    tokens, residues = (pretrained_features(adata.uns["protein_sequences"],
                                            Modality.PROTEIN,
                                            pooling,
                                            cache=False,
                                            progress=False) for pooling in ("tokens", "residues"))
    assert tokens.provenance["featurizer"] == "esm2_hf" and "start and end included" in tokens.provenance[
        "pooling"]
    assert tokens.width == 320 and np.abs(tokens.values - residues.values).max() > 1e-2


def test_notebooks_and_the_command_line_reach_all_of_it():
    given = dict(guides="g.csv", proteins="p.csv", guides_from="raw.h5ad", features="kmer")
    experiment = named_experiment("paper", **given)
    assert experiment.data.model_dump(include=set(given)) == given and experiment.data.pooling == "tokens"
    parse = lambda text: experiment_of(parser().parse_args(text.split()))
    text = "--preset paper --guides g.csv --proteins p.csv --guides-from raw.h5ad --features kmer"
    assert parse(text).data == experiment.data
    assert parse("--preset paper").data.features == "pretrained"
    assert parse("--features pretrained").data.features == "pretrained"
    assert parse("--features bank.safetensors") == preset("laptop")
    assert (preset("laptop").data.features, preset("laptop").data.pooling) == ("kmer", "residues")


def test_the_environment_moves_cards_and_downloads_for_a_process_of_its_own(elsewhere):
    code = ("from biojepa.data.companions import load_screen\n"
            "adata = load_screen('small', companions='skip', offline=True)\n"
            "print(adata.n_obs, adata.uns['biojepa']['source'])")
    moved = {f"BIOJEPA_{name.upper()}": str(elsewhere/name) for name in ("cards", "raw")}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code],
                          capture_output=True,
                          text=True,
                          cwd=elsewhere,
                          env={**os.environ, **moved, "PYTHONPATH": str(PATHS.root)},
                          timeout=300)
    assert done.stdout.split() == ["24", "small"], done.stderr[-2000:]
