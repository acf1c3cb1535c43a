"Spectral embedding against a dense eigendecomposition; edges in every format, good and bad."
import numpy as np
import pandas as pd
import pytest

from biojepa.actions.banks import MissingFeatureError
from biojepa.actions.featurizers import featurize
from biojepa.actions.gene_tables import spectral_embedding
from biojepa.actions.vocabulary import Modality


def random_graph(n=40, p=0.15, seed=0, weights=True):
    rng = np.random.default_rng(seed)
    i, j = np.triu_indices(n, 1)
    kept = rng.random(len(i)) < p
    kept |= j == i + 1                                             # a path keeps it connected
    table = pd.DataFrame({"a": [f"g{x:03d}" for x in i[kept]], "b": [f"g{x:03d}" for x in j[kept]]})
    if weights: table["weight"] = rng.uniform(0.5, 2, len(table))
    return table


def dense(edges, names, width):
    A = pd.DataFrame(0., names, names)
    for a, b, *w in edges.itertuples(index=False):
        A.loc[a, b] += w[0] if w else 1; A.loc[b, a] += w[0] if w else 1
    degree = A.to_numpy().sum(1)
    value, vector = np.linalg.eigh(A.to_numpy()/np.sqrt(np.outer(degree, degree)))
    vector = vector[:, ::-1][:, :width]
    for c in range(width):
        if vector[np.abs(vector[:, c]).argmax(), c] < 0: vector[:, c] *= -1
    return vector/np.sqrt((vector**2).sum(1, keepdims=True)), value[::-1][:width]


@pytest.mark.parametrize("weights", [True, False])
def test_against_a_dense_eigendecomposition(weights):
    edges = random_graph(weights=weights)
    bank = spectral_embedding(edges, width=8)
    expected, values = dense(edges, list(bank.keys), 8)
    assert np.diff(values).max() < -1e-4  # simple eigenvalues: the vectors are unique up to sign
    np.testing.assert_allclose(bank.values, expected, atol=1e-5)
    assert bank.provenance["smallest_eigenvalue"] == pytest.approx(
        values[-1], abs=1e-5) and bank.modality is Modality.PROTEIN


def test_the_order_of_the_edges_does_not_matter():
    edges = random_graph()
    shuffled = edges.sample(frac=1, random_state=1)
    shuffled = pd.concat([shuffled[:50], shuffled[50:].rename(columns={"a": "b", "b": "a"})])
    one, two = spectral_embedding(edges, width=8), spectral_embedding(shuffled, width=8)
    assert one.keys == two.keys and one.provenance["weights"] == two.provenance["weights"]
    np.testing.assert_allclose(one.values, two.values, atol=1e-5)


def test_repeated_edges_add_up_and_loops_do_not_count():
    edges = random_graph(weights=False)
    twice = pd.concat([edges, edges[:5], pd.DataFrame({"a": ["g001"], "b": ["g001"]})])
    weighted = edges.assign(weight=[2.]*5 + [1.]*(len(edges) - 5))
    np.testing.assert_allclose(spectral_embedding(twice, width=8).values,
                               spectral_embedding(weighted, width=8).values,
                               atol=1e-5)


def test_genes_outside_are_an_error_or_are_listed():
    edges = pd.concat([random_graph(weights=False),
                       pd.DataFrame({"a": ["X1"], "b": ["X2"]})])  # a second component
    with pytest.raises(MissingFeatureError, match="no feature for TP53, X1"):
        spectral_embedding(edges, ["g001", "X1", "TP53"], width=4)
    with pytest.warns(UserWarning, match="2 of 3 keys have no feature .* dropped: X1, TP53"):
        bank = featurize("graph", edges, genes=["g001", "X1", "TP53"], width=4, missing="drop")
    assert bank.keys == ("g001",)
    with pytest.raises(ValueError, match="missing: found 'zero'"):
        spectral_embedding(edges, ["g001"], width=4, missing="zero")


@pytest.mark.parametrize(
    "edges,options,message",
    [(pd.DataFrame({"x": ["A"], "y": ["B"]}), {}, "relations: found columns x, y, and no a and no b; give"),
     (pd.DataFrame({"a": ["A", None], "b": ["B", "C"]}), {}, "1 rows without a name in column 'a', the first "
                                                             "is row 1"),
     (pd.DataFrame({"a": ["A"], "b": ["B"], "weight": [-1.]}), {}, "1 rows whose weight is no number.*'-1.0' "
                                                                   "in row 0"),
     (pd.DataFrame({"a": ["A"], "b": ["B"], "weight": [np.nan]}), {}, "1 rows whose weight is no number.*nan"),
     (random_graph(), {"width": 40}, "found 40 for a largest connected component of 40 genes"),
     (random_graph(), {}, "found 320 for"),
     (pd.DataFrame({"a": [], "b": []}), {}, "relations: found no row"),
     ("nowhere.csv", {}, "nowhere.csv: no "
      "such file")])
def test_bad_edges_are_named(edges, options, message):
    with pytest.raises(ValueError, match=message): spectral_embedding(edges, **options)


# ---------------------------------------------------------------- tables

@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv", "parquet"])
def test_every_format_gives_the_same_bank(ending, tmp_path):
    edges, path = random_graph(), tmp_path/f"t.{ending}"
    if ending == "parquet": edges.to_parquet(path)
    else: edges.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
    np.testing.assert_allclose(featurize("graph", path, width=5).values,
                               spectral_embedding(edges, width=5).values,
                               atol=1e-6)


def test_bad_files_are_named(tmp_path):
    (tmp_path/"t.xls").write_bytes(b"")
    for name, message in {"t.xls": "found the ending '.xls'", "no.parquet": "no such file"}.items():
        with pytest.raises(ValueError, match=f"{name}: .*{message}"): spectral_embedding(tmp_path/name)


# ---------------------------------------------------------------- real relations

def test_relations_of_the_twins_targets(shared):
    """636 of the twin's 652 targets (simulated cells, real gene names) are in the largest component of the real
    relations."""
    import anndata as ad
    condition = ad.read_h5ad(shared/"k562_essential_twin.h5ad", backed="r").obs["condition"]
    targets = sorted({c.removesuffix("+ctrl") for c in condition.unique()} - {"ctrl"})
    with pytest.warns(UserWarning, match="16 of 652 keys have no feature"):
        bank = spectral_embedding(shared/"gene_relations.parquet", targets, width=16, missing="drop")
    assert (len(targets), len(bank), bank.width) == (652, 636, 16)
    np.testing.assert_allclose(np.linalg.norm(bank.values, axis=1), 1, rtol=1e-5)
    with pytest.raises(MissingFeatureError, match="16 of 652"):
        spectral_embedding(shared/"gene_relations.parquet", targets, width=16)
