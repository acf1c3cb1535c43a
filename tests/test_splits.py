"Splits against cell-gears and by brute force; a leak planted for every check; bad input."
import json
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import combinations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from biojepa.core import object_hash
from biojepa.data.datasets import load_dataset
from biojepa.data.download import read_card
from biojepa.data.leakage import LeakageError, check_leakage
from biojepa.data.network import SimulationSpec
from biojepa.data.preprocess import prepare
from biojepa.data.simulate import simulate_perturb_seq
from biojepa.data.splits import PARTS, Split, make_split


def cells_of(conditions, per=3, guides=1, lines=("x",), genes=100):
    """A canonical AnnData: `per` cells for each condition, guide and line, and twice as many controls; counts mean
    nothing."""
    rows = [(c, "ctrl" if c == "ctrl" else f"{c}|{c}_{g}" if guides > 1 else c, f"{c}_{g}", line)
            for c in ["ctrl", "ctrl", *conditions] for g in range(guides) for line in lines for _ in range(per)]
    obs = pd.DataFrame(rows,
                       columns=["condition", "perturbation", "guide_id", "cell_type"],
                       index=[f"c{i}" for i in range(len(rows))])
    code = {
        g: "".join("ACGT"[int(d)] for d in np.base_repr(i + 4**8, 4))
        for i, g in enumerate(obs["guide_id"].unique())
    }
    obs["guide_seq_a"], obs["guide_seq_b"] = obs["guide_id"].map(code), obs["guide_id"].map(lambda g: code[
        g][::-1] + "A")
    obs["batch"] = "0"
    names = [f"gene{i}" for i in range(genes)]
    rng = np.random.default_rng(0)
    X = sp.csr_matrix(rng.negative_binomial(2, 2/(2 + rng.gamma(2, 2, genes)), (len(obs), genes)) + 1,
                      dtype=np.float32)
    about = dict(schema_version=1, source="test", expression_space="counts", history=np.array([], dtype=object))
    return ad.AnnData(X,
                      obs=obs.astype("category"),
                      var=pd.DataFrame({"gene_name": names}, index=names),
                      uns={"biojepa": about})


SINGLES = [f"T{i:02d}+ctrl" for i in range(24)]
DOUBLES = ["+".join(p) for p in combinations([f"T{i:02d}" for i in range(8)], 2)]


def targets(c): return set(c.split("+")) - {"ctrl"}


# ---- cell-gears ----

