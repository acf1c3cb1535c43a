"""ESM-2 and Nucleotide Transformer without their weights: random models of the same architecture, saved as the
real ones are."""
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData

from biojepa.actions import pretrained
from biojepa.actions.action_tokens import action_batch
from biojepa.actions.describe import default_features
from biojepa.actions.featurizers import featurize
from biojepa.actions.pretrained import (
    SOURCES, Esm2Fair, Esm2HF, MissingWeightsError, NucleotideTransformer, find_weights, load_esm_fair,
    weights_hash
)
from biojepa.actions.vocabulary import ActionTable, Modality, Mode
from biojepa.config import DataConfig

sys.path.insert(0, str(Path(__file__).parent))
from random_esm2 import write_random_esm2

RNG = np.random.default_rng(0)
PROTEINS = {f"p{n}": "".join(RNG.choice(list("ACDEFGHIKLMNPQRSTVWY"), n))
            for n in (1, 7, 60, 200)} | {"rare": "MUXBZO"}


@pytest.fixture(scope="module")
def esm(tmp_path_factory): return write_random_esm2(tmp_path_factory.mktemp("esm"))


@pytest.fixture(autouse=True)
def quiet():
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()


# ---------------------------------------------------------------- ESM-2

def test_shape_is_the_8m_model(esm):
    model, alphabet = load_esm_fair(esm[0])
    assert (model.num_layers, model.embed_dim, model.attention_heads, len(
        alphabet.all_toks)) == (6, 320, 20, 33)
    n = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("contact_head"))
    assert 7.4e6 < n < 7.6e6                                       # "8M"


def test_two_libraries_agree(esm):
    fair = featurize("esm2_fair", PROTEINS, model=esm[0], cache=False, progress=False)
    hf = featurize("esm2_hf", PROTEINS, model=esm[1], cache=False, progress=False)
    assert fair.values.shape == (len(PROTEINS), 320)
    np.testing.assert_allclose(fair.values, hf.values, atol=1e-5)
    assert np.abs(fair.values[0] - fair.values[1]).max() > 0.1     # and they say something


def test_agreement_depends_on_every_kind_of_weight(esm, tmp_path):
    "The comparison above can fail: exchange two weights of one layer in one of the formats."
    checkpoint = torch.load(esm[0], weights_only=False)
    state = checkpoint["model"]
    q = "encoder.sentence_encoder.layers.3.self_attn.q_proj.bias"
    k = "encoder.sentence_encoder.layers.3.self_attn.k_proj.bias"
    state[q], state[k] = state[k], state[q]
    torch.save(checkpoint, tmp_path/"swapped.pt")
    wrong = featurize("esm2_fair", PROTEINS, model=tmp_path/"swapped.pt", cache=False, progress=False)
    right = featurize("esm2_hf", PROTEINS, model=esm[1], cache=False, progress=False)
    assert np.abs(wrong.values - right.values).max() > 1e-4


def test_pooling_by_hand(esm):
    "Token ids, layer and mean written out, without the module's code."
    model, alphabet = load_esm_fair(esm[0])
    sequence = PROTEINS["p60"]
    tokens = torch.tensor([[alphabet.cls_idx, *[alphabet.tok_to_idx[a] for a in sequence], alphabet.eos_idx]])
    with torch.no_grad(): hidden = model.eval()(tokens, repr_layers=[6])["representations"][6][0]
    assert len(hidden) == 62
    expected = torch.stack([hidden[i] for i in range(1, 61)]).mean(0)
    for kind, path in zip(("esm2_fair", "esm2_hf"), esm):
        row = featurize(kind, {"p": sequence}, model=path, cache=False, progress=False).rows("p")[0]
        np.testing.assert_allclose(row, expected, atol=1e-5)
    assert (expected - hidden.mean(0)).abs().max() > 1e-4          # <cls> and <eos> would have mattered


def released_mean(esm, sequence):
    "ESM-2 as released, written out: the mean over start, residues and end of one sequence on its own."
    model, alphabet = load_esm_fair(esm[0])
    tokens = torch.tensor([[alphabet.cls_idx, *[alphabet.tok_to_idx[a] for a in sequence], alphabet.eos_idx]])
    with torch.no_grad(): hidden = model.eval()(tokens, repr_layers=[6])["representations"][6][0]
    return sum(hidden[i] for i in range(len(sequence) + 2)).numpy()/(len(sequence) + 2)


