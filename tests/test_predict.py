"Prediction sets: the plain way, damaged fields, the disk; a model's predictions against the model itself."
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from training_cases import alive

from biojepa.actions.action_tokens import action_batch
from biojepa.actions.banks import FeatureBank, MissingFeatureError
from biojepa.actions.vocabulary import ActionTable, Modality, Mode
from biojepa.config import ModelConfig, preset
from biojepa.data import means as means_module
from biojepa.data.loaders import pair_loader
from biojepa.data.means import (
    expression_blocks, group_means, match_groups, matched_means, means_of_groups, train_mean_delta
)
from biojepa.data.splits import make_split
from biojepa.model.biojepa import BioJEPA
from biojepa.model.saving import Pretrained, save_pretrained
from biojepa.predict.anndata import predict
from biojepa.predict.model import Subject, changes, predictions
from biojepa.predict.sets import PredictionSet, pseudobulk, test_set
from biojepa.training.run import Run

TRAIN, VAL, TEST = ["A+ctrl", "B+ctrl", "A+B"], ["C+ctrl"], ["D+ctrl", "E+ctrl", "A+D"]


def screen(lines=("x", "y"), genes=7, per=5, seed=0):
    "A prepared AnnData: two guides for each single, two gem groups in each line, random values, one zero in three."
    rng, rows = np.random.default_rng(seed), []
    for line in lines:
        for condition in ["ctrl"]*3 + TRAIN + VAL + TEST:
            guides = [""] if condition == "ctrl" or "ctrl" not in condition else ["1", "2"]
            rows += [(condition, f"{condition}|{condition[0]}_{g}" if g else condition,
                      f"{condition[0]}_{g}" if g else "", f"{line}{i % 2}", line) for g in guides
                     for i in range(per)]
    obs = pd.DataFrame(rows, columns=["condition", "perturbation", "guide_id", "batch",
                                      "cell_type"]).sample(frac=1, random_state=seed)
    obs.index = [f"c{i:03d}" for i in range(len(obs))]
    x = rng.gamma(2, 1, (len(obs), genes))*(rng.random((len(obs), genes)) > 1/3)
    obs = obs.astype("category").assign(log_library_size=rng.normal(9, .3, len(obs)).astype(np.float32))
    names = [f"g{i}" for i in range(genes)]
    about = dict(schema_version=1, source="test", expression_space="log1p", history=np.array([], dtype=object))
    return ad.AnnData(sp.csr_matrix(x, dtype=np.float32),
                      obs=obs,
                      var=pd.DataFrame({"gene_name": names}, index=names),
                      uns={"biojepa": about})


def held_out(adata, **parts):
    return make_split(adata, kind="custom", held_out=dict(train=TRAIN, val=VAL, test=TEST) | parts)


@pytest.fixture(scope="module")
def case():
    adata = screen()
    return adata, held_out(adata)


@pytest.fixture(scope="module")
def template(case): return test_set(*case)


@pytest.mark.parametrize("control", ["cell_type", "batch"])
@pytest.mark.parametrize("by", ["condition", "perturbation"])
def test_group_means_are_those_of_a_loop(case, control, by):
    adata, split = case
    obs, x = adata.obs.astype(str), adata.X.toarray().astype(float)
    rows, controls = split.cells(adata, "test"), split.controls(adata, "test")
    means = group_means(adata, rows[::-1], controls[::-1], by, control)
    for p, group in means.groups.iterrows():
        mine = [i for i in rows if obs[by].iloc[i] == group[by] and obs.cell_type.iloc[i] == group.cell_type]
        references = []
        for i in mine:
            like = [j for j in controls if obs[control].iloc[j] == obs[control].iloc[i]]
            references.append(x[like].mean(0))
        assert group.n_cells == len(mine) and (means.code == p).sum() == len(mine)
        np.testing.assert_allclose(means.mean[p], x[mine].mean(0), rtol=1e-6)
        np.testing.assert_allclose(means.control[p], np.mean(references, 0), rtol=1e-6)
    assert len(means.groups) == len(obs.iloc[rows][[by, "cell_type"]].drop_duplicates())


