"The model against independent references, and the collapse of equal tokens against the naive form."
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from training_cases import alive

from biojepa.config import preset
from biojepa.core import n_params
from biojepa.data.batches import ActionBatch, CellBatch, PairBatch
from biojepa.model import kernels
from biojepa.model.biojepa import BioJEPA
from biojepa.model.encoder import CellEncoder
from biojepa.model.kernels import MLP, Linear, LinearAttention
from biojepa.model.objectives import dynamics_loss, pretrain_loss
from biojepa.model.predictor import ActionPredictor
from biojepa.model.tokens import TokenSet, list_genes, random_gene_mask

G = 40
SMALL = preset("smoke").model.changed(n_genes=G, n_encoder_layers=2)


def make_batch(n, expressed, seed, n_genes=G, n_tokens=1):
    g = torch.Generator().manual_seed(seed)
    cells = lambda: torch.rand(n, n_genes, generator=g)*(torch.rand(n, n_genes, generator=g) < expressed)
    sizes = lambda: 7 + 3*torch.rand(n, generator=g)
    rows = torch.arange(n)
    pairs = PairBatch(cells(), cells(), sizes(), sizes(), rows, rows, rows)
    present = torch.rand(n, n_tokens, generator=g) < .7
    present[:, 0] = True
    actions = ActionBatch(torch.randn(n, n_tokens, 320, generator=g),
                          torch.zeros(n, n_tokens).long(),
                          torch.zeros(n, n_tokens).long(), present)
    return CellBatch(pairs.x_pert, pairs.log_library_size_pert, rows), pairs, actions


def gradients(model):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                      for p in model.parameters()])


# --- attention

@given(seed=st.integers(0, 2**20), n_tokens=st.integers(1, 12), heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=30, deadline=None)
def test_attention_is_the_explicit_sum_over_all_pairs(seed, n_tokens, heads):
    torch.manual_seed(seed)
    attention, x = alive(LinearAttention(8, heads)).double(), torch.randn(2, n_tokens, 8).double()
    m = torch.randint(0, 4, (2, n_tokens)).double()
    m[:, 0] = 1
    q, k, v = attention.qkv(x).view(2, n_tokens, 3, heads, -1).unbind(2)
    expected = torch.zeros_like(v)
    for b in range(2):
        for h in range(heads):
            for i in range(n_tokens):
                kernel = torch.stack(
                    [m[b, j]*((F.elu(q[b, i, h]) + 1)@(F.elu(k[b, j, h]) + 1)) for j in range(n_tokens)])
                expected[b, i, h] = (kernel[:, None]*v[b, :, h]).sum(0)/kernel.sum()
    torch.testing.assert_close(attention(x, m), attention.out(expected.flatten(2)), atol=1e-9, rtol=1e-9)


