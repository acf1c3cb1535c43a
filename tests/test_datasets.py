"Cards, the download path against a faulty server on this machine, and everything a file can get wrong."
import errno
import hashlib
import importlib.util
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pooch
import pytest
import scipy.sparse as sp
from hypothesis import given, settings, strategies as st

from biojepa.core import PATHS
from biojepa.data import download, matrix, values as values_module
from biojepa.data.conditions import SchemaError, condition_name, parse_condition
from biojepa.data.datasets import load_dataset
from biojepa.data.download import DatasetCard, DownloadError, fetch, list_cards, read_card
from biojepa.data.network import SimulationSpec
from biojepa.data.simulate import simulate_perturb_seq

GEARS = {"norman", "adamson", "dixit", "replogle_k562_essential", "replogle_rpe1_essential"}


def screen(n_cells=40, n_genes=6, seed=0):
    "A small screen in canonical spelling: counts, three conditions, two lanes."
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "condition": np.resize(["ctrl", "G1+ctrl", "G1+G2", "G2+ctrl"], n_cells), "lane": np.resize(
                ["a", "b"], n_cells), "line": "K562", "guide": np.resize(["", "g1", "g2", "g1", "g2"],
                                                                         n_cells)
        },
        index=[f"c{i}-{1 + i % 3}" for i in range(n_cells)])
    var = pd.DataFrame({"symbol": [f"G{i}" for i in range(n_genes)]}, index=[f"G{i}" for i in range(n_genes)])
    return ad.AnnData(sp.csr_matrix(rng.poisson(1., (n_cells, n_genes)).astype("float32")), obs, var)


def load(source, **names):
    "Load without the warnings a test does not look at."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_dataset(source, **names)


# --- conditions
# -------------------------------------------------------------------------------------------------------

GENE = st.text("ABCDEFGHIJ0123456789-.", min_size=1, max_size=6)


@given(st.lists(GENE, min_size=1, max_size=4, unique=True), st.randoms(), st.integers(0, 2),
      st.sampled_from(["ctrl", "control"]))
def test_every_spelling_of_a_condition_is_one_condition(targets, random, n_control, label):
    parts = targets + [label]*n_control
    random.shuffle(parts)
    assert parse_condition("+".join(parts)) == tuple(sorted(targets))
    name = condition_name(parse_condition(" + ".join(parts)))
    assert condition_name(parse_condition(name)) == name


@pytest.mark.parametrize("text", ["", "  ", "A++B", "+A", "A+", "A+A", "A+ctrl+A", "nan", None, np.nan, 3])
def test_malformed_conditions_are_errors(text):
    with pytest.raises(SchemaError, match="condition"): parse_condition(text)


def test_other_control_labels():
    assert parse_condition("non-targeting", control="non-targeting") == ()
    assert parse_condition("ctrl", control="non-targeting") == ("ctrl",)
    assert parse_condition("NT+A", control=("NT", "ctrl")) == ("A",)


# --- cards
# ------------------------------------------------------------------------------------------------------------

def test_the_cards_are_there_and_say_where_their_numbers_come_from():
    assert set(list_cards()) == GEARS | {"simulated"}
    for name in GEARS:
        card = read_card(name)
        assert card.name == name and card.doi.startswith(
            "10.") and card.licence and "cell-gears" in card.evidence
        assert card.file == f"{name}/perturb_processed.h5ad"
        assert card.columns.values == "log1p" and card.columns.control == "ctrl"
        assert "unverified" in card.evidence or "not checked here" in card.evidence


def test_addresses_are_those_of_cell_gears():
    spec = importlib.util.find_spec("gears")
    if spec is None: pytest.skip("needs cell-gears")
    source = (Path(spec.submodule_search_locations[0])/"pertdata.py").read_text()  # read, not imported
    found = dict(re.findall(r"data_name == '(\w+)':(?:\s*##[^\n]*)?\s*url = '([^']+)'", source))
    assert set(found) == GEARS and all(read_card(n).url == url for n, url in found.items())


def test_readme_of_the_data_names_every_card():
    text = (PATHS.root/"data/README.md").read_text()
    assert all(f"`{name}`" in text for name in list_cards())


@pytest.mark.parametrize("text, message",
                        [('name = "x"\ntitle = "x"\ncolour = "red"', "colour"), ('name = "x"', "title"),
                         ("name = ", "x.toml"), ('name = "x"\ntitle = "x"\nsha256 = "123"', "sha256"),
                         ('name = "x"\ntitle = "x"\nfile = "x/go.csv"', "only an .h5ad"),
                         ('name = "x"\ntitle = "x"\n[columns]\nvalues = "tpm"', "columns.values")])
def test_a_wrong_card_is_named(tmp_path, text, message):
    (tmp_path/"x.toml").write_text(text)
    with pytest.raises(SchemaError, match=f"(?s)x.toml.*{message}|{message}"): read_card("x", tmp_path)


# --- the download path
# ------------------------------------------------------------------------------------------------

class Canary:
    "Unpickling this leaves a file behind."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, "w")


def archive(h5ad, members=None):
    "An archive in GEARS' format: a folder with the cells, a table, and a pickle."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in (members or {"toy/perturb_processed.h5ad": h5ad}).items():
            z.writestr(name, content)
        z.writestr("toy/go.csv", "source,target,importance\nA,B,0.5\n")
        z.writestr("toy/data_pyg/cell_graphs.pkl", pickle.dumps(Canary(CANARY)))
    return out.getvalue()


CANARY = Path(tempfile.gettempdir())/f"biojepa-canary-{os.getpid()}"


