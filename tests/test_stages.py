"The four stages: what each trains, what it must not touch, what it refuses."
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import small_data

from biojepa.actions.action_tokens import action_batch
from biojepa.actions.featurizers import featurize
from biojepa.actions.recall import remember, with_recall
from biojepa.actions.vocabulary import ActionTable, Modality, Mode
from biojepa.config import MemoryConfig, ModelConfig, StageConfig
from biojepa.data.batches import dense_rows
from biojepa.data.datasets import load_dataset
from biojepa.data.loaders import cell_loader
from biojepa.data.preprocess import prepare
from biojepa.data.splits import make_split
from biojepa.model.biojepa import BioJEPA, Context
from biojepa.predict.many import predict_many
from biojepa.training.align import align_stage, retrieval_report
from biojepa.training.dynamics import (
    GeneMaps, dynamics_stage, gene_maps, last_layers, left_out_gains, mean_targets, noisy, scale_residual_,
    settle_
)
from biojepa.training.loop import fit
from biojepa.training.monitor import CollapseMonitor
from biojepa.training.pretrain import pretrain_stage
from biojepa.training.readout import readout_stage

SHORT = StageConfig(epochs=1, batch_size=256, lr=1e-3)


class Screen:
    "A small simulated screen with its actions."
    def __init__(self):
        full = prepare(load_dataset("simulated"))
        rows = np.sort(np.random.default_rng(0).permutation(full.n_obs)[:1500])
        self.adata = full[rows, :60].copy()
        self.adata.obs["perturbation"] = self.adata.obs["perturbation"].cat.remove_unused_categories()
        self.split, self.table = make_split(self.adata, seed=1), ActionTable.from_anndata(self.adata)
        guides = {g: s for g, s, t in zip(self.table.guide_id, self.table.guide_seqs, self.table.targets) if t}
        self.protein, self.dna = (featurize("kmer", x, modality=m, progress=False, cache=False)
                                  for x, m in ((full.uns["protein_sequences"], Modality.PROTEIN),
                                               (guides, Modality.DNA)))
        self.anchor, self.positive = action_batch(self.table, self.protein,
                                                  mode=Mode.CONTROL), action_batch(self.table, self.dna)
        self.actions = action_batch(self.table, [self.protein, self.dna])
        self.train = self.table.rows(self.adata, self.split, "train")

    def stage(self, name, model, config=SHORT):
        if name == "pretrain": return pretrain_stage(model, self.adata, self.split, config)
        if name == "align":
            return align_stage(model, self.anchor, self.positive, self.table.target_codes, self.train,
                               config)
        return dict(dynamics=dynamics_stage, readout=readout_stage)[name](model, self.adata, self.split,
                                                                          self.actions, config)


@pytest.fixture(scope="module")
def screen(): return Screen()


def small(seed=0, **switches):
    torch.manual_seed(seed)
    return BioJEPA(
        ModelConfig(n_genes=60,
                    d_model=16,
                    n_heads=2,
                    n_encoder_layers=1,
                    n_masked_predictor_layers=1,
                    n_predictor_layers=1,
                    **switches))