def test_pooling_over_all_tokens_is_the_releases(esm):
    "Row 18: start and end count, padding does not, whatever the batch."
    expected = np.stack([released_mean(esm, s) for s in PROTEINS.values()])
    for kind, path in zip(("esm2_fair", "esm2_hf"), esm):
        bank = featurize(kind, PROTEINS, model=path, pooling="tokens", cache=False, progress=False)
        np.testing.assert_allclose(bank.values, expected, atol=1e-5)
        plain = featurize(kind, PROTEINS, model=path, cache=False, progress=False)
        moved = np.linalg.norm(bank.values - plain.values, axis=1)
        assert moved[0] > moved[-2] > 1e-3                         # 1 residue, 200 residues
        assert bank.provenance["pooling"] != plain.provenance["pooling"]
    with pytest.raises(ValueError, match="pooling: found 'letters'; choose 'residues' or 'tokens'"):
        Esm2HF(model=esm[1], pooling="letters")


def test_the_two_poolings_never_share_a_cache(esm, tmp_path):
    banks = [
        featurize("esm2_hf", {"p": PROTEINS["p7"]},
                  model=esm[1],
                  pooling=pooling,
                  cache=tmp_path,
                  progress=False) for pooling in ("residues", "tokens", "residues")
    ]
    assert np.abs(banks[0].values - banks[1].values).max() > 1e-3
    np.testing.assert_array_equal(banks[0].values, banks[2].values)


@pytest.mark.parametrize("make,which", [(Esm2Fair, 0), (Esm2HF, 1)])
def test_padding_changes_nothing(esm, make, which):
    alone, together = make(model=esm[which]), make(model=esm[which])
    sequences = list(PROTEINS.values())
    rows = np.concatenate([alone.embed([s]) for s in sequences])
    np.testing.assert_allclose(together.embed(sequences), rows, atol=1e-5)


def test_cut_at_1022_residues_with_a_warning(tmp_path):
    esm = write_random_esm2(tmp_path, layers=1, width=40, heads=4)
    long = "".join(RNG.choice(list("ACDEFGHIKLMNPQRSTVWY"), 1500))
    with pytest.warns(UserWarning, match="1 of 2 sequences were cut to 1022 letters: TTN"):
        bank = featurize("esm2_fair", {"TTN": long, "head": long[:1022]},
                         model=esm[0],
                         width=40,
                         cache=False,
                         progress=False)
    np.testing.assert_array_equal(*bank.rows(["TTN", "head"]))
    assert bank.provenance["cut"] == {"TTN": 1500}
    seen = []
    made = Esm2HF(model=esm[1], width=40); made.embed(["M"])
    made.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape[1]),
                                         with_kwargs=True)
    made.embed([long[:1022]])
    assert seen == [1024]                                          # 1,022 residues and two special tokens


def test_lower_case_and_line_breaks_are_the_same_protein(esm):
    bank = featurize("esm2_fair", {"a": "MKTAYIAK", "b": "mkta\nyiak*"},
                     model=esm[0],
                     cache=False,
                     progress=False)
    np.testing.assert_array_equal(*bank.values)


def test_width_is_checked(esm, tmp_path):
    fair, hf = write_random_esm2(tmp_path, layers=1, width=40, heads=4)
    for make, path in ((Esm2Fair, fair), (Esm2HF, hf)):
        with pytest.raises(ValueError, match="hidden width of 40, expected 320; pass width=40"):
            make(model=path).embed(["MK"])
        assert make(model=path, width=40).embed(["MK"]).shape == (1, 40)


def test_provenance_names_the_weights(esm, tmp_path):
    bank = featurize("esm2_fair", {"a": "MK"}, model=esm[0], cache=tmp_path, progress=False)
    assert bank.provenance["weights"] == weights_hash(esm[0]) and bank.provenance["model"] == "random.pt"
    assert bank.provenance["versions"]["torch"] == torch.__version__
    other, _ = write_random_esm2(tmp_path, seed=1)
    changed = featurize("esm2_fair", {"a": "MK"}, model=other, cache=tmp_path,
                        progress=False)  # other weights, other cache
    assert np.abs(changed.values - bank.values).max() > 1e-3


# ---------------------------------------------------------------- files from elsewhere

class Hostile:
    "Writes a file when it is unpickled."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return (open, (self.path, "w"))


