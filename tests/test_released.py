"""Claims about released checkpoints:
1. A converted model gives what the published equations give with the released tensors (float64, 1e-6).
2. A tensor that is missing, foreign or misshapen is refused by its name, whichever it is.
3. A file with anything but tensors and plain containers is refused, and nothing in it is run.
4. Saved in our own format, a converted model answers the same.
"""
import io
import math
import os
import pickle
import re
import zipfile
from dataclasses import dataclass

import pytest
import torch

from biojepa.config import preset
from biojepa.data.batches import ActionBatch
from biojepa.model.released import convert_released
from biojepa.model.saving import from_pretrained, save_pretrained

G, D, HIDDEN, ACTION, MODE, MODES = 11, 16, 32, 9, 6, 10
WIDTHS = (8, 7, 10)  # protein, chemical, DNA
GENES = [f"g{i}" for i in range(G)]


# --- a released file, written from the published names

def linear_shapes(name, out, into): return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm_shapes(*names): return {f"{name}.{kind}": (D,) for name in names for kind in ("weight", "bias")}


def attention_shapes(name):
    q, k, v, c = (linear_shapes(f"{name}.{p}_proj", D, D) for p in "qkvc")
    return q | k | v | c


def mlp_shapes(name):
    return linear_shapes(f"{name}.c_fc", HIDDEN, D) | linear_shapes(f"{name}.c_proj", D, HIDDEN)


def encoder_block_shapes(name):
    return norm_shapes(f"{name}.ln_1",
                       f"{name}.ln_2") | attention_shapes(f"{name}.attn") | mlp_shapes(f"{name}.mlp")


def predictor_block_shapes(name):
    attentions = attention_shapes(f"{name}.action_attn") | attention_shapes(f"{name}.self_attn")
    return norm_shapes(*(f"{name}.ln_{i}" for i in (1, 2, 3))) | attentions | mlp_shapes(f"{name}.mlp")


def released_shapes(encoder=1, masked=1, predictor=1):
    "Every tensor of a released model with so many blocks in each part."
    shapes = {}
    for part in ("student", "teacher"):
        shapes |= {f"{part}.gene_embeddings": (G, D), f"{part}.mask_token": (1, 1, D)}
        shapes |= linear_shapes(f"{part}.total_count_proj", D, 1) | norm_shapes(f"{part}.ln_f")
        for i in range(encoder): shapes |= encoder_block_shapes(f"{part}.blocks.{i}")
    for i, width in enumerate(WIDTHS): shapes |= linear_shapes(f"composer.projectors.{i}", ACTION, width)
    shapes |= {"composer.mode_embedding.weight": (MODES, MODE)}
    for kind in ("scale", "shift"): shapes |= linear_shapes(f"composer.film_{kind}", ACTION, MODE)
    shapes |= linear_shapes("predictor.adapter.0", D, ACTION) | norm_shapes("predictor.adapter.1")
    shapes |= linear_shapes("predictor.adapter.3", D, D) | {"predictor.mask_queries.weight": (G, D)}
    for i in range(predictor): shapes |= predictor_block_shapes(f"predictor.blocks.{i}")
    shapes |= norm_shapes("predictor.final_norm")
    for head in ("predictor.head_mu", "predictor.head_logvar", "masked_predictor.pred_head"):
        shapes |= linear_shapes(head, D, D)
    for i in range(masked): shapes |= encoder_block_shapes(f"masked_predictor.blocks.{i}")
    return shapes | norm_shapes("masked_predictor.norm")


def random_state(seed=0, **blocks):
    "Random numbers under released names; norms are near 1, everything else near 0, nothing is constant."
    g, state = torch.Generator().manual_seed(seed), {}
    for name, shape in released_shapes(**blocks).items():
        near_one = re.search(r"(ln_\w|norm|adapter\.1)\.weight$", name) is not None
        state[name] = torch.randn(shape, generator=g)/math.sqrt(shape[-1]) + near_one
    return state


SMALL = random_state()
HEAD = {"head.weight": torch.linspace(-1, 1, D)[None], "head.bias": torch.tensor([.3])}


def written(path, content, **kwargs):
    torch.save(content, path, **kwargs)
    return path


@pytest.fixture
def decoder(tmp_path): return written(tmp_path/"decoder.pt", dict(model=HEAD))


# --- the published equations (report §3), plainly

