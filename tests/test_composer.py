"The composer: parameter count, each token by itself, absent tokens, combinations, autocast, refusals."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from biojepa.actions.vocabulary import Modality, Mode
from biojepa.core import n_params
from biojepa.data.batches import ActionBatch
from biojepa.model.composer import ActionComposer, FiLM, pooled

WIDTHS = {Modality.PROTEIN: 3, Modality.CHEMICAL: 5, Modality.DNA: 7}


def make(seed=0):
    "A small composer whose FiLM is no longer the identity."
    torch.manual_seed(seed)
    composer = ActionComposer(3, 5, 7, d_action=4, d_mode=2, n_modes=len(Mode))
    for p in composer.film.parameters(): torch.nn.init.normal_(p)
    return composer


def batch(b, a, seed, width=7):
    g = torch.Generator().manual_seed(seed)
    modality, mode = torch.randint(3, (b, a), generator=g), torch.randint(len(Mode), (b, a), generator=g)
    features, present = torch.randn(b, a, width, generator=g), torch.rand(b, a, generator=g) < 0.7
    within = torch.arange(width) < torch.tensor([WIDTHS[Modality(m)]
                                                 for m in modality.flatten().tolist()]).view(b, a, 1)
    return ActionBatch(features*within, modality, mode, present)


def one_by_one(composer, actions):
    "Every token by itself, from the report's equations."
    out = torch.zeros(*actions.present.shape, composer.d_action)
    for i, j in actions.present.nonzero().tolist():
        modality = Modality(actions.modality[i, j].item())
        linear, m = composer.content[modality.name], composer.mode.weight[actions.mode[i, j]]
        c = linear.weight @ actions.features[i, j, :WIDTHS[modality]] + linear.bias
        s, t = (f.weight @ m + f.bias for f in (composer.film.scale, composer.film.shift))
        out[i, j] = c*(1 + s) + t
    return out


def test_published_parameter_count():
    composer = ActionComposer()
    assert n_params(composer) == n_params(composer, trainable=True) == 882_880
    assert n_params(composer.content) == 840_640 and n_params(composer.mode) == 640 and n_params(
        composer.film) == 2*(64*320 + 320)


def test_initial_weights():
    "The other form; the released one is in test_as_released.py."
    composer = ActionComposer(initial_values="fan_in")
    for module, fan_in in [(composer.content["PROTEIN"], 320), (composer.content["CHEMICAL"], 768),
                           (composer.content["DNA"], 1536), (composer.mode, 64)]:
        assert 0.8 < module.weight.std()*fan_in**0.5 < 0.95 and module.weight.abs().max() <= 2/fan_in**0.5
    assert not any(p.any() for p in composer.film.parameters())


def test_film_starts_as_the_identity_and_still_learns():
    film, c, m = FiLM(3, 5), torch.randn(7, 5), torch.randn(7, 3)
    assert torch.equal(film(c, m), c)
    film(c, m).square().sum().backward()
    assert all(p.grad.any() for p in film.parameters())     # zero weights, but not a zero gradient