def values(model): return {k: v.clone() for k, v in model.state_dict().items()}
def changed(model, before):
    return {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


@pytest.mark.parametrize("name, parts", [("pretrain", {"encoder", "masked_predictor", "teacher"}),
                                        ("align", {"composer"}), ("dynamics", {"predictor", "composer"}),
                                        ("readout", {"readout"})])
def test_a_stage_changes_its_parts_and_no_other(screen, tmp_path, name, parts):
    model = small()
    before, required = values(model), [p.requires_grad for p in model.parameters()]
    log = fit(model, screen.stage(name, model), tmp_path, progress=False)
    assert changed(model, before) == parts
    assert [p.requires_grad for p in model.parameters()] == required
    assert np.isfinite(log.loss.dropna()).all() and any(c.startswith("val_") for c in log)


@pytest.mark.parametrize("target", ["cell", "mean"])
@pytest.mark.parametrize("predicts", ["latent", "change"])
def test_dynamics_in_every_form(screen, tmp_path, target, predicts):
    model = small(predicts=predicts, mask_context=False)
    before = values(model)
    stage = screen.stage("dynamics", model,
                         SHORT.changed(target=target, action_noise=.5 if target == "mean" else 0))
    fit(model, stage, tmp_path, progress=False)
    assert changed(model, before) == {"predictor", "composer"}


def test_steps_are_functions_of_weights_batch_and_generator(screen):
    model, generator = small(), torch.Generator()
    for name in ("pretrain", "dynamics"):
        stage = screen.stage(name, model)
        batch = next(iter(stage.loader))
        losses = [stage.step(model, batch, generator.manual_seed(s)).loss.item() for s in (1, 1, 2)]
        assert losses[0] == losses[1] != losses[2]


def test_no_stage_sees_a_held_out_perturbation(screen):
    model = small()
    held = set(screen.split.cells(screen.adata, "test")) | set(screen.split.cells(screen.adata, "val"))
    assert not held & {c for b in screen.stage("pretrain", model).loader for c in b.cell.tolist()}
    for name in ("dynamics", "readout"):
        assert not held & {c for b in screen.stage(name, model).loader for c in b.pert.tolist()}
    codes = set(screen.table.target_codes[screen.train].tolist())
    assert {t for b in screen.stage("align", model).loader for t in b.target.tolist()} < codes


def noise_case(screen):
    "A model, its targets, the condition of each perturbation, and latents and changes by trained condition."
    model, adata = small(), screen.adata
    maps = GeneMaps(torch.ones(60, 4), torch.ones(60, 4))
    targets = mean_targets(adata, screen.split, torch.zeros(adata.n_obs, dtype=torch.long), maps)
    with torch.no_grad(): latent = model.composer(screen.actions)*screen.actions.present[..., None]
    condition, left = np.array(screen.table.condition), targets.delta[:, 0].clone().numpy()
    if screen.actions.genes is not None:
        for row, genes in zip(left, screen.actions.genes.numpy()): row[genes[genes >= 0]] = 0
    names = np.unique(condition[screen.train])
    own = [[p for p in screen.train if condition[p] == name] for name in names]
    Z, Y = (np.stack([values[at].mean(0) for at in own]).astype(float)
            for values in (latent.flatten(1).numpy(), left))
    return model, targets, condition, Z, Y, latent[screen.actions.present].square().mean().item()


def test_noise_is_chosen_as_by_leaving_each_target_out(screen):
    "Against a ridge regression fitted anew without each condition; all guides of one go together."
    model, targets, condition, Z, Y, size = noise_case(screen)
    gains = left_out_gains(model, screen.actions, targets, condition, (.5, 2.))
    for noise, gain in gains.items():
        error = 0
        for i in range(len(Z)):
            rest = np.arange(len(Z)) != i
            fitted = Ridge(alpha=len(Z)*noise**2*size).fit(Z[rest], Y[rest])
            error += np.square(Y[i] - fitted.predict(Z[i:i + 1])[0]).sum()
        assert gain == pytest.approx(1 - error/np.square(Y).sum(), abs=1e-6)


def test_noise_on_latents_is_a_ridge_penalty(screen):
    "Bishop (1995): least squares on many noisy copies of the latents is ridge with n s² σ²."
    *_, Z, Y, size = noise_case(screen)
    Z, Y, rng, noise = Z[:, :6] - Z[:, :6].mean(0), Y - Y.mean(0), np.random.default_rng(0), 1.
    copies = 4000
    noisy_Z = np.tile(Z, (copies, 1)) + noise*np.sqrt(size)*rng.normal(size=(copies*len(Z), 6))
    found = np.linalg.lstsq(noisy_Z, np.tile(Y, (copies, 1)), rcond=None)[0]
    exact = np.linalg.solve(Z.T @ Z + len(Z)*noise**2*size*np.eye(6), Z.T @ Y)
    np.testing.assert_allclose(found, exact, atol=.02*np.abs(exact).max())


def test_dynamics_takes_the_noise_that_left_out_targets_prefer(screen):
    "Planted: changes that are linear in the latents want the least noise, changes drawn at random the most."
    model, targets, condition, *_ = noise_case(screen)
    with torch.no_grad(): latent = (model.composer(screen.actions)*screen.actions.present[..., None]).flatten(1)
    measured, draw = targets.delta.any(-1, keepdim=True), torch.Generator().manual_seed(0)
    way = torch.randn(latent.shape[1], 60, generator=draw)
    linear = targets._replace(delta=torch.where(measured, (latent @ way)[:, None], 0.))
    drawn = targets._replace(delta=torch.where(measured, torch.randn(targets.delta.shape, generator=draw), 0.))
    plain, noises = screen.actions._replace(genes=None), (.125, .5, 2., 8.)
    assert left_out_gains(model, plain, linear, condition, noises).idxmax() == .125
    assert left_out_gains(model, plain, drawn, condition, noises).idxmax() == 8
    stage = screen.stage("dynamics", small(), SHORT.changed(target="mean", action_noise=noises))
    gains = left_out_gains(small(), screen.actions, targets, condition, noises)
    assert stage.config.action_noise == gains.idxmax() and isinstance(stage.config.action_noise, float)
    with pytest.raises(ValueError, match="found no amount"): SHORT.changed(action_noise=())


def test_mean_targets_against_a_loop_over_cells(screen):
    adata, split = screen.adata, screen.split
    maps = GeneMaps(torch.ones(60, 4), torch.arange(240.).reshape(60, 4))
    found = mean_targets(adata, split, torch.zeros(adata.n_obs, dtype=torch.long), maps)
    code, X = screen.table.codes(adata), adata.X.toarray().astype(float)
    controls, batch = split.controls(adata, "train"), adata.obs["batch"].astype(str).to_numpy()
    squares = []
    for p in screen.train:
        rows = split.cells(adata, "train")
        rows = rows[code[rows] == p]
        naive = np.mean([X[r] - X[controls[batch[controls] == batch[r]]].mean(0) for r in rows], 0)
        np.testing.assert_allclose(found.delta[p, 0], naive, atol=1e-5)
        squares.append(naive**2)
    assert not found.delta[np.setdiff1d(np.arange(len(screen.table)), screen.train)].any()
    assert found.scale.item() == pytest.approx(np.mean(squares), rel=1e-4)
    lifted = np.mean(squares, 0)[:, None]*maps.lift.numpy()**2
    assert found.lift_scale.item() == pytest.approx(lifted.mean(), rel=1e-4)
    codes = torch.tensor([screen.train[1], 0, screen.train[1]])
    assert torch.equal(found.rows(codes, torch.zeros(3, dtype=torch.long)), found.delta[codes, 0])


def test_each_line_has_targets_of_its_own(screen):
    adata = screen.adata.copy()
    adata.obs["cell_type"] = np.where(np.arange(adata.n_obs) % 2, "x", "y")
    slots = torch.from_numpy((adata.obs["cell_type"] == "y").to_numpy().astype(int))
    maps = GeneMaps(torch.ones(60, 4), torch.ones(60, 4))
    found, p = mean_targets(adata, screen.split, slots, maps).delta, screen.train[0]
    for slot, line in enumerate("xy"):
        own = adata[adata.obs["cell_type"] == line]
        alone = mean_targets(own, screen.split, torch.zeros(own.n_obs, dtype=torch.long), maps).delta
        torch.testing.assert_close(found[p, slot], alone[p, 0])


class Largest(TorchDispatchMode):
    "Bytes of the largest tensor that any operation gave."
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor): self.bytes = max(self.bytes, x.numel()*x.element_size())
        return out