def test_blocks_do_not_matter(case, monkeypatch):
    adata, split = case
    rows, controls = split.cells(adata, "test"), split.controls(adata, "test")
    large, seen = group_means(adata, rows, controls), []
    def small_blocks(source, rows):
        for block in expression_blocks(source, rows, block=3): seen.append(block.shape[0]); yield block
    monkeypatch.setattr(means_module, "expression_blocks", small_blocks)
    small = group_means(adata, rows, controls)
    assert max(seen) == 3 and len(seen) > 20
    np.testing.assert_allclose(small.delta, large.delta, atol=1e-12)


def test_latents_are_averaged_like_expression_one_group_in_memory(case):
    adata, split = case
    rows, x = split.cells(adata, "train"), torch.from_numpy(adata.X.toarray()).double()
    code = adata.obs["perturbation"].astype("category").cat.codes.to_numpy()[rows].astype(int)  # with gaps
    order, weight = np.argsort(code, kind="stable"), torch.randn(adata.n_vars, 3, 2, dtype=torch.float64)
    matched = match_groups(adata, rows[order], code[order], split.controls(adata, "train"))
    read_to = []
    def latents(rows):
        for a in range(0, len(rows), 4):
            read_to.append(a + 4)
            yield torch.einsum("bg,gij->bij", x[rows[a:a + 4]], weight)
    batch = adata.obs["batch"].astype(str).to_numpy()
    control = (adata.obs["condition"] == "ctrl").to_numpy()
    seen = []
    for p, mean, beside in matched_means(matched, latents):
        mine = rows[code == p]
        seen.append(p)
        assert read_to[-1] < np.searchsorted(code[order], p,
                                             "right") + 4  # no row of a later group than its block's
        torch.testing.assert_close(mean, torch.einsum("bg,gij->ij", x[mine], weight)/len(mine))
        like = torch.stack([x[control & (batch == batch[i])].mean(0) for i in mine]).mean(0)
        torch.testing.assert_close(beside, torch.einsum("g,gij->ij", like, weight))
    assert seen == np.unique(code).tolist() and max(seen) >= len(seen)


def test_a_mean_is_given_when_its_last_row_was_read():
    code, read = np.array([1, 0, 1, 2, 0, 2]), []
    blocks = (read.append(i) or np.full((1, 2), i, float) for i in range(6))
    found = [(g, len(read), mean.tolist()) for g, mean in means_of_groups(code, blocks)]
    assert found == [(1, 3, [1, 1]), (0, 5, [2.5, 2.5]), (2, 6, [4, 4])]


def test_backed_data_give_the_same_set(case, template, tmp_path):
    adata, split = case
    adata.write_h5ad(tmp_path/"a.h5ad")
    backed = ad.read_h5ad(tmp_path/"a.h5ad", backed="r")
    other = test_set(backed, split)
    assert other.provenance == template.provenance
    np.testing.assert_array_equal(other.observed.toarray(), template.observed.toarray())
    np.testing.assert_array_equal(other.control.toarray(), template.control.toarray())
    np.testing.assert_allclose(other.control_mean, template.control_mean)


def test_train_mean_is_the_mean_over_conditions_and_lines_not_over_cells():
    adata = screen()
    kept = adata[(adata.obs.condition != "A+B") |
                 (np.arange(adata.n_obs) % 3 > 0)].copy()  # unequal numbers of cells
    split, obs, x = held_out(kept), kept.obs, kept.X.toarray().astype(float)
    deltas = [
        x[(obs.condition == c) & (obs.cell_type == l)].mean(0) -
        x[(obs.condition == "ctrl") & (obs.cell_type == l)].mean(0) for c in TRAIN for l in "xy"
    ]
    np.testing.assert_allclose(train_mean_delta(kept, split), np.mean(deltas, 0), atol=1e-6)


def test_train_mean_never_sees_a_test_cell(case):
    adata, split = case
    changed, x = adata.copy(), adata.X.toarray()
    x[split.cells(adata, "test")], x[split.cells(adata, "val")] = 9, 7
    changed.X = sp.csr_matrix(x)
    np.testing.assert_array_equal(train_mean_delta(changed, split), train_mean_delta(adata, split))