@settings(max_examples=40, deadline=None)
@given(b=st.integers(1, 5), a=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_matches_tokens_one_by_one(b, a, seed):
    composer, actions = make(seed), batch(b, a, seed)
    out, expected = composer(actions), one_by_one(composer, actions)
    torch.testing.assert_close(out, expected)
    assert not out[~actions.present].any()
    if actions.present.any():
        for x, e in zip(*(torch.autograd.grad(
                o.square().sum(), [*composer.parameters()], allow_unused=True, materialize_grads=True)
                          for o in (out, expected))):
            torch.testing.assert_close(x, e, rtol=1e-4, atol=1e-4)


def test_padding_the_features_changes_nothing():
    composer, actions = make(), batch(4, 3, 1)
    torch.testing.assert_close(
        composer(actions),
        composer(actions._replace(features=torch.nn.functional.pad(actions.features, (0, 9)))))


def test_absent_tokens_may_hold_anything():
    composer, actions = make(), batch(6, 3, 2)
    absent = ~actions.present
    assert absent.any()
    garbage = ActionBatch(actions.features.masked_fill(absent[..., None], float("nan")),
                          actions.modality.masked_fill(absent, -7), actions.mode.masked_fill(absent, 99),
                          actions.present)
    assert torch.equal(composer(actions), composer(garbage))


def test_no_token_at_all_is_zeros():
    actions = batch(3, 2, 0)._replace(present=torch.zeros(3, 2, dtype=torch.bool))
    out = make()(actions)
    assert out.shape == (3, 2, 4) and not out.any()


def test_only_the_modalities_of_a_batch_are_run():
    composer, actions = make(), batch(4, 2, 0)
    ran = []
    for name, linear in composer.content.items():
        linear.register_forward_hook(lambda module, args, out, name=name: ran.append((name, len(args[0]))))
    composer(actions)
    assert dict(ran) == {
        m.name: n for m in Modality if (n := int((actions.present & (actions.modality == m)).sum()))
    }
    ran.clear()
    composer(actions._replace(modality=torch.zeros(4, 2).long(), features=actions.features[..., :3]))
    assert [name for name, _ in ran] == ["PROTEIN"]


def test_a_narrow_batch_is_enough_for_narrow_modalities():
    protein = ActionBatch(torch.randn(2, 1, 3),
                          torch.zeros(2, 1).long(),
                          torch.zeros(2, 1).long(),
                          torch.ones(2, 1).bool())
    assert make()(protein).shape == (2, 1, 4)


def test_modes_bend_the_same_content_differently():
    composer, actions = make(), batch(1, 1, 0)._replace(present=torch.ones(1, 1).bool())
    latents = torch.stack([composer(actions._replace(mode=torch.tensor([[int(mode)]])))[0, 0] for mode in Mode])
    assert len(torch.unique(latents, dim=0)) == len(Mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision(dtype):
    composer, actions = make(), batch(5, 3, 4)
    expected = composer(actions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = composer(actions._replace(features=actions.features.to(dtype)))
    assert out.dtype in (torch.bfloat16, torch.float32)     # a bfloat16 product scaled and shifted
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    out.sum().backward()


def test_pooled_is_the_mean_of_present_tokens():
    latents = torch.randn(3, 4, 5, requires_grad=True)
    present = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]]).bool()
    expected = torch.stack([z[p].mean(0) for z, p in zip(latents, present)])
    torch.testing.assert_close(pooled(latents, present), expected)
    garbage = latents.detach().masked_fill(~present[..., None], float("nan"))
    torch.testing.assert_close(pooled(garbage, present), expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), latents)[0]
                                 for x in (pooled(latents, present), expected)))


def changed(**fields):
    actions = batch(2, 2, 0)._replace(present=torch.tensor([[False, True], [True, True]]))
    return actions._replace(**{k: f(getattr(actions, k)) for k, f in fields.items()})


def put(value, *at):
    def f(t):
        t = t.clone()
        t[at] = value
        return t
    return f


@pytest.mark.parametrize("actions, said", [
    (changed(modality=put(3, 1, 0)), r"modality: found 3 at \[row, token\] \[1, 0\]; the model knows 0 to 2"),
    (changed(modality=put(-1, 0, 1)), r"modality: found -1 at \[row, token\] \[0, 1\]"),
    (changed(mode=put(10, 1, 1)), r"mode: found 10 at \[row, token\] \[1, 1\]; the model knows 0 to 9"),
    (changed(mode=put(-1, 1, 1)), r"mode: found -1 at"),
    (changed(features=put(float("nan"), 1, 0, 6)), r"features: NaN or infinite values at \[row, token\] "
                                                   r"\[1, 0\]"),
    (changed(features=put(float("inf"), 0, 1, 0)), r"features: NaN or infinite values at \[row, token\] "
                                                   r"\[0, 1\]"),
    (changed(features=lambda t: t*0 + 1, modality=lambda t: t*0), r"the PROTEIN token at \[row, token\] \[0, "
                                                                  r"1\] goes on past column 3"),
    (changed(features=lambda t: t[..., :5], modality=lambda t: t*0 + 2), r"features: found width 5, but the "
                                                                         r"DNA token at \[row, token\] \[0, "
                                                                         r"1\] needs 7"),
    (changed(features=lambda t: t[..., 0]), r"actions: found features \(2, 2\)"),
    (changed(mode=lambda t: t[:1]), r"mode \(1, 2\)"),
    (changed(present=lambda t: t.long()), r"present \(2, 2\) of torch.int64"),
])
def test_refusals(actions, said):
    with pytest.raises(ValueError, match=said): make()(actions)


def test_pooling_nothing_is_refused():
    with pytest.raises(ValueError, match="present: row 1 has no action token"):
        pooled(torch.zeros(2, 2, 3), torch.tensor([[1, 0], [0, 0]]).bool())