def test_a_checkpoint_cannot_run_code(tmp_path):
    (tmp_path/"esm2.pt").write_bytes(
        pickle.dumps({"cfg": Hostile(tmp_path/"was-here"), "model": {}}, protocol=2))
    torch.save({"cfg": Hostile(tmp_path/"was-here"), "model": {}}, tmp_path/"esm2_zip.pt")
    for name in ("esm2.pt", "esm2_zip.pt"):
        with pytest.raises(ValueError, match=f"{name}: found no readable checkpoint"):
            load_esm_fair(tmp_path/name)
    assert not (tmp_path/"was-here").exists()
    torch.load(tmp_path/"esm2_zip.pt", weights_only=False)         # the file is as bad as it claims
    assert (tmp_path/"was-here").exists()


def test_broken_or_foreign_checkpoints_are_named(esm, tmp_path):
    (tmp_path/"half.pt").write_bytes(esm[0].read_bytes()[:100_000])
    with pytest.raises(ValueError, match="half.pt: found no readable checkpoint"):
        load_esm_fair(tmp_path/"half.pt")
    torch.save({"weights": torch.ones(1)}, tmp_path/"foreign.pt")
    with pytest.raises(ValueError, match="foreign.pt: found no 'cfg' and 'model'"):
        load_esm_fair(tmp_path/"foreign.pt")


