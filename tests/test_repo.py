"""What keeps the repository honest.

1. Exported modules are in step with their notebooks, and a folder of notebooks is a folder of the package.
2. Notebooks are clean and light, and hold their outputs: pictures too, no traceback, no path of one machine.
3. A module imports only from what stands before it; plots import nothing else of the package.
4. One version, one set of pins.
5. Lines can be read (tests/house.py has the numbers), imports are sorted.
6. Nothing is unpickled, library code never prints."""
import ast
import configparser
import itertools
import re
import tomllib
from pathlib import Path

import house
import pytest
import yaml
from execnb.nbio import read_nb
from house import cells, source
from nbdev.clean import clean_nb
from nbdev.export import nb_export

from biojepa import __version__
from biojepa.core import PATHS

NOTEBOOKS = house.notebooks()
LIBRARY = [n for n in NOTEBOOKS if n.parent != PATHS.nbs]
PAPER = [n for n in NOTEBOOKS if n.parent == PATHS.nbs and n.stem != "index"]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(PATHS.root/"settings.ini")
SETTINGS = SETTINGS["DEFAULT"]


def place(path):
    "Folder and name of a notebook, as `3_model/09_losses`."
    return path.relative_to(PATHS.nbs).with_suffix("").as_posix()


def module_of(path):
    "The module a notebook exports to, or None."
    found = re.search(r"^#\|\s*default_exp (\S+)", "\n".join(map(source, cells(path))), re.M)
    return found and "biojepa." + found[1]


MODULES = {module_of(nb): nb for nb in NOTEBOOKS if module_of(nb)}


def package_imports(path):
    "Modules of this package that a Python file imports, at any depth (nbdev writes them as relative imports)."
    parents = ["biojepa", *path.relative_to(PATHS.root/"biojepa").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert [n.name for n in node.names] != ["*"], f"{path.name}: star import of {node.module}"
            if node.level: yield ".".join([*parents[:len(parents) - node.level + 1], node.module])
            elif node.module.split(".")[0] == "biojepa": yield node.module
        if isinstance(node, ast.Import):
            yield from (n.name for n in node.names if n.name.split(".")[0] == "biojepa")


@pytest.mark.parametrize("notebook", MODULES.values(), ids=place)
def test_exported_module_is_in_step_with_its_notebook(notebook, tmp_path):
    module = module_of(notebook)
    nb_export(notebook, lib_path=tmp_path/"biojepa")  # the folder name decides which imports become relative
    relative = Path(*module.split(".")[1:]).with_suffix(".py")
    def body(folder):  # the comments hold the notebook's path as seen from the module
        return re.sub(r"\S*/nbs/", "nbs/", (folder/"biojepa"/relative).read_text())
    assert body(tmp_path) == body(PATHS.root), f"{relative} differs from {notebook.name}; run nbdev_export"


def test_every_module_has_a_notebook():
    written = "__init__.py", "__main__.py"
    files = [p.relative_to(PATHS.root).with_suffix("") for p in house.modules() if p.name not in written]
    assert {".".join(f.parts) for f in files} == set(MODULES)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=place)
def test_notebook_is_clean_light_and_without_machine_paths(notebook):
    nb, before = read_nb(notebook), read_nb(notebook)
    clean_nb(nb, allowed_cell_metadata_keys={"tags"}, clean_ids=True)
    assert nb == before, f"{notebook.name} holds metadata or counts; run nbdev_clean"
    assert notebook.stat().st_size < 300_000, f"{notebook.name}: outputs too heavy"
    path = re.search(r"(?<![\w.])/(home|root|work|Users|tmp)/.*", notebook.read_text())
    assert not path, f"{notebook.name} shows a path of one machine: {path[0]}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=place)
def test_outputs_are_what_a_reader_wants_to_see(notebook):
    for output in (o for c in cells(notebook, "code") for o in c["outputs"]):
        assert output["output_type"] != "error", f"{notebook.name} holds a traceback"
        data = output.get("data", {})
        named = "".join(data.get("text/plain", "")).startswith("<Figure")
        assert not named or "image/png" in data, f"{notebook.name} names a figure; execute it without MPLBACKEND"


@pytest.mark.parametrize("notebook", LIBRARY, ids=place)
def test_library_notebook_is_committed_with_its_outputs(notebook):
    assert any(c["outputs"]
               for c in cells(notebook, "code")), f"{notebook.name} has no outputs; run make notebooks"
    first = cells(notebook)[0]
    assert first["cell_type"] == "markdown" and "\n> " in source(first)


@pytest.mark.parametrize("notebook", PAPER, ids=place)
def test_paper_notebook_is_skipped_by_nbdev_and_has_parameters(notebook):
    first = cells(notebook)[0]
    assert first["cell_type"] == "raw" and "skip_exec: true" in source(first)
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells(notebook)) == 1
    assert module_of(notebook) is None, "a paper notebook holds no logic of its own"


