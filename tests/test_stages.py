"The four stages: what each trains, what it must not touch, what it refuses."
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import small_data

from biojepa.actions.action_tokens import action_batch
from biojepa.actions.featurizers import featurize
from biojepa.actions.vocabulary import ActionTable, Modality, Mode
from biojepa.config import ModelConfig, StageConfig
from biojepa.data.batches import dense_rows
from biojepa.data.datasets import load_dataset
from biojepa.data.loaders import cell_loader
from biojepa.data.preprocess import prepare
from biojepa.data.splits import make_split
from biojepa.model.biojepa import BioJEPA
from biojepa.training.align import align_stage, retrieval_report
from biojepa.training.dynamics import dynamics_stage, gene_maps, mean_changes, mean_targets, noisy
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


def test_mean_changes_against_a_loop_over_cells(screen):
    model, adata, split = small(), screen.adata, screen.split
    found = mean_changes(model, adata, split, len(screen.table), batch_size=100)
    code, size = screen.table.codes(adata), adata.obs["log_library_size"].to_numpy(np.float32)
    controls, batch = split.controls(adata, "train"), adata.obs["batch"].astype(str).to_numpy()
    latent = lambda rows: model.teacher(dense_rows(adata.X, rows), torch.from_numpy(size[rows])).genes(
    ).double()
    for p in (screen.train[0], screen.train[-1]):
        rows = split.cells(adata, "train"); rows = rows[code[rows] == p]
        naive = torch.stack([
            latent(np.array([r]))[0] - latent(controls[batch[controls] == batch[r]]).mean(0) for r in rows
        ]).mean(0)
        torch.testing.assert_close(found[p].double(), naive, rtol=2**-11 + 1e-4,
                                   atol=1e-5)  # kept in half precision
    assert not found[np.setdiff1d(np.arange(len(screen.table)), screen.train)].any()


class Largest(TorchDispatchMode):
    "Bytes of the largest tensor that any operation gave."
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor): self.bytes = max(self.bytes, x.numel()*x.element_size())
        return out


def test_mean_changes_are_held_once_and_in_half_precision(screen):
    model, n = small(), len(screen.table)
    with Largest() as seen: change = mean_changes(model, screen.adata, screen.split, n, batch_size=4)
    assert change.dtype == torch.float16 and seen.bytes == change.numel()*2 == n*60*model.config.d_model*2
    with Largest() as seen: targets = mean_targets(change, torch.ones(60, model.config.d_model))
    assert seen.bytes <= 4*change[0].numel()
    used = change[screen.train].double()
    torch.testing.assert_close(targets.scale.double(), used.square().mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(targets.delta_scale.double(), used.sum(-1).square().mean(), rtol=1e-5, atol=0)
    codes = torch.tensor([screen.train[1], 0, screen.train[1]])
    assert torch.equal(targets.rows(codes), change.float()[codes])


def test_gene_maps_are_ridge_regressions(screen):
    from sklearn.linear_model import Ridge
    model, rows = small(), screen.split.cells(screen.adata, "train")[:300]
    found = gene_maps(model, screen.adata, rows, ridge=1e-2)
    size = screen.adata.obs["log_library_size"].to_numpy(np.float32)[rows]
    z = model.teacher(dense_rows(screen.adata.X, rows), torch.from_numpy(size)).genes()
    x = screen.adata.X[rows].toarray()
    for g in (0, 17, 59):
        np.testing.assert_allclose(found[g],
                                   Ridge(alpha=1e-2*len(rows)).fit(z[:, g].double(), x[:, g]).coef_,
                                   rtol=2e-2,
                                   atol=2e-3)


def test_predicting_no_change_costs_one(screen):
    model = small(predicts="change", mask_context=False)
    stage = screen.stage("dynamics", model, SHORT.changed(target="mean", batch_size=4000))
    out = stage.step(model, next(iter(stage.loader)), torch.Generator().manual_seed(0))
    assert abs(out.logs["delta"].item() - 1) < .25 and abs(out.logs["change"].item() - 1) < .25


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
        mean_targets(torch.zeros(3, 2, 4), torch.ones(2, 4))
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
            stage = StageConfig(epochs=120, batch_size=32, lr=2e-2)
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
        "biojepa.training.readout.training_maps", lambda model, *_: begun.append(1) or torch.full(
            (60, model.config.d_model), .5 + 1e-3*len(begun)))
    for _ in range(2):
        torch.manual_seed(0)
        model = small(readout="per_gene")
        stage = readout_stage(model, screen.adata, screen.split, screen.actions,
                              SHORT.changed(latents="observed"))
        fit(model, stage, tmp_path, progress=False)
        weights.append(model.readout.linear.weight.detach().clone())
    assert len(begun) == 1 and torch.equal(*weights)