def test_pickled_weights_in_a_folder_are_refused(tmp_path):
    (tmp_path/"config.json").write_text("{}"); (tmp_path/"pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="found no \\*.safetensors.*pickled weights are not read"):
        Esm2HF(model=tmp_path)


def test_a_missing_weight_is_never_drawn_at_random(esm, tmp_path):
    from safetensors.torch import load_file, save_file
    for p in esm[1].iterdir(): (tmp_path/p.name).write_bytes(p.read_bytes())
    state = load_file(tmp_path/"model.safetensors")
    del state["encoder.layer.2.attention.self.query.weight"]
    save_file(state, tmp_path/"model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
            ValueError,
            match="found no weights for .*encoder.layer.2.attention.self.query.weight.*draw them at random"
    ):
        Esm2HF(model=tmp_path).embed(["MK"])


# ---------------------------------------------------------------- weights that are not there

@pytest.mark.parametrize("kind,address,gate",
                        [("esm2_fair", "https://dl.fbaipublicfiles.com/", False),
                         ("esm2_hf", "https://huggingface.co/facebook/esm2_t6_8M_UR50D", False),
                         ("ntv3", "https://huggingface.co/InstaDeepAI/NTv3_650M_pre", True)])
def test_missing_weights_say_what_to_do(kind, address, gate, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.PATHS, "raw", pretrained.PATHS.root/"data"/"raw-of-this-test")
    with pytest.raises(MissingWeightsError) as error: featurize(kind, {"a": "ACGT"}, download=False)
    text = str(error.value)
    assert address in text and f"data/raw-of-this-test/models/{SOURCES[kind].name}" in text and "licence" in text.lower(
    ) and "'kmer'" in text
    assert ("gated" in text and "HF_TOKEN" in text) is gate
    with pytest.raises(MissingWeightsError, match="found nothing at model='/nowhere'"):
        featurize(kind, {"a": "ACGT"}, model="/nowhere")


def hub_errors():
    import httpx
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    return [
        GatedRepoError("403 Client Error: access to model is restricted", response=response),
        LocalEntryNotFoundError("no connection, nothing cached"),
        OfflineModeIsEnabled("offline"),
        httpx.ConnectError("no route to host"),
        ConnectionError("refused"),
        TimeoutError("slow")
    ]


@pytest.mark.parametrize("n", range(6))
def test_every_failed_download_becomes_the_same_error(n, tmp_path, monkeypatch):
    import huggingface_hub
    error = hub_errors()[n]
    def fail(*args, **kwargs): raise error
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setenv(pretrained.REVISION, "0"*40)
    monkeypatch.setattr(pretrained.PATHS, "raw", pretrained.PATHS.root/"data"/"raw-of-this-test")
    with pytest.raises(MissingWeightsError, match=f"download failed .*{type(error).__name__}.*gated"):
        find_weights(SOURCES["ntv3"])


@pytest.mark.parametrize("named", [None, "", "main", "0123456", "0"*39 + "G", "0"*41])
def test_code_is_downloaded_only_at_a_commit(named, tmp_path, monkeypatch):
    "Weights without code need none; no code is fetched with them."
    import huggingface_hub
    asked = []
    def download(address, **options):
        asked.append((address, options["revision"], "*.py" in options["allow_patterns"]))
        return tmp_path
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(pretrained.PATHS, "raw", tmp_path/"raw")
    if named is None: monkeypatch.delenv(pretrained.REVISION, raising=False)
    else: monkeypatch.setenv(pretrained.REVISION, named)
    with pytest.raises(MissingWeightsError, match="only at a commit: choose one at https://.*NTv3_650M_pre/commits"):
        find_weights(SOURCES["ntv3"])
    find_weights(SOURCES["esm2_hf"])
    assert asked == [("facebook/esm2_t6_8M_UR50D", None, False)]
    monkeypatch.setenv(pretrained.REVISION, "0123456789"*4)
    find_weights(SOURCES["ntv3"])
    assert asked[1:] == [("InstaDeepAI/NTv3_650M_pre", "0123456789"*4, True)]


def test_weights_are_found_where_the_error_says(tmp_path, monkeypatch, esm):
    root = tmp_path
    monkeypatch.setattr(pretrained.PATHS, "raw", root/"raw")
    monkeypatch.setattr(pretrained.PATHS, "root", root)
    (root/"raw"/"models").mkdir(parents=True)
    (root/"raw"/"models"/"esm2_t6_8M_UR50D.pt").write_bytes(esm[0].read_bytes())
    bank = featurize("esm2_fair", {"a": "MK"}, download=False, cache=False, progress=False)
    assert bank.provenance["model"] == SOURCES["esm2_fair"].address


# ---------------------------------------------------------------- Nucleotide Transformer

STAND_IN = '''
# A small U-Net over bases with NTv3's calling shape: lengths in multiples of 128, no padding mask,
# rotary frequencies in a non-persistent buffer.
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

class StandInConfig(PretrainedConfig):
    model_type = "ntv3_stand_in"
    def __init__(self, vocab_size=11, embed_dim=1536, **kw):
        super().__init__(**kw)
        self.vocab_size, self.embed_dim = vocab_size, embed_dim

class StandIn(PreTrainedModel):
    config_class = StandInConfig
    def __init__(self, config):
        super().__init__(config)
        d = config.embed_dim
        self.embed, self.mix = nn.Embedding(config.vocab_size, d), nn.Linear(d, d)
        self.head = nn.Linear(d, config.vocab_size)
        self.register_buffer("inv_freq", 1.0/(10.0**(torch.arange(d)/d)), persistent=False)
        self.post_init()
    def forward(self, input_ids, output_hidden_states=False):
        if input_ids.shape[1] % 128: raise RuntimeError("length is not a multiple of 128")
        x = self.embed(input_ids)
        position = torch.arange(x.shape[1], device=x.device)[:, None]
        x = x + torch.sin(position*self.inv_freq)
        coarse = x.unflatten(1, (-1, 128)).mean(2)    # padding reaches every base, as in the real one,
        coarse = coarse + coarse.mean(1, keepdim=True)                   # and every block every other
        up = x + torch.tanh(self.mix(coarse)).repeat_interleave(128, 1)
        return MaskedLMOutput(logits=self.head(up), hidden_states=(x, coarse, up) if output_hidden_states else None)
'''
BASES = ["A", "T", "C", "G", "N", "<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>"]


@pytest.fixture(scope="module")
def ntv3(tmp_path_factory):
    "A folder as the hub serves it: code, configuration, tokenizer, safetensors."
    import importlib.util
    import sys

    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    folder = tmp_path_factory.mktemp("NTv3_stand_in")
    (folder/"modeling_stand_in.py").write_text(STAND_IN)
    spec = importlib.util.spec_from_file_location("modeling_stand_in", folder/"modeling_stand_in.py")
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = module.StandIn(module.StandInConfig())
    save_file(model.state_dict(), folder/"model.safetensors", metadata={"format": "pt"})
    (folder/"config.json").write_text(
        json.dumps(
            dict(model_type="ntv3_stand_in",
                 vocab_size=11,
                 embed_dim=1536,
                 architectures=["StandIn"],
                 auto_map={
                     "AutoConfig": "modeling_stand_in.StandInConfig", "AutoModelForMaskedLM":
                     "modeling_stand_in.StandIn"
                 })))
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(BASES)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(folder/"tokenizer.json"))
    (folder/"tokenizer_config.json").write_text(
        json.dumps(
            dict(tokenizer_class="PreTrainedTokenizerFast",
                 unk_token="<unk>",
                 pad_token="<pad>",
                 mask_token="<mask>")))
    return folder, model.eval()


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory, monkeypatch):
    "Code that came with a model is copied here, not to the home folder."
    import transformers.dynamic_module_utils as d
    monkeypatch.setattr(d, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("hf_modules")))


