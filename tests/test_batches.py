"Batches against the plain forms: dense slices, explicit loops, a chi-square test, an uninterrupted run."
import gc
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import chisquare, kstest

from biojepa.data.batches import ActionBatch, CellBatch, PairBatch, align_genes, dense_rows, row_source
from biojepa.data.controls import counter_uniform, match_controls
from biojepa.data.datasets import load_dataset
from biojepa.data.loaders import BatchLoader, action_loader, cell_loader, pair_loader
from biojepa.data.network import SimulationSpec
from biojepa.data.preprocess import prepare
from biojepa.data.simulate import simulate_perturb_seq
from biojepa.data.splits import make_split


@dataclass(frozen=True)
class HeldOut:
    "A split as the loaders see it."
    parts: dict = field(
        default_factory=lambda: dict(train=["A+ctrl", "C+ctrl"], val=["D+ctrl"], test=["B+ctrl"]))
    lines: tuple = ("K562", "RPE1")  # whose controls may be used

    def cells(self, adata, part): return np.flatnonzero(adata.obs.condition.isin(self.parts[part]))
    def controls(self, adata, part):
        return np.flatnonzero((adata.obs.condition == "ctrl") & adata.obs.cell_type.isin(self.lines))


def screen(n=800, n_genes=30, density=.3, seed=0, batches=4):
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(dict(condition=rng.choice(["ctrl", "A+ctrl", "B+ctrl", "C+ctrl", "D+ctrl"], n),
                            batch=rng.integers(0, batches, n).astype(str),
                            cell_type=rng.choice(["K562", "RPE1"], n)),
                       index=[f"cell{i}" for i in range(n)],
                       dtype="category")
    obs = obs.assign(perturbation=obs.condition, log_library_size=rng.normal(9, .3, n).astype(np.float32))
    X = sp.random(n, n_genes, density, "csr", np.float32, rng)
    return ad.AnnData(X,
                      obs=obs,
                      var=pd.DataFrame(index=[f"gene{i}" for i in range(n_genes)]),
                      uns=dict(biojepa=dict(expression_space="log1p")))


@pytest.fixture(scope="module")
def adata(): return screen()


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
def runs_equal(a, b): return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))


# --- dense rows
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("convert", [
    sp.csr_matrix, sp.csr_array, sp.csc_matrix, lambda x: x.toarray(), lambda x: x.astype(np.float64),
    lambda x: (x*10).astype(np.int64), lambda x: (x*10).astype(np.int32).toarray()
])
def test_every_storage_gives_the_same_rows(convert):
    X = convert(screen().X)
    rows = np.array([5, 1, 1, 799, 0])
    got = dense_rows(row_source(ad.AnnData(X)), rows)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got, sp.csr_matrix(X)[rows].toarray().astype(np.float32))


def test_unsorted_and_duplicate_entries_are_summed():
    X = sp.csr_matrix((np.ones(4, np.float32), np.array([2, 0, 2, 1]), np.array([0, 3, 4])), shape=(2, 3))
    np.testing.assert_array_equal(dense_rows(X, np.array([1, 0])), [[0, 1, 0], [1, 0, 2]])


def test_the_matrix_is_not_touched(adata):
    before = adata.X.copy()
    for batch in pair_loader(adata, HeldOut()): batch.x_ctrl.zero_(), batch.x_pert.add_(1)
    assert (adata.X != before).nnz == 0


@pytest.mark.parametrize("dense", [False, True])
def test_backed_equals_memory(adata, tmp_path, dense):
    copy = adata.copy()
    if dense: copy.X = copy.X.toarray()
    copy.write_h5ad(tmp_path/"cells.h5ad")
    on_disk = ad.read_h5ad(tmp_path/"cells.h5ad", backed="r")
    for make in (pair_loader, cell_loader):
        assert runs_equal(list(make(adata, HeldOut(), batch_size=50)),
                          list(make(on_disk, HeldOut(), batch_size=50)))
    with pytest.raises(ValueError, match="view of a file on disk"): cell_loader(on_disk[:100])
    assert align_genes(on_disk, ["gene3", "gene1"]).shape == (800, 2)
    on_disk.file.close()


