"""Predictions as cells in counts, as scorers of cells want them.

1. X holds whole numbers, one row a test cell and one a control, each name once, no cell empty, as deep as controls are.
2. Controls are given back as they were; a method that predicts no change gives its controls back.
3. The mean of a group is what was predicted: counts of a gene that doubles are doubled.
4. Cells without counts, or of another set, are refused."""
import numpy as np
import pytest
import scipy.sparse as sp

from biojepa.data.datasets import load_dataset
from biojepa.data.download import read_card
from biojepa.data.preprocess import prepare
from biojepa.data.splits import make_split
from biojepa.evaluate import cells as _  # which gives sets their method
from biojepa.predict import test_set as template_of


@pytest.fixture(scope="module")
def adata():
    spec = dict(n_genes=40, n_cells=900, n_targets=12, n_modules=4, n_batches=2, control_fraction=.3)
    return prepare(load_dataset(read_card("simulated").changed(simulate=spec, cells=None, genes=None, targets=None)))


@pytest.fixture(scope="module")
def template(adata): return template_of(adata, make_split(adata))


def test_cells_are_counts_with_names_labels_and_their_controls(adata, template):
    answer = template.with_prediction("mean", np.tile(template.train_delta, (len(template.groups), 1)))
    made = answer.to_cells(adata, column="target", control="non-targeting")
    predicted = made.obs["predicted"].to_numpy()
    assert sp.issparse(made.X) and made.X.dtype == np.float32 and (made.X.data > 0).all()
    np.testing.assert_array_equal(made.X.data, np.rint(made.X.data))
    assert made.obs_names.is_unique and list(made.var_names) == list(template.genes)
    assert predicted.sum() == len(template) and list(made.obs_names[predicted]) == list(template.cells.index)
    assert set(made.obs["target"][~predicted]) == {"non-targeting"} == set(made.obs["condition"][~predicted])
    assert list(made.obs["target"][predicted]) == list(template.cells["perturbation"])
    depth = np.asarray(made.X.sum(1)).ravel()
    beside = np.asarray(adata[made.obs["control"][predicted]].layers["counts"].sum(1)).ravel()
    assert depth.min() > 0 and .9 < (depth[predicted]/beside).mean() < 1.1
    assert (made[~predicted].X != adata[made.obs_names[~predicted]].layers["counts"]).nnz == 0
    assert (answer.to_cells(adata).X != made.X).nnz == 0, "the same molecules each time"
    assert (answer.to_cells(adata, seed=1).X != made.X).nnz > 0


def test_no_change_gives_the_controls_back(adata, template):
    made = template.to_cells(adata)
    predicted = made.obs["predicted"].to_numpy()
    assert (made[predicted].X != adata[template.cells["control"]].layers["counts"]).nnz == 0


@pytest.mark.parametrize("fold", [.25, 2.])
def test_the_mean_of_a_group_is_its_fold(adata, template, fold):
    delta = np.zeros_like(template.control_mean)
    gene = int(template.control_mean.mean(0).argmax())
    delta[:, gene] = np.log1p(fold*np.expm1(template.control_mean[:, gene])) - template.control_mean[:, gene]
    made = template.with_prediction("one gene", delta).to_cells(adata)
    mine, beside = made.X[made.obs["predicted"].to_numpy()], adata[template.cells["control"]].layers["counts"]
    ratio = np.asarray(mine.sum(0)).ravel()/np.asarray(beside.sum(0)).ravel()
    assert abs(ratio[gene]/fold - 1) < .1
    np.testing.assert_allclose(np.delete(ratio, gene), 1)


def test_cells_without_counts_or_of_another_set_are_refused(adata, template):
    bare = adata.copy()
    del bare.layers["counts"]
    with pytest.raises(ValueError, match="adata.layers: no 'counts'"): template.to_cells(bare)
    with pytest.raises(ValueError, match="not the genes of the set"): template.to_cells(adata[:, ::-1].copy())
    with pytest.raises(ValueError, match="lacks cells of the set"): template.to_cells(adata[:50].copy())
