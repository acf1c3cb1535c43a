"Losses against loops, numpy, torch's own, their expanded form, and under autocast; gradients; refusals."
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.stats import rankdata
from torch.utils.flop_counter import FlopCounterMode

from biojepa.model import contrast
from biojepa.model.contrast import retrieval_rank
from biojepa.model.losses import gaussian_nll, latent_distance, spread, spread_over_cells

F64 = torch.float64
info_nce = partial(contrast.info_nce, temperature=.07)


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- independent references
# -------------------------------------------------------------------------------------------------

def naive_spread(z):
    "Both moment terms of (N, D) rows by numpy's covariance and a double loop."
    c = np.atleast_2d(np.cov(z.numpy(), rowvar=False))
    d = len(c)
    hinge = sum(max(0., 1 - math.sqrt(c[j, j] + 1e-4)) for j in range(d))/d
    return hinge, sum(c[j, k]**2 for j in range(d) for k in range(d) if j != k)/d


def naive_over_cells(z):
    "Mean over genes of the moments over cells; z (B, G, D)."
    parts = [naive_spread(z[:, g]) for g in range(z.shape[1])]
    return [sum(p)/len(parts) for p in zip(*parts)]


def naive_info_nce(q, k, target, tau, same_target_negatives):
    total = 0.
    for i in range(len(q)):
        s = [float(q[i] @ k[j]/(q[i].norm()*k[j].norm()))/tau for j in range(len(q))]
        keep = [j for j in range(len(q)) if j == i or same_target_negatives or target[j] != target[i]]
        total -= s[i] - math.log(sum(math.exp(s[j]) for j in keep))
    return total/len(q)


# ---- weights are repetitions
# ------------------------------------------------------------------------------------------------

sizes = dict(b=st.integers(1, 3), t=st.integers(1, 7), d=st.integers(1, 9), seed=st.integers(0, 10**6))


def weighted_case(b, t, d, seed):
    "Latents with integer weights (some 0), and for each token its copies."
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, 5, (b, t), generator=g)
    weight[0, 0] = 2 + seed % 3
    copies = torch.repeat_interleave(torch.arange(b*t), weight.flatten())
    return weight, copies, [torch.randn(b, t, d, generator=g, dtype=F64) for _ in range(3)]


FUNCTIONS = {
    "l1": lambda a, b, c, w: latent_distance(a, b, w, "l1"),
    "mse": lambda a, b, c, w: latent_distance(a, b, w, "mse"),
    "variance": lambda a, b, c, w: spread(a, w).variance,
    "covariance": lambda a, b, c, w: spread(a, w).covariance,
    "nll": lambda a, b, c, w: gaussian_nll(a, b, c, w),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=40, deadline=None)
@given(**sizes)
def test_weighted_equals_expanded_in_value_and_gradient(name, b, t, d, seed):
    weight, copies, latents = weighted_case(b, t, d, seed)
    results = []
    for expand in (False, True):
        leaves = [z.clone().requires_grad_() for z in latents]
        args = [z.flatten(0, 1)[copies][None] if expand else z for z in leaves]
        value = FUNCTIONS[name](*args, None if expand else weight)
        results.append([
            value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        ])
    for a, e in zip(*results): torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rubbish", [1e38, float("inf"), float("nan")])
def test_a_token_of_weight_zero_cannot_change_anything(name, rubbish):
    weight, results = torch.tensor([[1., 3., 0.], [2., 0., 1.]]), []
    for fill in (0., rubbish):
        leaves = [
            draw(2, 3, 4, seed=s, dtype=torch.float32).masked_fill((weight == 0)[..., None],
                                                                   fill).requires_grad_() for s in range(3)
        ]
        value = FUNCTIONS[name](*leaves, weight)
        results.append([
            value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        ])
    for a, e in zip(*results): assert torch.equal(a, e) and torch.isfinite(a).all()


def test_boolean_and_integer_weights_are_numbers():
    a, b, mask = draw(2, 5, 3), draw(2, 5, 3, seed=1), torch.rand(2, 5) < 0.6
    torch.testing.assert_close(latent_distance(a, b, mask), latent_distance(a, b, mask.double()))
    for x, y in zip(spread(a, mask), spread(a, mask.double())): torch.testing.assert_close(x, y)