@given(seed=st.integers(0, 2**20), weighted=st.booleans(), first=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_attention_gradients_are_those_of_autograd(seed, weighted, first):
    torch.manual_seed(seed)
    attention, x = alive(LinearAttention(8, 2)).double(), torch.randn(2, 6, 8).double()
    m = torch.randint(0, 4, (2, 6)).double() if weighted else torch.ones(2, 6).double()
    m[:, 0] = 1

    def plain(x):
        q, k, v = attention.qkv(x).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        kernel = (F.elu(q) + 1) @ ((F.elu(k) + 1)*m[:, None, :, None]).mT
        return attention.out(((kernel/kernel.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2))[:, first:]

    results = []
    for f in (plain, lambda x: attention(x, m if weighted else None, first)):
        attention.zero_grad()
        t = x.clone().requires_grad_()
        y = f(t)
        (y*torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append((y, t.grad, *(p.grad.clone() for p in attention.parameters())))
    for a, b in zip(*results): torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_encoder_is_permutation_equivariant():
    torch.manual_seed(0)
    encoder, order = alive(CellEncoder(SMALL)), torch.randperm(G)
    x, sizes, mask = torch.rand(3, G)*(torch.rand(3, G) < .5), torch.rand(3), random_gene_mask(3, G)
    z = encoder(x, sizes, mask).genes()
    with torch.no_grad(): encoder.tokenizer.gene.weight.copy_(encoder.tokenizer.gene.weight[order].clone())
    torch.testing.assert_close(encoder(x[:, order], sizes, mask[:, order]).genes(),
                               z[:, order],
                               atol=1e-5,
                               rtol=1e-5)


# --- linear maps

def pair_of_layers(kind, dtype):
    "A layer of ours and torch's own with the same weights."
    torch.manual_seed(0)
    ours = Linear(24, 40, dtype=dtype) if kind == "linear" else MLP(24).to(dtype)
    theirs = torch.nn.Linear(24, 40, dtype=dtype) if kind == "linear" else torch.nn.Sequential(
        torch.nn.Linear(24, 96), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(96, 24)).to(dtype)
    alive(ours)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("dtype, eps", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (0, 24)])
def test_linear_maps_are_those_of_torch(kind, dtype, eps, shape):
    ours, theirs = pair_of_layers(kind, dtype)
    x = torch.randn(shape).to(dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad): torch.testing.assert_close(ours(x), theirs(x), atol=eps, rtol=eps)
    for frozen in (False, True):
        results = []
        for layer in (ours, theirs):
            layer.requires_grad_(not frozen).zero_grad()
            t = x.mT.contiguous().mT.requires_grad_()  # not contiguous
            (y := layer(t)).backward(
                torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y).mT.contiguous().mT)
            results.append((t.grad, *(p.grad for p in layer.parameters() if not frozen)))
            assert not frozen or all(p.grad is None or not p.grad.any() for p in layer.parameters())
        for a, b in zip(*results): torch.testing.assert_close(a, b, atol=10*eps, rtol=10*eps)


def test_linear_maps_without_onednn_give_the_same_step(monkeypatch):
    losses = []
    for there in (True, False):
        if not there: monkeypatch.setattr(kernels, "_ONEDNN", None)
        torch.manual_seed(0)
        model, (cells, *_), mask = alive(BioJEPA(SMALL)), make_batch(3, .5, 0), valid_mask(3, .6, 0)
        loss = pretrain_loss(model, cells, mask).total
        loss.backward()
        losses.append((loss, gradients(model)))
    (a, g), (b, h) = losses
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (g - h).norm() <= 1e-4*g.norm()


def test_autocast_rounds_linear_maps_as_it_does_torchs():
    ours, theirs = pair_of_layers("mlp", torch.float32)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), theirs(x)
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    a.sum().backward(); b.sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad, atol=5e-2, rtol=5e-2)


# --- collapse

SWITCHES = st.fixed_dictionaries(
    dict(latent_loss=st.sampled_from(["l1", "mse"]),
         vicreg_over=st.sampled_from(["tokens", "cells"]),
         mask_keeps_gene=st.booleans(),
         value_embedding=st.sampled_from(["scale", "offset"]),
         mask_context=st.booleans(),
         predicts=st.sampled_from(["latent", "change"])))
SHARES = st.one_of(st.sampled_from([0., 1.]), st.floats(0, 1))


def stage_loss(stage, model, batch, mask, collapse=True):
    "The loss of \"pretrain\" or \"dynamics\" on `make_batch`'s cells, pairs and actions."
    cells, pairs, actions = batch
    if stage == "pretrain": return pretrain_loss(model, cells, mask, collapse=collapse)
    return dynamics_loss(model, pairs, actions, mask, collapse=collapse)


def valid_mask(n, hidden, seed):
    "A random mask that leaves each cell something to predict and to predict from; two cells share a hidden gene."
    mask = random_gene_mask(n, G, hidden, generator=torch.Generator().manual_seed(seed))
    mask[:, 0], mask[:, 1] = True, False
    return mask


@given(switches=SWITCHES, expressed=SHARES, hidden=SHARES, n=st.integers(2, 5), seed=st.integers(0, 2**20),
       stage=st.sampled_from(["pretrain", "dynamics"]))