@pytest.fixture(autouse=True)
def trust(ntv3, monkeypatch):
    "The stand-in's code was read by whoever reads this file."
    monkeypatch.setenv(pretrained.TRUST, pretrained.code_hash(ntv3[0]))


GUIDES = {
    "a": "GCTTGACCTAAGGATCCATA", "b": "TTGACCATGGCAAGTCATTC", "ab":
    ("GCTTGACCTAAGGATCCATA", "TTGACCATGGCAAGTCATTC"), "long": "".join(RNG.choice(list("ACGT"), 130))
}


@pytest.mark.parametrize("pad", ["pad", "N"])
def test_ntv3_by_hand(ntv3, pad):
    folder, model = ntv3
    bank = featurize("ntv3", GUIDES, model=folder, pad=pad, cache=False, progress=False)
    assert bank.width == 1536
    def by_hand(s):
        fill = BASES.index("<pad>" if pad == "pad" else "N")
        ids = [BASES.index(c) for c in s] + [fill]*(-len(s) % 128)
        with torch.no_grad():
            return model(torch.tensor([ids]),
                         output_hidden_states=True).hidden_states[-1][0, :len(s)].mean(0).numpy()
    for name in ("a", "b", "long"):
        np.testing.assert_allclose(bank.rows(name)[0], by_hand(GUIDES[name]), atol=1e-5)
    np.testing.assert_allclose(bank.rows("ab")[0], (by_hand(GUIDES["a"]) + by_hand(GUIDES["b"]))/2, atol=1e-5)
    assert bank.provenance["pad"] == pad


def test_ntv3_padding_letter_matters(ntv3):
    a, b = (featurize("ntv3", GUIDES, model=ntv3[0], pad=pad, cache=False, progress=False).values
            for pad in ("pad", "N"))
    assert np.abs(a - b).max() > 1e-3
    with pytest.raises(ValueError, match="pad: found 'X'"): NucleotideTransformer(model=ntv3[0], pad="X")


def test_ntv3_row_does_not_depend_on_its_neighbours(ntv3):
    "Without a padding mask 128 more padding tokens would change a row; batches of one padded length cannot add them."
    alone = featurize("ntv3", {"a": GUIDES["a"]}, model=ntv3[0], cache=False, progress=False)
    together = featurize("ntv3", GUIDES, model=ntv3[0], cache=False, progress=False)
    np.testing.assert_allclose(alone.rows("a"), together.rows("a"), atol=1e-6)
    mixed = NucleotideTransformer(model=ntv3[0]).embed([GUIDES["a"], GUIDES["long"]])
    assert np.abs(mixed[0] - alone.rows("a")[0]).max() > 1e-3       # what a mixed batch would have done


def test_ntv3_buffers_that_are_not_in_the_file_are_computed(ntv3):
    made = NucleotideTransformer(model=ntv3[0]); made.embed(["ACGT"])
    torch.testing.assert_close(made.model.inv_freq, ntv3[1].inv_freq)
    assert made.model.dtype is torch.float32


def test_ntv3_rna_and_ambiguous_letters(ntv3):
    bank = featurize("ntv3", {"rna": "gcuuR", "dna": "GCTTN"}, model=ntv3[0], cache=False, progress=False)
    np.testing.assert_array_equal(*bank.values)


def test_a_kmer_tokenizer_is_found_out(ntv3, tmp_path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    for p in ntv3[0].iterdir():
        if p.is_file(): (tmp_path/p.name).write_bytes(p.read_bytes())
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(BASES)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".."), "isolated")
    tokenizer.save(str(tmp_path/"tokenizer.json"))
    with pytest.raises(ValueError, match="does not read one token per letter"):
        featurize("ntv3", {"a": "ACGTAC"}, model=tmp_path, cache=False, progress=False)


