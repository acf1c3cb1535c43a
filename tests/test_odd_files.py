"""Files that nobody here prepared: each is read for what it is, or refused by a message that says what was found.

1. What X holds is a hypothesis that every cell is asked about (`STATES`): the right answer for 17 transformations of
   one screen, whether all genes are there or some.
2. Indices that a narrower type would turn into other genes are refused."""
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from biojepa.data.conditions import SchemaError
from biojepa.data.datasets import load_dataset
from biojepa.data.matrix import lacking_counts, row_blocks, steps_of


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
    x = np.log1p(scaled())
    x[:int(share*len(x))] = COUNTS[:int(share*len(x))]
    return x


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
