"""Paper notebooks run by papermill, and what is committed of them is what they write today.

1. Each runs on the smoke preset and enters what it writes into the manifest.
2. Each states its parameters, typed and explained, and gives their names to nothing else.
3. What is committed was executed with this code, these parameters, on the listed run; its files are the listed ones.
4. A second notebook on the folder of a first run trains nothing anew."""
import ast
import json
import os
import subprocess
import sys

import pytest

from biojepa.core import PATHS
from biojepa.report.manifest import check_manifest, code_hash, parameters_of, read_manifest, stamp_of

NOTEBOOKS = sorted(p.stem for p in PATHS.nbs.glob("[89]*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("paper")


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell): return "".join(cell["source"])


def run(name, folder, **parameters):
    "A paper notebook in a process of its own, as a user starts it."
    parameters = dict(preset="smoke", runs=str(folder/"runs"), out_folder=str(folder/name)) | parameters
    options = [word for k, v in parameters.items() for word in ("-p", k, str(v))]
    files = [str(PATHS.nbs/f"{name}.ipynb"), str(folder/f"{name}.ipynb")]
    call = [sys.executable, "-m", "papermill", *files, "--no-progress-bar", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, cwd=PATHS.root, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder/f"{name}.ipynb"


@pytest.mark.parametrize("name",
                        [n if n < "91" else pytest.param(n, marks=pytest.mark.slow) for n in NOTEBOOKS])
def test_runs_on_the_smoke_preset(name, folder):
    executed = run(name, folder, **(dict(cost_steps=0) if name == "80_train" else {}))
    listed, entries = check_manifest(folder/name), read_manifest(folder/name)
    assert len(listed) > 1 and (listed.state == "as listed").all()
    assert {file.rsplit(".", 1)[1] for file in listed.file} == {"png", "csv"}
    assert (listed.notebook == name).all() and list(entries["notebooks"]) == [name]
    about = entries["notebooks"][name]
    assert {"made_from", "versions", "commit", "parameters", "code"} <= set(about)
    assert about["parameters"]["preset"] == "smoke" and about["code"] == code_hash(PATHS.nbs/f"{name}.ipynb")
    assert not any(o.get("output_type") == "error" for c in cells(executed) for o in c["outputs"])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_parameters_are_tagged_typed_explained_and_their_names_used_for_nothing_else(name):
    code = cells(PATHS.nbs/f"{name}.ipynb")
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and "settings: str" in source(tagged[0])
    assert sum("settings=settings" in source(c) for c in code) == 1
    for line in source(tagged[0]).splitlines():
        if line.strip():
            assert ": " in line.split("=")[0] and "#" in line, f"{line!r}: give a type and a comment"
    names = [
        n for c in code if c not in tagged for n in ast.walk(ast.parse(source(c)))
        if isinstance(n, ast.Name)
    ]
    assigned = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    assert not assigned & set(parameters_of(PATHS.nbs/f"{name}.ipynb")), "the stamp would tell another value"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_of_this_code_these_parameters_and_the_listed_files(name):
    path, entries = PATHS.nbs/f"{name}.ipynb", read_manifest(PATHS.figures)
    code = cells(path)
    assert source(code[-1]) == "report.stamp(globals())"
    assert code[-1]["outputs"], f"{name} is committed without outputs; run make figures"
    assert not any("injected-parameters" in c["metadata"].get("tags", [])
                   for c in code), "not run on the default"
    stamp = ast.literal_eval("".join(code[-1]["outputs"][0]["data"]["text/plain"]))
    assert stamp["code"] == code_hash(path), f"{name} was edited after it was executed; run make figures"
    assert stamp["parameters"] == parameters_of(path)
    assert stamp == stamp_of(entries, name), f"{name} and figures/ are of two different executions"
    shown = [kind for c in code for o in c["outputs"] for kind in o.get("data", ())]
    assert "image/png" in shown and ("text/html" in shown or "text/markdown" in shown)
    assert not any(o.get("name") == "stderr" for c in code for o in c["outputs"]), f"{name} holds progress bars"


def test_a_run_folder_stands_for_its_parameters(folder):
    def smoke():  # 98 leaves runs on screens of its own beside the preset's
        return [
            f.parent for f in (folder/"runs").glob("*/config.json")
            if json.loads(f.read_text())["name"] == "smoke"
        ]
    if not smoke(): run("80_train", folder, cost_steps=0)
    before, out = sorted((folder/"runs").glob("*-0")), folder/"again"
    given = dict(preset="paper", run=str(smoke()[0]), baselines="train_mean; control_mean")
    run("90_eval", folder, out_folder=str(out), **given)
    assert sorted((folder/"runs").glob("*-0")) == before and (out/"table1_published_protocol.csv").is_file()
