"The readout: naive and collapsed forms, the change, the variance, precision, memory, refusals."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from biojepa.core import n_params
from biojepa.model.readout import LinearReadout

KINDS = ("shared", "per_gene")


def loop(readout, z):
    "Every gene of every cell by itself; z (B, G, D)."
    w, b = readout.linear.weight, readout.linear.bias
    row = (lambda g: 0) if readout.kind == "shared" else (lambda g: g)
    return torch.stack([
        torch.stack([z[i, g].dot(w[row(g)]) + b[row(g)] for g in range(z.shape[1])]) for i in range(len(z))
    ])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 3),
      g=st.integers(1, 6),
      t=st.integers(1, 5),
      d=st.integers(1, 5),
      seed=st.integers(0, 10**6))
def test_tokens_with_an_index_equal_every_genes_copy(kind, b, g, t, d, seed):
    gen = torch.Generator().manual_seed(seed)
    readout = LinearReadout(d, g, kind).double()
    z = torch.randn(b, t, d, generator=gen, dtype=torch.float64).requires_grad_()
    index = torch.randint(t, (b, g), generator=gen)
    every_gene = z[torch.arange(b)[:, None], index]
    pull, leaves = torch.randn(b, g, generator=gen, dtype=torch.float64), [z, *readout.parameters()]
    expected = torch.autograd.grad((loop(readout, every_gene)*pull).sum(), leaves, retain_graph=True)
    for out in (readout(z, index), readout(every_gene)):
        torch.testing.assert_close(out, loop(readout, every_gene))
        for a, e in zip(torch.autograd.grad((out*pull).sum(), leaves, retain_graph=True), expected):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("kind, count", [("shared", 257), ("per_gene", 1_285_000)])
def test_parameter_count_at_the_papers_size(kind, count):
    assert n_params(LinearReadout(256, 5000, kind)) == count


@pytest.mark.parametrize("kind", KINDS)
def test_weights_start_as_the_rest_of_the_model(kind):
    readout = LinearReadout(100, 300, kind)
    assert readout.linear.weight.abs().max() <= 2/10 and readout.linear.bias.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_cancels_in_the_change(kind):
    readout, z_hat, z_ctrl = LinearReadout(4, 6, kind), torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    index_ctrl = torch.randint(3, (2, 6))
    change = readout.delta(z_hat, z_ctrl, index_ctrl=index_ctrl)
    torch.testing.assert_close(change, readout(z_hat) - readout(z_ctrl, index_ctrl))
    moved = z_hat - z_ctrl[torch.arange(2)[:, None], index_ctrl]
    torch.testing.assert_close(readout.shift(moved), change)
    change.square().sum().backward()
    torch.testing.assert_close(readout.linear.bias.grad,
                               torch.zeros_like(readout.linear.bias),
                               rtol=0,
                               atol=1e-5)
    with torch.no_grad(): readout.linear.bias.add_(7.)
    torch.testing.assert_close(readout.delta(z_hat, z_ctrl, index_ctrl=index_ctrl), change, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_variance_is_that_of_the_jacobian(kind):
    "Var = J diag(var_z) Jᵀ, diagonal, with J by autograd."
    readout = LinearReadout(3, 4, kind).double()
    z = torch.randn(1, 4, 3).double()
    var_z = torch.rand(1, 4, 3).double()
    jacobian = torch.autograd.functional.jacobian(lambda z: readout(z)[0], z).reshape(4, 12)
    torch.testing.assert_close(readout.variance(var_z)[0], (jacobian.square() @ var_z.flatten()))
    assert (readout.variance(var_z) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_round_the_change(kind, dtype):
    readout, z, index = LinearReadout(64, 20, kind), torch.randn(2, 9, 64).to(dtype), torch.randint(9, (2, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16): out = readout(z, index)
    assert out.dtype == torch.float32 and torch.equal(out, readout(z.float(), index))


def test_per_gene_keeps_no_gathered_latents_for_the_backward_pass():
    B, G, T, D = 4, 400, 20, 16
    readout, z, kept = LinearReadout(D, G, "per_gene"), torch.randn(B, T, D, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        readout(z, torch.randint(T, (B, G)))
    distinct = {t.data_ptr(): t.numel() for t in kept}
    assert G*D <= sum(distinct.values()) < 2*G*D    # the weights once, the tokens and indices; never (B, G, D)


@pytest.mark.parametrize("call, said", [
    (lambda r: LinearReadout(4, 6, "linear"), "kind: found 'linear'"),
    (lambda r: r(torch.zeros(2, 6, 3)), "z: found shape .2, 6, 3.; the readout reads .cells, tokens, 4."),
    (lambda r: r(torch.zeros(6, 4)), "z: found shape .6, 4."),
    (lambda r: r(torch.zeros(2, 5, 4)), "z: found 5 tokens for 6 genes; give `index`"),
    (lambda r: r(torch.zeros(2, 5, 4), torch.zeros(2, 5).long()), "index: found torch.int64 of shape .2, 5."),
    (lambda r: r(torch.zeros(2, 5, 4), torch.zeros(1, 6).long()), "index: found torch.int64 of shape .1, 6."),
    (lambda r: r(torch.zeros(2, 5, 4), torch.zeros(2, 6)), "index: found torch.float32"),
    (lambda r: r(torch.zeros(2, 5, 4), torch.full((2, 6), 5)), "index: found 5 to 5; tokens go from 0 to 4"),
    (lambda r: r(torch.zeros(2, 5, 4), torch.full((2, 6), -1)), "index: found -1 to -1"),
    (lambda r: r.variance(torch.zeros(2, 5, 4)), "z: found 5 tokens for 6 genes"),
])
@pytest.mark.parametrize("kind", KINDS)
def test_refusals(kind, call, said):
    with pytest.raises(ValueError, match=said): call(LinearReadout(4, 6, kind))