def test_every_test_cell_once_beside_a_control_of_its_own_gem_group(case, template):
    adata, split = case
    assert sorted(template.cells.index) == sorted(adata.obs_names[split.cells(adata, "test")])
    partner = adata.obs.loc[template.cells["control"]]
    assert (partner["condition"] == "ctrl").all()
    assert (partner["batch"].astype(str).to_numpy() == template.cells["batch"].to_numpy()).all()
    np.testing.assert_array_equal(template.control.toarray(), adata[template.cells["control"]].X.toarray())
    np.testing.assert_array_equal(template.observed.toarray(), adata[template.cells.index].X.toarray())


def test_seed_draws_other_controls_and_nothing_else(case, template):
    other, again = test_set(*case, seed=1), test_set(*case)
    assert (other.cells["control"]
            != template.cells["control"]).any() and (again.cells["control"]
                                                     == template.cells["control"]).all()
    np.testing.assert_array_equal(other.control_mean, template.control_mean)
    assert other.provenance["data"] == template.provenance["data"]


def test_pairs_are_those_of_the_evaluation_loader(case):
    adata, split = case
    pairs = next(iter(pair_loader(adata, split, "val", batch_size=10**6, seed=3)))
    ps = test_set(adata, split, "val", seed=3)
    assert adata.obs_names[pairs.ctrl.numpy()].tolist() == ps.cells["control"].tolist() and adata.obs_names[
        pairs.pert.numpy()].tolist() == ps.cells.index.tolist()


def test_a_held_out_line_is_compared_with_its_own_controls():
    adata = screen(lines=("x", "y", "z"))
    split = make_split(adata, kind="cell_type", held_out=["y"])
    ps = test_set(adata, split)
    assert set(ps.groups.cell_type) == {"y"} and set(adata.obs.loc[ps.cells["control"], "cell_type"]) == {"y"}
    own = adata.X.toarray()[(adata.obs.condition == "ctrl") & (adata.obs.cell_type == "y")].mean(0)
    np.testing.assert_allclose(ps.control_mean, np.tile(own, (len(ps.groups), 1)), rtol=1e-5)


def filled(template, seed=0):
    "A set with an answer in every field."
    rng, N, P, G = np.random.default_rng(seed), len(template), len(template.groups), len(template.genes)
    draw = lambda *shape: rng.gamma(1, 1, shape).astype(np.float32)
    cell_delta = draw(N, G) - np.float32(2)
    return template.with_prediction("full", rng.normal(size=(P, G)), cell_delta, draw(N, G), draw(P, G), note=1)


def test_conditions_are_the_means_of_their_cells(template):
    ps = filled(template)
    bulk, x = pseudobulk(ps), ps.observed.toarray().astype(float)
    for c, row in bulk.conditions.iterrows():
        mine = ((ps.cells.condition == row.condition) & (ps.cells.cell_type == row.cell_type)).to_numpy()
        np.testing.assert_allclose(bulk.observed[c], (x - ps.control_mean[ps.group])[mine].mean(0), atol=1e-5)
        np.testing.assert_allclose(bulk.predicted[c], ps.delta[ps.group][mine].mean(0), atol=1e-6)
        np.testing.assert_allclose(np.sqrt(bulk.variance[c]),
                                   np.sqrt(ps.delta_variance)[ps.group][mine].mean(0),
                                   rtol=1e-5)
        assert row.n_cells == mine.sum() and row.targets == tuple(
            sorted(set(row.condition.split("+")) - {"ctrl"}))
    guides = pseudobulk(ps, "perturbation")
    np.testing.assert_allclose(guides.observed, ps.observed_mean() - ps.control_mean)
    assert guides.conditions["perturbation"].tolist() == ps.groups["perturbation"].tolist()


def test_cells_without_a_prediction_of_their_own(template):
    ps = template.with_prediction("constant", np.random.default_rng(0).normal(size=template.delta.shape))
    g = ps.group
    np.testing.assert_allclose(ps.cells_predicted(), np.maximum(ps.control_mean[g] + ps.delta[g], 0), rtol=1e-6)
    np.testing.assert_allclose(ps.shifted(np.array([4, 2])),
                               np.maximum(ps.control.toarray()[[4, 2]] + ps.delta[g[[4, 2]]], 0),
                               rtol=1e-6)
    np.testing.assert_allclose(ps.shifted(slice(3, 8)), ps.shifted()[3:8])
    np.testing.assert_allclose(ps.control.toarray() + ps.cells_delta(),
                               ps.control_mean[g] + ps.delta[g],
                               atol=1e-6)
    np.testing.assert_allclose(ps.cells_delta([4, 2]), ps.cells_delta()[[4, 2]])