@settings(max_examples=60, deadline=None)
def test_collapsed_losses_and_gradients_are_the_naive_ones(switches, expressed, hidden, n, seed, stage):
    def losses_and_gradients(dtype):
        torch.manual_seed(seed)
        model = alive(BioJEPA(SMALL.changed(**switches))).to(dtype)
        mask = valid_mask(n, hidden, seed)
        cast = lambda t: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t
        batch = [type(part)(*map(cast, part)) for part in make_batch(n, expressed, seed)]
        for collapse in (False, True):
            model.zero_grad()
            loss = stage_loss(stage, model, batch, mask, collapse)
            loss.total.backward()
            yield torch.stack(list(loss)), gradients(model)
    (a, g), (b, h) = losses_and_gradients(torch.float32)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    # a difference within rounding of zero has either sign in an absolute distance: double precision must agree
    if (g - h).norm() > 1e-4*g.norm() + 1e-7:
        assert switches["latent_loss"] == "l1"
        (a, g), (b, h) = losses_and_gradients(torch.float64)
        assert (g - h).norm() <= 1e-9*g.norm()


@given(expressed=SHARES, hidden=SHARES, n=st.integers(1, 5), seed=st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_collapsed_latents_are_the_naive_ones(expressed, hidden, n, seed):
    torch.manual_seed(seed)
    encoder, (cells, *_) = alive(CellEncoder(SMALL)), make_batch(n, expressed, seed)
    mask = random_gene_mask(n, G, hidden, generator=torch.Generator().manual_seed(seed))
    naive, fast = (encoder(cells.x, cells.log_library_size, mask, c) for c in (False, True))
    torch.testing.assert_close(fast.genes(), naive.genes(), atol=1e-5, rtol=1e-5)
    if fast.weight is None:
        assert ((cells.x != 0) & ~mask).all()  # nothing is equal: the naive form is used by itself
    else:
        torch.testing.assert_close(fast.weight.sum(1), torch.full((n, ), float(G)))
    visible = (cells.x != 0) & ~mask
    assert fast.x.shape[1] == (G if fast.weight is None else max(int(visible.sum(1).max()), 1) + 2)


@given(padding=st.integers(1, 9), seed=st.integers(0, 2**20))
@settings(max_examples=20, deadline=None)
def test_padding_changes_nothing(padding, seed):
    torch.manual_seed(seed)
    encoder, (cells, *_) = alive(CellEncoder(SMALL)), make_batch(3, .5, seed)
    tokens = encoder.tokenizer(cells.x, cells.log_library_size)
    rubbish = 1e3*torch.randn(3, padding, tokens.x.shape[-1])
    padded = tokens._replace(x=torch.cat([tokens.x, rubbish], 1),
                             weight=torch.cat([tokens.weight, torch.zeros(3, padding)], 1))
    torch.testing.assert_close(encoder.stack(padded).genes(),
                               encoder.stack(tokens).genes(),
                               atol=1e-5,
                               rtol=1e-5)


def test_a_cell_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    model, (_, pairs, actions) = alive(BioJEPA(SMALL)), make_batch(4, .5, 0)
    pairs.x_ctrl[0, 5:] = 0  # few tokens, much padding beside the others
    whole = model.predict_latent(pairs.x_ctrl, pairs.log_library_size_ctrl, actions)
    alone = model.predict_latent(pairs.x_ctrl[:1], pairs.log_library_size_ctrl[:1], actions.take([0]))
    torch.testing.assert_close(whole.mean[:1], alone.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.logvar[:1], alone.logvar, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("switches, n_tokens", [
    ({}, 1), ({}, 3), (dict(mask_keeps_gene=True), 1), (dict(value_embedding="offset"), 2)])
def test_prediction_and_energy_are_the_naive_ones(switches, n_tokens):
    torch.manual_seed(0)
    model, (_, pairs, actions) = alive(BioJEPA(SMALL.changed(**switches))), make_batch(4,
                                                                                       .4,
                                                                                       1,
                                                                                       n_tokens=n_tokens)
    naive, fast = (model.predict_latent(pairs.x_ctrl, pairs.log_library_size_ctrl, actions, c)
                   for c in (False, True))
    torch.testing.assert_close(fast.mean, naive.mean, atol=1e-5, rtol=1e-5)
    e, f = (model.energy(pairs.x_ctrl, actions, pairs.x_pert, pairs.log_library_size_ctrl,
                         pairs.log_library_size_pert, c) for c in (False, True))
    torch.testing.assert_close(e, f, atol=1e-5, rtol=1e-5)
    h = model.teacher(pairs.x_pert, pairs.log_library_size_pert).genes()
    torch.testing.assert_close(
        e,
        torch.stack([sum((m - t).abs().mean() for m, t in zip(*c))/G for c in zip(naive.mean, h)]),
        atol=1e-5,
        rtol=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "dynamics"])
def test_recomputed_activations_give_the_same_gradients(stage):
    torch.manual_seed(0)
    kept, batch, mask = alive(BioJEPA(SMALL)), make_batch(3, .4, 1), valid_mask(3, .6, 0)
    recomputed = BioJEPA(SMALL, checkpoint_activations=True)
    recomputed.load_state_dict(kept.state_dict())
    for m in (kept, recomputed):
        loss = stage_loss(stage, m, batch, mask)
        loss.total.backward()
    torch.testing.assert_close(gradients(recomputed), gradients(kept), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "dynamics"])
