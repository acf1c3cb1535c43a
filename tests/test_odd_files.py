"""Files that nobody here prepared: each is read for what it is, or refused by a message that says what was found.

1. What X holds is a hypothesis that every cell is asked about (`STATES`): the right answer for 17 transformations of
   one screen, whether all genes are there or some.
2. Indices that a narrower type would turn into other genes are refused.
3. Labels that name no perturbation are never targets; controls, identifiers and collections are recognised
   (`LABELS`).
4. A file is asked how large it is, and whether all of it is there, before anything is allocated (`HOSTILE`).
5. Tables of relations, guides, proteins and actions, and records of downloads, name file, field and cure (`TABLES`);
   so do feature banks (`BANKS`) and saved splits (`SPLITS`).
6. Together that is the table of what was tried: each row says what happened before, and its test what happens now."""
import gzip
import json
import tracemalloc
import warnings
import zipfile

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from safetensors.numpy import save_file

from biojepa.actions.banks import FeatureBank
from biojepa.actions.vocabulary import ActionTable
from biojepa.config import Columns, parse_settings, preset, with_settings
from biojepa.data import datasets
from biojepa.data.companions import join_proteins, read_edges, read_guides, read_proteins, read_table
from biojepa.data.conditions import SchemaError
from biojepa.data.datasets import _free_memory, load_dataset
from biojepa.data.download import Download, DownloadError, fetch_file
from biojepa.data.matrix import row_blocks
from biojepa.data.splits import Split, make_split
from biojepa.data.values import lacking_counts, steps_of


def load(source, **names):
    "Load without the warnings a test does not look at."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_dataset(source, **names)


# --- what X holds
# -----------------------------------------------------------------------------------------------------

def molecules(n=300, genes=120, seed=0):
    "Counts of cells that differ in depth and in everything else, as they come from a sequencer."
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(0.3, 1.6, genes)*rng.lognormal(0, 0.3, (n, 1))
    return rng.poisson(mean*rng.gamma(3, 1/3, mean.shape)).astype(float)


COUNTS = molecules()


def scaled(x=COUNTS, to=1e4): return to*x/x.sum(1, keepdims=True)


def half_logged(share):
    "A share of the cells holds counts, none of 15 or more."
    x, n = np.log1p(scaled()), int(share*len(COUNTS))
    x[:n] = COUNTS[:n]
    return x[:, COUNTS.max(0) < 15]


def corrected(seed=0):
    "Counts from which a share of ambient RNA was taken."
    rng = np.random.default_rng(seed)
    return np.maximum(COUNTS - rng.uniform(0, 0.4, COUNTS.shape), 0)


def standardised():
    x = np.log1p(scaled())
    return np.clip((x - x.mean(0))/x.std(0), 0, 10)


def smoothed():
    "Each cell the mean of itself and four neighbours, as imputation makes it."
    x = np.log1p(scaled())
    return np.mean([np.roll(x, k, axis=0) for k in range(5)], axis=0)


def released_twice():
    x = np.log1p(scaled())
    return np.log1p(scaled(x))


def two_scales():
    x = np.log1p(scaled())
    x[::2] = np.log1p(scaled(to=3e4))[::2]
    return x


STATES = {  # what: (values, before, answer now: "counts", "log1p", or a part of the message)
    "counts": (COUNTS, "counts", "counts"),
    "counts, thinned to a tenth": (np.random.default_rng(1).binomial(COUNTS.astype(int), 0.1), "counts", "counts"),
    "counts of reads, not molecules": (COUNTS*np.random.default_rng(1).integers(20, 90, COUNTS.shape),
                                       "counts", "counts"),
    "log1p of CP10K": (np.log1p(scaled()), "log1p", "log1p"),
    "log1p of the median depth": (np.log1p(scaled(to=np.median(COUNTS.sum(1)))), "log1p", "log1p"),
    "log1p of counts": (np.log1p(COUNTS), "log1p", "log1p"),
    "log1p of corrected counts, scaled": (np.log1p(scaled(corrected())), "log1p", "log1p"),
    "log1p of CPM": (np.log1p(scaled(to=1e6)), "log1p", r"scaled to 1e\+06 a cell.*CPM.*values='log1p'"),
    "fractions of the total": (scaled(to=1), "log1p", "scaled, not logged.*adds up to 1;"),
    "CP10K, not logged, small": (scaled(to=20), "log1p", "scaled, not logged.*adds up to 20;"),
    "square roots": (np.sqrt(scaled(to=500)), "log1p", "they are square roots"),
    "log1p taken twice": (np.log1p(np.log1p(scaled())), "log1p", "they are log1p taken twice"),
    "log1p_twice of the released code": (released_twice(), "log1p", "imputed or transformed again"),
    "log2(1 + CP10K)": (np.log2(1 + scaled()), "log1p", r"they are log2\(1 \+ x\)"),
    "log10(1 + CP10K)": (np.log10(1 + scaled()), "log1p", r"they are log10\(1 \+ x\)"),
    "half of the cells logged": (half_logged(0.5), "log1p", "150 cells hold whole numbers, the first is 'c0'"),
    "one cell in fifty not logged": (half_logged(0.02), "log1p", "6 cells hold whole numbers"),
    "cells scaled to two sums": (two_scales(), "log1p", "to something else in the others"),
    "standardised and clipped": (standardised(), "log1p", "were counts corrected, or values scaled"),
    "imputed": (smoothed(), "log1p", "imputed.*say values='log1p'"),
    "corrected counts, small": (corrected()[:, COUNTS.max(0) < 12], "log1p", "were counts corrected"),
    "rounded logarithms": (np.rint(np.log1p(scaled())), "counts", "counts had at least.*say values='counts'"),
    "scaled and rounded": (np.rint(scaled()), "counts", r"occurs again and again \(scaled and rounded"),
    "on or off": (COUNTS > 0, "counts", "only 0 and 1: was it made binary"),
    "capped at 2": (np.minimum(COUNTS, 2), "counts", "0 values of 3 where counts had at least"),
}