def test_a_delta_of_a_cell_is_kept_as_it_is_and_clipped_only_as_expression(template):
    full = filled(template)
    raw = full.control.toarray() + full.cell_delta
    assert .2 < (raw < 0).mean() < .95
    np.testing.assert_array_equal(full.cells_delta(slice(2, 5)), full.cell_delta[2:5])
    np.testing.assert_array_equal(full.cells_predicted([1]), np.maximum(raw[[1]], 0))
    np.testing.assert_array_equal(full.shifted(np.arange(len(full)) < 2), np.maximum(raw[:2], 0))


def test_a_saved_set_comes_back_bit_for_bit(template, tmp_path):
    for ps in (filled(template), template):
        again = PredictionSet.load(ps.save(tmp_path/"set.h5ad"))
        for name in ("control_mean", "delta", "train_delta", "cell_delta", "variance", "delta_variance"):
            a, b = getattr(ps, name), getattr(again, name)
            assert (a is None) == (b is None)
            if a is not None: np.testing.assert_array_equal(a, b); assert a.dtype == b.dtype
        for name in ("observed", "control"):
            np.testing.assert_array_equal(getattr(ps, name).toarray(), getattr(again, name).toarray())
        pd.testing.assert_frame_equal(ps.cells, again.cells)
        pd.testing.assert_frame_equal(ps.groups, again.groups)
        assert (ps.name, ps.genes, ps.provenance,
                ps.expression_space) == (again.name, again.genes, again.provenance, again.expression_space)


def test_other_files_are_refused(case, tmp_path):
    case[0].write_h5ad(tmp_path/"cells.h5ad")
    with pytest.raises(ValueError, match="cells.h5ad: holds no predictions"):
        PredictionSet.load(tmp_path/"cells.h5ad")
    clipped = test_set(*case).to_anndata()      # as the first format was written
    clipped.uns["prediction"]["format"] = 1
    clipped.write_h5ad(tmp_path/"clipped.h5ad")
    message = "clipped.h5ad: holds predictions of format 1, this version reads 2 .*predict again and save"
    with pytest.raises(ValueError, match=message): PredictionSet.load(tmp_path/"clipped.h5ad")
    (tmp_path/"text.h5ad").write_text("no")
    with pytest.raises(ValueError, match="text.h5ad: cannot be read as h5ad"):
        PredictionSet.load(tmp_path/"text.h5ad")


DAMAGE = dict(
    name=(lambda s: "", "name: found ''"),
    genes=(lambda s: ("g1", *s.genes[1:]), "genes: 'g1' stands twice"),
    expression_space=(lambda s: "counts", "expression_space: found 'counts'"),
    observed=(lambda s: s.observed[:-1], "observed: found shape"),
    control=(lambda s: s.control.tocsc(), "control: found csc_matrix; give a csr_matrix"),
    control_mean=(lambda s: s.control_mean[:, :-1], "control_mean: found shape"),
    delta=(lambda s: s.delta*np.inf, "delta: found .* NaN or infinite"),
    train_delta=(lambda s: s.train_delta[None], "train_delta: found shape"),
    cell_delta=(lambda s: s.cell_delta.T, "cell_delta: found shape"),
    variance=(lambda s: -s.variance, "variance: found .*; a variance is not negative"),
    delta_variance=(lambda s: s.delta_variance - 1, "delta_variance: found .*; a variance is not negative"),
    provenance=(lambda s: dict(array=np.ones(2)), "provenance: .*not JSON serializable"))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_field_is_refused_by_name(template, name):
    ps = filled(template)
    damage, message = DAMAGE[name]
    with pytest.raises(ValueError, match=f"PredictionSet.{message}"): replace(ps, **{name: damage(ps)})