def test_csc_on_disk_is_refused(adata, tmp_path):
    copy = adata.copy()
    copy.X = copy.X.tocsc()
    copy.write_h5ad(tmp_path/"cells.h5ad")
    on_disk = ad.read_h5ad(tmp_path/"cells.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"cells\.h5ad: X is stored gene by gene"): cell_loader(on_disk)
    on_disk.file.close()


# --- pairs
# --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_pairs_agree_in_batch_and_line_and_hold_the_cells_values(adata, part):
    split, obs = HeldOut(), adata.obs
    for b in pair_loader(adata, split, part=part, batch_size=64):
        assert isinstance(b, PairBatch)
        pert, ctrl = b.pert.numpy(), b.ctrl.numpy()
        for column in ("batch", "cell_type"):
            assert (obs[column].to_numpy()[pert] == obs[column].to_numpy()[ctrl]).all()
        assert (obs.condition.iloc[ctrl] == "ctrl").all() and obs.condition.iloc[pert].isin(
            split.parts[part]).all()
        np.testing.assert_array_equal(b.x_pert, adata.X[pert].toarray())
        np.testing.assert_array_equal(b.x_ctrl, adata.X[ctrl].toarray())
        np.testing.assert_array_equal(b.log_library_size_ctrl, obs.log_library_size.iloc[ctrl])
        np.testing.assert_array_equal(b.log_library_size_pert, obs.log_library_size.iloc[pert])
        assert (obs.perturbation.cat.categories[b.perturbation] == obs.perturbation.iloc[pert]).all()
        assert b.perturbation.dtype == b.pert.dtype == b.ctrl.dtype == torch.int64


def test_pools_equal_a_plain_search(adata):
    split, obs = HeldOut(), adata.obs
    pools = match_controls(adata, split.cells(adata, "train"), split.controls(adata, "train"))
    for i, cell in enumerate(pools.cells):
        me = obs.iloc[cell]
        plain = np.flatnonzero((obs.condition == "ctrl") & (obs.batch == me.batch)
                               & (obs.cell_type == me.cell_type))
        np.testing.assert_array_equal(np.sort(pools.pool[pools.start[i]:pools.start[i] + pools.size[i]]), plain)
    assert (pools.draw(np.full(
        len(pools.cells),
        1 - 2**-53)) == pools.pool[pools.start + pools.size - 1]).all()  # the largest u stays in the pool


def test_each_training_cell_once_per_epoch_with_new_controls(adata):
    split = HeldOut()
    loader = pair_loader(adata, split, batch_size=60, seed=3)
    epochs = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        epochs.append([torch.cat(x) for x in zip(*((b.pert, b.ctrl) for b in loader))])
        np.testing.assert_array_equal(np.sort(epochs[-1][0]), split.cells(adata, "train"))
    assert not torch.equal(epochs[0][0], epochs[1][0])
    partner = [dict(zip(p.tolist(), c.tolist())) for p, c in epochs]
    changed = np.mean([partner[0][i] != partner[1][i] for i in partner[0]])
    assert changed > .8  # pools hold about 20 controls


@pytest.mark.parametrize("part,batch_size", [("test", 64), ("val", 7), ("test", 10_000)])
def test_evaluation_is_fixed_and_visits_each_cell_once(adata, part, batch_size):
    loader = pair_loader(adata, HeldOut(), part=part, batch_size=batch_size, seed=1)
    first = list(loader)
    loader.set_epoch(9)
    assert runs_equal(first, list(loader))
    np.testing.assert_array_equal(torch.cat([b.pert for b in first]), HeldOut().cells(adata, part))
    assert len(first) == len(loader) and all(len(b.pert) == batch_size for b in first[:-1])
    assert not torch.equal(torch.cat([b.ctrl for b in first]),
                           torch.cat([b.ctrl for b in pair_loader(adata, HeldOut(), part=part, seed=2)]))


def test_a_cells_control_does_not_depend_on_the_other_cells_of_the_part(adata):
    both = HeldOut(dict(train=["A+ctrl"], val=[], test=["B+ctrl", "D+ctrl"]))
    def partners(split):
        return {
            p: c for b in pair_loader(adata, split, part="test")
            for p, c in zip(b.pert.tolist(), b.ctrl.tolist())
        }
    alone, together = partners(HeldOut()), partners(both)
    assert alone.items() <= together.items()


def test_resampled_controls_are_uniform(adata):
    loader = pair_loader(adata, HeldOut(), seed=11)
    by_cell = lambda items: items[np.argsort(items[:, 0]), 1]
    drawn = np.stack([by_cell(loader.items(epoch)) for epoch in range(1000)])  # epochs × cells
    pools = match_controls(adata, HeldOut().cells(adata, "train"), HeldOut().controls(adata, "train"))
    p = [
        chisquare(
            [np.sum(drawn[:, i] == c)
             for c in pools.pool[pools.start[i]:pools.start[i] + pools.size[i]]]).pvalue
        for i in range(0, len(pools.cells), 5)
    ]
    assert len(p) > 50 and kstest(
        p, "uniform").pvalue > 1e-3  # not only none too small: p-values of a true hypothesis are uniform
    pairs = np.array([(a == b).mean() for a, b in zip(drawn, drawn[1:])])
    assert abs(pairs.mean() - (1/pools.size).mean()) < 4*pairs.std()/len(pairs)**.5  # epochs are independent


def test_counter_uniform_is_a_pure_function():
    a = counter_uniform(100, 5, 7, 1)
    np.testing.assert_array_equal(a[:10], counter_uniform(10, 5, 7, 1))
    assert 0 <= a.min() and a.max() < 1
    for other in ((6, 7, 1), (5, 8, 1), (5, 7, 0), (7, 5, 1)):
        assert not np.intersect1d(a, counter_uniform(100, *other)).size
    np.testing.assert_array_equal(
        np.random.Philox(key=[5, 7], counter=[0, 0, 0, 1]).random_raw(100) >> np.uint64(11),
        (a*2**53).astype(np.uint64))
    assert kstest([counter_uniform(1, s, e, 0)[0] for s in range(40) for e in range(40)],
                  "uniform").pvalue > 1e-3


def test_a_batch_without_controls_uses_its_lines_and_says_so(adata):
    no_control = (adata.obs.condition == "ctrl") & (adata.obs.batch == "2") & (adata.obs.cell_type == "RPE1")
    part = adata[~no_control].copy()
    with pytest.warns(UserWarning, match=r"no control cells in batch 2 \(RPE1\): \d+ perturbed cells"):
        loader = pair_loader(part, HeldOut(), part="test")
    pert, ctrl = (torch.cat(x).numpy() for x in zip(*((b.pert, b.ctrl) for b in loader)))
    orphan = (part.obs.batch.to_numpy()[pert] == "2") & (part.obs.cell_type.to_numpy()[pert] == "RPE1")
    assert orphan.sum() > 10 and len(set(part.obs.batch.to_numpy()[ctrl[orphan]])) == 3
    assert (part.obs.cell_type.to_numpy()[pert] == part.obs.cell_type.to_numpy()[ctrl]).all()
    assert (part.obs.batch.to_numpy()[pert] == part.obs.batch.to_numpy()[ctrl])[~orphan].all()


def test_no_warning_where_all_have_controls(adata):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair_loader(adata, HeldOut())


def test_a_line_without_controls_is_an_error(adata):
    with pytest.raises(ValueError, match="no control cells for cell type RPE1"):
        pair_loader(adata, HeldOut(lines=("K562", )))
    with pytest.raises(ValueError, match="no control cells for cell type K562, RPE1"):
        pair_loader(adata, HeldOut(lines=()))


@pytest.mark.parametrize("kind", ["guide", "cell_type"])
def test_real_splits(kind):
    screen = simulate_perturb_seq(
        SimulationSpec(n_genes=200, n_cells=900, n_targets=10, guides_per_target=4, n_cell_types=3))
    adata = prepare(
        load_dataset(screen,
                     condition="condition",
                     control="ctrl",
                     batch="batch",
                     cell_type="cell_type",
                     guide="guide_id"))
    split = make_split(adata, kind=kind, seed=1)
    column = {"guide": "perturbation", "cell_type": "cell_type"}[kind]
    seen = {
        part: {
            name for b in pair_loader(adata, split, part=part)
            for name in adata.obs[column].iloc[b.pert.numpy()]
        } for part in ("train", "val", "test")
    }
    assert all(seen.values()) and not seen["train"] & (seen["val"] | seen["test"])
    used = {line for b in cell_loader(adata, split) for line in adata.obs.cell_type.iloc[b.cell.numpy()]}
    assert used == (seen["train"] if kind == "cell_type" else set(adata.obs.cell_type))


# --- cells
# --------------------------------------------------------------------------------------------------------------

def test_pretraining_never_sees_held_out_cells(adata):
    seen = torch.cat([b.cell for b in cell_loader(adata, HeldOut())]).numpy()
    np.testing.assert_array_equal(np.sort(seen),
                                  np.flatnonzero(adata.obs.condition.isin(["ctrl", "A+ctrl", "C+ctrl"])))
    assert not (seen == np.sort(seen)).all()
    np.testing.assert_array_equal(torch.cat([b.cell for b in cell_loader(adata, HeldOut(), part="test")]),
                                  HeldOut().cells(adata, "test"))
    with_controls = torch.cat([b.cell for b in cell_loader(adata, HeldOut(), part="test", with_controls=True)])
    np.testing.assert_array_equal(with_controls, np.flatnonzero(adata.obs.condition.isin(["ctrl", "B+ctrl"])))
    batch = next(iter(cell_loader(adata, training=False)))
    assert isinstance(batch, CellBatch) and batch.cell.tolist() == list(range(64))
    np.testing.assert_array_equal(batch.x, adata.X[:64].toarray())
    np.testing.assert_array_equal(batch.log_library_size, adata.obs.log_library_size[:64])


# --- the loader
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_resume_equals_uninterrupted(adata, stop):
    def loader(): return pair_loader(adata, HeldOut(), batch_size=50, seed=2)
    def train(loader, last=3, stop_at=None):
        "Batches of epochs up to `last`; after `stop` batches of epoch 1 the process dies, leaving a state."
        seen = []
        for epoch in range(loader.epoch, last):
            loader.set_epoch(epoch)
            it = iter(loader)
            if stop_at == (epoch, 0): return seen, loader.state_dict()
            for batch in it:
                seen.append(batch)
                if stop_at == (epoch, loader.position): return seen, loader.state_dict()
        return seen, loader.state_dict()
    whole, _ = train(loader())
    before, state = train(loader(), stop_at=(1, stop))
    after = loader()
    after.load_state_dict(dict(state))
    rest, _ = train(after)
    assert len(before) + len(rest) == len(whole) and runs_equal(before + rest, whole)


def test_a_run_may_die_twice(adata):
    whole = list(pair_loader(adata, HeldOut(), batch_size=50))
    state, seen = pair_loader(adata, HeldOut(), batch_size=50).state_dict(), []
    for steps in (2, 1, len(whole) - 3):
        loader = pair_loader(adata, HeldOut(), batch_size=50)
        loader.load_state_dict(state)
        seen += [batch for _, batch in zip(range(steps), loader)]
        state = loader.state_dict()
    assert runs_equal(seen, whole)


def test_order_and_pairing_are_independent(adata):
    first = adata[np.argsort(~adata.obs.condition.isin(["A+ctrl", "C+ctrl"]),
                             kind="stable")].copy()  # training cells are rows 0 … N - 1
    loader = pair_loader(first, HeldOut(), batch_size=1)
    pools = match_controls(first, HeldOut().cells(first, "train"), HeldOut().controls(first, "train"))
    rank = {
        int(c): (i - s)/n for s, n in zip(pools.start, pools.size)
        for i, c in enumerate(pools.pool[s:s + n], s)
    }
    along = np.array([rank[int(b.ctrl)] for b in loader])  # which control of its pool, along the epoch
    assert abs(np.corrcoef(along, np.arange(len(along)))[0, 1]) < 4/len(along)**.5


def test_a_finished_epoch_is_not_repeated(adata):
    loader = pair_loader(adata, HeldOut(), batch_size=50)
    n = sum(1 for _ in loader)
    state = loader.state_dict()
    assert state["position"] == n == len(loader)
    other = pair_loader(adata, HeldOut(), batch_size=50)
    other.load_state_dict(state)
    assert list(other) == [] and len(list(other)) == n
    other.load_state_dict(state)
    other.set_epoch(1)
    assert len(list(other)) == n


def test_foreign_states_are_refused(adata):
    state = pair_loader(adata, HeldOut(), seed=1).state_dict()
    with pytest.raises(ValueError, match="seed is 1 in the state, 0 here"):
        pair_loader(adata, HeldOut()).load_state_dict(state)
    with pytest.raises(ValueError, match="batch_size is 32 in the state, 16 here"):
        pair_loader(adata, HeldOut(), seed=1, batch_size=16).load_state_dict(state)
    with pytest.raises(ValueError, match="checksum"):
        pair_loader(adata[::-1].copy(), HeldOut(), seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="resume with the same cells"):
        pair_loader(adata, HeldOut(), seed=1).load_state_dict({})


@pytest.mark.parametrize("n", [64, 61, 65, 3])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_devices_share_each_global_batch(n, world_size, training):
    def ranks(**settings):
        return [
            list(
                BatchLoader(lambda epoch: np.arange(n),
                            lambda rows: rows.tolist(),
                            16,
                            seed=4,
                            training=training,
                            **settings,
                            rank=r,
                            world_size=world_size)) for r in range(world_size)
        ]
    if training and n < world_size:
        with pytest.raises(ValueError, match="make no batch"): ranks()
        return
    alone = list(
        BatchLoader(lambda epoch: np.arange(n), lambda rows: rows.tolist(), 16, seed=4, training=training))
    shares = ranks()
    everything = sum((sum(s, []) for s in shares), [])
    assert len(everything) == len(set(everything))  # disjoint
    if training:
        assert len({tuple(map(len, s))
                    for s in shares}) == 1  # equal number and size, so that gradients may be averaged
        assert len(everything) == n - n % 16 % world_size
    else: assert sorted(everything) == list(range(n))
    for i, batch in enumerate(alone):
        union = {x for s in shares if i < len(s) for x in s[i]}
        assert union <= set(batch) and (len(batch) -
                                        len(union) < world_size if training else union == set(batch))


def test_two_devices_together_see_what_one_sees(adata):
    one = list(pair_loader(adata, HeldOut(), batch_size=32, seed=5))
    two = [list(pair_loader(adata, HeldOut(), batch_size=32, seed=5, rank=r, world_size=2)) for r in (0, 1)]
    for whole, a, b in zip(one, *two):
        order = np.stack([a.pert, b.pert], 1).ravel()
        np.testing.assert_array_equal(order, whole.pert[:len(order)])
        np.testing.assert_array_equal(np.stack([a.ctrl, b.ctrl], 1).ravel(), whole.ctrl[:len(order)])


def test_a_state_survives_a_change_of_devices(adata):
    one = pair_loader(adata, HeldOut(), batch_size=32, seed=5)
    it = iter(one)
    next(it), next(it)
    two = [pair_loader(adata, HeldOut(), batch_size=32, seed=5, rank=r, world_size=2) for r in (0, 1)]
    for loader in two: loader.load_state_dict(one.state_dict())
    third = next(it)
    assert set(third.pert.tolist()) == {p for loader in two for p in next(iter(loader)).pert.tolist()}


def test_drop_last_and_len(adata):
    n = len(HeldOut().cells(adata, "train"))
    size = next(s for s in range(30, 60) if n % s)
    kept, dropped = (pair_loader(adata, HeldOut(), batch_size=size, drop_last=d) for d in (False, True))
    assert len(kept) == len(list(kept)) == n//size + 1 and len(dropped) == len(list(dropped)) == n//size
    with pytest.raises(ValueError, match="make no batch"):
        pair_loader(adata, HeldOut(), batch_size=10_000, drop_last=True)


def test_training_can_be_turned_off_for_the_training_part(adata):
    loader = pair_loader(adata, HeldOut(), part="train", training=False)
    first = list(loader)
    loader.set_epoch(1)
    assert runs_equal(first, list(loader))
    np.testing.assert_array_equal(torch.cat([b.pert for b in first]), HeldOut().cells(adata, "train"))


# --- actions
# ------------------------------------------------------------------------------------------------------------

def actions(n, tokens=2, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    present = torch.ones(n, tokens, dtype=torch.bool)
    present[:, 1:] = torch.rand(n, tokens - 1, generator=g) > .5
    return ActionBatch(torch.randn(n, tokens, width, generator=g), torch.randint(3, (n, tokens),
                                                                                 generator=g),
                       torch.randint(10, (n, tokens), generator=g), present)


def test_alignment_uses_allowed_rows_only_and_keeps_them_together():
    anchor, positive, target = actions(40), actions(40, tokens=1, width=9, seed=1), torch.arange(40)//2
    allowed = np.array([3, 17, 4, 5, 22, 39, 0])
    loader = action_loader(anchor, positive, target, allowed, batch_size=3, seed=1)
    for epoch in range(2):
        loader.set_epoch(epoch)
        seen = []
        for b in loader:
            for k in range(len(b.target)):
                row = int((anchor.features == b.anchor.features[k]).all((1, 2)).nonzero().squeeze())
                seen.append(row)
                assert same([x[k] for x in b.anchor[:4]], [x[row] for x in anchor[:4]])
                assert same([x[k] for x in b.positive[:4]], [x[row] for x in positive[:4]])
                assert b.target[k] == target[row]
        assert sorted(seen) == sorted(allowed)


@pytest.mark.parametrize("change,message", [
    (dict(allowed=[]), "allowed: found no row"),
    (dict(allowed=[0, 10]), "distinct rows from 0 to 9"),
    (dict(allowed=[-1, 2]), "distinct rows from 0 to 9"),
    (dict(allowed=[1, 1]), "1 repeated"),
    (dict(target=range(9)), r"found \[10, 10, 9\] rows"),
    (dict(positive=actions(10)._replace(present=torch.zeros(10, 2, dtype=torch.bool))), r"positive: rows \[0, "
                                                                                        r"1, 2\] of allowed "
                                                                                        r"have no "
                                                                                        r"action token"),
])
def test_descriptions_that_do_not_belong_together(change, message):
    with pytest.raises(ValueError, match=message):
        action_loader(**dict(
            dict(anchor=actions(10), positive=actions(10), target=range(10), allowed=[0, 1, 2]), **change))


def test_batches_move_as_a_whole(adata):
    meta = next(iter(pair_loader(adata, HeldOut()))).to("meta")
    assert type(meta) is PairBatch and all(x.is_meta for x in meta)
    nested = next(iter(action_loader(actions(4), actions(4), range(4), range(4)))).to("meta")
    assert nested.target.is_meta and type(nested.anchor) is ActionBatch and all(x.is_meta
                                                                                for x in nested.anchor[:4])


# --- input that cannot work
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings,message", [
    (dict(part="tset"), "part: found 'tset'"),
    (dict(batch_size=0), "batch_size: found 0"),
    (dict(batch_size=2.5), "batch_size: found 2.5"),
    (dict(seed=-1), "seed: found -1"),
    (dict(epoch=-1), "epoch: found -1"),
    (dict(rank=1), "rank: found 1"),
    (dict(world_size=3), "batch_size: "
     "found 32; give "
     "a multiple of "
     "world_size"),
    (dict(part="test", drop_last=True), "drop_last: found True"),
])
def test_settings_by_name(adata, settings, message):
    with pytest.raises(ValueError, match=message): pair_loader(adata, HeldOut(), **settings)