@pytest.mark.parametrize("notebook", LIBRARY, ids=place)
def test_a_folder_of_notebooks_is_a_folder_of_the_package(notebook):
    folder = re.fullmatch(r"\d_(\w+)", notebook.parent.name)[1]
    name = re.fullmatch(r"\d\d_(\w+)", notebook.stem)[1]
    top_level = {"0_base/01_core", "0_base/02_config", "0_base/03_locks", "1_data/25_datasets", "4_training/09_cli"}
    expected = f"biojepa.{name}" if place(notebook) in top_level else f"biojepa.{folder}.{name}"
    assert module_of(notebook) == expected


def test_numbers_of_folders_and_notebooks_have_no_gap():
    folders = sorted({n.parent.name for n in LIBRARY})
    assert [f[0] for f in folders] == [str(i) for i in range(len(folders))]
    for folder in folders:
        numbers = [int(n.stem[:2]) for n in LIBRARY if n.parent.name == folder]
        assert numbers == list(range(1, len(numbers) + 1)), folder


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_module_imports_only_from_what_stands_before_it(module):
    for imported in package_imports(PATHS.root/Path(*module.split(".")).with_suffix(".py")):
        assert imported in MODULES, f"{module} imports {imported}, which no notebook exports"
        assert place(MODULES[imported]) < place(MODULES[module]), f"{module} imports upwards: {imported}"


def test_plots_import_nothing_else_of_the_package():
    for module in (m for m in MODULES if m.startswith("biojepa.plots.")):
        imported = set(package_imports(PATHS.root/Path(*module.split(".")).with_suffix(".py")))
        assert all(m.startswith("biojepa.plots.") or m == "biojepa.core" for m in imported), module


def pins(lines):
    "name -> version of every pinned requirement."
    return dict(line.strip().split("==") for line in lines if re.match(r"\s*[\w.-]+==", line))


def test_environment_yml_has_the_pins_of_the_lock():
    lock = pins((PATHS.root/"requirements.lock").read_text().splitlines())
    environment = yaml.safe_load((PATHS.root/"environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pins(pip) == lock and len(lock) > 100
    assert f"python={SETTINGS['min_python']}" in conda
    assert lock["torch"] == "2.13.0" and lock["nbdev"].startswith("2.")


def test_settings_ini_is_the_one_place_for_name_and_version():
    project = tomllib.loads((PATHS.root/"pyproject.toml").read_text())["project"]
    assert project["name"] == SETTINGS["lib_name"] == "biojepa"
    assert "version" not in project and "version" in project["dynamic"]
    assert __version__ == SETTINGS["version"]


def test_no_code_unpickles():
    for path in house.modules():
        nodes = list(ast.walk(house.tree_of(path)))
        names = {n.name for node in nodes if isinstance(node, ast.Import) for n in node.names}
        assert not names & {"pickle", "dill", "joblib", "cloudpickle"}, f"{path.name} imports a pickle reader"
        calls = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
        for call in (c for c in calls if c.func.attr == "load"):
            keywords = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
            torch = getattr(call.func.value, "id", "") == "torch"
            assert not torch or keywords.get(
                "weights_only") is True, f"{path.name}: torch.load without weights_only"
            assert not keywords.get("allow_pickle"), f"{path.name}: allow_pickle"


def test_code_parses_as_python_3_11_and_prints_nothing():
    for path in house.modules():
        tree = ast.parse(path.read_text(), feature_version=(3, 11))
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert "print" not in calls, f"{path.name}: library code does not print"


def test_no_line_is_too_wide_to_read():
    found = [line for lines in house.wide().values() for line in lines]
    assert not found, f"{len(found)} lines over {house.MAX_LINE} columns:\n" + "\n".join(found)


def test_no_function_has_more_parameters_than_can_be_kept_in_mind():
    found = house.long_signatures()
    assert not found, f"more than {house.MAX_PARAMETERS} parameters: {found}"


def first_imports(code):
    "The import statements that a file or cell begins with, as they are written."
    lines, body = code.splitlines(keepends=True), ast.parse(code).body
    start = next((i for i, n in enumerate(body) if isinstance(n, (ast.Import, ast.ImportFrom))), len(body))
    run = list(itertools.takewhile(lambda n: isinstance(n, (ast.Import, ast.ImportFrom)), body[start:]))
    return "".join(lines[run[0].lineno - 1:run[-1].end_lineno]).rstrip("\n") + "\n" if run else ""


def test_imports_are_sorted():
    import isort  # here, so that an environment without it fails this test alone
    config = isort.Config(settings_path=str(PATHS.root), quiet=True)
    written = {p.name: p.read_text() for p in house.tests()}
    written |= {f"{place(n)} {c['id']}": source(c) for n in NOTEBOOKS for c in cells(n, "code")
                if re.search(r"^(from|import) ", source(c), re.M)}
    unsorted = [
        name for name, code in written.items() if not isort.check_code(first_imports(code), config=config)
    ]
    assert not unsorted, f"run isort on {unsorted}"