def test_a_cell_in_another_group_twice_or_nowhere_is_refused(template):
    cells, groups = template.cells, template.groups
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message): replace(template, **changes)
    moved = cells.assign(group=np.roll(cells["group"], 1))
    refused("in a group of another perturbation", cells=moved)
    refused("cells: 'c.*' stands twice", cells=cells.set_index(cells.index[[0, 0, *range(2, len(cells))]]))
    refused("found -1 to", cells=cells.assign(group=cells["group"] - 1))
    refused("cells: lacks batch, control", cells=cells.drop(columns=["batch", "control"]))
    refused("groups: a perturbation of a cell type stands twice",
            groups=groups.iloc[[0, 0, *range(2, len(groups))]].reset_index(drop=True))
    refused("n_cells.*differs", groups=groups.assign(n_cells=groups["n_cells"] + 1))
    refused("cells: found no row", cells=cells[:0])


def test_what_is_not_prepared_or_empty_is_refused(case):
    adata, split = case
    counts = adata.copy()
    counts.uns["biojepa"] = dict(adata.uns["biojepa"], expression_space="counts")
    with pytest.raises(ValueError, match="found 'counts'; predictions are made from log-normalised values"):
        test_set(counts, split)
    with pytest.raises(ValueError, match="part 'test': the split leaves no perturbed cell"):
        test_set(adata[adata.obs.condition != "nothing"][:0].copy(), split)
    with pytest.raises(ValueError, match="control: found 'plate'"): test_set(adata, split, control="plate")
    with pytest.raises(ValueError, match="by: found 'gene'"): pseudobulk(test_set(adata, split), by="gene")


# ---- a model's predictions ----

SMALL = dict(n_genes=7,
             d_model=8,
             n_heads=2,
             n_encoder_layers=1,
             n_masked_predictor_layers=1,
             n_predictor_layers=1,
             d_protein=5,
             d_dna=6)


def bank(keys, modality=Modality.PROTEIN, width=5):
    return FeatureBank(tuple(keys),
                       np.random.default_rng(0).normal(size=(len(keys), width)), modality,
                       dict(featurizer="random"))


def made(**switches):
    "A random model in which every part has something to say."
    torch.manual_seed(0)
    return alive(BioJEPA(ModelConfig(**SMALL, **switches)), std=.2)


def described(adata): return (table := ActionTable.from_anndata(adata)), action_batch(table, bank("ABCDE"))


@torch.no_grad()
def plain_change(model, adata, cell, actions, p):
    "One pair through the model's public interface, without the collapse."
    x, size = torch.from_numpy(adata[cell].X.toarray()), torch.tensor([float(adata.obs.log_library_size[cell])])
    predicted = model.predict_latent(x, size, actions.take([p]), collapse=False)
    look = model.encoder if model.config.delta_from == "encoder" else model.teacher
    delta = model.readout.delta(predicted.mean, look(x, size, collapse=False).genes())
    return delta[0].numpy(), model.readout.variance(predicted.logvar.exp())[0].numpy()


SWITCHES = dict(released={},
                laptop=dict(predicts="change",
                            readout="per_gene",
                            library_norm=(7., 15.),
                            delta_from="teacher"),
                naive=dict(value_embedding="offset", mask_keeps_gene=True))


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_predictions_are_the_models_own_pair_by_pair(case, switches):
    adata, split = case
    model, (table, actions) = made(**switches), described(adata)
    ps = predictions(Subject(model, adata, split, actions, table), batch_size=7, progress=False)
    delta, variance = map(
        np.stack,
        zip(*(plain_change(model, adata, row.control, actions, table.perturbation.index(row.perturbation))
              for row in ps.cells.itertuples())))
    assert np.abs(delta).mean() > .01 and variance.min() > 0
    np.testing.assert_allclose(ps.cell_delta, delta, atol=2e-5)
    np.testing.assert_allclose(ps.cells_predicted(), np.maximum(ps.control.toarray() + delta, 0), atol=2e-5)
    np.testing.assert_allclose(ps.variance, variance, rtol=1e-4)
    for p in range(len(ps.groups)):
        mine = ps.group == p
        np.testing.assert_allclose(ps.delta[p], delta[mine].mean(0), atol=2e-5)
        np.testing.assert_allclose(ps.delta_variance[p], variance[mine].mean(0)/mine.sum(), rtol=1e-4)
    plain = test_set(adata, split)
    assert (ps.cells == plain.cells).all().all() and ps.provenance["data"] == plain.provenance["data"]