def test_bf16_autocast_is_near_fp32(stage):
    torch.manual_seed(0)
    model, batch, mask = alive(BioJEPA(SMALL)), make_batch(4, .4, 1), valid_mask(4, .6, 0)
    step = lambda: stage_loss(stage, model, batch, mask)
    exact = step().total
    with torch.autocast("cpu", torch.bfloat16): rounded = step().total
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=.03, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "dynamics"])
def test_collapse_is_exact_at_full_size(stage):
    torch.manual_seed(0)
    model, batch = alive(BioJEPA(preset("paper").model)), make_batch(2, .4, 1, n_genes=5000)
    mask, results = random_gene_mask(2, 5000), []
    for collapse in (False, True):
        model.zero_grad()
        loss = stage_loss(stage, model, batch, mask, collapse)
        loss.total.backward()
        results.append((torch.stack(list(loss)).detach(), gradients(model)))
    (a, g), (b, h) = results
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (g - h).norm() <= 1e-4*g.norm()


# --- faithful

def test_published_parameter_counts():
    model = BioJEPA(preset("paper").model)
    assert n_params(model.encoder) == 6_019_840
    assert n_params(model.predictor) == 7_881_216
    assert n_params(model.composer) == 882_880
    assert n_params(model.teacher, trainable=True) == 0


def test_a_hidden_value_cannot_change_any_output():
    torch.manual_seed(0)
    model, (cells, pairs, actions), mask = alive(BioJEPA(SMALL)), make_batch(4, .5, 0), valid_mask(4, .6, 0)
    other = torch.where(mask, 9*torch.rand(4, G), pairs.x_ctrl)
    with torch.no_grad():
        for collapse in (True, False):
            z, y = (model.encoder(x, pairs.log_library_size_ctrl, mask, collapse)
                    for x in (pairs.x_ctrl, other))
            assert torch.equal(z.x, y.x)
            a, b = (dynamics_loss(model, pairs._replace(x_ctrl=x), actions, mask, collapse=collapse).total
                    for x in (pairs.x_ctrl, other))
            assert torch.equal(a, b)


def test_one_action_token_leaves_queries_and_keys_without_gradient():
    config = SMALL.changed(d_model=16)
    torch.manual_seed(0)
    model, (_, pairs, actions), mask = alive(BioJEPA(config)), make_batch(4, .5, 0), valid_mask(4, .6, 0)
    dynamics_loss(model, pairs, actions, mask).total.backward()
    for block in model.predictor.blocks:
        assert all(p.grad is None for part in (block.cross.q, block.cross.k, block.cross.norm)
                   for p in part.parameters())
        assert all(p.grad.any() for part in (block.cross.v, block.cross.out) for p in part.parameters())
    model.zero_grad()
    _, pairs, actions = make_batch(4, .5, 0, n_tokens=2)
    dynamics_loss(model, pairs, actions, mask).total.backward()
    assert all(block.cross.q.weight.grad.any() and block.cross.k.weight.grad.any()
               for block in model.predictor.blocks)


def test_naive_single_token_gradient_of_queries_and_keys_is_zero():
    torch.manual_seed(0)
    model, (_, pairs, actions), mask = alive(BioJEPA(SMALL)), make_batch(4, .5, 0), valid_mask(4, .6, 0)
    dynamics_loss(model, pairs, actions, mask, collapse=False).total.backward()
    largest = max(p.grad.abs().max().item() for block in model.predictor.blocks
                  for part in (block.cross.q, block.cross.k) for p in part.parameters())
    reference = min(block.cross.v.weight.grad.abs().max().item() for block in model.predictor.blocks)
    assert largest < 1e-6*reference


