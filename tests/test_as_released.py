"""What is called "as published" against the released formulas, written here from their definitions.

1. Pretraining loss and its gradient: 25 L1 at hidden genes + 25 hinge + 1 covariance of the student's latents, the
   teacher's added.
2. Dynamics loss and its gradient: 25 NLL at hidden genes + 25 hinge + 1 covariance of all genes' means, no distance.
3. Initial values: standard deviations of every part as released.
4. Optimisers: rates, weight decay, clipping, steps per epoch of each stage.
5. Controls stay, guides of one target repel each other, pairs are of all targets, a tenth of the pairs is kept aside.
6. Cross-attention is linear attention, the adapter's GELU is exact, Δ is decoded against the student's latents.
7. Every departure stands in one table, and the table knows every switch in which two presets differ.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_cases import alive, small_data, small_experiment

from biojepa.config import DEPARTURES, departures, preset
from biojepa.data.batches import ActionBatch, CellBatch, PairBatch
from biojepa.data.loaders import pair_loader
from biojepa.model.biojepa import BioJEPA, Context
from biojepa.model.objectives import dynamics_loss, pretrain_loss
from biojepa.model.predictor import CrossAttention
from biojepa.model.tokens import TokenSet, random_gene_mask
from biojepa.training.align import align_step
from biojepa.training.loop import one_cycle
from biojepa.training.readout import readout_step

PAPER = preset("paper")
G = 40
SMALL = preset("smoke").model.changed(n_genes=G, d_model=8, n_heads=2)


# --- losses

def hinge(z):
    "Mean over dimensions of max(0, 1 − √(var + 1e-4)), unbiased variance over the rows of (N, D)."
    centred = z - z.sum(0)/len(z)
    variance = (centred**2).sum(0)/(len(z) - 1)
    return torch.clamp(1 - torch.sqrt(variance + 1e-4), min=0).sum()/z.shape[1]


def off_diagonal(z):
    "Squared covariances between different dimensions of (N, D), over D."
    centred = z - z.sum(0)/len(z)
    total = 0.
    for j in range(z.shape[1]):
        for k in range(z.shape[1]):
            if j != k: total = total + ((centred[:, j]*centred[:, k]).sum()/(len(z) - 1))**2
    return total/z.shape[1]


def regularisation(own, teacher):
    "25 hinge + 1 covariance, over all tokens of all cells, of both branches."
    own, teacher = own.flatten(0, 1), teacher.flatten(0, 1)
    return 25*(hinge(own) + hinge(teacher)) + off_diagonal(own) + off_diagonal(teacher)


def released_pretraining(model, cells, mask):
    z = model.encoder(cells.x, cells.log_library_size, mask, collapse=False).x
    z_hat = model.masked_predictor(TokenSet(z)).x
    h = model.teacher(cells.x, cells.log_library_size, None, collapse=False).x
    return 25*torch.cat([(z_hat - h)[b, g].abs()
                         for b, g in mask.nonzero().tolist()]).mean() + regularisation(z, h)


def released_dynamics(model, pairs, actions, mask, shortcut):
    with torch.no_grad(): z = model.encoder(pairs.x_ctrl, pairs.log_library_size_ctrl, mask, collapse=False)
    h = model.teacher(pairs.x_pert, pairs.log_library_size_pert, None, collapse=False).x
    mean, logvar = model.predictor(z, model.composer(actions), actions.present, shortcut=shortcut)
    hidden = mask.nonzero().tolist()
    likelihood = [.5*(logvar[b, g] + (h[b, g] - mean[b, g])**2/logvar[b, g].exp()) for b, g in hidden]
    return 25*torch.cat(likelihood).mean() + regularisation(mean, h)


def double_batch(seed, n=4, n_tokens=1, expressed=.4):
    "Cells, pairs, actions and hidden genes in double precision."
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)
    cells = lambda: 3*random(n, G)*(random(n, G) < expressed)
    rows, zero = torch.arange(n), torch.zeros(n, n_tokens, dtype=torch.long)
    pairs = PairBatch(cells(), cells(), random(n), random(n), rows, rows, rows)
    actions = ActionBatch(random(n, n_tokens, 320) - .5, zero, zero, zero == 0)
    return CellBatch(cells(), random(n), rows), pairs, actions, random_gene_mask(n, G, generator=generator)


def double_model(seed, **switches):
    torch.manual_seed(seed)
    model = alive(BioJEPA(SMALL.changed(**switches))).double()
    for p in model.teacher.parameters(): p.data.add_(.05*torch.randn_like(p))  # no copy of the student any more
    return model


def value_and_gradient(model, loss):
    model.zero_grad()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return loss.item(), gradients


@pytest.mark.parametrize("collapse", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stage", ["pretrain", "dynamics"])
def test_losses_and_gradients_are_the_released_formulas(stage, seed, collapse):
    model, (cells, pairs, actions, mask) = double_model(seed), double_batch(seed)
    if stage == "pretrain":
        ours = pretrain_loss(model, cells, mask, collapse=collapse)
        reference = released_pretraining(model, cells, mask)
    else:
        ours = dynamics_loss(model, pairs, actions, mask, collapse=collapse)
        reference = released_dynamics(model, pairs, actions, mask, shortcut=collapse)
    value, gradient = value_and_gradient(model, ours.total)
    expected, expected_gradient = value_and_gradient(model, reference)
    assert value == pytest.approx(expected, rel=1e-9)
    assert gradient.keys() == expected_gradient.keys()
    size = math.sqrt(sum((g**2).sum().item() for g in expected_gradient.values()))
    for name, g in gradient.items(): assert (g - expected_gradient[name]).norm().item() <= 1e-9*size, name


def test_the_teachers_terms_are_constants_and_no_distance_is_in_the_dynamics():
    model, (cells, pairs, actions, mask) = double_model(0), double_batch(0)
    loss = dynamics_loss(model, pairs, actions, mask)
    assert "invariance" not in loss._fields
    for part in (loss.teacher_variance, loss.teacher_covariance): assert not part.requires_grad
    assert loss.total.item() == pytest.approx(
        25*loss.nll.item() + 25*(loss.variance + loss.teacher_variance).item() +
        (loss.covariance + loss.teacher_covariance).item(),
        rel=1e-12)


# --- initial values

def test_initial_standard_deviations():
    torch.manual_seed(0)
    model = BioJEPA(PAPER.model)
    std = lambda tensor: tensor.detach().float().std().item()
    assert std(model.encoder.tokenizer.gene.weight) == pytest.approx(.02, rel=.01)
    assert std(model.encoder.tokenizer.mask_token) == pytest.approx(.02, rel=.15)
    assert std(model.composer.mode.weight) == pytest.approx(1, rel=.1)
    for layer, fan_in in zip(model.composer.content.values(), (320, 768, 1536)):
        bound = 1/math.sqrt(fan_in)  # uniform within ± this, weights and biases
        assert layer.weight.abs().max() <= bound and std(layer.weight) == pytest.approx(bound/math.sqrt(3),
                                                                                        rel=.02)
        assert layer.bias.abs().max() <= bound and std(layer.bias) == pytest.approx(bound/math.sqrt(3), rel=.15)
    for p in model.composer.film.parameters(): assert not p.any()
    truncated = .8796  # standard deviation of a standard normal cut at ±2
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for layer in (m for n, m in linear.items() if not n.startswith(("composer", "teacher"))):
        bound = 2/math.sqrt(layer.in_features)
        assert not layer.bias.any() and layer.weight.abs().max() <= bound*(1 + 1e-6)
        assert std(layer.weight) == pytest.approx(truncated*bound/2, rel=.12)
    assert std(model.predictor.query.weight) == pytest.approx(truncated/16, rel=.01)


def test_other_initial_values_are_a_switch():
    torch.manual_seed(0)
    model = BioJEPA(SMALL.changed(initial_values="fan_in", d_model=64))
    assert model.encoder.tokenizer.gene.weight.std().item() == pytest.approx(1/8, rel=.1)
    assert not any(layer.bias.any() for layer in model.composer.content.values())


# --- optimisers

@pytest.fixture(scope="module")
def screen(): return small_data()


def stages(screen, **changes):
    "All four stages of a small screen with the paper's optimisers."
    from biojepa.actions.describe import describe_actions
    from biojepa.data.loaders import Roster
    from biojepa.training.run import build_stage
    experiment = small_experiment()
    batches = dict(pretrain=16, align=5, dynamics=16, readout=16)
    short = {s: getattr(PAPER, s).changed(epochs=2, batch_size=n) for s, n in batches.items()}
    experiment = experiment.changed(**short, **changes)
    actions = describe_actions(screen["adata"], screen["split"], screen["features"], experiment.data)
    torch.manual_seed(0)
    model = BioJEPA(experiment.model)
    build = lambda name: build_stage(name, model, experiment, Roster(screen["adata"], screen["split"]), actions)
    return model, actions, {name: build(name) for name in RELEASED}


#                    peak rates                            decay  clip   epochs, batch
RELEASED = dict(pretrain=(dict(encoder=1e-4, masked_predictor=1e-4), .05, 1., 100, 64),
                align=(dict(composer=4e-3), .01, None, 1000, 128),
                dynamics=(dict(predictor=1e-4, composer=1e-5), .05, 1., 20, 32),
                readout=(dict(readout=1e-3), .01, None, 20, 32))


@pytest.mark.parametrize("name", RELEASED)
def test_optimisers_are_the_released_ones(screen, name):
    rates, decay, clip, epochs, batch = RELEASED[name]
    config = getattr(PAPER, name)
    assert (config.epochs, config.batch_size, config.clip_norm, config.warmup) == (epochs, batch, clip, .05)
    model, _, built = stages(screen)
    optimizer, _ = one_cycle(model, built[name], 100)
    assert {p: g["max_lr"] for p, g in zip(built[name].trains, optimizer.param_groups)} == rates
    assert {g["weight_decay"] for g in optimizer.param_groups} == {decay}
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (.9, .999)


def test_an_epoch_has_whole_batches_only(screen):
    for name, stage in stages(screen)[2].items():
        batch_size = stage.loader.batch_size
        assert len(stage.loader
                   ) == stage.loader.n_items // batch_size >= 1 and stage.loader.n_items % batch_size, name
        assert all(len(batch.target if name == "align" else batch[0]) == batch_size for batch in stage.loader)


# --- pairs

def test_each_cell_keeps_its_control_in_every_epoch(screen):
    def controls(fixed):
        loader = pair_loader(screen["adata"], screen["split"], batch_size=16, fixed_controls=fixed)
        seen = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            seen.append({c: k for b in loader for c, k in zip(b.pert.tolist(), b.ctrl.tolist())})
        return seen
    first, second = controls(fixed=True)
    assert first == second
    first, second = controls(fixed=False)
    assert first.keys() == second.keys() and np.mean([first[c] != second[c] for c in first]) > .5
    for name in ("dynamics", "readout"): assert getattr(PAPER, name).fixed_controls


def test_alignment_pairs_are_the_released_ones(screen):
    model, actions, built = stages(screen)
    pairs = actions.anchor.present.any(1) & actions.positive.present.any(1)
    kept_aside = max(1, round(.1*int(pairs.sum())))
    assert built["align"].loader.n_items == int(pairs.sum()) - kept_aside  # test targets' pairs are among them
    batch = next(iter(built["align"].loader))
    anchor, positive = (F.normalize(model.composer(a)[:, 0], dim=-1) for a in (batch.anchor, batch.positive))
    logits, target = (anchor @ positive.T/.07).double(), batch.target
    assert len(target.unique()) < len(target)
    def info_nce(repels):
        rows = [
            torch.stack(
                [logits[i, j] for j in range(len(target)) if i == j or repels or target[i] != target[j]])
            for i in range(len(target))
        ]
        return -torch.stack([logits[i, i] - row.exp().sum().log() for i, row in enumerate(rows)]).mean()
    torch.testing.assert_close(built["align"].step(model, batch, None).loss.double(),
                               info_nce(True),
                               rtol=1e-5,
                               atol=0)
    ours = align_step(model, batch, None, PAPER.align.changed(same_target_negatives=False))
    torch.testing.assert_close(ours.loss.double(), info_nce(False), rtol=1e-5, atol=0)
    assert info_nce(False) < info_nce(True)


# --- what else differs

@pytest.mark.parametrize("n_tokens", [1, 2, 3])
def test_cross_attention_is_linear_attention(n_tokens):
    torch.manual_seed(0)
    H, d = 2, 4
    cross = alive(CrossAttention(H*d, H)).double()
    x, action = torch.randn(2, 5, H*d).double(), torch.randn(2, n_tokens, H*d).double()
    phi = lambda t: torch.where(t > 0, t + 1, t.exp())
    q, k, v = cross.q(cross.norm(x)), cross.k(action), cross.v(action)
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(5):
            for h in range(H):
                at = slice(h*d, (h + 1)*d)
                kernel = [(phi(q[b, t, at])*phi(k[b, a, at])).sum() for a in range(n_tokens)]
                expected[b, t, at] = sum(w*v[b, a, at] for a, w in enumerate(kernel))/(sum(kernel) + 1e-6)
    present = torch.ones(2, n_tokens).bool()
    torch.testing.assert_close(cross(x, action, present, shortcut=False),
                               cross.out(expected),
                               atol=1e-9,
                               rtol=1e-9)
    torch.testing.assert_close(cross(x, action, present).expand(-1, 5, -1),
                               cross.out(expected),
                               atol=1e-5,
                               rtol=1e-5)


def test_the_adapters_gelu_is_exact():
    model = double_model(0)
    first, norm, _, last = model.predictor.adapter
    action = torch.randn(3, 1, 320).double()
    u = norm(first(action))
    expected = last(u*.5*(1 + torch.erf(u/math.sqrt(2))))
    torch.testing.assert_close(model.predictor.adapter(action), expected, atol=1e-12, rtol=1e-12)


def test_delta_is_decoded_against_the_students_latents():
    for source in ("encoder", "teacher"):
        model, (_, pairs, actions, _) = double_model(1, delta_from=source), double_batch(1)
        x, size = pairs.x_ctrl, pairs.log_library_size_ctrl
        z, h = model.encoder(x, size), model.teacher(x, size)
        mean = model.predictor(z, model.composer(actions), actions.present).mean
        against = (z if source == "encoder" else h).genes()
        expected = model.readout(mean) - model.readout(against)
        context = Context(model, x, size)
        delta = model.delta(context, model.shift(context, actions).mean)
        torch.testing.assert_close(delta, expected, atol=1e-9, rtol=1e-9)
        loss = ((expected - (pairs.x_pert - x))**2).mean()
        torch.testing.assert_close(readout_step(model, pairs, actions=actions).loss, loss, atol=1e-9, rtol=1e-9)
    assert PAPER.model.delta_from == "encoder"


# --- the table of departures

def test_every_departure_is_named_and_every_switch_of_the_presets_stands_in_the_table():
    table, paper, laptop = departures(), PAPER, preset("laptop")
    assert {str(n) for n in range(1, 22)} <= set(table.row)
    named = {path for d in DEPARTURES for path in d.switches}
    for part, field in (path.split(".") for path in named): assert hasattr(getattr(paper, part), field)
    assert named <= set(table.switch)
    sizes = {
        "n_genes", "d_model", "n_heads", "n_encoder_layers", "n_masked_predictor_layers",
        "n_predictor_layers"
    }
    lengths = {"epochs", "batch_size", "lr", "lr_composer", "dataset"}
    differ = {f"{part}.{k}" for part in ("model", "data", *RELEASED) for k, v in getattr(paper, part)
              if v != getattr(getattr(laptop, part), k) and k not in sizes | lengths}
    assert {d for d in differ - named
            if not d.endswith(".drop_last")} == set()  # one row stands for all four stages
    released = {d.switches[0]: d for d in DEPARTURES if d.switches}
    for path in ("model.latent_loss", "model.delta_from", "dynamics.target", "model.initial_values"):
        part, field = path.split(".")
        default = type(getattr(paper, part)).model_fields[field].default
        assert path in released and getattr(getattr(paper, part),
                                            field) == default  # as published is the default