def test_a_template_is_filled_in_and_not_asked_for_again(case, template, monkeypatch):
    adata, split = case
    model, (table, actions) = made(), described(adata)
    asked = Subject(model, adata, split, actions, table)
    plain = predictions(asked, progress=False)
    monkeypatch.setattr("biojepa.predict.model.test_set", None)
    given = predictions(asked, template=template, progress=False)
    np.testing.assert_array_equal(given.cell_delta, plain.cell_delta)
    assert given.observed is template.observed and given.control is template.control
    assert given.provenance == plain.provenance
    with pytest.raises(ValueError, match="part, seed: the template decides that already"):
        predictions(asked, template=template, part="val", seed=1)
    other = held_out(adata, train=TRAIN[:2], val=VAL + TRAIN[2:])
    with pytest.raises(ValueError, match="the template was made with"):
        predictions(asked._replace(split=other), template=template, progress=False)


def test_half_precision_rounds_cells_and_not_means(case, template):
    adata, split = case
    model, (table, actions) = made(), described(adata)
    asked = Subject(model, adata, split, actions, table)
    full, half = (predictions(asked, template=template, dtype=d, progress=False) for d in (np.float32, np.float16))
    assert half.cell_delta.dtype == half.variance.dtype == np.float16
    np.testing.assert_array_equal(half.delta, full.delta)
    np.testing.assert_array_equal(half.delta_variance, full.delta_variance)
    np.testing.assert_allclose(half.cells_delta(), full.cells_delta(), rtol=2**-11)


def test_batch_size_changes_nothing(case):
    adata, split = case
    model, (table, actions) = made(), described(adata)
    asked = Subject(model, adata, split, actions, table)
    one, many = (predictions(asked, batch_size=n, progress=False) for n in (1, 10**4))
    np.testing.assert_allclose(one.cell_delta, many.cell_delta, atol=2e-5)


def test_each_control_is_encoded_once_and_equal_pairs_are_answered_once(case):
    adata, _ = case
    model, (table, actions) = made(), described(adata)
    seen = dict(encoder=0, teacher=0, predictor=0)
    for name in seen:
        def count(module, args, output, name=name):
            seen[name] += len(args[0] if torch.is_tensor(args[0]) else args[1])
        getattr(model, name).register_forward_hook(count)
    rng = np.random.default_rng(0)
    controls, action = rng.choice([3, 50, 7, 20], 40), rng.integers(1, 4, 40)
    positions = np.concatenate(
        [at for at, _, _ in changes(model, adata, controls, action, actions, 3, progress=False)])
    assert sorted(positions) == list(range(40))
    assert seen == dict(encoder=4, teacher=4, predictor=len({*zip(controls, action)}))


def test_a_finished_run_holds_everything(case, tmp_path):
    adata, split = case
    model, (table, actions) = made(), described(adata)
    held = dict(model=model,
                folder=tmp_path/"abc-0",
                log=pd.DataFrame(),
                adata=adata,
                split=split,
                actions=actions,
                table=table,
                experiment=preset("smoke"))
    run = Run(**dict.fromkeys(Run._fields) | held)
    ps = predictions(run, progress=False)
    by_hand = predictions(Subject(model, adata, split, actions, table), progress=False)
    np.testing.assert_array_equal(ps.cell_delta, by_hand.cell_delta)
    assert ps.provenance["run"] == "abc-0" and len(ps.provenance["experiment"]) == 12
    assert set(predictions(run, part="val", progress=False).groups["condition"]) == set(VAL)
    with pytest.raises(ValueError, match="found a model alone; give Subject.*, or a finished Run"):
        predictions(model, adata)
    with pytest.raises(ValueError, match="make it with ActionTable.from_anndata"):
        predictions(run._replace(table=table.select(range(3))), progress=False)


# ---- AnnData in, AnnData out ----