def test_several_action_tokens_have_no_order_and_absent_ones_no_voice():
    torch.manual_seed(0)
    predictor, context = alive(ActionPredictor(SMALL)), TokenSet(torch.randn(2, 5, 16))
    action, present = torch.randn(2, 3, 320), torch.tensor([[True, True, False]]*2)
    y = predictor(context, action, present).mean
    torch.testing.assert_close(predictor(context, action[:, [1, 0, 2]], present[:, [1, 0, 2]]).mean,
                               y,
                               atol=1e-5,
                               rtol=1e-5)
    action[:, 2] = 100
    torch.testing.assert_close(predictor(context, action, present).mean, y, atol=1e-5, rtol=1e-5)


def test_log_variance_stays_in_its_range():
    torch.manual_seed(0)
    predictor = alive(ActionPredictor(SMALL))
    with torch.no_grad(): predictor.logvar.weight.mul_(1e3)
    logvar = predictor(TokenSet(torch.randn(2, 5, 16)), torch.randn(2, 1, 320)).logvar
    assert logvar.min() == -10 and logvar.max() == 2


def test_masks_have_the_asked_share():
    bernoulli = random_gene_mask(200, 500, .6, "bernoulli", torch.Generator().manual_seed(0)).sum(1).double()
    assert abs(bernoulli.mean() - 300) < 4 and abs(bernoulli.var() - 120) < 40  # binomial: np, np(1-p)
    for ratio, n in ((0, 0), (.6, 300), (1, 500)):
        assert (random_gene_mask(5, 500, ratio, "exact").sum(1) == n).all()


# --- refused

def test_bad_input_is_refused_by_name():
    model, (cells, pairs, actions), mask = alive(BioJEPA(SMALL)), make_batch(3, .5, 0), valid_mask(3, .6, 0)
    over_cells = BioJEPA(SMALL.changed(vicreg_over="cells"))
    one_cell, one_pair = (type(batch)(*(t[:1] for t in batch)) for batch in (cells, pairs))
    for call, message in [
        (lambda: dynamics_loss(model, pairs, actions._replace(features=actions.features[..., :100])), "100"),
        (lambda: pretrain_loss(model, cells, torch.ones_like(mask)), "all genes are masked"),
        (lambda: pretrain_loss(model, cells, torch.zeros_like(mask)), "no genes are masked"),
        (lambda: SMALL.changed(d_model=10), "not divisible by n_heads"),
        (lambda: pretrain_loss(over_cells, one_cell, mask[:1]), "batch of 1"),
        (lambda: dynamics_loss(over_cells, one_pair, actions.take([0]), mask[:1]), "batch of 1"),
        (lambda: pretrain_loss(model, cells._replace(x=cells.x/0)), "replace NaN"),
        (lambda: dynamics_loss(model, pairs._replace(log_library_size_pert=torch.full(
            (3, ), float("inf"))), actions), "log_library_size: found inf"),
        (lambda: pretrain_loss(model, cells._replace(x=cells.x[:, :7])), "(3, 7)"),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


def test_padding_to_few_widths_changes_nothing(monkeypatch):
    "Batches meet at most about 64 shapes; the tokens beyond a cell's own weigh 0, so latents agree to rounding."
    g, n_genes = torch.Generator().manual_seed(5), 640
    widths = {
        list_genes(torch.rand(4, n_genes, generator=g) < p)[0].shape[1] for p in torch.linspace(0, 1, 400)
    }
    assert 40 < len(widths) <= 65 and max(widths) == n_genes
    torch.manual_seed(0)
    encoder = CellEncoder(SMALL.changed(n_genes=n_genes))
    cells, _, _ = make_batch(5, .3, seed=1, n_genes=n_genes)
    mask = random_gene_mask(5, n_genes, generator=g)
    few = encoder(cells.x, cells.log_library_size, mask)
    monkeypatch.setattr("biojepa.model.tokens.list_genes", partial(list_genes, widths=n_genes))
    exact = encoder(cells.x, cells.log_library_size, mask)
    assert exact.x.shape[1] == ((cells.x != 0) & ~mask).sum(1).max() + 2 < few.x.shape[1]
    torch.testing.assert_close(few.genes(), exact.genes(), rtol=0, atol=2e-6)