class Published:
    "The report's functions of released tensors, in float64, over all pairs of tokens."
    def __init__(self, state, heads, eps):
        self.s, self.heads, self.eps = {k: v.double() for k, v in state.items()}, heads, eps

    def linear(self, name, x): return x @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        y = centred/(centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return y*self.s[f"{name}.weight"] + self.s[f"{name}.bias"]

    def attention(self, name, x, source):
        project = lambda p, t: self.linear(f"{name}.{p}_proj", t).unflatten(-1, (self.heads, -1))
        q, k, v = project("q", x), project("k", source), project("v", source)
        phi = lambda t: torch.where(t > 0, t + 1, t.exp())
        kernel = torch.einsum("bihd,bjhd->bhij", phi(q), phi(k))
        y = torch.einsum("bhij,bjhd->bihd", kernel/(kernel.sum(-1, keepdim=True) + self.eps), v)
        return self.linear(f"{name}.c_proj", y.flatten(2))

    def mlp(self, name, x):
        h = self.linear(f"{name}.c_fc", x)
        return self.linear(f"{name}.c_proj", h/2*(1 + torch.tanh(math.sqrt(2/math.pi)*(h + .044715*h**3))))

    def encoder_blocks(self, part, x, n):
        for name in (f"{part}.blocks.{i}" for i in range(n)):
            y = self.norm(f"{name}.ln_1", x)
            x = x + self.attention(f"{name}.attn", y, y)
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.ln_2", x))
        return x

    def encode(self, part, x, size, mask, n):
        tokens = x[..., None]*self.s[f"{part}.gene_embeddings"]
        if mask is not None: tokens = torch.where(mask[..., None], self.s[f"{part}.mask_token"], tokens)
        tokens = tokens + self.linear(f"{part}.total_count_proj", size[:, None])[:, None]
        return self.norm(f"{part}.ln_f", self.encoder_blocks(part, tokens, n))

    def masked_predictor(self, z, n):
        z = self.encoder_blocks("masked_predictor", z, n)
        return self.linear("masked_predictor.pred_head", self.norm("masked_predictor.norm", z))

    def action(self, features, modality, mode):
        content = self.linear(f"composer.projectors.{modality}", features[:, :WIDTHS[modality]])
        m = self.s["composer.mode_embedding.weight"][mode]
        return content*(1 + self.linear("composer.film_scale", m)) + self.linear("composer.film_shift", m)

    def predict(self, z, action, n):
        h = self.norm("predictor.adapter.1", self.linear("predictor.adapter.0", action))
        token = self.linear("predictor.adapter.3", h/2*(1 + torch.erf(h/math.sqrt(2))))[:, None]
        x = torch.cat([z, self.s["predictor.mask_queries.weight"].expand(len(z), -1, -1)], 1)
        for name in (f"predictor.blocks.{i}" for i in range(n)):
            x = x + self.attention(f"{name}.action_attn", self.norm(f"{name}.ln_1", x), token)
            y = self.norm(f"{name}.ln_2", x)
            x = x + self.attention(f"{name}.self_attn", y, y)
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.ln_3", x))
        y = self.norm("predictor.final_norm", x[:, z.shape[1]:])
        return self.linear("predictor.head_mu", y), self.linear("predictor.head_logvar", y).clamp(-10, 2)


BLOCKS, HEADS = dict(encoder=2, masked=1, predictor=3), 4


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    "A converted model in float64, and the released tensors."
    folder, state = tmp_path_factory.mktemp("released"), random_state(1, **BLOCKS)
    path = written(folder/"m.pt", dict(model=state, optimizer={}, step=3))
    model = convert_released(path, GENES, written(folder/"d.pt", dict(model=HEAD))).model.double()
    return model, state | HEAD


@pytest.fixture(params=[0., 1e-6], ids=["exact", "released"])
def both(converted, request):
    "Model, equations and tolerance; the release adds 1e-6 to denominators, which is all that may differ."
    model, state = converted
    eps = request.param
    tolerance = dict.fromkeys(("atol", "rtol"), 10*eps or 1e-10)
    return model, Published(state, HEADS, eps), lambda a, b: torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture(scope="module")
def cells():
    g = torch.Generator().manual_seed(2)
    x = 3*torch.rand(5, G, generator=g, dtype=torch.float64)*(torch.rand(5, G, generator=g) < .6)
    return x, 1 + torch.rand(5, generator=g, dtype=torch.float64), torch.rand(5, G, generator=g) < .5


@pytest.mark.parametrize("part", ["student", "teacher"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@torch.no_grad()
def test_encoders_are_the_published_ones(both, cells, part, masked):
    (model, published, close), (x, size, mask) = both, cells
    mask = mask if masked else None
    ours = (model.encoder if part == "student" else model.teacher)(x, size, mask)
    close(ours.genes(), published.encode(part, x, size, mask, BLOCKS["encoder"]))


@torch.no_grad()
def test_masked_predictor_is_the_published_one(both, cells):
    (model, published, close), (x, size, mask) = both, cells
    z = published.encode("student", x, size, mask, BLOCKS["encoder"])
    close(
        model.masked_predictor(model.encoder(x, size, mask)).genes(),
        published.masked_predictor(z, BLOCKS["masked"]))


def guides(modality, g):
    "One token of the modality for each of 5 cells, modes at random."
    features = torch.randn(5, 1, max(WIDTHS), generator=g, dtype=torch.float64)
    features[..., WIDTHS[modality]:] = 0
    mode = torch.randint(0, MODES, (5, 1), generator=g)
    return ActionBatch(features, torch.full((5, 1), modality), mode, torch.ones(5, 1, dtype=torch.bool))


@pytest.mark.parametrize("modality", [0, 1, 2], ids=["protein", "chemical", "dna"])
@torch.no_grad()
def test_actions_and_predictions_are_the_published_ones(both, cells, modality):
    (model, published, close), (x, size, _) = both, cells
    actions = guides(modality, torch.Generator().manual_seed(modality))
    action = published.action(actions.features[:, 0], modality, actions.mode[:, 0])
    close(model.composer(actions)[:, 0], action)
    ours = model.predict_latent(x, size, actions)
    z = published.encode("student", x, size, None, BLOCKS["encoder"])
    mean, logvar = published.predict(z, action, BLOCKS["predictor"])
    close(ours.mean, mean)
    close(ours.logvar, logvar)
    close(model.readout(ours.mean), published.linear("head", mean)[..., 0])


def test_maps_that_no_answer_shows_are_the_released_ones(converted):
    "With one action token nothing depends on its queries and keys, or on the norm before them (`CrossAttention`)."
    model, state = converted
    for i, block in enumerate(model.predictor.blocks):
        maps = dict(q="action_attn.q_proj", k="action_attn.k_proj", norm="ln_1")
        for ours, name in maps.items():
            for kind, t in getattr(block.cross, ours).named_parameters():
                assert torch.equal(t.float(), state[f"predictor.blocks.{i}.{name}.{kind}"])


# --- sizes and containers

def test_sizes_are_those_of_the_file_and_switches_those_of_the_paper(tmp_path, decoder):
    path = written(tmp_path/"m.pt", random_state(encoder=2, masked=1, predictor=3))
    model, genes, actions, *_ = convert_released(path, GENES, decoder, n_heads=2)
    sizes = dict(n_genes=G,
                 d_model=D,
                 n_heads=2,
                 mlp_ratio=HIDDEN // D,
                 d_action=ACTION,
                 d_mode=MODE,
                 n_modes=MODES)
    sizes |= dict(n_encoder_layers=2, n_masked_predictor_layers=1, n_predictor_layers=3)
    sizes |= dict(zip(("d_protein", "d_chemical", "d_dna"), WIDTHS))
    assert model.config == preset("paper").model.changed(**sizes)
    assert genes == GENES and actions == []
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert all(p.requires_grad for p in model.encoder.parameters())


OPTIMIZER = dict(state={0: dict(step=torch.tensor(3.))}, param_groups=[dict(betas=(.9, .999), params=[0])])


@pytest.mark.parametrize("renamed", [
    lambda n: n, lambda n: f"_orig_mod.{n}", lambda n: f"module.{n}", lambda n: f"module._orig_mod.{n}",
    lambda n: n.replace("student.", "student._orig_mod.")
],
                        ids=["plain", "compiled", "parallel", "both", "inside"])
@pytest.mark.parametrize("wrapped", [
    lambda s: s, lambda s: dict(model=s, optimizer=OPTIMIZER, step=3)], ids=["bare", "under model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_container_and_wrapper_gives_the_same_weights(tmp_path, decoder, renamed, wrapped, zipped):
    weights = lambda path: convert_released(path, GENES, decoder).model.state_dict()
    content = wrapped({renamed(name): t for name, t in SMALL.items()})
    other = weights(written(tmp_path/"m.pt", content, _use_new_zipfile_serialization=zipped))
    plain = weights(written(tmp_path/"plain.pt", SMALL))
    assert plain.keys() == other.keys() and all(torch.equal(plain[k], other[k]) for k in plain)


def test_a_name_with_and_without_wrapper_is_refused(tmp_path, decoder):
    path = written(tmp_path/"m.pt", SMALL | {"module.predictor.final_norm.bias": torch.ones(D)})
    with pytest.raises(ValueError, match=r"predictor\.final_norm\.bias: found twice"):
        convert_released(path, GENES, decoder)


# --- what is refused by name

def refusal(tmp_path, state, **kwargs):
    "What is said about a state dict."
    path = written(tmp_path/"m.pt", state)
    with pytest.raises(ValueError) as caught: convert_released(path, **dict(genes=GENES) | kwargs)
    assert str(path) in str(caught.value) or kwargs
    return str(caught.value)


def shown(shape): return f"({', '.join(map(str, shape))})"


FREE = {f"composer.projectors.{i}.weight": f"d_{name}" for i, name in enumerate(("protein", "chemical", "dna"))}
FREE |= {"composer.mode_embedding.weight": "n_modes"}  # sizes that no other tensor knows


@pytest.mark.parametrize("name", SMALL)
def test_a_missing_tensor_is_named_with_its_shape(tmp_path, name):
    message = refusal(tmp_path, {k: v for k, v in SMALL.items() if k != name})
    expected = [*SMALL[name].shape]
    if name in FREE: expected[name.startswith("composer.proj")] = FREE[name]
    assert "in 1 place:" in message and f"{name}: missing, expected shape {shown(expected)}" in message


@pytest.mark.parametrize("name", SMALL)
def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path, name):
    good = SMALL[name].shape
    wrong = [
        n if name in FREE and (i == 1) == name.startswith("composer.proj") else n + 1
        for i, n in enumerate(good)
    ]
    message = refusal(tmp_path, SMALL | {name: torch.ones(wrong)})
    assert "in 1 place:" in message and f"{name}: found shape {shown(wrong)}, expected {shown(good)}" in message
    message = refusal(tmp_path, SMALL | {name: SMALL[name][None]})
    assert f"{name}: found shape {shown((1, *good))}, expected" in message


@pytest.mark.parametrize("name", [
    "student.input_scaler.weight", "student.blocks.0.attn.rotary", "student.mask_tokens",
    "composer.projectors.3.weight", "predictor.pert_bank", "predictor.blocks.0.attn.q_proj.weight",
    "masked_predictor.blocks.0.ln_3.bias", "head.weight", "extra"])
def test_a_foreign_tensor_is_named(tmp_path, name):
    assert "in 1 place:" in (message := refusal(tmp_path, SMALL | {name: torch.ones(D)}))
    assert f"{name}: foreign" in message


@pytest.mark.parametrize("part", ["student", "teacher", "masked_predictor", "predictor"])
def test_blocks_with_a_gap_or_only_in_one_encoder_are_refused(tmp_path, part):
    first = {k: v for k, v in SMALL.items() if k.startswith(f"{part}.blocks.0.")}
    block = lambda i: {k.replace(".blocks.0.", f".blocks.{i}."): v for k, v in first.items()}
    message = refusal(tmp_path, SMALL | block(5))
    assert ".blocks.1.ln_1.weight: missing" in message and f"{part}.blocks.5.ln_1.weight: foreign" in message
    without = {k: v for k, v in SMALL.items() if k not in first}
    assert f"{part}.blocks.0.ln_1.weight: missing" in refusal(tmp_path, without)
    if part in ("student", "teacher"):
        other = "teacher" if part == "student" else "student"
        assert f"{other}.blocks.1.ln_1.weight: missing" in refusal(tmp_path, SMALL | block(1))


@pytest.mark.parametrize("value, words", [
    (3, "found int"), ([1.], "found list"), (torch.ones(D).long(), "torch.int64"),
    (torch.ones(D).to_sparse(), "sparse"), (torch.ones(D, device="meta"), "meta"),
    (torch.full((D,), math.nan), "NaN"), (torch.full((D,), math.inf), "infinite")])
def test_what_is_no_tensor_of_finite_numbers_is_named(tmp_path, value, words):
    message = refusal(tmp_path, SMALL | {"student.ln_f.bias": value})
    assert "student.ln_f.bias: " in message and words in message


def test_a_hidden_width_that_is_no_multiple_is_refused(tmp_path):
    n = HIDDEN - 1
    narrow = {k: v[:n] for k, v in SMALL.items() if "c_fc" in k}
    narrow |= {k: v[:, :n] for k, v in SMALL.items() if k.endswith("mlp.c_proj.weight")}
    assert f"mlp.c_fc.weight: found {n} rows" in refusal(tmp_path, SMALL | narrow)


@pytest.mark.parametrize("genes, words", [(None, "var_names of the GEARS file"),
                                          (GENES[:-1], f"found {G - 1} names"),
                                          ([GENES[1], *GENES[1:]], f"{G - 1} of them different")])
def test_genes_must_be_named_each_once(tmp_path, genes, words):
    assert words in refusal(tmp_path, SMALL, genes=genes)


def test_heads_must_divide_the_width(tmp_path): assert "n_heads 3" in refusal(tmp_path, SMALL, n_heads=3)


@pytest.mark.parametrize("head, words", [
    ({"head.bias": torch.ones(1)}, f"head.weight: missing, expected shape (1, {D})"),
    (HEAD | {"head.scale": torch.ones(1)}, "head.scale: foreign"),
    (HEAD | {"head.weight": torch.ones(1, D + 1)}, f"head.weight: found shape (1, {D + 1}), expected (1, {D})"),
    (HEAD | {"head.bias": torch.ones(2)}, "head.bias: found shape (2), expected (1)")])
def test_a_decoder_that_does_not_fit_is_refused_by_name(tmp_path, head, words):
    message = refusal(tmp_path, SMALL, decoder=written(tmp_path/"head.pt", dict(model=head)))
    assert words in message and "head.pt" in message


def test_without_a_decoder_there_is_a_warning_and_no_change(tmp_path):
    path = written(tmp_path/"m.pt", SMALL)
    with pytest.warns(UserWarning, match="decoder: none given"): model = convert_released(path, GENES).model
    assert not any(p.any() for p in model.readout.parameters())


# --- nothing is run

class Trap:
    "Unpickled, it makes a folder."
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (str(self.folder),)


@dataclass
class Settings:
    "An object of somebody's own class, as a program may save beside its weights."
    width:int = 16


@pytest.mark.parametrize("place", [
    lambda t: t, lambda t: dict(model=SMALL, optimizer=t),
    lambda t: dict(model=SMALL | {"student.ln_f.bias": t}), lambda t: SMALL | {"extra": t}
],
                        ids=["alone", "beside", "among", "bare"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_acts_is_refused_and_does_not_act(tmp_path, decoder, place, zipped):
    sprung = tmp_path/"sprung"
    path = written(tmp_path/"trap.pt", place(Trap(sprung)), _use_new_zipfile_serialization=zipped)
    for files in ((path, decoder), (written(tmp_path/"m.pt", SMALL), path)):
        with pytest.raises(ValueError, match=r"trap\.pt: holds \w+\.mkdir") as caught:
            convert_released(files[0], GENES, files[1])
        assert "weights_only" not in str(caught.value)
    assert not sprung.exists()
    torch.load(path, weights_only=False)  # the trap works where it is let
    assert sprung.exists()


def test_an_object_of_another_class_is_refused_by_its_name(tmp_path, decoder):
    path = written(tmp_path/"m.pt", dict(model=SMALL, config=Settings()))
    with pytest.raises(ValueError, match=r"m\.pt: holds \S*Settings"): convert_released(path, GENES, decoder)


def zip_of_text():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z: z.writestr("a.txt", "text")
    return buffer.getvalue()


def half_a_file():
    torch.save(SMALL, buffer := io.BytesIO())
    return buffer.getvalue()[:2000]


NUMPY = pickle.dumps(SMALL["student.ln_f.bias"].numpy(), protocol=2)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", zip_of_text(), half_a_file(), NUMPY],
                         ids=["empty", "text", "zip", "half", "numpy"])
def test_what_is_no_checkpoint_is_refused_by_file(tmp_path, content):
    (path := tmp_path/"m.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.pt: (not readable as tensors|holds numpy)"):
        convert_released(path, GENES)


def test_an_absent_file_and_a_list_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"): convert_released(tmp_path/"absent.pt", GENES)
    path = written(tmp_path/"list.pt", [1, 2])
    with pytest.raises(ValueError, match="found list, expected a dictionary"): convert_released(path, GENES)


# --- in our own format

@torch.no_grad()
def test_saved_and_read_again_it_answers_the_same(tmp_path, decoder):
    model, genes, actions, *_ = convert_released(written(tmp_path/"m.pt", SMALL), GENES, decoder)
    again = from_pretrained(save_pretrained(model, tmp_path/"ours", genes, actions), genes=GENES)
    g = torch.Generator().manual_seed(5)
    x, size, guide = torch.rand(5, G, generator=g), torch.rand(5, generator=g), guides(2, g)
    guide = guide._replace(features=guide.features.float())
    first, second = (m.predict_latent(x, size, guide) for m in (model, again.model))
    assert torch.equal(first.mean, second.mean) and torch.equal(first.logvar, second.logvar)
    assert torch.equal(model.readout(first.mean), again.model.readout(second.mean))
    assert again.genes == GENES and again.model.config == model.config