@pytest.mark.parametrize("level", ["perturbation", "cell"])
def test_predict_gives_the_models_values_in_named_layers(case, level):
    adata, _ = case
    model, controls = made(predicts="change"), adata[adata.obs.condition == "ctrl"].copy()
    labels = ["E", "A+E", "ctrl"]   # A+E was never made
    out = predict(Pretrained(model, list(adata.var_names), []),
                  controls,
                  labels,
                  bank("ABCDE"),
                  mode="crispri",
                  n_cells=4,
                  level=level,
                  batch_size=5,
                  progress=False)
    table = ActionTable.from_conditions(labels, Mode.CRISPRI)
    actions = action_batch(table, bank("ABCDE"))
    whole = predict(model,
                    controls,
                    labels,
                    bank("ABCDE"),
                    mode="crispri",
                    n_cells=4,
                    level="cell",
                    progress=False)
    assert set(out.obs["condition"]) == {"E+ctrl", "A+E", "ctrl"} and set(out.obs["cell_type"]) == {"x", "y"}
    assert out.obs.loc[out.obs["condition"] != "ctrl", "mode"].eq("crispri").all()
    for i, row in enumerate(out.obs.itertuples()):
        cells = [row.control] if level == "cell" else whole.obs.query(
            "condition == @row.condition and cell_type == @row.cell_type")["control"]
        delta, variance = map(
            np.stack,
            zip(*(plain_change(model, adata, c, actions, table.condition.index(row.condition))
                  for c in cells)))
        x = adata[cells].X.toarray()
        for name, value in dict(delta=delta, predicted=np.maximum(x + delta, 0), control=x).items():
            np.testing.assert_allclose(out.layers[name][i], value.mean(0), atol=2e-5)
        np.testing.assert_allclose(out.layers["sd"][i], np.sqrt(variance.mean(0)), rtol=1e-4)
        assert len(cells) == (1 if level == "cell" else row.n_cells)
    np.testing.assert_array_equal(out.X, out.layers["predicted"])
    assert out.shape == ((24 if level == "cell" else 6), 7) and out.obs_names.is_unique


def test_the_output_says_what_it_is_and_survives_the_disk(case, tmp_path):
    out = predict(made(), case[0], ["D"], bank("ABCDE"), progress=False)
    out.write_h5ad(tmp_path/"out.h5ad")
    about = ad.read_h5ad(tmp_path/"out.h5ad").uns["biojepa"]
    assert about["expression_space"] == "log1p" and "not counts" in about["values"] and set(
        about["layers"]) == {"predicted", "delta", "sd", "control"}


def test_number_seed_and_order_of_cells(case):
    adata, features = case[0], bank("ABCDE")
    model, n = made(), (case[0].obs.condition == "ctrl").sum()
    ask = lambda a=adata, **k: predict(model, a, ["D"], features, level="cell", progress=False, **k)
    assert len(ask(n_cells=None)) == n and len(ask(n_cells=3)) == 6 and len(ask(n_cells=10**6)) == n
    assert (ask(n_cells=3).obs_names == ask(n_cells=3).obs_names).all() and (ask(
        n_cells=3).obs_names != ask(n_cells=3, seed=1).obs_names).any()


def test_perturbed_cells_in_the_input_change_nothing_but_the_mode(case):
    adata, model = case[0].copy(), made()
    adata.obs["mode"] = pd.Categorical(np.where(adata.obs.condition == "ctrl", "control", "knockout"))
    controls = adata[adata.obs.condition == "ctrl"].copy()
    a = predict(model, adata, ["D"], bank("D"), progress=False)
    b = predict(model, controls, ["D"], bank("D"), "knockout", progress=False)
    c = predict(model, controls, ["D"], bank("D"), progress=False)
    np.testing.assert_allclose(a.X, b.X, atol=1e-6)
    assert a.obs["mode"].iloc[0] == "knockout" and c.obs["mode"].iloc[0] == "unknown"
    assert np.abs(a.layers["delta"] - c.layers["delta"]).max() > 1e-3


def test_guides_come_in_a_table(case):
    adata = case[0]
    guides = FeatureBank(("ACGT", "GGGT"), np.random.default_rng(1).normal(size=(2, 6)), Modality.DNA, {})
    table = ActionTable(perturbation=("D|1", "D|2"),
                        condition=("D+ctrl", )*2,
                        targets=(("D", ), )*2,
                        guide_id=("1", "2"),
                        guide_seqs=(("ACGT", ), ("GGGT", )),
                        mode=(Mode.CRISPRI, )*2,
                        n_cells=(0, 0))
    out = predict(made(), adata, table, [bank("D"), guides], progress=False)
    assert out.obs["perturbation"].tolist() == ["D|1", "D|1", "D|2", "D|2"
                                                ] and np.abs(out.X[0] - out.X[2]).max() > 1e-3