def cells(values, **obs):
    "A screen with these values, in canonical spelling."
    n, genes = values.shape
    table = pd.DataFrame({"condition": np.resize(["ctrl", "g1+ctrl", "g2+ctrl"], n), **obs},
                         index=[f"c{i}" for i in range(n)])
    names = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    return ad.AnnData(sp.csr_matrix(values, dtype="float32"), table, names)


@pytest.mark.parametrize("what", STATES)
def test_what_x_holds_is_found_or_asked(what):
    values, _, answer = STATES[what]
    if answer in ("counts", "log1p"):
        assert load(cells(values)).uns["biojepa"]["expression_space"] == answer
        assert load(cells(values), values=answer).uns["biojepa"]["expression_space"] == answer
        other = {"counts": "log1p", "log1p": "counts"}[answer]
        with pytest.raises(SchemaError, match=f"values='{other}', but X holds {answer}"):
            load(cells(values), values=other)
    else:
        with pytest.raises(SchemaError, match=rf"(?s)AnnData: X holds .*{answer}.*") as error:
            load(cells(values))
        assert "layer=" in str(error.value)


@pytest.mark.parametrize("what", [w for w in STATES if w != "corrected counts, small"])
def test_a_subset_of_the_genes_changes_no_answer_but_that_of_the_sums(what):
    "Variable genes only, as GEARS and others pack it: the sum of a cell is gone, its unit is not."
    values, _, answer = STATES[what]
    try: found = load(cells(values[:, ::3])).uns["biojepa"]["expression_space"]
    except SchemaError: found = "refused"
    if what in ("log1p of corrected counts, scaled", "log1p of CPM"): assert found == "refused"
    elif what == "cells scaled to two sums": assert found == "log1p"    # the unit alone cannot tell
    elif what == "capped at 2": assert found in ("refused", "counts")   # too few values to tell
    else: assert (found == answer) or (found == "refused" and answer not in ("counts", "log1p"))


@pytest.mark.parametrize("what", ["imputed", "log1p of CPM", "standardised and clipped"])
def test_what_cannot_be_told_is_what_the_caller_says(what):
    got = load(cells(STATES[what][0]), values="log1p")
    assert got.uns["biojepa"]["expression_space"] == "log1p"
    assert any("as declared (by its own word" in line for line in got.uns["biojepa"]["history"])
    with pytest.raises(SchemaError, match="values='counts', but X holds fractions"):
        load(cells(STATES[what][0]), values="counts")


@pytest.mark.parametrize("what", ["square roots", "log1p taken twice", "half of the cells logged",
                                  "fractions of the total"])
def test_what_is_known_to_be_something_else_stays_refused(what):
    with pytest.raises(SchemaError, match="values='log1p', but X holds fractions"):
        load(cells(STATES[what][0]), values="log1p")


def test_total_counts_beside_a_subset_give_the_scale_away():
    values = np.log1p(scaled(to=1e6))[:, ::9]
    with pytest.raises(SchemaError, match=r"scaled to 1e\+06 a cell"):
        load(cells(values, total=COUNTS.sum(1)), library_size="total")
    history = load(cells(np.log1p(scaled())[:, ::2], total=COUNTS.sum(1)),
                   library_size="total").uns["biojepa"]["history"]
    assert any("a cell was scaled to 10,000" in line for line in history)


def test_steps_are_those_of_a_loop_over_cells():
    x = sp.csr_matrix(np.log1p(scaled()), dtype="float32")
    x = sp.vstack([x[:4], sp.csr_matrix((2, x.shape[1])),
                   x[4:40]]).tocsr().astype("float32")  # two empty cells
    found, k = steps_of(x, np.expm1), 0
    for row in x.toarray():
        if not (row > 0).any(): continue
        turned = np.expm1(row[row > 0].astype(float))
        ratio = turned/turned.min()
        judged = ratio[(ratio > 1.05) & (ratio < 20.5)]
        even = {m: (abs(m*judged - np.rint(m*judged)) < 0.05).sum() for m in (1, 2, 3, 4)}
        best = 1 if even[1] >= 0.9*len(judged) else max(even, key=even.get)
        assert found.judged[k] == len(judged) and found.even[k] >= even[1]
        np.testing.assert_allclose([found.unit[k], found.total[k]], [turned.min()/best, turned.sum()])
        k += 1
    assert k == len(found.unit) == 40