def test_a_split_needs_no_cell_gears_and_draws_from_no_shared_state():
    code = """
import random, sys, time
import numpy as np, torch
sys.path.insert(0, "tests")
from test_splits import SINGLES, cells_of, make_split
adata = cells_of(SINGLES)
state = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
before = state()
make_split(adata, seed=1)
assert state() == before
assert not {"gears", "dcor", "torch_geometric"} & set(sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr

def by_pertdata(conditions, folder):
    "The same conditions through cell-gears' public path, offline: PertData, new_data_process, prepare_split."
    from gears import PertData
    names = sorted({t for c in conditions for t in targets(c)})
    (folder/"gene2go_all.pkl").write_bytes(pickle.dumps({t: {"GO:1"} for t in names}))  # else it is downloaded
    obs = pd.DataFrame({"condition": ["ctrl", *conditions], "cell_type": "x"},
                       index=[f"c{i}" for i in range(len(conditions) + 1)])
    data = PertData(str(folder), default_pert_graph=False)
    data.new_data_process("same",
                          adata=ad.AnnData(sp.csr_matrix(np.ones((len(obs), 2), np.float32)),
                                           obs=obs,
                                           var=pd.DataFrame({"gene_name": ["a", "b"]}, index=["a", "b"])),
                          skip_calc_de=True)
    return data

def assert_same(conditions, folder):
    shuffled = list(np.random.default_rng(0).permutation(conditions))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data, adata = by_pertdata(shuffled, folder), cells_of(conditions, per=1)
        for seed in range(1, 6):
            data.prepare_split("simulation", seed=seed)
            split = make_split(adata, seed=seed)
            assert {p: set(getattr(split, p))
                    for p in PARTS} == {p: set(data.set2conditions[p]) - {"ctrl"} for p in PARTS}
            for part in ("val", "test"):
                assert {k: set(v) for k, v in split.subgroups[part].items()
                        } == {k: set(v) for k, v in data.subgroup[f"{part}_subgroup"].items()}
            assert check_leakage(adata, split)["passed"].all()
    return split

@pytest.mark.parametrize("doubles", [0, 40])
def test_identical_to_cell_gears_on_the_simulators_conditions(doubles, tmp_path):
    adata = simulate_perturb_seq(SimulationSpec(n_cells=1000, n_doubles=doubles))
    split = assert_same(sorted(set(adata.obs["condition"]) - {"ctrl"}), tmp_path)
    assert bool(split.subgroups["test"]["combo_seen1"]) == bool(doubles)

def test_identical_to_cell_gears_on_the_twins_conditions(shared, tmp_path):
    with h5py.File(shared/"k562_essential_twin.h5ad") as f:
        conditions = f["obs/condition/categories"].asstr()[:]
    split = assert_same(sorted(set(conditions) - {"ctrl"}), tmp_path)
    assert (len(split.train), len(split.val), len(split.test)) == (440, 49, 163)

def test_as_many_as_in_the_report():
    "1,087 targets: 272 for the test part."
    split = make_split(cells_of([f"G{i}+ctrl" for i in range(1087)], per=1))
    assert (len(split.train), len(split.val), len(split.test)) == (733, 82, 272)

def test_the_split_of_the_report_is_drawn_after_the_card_drops_its_targets(tmp_path):
    """A file in GEARS' shape: the draw equals cell-gears' from the conditions without the five, and not its draw
    from all."""
    card = read_card("replogle_k562_essential").changed(cells=None, genes=None, targets=None, url=None)
    five, names = list(card.columns.drop), [f"T{i:02d}" for i in range(40)]
    assert len(five) == 5
    shuffled = np.random.default_rng(0).permutation([*names[:20], *five, *names[20:]])
    conditions = np.repeat(["ctrl"]*6 + [f"{t}+ctrl" for t in shuffled], 2)
    barcodes = [f"ACGT{i:04d}-{1 + i % 3}" for i in range(len(conditions))]
    obs = pd.DataFrame(dict(condition=conditions, cell_type="K562"), index=barcodes)
    var = pd.DataFrame(dict(gene_name=[*"abc", "c"]), index=[*"wxyz"])
    X = sp.csr_matrix(np.random.default_rng(0).random((len(obs), 4)), dtype=np.float32)
    (tmp_path/card.name).mkdir()
    ad.AnnData(X, obs, var).write_h5ad(tmp_path/card.name/"perturb_processed.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dropped, whole = (load_dataset(card, folder=tmp_path, offline=True, **given)
                          for given in ({}, dict(drop=())))
        data = by_pertdata([f"{t}+ctrl" for t in names], tmp_path)
        data.prepare_split("simulation", seed=1)
    drawn = {p: set(data.set2conditions[p]) - {"ctrl"} for p in PARTS}
    split, before = make_split(dropped, seed=1), make_split(whole, seed=1)
    assert {p: set(getattr(split, p)) for p in PARTS} == drawn and (whole.n_obs, dropped.n_obs) == (102, 92)
    assert not set(split.test) <= set(before.test), "the same targets are held out: dropping would not matter"
    assert set(before.test) - {f"{t}+ctrl" for t in five} != drawn["test"]

def test_simulation_of_chosen_targets():
    split = make_split(cells_of(SINGLES + DOUBLES), held_out=["T00", "T20"])
    assert {c for c in split.test if len(targets(c)) == 1} == {"T00+ctrl", "T20+ctrl"}
    assert not any("T00" in c for c in split.train + split.val)
    assert sum(c in split.test for c in DOUBLES if "T00" in c) == 7

def test_combinations_of_more_than_two_follow_the_same_rule():
    names = [f"T{i:02d}" for i in range(12)]
    triples = ["+".join(p) for p in combinations(names, 3)]
    split = make_split(cells_of([f"{n}+ctrl" for n in names] + triples, per=1), seed=3)
    for part, before in (("test", [*split.train, *split.val]), ("val", split.train)):
        seen = {t for c in before for t in targets(c)}
        groups = split.subgroups[part]
        assert sorted(sum(groups.values(), [])) == sorted(getattr(split, part))
        for group, members in groups.items():
            known = 0 if group == "unseen_single" else int(group[-1])
            assert all(len(seen & targets(c)) == known for c in members)
    hidden = {c.split("+")[0] for c in split.subgroups["test"]["unseen_single"]}
    whole = [c for c in triples if not hidden & targets(c)]
    assert len(hidden) == 3 and len(split.subgroups["test"]["combo_seen3"]) == len(whole) - int(.75*len(whole)) == 21


# ---- the other kinds, by brute force ----

@pytest.mark.parametrize("seed", range(5))
def test_guides_are_held_out_and_targets_known(seed):
    adata = cells_of(SINGLES, guides=3)
    split = make_split(adata, kind="guide", seed=seed)
    assert len(split.test) == 12 and len(split.val) == 5  # of 48 that can be spared: a quarter and a tenth
    assert set(split.train) | set(split.val) | set(split.test) == set(adata.obs["perturbation"]) - {"ctrl"}
    known = adata.obs["condition"].iloc[split.cells(adata, "train")]
    assert set(known) == set(SINGLES)
    assert check_leakage(adata, split, pairs=split.train)["passed"].all()

def test_chosen_guides():
    adata = cells_of(SINGLES, guides=2)
    split = make_split(adata, kind="guide", held_out="T03+ctrl|T03+ctrl_1")
    assert split.test == ("T03+ctrl|T03+ctrl_1",) and "T03+ctrl|T03+ctrl_0" in split.train
    with pytest.raises(ValueError, match="leaves T03\\+ctrl without a guide"):
        make_split(adata, kind="guide", held_out=["T03+ctrl|T03+ctrl_0", "T03+ctrl|T03+ctrl_1"])

@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("seen", [(0, 1, 2), (2,), (1,), (0, 1)])
def test_combinations_are_labelled_by_what_training_holds(seed, seen):
    adata = cells_of(SINGLES + DOUBLES)
    split = make_split(adata, kind="combination", seed=seed, seen=seen)
    known = set().union(*map(targets, split.train))
    for part in ("val", "test"):
        assert all(len(targets(c)) == 2 for c in getattr(split, part))
        for name, values in split.subgroups[part].items():
            assert {f"combo_seen{len(targets(c) & known)}" for c in values} == {name} and int(name[-1]) in seen
        assert sorted(getattr(split, part)) == sorted(c for v in split.subgroups[part].values() for c in v)
    unused = {c for v in split.subgroups["unused"].values() for c in v}
    assert unused | set(split.train) | set(split.val) | set(split.test) == set(SINGLES + DOUBLES)
    assert (unused == set()) == (seen == (2,))
    assert check_leakage(adata, split)["passed"].all()

def test_chosen_combinations():
    split = make_split(cells_of(SINGLES + DOUBLES), kind="combination", held_out=["T00+T01", "T02+T03"])
    assert split.test == ("T00+T01", "T02+T03") and not split.subgroups["unused"] and set(SINGLES) <= set(
        split.train)

def test_a_held_out_line_takes_its_controls_along():
    adata = cells_of(SINGLES, lines=("A549", "K562", "RPE1"))
    split = make_split(adata, kind="cell_type", held_out="RPE1")
    line = adata.obs["cell_type"].astype(str).to_numpy()
    assert split.test == ("RPE1",) and len(split.val) == 1
    for part in PARTS:
        rows = np.r_[split.cells(adata, part), split.controls(adata, part)]
        assert set(line[rows]) == set(getattr(split, part))
    assert len(split.controls(adata, "train")) == 6
    assert check_leakage(adata, split)["passed"].all()
    assert len({make_split(adata, kind="cell_type", seed=s).test for s in range(20)}) == 3

def test_custom_lists_from_a_file(tmp_path):
    adata = cells_of(SINGLES)
    lists = {"train": SINGLES[:10] + ["ctrl"], "val": SINGLES[10:12], "test": SINGLES[12:20]}
    (tmp_path/"mine.json").write_text(json.dumps(lists))
    split = make_split(adata, kind="custom", held_out=tmp_path/"mine.json")
    assert split == make_split(adata, kind="custom", held_out=lists) and split.train == tuple(SINGLES[:10])
    assert (split.part_of(adata) == "").sum() == 3*4 and check_leakage(adata, split)["passed"].all()
    by_line = make_split(cells_of(SINGLES, lines=("a", "b")),
                         kind="custom",
                         held_out={"train": ["a"], "test": ["b"]},
                         key="cell_type",
                         allow_empty_val=True)
    assert by_line.key == "cell_type"

@pytest.mark.parametrize("kind", ["simulation", "guide", "combination", "cell_type"])
def test_parts_are_rows_once_and_order_does_not_matter(kind):
    adata = cells_of(SINGLES + DOUBLES, guides=2, lines=("a", "b", "c"))
    split = make_split(adata, kind=kind)
    rows = [split.cells(adata, p) for p in PARTS]
    assert all(len(r) for r in rows) and len(np.unique(np.concatenate(rows))) == sum(map(len, rows))
    control = (adata.obs["condition"] == "ctrl").to_numpy()
    assert not control[np.concatenate(rows)].any()
    for p in PARTS:
        found = split.controls(adata, p)
        assert control[found].all() and (kind == "cell_type" or len(found) == control.sum())
    moved = adata[np.random.default_rng(1).permutation(adata.n_obs)].copy()
    assert make_split(moved, kind=kind).hash == split.hash
    assert set(moved.obs_names[split.cells(moved, "test")]) == set(adata.obs_names[split.cells(adata, "test")])
    assert make_split(adata, kind=kind, seed=2).hash != split.hash


# ---- files ----

def test_saved_and_loaded(tmp_path):
    adata = cells_of(SINGLES, guides=2)
    for kind in ("simulation", "guide"):
        split = make_split(adata, kind=kind, path=tmp_path/f"{kind}.json")
        again = Split.load(tmp_path/f"{kind}.json", adata)
        assert again == split and again.hash == split.hash == json.loads(
            (tmp_path/f"{kind}.json").read_text())["hash"]
    made = (tmp_path/"guide.json").stat().st_mtime_ns
    assert make_split(adata, kind="guide", path=tmp_path/
                      "guide.json") == split and (tmp_path/"guide.json").stat().st_mtime_ns == made
    for asked in (dict(seed=2), dict(kind="simulation"), dict(test_fraction=.5),
                  dict(held_out=["T03+ctrl|T03+ctrl_1"])):
        with pytest.raises(ValueError, match="holds another split"):
            make_split(adata, path=tmp_path/"guide.json", **{"kind": "guide", **asked})

def test_every_field_is_under_the_hash(tmp_path):
    adata = cells_of(SINGLES, guides=2)
    path = make_split(adata, kind="guide").save(tmp_path/"s.json")
    stored = json.loads(path.read_text())
    for name, value in dict(kind="custom",
                            seed=9,
                            key="condition",
                            train=stored["train"][1:],
                            val=[],
                            test=[*stored["test"], stored["train"][0]],
                            dataset_hash="0"*12,
                            subgroups={"test": {}},
                            settings={"seen": [1]}).items():
        path.write_text(json.dumps(stored | {name: value}))
        with pytest.raises(ValueError, match="was changed after it was saved"):
            Split.load(path)
    path.write_text(json.dumps(stored)); Split.load(path)

def test_broken_files_are_named(tmp_path):
    for text, message in [("{", "is not JSON"), ("[]", "is not a saved split"),
                          ('{"train": []}', "is not a saved split")]:
        (tmp_path/"s.json").write_text(text)
        with pytest.raises(ValueError, match=f"s.json: {message}"):
            Split.load(tmp_path/"s.json")
    path = make_split(cells_of(SINGLES, guides=2), kind="guide").save(tmp_path/"s.json")
    with pytest.raises(ValueError, match="made for other data.*lacks T00"):
        Split.load(path, cells_of(SINGLES[1:], guides=2))
    with pytest.raises(ValueError, match="made for other data"):
        make_split(cells_of(SINGLES + ["NEW+ctrl"], guides=2), kind="guide", path=path)


# ---- bad input ----

BAD = {
    "unknown kind": (SINGLES, {}, dict(kind="random"), "kind: found 'random'"),
    "seed": (SINGLES, {}, dict(seed=-1), "seed: found -1"),
    "seed of another type": (SINGLES, {}, dict(seed=1.5), "seed: found 1.5"),
    "only controls": ([], {}, {}, "found controls only"),
    "one target": (SINGLES[:1], {}, {}, "part (test, val|train, val|val) is empty"),
    "unknown target": (SINGLES, {}, dict(held_out=["XX"]), "held_out: XX is no target"),
    "option of another kind":
    (SINGLES, {}, dict(test_fraction=.5), "test_fraction: not an option of kind='simulation'"),
    "one guide each": (SINGLES, {}, dict(kind="guide"), "no target has two guides"),
    "too few guides": (SINGLES[:1], dict(guides=2), dict(kind="guide"), "part val is empty"),
    "unknown guide":
    (SINGLES, dict(guides=2), dict(kind="guide", held_out=["XX"]), "XX is not in obs\\['perturbation'\\]"),
    "fractions": (SINGLES, dict(guides=2), dict(kind="guide", test_fraction=.8,
                                                val_fraction=.4), "found 0.8 and 0.4"),
    "no combinations": (SINGLES, {}, dict(kind="combination"), "holds no combination"),
    "unknown combination": (DOUBLES, {}, dict(kind="combination",
                                              held_out=["A+B"]), "A\\+B is not in obs\\['condition'\\]"),
    "one line": (SINGLES, {}, dict(kind="cell_type"), "1 lines \\(x\\) are not enough"),
    "two lines": (SINGLES, dict(lines=("a", "b")), dict(kind="cell_type"), "give val_lines=0"),
    "two lines, no val": (SINGLES, dict(lines=("a", "b")), dict(kind="cell_type",
                                                                val_lines=0), "part val is empty"),
    "unknown line": (SINGLES, dict(lines=("a", "b", "c")), dict(
        kind="cell_type", held_out="z"), "z is not in obs\\['cell_type'\\]"),
    "custom without lists": (SINGLES, {}, dict(kind="custom"), "needs lists called train, test"),
    "custom with other names": (SINGLES, {}, dict(kind="custom",
                                                  held_out={"training": [], "test":
                                                            []}), "needs lists called train, test"),
    "custom with an unknown condition": (SINGLES, {},
                                         dict(kind="custom",
                                              held_out={"train": SINGLES[:1], "test":
                                                        ["T99+ctrl"]}), "T99\\+ctrl is not in obs"),
    "custom listed twice": (SINGLES, {},
                            dict(kind="custom",
                                 held_out={"train": SINGLES[:2], "val": SINGLES[2:3], "test":
                                           SINGLES[1:2]}), "T01\\+ctrl is listed twice"),
    "custom with an empty part": (SINGLES, {},
                                  dict(kind="custom",
                                       held_out={"train": SINGLES[:2], "val": SINGLES[3:4], "test":
                                                 []}), "part test is empty"),
    "custom file missing": (SINGLES, {}, dict(kind="custom",
                                              held_out="/nowhere.json"), "cannot read /nowhere.json"),
    "custom key": (SINGLES, {}, dict(kind="custom", held_out={"train": ["0"], "test": ["1"]},
                                     key="batch"), "key: found 'batch'"),
}

@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    conditions, shape, options, message = BAD[name]
    with pytest.raises(ValueError, match=message): make_split(cells_of(conditions, **shape), **options)

def test_missing_columns_and_parts_are_named():
    adata = cells_of(SINGLES, guides=2)
    split = make_split(adata, kind="guide")
    with pytest.raises(ValueError, match="part: found 'testing'"): split.cells(adata, "testing")
    with pytest.raises(ValueError, match="part: found 'testing'"): split.controls(adata, "testing")
    del adata.obs["perturbation"]
    with pytest.raises(ValueError, match="obs\\['perturbation'\\]: missing"): split.cells(adata, "test")
    with pytest.raises(ValueError, match="obs\\['condition'\\]: missing"):
        make_split(ad.AnnData(np.ones((2, 2))))

def test_a_line_without_controls_is_named():
    adata = cells_of(SINGLES, lines=("a", "b", "c"))
    adata = adata[~((adata.obs["condition"] == "ctrl") & (adata.obs["cell_type"] == "b"))].copy()
    with pytest.raises(ValueError, match="no control cells of b"): make_split(adata, kind="cell_type")


# ---- a leak planted for every check ----

def caught(adata, split, **kwargs):
    "Names of the failed checks, and all offenders."
    with pytest.raises(LeakageError) as error: check_leakage(adata, split, **kwargs)
    failed = error.value.report.query("~passed")
    for offender in failed["offenders"]: assert offender and offender in str(error.value)
    return set(failed["check"]), " ".join(failed["offenders"])

def move(split, value, source, target, keep=False):
    "Put a value of one part into another."
    left = getattr(split, source) if keep else tuple(v for v in getattr(split, source) if v != value)
    return replace(split, **{source: left, target: (*getattr(split, target), value)})

@pytest.fixture(scope="module")
def doubles():
    adata = cells_of(SINGLES + DOUBLES)
    return adata, make_split(adata, seed=1)

def test_split_of_other_data(doubles):
    adata, split = doubles
    checks, offenders = caught(adata[adata.obs["condition"] != split.test[0]].copy(), split)
    assert checks == {"data"} and split.test[0] in offenders

def test_value_in_two_parts(doubles):
    adata, split = doubles
    value = split.subgroups["test"]["unseen_single"][0]
    checks, offenders = caught(adata, move(split, value, "test", "train", keep=True))
    assert checks == {"parts"} and value in offenders

def test_training_rows_that_are_test_rows(doubles):
    adata, split = doubles
    class Careless(Split):
        def cells(self, adata, part):
            rows = super().cells(adata, part)
            return rows if part != "train" else np.r_[rows, super().cells(adata, "test")[:1]]
    careless = Careless(**{f: getattr(split, f) for f in Split.__dataclass_fields__})
    checks, offenders = caught(adata, careless)
    row = split.cells(adata, "test")[0]
    assert {
        "rows", "values"
    } <= checks and adata.obs_names[row] in offenders and adata.obs["condition"].iloc[row] in offenders

def test_held_out_target_inside_a_training_combination(doubles):
    adata, split = doubles
    single = next(c for c in split.test if c.endswith("+ctrl") and c < "T08")
    inside = next(c for c in split.subgroups["test"]["combo_seen1"] if targets(single) & targets(c))
    checks, offenders = caught(adata, move(split, inside, "test", "train"))
    assert "targets" in checks and single[:3] in offenders

def test_held_out_target_alone_in_training(doubles):
    "A combination stays held out, but its unseen member comes back as a single."
    adata, split = doubles
    single = next(c for c in split.subgroups["test"]["unseen_single"] if c < "T08")
    checks, offenders = caught(adata, move(split, single, "test", "train"))
    assert checks == {"combinations"
                      } and f"T00+{single[:3]} (combo_seen1, in training: T00, {single[:3]})" in offenders

def test_test_target_in_validation(doubles):
    adata, split = doubles
    single = next(c for c in split.test if c.endswith("+ctrl") and c < "T08")
    inside = next(c for c in split.subgroups["test"]["combo_seen1"] if targets(single) & targets(c))
    checks, offenders = caught(adata, move(split, inside, "test", "val"))
    assert checks == {"targets in validation"} and offenders == single[:3]

def test_mislabelled_combination():
    adata = cells_of(SINGLES + DOUBLES)
    split = make_split(adata, kind="combination")
    group = split.subgroups["test"]
    value = group["combo_seen1"][0]
    for name in ("combo_seen0", "combo_seen2"):  # too much in training, and too little
        wrong = replace(
            split,
            subgroups=split.subgroups
            | {"test": {"combo_seen1": group["combo_seen1"][1:], name: [*group.get(name, []), value]}})
        checks, offenders = caught(adata, wrong)
        assert checks == {"combinations"} and value in offenders
    hidden = split.subgroups["unused"]["hidden_single"][0]
    checks, offenders = caught(adata, replace(split, train=(*split.train, hidden)))
    assert checks == {"combinations"} and hidden.split("+")[0] in offenders

def test_guide_under_another_name():
    adata = cells_of(SINGLES, guides=2)
    split = make_split(adata, kind="guide")
    test, train = split.test[0], next(v for v in split.train if v.split("|")[0] != split.test[0].split("|")[0])
    renamed = adata.copy()
    renamed.obs["guide_id"] = renamed.obs["guide_id"].astype(str).mask(
        (renamed.obs["perturbation"] == train).to_numpy(),
        test.split("|")[1])
    assert caught(renamed, split) == ({"guides"}, test.split("|")[1])
    copied, at = adata.copy(), (adata.obs["perturbation"] == train).to_numpy()
    for here, there in (("guide_seq_a", "guide_seq_b"),
                        ("guide_seq_b", "guide_seq_a")):  # the same pair in the other order
        copied.obs[here] = copied.obs[here].astype(str).mask(
            at, adata.obs.loc[adata.obs["perturbation"] == test, there].astype(str).iloc[0])
    assert caught(copied, split)[0] == {"guide sequences"}

def test_guide_without_a_known_target():
    adata = cells_of(SINGLES, guides=2)
    split = make_split(adata, kind="guide")
    other = next(v for v in split.train if v.split("|")[0] == split.test[0].split("|")[0])
    assert caught(adata, move(split, other, "train", "test")) == ({"known targets"}, other.split("|")[0])

def test_controls_of_a_held_out_line():
    adata = cells_of(SINGLES, lines=("a", "b", "c"))
    split = make_split(adata, kind="cell_type", held_out="c")
    class Careless(Split):
        def controls(self, adata, part): return np.flatnonzero(adata.obs["condition"] == "ctrl")
    careless = Careless(**{f: getattr(split, f) for f in Split.__dataclass_fields__})
    checks, offenders = caught(adata, careless)
    assert checks == {"rows", "values"} and "c" in offenders.split(", ")

def test_statistics_of_other_cells(doubles):
    adata, split = doubles
    honest = prepare(adata, n_top_genes=6, split=split)
    report = check_leakage(honest, split).set_index("check")
    assert report.loc["variable genes",
                      "checked"] == len(split.cells(adata, "train")) + len(split.controls(adata, "train"))
    assert check_leakage(prepare(adata), split).set_index("check").loc["variable genes", "checked"] == 0
    other = make_split(adata, seed=2)
    assert caught(prepare(adata, n_top_genes=6, split=other), split) == ({
        "variable genes"
    }, f"variable_genes: {len(other.cells(adata, 'train')) + 6} cells of split {other.hash}")
    one_more = honest.copy()  # one more cell than training holds
    rows = np.r_[split.cells(adata, "train"), split.controls(adata, "train"), split.cells(adata, "test")[:1]]
    one_more.uns["biojepa"]["gene_means"] = dict(split=split.hash,
                                                 n_train_cells=len(rows),
                                                 train_cells=object_hash(sorted(adata.obs_names[rows]), 16))
    assert caught(one_more, split)[0] == {"gene means"}

def test_alignment_pairs():
    adata = cells_of(SINGLES, guides=2)
    for kind in ("simulation", "guide"):
        split = make_split(adata, kind=kind)
        inside = set(adata.obs["perturbation"].iloc[split.cells(adata, "train")])
        assert check_leakage(adata, split, pairs=inside)["passed"].all() and check_leakage(
            adata, split, pairs=[*inside, "ctrl"])["passed"].all()
        leak = adata.obs["perturbation"].iloc[split.cells(adata, "test")[0]]
        assert caught(adata, split, pairs=[*inside, leak]) == ({"alignment pairs"}, leak)
        assert "not in obs" in caught(adata, split, pairs=["T99+ctrl"])[1]
    lines = cells_of(SINGLES, lines=("a", "b", "c"))
    lines = lines[~((lines.obs["condition"] == "T05+ctrl") &
                    (lines.obs["cell_type"] != "c"))].copy()  # T05 only in the held-out line
    split = make_split(lines, kind="cell_type", held_out="c")
    assert caught(lines, split, pairs=["T04+ctrl", "T05+ctrl"]) == ({"alignment pairs"}, "T05+ctrl")


def test_shared_files(shared):
    "The call of the README on real files, each with its own column names."
    thp1 = load_dataset(shared/"papalexi21_thp1_crisprko.h5ad",
                        condition="perturbation",
                        control="control",
                        batch="batch",
                        guide="guide")
    norman = load_dataset(shared/"norman19_mcfaline23_hvg500.h5ad",
                          condition="condition",
                          control="control",
                          batch="dataset",
                          cell_type="cell_type")
    for raw, kinds in [(thp1, ("simulation", "guide")), (norman, ("simulation", "combination", "cell_type"))]:
        adata = prepare(raw)
        for kind in kinds:
            split = make_split(adata, kind=kind, seed=1)
            assert check_leakage(adata, split)["passed"].all() and all(
                len(split.cells(adata, p)) for p in PARTS)
