"Artefacts are listed with what they were made from, and a change is seen."
import base64
import builtins
import errno
import hashlib
import io
import json
import os
import resource
import signal
import sys
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from matplotlib.figure import Figure
from PIL import Image

from biojepa.core import PATHS
from biojepa.report.manifest import (
    Report, check_manifest, code_hash, commit, parameters_of, read_manifest, stamp_of, versions
)
from biojepa.report.paper import keep, sentences
from biojepa.report.tables import gene_table

sys.path.insert(0, str(Path(__file__).parent))
from training_cases import in_child

TABLE = pd.DataFrame(dict(a=[1, 2]))


def test_entries_say_what_was_made_from_what(tmp_path):
    report = Report("90_eval", tmp_path, dict(data="abc", split="def"))
    report.figure(Figure(), dict(numbers=TABLE), "f")
    entries = read_manifest(tmp_path)
    assert list(entries["files"]) == ["f.png", "f_numbers.csv"]
    assert entries["files"]["f.png"]["drawn_from"] == ["f_numbers.csv"]
    for name, entry in entries["files"].items():
        assert entry["sha256"] == hashlib.sha256((tmp_path/name).read_bytes()).hexdigest()
        assert entry["notebook"] == "90_eval"
    about = entries["notebooks"]["90_eval"]
    assert about["made_from"] == dict(data="abc", split="def") and about["versions"]["torch"]
    Report("91_gene_level", tmp_path).table(TABLE, "t")
    assert set(read_manifest(tmp_path)["files"]) == {"f.png", "f_numbers.csv", "t.csv"}, "others' entries stay"


def test_a_figure_of_one_table_shares_its_name(tmp_path):
    Report("n", tmp_path).figure(Figure(), TABLE, "f")
    assert read_manifest(tmp_path)["files"]["f.png"]["drawn_from"] == ["f.csv"] and (tmp_path/"f.csv").is_file()


def write_tables(folder, notebook):
    for i in range(20): Report(notebook, folder).table(TABLE, f"{notebook}_{i}")


def test_two_writers_lose_no_entry(tmp_path):
    with ProcessPoolExecutor(2) as pool: list(pool.map(write_tables, [tmp_path]*2, ["a", "b"]))
    assert len(read_manifest(tmp_path)["files"]) == 40 and (check_manifest(tmp_path).state == "as listed").all()


def full(name, patch):
    "No room for one file."
    move = os.replace
    def refuse(part, path):
        if Path(path).name == name: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        move(part, path)
    patch.setattr(os, "replace", refuse)


def read_only(folder, patch):
    "Nothing in a folder may be opened for writing, by whatever way."
    def guarded(function):
        def call(path, *arguments, **options):
            how = str(arguments[0]) if arguments else str(options.get("mode", ""))
            writes = not how.isdigit() and set(how) & set("wax+") or how.isdigit() and int(how) & os.O_CREAT
            if writes and isinstance(path, (str, Path)) and Path(path).is_relative_to(folder):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return function(path, *arguments, **options)
        return call
    for module, name in ((builtins, "open"), (io, "open"), (os, "open")):
        patch.setattr(module, name, guarded(getattr(module, name)))