@pytest.mark.parametrize("draw", ["poisson", "negative binomial", "zero-inflated", "mixture of lines"])
def test_no_mixture_of_poisson_distributions_lacks_a_number(draw):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mean = rng.gamma(0.7, 2, (500, 40))
        x = dict(poisson=rng.poisson(2., mean.shape), zero=0).get(draw, rng.poisson(mean))
        if draw == "zero-inflated": x = x*(rng.random(x.shape) < 0.3)
        if draw == "mixture of lines":
            x = rng.poisson(np.where(np.arange(500)[:, None] < 250, 0.3, 6.), x.shape)
        assert lacking_counts(sp.csr_matrix(x, dtype="float32")) == (0, 0., 0)


@pytest.mark.parametrize("entries", [1, 7, 100, 10**6])
def test_blocks_walk_over_every_value_once(entries):
    x = sp.csr_matrix(COUNTS[:30])
    seen = [(rows.start + r, v) for rows, at, row in row_blocks(x, entries) for r, v in zip(row, x.data[at])]
    assert seen == [(i, v) for i in range(30) for v in COUNTS[i][COUNTS[i] > 0]]


# --- indices
# ----------------------------------------------------------------------------------------------------------

INDICES = {  # what: (part, change, before, message)
    "beyond 32 bits": ("indices", lambda v: np.r_[v[:-1].astype("int64"), 2**32], "gene 0",
                       "found 0 to 4294967296"), "fractions":
    ("indices", lambda v: v + 0.4, "truncated", "found float64 numbers, where whole ones belong"),
    "negative": ("indices", lambda v: np.r_[v[:-1], -1], "refused", "found -1 to"), "too large by one":
    ("indices", lambda v: np.r_[v[:-1], 6], "refused", "found 0 to 6, of places 0 to 5"),
    "negative in 64 unsigned bits": ("indices", lambda v: np.r_[v[:-1], -1].astype("uint64"), "refused",
                                     "found 0 to 18"), "lengths that are fractions":
    ("indptr", lambda v: v + 0.5, "truncated",
     "indptr of X: found float64 numbers"), "lengths that turn back, unsigned":
    ("indptr", lambda v: np.r_[v[:5], v[6], v[5], v[7:]].astype("uint64"), "crash or another matrix",
     "contradicts its shape"), "lengths beyond 32 bits":
    ("indptr", lambda v: np.r_[v[:-1].astype("int64"), 2**32 + v[-1].astype("int64")], "refused",
     "found 0 to 4")
}


@pytest.mark.parametrize("what", INDICES)
def test_indices_are_looked_at_before_they_are_made_narrower(what, tmp_path):
    part, change, _, message = INDICES[what]
    cells(COUNTS[:30, :6]).write_h5ad(tmp_path/"x.h5ad")
    with h5py.File(tmp_path/"x.h5ad", "r+") as f:
        new = change(f[f"X/{part}"][:])
        del f[f"X/{part}"]
        f[f"X/{part}"] = new
    with pytest.raises(SchemaError, match=f"x.h5ad: .*{message}"): load(tmp_path/"x.h5ad")


def test_indices_in_memory_are_looked_at_too():
    adata = cells(COUNTS[:30, :6])
    adata.X.indices[3] = 900
    with pytest.raises(SchemaError, match="AnnData: indices of X: found 0 to 900, of places 0 to 5"):
        load(adata)


# --- labels, identifiers, collections
# ---------------------------------------------------------------------------------

def screen(labels=("ctrl", "A", "B", "A+B"), genes="ABCDEF", var=None, index=None, **obs):
    "Counts of 24 cells with these labels, dealt in turn; other columns of obs likewise."
    table = pd.DataFrame({"condition": np.resize(np.array(labels, dtype=object), 24)},
                         index=[f"c{i}" for i in range(24)])
    for name, values in obs.items(): table[name] = np.resize(np.array(values, dtype=object), 24)
    names = pd.DataFrame(var or {}, index=list(index or genes))
    return ad.AnnData(sp.csr_matrix(COUNTS[:24, -len(names):], dtype="float32"), table, names)


def of_collection(labels=("control", "A", "A_B", "B"), nperts=(0, 1, 2, 1), name="perturbation", **obs):
    "The same as a file of scPerturb or pertpy has it."
    adata = screen(labels, nperts=nperts, cell_line="K562", gemgroup=(1, 2), ncounts=9999., **obs)
    adata.obs = adata.obs.rename(columns={"condition": name})
    adata.obs = adata.obs.astype({"nperts": int, "gemgroup": int, "ncounts": float})
    return adata


def targets(adata): return sorted(set(adata.obs["condition"]))
def conditions(*wanted): return lambda adata: targets(adata) == sorted(wanted)


ENSG = [f"ENSG0000000000{i}" for i in range(6)]
VERSIONED = [f"{name}.{i + 3}" for i, name in enumerate(ENSG)]
ONE = ("A+ctrl", "B+ctrl", "ctrl")
PAIR = ("A+B", *ONE)