def test_no_target_is_as_large_as_perturbations_by_genes_by_latent(screen):
    maps, P = GeneMaps(torch.ones(60, 16), torch.ones(60, 16)), len(screen.table)
    with Largest() as seen: mean_targets(screen.adata, screen.split, torch.zeros(1500, dtype=torch.long), maps)
    assert seen.bytes <= P*60*8     # double precision, one number for each perturbation and gene


def test_gene_maps_are_ridge_regressions(screen):
    from sklearn.linear_model import Ridge
    model, rows = small(), screen.split.cells(screen.adata, "train")[:300]
    decode, lift = gene_maps(model, screen.adata, rows, ridge=1e-2)
    size = screen.adata.obs["log_library_size"].to_numpy(np.float32)[rows]
    z = model.teacher(dense_rows(screen.adata.X, rows), torch.from_numpy(size)).genes()
    x = screen.adata.X[rows].toarray()
    for g in (0, 17, 59):
        np.testing.assert_allclose(lift[g], np.polyfit(x[:, g], z[:, g].detach(), 1)[0], rtol=2e-2, atol=2e-3)
        np.testing.assert_allclose(decode[g],
                                   Ridge(alpha=1e-2*len(rows)).fit(z[:, g].double(), x[:, g]).coef_,
                                   rtol=2e-2,
                                   atol=2e-3)


