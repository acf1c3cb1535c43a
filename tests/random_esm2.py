"A randomly initialised ESM-2 written twice, as fair-esm and as transformers save it."
import json
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn

MODULES = {  # of a layer, fair-esm -> transformers
    "self_attn.q_proj": "attention.self.query", "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value", "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm", "fc1": "intermediate.dense", "fc2": "output.dense",
    "final_layer_norm": "LayerNorm"}


def esm_name(name):
    "A parameter of fair-esm's ESM2 as transformers' EsmModel calls it; None where it has no such."
    if name == "embed_tokens.weight": return "embeddings.word_embeddings.weight"
    if name.startswith("emb_layer_norm_after"): return f"encoder.{name}"
    if not name.startswith("layers."): return name if name.startswith("contact_head") else None
    _, layer, *module, kind = name.split(".")
    known = MODULES.get(".".join(module))
    return f"encoder.layer.{layer}.{known}.{kind}" if known else None


def write_random_esm2(folder, seed=0, layers=6, width=320, heads=20):
    "random.pt (fair-esm) and random/ (transformers), of the 8M model's shape: what Esm2Fair and Esm2HF read."
    import esm
    from transformers import EsmConfig, EsmModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fair = esm.ESM2(num_layers=layers, embed_dim=width, attention_heads=heads)
        for p in fair.parameters():
            nn.init.normal_(p, std=0.1) if p.ndim > 1 else p.data.add_(0.1*torch.randn_like(p))
    state, folder, words = fair.state_dict(), Path(folder), fair.alphabet.all_toks
    shape = Namespace(encoder_layers=layers,
                      encoder_embed_dim=width,
                      encoder_attention_heads=heads,
                      token_dropout=True)
    stored = {f"encoder.sentence_encoder.{k}": v for k, v in state.items()}
    torch.save({"cfg": {"model": shape}, "model": stored}, folder/"random.pt")
    config = EsmConfig(vocab_size=len(words), pad_token_id=fair.padding_idx, mask_token_id=fair.mask_idx,
                       hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                       intermediate_size=4*width, max_position_embeddings=1026, layer_norm_eps=1e-5,
                       position_embedding_type="rotary", emb_layer_norm_before=False, token_dropout=True)
    model = EsmModel(config, add_pooling_layer=False)
    model.load_state_dict({esm_name(k): v for k, v in state.items() if esm_name(k)}, strict=False)
    model.save_pretrained(folder/"random")
    (folder/"random"/"vocab.txt").write_text("\n".join(words))
    (folder/"random"/"tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "EsmTokenizer"}))
    return folder/"random.pt", folder/"random"