class Server:
    """Serves one body on a random port of this machine; `script` says what happens to each request, the last entry
    to all further ones."""
    def __init__(self, body, script):
        self.body, self.script, self.requests, self.halfway = body, list(script), 0, threading.Event()
        self.sent = 0
        outer = self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_GET(self):
                what = outer.script[min(outer.requests, len(outer.script) - 1)]
                outer.requests += 1
                outer.answer(self, what)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/toy.zip"
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()

    def answer(self, handler, what):
        if isinstance(what, int):
            handler.send_response(what); handler.end_headers(); return handler.wfile.write(b"<html>no</html>")
        if what == "reset": return handler.connection.close()
        if what == "endless":
            handler.send_response(200)
            handler.end_headers()
            try:
                while True: self.sent += handler.wfile.write(self.body)
            except OSError: return
        body = {"page": b"<html>Are you a robot?</html>", "short zip":
                self.body[:len(self.body) // 2]}.get(what, self.body)
        handler.send_response(202 if what == "page" else 200)
        if what not in ("short zip",): handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if what in ("truncated", "slow"):
            handler.wfile.write(body[:len(body)//2]); handler.wfile.flush(); self.halfway.set()
            if what == "slow": time.sleep(60)
            return handler.connection.close()
        handler.wfile.write(body)

    def __enter__(self): return self
    def __exit__(self, *_): self.http.shutdown(); self.http.server_close()


@pytest.fixture(scope="module")
def h5ad(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")/"toy.h5ad"
    screen().write_h5ad(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def zipped(h5ad): return archive(h5ad)


def toy(url, **more):
    return DatasetCard(**(dict(name="toy", title="toy", url=url, file="toy/perturb_processed.h5ad") | more))


def files(folder): return sorted(p.name for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


def get(card, folder, **more): return fetch(card, folder=folder, wait=0., progress=False, **more)


def test_only_the_cells_come_out_of_the_archive_and_what_came_is_recorded(tmp_path, zipped, h5ad):
    with Server(zipped, ["ok"]) as server: path = get(toy(server.url), tmp_path)
    assert path.read_bytes() == h5ad and not CANARY.exists()
    assert files(tmp_path) == ["perturb_processed.h5ad", "record.json", "toy.zip"]
    record = json.loads((path.parent/"record.json").read_text())
    assert record["sha256"] == hashlib.sha256(
        h5ad).hexdigest() and record["download_sha256"] == hashlib.sha256(zipped).hexdigest()
    assert record["checked_against"] is None and record["url"] == server.url


def test_two_failures_then_success(tmp_path, zipped, h5ad):
    with Server(zipped, [503, "truncated", "ok"]) as server:
        assert get(toy(server.url), tmp_path).read_bytes() == h5ad
        assert server.requests == 3


@pytest.mark.parametrize("what", ["truncated", "short zip", "reset", 500, 429])
def test_a_failure_that_lasts_is_reported_after_the_last_attempt_and_leaves_nothing(tmp_path, zipped, what):
    with Server(zipped, [what]) as server:
        with pytest.raises(DownloadError,
                           match="toy: failed 3 times.*Address: http.*save the file as .*toy.zip"):
            get(toy(server.url), tmp_path)
        assert server.requests == 3 and files(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final_and_says_how_to_place_the_file(tmp_path, zipped, status):
    with Server(zipped, [status]) as server:
        with pytest.raises(DownloadError,
                           match=f"HTTP {status}.*{re.escape(server.url)}.*save the file as") as caught:
            get(toy(server.url), tmp_path)
        assert server.requests == 1 and files(tmp_path) == []
        assert str(tmp_path/"toy"/"toy.zip") in str(caught.value)


def test_a_web_page_instead_of_data_is_recognised(tmp_path, zipped):
    with Server(zipped, ["page"]) as server:
        with pytest.raises(DownloadError, match="no zip archive, beginning with .*robot"):
            get(toy(server.url), tmp_path)
        assert server.requests == 1 and files(tmp_path) == []


def test_nobody_there(tmp_path, zipped):
    with Server(zipped, ["ok"]) as server: url = server.url
    with pytest.raises(DownloadError, match="failed 3 times"): get(toy(url), tmp_path)
    with pytest.raises(DownloadError, match="no url; put the file at"): get(toy(None), tmp_path)


def test_checksums(tmp_path, zipped, h5ad):
    right, wrong = hashlib.md5(zipped).hexdigest(), "0"*64
    with Server(zipped, ["ok"]) as server:
        with pytest.raises(DownloadError, match=f"(?s)wrong checksum, nothing was kept.*{wrong}"):
            get(toy(server.url, sha256=wrong), tmp_path)
        assert server.requests == 1 and files(tmp_path) == []
        path = get(toy(server.url, md5=right), tmp_path)
    assert json.loads((path.parent/"record.json").read_text())["checked_against"] == f"md5:{right}"


def test_what_was_recorded_at_the_first_download_is_checked_from_then_on(tmp_path, zipped, h5ad):
    with Server(zipped, ["ok"]) as server: path = get(toy(server.url), tmp_path)
    path.write_bytes(h5ad[:-1] + b"x")
    with pytest.raises(DownloadError, match="its checksum .* delete it"): get(toy(server.url), tmp_path)
    path.unlink(); (path.parent/"toy.zip").unlink()
    with Server(archive(h5ad, {"toy/perturb_processed.h5ad": h5ad, "toy/new.txt": "other"}), ["ok"]) as other:
        with pytest.raises(DownloadError, match="wrong checksum"): get(toy(other.url), tmp_path)


def test_a_cached_file_needs_no_network(tmp_path, zipped, h5ad):
    with Server(zipped, ["ok"]) as server: get(toy(server.url), tmp_path)
    assert get(toy(server.url), tmp_path, offline=True).read_bytes() == h5ad
    (tmp_path/"toy/perturb_processed.h5ad").unlink()
    assert get(toy(server.url), tmp_path, offline=True).read_bytes() == h5ad  # from the archive
    with pytest.raises(DownloadError, match="offline, and there is no cached copy.*save the file as"):
        get(toy(server.url), tmp_path/"elsewhere", offline=True)
    assert files(tmp_path/"elsewhere") == []


def test_files_placed_by_hand_are_used_and_checked(tmp_path, zipped, h5ad):
    for name, content in (("toy.zip", zipped), ("perturb_processed.h5ad", h5ad)):
        folder = tmp_path/name
        (folder/"toy").mkdir(parents=True); (folder/"toy"/name).write_bytes(content)
        assert get(toy(None, md5=hashlib.md5(zipped).hexdigest()), folder, offline=True).read_bytes() == h5ad
        assert (json.loads((folder/"toy/record.json").read_text())["checked_against"]
                is not None) == (name == "toy.zip")
    (tmp_path/"toy").mkdir(); (tmp_path/"toy/toy.zip").write_bytes(zipped)
    with pytest.raises(DownloadError, match="is not sha256:1"):
        get(toy(None, sha256="1"*64), tmp_path, offline=True)
    (tmp_path/"toy/toy.h5ad").write_bytes(h5ad)
    with pytest.raises(DownloadError, match="is not sha256:1"):
        get(toy(None, sha256="1"*64, file=None), tmp_path, offline=True)
    (tmp_path/"toy/record.json").write_text("{")
    with pytest.raises(DownloadError, match="record.json: not the record of a download"):
        get(toy(None), tmp_path, offline=True)


def test_a_killed_download_leaves_nothing_that_looks_finished(tmp_path, zipped, h5ad):
    with Server(zipped, ["slow", "ok"]) as server:
        code = f"""
from pathlib import Path
from biojepa.data.download import DatasetCard, fetch
card = DatasetCard(name="toy", title="toy", url={server.url!r}, file="toy/perturb_processed.h5ad")
fetch(card, folder=Path({str(tmp_path)!r}), progress=False)"""
        process = subprocess.Popen([sys.executable, "-c", code], cwd=PATHS.root)
        assert server.halfway.wait(120), "the download never started"
        while not files(tmp_path): time.sleep(0.01)
        process.send_signal(signal.SIGKILL); process.wait()
        left = files(tmp_path)
        assert left and not {"toy.zip", "perturb_processed.h5ad", "record.json"} & set(left)
        assert get(toy(server.url), tmp_path).read_bytes() == h5ad
    for name in left:
        os.utime(tmp_path/"toy"/name, (0, 0))  # an hour later the leftovers are swept
    for name in ("toy.zip", "perturb_processed.h5ad", "record.json"): (tmp_path/"toy"/name).unlink()
    with Server(zipped, ["ok"]) as server: get(toy(server.url), tmp_path)
    assert files(tmp_path) == ["perturb_processed.h5ad", "record.json", "toy.zip"]


def test_an_interrupted_extraction_leaves_nothing(tmp_path, zipped, monkeypatch):
    def interrupted(source, out, length): out.write(source.read(100)); raise KeyboardInterrupt
    with Server(zipped, ["ok"]) as server:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(download.shutil, "copyfileobj", interrupted)
            get(toy(server.url), tmp_path)
    assert files(tmp_path) == ["toy.zip"] and get(toy(server.url), tmp_path, offline=True).is_file()


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError(errno.EACCES, "Permission denied")
])
def test_a_full_or_forbidden_disk_is_reported(tmp_path, zipped, monkeypatch, error):
    def fail(*args, **kwargs): raise error
    with Server(zipped, ["ok"]) as server:
        with monkeypatch.context() as patch:
            patch.setattr(pooch.HTTPDownloader, "__call__", fail)
            with pytest.raises(DownloadError, match=f"toy: cannot write to .*{error.strerror}.*folder="):
                get(toy(server.url), tmp_path)
        assert files(tmp_path) == []
        with pytest.raises(DownloadError, match="bytes free, .* are needed"):
            get(toy(server.url, bytes=10**18), tmp_path)
        (tmp_path/"a_file").write_text("")
        with pytest.raises(DownloadError, match="cannot write to"): get(toy(server.url), tmp_path/"a_file")


def test_an_archive_cannot_choose_where_its_files_go(tmp_path, h5ad):
    with Server(archive(h5ad, {"../../outside/perturb_processed.h5ad": h5ad, "../evil.txt": "x"}),
                ["ok"]) as server:
        path = get(toy(server.url), tmp_path/"inner"/"cache")
    assert path == tmp_path/"inner/cache/toy/perturb_processed.h5ad" and path.read_bytes() == h5ad
    assert files(tmp_path) == ["perturb_processed.h5ad", "record.json", "toy.zip"]


@pytest.mark.parametrize("members, message", [
    ({"toy/other.h5ad": b"x"}, "0 files called perturb_processed.h5ad, one is needed; it holds toy/other.h5ad"),
    ({"a/perturb_processed.h5ad": b"x", "b/perturb_processed.h5ad": b"x"}, "2 files called"),
    ({"toy/perturb_processed.h5ad": b"not hdf5"}, "is not an HDF5 file")])
def test_archives_without_the_cells(tmp_path, members, message):
    with Server(archive(b"", members), ["ok"]) as server:
        with pytest.raises(DownloadError, match=message): get(toy(server.url), tmp_path)
    assert "perturb_processed.h5ad" not in files(tmp_path) and not CANARY.exists()


def test_no_more_bytes_are_kept_than_the_card_says(tmp_path, zipped, monkeypatch):
    with Server(zipped, ["ok"]) as server:
        with pytest.raises(DownloadError,
                           match=r"toy: the server sends more than the 1,000 bytes the card says.*kept"):
            get(toy(server.url, bytes=1000), tmp_path)
        assert server.requests == 1 and files(tmp_path) == []
        assert get(toy(server.url, bytes=len(zipped)), tmp_path).is_file()
    with Server(b"PK" + bytes(10**6), ["endless"]) as server:
        for card, most in ((toy(server.url, bytes=3_000_000), "3,000,000"), (toy(server.url), "2,000,000")):
            monkeypatch.setattr(download, "MOST", 2_000_000)
            with pytest.raises(DownloadError, match=f"more than the {most} bytes"): get(card, tmp_path/most)
            assert files(tmp_path/most) == []
        assert server.requests == 2 and server.sent < 10**8


def test_an_archive_is_not_unpacked_to_more_than_data_ever_compress_to(tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "copyfileobj", lambda *args: pytest.fail("something was unpacked"))
    bomb = archive(b"", {"toy/perturb_processed.h5ad": bytes(100_000_001)})
    with Server(bomb, ["ok"]) as server:
        with pytest.raises(DownloadError,
                           match=r"toy.zip: [\d,]+ bytes would unpack to 100,000,001, more than 200 times"):
            get(toy(server.url), tmp_path)
    assert files(tmp_path) == ["toy.zip"]


def in_directory(zipped, at):
    "Where a field of each member stands in the archive's directory."
    return [entry.start() + at for entry in re.finditer(rb"PK\x01\x02", zipped)]


@pytest.mark.parametrize("damage", [
    lambda z: {len(z)//3: z[len(z)//3] ^ 0xFF},             # in the cells; the directory at the end is intact
    lambda z: {at: z[at] | 1 for at in in_directory(z, 8)}, # a password
    lambda z: dict.fromkeys(in_directory(z, 10), 99)])      # a compression nobody knows
def test_a_damaged_archive_is_not_extracted(tmp_path, zipped, damage):
    damaged = bytearray(zipped)
    for at, byte in damage(zipped).items(): damaged[at] = byte
    with Server(bytes(damaged), ["ok"]) as server:
        with pytest.raises(DownloadError, match="damaged or unreadable archive.*delete it"):
            get(toy(server.url), tmp_path)
    assert "perturb_processed.h5ad" not in files(tmp_path)


def test_a_card_may_point_at_an_h5ad_directly(tmp_path, h5ad):
    card = dict(file=None)
    with Server(h5ad, ["truncated", "ok"]) as server:
        assert get(toy(server.url, **card), tmp_path).read_bytes() == h5ad
    with Server(b"<html>", ["ok"]) as server:
        with pytest.raises(DownloadError, match="no HDF5 file"): get(toy(server.url, **card), tmp_path/"other")


def test_the_bar_is_shown_unless_it_is_not_wanted(tmp_path, zipped, capfd):
    with Server(zipped, ["ok"]) as server:
        fetch(toy(server.url), folder=tmp_path/"a"); assert "100%" in capfd.readouterr().err
        fetch(toy(server.url), folder=tmp_path/"b", progress=False); assert capfd.readouterr().err == ""


def test_load_a_card_through_the_whole_path(tmp_path, zipped):
    with Server(zipped, ["ok"]) as server:
        card = toy(server.url,
                   cells=40,
                   genes=6,
                   targets=3,
                   columns=dict(batch="lane", cell_type="line", relabel={"K562": "HEK"}))
        with pytest.warns(UserWarning, match=r"toy: found 2 targets \(card: 3\)"):
            adata = load_dataset(card, folder=tmp_path, progress=False)
        other = load(card, batch="guide", cell_type="lane", folder=tmp_path,
                     offline=True)  # the caller's names win
    assert set(adata.obs["batch"]) == {"a", "b"} and set(adata.obs["cell_type"]) == {"HEK"}
    assert any("'K562' replaced by 'HEK'" in line for line in adata.uns["biojepa"]["history"])
    assert set(other.obs["cell_type"]) == {"a", "b"} and adata.uns["biojepa"]["source"] == "toy"


def test_what_a_card_drops_is_gone_before_anything_else_and_the_caller_may_choose(tmp_path, zipped):
    with Server(zipped, ["ok"]) as server: fetch(toy(server.url), folder=tmp_path, progress=False)
    card = toy(server.url, cells=20, targets=1, columns=dict(drop=["G2", "SEM1"], batch="lane", guide="guide"))
    whole = load(card, folder=tmp_path, drop=(), batch="lane")
    with pytest.warns(UserWarning,
                      match="toy: drop names SEM1, which no condition has: is this the file that the card"):
        adata = load_dataset(card, folder=tmp_path)
    kept = ~whole.obs["condition"].isin(["G1+G2", "G2+ctrl"])
    assert adata.obs_names.equals(whole.obs_names[kept]) and (adata.X != whole.X[kept.to_numpy()]).nnz == 0
    assert set(adata.obs["condition"].cat.categories) == {"ctrl", "G1+ctrl"} and whole.n_obs == 40
    history = "".join(adata.uns["biojepa"]["history"])
    assert "drop: 20 cells of 1 targets left out: G2 (20); not in this file: SEM1" in history
    assert not any("drop" in line for line in whole.uns["biojepa"]["history"])
    again = warned(lambda: load_dataset(card, folder=tmp_path))
    assert not any("found" in str(w.message) for w in again)  # the card's sizes are those that remain
    assert set(load(card, folder=tmp_path, drop="G1").obs["condition"]) == {"ctrl", "G2+ctrl"}
    with pytest.raises(SchemaError, match="toy: drop names SEM1, which no condition has; correct the names"):
        load(card, folder=tmp_path, drop=["SEM1"])


def warned(call):
    "The warnings of a call."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return found


def test_the_card_of_the_report_drops_what_gears_does_not_know():
    "Facts of the release: 162,246 cells and 1,087 targets remain of 162,751 and 1,092."
    card = read_card("replogle_k562_essential")
    assert card.columns.drop == ("C7orf26", "C14orf178", "RPS10-NUDT3", "SEM1", "FAU")
    assert (card.cells, card.targets) == (162_246, 1087) and "162,751" in card.notes and "1,092" in card.notes


def test_the_simulated_card_is_the_simulator(tmp_path):
    spec = dict(n_genes=60, n_cells=200, n_targets=5, n_modules=2, n_batches=2)
    card = read_card("simulated").changed(simulate=spec, cells=None, genes=None, targets=None)
    adata, direct = load_dataset(card), simulate_perturb_seq(SimulationSpec(**spec))
    assert (adata.X != direct.X).nnz == 0 and set(adata.uns) == {"truth", "protein_sequences", "biojepa"}
    for column in ("condition", "batch", "cell_type", "guide_id", "guide_seq_a", "guide_seq_b", "mode"):
        assert (adata.obs[column].astype(str) == direct.obs[column].astype(str)).all(), column
    assert adata.uns["biojepa"]["expression_space"] == "counts"


# --- reading
# ----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda x: np.asarray(x), "csr_array": sp.csr_array
}
TYPES = ["float32", "float64", "int32", "int64", "uint16"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_number_type_is_read_to_the_same_values(tmp_path, layout, dtype):
    adata = screen()
    expected = adata.X.toarray()
    adata.X = LAYOUTS[layout](expected.astype(dtype))
    adata.write_h5ad(tmp_path/"x.h5ad")
    for source in (tmp_path/"x.h5ad", adata, ad.read_h5ad(tmp_path/"x.h5ad", backed="r")):
        got = load(source)
        assert isinstance(got.X, sp.csr_matrix) and got.X.dtype == np.float32 and got.X.has_canonical_format
        np.testing.assert_array_equal(got.X.toarray(), expected)
    np.testing.assert_array_equal(adata.X.toarray() if sp.issparse(adata.X) else adata.X,
                                  expected.astype(dtype))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.floats(0, 1), st.integers(1, 40), st.integers(0, 2**31))
def test_reading_in_pieces_is_reading_at_once(tmp_path_factory, n_cells, n_genes, density, piece, seed):
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random((n_cells, n_genes)) < density, rng.integers(1, 99, (n_cells, n_genes)),
                     0).astype("float32")
    path, before = tmp_path_factory.mktemp("p")/"x.h5", matrix.PIECE
    try:
        matrix.PIECE = piece
        for make in LAYOUTS.values():
            with h5py.File(path, "w") as f: ad.io.write_elem(f, "X", make(dense))
            with h5py.File(path) as f:
                np.testing.assert_array_equal(matrix.read_matrix(f, None, "x").toarray(), dense)
    finally: matrix.PIECE = before


def test_the_source_is_left_alone_and_its_arrays_are_not_shared():
    adata = screen()
    adata.X[0, 0] = 0.  # an explicit zero, which the result does not keep
    x, obs = adata.X.copy(), adata.obs.copy()
    got = load(adata, batch="lane")
    got.X.data += 1
    assert (adata.X != x).nnz == 0 and adata.X.nnz == x.nnz
    pd.testing.assert_frame_equal(adata.obs, obs)


def test_duplicate_and_unsorted_entries_of_a_sparse_file_are_put_in_order(tmp_path):
    adata = screen(2, 3)
    adata.write_h5ad(tmp_path/"x.h5ad")
    with h5py.File(tmp_path/"x.h5ad", "r+") as f:
        del f["X/data"], f["X/indices"], f["X/indptr"]
        f["X/data"], f["X/indices"], f["X/indptr"] = np.array([1., 2, 3, 4, 0], "f4"), np.array(
            [2, 0, 2, 1, 0], "i4"), np.array([0, 3, 5], "i4")
    x = load(tmp_path/"x.h5ad").X
    np.testing.assert_array_equal(x.toarray(), [[2, 0, 4], [0, 4, 0]])
    assert x.nnz == 3 and x.has_canonical_format


def test_files_of_an_older_anndata(tmp_path):
    "Before 0.7.7 the categories stood in a group of their own, as in the GEARS archives."
    adata = screen(); adata.obs["condition"] = adata.obs["condition"].astype("category")
    adata.write_h5ad(tmp_path/"old.h5ad")
    with h5py.File(tmp_path/"old.h5ad", "r+") as f:
        obs, codes, categories = f["obs"], f["obs/condition/codes"][:], f["obs/condition/categories"][:]
        obs.attrs["encoding-version"] = "0.1.0"
        del obs["condition"]
        obs["condition"], obs["__categories/condition"] = codes, categories
        obs["condition"].attrs["categories"] = obs["__categories/condition"].ref
        for name in ("encoding-type", "encoding-version"): f.attrs.pop(name, None)
        shape = f["X"].attrs["shape"]
        for name in list(f["X"].attrs): del f["X"].attrs[name]
        f["X"].attrs["h5sparse_format"], f["X"].attrs["h5sparse_shape"] = "csr", shape
    got, new = load(tmp_path/"old.h5ad"), load(adata)
    assert (got.X != new.X).nnz == 0 and (got.obs["condition"] == new.obs["condition"]).all()


def test_layers(tmp_path):
    adata = screen(); adata.layers["counts"] = adata.X.copy(); adata.X = adata.X.log1p()
    adata.write_h5ad(tmp_path/"x.h5ad")
    for source in (adata, tmp_path/"x.h5ad"):
        assert load(source).uns["biojepa"]["expression_space"] == "log1p"
        assert load(source, layer="counts").uns["biojepa"]["expression_space"] == "counts"
        with pytest.raises(SchemaError, match="no layer 'raw'; there are counts"): load(source, layer="raw")


@pytest.mark.parametrize("left", [0., 0.001, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_h5ad_is_an_error(tmp_path, h5ad, left):
    (tmp_path/"cut.h5ad").write_bytes(h5ad[:int(left*len(h5ad))])
    with pytest.raises(SchemaError, match="cut.h5ad: cannot be read as .h5ad, it is truncated"):
        load(tmp_path/"cut.h5ad")


DAMAGE = {  # structural, so that HDF5 itself still opens the file
    "no cell names": lambda f: f["obs"].__delitem__("_index"),
    "a code without a category": lambda f: f["obs/condition/codes"].__setitem__(3, 99),
    "an unknown encoding": lambda f: f["obs"].attrs.__setitem__("encoding-type", "nonsense"),
    "a column that is gone": lambda f: f["obs"].__delitem__("lane"),
    "an array that is gone": lambda f: f["X"].__delitem__("indptr"),
    "no shape": lambda f: f["X"].attrs.__delitem__("shape"),
    "names that are no text": lambda f: f["var"].attrs.__setitem__("_index", 7)}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_h5ad_is_an_error_that_names_the_file(tmp_path, what):
    adata = screen(); adata.obs["condition"] = adata.obs["condition"].astype("category")
    adata.write_h5ad(tmp_path/"x.h5ad")
    with h5py.File(tmp_path/"x.h5ad", "r+") as f: DAMAGE[what](f)
    with pytest.raises(
            SchemaError,
            match=
            "x.h5ad: cannot be read as .h5ad, it is truncated, damaged or not HDF5 .*fetch or write it again"
    ):
        load(tmp_path/"x.h5ad")


@pytest.mark.parametrize("group, change",
                        [("indices", lambda v: np.where(np.arange(len(v)) == 3, 10**6, v)),
                         ("indices", lambda v: np.where(np.arange(len(v)) == 3, -1, v)),
                         ("indptr", lambda v: v[::-1]),
                         ("indptr", lambda v: np.r_[v[:5], v[6], v[5], v[7:]]),
                         ("indptr", lambda v: v[:-1]), ("data", lambda v: v[:-2])])
def test_indices_that_cannot_be_trusted_are_refused(tmp_path, h5ad, group, change):
    (tmp_path/"x.h5ad").write_bytes(h5ad)
    with h5py.File(tmp_path/"x.h5ad", "r+") as f:
        new = change(f[f"X/{group}"][:]); del f[f"X/{group}"]; f[f"X/{group}"] = new
    with pytest.raises(SchemaError, match="contradicts its shape"): load(tmp_path/"x.h5ad")


def test_a_canonical_file_needs_no_names_and_a_prepared_one_is_refused(tmp_path):
    first = load(screen(), batch="lane", cell_type="line", guide="guide", mode="crispri", gene_name="symbol")
    first.write_h5ad(tmp_path/"x.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_dataset(tmp_path/"x.h5ad")
    pd.testing.assert_frame_equal(first.obs, again.obs); pd.testing.assert_frame_equal(first.var, again.var)
    assert (first.X != again.X).nnz == 0 and list(
        again.uns["biojepa"]["history"])[:len(first.uns["biojepa"]["history"])] == list(
            first.uns["biojepa"]["history"])
    first.obs["log_library_size"] = 1.
    with pytest.raises(SchemaError, match="already prepared; read it with anndata.read_h5ad"): load(first)


# --- columns
# ----------------------------------------------------------------------------------------------------------

def test_only_named_columns_are_used_and_the_history_says_so():
    adata = load(screen())
    assert list(adata.obs) == ["condition", "batch", "cell_type", "perturbation"]
    assert set(adata.obs["batch"]) == {"0"} and set(adata.obs["cell_type"]) == {"unknown"}
    text = "\n".join(adata.uns["biojepa"]["history"])
    for said in ("columns not used: condition, lane, line, guide", "'unknown'", "counts, detected"):
        assert said in text
    assert "as declared" in "\n".join(load(screen(), values="counts").uns["biojepa"]["history"])


def test_a_file_without_perturbations_holds_controls_and_says_so():
    adata = screen(); del adata.obs["condition"]
    with pytest.warns(UserWarning, match="every cell is taken as a control"): got = load_dataset(adata)
    assert set(got.obs["condition"]) == set(got.obs["perturbation"]) == {"ctrl"}
    assert "condition: no column, every cell is a control" in got.uns["biojepa"]["history"]


def test_perturbation_is_the_unique_intervention():
    adata = screen(); adata.obs["how"] = np.resize(["CRISPRi", "crispra", "crispra"], 40)
    assert set(load(adata).obs["perturbation"]) == {"ctrl", "G1+ctrl", "G1+G2", "G2+ctrl"}
    guided = load(adata, guide="guide").obs
    assert set(guided.loc[guided["condition"] == "G1+ctrl",
                          "perturbation"]) == {"G1+ctrl", "G1+ctrl|g1", "G1+ctrl|g2"}
    assert set(guided.loc[guided["condition"] == "ctrl", "perturbation"]) == {"ctrl"}
    modes = load(adata, guide="guide", mode="how").obs
    assert (modes.groupby("perturbation",
                          observed=True)[["condition", "guide_id",
                                          "mode"]].nunique().drop("ctrl") == 1).all(axis=None)
    assert {"G1+ctrl|g1|crispra", "G1+ctrl|g1|crispri"} < set(modes["perturbation"])
    assert set(modes.loc[modes["condition"] == "ctrl", "mode"]) == {"control"}
    assert modes["mode"].cat.categories.tolist() == ["control", "crispra", "crispri"]


def test_batches_from_cell_names():
    adata = load(screen(), batch_pattern=r"-(\d+)$")
    assert adata.obs["batch"].astype(str).tolist() == [str(1 + i % 3) for i in range(40)]


def test_gene_names_from_a_column_keep_the_index_beside_them():
    adata = screen(); adata.var.index = [f"ENSG{i}" for i in range(6)]
    got = load(adata, gene_name="symbol")
    assert list(got.var_names) == list(got.var["gene_name"]) == [f"G{i}" for i in range(6)] and list(
        got.var["gene_id"]) == list(adata.var.index)
    adata.var.loc["ENSG4", "symbol"] = "G0"
    renamed = load(adata, gene_name="symbol", duplicate_genes="rename")
    assert list(renamed.var_names) == ["G0", "G1", "G2", "G3", "G0-1", "G5"] and any(
        "occur again: G0" in h for h in renamed.uns["biojepa"]["history"])


def test_targets_that_are_not_measured():
    adata = screen(); adata.obs["condition"] = np.resize(["ctrl", "G1", "XYZ+G2"], 40)
    with pytest.warns(UserWarning, match="1 of 3 targets are not among the genes: XYZ"): load_dataset(adata)
    with pytest.raises(SchemaError, match="1 of 3 targets .* XYZ"): load_dataset(adata, unknown_targets="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset(adata, unknown_targets="allow")


def test_totals_sequences_and_what_is_kept():
    adata = screen()
    adata.obs["total"], adata.obs["mito"] = np.asarray(adata.X.sum(1)).ravel() + 100, 0.5
    adata.obs["seq"] = np.where(adata.obs["guide"] == "", None, "acgt")
    adata.uns["protein_sequences"] = {"G1": "MA"}
    got = load(adata, library_size="total", guide_seq="seq", keep=("mito", "protein_sequences"))
    assert np.array_equal(got.obs["total_counts"], adata.obs["total"]) and set(
        got.obs["guide_seq_a"]) == {"", "ACGT"}
    assert (got.obs["mito"] == 0.5).all() and got.uns["protein_sequences"] == {"G1": "MA"}


# --- the malformed list
# -----------------------------------------------------------------------------------------------

def values(value, at=(3, 2)):
    def change(adata): x = adata.X.toarray(); x[at] = value; adata.X = sp.csr_matrix(x)
    return change


def column(name, value, row=slice(None)):
    def change(adata):
        new = adata.obs.get(name, pd.Series(None, adata.obs.index, dtype=object)).astype(object).copy()
        new.iloc[row] = value
        adata.obs[name] = new
    return change


def rename(axis, row, name):
    def change(adata): names = list(getattr(adata, axis)); names[row] = name; setattr(adata, axis, names)
    return change


def scaled(adata): adata.X = sp.csr_matrix(adata.X.toarray()*10.5)
def log(adata): adata.X = adata.X.log1p()
def nothing(adata): pass


MALFORMED = {  # what: (accident, names given, message)
    "negative value": (values(-2.), {}, r"1 negative values in X, the first at cell 'c3-1', gene 'G2'"),
    "missing value": (values(np.nan), {}, r"1 NaN values in X, the first at cell 'c3-1', gene 'G2'"),
    "infinite value": (values(np.inf), {}, r"1 infinite values in X, the first at cell 'c3-1', gene 'G2'"),
    "many negative values": (values(-1., np.s_[5:7]), {}, r"12 negative values in X, the first at cell 'c5-3', "
                                                          r"gene 'G0'"),
    "logs declared counts": (log, dict(values="counts"), r"values='counts', but X holds log1p"),
    "counts declared logs": (nothing, dict(values="log1p"), r"values='log1p', but X holds counts"),
    "normalised, not logged": (scaled, {}, r"X holds fractions up to .*, neither counts nor log1p"),
    "normalised, declared logs": (scaled, dict(values="log1p"), r"values='log1p', but X holds fractions"),
    "only zeros": (values(0., np.s_[:]), {}, r"X holds only zeros"),
    "duplicate gene name": (rename("var_names", 4, "G1"), {}, r"1 gene names occur again: G1"),
    "duplicate cell name": (rename("obs_names", 7, "c0-1"), {}, r"1 cell names occur again, the first "
                                                                r"is 'c0-1'"),
    "no control cells": (column("condition", "G1"), {}, r"no control cells: no label 'ctrl' in column "
                                                        r"'condition'; the most frequent labels are G1"),
    "wrong control label": (nothing, dict(control="NT"), r"no label 'NT' in column 'condition'; the most "
                                                         r"frequent labels are ctrl"),
    "control label without a condition":
        (lambda a: a.obs.drop(columns="condition", inplace=True), dict(control="NT"), r"no condition= "
                                                                                      r"was named"),
    "unknown condition column": (nothing, dict(condition="pert"), r"condition='pert' is no column; there are "
                                                                  r"condition, lane, line, guide"),
    "unknown batch column": (nothing, dict(batch="gem"), r"batch='gem' is no column; there are"),
    "unknown cell-type column": (nothing, dict(cell_type="type"), r"cell_type='type' is no column"),
    "unknown guide column": (nothing, dict(guide="sgrna"), r"guide='sgrna' is no column"),
    "unknown gene-name column": (nothing, dict(gene_name="name"), r"gene_name='name' is no column; there "
                                                                  r"are symbol"),
    "unknown library-size column": (nothing, dict(library_size="umi"), r"library_size='umi' is no column"),
    "unknown column to keep": (nothing, dict(keep=["mito"]), r"keep=\['mito'\] is neither a column of obs nor "
                                                             r"an entry of uns"),
    "unknown mode": (nothing, dict(mode="crispr"), r"mode='crispr' is neither a column nor a mode; .*crispri"),
    "column with an unknown mode": (nothing, dict(mode="lane"), r"mode='lane' holds a, b; the modes "
                                                                r"are crispri"),
    "missing condition": (column("condition", None, 2), {},
                          r"column 'condition': 'nan' \(1 cells without a label\) name no single perturbation"),
    "missing batch": (column("lane", None, [0, 4]), dict(batch="lane"), r"batch='lane' has no value in 2 rows, "
                                                                        r"the first is 'c0-1'"),
    "missing gene name":
        (lambda a: a.var.replace({"symbol": {"G3": None}}, inplace=True), dict(gene_name="symbol"),
         r"gene_name='symbol' has no value in 1 rows, the first is 'G3'"),
    "malformed condition": (column("condition", "A++B", 2), {}, r"column 'condition': condition 'A\+\+B': an "
                                                                r"empty name"),
    "the same target twice": (column("condition", "G1+G1", 2), {}, r"condition 'G1\+G1': the same "
                                                                   r"target twice"),
    "unknown target": (column("condition", "XYZ", 1), dict(unknown_targets="error"), r"1 of 3 targets are not "
                                                                                     r"among the genes: XYZ"),
    "cell names without a batch":
        (rename("obs_names", 0, "c0"), dict(batch_pattern=r"-(\d+)$"),
         r"batch_pattern=.* must capture one group in every cell name"),
    "two sources of batches": (nothing, dict(batch="lane", batch_pattern="-(.)"), r"give batch= or "
                                                                                  r"batch_pattern=, not both"),
    "guide that is not DNA": (column("seq", "ACGU"), dict(guide_seq="seq"), r"guide_seq='seq' holds 'ACGU' in "
                                                                            r"cell 'c0-1'; only the letters "
                                                                            r"A C G T N"),
    "no guide column": (nothing, dict(guide_seq=[]), r"name one column or two"),
    "unknown target to drop": (nothing, dict(drop=["G2", "SEM1"]), r"drop names SEM1, which no condition "
                                                                   r"has; correct"),
    "control to drop": (nothing, dict(drop="ctrl"), r"drop names ctrl, which no condition has"),
    "library size that is no number": (column("n", "many"), dict(library_size="n"), r"library_size='n' is not "
                                                                                    r"a positive number in 40 "
                                                                                    r"cells, the first "
                                                                                    r"is 'c0-1'"),
    "library size below the counts":
        (lambda a: a.obs.insert(0, "n", 1), dict(library_size="n"),
         r"library_size='n' is less than the counts in X in \d+ cells"),
    "X of text": (lambda a: setattr(a, "X", a.X.toarray().astype(str)), {}, r"X holds <U\d+, not numbers"),
    "no X": (lambda a: setattr(a, "X", None), {}, r"it has no X; name one of its layers \(none\) with layer="),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_input_is_named(what, tmp_path):
    accident, names, message = MALFORMED[what]
    adata = screen()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accident(adata)
    with pytest.raises(SchemaError, match=message): load(adata, **names)
    if what in ("X of text", "duplicate gene name", "duplicate cell name"):
        return  # anndata does not write, or read, these as they are
    adata.write_h5ad(tmp_path/"lab.h5ad")
    with pytest.raises(SchemaError, match=f"lab.h5ad: .*{message}"): load(tmp_path/"lab.h5ad", **names)


@pytest.mark.parametrize("cells, genes", [(0, 6), (40, 0), (0, 0)])
def test_an_empty_matrix_is_an_error(cells, genes, tmp_path):
    for x in (np.zeros((cells, genes), "float32"), sp.csr_matrix((cells, genes), dtype="float32")):
        adata = ad.AnnData(x, pd.DataFrame({"condition": ["ctrl"]*cells}, index=[str(i) for i in range(cells)]))
        adata.write_h5ad(tmp_path/"x.h5ad")
        for source in (adata, tmp_path/"x.h5ad"):
            with pytest.raises(SchemaError, match=f"an empty matrix, {cells} cells × {genes} genes"):
                load(source)


def test_neither_file_nor_card(tmp_path):
    with pytest.raises(SchemaError,
                       match="'norman2': neither a file nor a dataset; the datasets are adamson"):
        load("norman2")
    with pytest.raises(SchemaError, match="neither a file"): load(tmp_path)
    with h5py.File(tmp_path/"x.h5ad", "w") as f: f["X"] = np.ones((2, 2))
    with pytest.raises(SchemaError, match="not an AnnData file, it has no obs and no var; it holds X"):
        load(tmp_path/"x.h5ad")
    (tmp_path/"x.h5ad").write_text("condition,G1\nctrl,3\n")
    with pytest.raises(SchemaError, match="x.h5ad: cannot be read as .h5ad"): load(tmp_path/"x.h5ad")


def test_every_error_is_a_value_error():
    assert issubclass(SchemaError, ValueError) and issubclass(DownloadError, ValueError)


# --- memory
# -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout, bound", [("csr", 1.4), ("csc", 2.4), ("dense", 2.2)])
def test_the_peak_is_bounded_by_the_size_of_the_result(tmp_path, layout, bound, monkeypatch):
    """Highest allocation while loading, against the bytes of the CSR result; a layer that was not asked for is not
    read."""
    counts = np.random.default_rng(0).poisson(0.6, (4000, 1000)).astype("float32")
    adata = ad.AnnData(
        LAYOUTS[layout](counts),
        pd.DataFrame({"condition": np.resize(["ctrl", "A"], 4000)}, index=[f"c{i}" for i in range(4000)]))
    adata.layers["counts"] = counts
    adata.write_h5ad(tmp_path/"big.h5ad")
    for module in (matrix, values_module):  # pieces as small beside this matrix as real ones beside a real screen
        monkeypatch.setattr(module, "PIECE", 1 << 17)
    tracemalloc.start()
    x = load(tmp_path/"big.h5ad").X
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = x.data.nbytes + x.indices.nbytes + x.indptr.nbytes
    assert peak < bound*size, f"peak {peak/size:.2f} times the result"


# --- real files
# -------------------------------------------------------------------------------------------------------

def test_twin(shared):
    adata = load(shared/"k562_essential_twin.h5ad",
                 condition="condition",
                 control="ctrl",
                 batch="gem_group",
                 guide="guide_id",
                 cell_type="cell_type",
                 guide_seq=("guide_seq_a", "guide_seq_b"),
                 mode="crispri",
                 values="counts")
    original = ad.read_h5ad(shared/"k562_essential_twin.h5ad")
    assert adata.shape == (15846, 2000) and adata.X.dtype == np.float32
    for part in ("data", "indices", "indptr"):
        assert np.array_equal(getattr(adata.X, part), getattr(original.X, part)), part
    assert (adata.obs["condition"].astype(str) == original.obs["condition"].astype(str)).all()
    assert adata.obs["condition"].nunique() == 653 and (
        adata.obs["condition"] == "ctrl").sum() == 1500 and adata.obs["batch"].nunique() == 12
    assert adata.obs["perturbation"].nunique() == 654 and adata.uns["biojepa"]["expression_space"] == "counts"


def test_papalexi(shared):
    adata = load(shared/"papalexi21_thp1_crisprko.h5ad",
                 condition="perturbation",
                 control="control",
                 batch="batch",
                 guide="guide",
                 library_size="n_umi_total",
                 mode="knockout")
    assert adata.shape == (20729,
                           299) and (adata.obs["condition"]
                                     == "ctrl").sum() == 2386 and adata.obs["condition"].nunique() == 26
    assert "STAT2+ctrl" in adata.obs["condition"].cat.categories and "STAT2+ctrl|STAT2g2" in adata.obs[
        "perturbation"].cat.categories
    assert (adata.obs["total_counts"] >= np.asarray(adata.X.sum(1)).ravel()).all() and set(
        adata.obs["mode"]) == {"control", "knockout"}


def test_norman_and_mcfaline(shared):
    adata = load(shared/"norman19_mcfaline23_hvg500.h5ad",
                 condition="condition",
                 control="control",
                 batch="cell_type",
                 cell_type="cell_type",
                 library_size="ncounts",
                 mode="perturbation_type")
    assert adata.shape == (5961, 500) and adata.uns["biojepa"]["expression_space"] == "log1p" and (
        adata.obs["condition"] == "ctrl").sum() == 400
    assert "KLF1+SET" in adata.obs["condition"].cat.categories and "SET+KLF1" not in adata.obs[
        "condition"].cat.categories
    rows = adata.obs["condition"] == "MAP2K3+ctrl"
    assert set(adata.obs.loc[rows, "perturbation"]) == {"MAP2K3+ctrl|crispra", "MAP2K3+ctrl|crispri"}
    assert adata.obs.drop_duplicates(["perturbation", "mode"])["perturbation"].is_unique


def test_pbmc(shared):
    with pytest.warns(UserWarning, match="every cell is taken as a control"):
        adata = load_dataset(shared/"pbmc4k_10x.h5ad")
    assert adata.shape == (2170, 15195) and set(
        adata.obs["condition"]) == {"ctrl"} and adata.uns["biojepa"]["expression_space"] == "counts"
