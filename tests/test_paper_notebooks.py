"Every paper notebook runs by papermill on the smoke preset, and enters what it writes into the manifest."
import json
import os
import subprocess
import sys

import pytest

from biojepa.core import PATHS
from biojepa.report.manifest import check_manifest

NOTEBOOKS = sorted(p.stem for p in PATHS.nbs.glob("[89]*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("paper")


def run(name, folder, **parameters):
    "A paper notebook in a process of its own, as a user starts it."
    parameters = dict(preset="smoke", runs=str(folder/"runs"), out_folder=str(folder/name)) | parameters
    options = [word for k, v in parameters.items() for word in ("-p", k, str(v))]
    done = subprocess.run([
        sys.executable, "-m", "papermill",
        str(PATHS.nbs/f"{name}.ipynb"),
        str(folder/f"{name}.ipynb"), "--no-progress-bar", *options
    ],
                          capture_output=True,
                          text=True,
                          cwd=PATHS.root,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
                          timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder/f"{name}.ipynb").read_text())


@pytest.mark.parametrize("name", [n if n < "91" else pytest.param(n, marks=pytest.mark.slow) for n in NOTEBOOKS])
def test_runs_on_the_smoke_preset(name, folder):
    extra = dict(cost_steps=0) if name == "80_train" else {}
    notebook = run(name, folder, **extra)
    listed = check_manifest(folder/name)
    assert len(listed) > 1 and (listed.state == "as listed").all() and listed.file.str.endswith(
        ".png").any() and listed.file.str.endswith(".csv").any()
    assert (listed.notebook == name).all()
    written = json.loads((folder/name/"MANIFEST.json").read_text())
    assert all({"sha256", "made_from", "versions", "commit"} <= set(entry) for entry in written.values())
    assert not any(o.get("output_type") == "error" for c in notebook["cells"] for o in c.get("outputs", []))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_parameters_are_tagged_typed_and_explained(name):
    cells = json.loads((PATHS.nbs/f"{name}.ipynb").read_text())["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert sum("settings=settings" in "".join(c["source"])
               for c in cells) == 1 and "settings: str" in "".join(tagged[0]["source"])
    for line in "".join(tagged[0]["source"]).splitlines():
        if line.strip():
            assert ": " in line.split("=")[0] and "#" in line, f"{line!r}: give a type and a comment"


def test_a_run_folder_stands_for_its_parameters(folder):
    "A second notebook on the folder of a first run trains nothing anew."
    made = sorted((folder/"runs").glob("*-0"))
    if not made: run("80_train", folder, cost_steps=0)
    before = sorted((folder/"runs").glob("*-0"))
    run("90_eval",
        folder,
        preset="paper",
        run=str(before[0]),
        out_folder=str(folder/"again"),
        baselines="train_mean; control_mean")
    assert sorted((folder/"runs").glob("*-0")) == before and (folder/"again"/
                                                              "table1_published_protocol.csv").is_file()
