"""The report's experiment by its command, from the archive to Table 1, with a small model and what goes wrong.

The archive is the twin (simulated) in GEARS' packaging: values on a log scale, targets and barcodes, and nothing about
guides. 1. What a cut connection or a killed process leaves is never taken for the file; the next call completes it.
2. The paper preset without weights stops before training, and says what to fetch and which two choices need none.
3. Killed while training, the same command goes on from the last checkpoint: nothing before it is done again.
4. Table 1 stands beside the report's values and both constants. 5. The run says which cells were left out and how many
guides and proteins were joined. 6. Its notebook does not grow with the number of steps.
"""
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import psutil
import pytest
import scipy.sparse as sp

from biojepa.core import PATHS

sys.path.insert(0, str(Path(__file__).parent))
from test_datasets import Server

pytestmark = pytest.mark.slow

NAME = "replogle_k562_essential"
DROPPED = {"FAU": 7, "SEM1": 5}     # cells of two targets that the card leaves out
N_TARGETS, N_CONTROLS, N_GENES = 64, 700, 400
SMALL = ("model.d_model=16 model.n_heads=2 model.n_encoder_layers=1 model.n_masked_predictor_layers=1 "
         "model.n_predictor_layers=1 pretrain.epochs=1 align.epochs=4 align.batch_size=16 "
         "dynamics.epochs=4 readout.epochs=1")


