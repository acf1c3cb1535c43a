"""Stores: screens that stay on disk.

1. A zarr store, local or at an address, is read as the `.h5ad` of the same cells is.
2. `convert` writes what `prepare(load_dataset(...))` makes, block by block; rows come back in any order.
3. Batches from disk are those from memory, bit by bit: order, controls, seeds, devices, resumption (a training from a
   store is in test_command).
4. A killed conversion leaves nothing that is taken for a store; a store with a missing chunk is refused."""
import signal
import subprocess
import sys
import warnings

import anndata as ad
import fsspec
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import zarr

from biojepa.core import atomic_folder
from biojepa.data import loaders, matrix, stores
from biojepa.data.batches import row_source
from biojepa.data.conditions import SchemaError
from biojepa.data.datasets import load_dataset
from biojepa.data.download import read_card
from biojepa.data.loaders import cell_loader, pair_loader
from biojepa.data.matrix import StoredRows, matrix_blocks, opened
from biojepa.data.preprocess import prepare
from biojepa.data.splits import make_split
from biojepa.data.stores import convert

SPEC = dict(n_genes=60, n_cells=700, n_targets=16, n_modules=4, n_batches=2, control_fraction=.2)


@pytest.fixture(scope="module")
def home(tmp_path_factory): return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def screen(home):
    "A foreign file: other words for conditions and batches, and cells that are to be left out."
    adata = load_dataset(read_card("simulated").changed(simulate=SPEC, cells=None, genes=None, targets=None))
    names = adata.obs["condition"].astype(str).str.replace("+ctrl", "").str.replace("ctrl", "NT")
    rows = np.random.default_rng(0).permutation(len(names))[:30]
    names.iloc[rows] = "unassigned"
    total = np.asarray(adata.X.sum(1)).ravel() + 3
    raw = ad.AnnData(adata.X.astype(np.int64), adata.obs[["guide_seq_a", "guide_seq_b"]].astype(str), adata.var[[]],
                     uns=dict(protein_sequences=adata.uns["protein_sequences"]))
    raw.obs = raw.obs.assign(gene=names, lane=adata.obs["batch"], umi=total)
    raw.write_h5ad(home/"screen.h5ad")
    return home/"screen.h5ad"


WORDS = dict(condition="gene", control="NT", batch="lane", drop=("unassigned",), library_size="umi", mode="crispri",
             guide_seq=("guide_seq_a", "guide_seq_b"), keep=("protein_sequences",))


@pytest.fixture(scope="module")
def in_memory(screen): return prepare(load_dataset(screen, **WORDS))


@pytest.fixture(scope="module")
def store(home, screen, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:     # many blocks, chunks and shards
        patch.setattr(stores, "CHUNK", 500)
        patch.setattr(stores, "SHARD", 2000)
        patch.setattr(stores, "matrix_blocks", lambda stored, where: matrix_blocks(stored, where, 3000))
        return convert(screen, home/"screen.zarr", progress=False, **WORDS)


@pytest.fixture
def on_disk(store, monkeypatch):
    monkeypatch.setattr(loaders, "AT_HAND", 20_000)     # several sweeps in an epoch
    return load_dataset(store, by_block=True)


def as_zarr(adata, place, version):
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=version):
        warnings.simplefilter("ignore")
        adata.write_zarr(place)


# reading

@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, sp.csr_matrix.toarray], ids=["csr", "csc", "dense"])
def test_a_store_is_read_as_the_file_of_the_same_cells(screen, tmp_path, version, layout):
    raw = ad.read_h5ad(screen)
    raw.X = layout(sp.csr_matrix(raw.X))
    as_zarr(raw, tmp_path/"screen.zarr", version)
    found, expected = load_dataset(tmp_path/"screen.zarr", **WORDS), load_dataset(screen, **WORDS)
    assert (found.X != expected.X).nnz == 0 and found.X.dtype == np.float32
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    assert found.uns["protein_sequences"] == expected.uns["protein_sequences"]