LABELS = {  # what: (file, names given, before, now: a part of the message, or what holds of the result)
    "unassigned cells": (screen(["ctrl", "A", "B", "unassigned"]), {}, "a target",
                         r"'unassigned' \(6 cells\) name no single .*drop=\['unassigned'\], or .*keep="),
    "in other letters": (screen(["ctrl", "A", "Multiplet", "DOUBLET"]), {}, "two targets",
                         r"'Multiplet' \(6 cells\), 'DOUBLET' \(6 cells\).*drop=\['doublet', 'multiplet'\]"),
    "ambiguous": (screen(["ctrl", "A", "B", "ambiguous"]), {}, "a target", "'ambiguous'"),
    "negative": (screen(["ctrl", "A", "B", "negative"]), {}, "a target", "'negative'"),
    "None as text": (screen(["ctrl", "A", "B", "None"]), {}, "a target", "'None'"),
    "nan as text": (screen(["ctrl", "A", "B", "nan"]), {}, "an error without a cure", r"drop=\['nan'\]"),
    "no label": (screen(["ctrl", "A", "B", np.nan]), {}, "an error without a cure", r"6 cells without a "
                                                                                    r"label.*drop="),
    "an empty label": (screen(["ctrl", "A", "B", " "]), {}, "an error without a cure", r"6 cells "
                                                                                       r"without a label"),
    "a target beside multi": (screen(["ctrl", "A", "B", "A+multi"]), {}, "a pair", r"'A\+multi'.*drop=\['multi'\]"),
    "dropped by name": (screen(["ctrl", "A", "B", "unassigned"]), dict(drop="unassigned"), "read",
                        lambda a: a.n_obs == 18 and conditions(*ONE)(a)),
    "dropped in other letters": (screen(["ctrl", "A", "B", "Unassigned"]), dict(drop="unassigned"), "an error",
                                 lambda a: a.n_obs == 18 and conditions(*ONE)(a)),
    "one of two dropped": (screen(["ctrl", "A", "multi", "doublet"]), dict(drop="multi"), "a target", "'doublet'"),
    "cells without a label dropped": (screen(["ctrl", "A", "B", None]), dict(drop="nan"), "an error",
                                      lambda a: a.n_obs == 18 and conditions(*ONE)(a)),
    "kept by name": (screen(["ctrl", "A", "B", "negative"]), dict(keep="negative"), "an error",
                     conditions(*ONE, "negative+ctrl")),
    "controls called negative": (screen(["negative", "A", "B"]), dict(control="negative"), "read", conditions(*ONE)),
    "controls under two labels": (screen(["NT", "safe", "A", "B"]), dict(control=("NT", "safe")), "not "
                                                                                                  "possible",
                                  lambda a: (a.obs["condition"] == "ctrl").sum() == 12 and conditions(*ONE)(a)),
    "a control beside a target, two labels": (screen(["NT", "safe", "A+NT", "safe+B"]), dict(control=("NT", "safe")),
                                              "no way", conditions(*ONE)),
    "one label of controls that is not there": (screen(["NT", "A", "B"]), dict(control=("NT", "safe")), "not "
                                                                                                        "possible",
                                                "no label 'safe' in column 'condition'"),
    "a gene called NA": (screen(["ctrl", "A", "NA"], index=["NA", *"ABCDE"]), {}, "read",
                         conditions("A+ctrl", "NA+ctrl", "ctrl")),
    "another separator": (screen(["ctrl", "A", "B", "A;B"]), dict(separator=";"), "a target A;B", conditions(*PAIR)),
    "identifiers, symbols beside them": (screen(index=ENSG, var=dict(symbol=list("ABCDEF"))), {}, "a warning",
                                         "2 are in the column 'symbol' of var: say gene_name='symbol'"),
    "symbols, identifiers asked for": (screen(var=dict(gene_id=ENSG)), dict(gene_name="gene_id"), "a warning",
                                       "but in the index of var: say nothing of gene_name"),
    "identifiers without symbols": (screen(index=ENSG, var=dict(chromosome=list("112233"))), {}, "a warning",
                                    "which are Ensembl identifiers, such as .*gene_name=.*chromosome"),
    "identifiers, and that is wanted": (screen(index=ENSG), dict(unknown_targets="allow"), "read", conditions(*PAIR)),
    "versions in the file": (screen(["ctrl", *ENSG[:2]], index=VERSIONED), {}, "a warning", "gene_versions='strip'"),
    "versions taken off": (screen(["ctrl", *VERSIONED[:2]], index=VERSIONED), dict(gene_versions="strip"), "no way",
                           lambda a: targets(a)[0] == f"{ENSG[0]}+ctrl" and list(a.var_names) == ENSG),
    "two versions of one gene": (screen(["ctrl", ENSG[0]], index=[f"{ENSG[0]}.1", *VERSIONED[:5]]),
                                 dict(gene_versions="strip"), "no way", "1 gene names occur again"),
    "a file of scPerturb, nothing said": (of_collection(), {}, "all cells controls", "say columns='scperturb'"),
    "a file of pertpy, nothing said": (of_collection(name="perturbation_name"), {}, "all cells controls",
                                       "say columns='pertpy'"),
    "a file of scPerturb": (of_collection(), dict(columns="scperturb"), "no way",
                            lambda a: conditions(*PAIR)(a) and set(a.obs["batch"]) == {"1", "2"}
                            and set(a.obs["cell_type"]) == {"K562"} and set(a.obs["total_counts"]) == {9999.}),
    "a file of pertpy": (of_collection(["control", "A", "A+B", "B"], name="perturbation_name"), dict(columns="pertpy"),
                         "no way", conditions(*PAIR)),
    "its controls called NT": (of_collection(["NT", "A", "B"], [0, 1, 1], name="gene_target"), dict(columns="pertpy"),
                               "no way", conditions(*ONE)),
    "its name of a gene with a dash": (of_collection(["control", "A", "HLA_A"], [0, 1, 1]), dict(columns="scperturb"),
                                       "no way", conditions("A+ctrl", "HLA_A+ctrl", "ctrl")),
    "its pairs with a control": (of_collection(["control", "A_control", "B"], [0, 1, 1]), dict(columns="scperturb"),
                                 "no way", conditions(*ONE)),
    "its pairs that do not add up": (of_collection(["control", "A", "HLA_A_B"], [0, 1, 2]), dict(columns="scperturb"),
                                     "no way", "'HLA_A_B' with nperts 2 is no list of 2 targets"),
    "its cells without a label": (of_collection(["control", "A", "B", "nan"], [0, 1, 1, 1]), dict(columns="scperturb"),
                                  "no way", r"'perturbation': 'nan' \(6 cells without a label\)"),
    "not of that collection": (screen(), dict(columns="scperturb"), "no way",
                               "columns='scperturb', but there is no column perturbation"),
    "guides by DNA alone, two a target": (screen(["ctrl", "A", "A"], dna=["", "ACGT", "TTTT"]), dict(guide_seq="dna"),
                                          "an error two stages later",
                                          lambda a: {"A+ctrl|ACGT", "A+ctrl|TTTT"} < set(a.obs["perturbation"])),
    "guides by DNA alone, one a target": (screen(["ctrl", "A", "B"], dna=["", "ACGT", "TTTT"]), dict(guide_seq="dna"),
                                          "read", lambda a: set(a.obs["perturbation"]) == set(ONE)),
}


