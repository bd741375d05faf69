"""Language models of transformers, tiny, with their residual branches as counted from the definitions.

Two additions a layer (attention, then feed-forward) unless a comment says otherwise. Sizes are numbers of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from entries import GPT2, SEQ2SEQ, SMALL, Entry, counted, from_transformers, ids, pairs_of_ids, tokens
from torch import nn


def only_ids() -> dict[str, Any]:
    """Token numbers for a model without a cache."""
    return {"input_ids": tokens()}


def gpt_neo(layers: int) -> nn.Module:
    """GPT-Neo, whose configuration lists the kinds of attention by number of layers."""
    kinds = {"attention_types": [[["global"], layers]]}
    shape = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    return from_transformers("GPTNeo", ("num_layers",), max_position_embeddings=16, **shape, **kinds)(layers)


model = from_transformers
language = partial(counted, requires="transformers")
TWO, ONE = {3: 6, 1: 2}, {3: 3, 1: 1}
BOTH = {2: (4, 6), 1: (2, 3)}  # encoder; decoder with its attention to the encoder
BOTH_SIDES = ("encoder_layers", "decoder_layers")
SHORT = {"max_position_embeddings": 16}
PLAIN = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 50}
GROUPED = {"num_key_value_heads": 1, **SMALL}  # one head of keys and values for two of queries
GATED_CARRIERS = "o_proj down_proj"


def llama_like(kind: str, **options: Any) -> Callable[[Any], nn.Module]:
    """Grouped queries and a gated feed-forward layer, with special tokens within the vocabulary."""
    return model(kind, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options, **GROUPED)


DECODERS: tuple[Entry, ...] = (
    language(
        "opt",
        model("OPT", ffn_dim=32, word_embed_proj_dim=16, **SHORT, **PLAIN),
        ids,
        TWO,
        {2},
        "self_attn.out_proj fc2",
    ),
    language(
        "bloom",
        model("Bloom", ("n_layer",), hidden_size=16, n_head=2, vocab_size=50),
        ids,
        TWO,
        {2},
        "self_attention.dense mlp.dense_4h_to_h",
    ),
    # Attention and feed-forward side by side: added to each other, then to the stream.
    language("falcon", model("Falcon", **PLAIN), ids, ONE, {2}, "self_attention.dense mlp.dense_4h_to_h"),
    language("phi", model("Phi", **SMALL), ids, ONE, {2}, "self_attn.dense mlp.fc2"),
    language(
        "codegen",
        model("CodeGen", ("n_layer",), rotary_dim=4, n_ctx=16, **{**GPT2, "n_head": 4}),
        ids,
        ONE,
        {2},
        "attn.out_proj mlp.fc_out",
    ),
    # Side by side too, but added to the stream one after the other.
    language("cohere", llama_like("Cohere"), ids, TWO, {2}, GATED_CARRIERS),
    language("mistral", llama_like("Mistral"), ids, TWO, {2}, GATED_CARRIERS),
    language("qwen2", llama_like("Qwen2"), ids, TWO, {2}, GATED_CARRIERS),
    language("qwen3", llama_like("Qwen3", head_dim=8), ids, TWO, {2}, GATED_CARRIERS),
    language("phi3", llama_like("Phi3"), ids, TWO, {2}, GATED_CARRIERS),
    language("stablelm", llama_like("StableLm"), ids, TWO, {2}, GATED_CARRIERS),
    language("granite", llama_like("Granite"), ids, TWO, {2}, GATED_CARRIERS),
    language("nemotron", llama_like("Nemotron"), ids, TWO, {2}, GATED_CARRIERS),
    language("smollm3", llama_like("SmolLM3"), ids, TWO, {2}, GATED_CARRIERS),
    language("starcoder2", llama_like("Starcoder2"), ids, TWO, {2}, "o_proj c_proj"),
    # A norm with a gain comes last.
    language("olmo2", llama_like("Olmo2"), ids, TWO, {2}, "post_attention_layernorm post_feedforward_layernorm"),
    language("glm4", llama_like("Glm4", head_dim=8), ids, TWO, {2}, "post_self_attn_layernorm post_mlp_layernorm"),
    # The last norm's gain is 1 + w: not linear in w.
    language(
        "gemma2",
        llama_like("Gemma2", head_dim=8),
        ids,
        TWO,
        {2},
        "",
        linear=False,
        outputs="post_attention_layernorm post_feedforward_layernorm",
    ),
    language("gpt-neo", gpt_neo, ids, TWO, {2}, "attention.out_proj mlp.c_proj"),
    language(
        "gpt-bigcode", model("GPTBigCode", ("n_layer",), n_inner=32, **GPT2), ids, TWO, {2}, "attn.c_proj mlp.c_proj"
    ),
    language(
        "mpt",
        model("Mpt", ("n_layers",), d_model=16, n_heads=2, vocab_size=50, max_seq_len=16),
        ids,
        TWO,
        {2},
        "attn.out_proj ffn.down_proj",
    ),
    language(
        "xglm",
        model("XGLM", ("num_layers",), d_model=16, ffn_dim=32, attention_heads=2, vocab_size=50, **SHORT),
        ids,
        TWO,
        {2},
        "self_attn.out_proj fc2",
        dtype=torch.float32,
    ),
    language("persimmon", model("Persimmon", **SMALL), ids, TWO, {2}, "self_attn.dense mlp.dense_4h_to_h"),
    language(
        "olmoe",
        llama_like("Olmoe", num_experts=2, num_experts_per_tok=2),
        ids,
        TWO,
        {2},
        GATED_CARRIERS,
        dtype=torch.float32,
    ),
    # Latent attention: down, up (queries, keys, values), out.
    language(
        "deepseek-v3",
        model(
            "DeepseekV3",
            first_k_dense_replace=9,
            num_key_value_heads=2,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            qk_nope_head_dim=4,
            pad_token_id=0,
            **SMALL,
        ),
        ids,
        TWO,
        {2, 3},
        GATED_CARRIERS,
    ),
)
"""Pre-norm decoders."""

STATES: tuple[Entry, ...] = (
    # One mixer a layer. in_proj, conv1d, x_proj, dt_proj, out_proj; the D-skip inside is part of the branch.
    language("mamba", model("Mamba", hidden_size=16, state_size=4, vocab_size=50), ids, ONE, {5}, "mixer.out_proj"),
    # in_proj, conv1d, out_proj.
    language(
        "mamba2",
        model("Mamba2", hidden_size=16, state_size=4, num_heads=4, head_dim=8, n_groups=1, vocab_size=50, chunk_size=4),
        ids,
        ONE,
        {3},
        "mixer.out_proj",
    ),
    # In evaluation it halves the last weights of every other layer, as the module itself undoes in training.
    language(
        "rwkv",
        model("Rwkv", hidden_size=16, vocab_size=50, rescale_every=2),
        ids,
        {4: 8, 2: 4},
        {2},
        "attention.output feed_forward.value",
    ),
)
"""State-space and linear-attention models."""

ENCODERS: tuple[Entry, ...] = (
    language("roberta", model("Roberta", **SHORT, **SMALL), only_ids, TWO, {2}, "output.dense"),
    language("electra", model("Electra", embedding_size=8, **SHORT, **SMALL), only_ids, TWO, {2}, "output.dense"),
    language("roformer", model("RoFormer", **SHORT, **SMALL), only_ids, TWO, {2}, "output.dense"),
    language("megatron-bert", model("MegatronBert", **SHORT, **SMALL), only_ids, TWO, {2}, "output.dense"),
    language(
        "distilbert",
        model("DistilBert", ("n_layers",), dim=16, n_heads=2, hidden_dim=32, vocab_size=50, **SHORT),
        only_ids,
        TWO,
        {2},
        "attention.out_lin ffn.lin2",
    ),
    # The first layer's attention scores read a table of relative positions that all layers share.
    language(
        "deberta-v2",
        model(
            "DebertaV2",
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            **SHORT,
            **SMALL,
        ),
        only_ids,
        TWO,
        {2, 3},
        "output.dense",
    ),
    # Mixes by Fourier transforms, which have no weights; then a feed-forward layer.
    language(
        "fnet",
        model("FNet", hidden_size=16, intermediate_size=32, vocab_size=50, **SHORT),
        only_ids,
        TWO,
        {0, 2},
        "output.dense",
        linear=False,
        outputs="fourier.self",
    ),
    language(
        "xlnet",
        model("XLNet", ("n_layer",), d_model=16, n_head=2, d_inner=32, vocab_size=50),
        only_ids,
        TWO,
        {2},
        "rel_attn.o ff.layer_2",
        wraps=False,  # the output projection is a bare parameter, and the norm follows in the same module
    ),
    # Attention; and beside it a convolution: depthwise, pointwise, kernel, out.
    language(
        "convbert",
        model("ConvBert", embedding_size=8, head_ratio=1, **SHORT, **SMALL),
        only_ids,
        TWO,
        {2, 4},
        "output.dense",
    ),
)
"""Encoders, most of them post-norm."""

PAIRS: tuple[Entry, ...] = (
    language("pegasus", model("Pegasus", BOTH_SIDES, **SHORT, **SEQ2SEQ), pairs_of_ids, BOTH, {2}, "out_proj fc2"),
    language(
        "marian",
        model("Marian", BOTH_SIDES, pad_token_id=0, decoder_start_token_id=0, **SHORT, **SEQ2SEQ),
        pairs_of_ids,
        BOTH,
        {2},
        "out_proj fc2",
    ),
    language(
        "switch",
        model(
            "SwitchTransformers",
            ("num_layers", "num_decoder_layers"),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_heads=2,
            vocab_size=50,
            dropout_rate=0.0,
            num_experts=1,
            num_sparse_encoder_layers=0,
            num_sparse_decoder_layers=0,
        ),
        pairs_of_ids,
        {3: (6, 9), 1: (2, 3)},
        {2},
        "SelfAttention.o EncDecAttention.o wo",
    ),
)
"""Encoders with decoders."""

LANGUAGE = DECODERS + STATES + ENCODERS + PAIRS