def test_predicting_no_change_costs_one(screen):
    model = small(predicts="change", mask_context=False)
    stage = screen.stage("dynamics", model, SHORT.changed(target="mean", batch_size=4000))
    out = stage.step(model, next(iter(stage.loader)), torch.Generator().manual_seed(0))
    assert abs(out.logs["delta"].item() - 1) < .25 and abs(out.logs["change"].item() - 1) < .25


@pytest.fixture(scope="module")
def remembering(screen):
    "A model with a memory, its actions, and the memories."
    screen.adata.obs["mode"] = "crispri"
    memories = remember(screen.adata, screen.split, [screen.protein], MemoryConfig())
    actions = action_batch(screen.table, screen.protein, genes=screen.adata.var_names)
    actions = with_recall(actions, screen.table.targets, memories, left_out=True)
    model = small(predicts="change", mask_context=False, delta_from="teacher", readout="per_gene", intervenes=True,
                  n_recalled=len(memories.responses))
    model.responses.copy_(torch.from_numpy(memories.responses))
    config = SHORT.changed(target="mean", batch_size=64)
    stage = dynamics_stage(model, screen.adata, screen.split, actions, config)
    return model, actions, memories, config, stage


def test_a_model_with_a_memory_starts_exactly_there(screen, remembering):
    "Δ before training: what is remembered, and at the targeted gene what the mode does to it."
    model, actions, memories, _, _ = remembering
    rows = screen.split.controls(screen.adata, "train")[:6]
    x = dense_rows(screen.adata.X, rows)
    size = torch.from_numpy(screen.adata.obs["log_library_size"].to_numpy(np.float32)[rows])
    context = Context(model, x, size)
    for p in (screen.train[0], screen.table.rows(screen.adata, screen.split, "test")[0]):
        own = actions.take(torch.full((6,), int(p)))
        with torch.no_grad():
            moved = model.shift(context, own).mean
            delta = model.delta(context, moved, None, own)
        targets = screen.table.targets[p]
        said = memories.of[0].answer([targets]).delta[0]
        if p == screen.train[0]:    # as if it had not been seen
            memory = memories.of[0]
            said = memory.change(memory.left_out())[memory.perturbations.index(targets)]
        others = np.flatnonzero(~np.isin(screen.adata.var_names, targets))
        alone = model.delta(context, model.shift(context, own._replace(genes=own.genes*0 - 1)).mean, None, own)
        np.testing.assert_allclose(alone.detach().numpy(), np.tile(said, (6, 1)), atol=2e-4)
        assert np.abs((delta - alone).detach().numpy()[:, others]).max() < .2  # attention carries a little of it


def test_the_lift_is_how_latents_move_with_expression(remembering, screen):
    model, actions, _, config, stage = remembering
    own = actions.take(torch.tensor([screen.train[0]]))
    context = Context(model, torch.rand(1, 60), torch.tensor([8.]))
    bare = own._replace(genes=own.genes*0 - 1)
    with torch.no_grad(): moved = model.shift(context, bare).mean[0]
    torch.testing.assert_close(moved, model.remembered(context, bare)[0, :, None]*model.lift)
    assert model.lift.abs().sum() > 0


def test_many_actions_in_one_context_remember_as_single_pairs_do(remembering, screen):
    model, actions, _, _, _ = remembering
    x, size, some = torch.rand(3, 60), torch.full((3,), 8.), actions.take(torch.from_numpy(screen.train[:2]))
    shared = predict_many(model, Context(model, x, size), some, relative=True)
    for p in range(2):
        own = some.take(torch.full((3,), p))
        with torch.no_grad(): moved = model.shift(Context(model, x, size), own).mean
        torch.testing.assert_close(shared[p], moved, atol=1e-5, rtol=1e-4)


def test_what_held_out_perturbations_do_not_confirm_is_dropped(screen, remembering):
    model, actions, _, config, _ = remembering
    last = model.predictor.mean
    def settled(weight):
        with torch.no_grad(): last.weight.copy_(weight)
        return settle_(model, screen.adata, screen.split, actions, config)
    junk = .3*torch.randn(last.weight.shape, generator=torch.Generator().manual_seed(1))
    assert settled(junk).share == 0 and not last.weight.any()
    found = settled(torch.zeros_like(junk))
    assert found.share == 0 and found.gain == 0 and found.n > 0