def gears_cells(twin, proteins):
    "Cells of the twin as GEARS packs them; three quarters of the targets have a known protein."
    cells, rng = ad.read_h5ad(twin), np.random.default_rng(0)
    condition = cells.obs["condition"].astype(str).to_numpy()
    target = np.array([c.removesuffix("+ctrl") for c in condition])
    known = np.isin(target, proteins)
    of = lambda rows, n: list(pd.unique(target[rows & (target != "ctrl")]))[:n]
    chosen = of(known, N_TARGETS*3//4) + of(~known, N_TARGETS//4)
    controls = rng.permutation(np.flatnonzero(target == "ctrl"))[:N_CONTROLS + sum(DROPPED.values())]
    rows = np.sort(np.r_[controls, np.flatnonzero(np.isin(target, chosen))])
    condition[controls[N_CONTROLS:]] = np.repeat([f"{gene}+ctrl" for gene in DROPPED], [*DROPPED.values()])
    counts, names = cells.X.tocsr()[rows], cells.var["gene_name"].to_numpy()
    order = np.lexsort((-np.asarray(counts.mean(0)).ravel(), ~np.isin(names, chosen)))[:N_GENES]
    totals = np.asarray(counts.sum(1)).ravel()
    X = sp.csr_matrix(np.log1p(counts.multiply(np.median(totals)/totals[:, None]))).astype("float32")
    gem_groups = cells.obs["gem_group"].astype(str).str.removeprefix("gem").to_numpy()[rows]
    obs = pd.DataFrame(dict(condition=condition[rows], cell_type="K562", dose_val="1+1"),
                       index=[f"AAACCC{i:06d}-{g}" for i, g in enumerate(gem_groups)])
    var = pd.DataFrame(dict(gene_name=names[order]), index=cells.var["ensembl_id"].to_numpy()[order])
    return ad.AnnData(X[:, order], obs, var)


def packed(cells, path):
    "The archive's bytes."
    cells.write_h5ad(path)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z: z.write(path, f"{NAME}/perturb_processed.h5ad")
    return archive.getvalue()


def card(archive, guides, proteins):
    "The project's card, with the addresses of this test and tables of simpler kinds."
    head, table, rest = (PATHS.cards/f"{NAME}.toml").read_text().partition("[companions.guides]")
    columns = re.findall(r"^(?:guide|gene|sequence) = .*$", rest.partition("\n[")[0], re.M)
    return "\n".join([
        re.sub(r"^url = .*$", f'url = "{archive}"', head, flags=re.M), table, 'file = "guides.csv.gz"',
        f'url = "{guides}"', *columns, "[companions.proteins]", 'file = "proteins.csv.gz"',
        f'url = "{proteins}"', 'gene = "gene"', 'sequence = ["seq"]'
    ])


class Rehearsal:
    "The command, started again and again in the same folders; what each start reached is noted with its second."
    STEPS = {
        "guides are there": f"raw/{NAME}/guides.csv.gz", "proteins are there":
        f"raw/{NAME}/proteins.csv.gz", "archive is there": f"raw/{NAME}/{NAME}.zip", "cells are taken out":
        f"raw/{NAME}/perturb_processed.h5ad", "split is drawn": "runs/splits/*.json", "run is opened":
        "runs/*-0/run.json", **{
            f"{stage} begins": f"runs/*-0/{stage}" for stage in ("pretrain", "align", "dynamics", "readout")
        }, "model is saved": "runs/*-0/model/config.json", "predictions are saved":
        "runs/*-0/predictions.h5ad", "Table 1 is written": "figures/table1_published_protocol.csv"
    }

    ANSWERS = {
        "truncated": "connection cut midway", "slow": "stalls midway", "short zip": "half of it, no length",
        "ok": "whole"
    }

    def __init__(self, folder, archive):
        self.folder, self.archive, self.rows, self.starts, self.process = folder, archive, [], 0, None

    def start(self, *options):
        "A process as a user would start it, on a machine that reaches no host but itself."
        moved = {
            f"BIOJEPA_{name.upper()}": str(self.folder/name)
            for name in ("cards", "raw", "splits", "processed")
        }
        closed = "http://127.0.0.1:9"
        offline = dict(HTTP_PROXY=closed, HTTPS_PROXY=closed, NO_PROXY="127.0.0.1", HF_HUB_OFFLINE="1")
        given = dict(dataset=NAME, preset="paper", settings=SMALL, runs=self.folder/"runs",
                     out_folder=self.folder/"figures")
        words = [word for name, value in given.items() for word in ("-p", name, str(value))]
        self.starts, self.began = self.starts + 1, time.monotonic()
        self.errors = open(self.folder/f"errors-{self.starts}.txt", "w+")
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "papermill", "nbs/90_eval.ipynb",
                str(self.folder/"out.ipynb"), "--no-progress-bar", *words, *options
            ],
            stdout=self.errors,
            stderr=self.errors,
            cwd=PATHS.root,
            start_new_session=True,
            env={**os.environ, **moved, **offline, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"})

    def note(self, step):
        self.rows.append(dict(start=self.starts, step=step, seconds=round(time.monotonic() - self.began, 1)))

    def look(self):
        "Note the steps that were reached since the last look."
        known = {row["step"] for row in self.rows}
        for n, answer in enumerate(self.archive.script[:self.archive.requests], 1):
            if (step := f"archive, request {n}: {self.ANSWERS[answer]}") not in known: self.note(step)
        for step, place in self.STEPS.items():
            if step not in known and any(self.folder.glob(place)): self.note(step)

    def until(self, ready, limit=400):
        "Wait until `ready()`, or the end of the process if that is None; its exit status."
        while self.process.poll() is None and not (ready and ready()):
            assert time.monotonic() - self.began < limit, f"{limit} s: {self.rows}"
            self.look()
            time.sleep(.02)
        self.look()
        return self.process.poll()

    def kill(self, why):
        "End the command and its kernel at once, as a power failure would."
        everyone = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for process in everyone: process.send_signal(signal.SIGKILL)
        for process in everyone: process.wait()
        self.note(why)

    def said(self):
        self.errors.seek(0)
        return self.errors.read()

    def log(self):
        "What happened, one row a step."
        return pd.DataFrame(self.rows)


def half_written(raw, least=1 << 20):
    return [
        p for p in raw.rglob("*")
        if p.name.startswith(("tmp", ".")) and p.is_file() and p.stat().st_size >= least
    ]


def contents(folder):
    "Bytes of every file; a log's tell when it was made, by its cells per second."
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def story(shared, tmp_path_factory):
    "Four starts of one command: killed in the download, stopped for want of weights, killed in training, finished."
    folder = tmp_path_factory.mktemp("rehearsal")
    for name in ("cards", "raw", "figures"): (folder/name).mkdir()
    tables = [shared/"k562_essential_guides_day6.csv.gz", shared/"protein_sequences_partial.csv.gz"]
    cells = gears_cells(shared/"k562_essential_twin.h5ad", pd.read_csv(tables[1])["gene"].unique())
    seen = dict(folder=folder, cells=cells)
    with (Server(packed(cells, folder/"cells.h5ad"), ["truncated", "slow", "short zip", "ok"]) as archive,
          Server(tables[0].read_bytes(), ["short zip", "ok"]) as guides,
          Server(tables[1].read_bytes(), ["ok"]) as proteins):
        (folder/f"cards/{NAME}.toml").write_text(card(archive.url, guides.url, proteins.url))
        r, requests = Rehearsal(folder, archive), lambda: (guides.requests, proteins.requests, archive.requests)

        r.start("-p", "features", "kmer")
        assert r.until(lambda: archive.requests == 2 and half_written(folder/"raw")) is None, r.said()[-2000:]
        r.kill("killed in the download, half of the archive written")
        seen["after_kill"] = dict(files={p.name for p in (folder/"raw").rglob("*") if p.is_file()},
                                  requests=requests())

        r.start()
        seen["without_weights"] = (r.until(None), r.said(), requests(), [*(folder/"runs").glob("*-0")])
        r.note("stopped: no weights, no training")

        r.start("-p", "features", "kmer")
        ready = lambda: [*(folder/"runs").glob("*-0/dynamics/checkpoints/step-*.json")]
        assert r.until(ready) is None, r.said()[-2000:]
        time.sleep(1.)
        r.kill("killed in dynamics")
        [run] = (folder/"runs").glob("*-0")
        seen["killed_run"] = {stage: contents(run/stage) for stage in ("pretrain", "align", "dynamics")}

        r.start("-p", "features", "kmer")
        seen["last"], seen["requests"] = r.until(None, limit=600), requests()
        r.note("notebook is finished")
    seen |= dict(run=run, said=r.said(), log=r.log())
    r.log().to_csv(folder/"rehearsal_log.csv", index=False)
    return seen


def test_what_was_cut_or_killed_is_never_taken_for_the_file(story):
    files, requests = story["after_kill"]["files"], story["after_kill"]["requests"]
    assert requests == (2, 1, 2)  # the guides came whole at the second attempt; so did not the archive
    assert not files & {f"{NAME}.zip", "perturb_processed.h5ad", "record.json"} and "guides.csv.gz" in files
    assert story["requests"] == (
        2, 1, 4)  # a third one without its length and cut, a fourth one whole; then none
    with zipfile.ZipFile(story["folder"]/f"raw/{NAME}/{NAME}.zip") as z: assert z.testzip() is None
    read = ad.read_h5ad(story["folder"]/f"raw/{NAME}/perturb_processed.h5ad")
    assert (read.X != story["cells"].X).nnz == 0


def test_without_weights_it_stops_before_training_and_says_what_to_do(story):
    status, said, requests, runs = story["without_weights"]
    assert status != 0 and not runs and requests == story["requests"]
    place = re.escape(str(story["folder"]/"raw/models/esm2_t6_8M_UR50D.pt"))
    assert re.search(
        rf"MissingWeightsError: esm2_t6_8M_UR50D.pt: .*Download the file from https://\S+ to {place}", said)
    assert "-p features kmer" in said and "-p relations FILE" in said


def test_what_was_trained_before_the_kill_is_not_trained_again(story):
    killed, run = story["killed_run"], story["run"]
    for stage in ("pretrain", "align"): assert contents(run/stage) == killed[stage]
    last = max(
        int(Path(name).stem.removeprefix("step-")) for name in killed["dynamics"] if name.endswith(".json"))
    log, before = pd.read_csv(run/"dynamics/log.csv"), pd.read_csv(io.BytesIO(killed["dynamics"]["log.csv"]))
    kept = before[before["step"] <= last]
    assert kept["cells_per_second"].notna().sum() >= 3
    pd.testing.assert_frame_equal(log.iloc[:len(kept)], kept,
                                  check_exact=True)  # cells per second, too: no step anew
    assert log["step"].is_monotonic_increasing and last < log["step"].iloc[-1] and log["epoch"].iloc[-1] == 4


def test_the_notebook_does_not_grow_with_the_steps(story):
    cells = json.loads((story["folder"]/"out.ipynb").read_text())["cells"]
    texts = ["".join(o["text"]) for c in cells for o in c.get("outputs", []) if o["output_type"] == "stream"]
    drawn = sum("dynamics:" in text for text in texts)
    seconds = pd.read_csv(story["folder"]/"figures/training_time.csv").set_index("stage")["seconds"]["dynamics"]
    assert 2 <= drawn <= 4 + seconds/5      # every tenth of a second before: 91 lines for 87 steps


def test_table_1_stands_beside_the_report_and_both_constants(story):
    assert story["last"] == 0, story["said"][-3000:]
    table = pd.read_csv(story["folder"]/"figures/table1_published_protocol.csv").set_index("quantity")
    assert {"report", "biojepa", "control_mean", "train_mean", "meaning"} <= set(table)
    assert np.isfinite(table[["biojepa", "control_mean", "train_mean"]].to_numpy(float)).all()
    assert table["report"].notna().sum() >= 5 and table["biojepa"].nunique() == len(table)
    assert (table["biojepa"] != table["control_mean"]).all()


def test_the_run_says_what_was_left_out_and_what_was_joined(story):
    history = json.loads((story["run"]/"run.json").read_text())["history"]
    [dropped] = [line for line in history if line.startswith("drop: ")]
    n = sum(DROPPED.values())
    assert dropped.startswith(f"drop: {n} cells of 2 targets left out")
    assert all(f"{gene} ({k})" in dropped for gene, k in DROPPED.items())
    [guides] = [line for line in history if line.startswith("guide_seq of guides.csv.gz")]
    [proteins] = [line for line in history if line.startswith("protein_sequences of proteins.csv.gz")]
    assert re.search(rf"{N_TARGETS} of {N_TARGETS} targets by gene", guides), guides
    assert f"{N_TARGETS*3//4} of {N_TARGETS} targets" in proteins
    trained = ad.read_h5ad(story["run"]/"predictions.h5ad")
    assert not trained.obs["condition"].isin([f"{g}+ctrl" for g in DROPPED]).any()
    assert trained.obs["batch"].nunique() == 12