def test_an_empty_part(adata):
    split = HeldOut(dict(train=["A+ctrl"], val=[], test=["no such"]))
    for part in ("val", "test"):
        for make in (pair_loader, cell_loader):
            with pytest.raises(ValueError, match=f"part '{part}': the split leaves no perturbed cell"):
                make(adata, split, part=part)


def test_unprepared_data(adata):
    for space in ("counts", None):
        raw = adata.copy()
        raw.uns["biojepa"]["expression_space"] = space
        for make in (pair_loader, cell_loader):
            with pytest.raises(ValueError, match=f"found {space!r}.*prepare"): make(raw, HeldOut())
    bare = adata.copy()
    del bare.uns["biojepa"]
    with pytest.raises(ValueError, match="expression_space"): cell_loader(bare)
    for column in ("log_library_size", "batch", "cell_type", "perturbation"):
        less = adata.copy()
        del less.obs[column]
        with pytest.raises(ValueError, match=f"no column '{column}'"): pair_loader(less, HeldOut())
    holes = adata.copy()
    holes.obs["batch"] = holes.obs["batch"].cat.remove_categories("3")
    with pytest.raises(ValueError, match=r"adata.obs\['batch'\]: \d+ cells have no value"):
        pair_loader(holes, HeldOut())
    holes = adata.copy()
    holes.obs.loc[holes.obs_names[:2], "log_library_size"] = np.nan
    with pytest.raises(ValueError, match="2 cells have no finite value"): cell_loader(holes)