def test_what_held_out_perturbations_confirm_is_kept(screen, remembering, monkeypatch):
    "Twice of what is right is halved; the last layer is scaled by the share."
    model, actions, _, config, _ = remembering
    right, start = np.random.default_rng(0).normal(size=(2, 9, 60))
    last = model.predictor.mean
    with torch.no_grad(): last.weight.fill_(1.)
    answers = iter([(start + right, start + 2*right), (start + right, start)])
    monkeypatch.setattr("biojepa.training.dynamics.held_out_changes", lambda *_: next(answers))
    found = settle_(model, screen.adata, screen.split, actions, config)
    assert found.share == pytest.approx(.5) and found.n == 9 and found.gain == pytest.approx(1)
    torch.testing.assert_close(last.weight, torch.full_like(last.weight, .5))
    with torch.no_grad(): last.weight.zero_()


def test_a_memory_needs_actions_that_know_it(remembering, screen):
    model, actions, _, _, _ = remembering
    context, own = Context(model, torch.rand(1, 60), torch.tensor([8.])), actions.take(torch.tensor([1]))
    for wrong, said in ((None, "missing"), (own.recall[..., :2], "2 numbers")):
        with pytest.raises(ValueError, match=f"actions.recall: {said}"):
            model.shift(context, own._replace(recall=wrong))
    with pytest.raises(ValueError, match="n_recalled: a memory needs predicts='change'"):
        ModelConfig(n_recalled=3)


@pytest.fixture(scope="module")
def related(screen):
    "A model that sees relations of two kinds, none of them of the last 20 genes; and its actions."
    width = screen.protein.width
    model = small(predicts="change", mask_context=False, delta_from="teacher", sees_relations=True, n_relations=2)
    with torch.no_grad():
        model.gene_features[:40] = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    return model, action_batch(screen.table, screen.protein, genes=screen.adata.var_names)


def test_relations_are_products_of_features_kind_by_kind(related, screen):
    model, actions = related
    found, half = model.related(actions), screen.protein.width//2
    for p in screen.train[:5]:
        for k, part in enumerate((slice(half), slice(half, None))):
            feature = sum(screen.protein.select([t]).values[0] for t in screen.table.targets[p])[part]
            expected = model.gene_features[:, part].numpy() @ feature
            np.testing.assert_allclose(found[p, :, k].numpy(), expected, atol=1e-4)


def test_what_a_relation_does_begins_with_nothing_and_spares_genes_without_one(related, screen):
    model, actions = related
    own = actions.take(torch.from_numpy(screen.train[:3]))
    context = Context(model, torch.rand(3, 60), torch.full((3,), 8.))
    with torch.no_grad():
        assert not model.shift(context, own).mean.any()
        model.predictor.neighbours.out.weight.normal_()
        moved = model.shift(context, own).mean
        shared = predict_many(model, context, own, relative=True)
        other = own._replace(mode=own.mode + 1)
        assert not torch.allclose(model.shift(context, other).mean, moved)
        model.predictor.neighbours.out.weight.zero_()
    assert moved[:, :40].abs().min() > 0 and not moved[:, 40:].any()
    torch.testing.assert_close(shared[[0, 1, 2], [0, 1, 2]], moved, atol=1e-5, rtol=1e-4)


def test_what_a_relation_does_is_settled_with_the_rest(related):
    model, _ = related
    with torch.no_grad():
        for layer in last_layers(model): layer.weight.fill_(1.)
    scale_residual_(model, .25)
    for layer in last_layers(model): torch.testing.assert_close(layer.weight, torch.full_like(layer.weight, .25))
    with torch.no_grad():
        for layer in last_layers(model): layer.weight.zero_()


def test_noise_leaves_absent_tokens_and_no_noise_leaves_all():
    action, present = torch.randn(50, 2, 40), torch.arange(2).expand(50, 2) == 0
    action = action*present[..., None]
    g = torch.Generator().manual_seed(0)
    assert noisy(action, present, 0., g) is action
    moved = noisy(action, present, .5, g) - action
    assert not moved[:, 1].any() and abs(moved[:, 0].std().item() -
                                         .5*action[:, 0].square().mean().sqrt().item()) < .05