@pytest.mark.parametrize("what", LABELS)
def test_labels_are_targets_only_if_they_name_one(what, tmp_path):
    adata, names, _, answer = LABELS[what]
    adata.obs = adata.obs.infer_objects()
    adata.write_h5ad(tmp_path/"lab.h5ad")
    for source, where in ((adata, "AnnData"), (tmp_path/"lab.h5ad", "lab.h5ad")):
        if not callable(answer):
            with pytest.raises(SchemaError, match=f"{where}: .*{answer}"): load(source, **names)
        else: assert answer(load(source, **names)), targets(load(source, **names))


# --- files that want more than they give
# -----------------------------------------------------------------------------

def replaced(name, make):
    "Put something else in the place of a part of a file."
    def change(f, folder):
        del f[name]
        make(f, folder)
    return change


def elsewhere(name):
    "A link to a part of another file, which exists."
    def make(f, folder):
        screen().write_h5ad(folder/"other.h5ad")
        f[name] = h5py.ExternalLink("other.h5ad", name)
    return replaced(name, make)


def raw_bytes(f, folder):
    (folder/"secret").write_bytes(bytes(24*6*4))
    f.create_dataset("X", (24, 6), "float32", external=[(str(folder/"secret"), 0, h5py.h5f.UNLIMITED)])


def view_of_another(f, folder):
    screen().write_h5ad(folder/"other.h5ad")
    layout = h5py.VirtualLayout((24, 6), "float32")
    layout[:] = h5py.VirtualSource(str(folder/"other.h5ad"), "X/data", (144,))[:144]
    f.create_virtual_dataset("X", layout)


def declared(name, shape, dtype="float32"):
    "A part that says it is large and stores nothing."
    chunks = tuple(min(n, 1000) for n in shape)
    return replaced(name, lambda f, folder: f.create_dataset(name, shape, dtype, chunks=chunks))