def test_genes_are_put_in_order_only_if_all_are_there(case, tmp_path):
    adata, model = case[0], made()
    folder = save_pretrained(model, tmp_path/"model", list(adata.var_names), [])
    wide = ad.concat([
        adata[:, ::-1],
        ad.AnnData(np.ones((adata.n_obs, 1), np.float32),
                   obs=adata.obs[[]],
                   var=pd.DataFrame({"gene_name": ["other"]}, index=["other"]))
    ],
                     axis=1,
                     merge="same",
                     uns_merge="first")
    wide.obs, wide.X = adata.obs, sp.csr_matrix(wide.X, dtype=np.float32)
    a, b = (predict(folder, x, ["D"], bank("D"), progress=False) for x in (adata, wide))
    assert list(b.var_names) == list(adata.var_names)
    np.testing.assert_allclose(a.X, b.X, atol=1e-6)
    with pytest.raises(ValueError, match="1 of 7 genes are missing: g3"):
        predict(folder, adata[:, [0, 1, 2, 4, 5, 6]].copy(), ["D"], bank("D"))
    with pytest.raises(ValueError, match="found 6 genes, the model reads 7"):
        predict(model, adata[:, :6].copy(), ["D"], bank("D"))


def test_bad_input_is_refused_by_name(case, tmp_path):
    adata, model, features = case[0], made(), bank("ABCDE")
    def refused(message, a=adata, labels=("D",), f=features, m=model, error=ValueError, **k):
        with pytest.raises(error, match=message):
            predict(m, a, labels if isinstance(labels, str) else list(labels), f, progress=False, **k)
    refused(
        r"2 of 3 perturbations have no feature .* NEW\+ctrl: NEW \(PROTEIN\), D\+OTHER: OTHER \(PROTEIN\); the "
        r"model can only",
        labels=["D", "NEW", "D+OTHER"],
        error=MissingFeatureError)
    refused("perturbations: found none", labels=[])
    refused("found the single label 'D'", labels="D")
    refused("level: found 'guide'", level="guide")
    refused("n_cells: found 0", n_cells=0)
    refused("mode: found 'edited'", mode="edited")
    refused("has 4 columns, the model reads 5 for protein", f=bank("D", width=4))
    refused("no such folder", m=tmp_path/"nothing")
    refused("model: found int", m=3)
    refused("found no control cells", a=adata[adata.obs.condition != "ctrl"].copy())
    raw, unknown = adata.copy(), adata.copy()
    raw.X.data[:] = np.ceil(raw.X.data)
    refused("declared as log1p but found whole numbers", a=raw)
    raw.uns["biojepa"] = dict(raw.uns["biojepa"], expression_space="counts")
    refused("found 'counts'.*prepare", a=raw)
    del unknown.uns["biojepa"]
    refused("biojepa", a=unknown)


def test_a_finished_run_answers_unseen_targets_in_five_lines(tmp_path):
    "As in the README."
    from training_cases import OPTIONS, small_data, small_experiment

    from biojepa.training.run import run_stages
    data = small_data()
    run = run_stages(small_experiment(), **data, runs=tmp_path, **OPTIONS)
    cells = data["adata"][data["adata"].obs.condition == "ctrl"].copy()
    unseen = [data["split"].test[0].split("+")[0], data["split"].test[1].split("+")[0]]
    out = predict(run.folder/"model", cells, [unseen[0], "+".join(unseen)], progress=False)
    assert list(out.obs.condition) == [f"{unseen[0]}+ctrl", "+".join(
        sorted(unseen))] and out.shape == (2, 40) and {"predicted", "delta", "sd"} <= set(out.layers)
    assert out.uns["biojepa"]["expression_space"] == "log1p"
    same = predict(run, cells, [unseen[0], "+".join(unseen)], progress=False)
    np.testing.assert_array_equal(out.X, same.X)
    with pytest.raises(ValueError, match="NOBODY"):
        predict(run.folder/"model", cells, ["NOBODY"], progress=False)
    with pytest.raises(ValueError, match="features: none given"):
        predict(run.model, cells, unseen, progress=False)