def test_code_beside_weights_runs_only_by_its_hash(ntv3, tmp_path, monkeypatch):
    folder = tmp_path/"model"
    shutil.copytree(ntv3[0], folder)
    (folder/"modeling_stand_in.py").write_text(STAND_IN + f"\nopen({str(tmp_path/'ran')!r}, 'w').close()\n")
    monkeypatch.delenv(pretrained.TRUST)
    def embed(**options): return NucleotideTransformer(model=folder, **options).embed(["ACGT"])
    found = pretrained.code_hash(folder)
    message = f"runs the code in it .modeling_stand_in.py.; its hash is {found}"
    with pytest.raises(pretrained.UntrustedCodeError, match=message): embed()
    with pytest.raises(pretrained.UntrustedCodeError, match=f"trusted has hash 0123456789ab, this has {found}"):
        embed(trust_code="0123456789ab")
    made = NucleotideTransformer(model=folder, trust_code=found)
    (folder/"more.py").write_text("")   # between the look and the run
    with pytest.raises(pretrained.UntrustedCodeError, match=f"trusted has hash {found}"): made.embed(["ACGT"])
    assert not (tmp_path/"ran").exists()
    (folder/"more.py").unlink()
    monkeypatch.setenv(pretrained.TRUST, found)
    assert embed().shape == (1, 1536) and (tmp_path/"ran").exists()


def test_code_of_another_repository_is_never_run(ntv3, tmp_path):
    folder = tmp_path/"model"
    shutil.copytree(ntv3[0], folder)
    config = json.loads((folder/"config.json").read_text())
    config["auto_map"]["AutoModelForMaskedLM"] = "someone/else--modeling.StandIn"
    (folder/"config.json").write_text(json.dumps(config))
    with pytest.raises(pretrained.UntrustedCodeError, match="code from another repository .someone/else--modeling"):
        NucleotideTransformer(model=folder, trust_code=pretrained.code_hash(folder))


# ---------------------------------------------------------------- an experiment's features, as released

def test_an_experiment_with_released_features(esm, ntv3, tmp_path, monkeypatch):
    "Proteins over all tokens, guides over their letters; the guides of a pair, and the pairs of a target, averaged."
    for name in ("raw", "processed"): monkeypatch.setattr(pretrained.PATHS, name, tmp_path/name)
    (tmp_path/"raw/models").mkdir(parents=True)
    (tmp_path/"raw/models/esm2_t6_8M_UR50D.pt").write_bytes(esm[0].read_bytes())
    (tmp_path/"raw/models/NTv3_650M_pre").symlink_to(ntv3[0])
    pairs = [(GUIDES["a"], GUIDES["b"]), (GUIDES["long"][:20], GUIDES["long"][40:60])]
    names = ("X+ctrl", "Y+ctrl", "ctrl")
    table = ActionTable(perturbation=names,
                        condition=names,
                        targets=(("X", ), ("Y", ), ()),
                        guide_id=("", "y1", ""),
                        guide_seqs=(sum(pairs, ()), pairs[0], ()),
                        mode=(Mode.CRISPRI, Mode.CRISPRI, Mode.CONTROL),
                        n_cells=(1, 1, 1))
    adata = AnnData(np.zeros((1, 1), "float32"),
                    uns={"protein_sequences": {"X": PROTEINS["p60"], "Y": PROTEINS["p7"]}})
    banks = default_features(adata, table, DataConfig(features="pretrained", pooling="tokens"))
    assert [(b.modality, b.width) for b in banks] == [(Modality.PROTEIN, 320), (Modality.DNA, 1536)]
    def by_hand(s):
        ids = torch.tensor([[BASES.index(c) for c in s] + [BASES.index("<pad>")]*(-len(s) % 128)])
        with torch.no_grad(): hidden = ntv3[1](ids, output_hidden_states=True).hidden_states[-1]
        return hidden[0, :len(s)].mean(0).numpy()
    actions = action_batch(table, banks)
    for p, name, guides in ((0, "p60", sum(pairs, ())), (1, "p7", pairs[0])):
        np.testing.assert_allclose(actions.features[p, 0, :320].numpy(),
                                   released_mean(esm, PROTEINS[name]),
                                   atol=1e-5)
        np.testing.assert_allclose(actions.features[p, 1].numpy(),
                                   np.mean([by_hand(g) for g in guides], 0),
                                   atol=1e-5)
    kmers = default_features(adata, table)
    assert [b.provenance["featurizer"] for b in kmers] == ["kmer", "kmer"]