def test_an_address_is_read_as_a_folder(store, screen, in_memory):
    there = fsspec.filesystem("memory")
    there.put(str(store), "bucket/screen.zarr", recursive=True)
    try:
        remote = load_dataset("memory://bucket/screen.zarr", by_block=True)
        assert (row_source(remote)[:] != in_memory.X).nnz == 0
        pd.testing.assert_frame_equal(remote.obs, in_memory.obs)
        as_zarr(ad.read_h5ad(screen), screen.parent/"raw.zarr", 3)
        there.put(str(screen.parent/"raw.zarr"), "bucket/raw.zarr", recursive=True)
        found = load_dataset("memory://bucket/raw.zarr", **WORDS)
        assert (found.X != load_dataset(screen, **WORDS).X).nnz == 0
        with pytest.raises(SchemaError, match="nothing.zarr: cannot be read as a zarr store"):
            load_dataset("memory://bucket/nothing.zarr")
    finally: there.rm("bucket", recursive=True)


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_rows_come_in_any_order(tmp_path, kind):
    x = sp.random(400, 30, .2, format="csr", dtype=np.float32, random_state=0)
    x[5:9] = 0
    x.eliminate_zeros()
    adata, path = ad.AnnData(x), tmp_path/f"x.{kind}"
    adata.write_h5ad(path) if kind == "h5ad" else as_zarr(adata, path, 3)
    with opened(path) as f:
        for between in (0, 5, 1 << 20):
            rows = StoredRows(f["X"], between)
            for wanted in (slice(None), slice(10, 20), [7], [6, 399, 0, 6], np.random.default_rng(1).permutation(400)):
                assert (rows[wanted] != x[wanted]).nnz == 0
            assert rows[np.zeros(0, int)].shape == (0, 30)
        for entries in (1, 100, 1 << 20):
            blocks = list(matrix_blocks(f["X"], "x", entries))
            assert (sp.vstack([b for _, b in blocks]) != x).nnz == 0
            assert [r.start for r, _ in blocks[1:]] == [r.stop for r, _ in blocks[:-1]]


# converting

def test_a_converted_screen_is_the_prepared_one(on_disk, in_memory):
    assert (row_source(on_disk)[:] != in_memory.X).nnz == 0
    pd.testing.assert_frame_equal(on_disk.obs, in_memory.obs)
    pd.testing.assert_frame_equal(on_disk.var, in_memory.var)
    assert on_disk.uns["protein_sequences"] == in_memory.uns["protein_sequences"]
    about, expected = on_disk.uns["biojepa"], in_memory.uns["biojepa"]
    assert list(about["history"]) == list(expected["history"]) and about["expression_space"] == "log1p"


def test_a_store_has_whole_shards_and_anndata_reads_it(store, in_memory):
    data = zarr.open_group(store, mode="r")["X/data"]
    assert data.chunks == (500,) and data.shards == (2000,)
    assert len(list((store/"X"/"data"/"c").iterdir())) == -(-in_memory.X.nnz//2000)
    assert zarr.open_group(store, mode="r").metadata.zarr_format == 3
    assert (ad.read_zarr(store).X != in_memory.X).nnz == 0


def test_logged_twice_is_as_in_memory(screen, home):
    path = convert(screen, home/"twice.zarr", expression_space="log1p_twice", progress=False, **WORDS)
    expected = prepare(load_dataset(screen, **WORDS), "log1p_twice")
    found = load_dataset(path, by_block=True)
    assert (row_source(found)[:] != expected.X).nnz == 0
    np.testing.assert_array_equal(found.obs["log_library_size"], expected.obs["log_library_size"])


def test_what_load_dataset_refuses_is_refused_before_anything_is_written(screen, tmp_path):
    with pytest.raises(SchemaError, match="'unassigned' .30 cells.* name no single perturbation"):
        convert(screen, tmp_path/"a.zarr", progress=False, **WORDS | dict(drop=None))
    with h5py.File(screen) as f: n = f["X/data"].shape[0]
    (tmp_path/"broken.h5ad").write_bytes(screen.read_bytes())
    with h5py.File(tmp_path/"broken.h5ad", "r+") as f: f["X/data"][n - 1] = -2
    with pytest.raises(SchemaError, match="broken.h5ad: 1 negative values in X"):
        convert(tmp_path/"broken.h5ad", tmp_path/"b.zarr", progress=False, **WORDS)
    with pytest.raises(SchemaError, match="neither a file nor a store"):
        convert("norman", tmp_path/"c.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["broken.h5ad"]


# batches

def equal(one, other):
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b)), "batches differ"


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("make", [cell_loader, pair_loader])
def test_batches_from_disk_are_those_from_memory(in_memory, on_disk, make, part):
    split = make_split(in_memory)
    one, other = (make(cells, split, part, batch_size=16, seed=5) for cells in (in_memory, on_disk))
    assert 1 < other.ahead < len(other) or part == "test"
    for epoch in (0, 1):
        one.set_epoch(epoch), other.set_epoch(epoch)
        equal(one, other)