def test_genes_are_put_in_order_or_named(adata):
    genes = [f"gene{i}" for i in (7, 3, 29)]
    aligned = align_genes(adata, genes)
    np.testing.assert_array_equal(aligned.X.toarray(), adata.X.toarray()[:, [7, 3, 29]])
    assert not aligned.is_view and aligned.uns["biojepa"]["expression_space"] == "log1p" and align_genes(
        adata, adata.var_names) is adata
    with pytest.raises(ValueError, match="2 of 4 genes are missing: GATA1, TP53;"):
        align_genes(adata, ["GATA1", "gene1", "TP53", "gene2"])
    with pytest.raises(ValueError, match="20 of 20 genes are missing: .* and 12 more;"):
        align_genes(adata, [f"ENSG{i}" for i in range(20)])
    with pytest.raises(ValueError, match="genes: gene1 more than once"): align_genes(adata, ["gene1", "gene1"])
    twice = adata.copy()
    twice.var_names = ["gene0", "gene0", *twice.var_names[2:]]
    with pytest.raises(ValueError, match="adata.var_names: gene0 more than once"): align_genes(twice, ["gene0"])


# --- cost
# ---------------------------------------------------------------------------------------------------------------

def big_screen(n_cells, density, n_genes=5000, seed=0):
    rng, k = np.random.default_rng(seed), int(n_genes*density)
    genes = np.concatenate([np.sort(rng.permutation(n_genes)[:k]) for _ in range(n_cells)]).astype(np.int32)
    X = sp.csr_matrix((rng.random(n_cells*k, dtype=np.float32), genes, np.arange(0, n_cells*k + 1, k)),
                      shape=(n_cells, n_genes))
    obs = screen(n_cells, 1, batches=20).obs
    return ad.AnnData(X, obs=obs, uns=dict(biojepa=dict(expression_space="log1p")))


