"Artefacts are listed with what they were made from, and a change is seen."
import hashlib
import json
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from matplotlib.figure import Figure

from biojepa.core import PATHS
from biojepa.report.manifest import Report, check_manifest, commit, read_manifest, versions
from biojepa.report.tables import gene_table

TABLE = pd.DataFrame(dict(a=[1, 2]))


def test_entries_say_what_was_made_from_what(tmp_path):
    report = Report("90_eval", tmp_path, dict(data="abc", split="def"))
    report.figure(Figure(), dict(numbers=TABLE), "f")
    entries = read_manifest(tmp_path)
    assert list(entries) == ["f.png", "f_numbers.csv"] and entries["f.png"]["drawn_from"] == ["f_numbers.csv"]
    for name, entry in entries.items():
        assert entry["sha256"] == hashlib.sha256((tmp_path/name).read_bytes()).hexdigest()
        assert entry["notebook"] == "90_eval" and entry["made_from"] == dict(
            data="abc", split="def") and entry["versions"]["torch"]
    Report("91_gene_level", tmp_path).table(TABLE, "t")
    assert set(read_manifest(tmp_path)) == {"f.png", "f_numbers.csv",
                                            "t.csv"}, "entries of other notebooks stay"


def test_changed_missing_and_unlisted_files_are_told_apart(tmp_path):
    report = Report("n", tmp_path)
    for name in ("same", "changed", "missing"): report.table(TABLE, name)
    (tmp_path/"changed.csv").write_text("a\n3\n")
    (tmp_path/"missing.csv").unlink()
    (tmp_path/"stray.csv").write_text("")
    found = check_manifest(tmp_path).set_index("file").state.to_dict()
    assert found == {
        "same.csv": "as listed", "changed.csv": "changed", "missing.csv": "missing", "stray.csv":
        "not listed"
    }
    assert check_manifest(tmp_path/"nothing").empty


def test_a_broken_manifest_is_named_and_not_overwritten(tmp_path):
    (tmp_path/"MANIFEST.json").write_text("{")
    with pytest.raises(ValueError, match="MANIFEST.json: not readable as JSON"):
        Report("n", tmp_path).table(TABLE, "t")
    assert (tmp_path/"MANIFEST.json").read_text() == "{"


def test_a_figure_needs_its_numbers(tmp_path):
    with pytest.raises(ValueError, match="tables: none given for figure 'f'"):
        Report("n", tmp_path).figure(Figure(), {}, "f")
    assert not list(tmp_path.iterdir())


def test_versions_and_commit(tmp_path):
    assert {"python", "biojepa", "torch", "numpy"} <= set(versions()) and commit(tmp_path) is None
    assert commit() is None or len(commit().rstrip("+")) == 12


def test_committed_figures_are_as_listed():
    found = check_manifest(PATHS.figures)
    assert len(found) and (found.state == "as listed").all(), found[found.state != "as listed"].to_string()


def test_gene_table_holds_no_copy_of_the_matrix():
    X = sp.random(20_000, 300, .3, format="csr", dtype=np.float32, random_state=0)
    tracemalloc.start()
    table = gene_table(AnnData(X), block=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(table["mean"], X.toarray().mean(0, dtype=float), rtol=1e-12)
    assert (table.expressed == (X.toarray() > 0).mean(0)).all() and peak < (X.data.nbytes + X.indices.nbytes)/2