def test_devices_and_resumption_are_as_in_memory(in_memory, on_disk):
    split = make_split(in_memory)
    make = lambda cells, **o: pair_loader(cells, split, batch_size=16, seed=5, **o)
    for rank in (0, 1):
        equal(*(make(cells, rank=rank, world_size=2) for cells in (in_memory, on_disk)))
    whole, begun = list(make(in_memory)), make(on_disk)
    half = iter(begun)
    for _ in range(7): next(half)
    again = make(on_disk)
    again.load_state_dict(begun.state_dict())
    equal(whole[7:], again)


def test_a_backed_file_gives_the_same_batches(in_memory, tmp_path):
    in_memory.write_h5ad(tmp_path/"prepared.h5ad")
    split = make_split(in_memory)
    backed = ad.read_h5ad(tmp_path/"prepared.h5ad", backed="r")
    equal(*(pair_loader(cells, split, batch_size=16) for cells in (in_memory, backed)))


def test_annbatch_reads_the_same_rows(store, in_memory, monkeypatch):
    pytest.importorskip("annbatch")     # needs Python 3.12
    rows = row_source(load_dataset(store, by_block=True))
    wanted, asked = np.random.default_rng(2).permutation(in_memory.n_obs)[:300], []
    read = matrix.read_together
    monkeypatch.setattr(matrix, "read_together", lambda *a: asked.append(a) or read(*a))
    assert (rows[wanted] != in_memory.X[wanted]).nnz == 0 and asked


# what can go wrong

KILLED = """
import sys, time
from biojepa.data import stores
write = stores.Shards._write
def slow(self, values): write(self, values); print("written", flush=True); time.sleep(60)
stores.Shards._write = slow
stores.convert(sys.argv[1], sys.argv[2], progress=False, condition="gene", control="NT", drop=("unassigned",))
"""


def test_a_killed_conversion_begins_anew(screen, tmp_path):
    path = tmp_path/"screen.zarr"
    words = [sys.executable, "-c", KILLED, str(screen), str(path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left, = tmp_path.iterdir()
    assert left.name.startswith(".screen.") and not path.exists()
    convert(screen, path, progress=False, **WORDS)
    assert [p.name for p in tmp_path.iterdir()] == ["screen.zarr"]
    assert load_dataset(path, by_block=True).n_obs == 670


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path/"a") as part:
        (part/"half").write_text("x")
        raise RuntimeError("power cut")
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path/"a") as part:
        (part/"whole").write_text("x")
        with atomic_folder(tmp_path/"b"): assert part.is_dir(), "a folder that is being written is nobody's rubbish"
    assert (tmp_path/"a"/"whole").read_text() == "x"
    with pytest.raises(FileExistsError, match="something is there already"), atomic_folder(tmp_path/"a"): pass


def test_a_store_with_a_missing_chunk_is_refused(store, screen, tmp_path):
    as_zarr(ad.read_h5ad(screen), tmp_path/"raw.zarr", 3)
    next((tmp_path/"raw.zarr"/"X"/"data").rglob("c/*")).unlink()
    with pytest.raises(SchemaError, match="raw.zarr: 1 of . chunks of X/data are missing"):
        load_dataset(tmp_path/"raw.zarr", **WORDS)
    (tmp_path/"empty").mkdir()
    with pytest.raises(SchemaError, match="neither a file nor a dataset"): load_dataset(tmp_path/"empty")
    with pytest.raises(SchemaError, match="by_block reads a store of prepared"): load_dataset(screen, by_block=True)
    with pytest.raises(SchemaError, match="this file was already prepared"): load_dataset(store)