HOSTILE = {     # what: (what is done to the file, before, now)
    "a dense X of 2.4 TB": (declared("X", (600, 10**9)), "4.3 GB, then killed", "/X declares 600 × 1000000000 "
                                                                                "float32.*stores 0"),
    "a dense X of many rows": (declared("X", (10**9, 600)), "does not end", "/X declares 1000000000 × 600"),
    "values of a sparse X": (declared("X/data", (10**11,)), "400 GB asked for", "/X/data declares "
                                                                                "100000000000"),
    "its lengths": (declared("X/indptr", (10**10,), "int64"), "80 GB asked for", "/X/indptr declares "
                                                                                 "10000000000"),
    "a column of obs": (declared("obs/_index", (10**10,), "S8"), "80 GB asked for", "/obs/_index declares"),
    "a layer nobody asked for": (lambda f, folder: f.create_dataset("layers/x", (10**5, 10**5), "f4", chunks=(9, 9)),
                                 "read", "/layers/x declares 100000 × 100000"),
    "X in another file": (elsewhere("X"), "read from there", "/X lies outside this file, in other.h5ad"),
    "obs in another file": (elsewhere("obs"), "read from there", "/obs lies outside this file, in other.h5ad"),
    "bytes of any file as X": (replaced("X", raw_bytes), "read from there", "/X lies outside this file, in "
                                                                            "other files"),
    "a view of another file": (replaced("X", view_of_another), "read from there", "/X lies outside this file"),
    "a link deep inside uns": (lambda f, folder: f["uns"].__setitem__("a", h5py.ExternalLink("/etc/hosts", "/")),
                               "read", "/uns/a lies outside this file, in /etc/hosts"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_is_measured_before_it_is_read(what, tmp_path):
    change, _, message = HOSTILE[what]
    screen().write_h5ad(tmp_path/"lab.h5ad")
    with h5py.File(tmp_path/"lab.h5ad", "r+") as f: change(f, tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(SchemaError, match=f"lab.h5ad: .*({message})"): load(tmp_path/"lab.h5ad")
        assert tracemalloc.get_traced_memory()[1] < 5e7
    finally: tracemalloc.stop()


def test_free_memory_is_what_a_container_leaves_and_files_in_memory_do_not_count(tmp_path):
    machine = pytest.approx(_free_memory(tmp_path/"nowhere"), rel=0.3)
    assert _free_memory(tmp_path) == machine
    for name, text in {"memory.max": "5000000", "memory.current": "4000000",
                       "memory.stat": "anon 9\nfile_mapped 7\nfile 3000000\nshmem 500000\n"}.items():
        (tmp_path/name).write_text(f"{text}\n")
    assert _free_memory(tmp_path) == 5_000_000 - 4_000_000 + 3_000_000 - 500_000
    (tmp_path/"memory.max").write_text("max\n")
    assert _free_memory(tmp_path) == machine


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, lambda x: x.toarray()])
def test_what_does_not_fit_into_memory_is_said_before_it_is_read(layout, tmp_path, monkeypatch):
    adata = cells(COUNTS)
    adata.X = layout(adata.X)
    adata.write_h5ad(tmp_path/"x.h5ad")
    assert load(tmp_path/"x.h5ad").n_obs == len(COUNTS)
    monkeypatch.setattr(datasets, "_free_memory", lambda: 1e5)
    with pytest.raises(SchemaError, match=r"x.h5ad: reading X takes about 0.\d GB of memory, 0.0 GB are free"):
        load(tmp_path/"x.h5ad")


# --- tables
# -----------------------------------------------------------------------------------------------------------

def packed_zeros(path):
    with gzip.open(path, "wb") as f:
        for _ in range(101): f.write(b"a,b\n"*262_144)


def workbook_of_zeros(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("xl/sheet.xml", bytes(100_000_001))


ACTIONS = ("perturbation,condition,targets,guide_id,guide_seqs,mode,n_cells\n"
           "ctrl,ctrl,,,,control,9\nA+ctrl,A+ctrl,A,,,crispri,7\n")

TABLES = {  # what: (name, content or what writes it, reader, before, message)
    "an empty csv": ("t.csv", "", read_edges, "EmptyDataError", "t.csv: not a readable table .*EmptyDataError"),
    "a header alone": ("t.csv", "a,b\n", read_edges, "no relations, silently", "t.csv: found no row"),
    "ragged rows": ("t.csv", "a,b\nA,B\nA,B,C,D\n", read_edges, "ParserError", "t.csv: not a readable table "
                                                                               ".*line 3"),
    "bytes": ("t.csv", b"a,b\n\xff\xfe\x00,B\n", read_edges, "UnicodeDecodeError", "t.csv: not text in UTF-8"),
    "other columns": ("t.csv", "x,y\nA,B\n", read_edges, "refused", "t.csv: found columns x, y, and no a "
                                                                    "and no b"),
    "a null part": ("t.csv", "a,b\nA,B\nC,\n", read_edges, "a gene called nan",
                    "t.csv: 1 rows without a name in column 'b', the first is row 1"),
    "weights that are words": ("t.csv", "a,b,weight\nA,B,strong\n", read_edges, "ValueError without a file",
                               "t.csv: 1 rows whose weight is no number of 0 or more, the first is 'strong' "
                               "in row 0"),
    "negative weights": ("t.csv", "a,b,weight\nA,B,1\nB,C,-2\n", read_edges, "refused", "'-2' in row 1"),
    "a parquet that is none": ("t.parquet", b"PAR1 nothing PAR1", read_edges, "ArrowInvalid",
                               "t.parquet: not a readable table .*Arrow"),
    "a gz that is none": ("t.csv.gz", b"a,b\nA,B\n", read_edges, "BadGzipFile", "t.csv.gz: not a "
                                                                                "readable table"),
    "a gz cut short": ("t.csv.gz", gzip.compress(b"a,b\nA,B\n"*999)[:-30], read_edges, "EOFError", "t.csv.gz: "
                                                                                                   "not a "
                                                                                                   "readable"),
    "a gz that unpacks to a thousand times": ("t.csv.gz", packed_zeros, read_edges, "106 MB read",
                                              "t.csv.gz: .* would unpack to .*nothing was unpacked"),
    "a workbook of zeros": ("t.xlsx", workbook_of_zeros, read_edges, "100 MB read", "t.xlsx: .* would unpack "
                                                                                    "to 100,000,001"),
    "proteins without sequences": ("p.csv", "gene,sequence\nA,MK\nB,\n", read_proteins, "refused", "p.csv: 1 "
                                                                                                   "rows have no"),
    "guides without letters": ("g.csv", "guide_id,guide_seq_a\ng1,ACGT\ng2,\n", read_guides, "refused",
                               "g.csv: row 1 holds"),
    "actions, empty": ("t.csv", "", ActionTable.load, "EmptyDataError", "t.csv: not a readable action table"),
    "actions of an unknown mode": ("t.csv", ACTIONS.replace("crispri", "crisper"), ActionTable.load, "no "
                                                                                                     "file named",
                                   "t.csv: a mode or n_cells cannot be read .*'crisper'"),
    "actions of many cells": ("t.csv", ACTIONS.replace(",7", ",many"), ActionTable.load, "no file named",
                              "t.csv: a mode or n_cells cannot be read .*'many'"),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_broken_table_names_file_field_and_cure(what, tmp_path):
    name, content, read, _, message = TABLES[what]
    if callable(content): content(tmp_path/name)
    else: (tmp_path/name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=f"(?s){message}") as error: read(tmp_path/name)
    assert not isinstance(error.value, UnicodeDecodeError) and ";" in str(error.value)


def bank_with(**changes):
    "A file of two features whose header was changed; a field that is None is left out."
    def write(path):
        about = dict(schema="biojepa.FeatureBank/2", keys=["A", "B"], modality="PROTEIN", provenance={}) | changes
        text = json.dumps({k: v for k, v in about.items() if v is not None})
        save_file({"values": np.ones((2, 3), "float32")}, path, {"bank": text})
    return write


def bank_of(text, values=None):
    return lambda path: save_file({"values": np.ones((2, 3), "float32") if values is None else values}, path,
                                  {"bank": text})


BANK = dict(schema="biojepa.FeatureBank/2", keys=["A", "B"], modality="PROTEIN", provenance={})
BANKS = {   # what: (what writes it, before, message)
    "an unknown modality": (bank_with(modality="TELEPATHY"), "KeyError", "modality: found 'TELEPATHY', where one of "
                                                                         "PROTEIN, CHEMICAL, DNA belongs; make"),
    "no modality": (bank_with(modality=None), "KeyError", "modality: found None, where one of"),
    "a modality that is a list": (bank_with(modality=["DNA"]), "TypeError", r"modality: found \[.DNA.\], where one of"),
    "keys in a table": (bank_with(keys={"A": 1, "B": 2}), "read, silently", "keys: found {.A.: 1, .B.: 2}, where a"),
    "keys that are numbers": (bank_with(keys=[1, 2]), "read as text, silently", "keys: found 1 among the names, where"),
    "keys in one word": (bank_with(keys="AB"), "read as A and B, silently", "keys: found 'AB', where a list of names"),
    "no keys": (bank_with(keys=None), "KeyError", "keys: found None, where a list of names belongs"),
    "too few keys": (bank_with(keys=["A"]), "no file named", r"values: found shape \(2, 3\) for 1 keys; give"),
    "a list for provenance": (bank_with(provenance=[1]), "fails when it is shown", r"provenance: found \[1\], where a "
                                                                                   "table"),
    "a list for a header": (bank_of("[1, 2]"), "AttributeError", "its header is a list, where a table belongs; make"),
    "null for a header": (bank_of("null"), "AttributeError", "its header is a NoneType, where a table belongs; make"),
    "half a header": (bank_of('{"schema":'), "refused", "broken safetensors file .*; delete it"),
    "deep nesting": (bank_of("["*100_000), "RecursionError", "broken safetensors file .*; delete it"),
    "NaN among the values": (bank_of(json.dumps(BANK), np.float32([[1, 2], [1, np.nan]])), "no file named",
                             "values: found NaN or infinite values in B; leave"),
}


@pytest.mark.parametrize("what", BANKS)
def test_a_broken_feature_bank_names_file_field_and_cure(what, tmp_path):
    write, _, message = BANKS[what]
    write(tmp_path/"b.safetensors")
    with pytest.raises(ValueError, match=f"b.safetensors: .*{message}"): FeatureBank.load(tmp_path/"b.safetensors")


SPLITS = {  # what: (changes of a saved split or its text, before, message)
    "a null part": (dict(val=None), "TypeError", "val: found None, where a list of names belongs; make the split"),
    "a table for a part": (dict(test={"A+ctrl": 1}), "hash of something else", "test: found {'A.ctrl': 1}, where a "
                                                                               "list"),
    "a word for a part": (dict(train="A+ctrl"), "hash of something else", "train: found 'A.ctrl', where a list of"),
    "null among the names": (dict(train=["A+ctrl", None]), "hash of something else", "train: found None among the "
                                                                                     "names, where text"),
    "a list in a list": (dict(train=[["A+ctrl"]]), "TypeError", r"train: found \['A.ctrl'\] among the names"),
    "a part is missing": (dict(val=...), "refused", "is not a saved split"),
    "null": ("null", "refused", "is not a saved split"),
    "an empty file": ("", "refused", "is not JSON .*; make the split again"),
    "bytes": (b"\xff\xfe{}", "UnicodeDecodeError", "is not JSON .*; make the split again"),
    "deep nesting": ("["*100_000, "RecursionError", "is not JSON .*; make the split again"),
}


@pytest.mark.parametrize("what", SPLITS)
def test_a_broken_split_names_file_field_and_cure(what, tmp_path):
    change, _, message = SPLITS[what]
    adata = load(screen())
    path = make_split(adata, "custom", held_out=dict(train=["A+ctrl"], val=["B+ctrl"], test=["A+B"])).save(
        tmp_path/"s.json")
    if isinstance(change, dict):
        text = json.dumps({k: v for k, v in (json.loads(path.read_text()) | change).items() if v is not ...})
    else: text = change
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=f"s.json: {message}") as error: Split.load(path, adata)
    assert type(error.value) is ValueError


@pytest.mark.parametrize("lists, message", [
    (dict(train=["A+ctrl"], test=None), "held_out: test: found None, where a list of names belongs; give names of obs"),
    (dict(train="A+ctrl", test=["B+ctrl"]), "held_out: train: found 'A.ctrl', where a list of names belongs; give"),
    (dict(train=["A+ctrl"], val=None, test=["B+ctrl"]), "held_out: val: found None, where a list"),
    ("["*100_000, "mine.json: is not JSON .*; expected lists called train, val and test")])
def test_lists_of_ones_own_are_lists_of_names(lists, message, tmp_path):
    (tmp_path/"mine.json").write_text(lists if isinstance(lists, str) else json.dumps(lists))
    with pytest.raises(ValueError, match=message): make_split(load(screen()), "custom", held_out=tmp_path/"mine.json")


@pytest.mark.parametrize("given, found", [([("A", "B")], "list"), ({"a": ["A"]}, "dict"), (None, "NoneType")])
def test_what_is_no_table_is_said(given, found):
    with pytest.raises(ValueError, match=f"table: found a {found}; give a table with named columns"):
        read_edges(given)


def test_na_is_a_gene_in_a_table_and_no_number_in_a_column_of_numbers(tmp_path):
    (tmp_path/"t.csv").write_text("a,b,weight\nNA,TP53,1\nNULL,NA,0.5\n")
    assert read_edges(tmp_path/"t.csv").values.tolist() == [["NA", "TP53", 1.], ["NULL", "NA", .5]]
    (tmp_path/"n.tsv").write_text("gene\tscore\nNA\t1.5\nTP53\tNA\n")
    table = read_table(tmp_path/"n.tsv")
    assert table["gene"].tolist() == ["NA", "TP53"] and table["score"].isna().tolist() == [False, True]
    (tmp_path/"p.csv").write_text("gene,sequence\nNA,MK\nA,MKK\n")
    adata = join_proteins(load(screen(["ctrl", "A", "NA"], index=["NA", *"ABCDE"])),
                          read_proteins(tmp_path/"p.csv"))
    assert adata.uns["protein_sequences"] == {"A": "MKK", "NA": "MK"}


@pytest.mark.parametrize("record", ["[1, 2]", "null", "{", "["*100_000])
def test_a_record_of_a_download_that_is_none_is_named(record, tmp_path):
    (tmp_path/"t.csv").write_text("a,b\n")
    (tmp_path/"t.csv.record.json").write_text(record)
    with pytest.raises(DownloadError, match="t.csv.record.json: not the record of a download"):
        fetch_file(Download(name="t"), tmp_path/"t.csv", offline=True)


def test_a_collection_is_a_name_in_a_configuration_too():
    short = with_settings(preset("smoke"), parse_settings("data.columns=scperturb"))
    config = with_settings(preset("smoke"),
                           parse_settings("data.columns.like=scperturb data.columns.batch=gemgroup"))
    assert short.data.columns == Columns(like="scperturb")
    assert config.data.columns == Columns(like="scperturb", batch="gemgroup")
    own = load(of_collection(lane=["x"]), columns=config.data.columns.changed(batch="lane"))
    assert set(own.obs["batch"]) == {"x"} and any(
        "columns like scperturb: condition='perturbation'" in line for line in own.uns["biojepa"]["history"])


def test_guides_named_by_their_dna_make_actions():
    adata = load(screen(["ctrl", "A", "A", "B"], dna=["", "ACGT", "TTTT", "CCCC"]), guide_seq="dna")
    table = ActionTable.from_anndata(adata)
    assert dict(zip(table.perturbation, table.guide_seqs)) == {
        "ctrl": (), "A+ctrl|ACGT": ("ACGT",), "A+ctrl|TTTT": ("TTTT",), "B+ctrl|CCCC": ("CCCC",)}


# --- the table of what was tried
# ------------------------------------------------------------------------------------------------------

def tried():
    "Every odd input of this file: what, before, now."
    says = lambda answer: "read as what it is" if callable(answer) or answer in ("counts", "log1p") else answer
    of = dict(values=STATES, indices=INDICES, labels=LABELS, hostile=HOSTILE, tables=TABLES, banks=BANKS, splits=SPLITS)
    table = [(kind, what, row[-2], says(row[-1])) for kind, rows in of.items() for what, row in rows.items()]
    return pd.DataFrame(table, columns=["kind", "what", "before", "now"])


def test_more_than_a_hundred_odd_inputs_were_tried_and_each_says_what_comes_of_it():
    table = tried()
    assert len(table) >= 120 and not table.duplicated(["kind", "what"]).any()
    assert table["before"].str.len().gt(0).all() and table["now"].str.len().gt(3).all()
    refused = table[table["now"] != "read as what it is"]
    assert len(refused) >= 90 and refused.groupby("kind").size().ge(8).all()
