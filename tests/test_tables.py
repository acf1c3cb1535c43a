"""The table of conditions.

1. The effect of a condition is measured beside the controls of its own cell line, wherever its cells are.
2. The noise that is printed beside it is the sampling error of exactly that difference."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.sparse import csr_matrix

from biojepa.report.tables import condition_table


def two_lines(effect=2., apart=3., n=(30, 10), noise=0.):
    "Two lines that lie `apart`; A (`n` cells in each) and B move the first of four genes by `effect`."
    rng, rows = np.random.default_rng(0), []
    for line, level in (("x", 1.), ("y", 1. + apart)):
        for condition, cells in (("ctrl", 40), ("A+ctrl", n[line == "y"]), ("B+ctrl", 20)):
            values = np.full((cells, 4), level) + noise*rng.normal(size=(cells, 4))
            values[:, 0] += effect*(condition != "ctrl")
            rows += [(condition, line, v) for v in values]
    obs = pd.DataFrame(dict(condition=[r[0] for r in rows], cell_type=[r[1] for r in rows], batch="0"))
    obs.index = obs.index.astype(str)
    return AnnData(csr_matrix(np.stack([r[2] for r in rows]), dtype=np.float32), obs=obs)


@pytest.mark.parametrize("n", [(30, 10), (20, 20), (40, 0)])
def test_the_effect_of_a_condition_does_not_mix_cell_lines(n):
    "One gene of four moves by 2: the root mean square is 1, however far apart the lines are."
    adata = two_lines(n=n)
    parts = np.where(adata.obs["condition"] == "A+ctrl", "test", "train")
    table = condition_table(adata, SimpleNamespace(part_of=lambda _: parts))
    assert table["condition"].tolist() == ["A+ctrl", "B+ctrl"] and table["part"].tolist() == ["test", "train"]
    np.testing.assert_allclose(table["effect"], 1, rtol=1e-6)
    np.testing.assert_allclose(table["noise"], 0, atol=1e-3)
    assert table["n_cells"].tolist() == [40, 40]


def test_noise_is_the_sampling_error_of_the_effect():
    found = condition_table(two_lines(effect=0., noise=1., n=(30, 10)),
                            SimpleNamespace(part_of=lambda a: [""]*len(a)))
    x = two_lines(effect=0., noise=1., n=(30, 10))
    control = (x.obs["condition"] == "ctrl").to_numpy()
    variance = [x.X[control & (x.obs["cell_type"] == line).to_numpy()].toarray().var(0).mean() for line in "xy"]
    by_hand = sum(share*v/40 + share**2*v/40 for share, v in zip((.75, .25), variance))
    np.testing.assert_allclose(found["noise"][0], np.sqrt(by_hand), rtol=1e-5)
    assert (found["effect"] < 2*found["noise"]).all()