WRITES = {  # what a paper notebook writes, by its name in an error: file, call
    "table 't'": ("t.csv", lambda r: r.table(TABLE, "t")),
    "table 'f'": ("f.csv", lambda r: r.figure(Figure(), TABLE, "f")),
    "figure 'f'": ("f.png", lambda r: r.figure(Figure(), TABLE, "f")),
    "the list of tables and figures": ("MANIFEST.json", lambda r: r.listed(r.folder/"old.csv")),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_under_the_figures_is_named_and_leaves_what_was_there(what, tmp_path):
    name, write = WRITES[what]
    report = Report("n", tmp_path)
    report.table(TABLE, "old")
    report.figure(Figure(), TABLE, "f")
    report.table(TABLE, "t")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        full(name, patch)
        with pytest.raises(OSError, match=f"cannot write {what} .No space left.* are free.*{name}"): write(report)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    write(report)
    assert (check_manifest(tmp_path).state == "as listed").all()


@pytest.mark.parametrize("what", [w for w in WRITES if w != "figure 'f'"])
def test_a_read_only_folder_of_figures_is_named(what, tmp_path):
    _, write = WRITES[what]
    report = Report("n", tmp_path)
    report.table(TABLE, "old")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        read_only(tmp_path, patch)
        with pytest.raises(OSError, match=f"cannot write {what} .Read-only file system.: allow this user to write in"):
            write(report)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_limit_met_while_a_figure_is_drawn_is_named(tmp_path):
    "A true limit on the size of files: the table behind the figure fits, the picture does not."
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
        try: Report("n", tmp_path).figure(Figure(figsize=(9, 9), facecolor="r"), TABLE, "f")
        except OSError as error: (tmp_path/"said.txt").write_text(str(error))
    os.waitpid(in_child(work), 0)
    said = (tmp_path/"said.txt").read_text()
    assert "cannot write figure 'f' (File too large): a limit on the files of this user is reached" in said
    assert {p.name for p in tmp_path.iterdir()} - {".MANIFEST.lock"} == {"said.txt", "f.csv", "MANIFEST.json"}
    assert check_manifest(tmp_path).set_index("file").state["f.csv"] == "as listed"


def notebook_of(path, *sources):
    "A notebook whose first code cell is tagged as parameters."
    cells = [dict(cell_type="code", source=[s], metadata={}, outputs=[]) for s in sources]
    cells[0]["metadata"] = dict(tags=["parameters"])
    path.write_text(json.dumps(dict(cells=cells)))
    return path


def test_hash_of_a_notebook_sees_code_and_defaults_but_no_comment_or_line_break(tmp_path):
    path = tmp_path/"91.ipynb"
    def hashed(*sources): return code_hash(notebook_of(path, *sources))
    first = hashed("k: int = 5  # how many", "f(k, 2)")
    assert parameters_of(path) == dict(k=5)
    assert hashed("k: int = 5  # how many neighbours", "f(k,\n  2)  # so") == first
    assert len({first, hashed("k: int = 6", "f(k, 2)"), hashed("k: int = 5", "f(k, 3)")}) == 3


def test_the_stamp_holds_what_was_used_and_strikes_off_what_was_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(PATHS, "nbs", tmp_path)
    notebook_of(tmp_path/"n.ipynb", "k: int = 5  # how many")
    for name in ("old", "kept"): Report("n", tmp_path).table(TABLE, name)
    Report("other", tmp_path).table(TABLE, "others")
    report = Report("n", tmp_path, dict(config="c"))
    report.table(TABLE, "kept")
    stamp = report.stamp(dict(k=7, unrelated=1))
    assert stamp["parameters"] == dict(k=7) and list(stamp["files"]) == ["kept.csv"]
    assert stamp == stamp_of(read_manifest(tmp_path), "n")
    assert set(read_manifest(tmp_path)["files"]) == {"kept.csv", "others.csv"}
    report.table(TABLE, "late")
    assert stamp_of(read_manifest(tmp_path), "n") != stamp, "the stamp comes last"


def test_two_notebooks_may_make_one_file_and_a_difference_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(PATHS, "nbs", tmp_path)
    stamps = {}
    for name in ("a", "b", "a"):
        notebook_of(tmp_path/f"{name}.ipynb", "k: int = 5  # how many")
        report = Report(name, tmp_path)
        report.table(TABLE, "shared")
        stamps[name] = report.stamp(dict(k=5))
    assert all(stamp_of(read_manifest(tmp_path), name) == stamp for name, stamp in stamps.items())
    Report("b", tmp_path).table(2*TABLE, "shared")
    assert stamp_of(read_manifest(tmp_path), "a") != stamps["a"]


def test_changed_missing_and_unlisted_files_are_told_apart(tmp_path):
    report = Report("n", tmp_path)
    for name in ("same", "changed", "missing"): report.table(TABLE, name)
    (tmp_path/"changed.csv").write_text("a\n3\n")
    (tmp_path/"missing.csv").unlink()
    (tmp_path/"stray.csv").write_text("")
    found = check_manifest(tmp_path).set_index("file").state.to_dict()
    states = dict(same="as listed", changed="changed", missing="missing", stray="not listed")
    assert found == {f"{name}.csv": state for name, state in states.items()}
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


def test_a_kept_notebook_has_no_bars_no_metadata_and_light_pictures(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    raw = io.BytesIO()
    Image.fromarray(noise).save(raw, "PNG")
    picture = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(raw.getvalue()).decode()})
    bar, said = (nbformat.v4.new_output("stream", name=n, text="50%|##") for n in ("stderr", "stdout"))
    cell = nbformat.v4.new_code_cell("f()", outputs=[bar, said, picture], execution_count=3,
                                     metadata=dict(papermill={}, tags=["parameters"]))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=dict(papermill={})),
                   tmp_path/"executed.ipynb")
    kept = nbformat.read(keep(tmp_path/"executed.ipynb", tmp_path/"kept.ipynb"), 4)
    found = kept.cells[0]
    assert [o.get("name") for o in found.outputs] == ["stdout", None] and found.execution_count is None
    assert found.metadata == dict(tags=["parameters"]) and "papermill" not in kept.metadata
    data = base64.b64decode(found.outputs[1].data["image/png"])
    assert Image.open(io.BytesIO(data)).size == (60, 60) and len(data) < .6*len(raw.getvalue())


def test_sentences_are_made_from_the_rows():
    table = pd.DataFrame(dict(method=["ridge", "model"], r=[.3123, .2]))
    assert sentences(table, "{method}: {r:.2f}").data == "- ridge: 0.31\n- model: 0.20"


def test_gene_table_holds_no_copy_of_the_matrix():
    X = sp.random(20_000, 300, .3, format="csr", dtype=np.float32, random_state=0)
    tracemalloc.start()
    table = gene_table(AnnData(X), block=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(table["mean"], X.toarray().mean(0, dtype=float), rtol=1e-12)
    assert (table.expressed == (X.toarray() > 0).mean(0)).all() and peak < (X.data.nbytes + X.indices.nbytes)/2