# ---- distance and moments
# ---------------------------------------------------------------------------------------------------

def test_distance_is_the_plain_mean_without_weights():
    a, b = draw(2, 5, 3), draw(2, 5, 3, seed=1)
    torch.testing.assert_close(latent_distance(a, b), F.l1_loss(a, b))
    torch.testing.assert_close(latent_distance(a, b, kind="mse"), F.mse_loss(a, b))
    torch.testing.assert_close(3*latent_distance(a, b, kind="mse"),
                               (a - b).norm(dim=-1).square().mean())  # the report's norm


@pytest.mark.parametrize("n, d", [(2, 1), (2, 3), (5, 16), (16, 16), (40, 6), (300, 24)])
def test_moments_match_numpy_on_both_sides_of_the_gram_switch(n, d):
    z = 0.7*draw(n, d) + 3
    variance, covariance = naive_spread(z)
    assert [v.item() for v in spread(z)] == pytest.approx([variance, covariance], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("n, d", [(4, 64), (64, 4)])
def test_covariance_multiplies_through_the_smaller_gram_matrix(n, d):
    z = draw(n, d)
    with FlopCounterMode(display=False) as counter: spread(z)
    assert counter.get_total_flops() <= 2*min(n, d)**2*max(n, d) + 2*n*d   # the Gram matrix, and the mean


def test_a_constant_has_a_gradient():
    z = torch.zeros(4, 2, dtype=F64, requires_grad=True)
    variance = spread(z).variance
    assert variance.item() == pytest.approx(1 - 0.01)  # sqrt(1e-4) is all that is left of a constant
    assert torch.isfinite(torch.autograd.grad(variance, z)[0]).all()


@pytest.mark.parametrize("n, d", [(4, 7), (7, 4)])
def test_gradients_of_moments(n, d):
    z, weight = draw(n, d).requires_grad_(), torch.rand(n, dtype=F64) + 0.5
    for part in range(2):
        assert torch.autograd.gradcheck(lambda z: spread(z, weight)[part], z)
        assert torch.autograd.gradgradcheck(lambda z: spread(z, weight)[part], z)


def test_a_large_mean_does_not_eat_the_moments():
    z = draw(5000, 8)
    shifted = (z + 100).float()
    for a, e in zip(spread(shifted), spread(shifted.double())):
        assert a.item() == pytest.approx(e.item(), rel=1e-3, abs=1e-6)


# ---- over cells
# -------------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(b=st.integers(2, 6), g=st.integers(1, 8), t=st.integers(1, 6), d=st.integers(1, 9),
       piece=st.integers(1, 200), seed=st.integers(0, 10**6))
def test_over_cells_matches_loops_for_any_sharing_and_piece(b, g, t, d, piece, seed):
    gen = torch.Generator().manual_seed(seed)
    z = torch.randn(b, t, d, generator=gen, dtype=F64).requires_grad_()
    index = torch.randint(t, (b, g), generator=gen)
    every_gene = z[torch.arange(b)[:, None], index]                     # (B, G, D)
    value, plain = (torch.stack(s) for s in (spread_over_cells(z, index, piece), spread_over_cells(every_gene)))
    expected = naive_over_cells(every_gene.detach())
    assert value.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert plain.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for v, p in zip(value, plain):
        a, e = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (v, p))
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


def test_gradient_over_cells():
    z, index = draw(3, 4, 5).requires_grad_(), torch.randint(4, (3, 6))
    for part in range(2):
        assert torch.autograd.gradcheck(lambda z: spread(z, over="cells", index=index)[part], z)


def test_gene_identity_satisfies_tokens_and_fails_cells():
    gene_only = draw(1, 200, 4).expand(16, 200, 4)
    assert spread(gene_only).variance < 0.1 and spread(gene_only, over="cells").variance > 0.98


@pytest.mark.parametrize("over", ["tokens", "cells"])
def test_spread_is_both_moment_terms(over):
    z = 0.5*draw(6, 5, 3)
    parts = naive_spread(z.flatten(0, 1)) if over == "tokens" else naive_over_cells(z)
    assert [x.item() for x in spread(z, over=over)] == pytest.approx(list(parts), rel=1e-9)