def resident(): return int(Path("/proc/self/statm").read_text().split()[1])*4096


def measure(loader, cells_per_item, epochs):
    "Cells per second of processor time, and growth of resident memory after the first epoch in bytes."
    rates, memory = [], []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        start = time.process_time()
        for _ in loader: pass
        rates.append(loader.n_items*cells_per_item/(time.process_time() - start))
        gc.collect()
        memory.append(resident())
    return float(np.median(rates)), memory[-1] - memory[0]


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(),
                                reason="resident memory is read from /proc")


@needs_proc
def test_fast_enough_and_flat():
    adata = big_screen(1500, .25)
    for make, k in ((cell_loader, 1), (pair_loader, 2)):
        rate, growth = measure(make(adata, HeldOut(), batch_size=64), k, epochs=5)
        assert rate > 5000 and growth < 20e6


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("density", [.1, .4])
def test_full_size_throughput_and_memory(density, tmp_path):
    adata = big_screen(20_000, density)
    figures = {
        make.__name__: measure(make(adata, HeldOut(), batch_size=64), k, epochs=10)
        for make, k in ((cell_loader, 1), (pair_loader, 2))
    }
    adata.write_h5ad(tmp_path/"cells.h5ad")
    del adata
    on_disk = ad.read_h5ad(tmp_path/"cells.h5ad", backed="r")
    figures["pair_loader, backed"] = measure(pair_loader(on_disk, HeldOut(), batch_size=64), 2, epochs=3)
    on_disk.file.close()
    print(f"\ndensity {density}: " + ", ".join(f"{name} {rate:,.0f} cells/s, {growth/1e6:+.1f} MB"
                                               for name, (rate, growth) in figures.items()))
    for name, (rate, growth) in figures.items(): assert rate > 5000 and growth < 20e6, name