def test_retrieval_of_unrelated_descriptions_is_chance(screen):
    differences = []
    for seed in range(5):
        other = screen.positive._replace(features=torch.randn(
            screen.positive.features.shape, generator=torch.Generator().manual_seed(seed)))
        r = retrieval_report(small(seed), other, screen.positive, screen.table.target_codes, screen.train,
                             screen.train)
        differences.append((r["top10"] - r["chance_top10"], r["mean_rank"]/r["chance_mean_rank"] - 1))
    assert np.abs(np.mean(differences, 0)).max() < .1


def test_identical_descriptions_are_found(screen):
    report = retrieval_report(small(), screen.positive, screen.positive, screen.table.target_codes,
                              screen.train, screen.train)
    assert report["top1"] == 1 and report["mean_rank"] == 1


def test_readout_begins_at_least_squares_and_stays_good(screen, tmp_path):
    model = small(readout="per_gene", initial_values="fan_in")
    log = fit(model,
              screen.stage("readout", model, SHORT.changed(lr=1e-4, latents="observed")),
              tmp_path,
              progress=False)
    ends = log.dropna(subset=["val_mse_observed"])
    assert (ends.val_mse_observed < .1*ends.val_mse_no_change).all()


def test_what_is_refused(screen):
    model = small()
    with pytest.raises(ValueError, match="actions: found 3 rows"):
        dynamics_stage(model, screen.adata, screen.split, screen.actions.take(torch.arange(3)), SHORT)
    with pytest.raises(ValueError, match="every perturbation's mean change is zero"):
        still = screen.adata.copy()
        still.X = still.X*0
        maps = GeneMaps(torch.ones(60, 4), torch.ones(60, 4))
        mean_targets(still, screen.split, torch.zeros(still.n_obs, dtype=torch.long), maps)
    with pytest.raises(ValueError, match="held_out\\n.*less than 1"): SHORT.changed(held_out=1)


def test_without_vicreg_the_monitor_fires(tmp_path):
    "Nothing but VICReg keeps a student that is its own teacher from making all cells alike."
    data, found = small_data(), {}
    for name, weights in dict(with_vicreg=(25., 25., 1.), without=(25., 0., 0.)).items():
        torch.manual_seed(0)
        sizes = dict(n_genes=40,
                     d_model=16,
                     n_heads=2,
                     n_encoder_layers=1,
                     n_masked_predictor_layers=1,
                     n_predictor_layers=1)
        model = BioJEPA(
            ModelConfig(**sizes,
                        initial_values="fan_in",
                        library_norm=(7., 1.),
                        ema_momentum=0.,
                        vicreg_weights=weights))
        monitor = CollapseMonitor(
            model, next(iter(cell_loader(data["adata"], data["split"], "train", batch_size=128))),
            torch.arange(0, 40, 4))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            stage = StageConfig(epochs=60, batch_size=32, lr=2e-2)
            stage = pretrain_stage(model, data["adata"], data["split"], stage, monitor=monitor)
            log = fit(model, stage, tmp_path/name, progress=False, validate_every=100)
        found[name] = (log.collapsed.max(), log.std_teacher.min()/monitor.start["std_teacher"],
                       any("std_teacher" in str(w.message) for w in said))
    assert found["with_vicreg"][0] == 0 and found["with_vicreg"][1] > .9 and not found["with_vicreg"][2]
    assert found["without"][0] == 1 and found["without"][1] < .5 and found["without"][2], found


def test_a_finished_readout_is_read_on_a_machine_that_rounds_otherwise(screen, tmp_path, monkeypatch):
    "Where the readout begins is computed from latents; a finished stage must not depend on the last bit of it."
    begun, weights = [], []
    monkeypatch.setattr(
        "biojepa.training.readout.training_maps", lambda model, *_: begun.append(1) or GeneMaps(
            torch.full((60, model.config.d_model), .5 + 1e-3*len(begun)), None))
    for _ in range(2):
        torch.manual_seed(0)
        model = small(readout="per_gene")
        stage = readout_stage(model, screen.adata, screen.split, screen.actions,
                              SHORT.changed(latents="observed"))
        fit(model, stage, tmp_path, progress=False)
        weights.append(model.readout.linear.weight.detach().clone())
    assert len(begun) == 1 and torch.equal(*weights)