@pytest.mark.parametrize("weight", [None, torch.tensor([[1, 2, 0], [4, 1, 1]])])
def test_one_prediction_for_many_targets(weight):
    one, h = draw(2, 1, 4).requires_grad_(), draw(2, 3, 4, seed=1)
    short, long = latent_distance(one, h, weight), latent_distance(one.expand(2, 3, 4), h, weight)
    torch.testing.assert_close(short, long)
    torch.testing.assert_close(*(torch.autograd.grad(x, one)[0] for x in (short, long)))


def test_many_bfloat16_tokens_are_counted_right():
    "bfloat16 cannot count past 256: summed weights must not be in it."
    z, weight = draw(2, 1001, 4).bfloat16(), torch.ones(2, 1001)
    weight[1, 501:] = 0
    for a, e in zip(spread(z, weight), spread(z.double(), weight)):
        assert a.item() == pytest.approx(e.item(), rel=1e-5)
    one = draw(2, 1, 4, seed=1).bfloat16()
    distance, exact = latent_distance(one, z, weight), latent_distance(one.double(), z.double(), weight)
    assert distance.item() == pytest.approx(exact.item(), rel=1e-5)


# ---- autocast
# ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    a, b, c = (draw(4, 50, 8, seed=s).to(dtype) for s in range(3))
    cases = {
        "tokens": lambda *z: sum(spread(z[0])), "cells": lambda *z: sum(spread(z[0], over="cells")),
        "distance": lambda *z: latent_distance(*z[:2]), "nll": lambda *z: gaussian_nll(*z), "nce":
        lambda *z: info_nce(z[0].flatten(1), z[1].flatten(1))
    }
    for name, f in cases.items():
        exact = f(a.double(), b.double(), c.double())
        with torch.autocast("cpu", dtype=torch.bfloat16): value = f(a, b, c)
        assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), rel=2e-5), name


def test_gradient_over_cells_under_autocast():
    "The recomputed forward pass must leave autocast too."
    a = draw(4, 50, 8, dtype=torch.float32)
    grads = []
    for enabled in (False, True):
        z = a.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled): loss = sum(spread(z, over="cells"))
        grads.append(torch.autograd.grad(loss, z)[0])
    assert torch.equal(*grads)


# ---- likelihood
# -------------------------------------------------------------------------------------------------------------

def test_nll_matches_torch():
    mu, logvar, target = (draw(2, 5, 3, seed=s).requires_grad_() for s in range(3))
    ours = gaussian_nll(mu, logvar, target)
    theirs = F.gaussian_nll_loss(mu, target, logvar.exp(), full=False, eps=1e-30)
    torch.testing.assert_close(ours, theirs)
    for a, e in zip(torch.autograd.grad(ours, (mu, logvar)), torch.autograd.grad(theirs, (mu, logvar))):
        torch.testing.assert_close(a, e)


def test_nll_is_the_normal_density():
    mu, logvar, target = (draw(2, 5, 3, seed=s) for s in range(3))
    density = torch.distributions.Normal(mu, (0.5*logvar).exp()).log_prob(target).mean()
    assert gaussian_nll(mu, logvar, target).item() == pytest.approx(-density.item() - 0.5*math.log(2*math.pi))


# ---- contrast and retrieval
# -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("release", [False, True])
def test_info_nce_matches_a_loop(release):
    q, k, target = draw(9, 5), draw(9, 5, seed=1), torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 0])
    expected = naive_info_nce(q, k, target, 0.07, release)
    assert info_nce(q, k, target, same_target_negatives=release).item() == pytest.approx(expected, rel=1e-9)


def test_info_nce_by_hand():
    q, k = torch.eye(2, dtype=F64), torch.tensor([[1., 0.], [1., 0.]], dtype=F64)
    assert info_nce(q, k, temperature=1.).item() == pytest.approx(
        math.log(2))  # cosines (1, 1) and (0, 0): no preference
    k = torch.tensor([[1., 0.], [0., -1.]], dtype=F64)                  # cosines (1, 0) and (0, −1)
    assert info_nce(q, k, temperature=1.).item() == pytest.approx(
        (math.log(1 + math.exp(-1)) + math.log(1 + math.e))/2)


def test_pairs_of_one_target_do_not_repel():
    "The gradient on a positive comes only from its own anchor and anchors of other targets."
    q, k = draw(4, 6), draw(4, 6, seed=1).requires_grad_()
    target = torch.tensor([7, 7, 7, 7])
    assert torch.autograd.grad(info_nce(q, k, target), k)[0].abs().max() == 0       # nothing is a negative
    assert info_nce(q, k, target).item() == 0
    assert torch.autograd.grad(info_nce(q, k, target, same_target_negatives=True), k)[0].abs().max() > 0
    assert torch.autograd.gradcheck(lambda k: info_nce(q, k, torch.tensor([0, 0, 1, 2])), k)


def test_rank_matches_scipy_with_ties():
    g = torch.Generator().manual_seed(0)
    q = torch.randint(0, 3, (30, 2), generator=g).double() + 0.5
    k = torch.randint(0, 3, (30, 2), generator=g).double() + 0.5
    target = torch.randint(0, 12, (30,), generator=g)
    cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    for i, rank in enumerate(retrieval_rank(q, k, target).tolist()):
        others = [j for j in range(30) if target[j] != target[i]]
        assert rank == rankdata(-np.round(cosine[i, [i, *others]].numpy(), 9))[0]


def test_pairs_of_one_target_do_not_compete():
    assert retrieval_rank(draw(5, 3), draw(5, 3), torch.zeros(5)).tolist() == [1.]*5


# ---- refusals
# ---------------------------------------------------------------------------------------------------------------

Z = draw(2, 3, 4)


@pytest.mark.parametrize("call, said", [
    (lambda: latent_distance(Z, Z, kind="l2"), "kind: found 'l2'"),
    (lambda: latent_distance(Z, Z[..., :3]), "z_hat: found shape .2, 3, 4., the target has .2, 3, 3."),
    (lambda: latent_distance(Z, Z[:, :2]), "they must be the same tokens"),
    (lambda: latent_distance(Z, Z[0]), "they must be the same tokens"),
    (lambda: latent_distance(Z, Z, torch.ones(2, 4)), "weight: found shape .2, 4. for latents .2, 3, 4."),
    (lambda: latent_distance(Z, Z, torch.zeros(2, 3)), "weight: the total is 0, which must exceed 0; were no "
                                                       "genes masked"),
    (lambda: latent_distance(Z, Z, torch.full((2, 3), float("nan"))), "weight: the total is nan"),
    (lambda: spread(Z[:1, :1]), "weight: the total is 1, which must exceed 1"),
    (lambda: spread(Z, torch.tensor([[1, 0, 0], [0, 0, 0]])), "weight: the total is 1, which must exceed 1"),
    (lambda: spread(Z, over="genes"), "over: found 'genes'"),
    (lambda: spread(Z[:1], over="cells"), "needs two cells or more, found a batch of 1"),
    (lambda: spread(Z, over="cells", index=torch.tensor([[0, 1], [2, 3]])), "index: found 0 to 3; tokens go "
                                                                            "from 0 to 2"),
    (lambda: spread(Z, over="cells", index=torch.tensor([[0, -1], [2, 1]])), "index: found -1 to 2"),
    (lambda: gaussian_nll(Z, Z[..., :2], Z), "logvar: found shape .2, 3, 2."),
    (lambda: gaussian_nll(Z[:, :2], Z, Z), "mu: found shape .2, 2, 4."),
    (lambda: gaussian_nll(Z, Z, Z, torch.zeros(2, 3)), "weight: the total is 0"),
    (lambda: info_nce(Z[0], Z[0, :2]), "positive: found shape .2, 4., anchor has .3, 4."),
    (lambda: info_nce(Z, Z), "positive: found shape .2, 3, 4."),
    (lambda: info_nce(Z[0], Z[0], torch.zeros(2)), "target: found shape .2,.; give one code for each "
                                                   "of 3 pairs"),
    (lambda: info_nce(Z[0], Z[0], temperature=0), "temperature: found 0"),
    (lambda: retrieval_rank(Z[0], Z[0]*float("nan")), "positive: found NaN"),
])
def test_refusals(call, said):
    with pytest.raises(ValueError, match=said): call()
