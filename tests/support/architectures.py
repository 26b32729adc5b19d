"""Small models of many architectures of transformers, untrained, in training mode."""

import torch
import transformers as tf

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": None,
}


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL))


def gpt2():
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=24))


def opt():
    return tf.OPTForCausalLM(tf.OPTConfig(**(SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 1})))


def neox():
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL))


def bloom():
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=3, n_head=2))


def qwen3():
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL, head_dim=8, num_key_value_heads=2))


def gemma2():
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2))


def bert():
    return tf.BertForMaskedLM(tf.BertConfig(**SMALL))


def roberta():
    return tf.RobertaForMaskedLM(tf.RobertaConfig(**(SMALL | {"pad_token_id": 1})))


def bare_gpt2():
    return gpt2().transformer


def modernbert():
    sizes = SMALL | {"max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
    return tf.ModernBertForMaskedLM(tf.ModernBertConfig(**(sizes | special)))


def t5(kind=tf.T5ForConditionalGeneration):
    return kind(tf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def bart(kind=tf.BartForConditionalGeneration):
    stacks = {f"{stack}_{name}": 2 for stack in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 24}
    return kind(tf.BartConfig(vocab_size=40, **stacks, **sizes))


def bare_bert():
    return tf.BertModel(tf.BertConfig(**SMALL))


# --- any class of a mapping of transformers, at tiny size

_COUNTS = {
    3: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers "
    "num_decoder_layers num_hidden_groups",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads rotary_dim "
    "num_encoder_attention_heads num_decoder_attention_heads qk_rope_head_dim num_local_experts num_experts "
    "n_routed_experts",
    2: "num_key_value_heads num_experts_per_tok index_n_heads mamba_d_conv",
    1: "n_group topk_group n_shared_experts",
    8: "head_dim d_kv d_head qk_nope_head_dim v_head_dim index_head_dim state_size mamba_n_heads mamba_d_head "
    "mamba_d_state hidden_size_per_layer_input",
    16: "q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size",
    32: "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim",
    48: "intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim",
    64: "vocab_size max_position_embeddings n_positions n_ctx",
}
_SIZES = {name: size for size, names in _COUNTS.items() for name in names.split()}
_SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size_per_layer_input": 64}

# What the sizes above do not agree with, by class of configuration.
_OWN_SIZES = {
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "DbrxConfig": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
                   "ffn_config": {"ffn_hidden_size": 48}},
    "FalconH1Config": {"mamba_d_ssm": 64},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_hidden_layers": None},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "LongcatFlashConfig": {"head_dim": 4, "qk_head_dim": 12, "num_layers": 3, "num_hidden_layers": None},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv"]},
    "Mamba2Config": {"num_heads": 8},
    "ProphetNetConfig": {"num_hidden_layers": None},
    "ReformerConfig": {"is_decoder": True, "attn_layers": ["local"] * 3, "axial_pos_shape": [8, 8],
                       "axial_pos_embds_dim": [16, 16]},
    "XLNetConfig": {"max_position_embeddings": None},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"num_hidden_layers": None},
    "Zamba2Config": {"num_hidden_layers": None},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "xLSTMConfig": {"v_head_dim": None},
}  # fmt: skip


def tiny_config(kind, left_out=()):
    """A configuration of this class with the sizes above, in its parts too, but for some."""

    def sizes(config):
        known = {}
        for name, size in _SIZES.items():
            try:
                getattr(config, name)
            except Exception:  # not there, or another one for every layer
                continue
            known[name] = size
        if "qk_rope_head_dim" in known:  # compressed attention
            known |= {"num_key_value_heads": 4} if "num_key_value_heads" in known else {}
            known.pop("head_dim", None)
        known |= _OWN_SIZES.get(type(config).__name__, {})
        return {name: size for name, size in known.items() if name not in left_out and size is not None}

    base = kind()
    parts = {name: getattr(base, name, None) for name in getattr(base, "sub_configs", {})}
    return kind(**{name: sizes(part) for name, part in parts.items() if part is not None} | sizes(base))


def tiny_model(config_kind, model_kind):
    """A model of this class, untrained; raises what its class raises if no choice of sizes suits it."""
    refusals = []
    heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
    for left_out in ((), ("head_dim",), heads, ("num_hidden_layers", "num_layers", "n_layer")):
        try:
            config = tiny_config(config_kind, left_out)
            parts = [config, getattr(config, "text_config", None), getattr(config, "decoder", None)]
        except Exception as error:
            refusals.append(error)
            continue
        for part in parts:
            if part is not None:
                try:
                    with torch.device("meta"):  # first without memory, for some ignore the sizes
                        number = sum(parameter.numel() for parameter in model_kind(part).parameters())
                    if number > 100_000_000:
                        raise ValueError(f"{number:,} parameters at these sizes")
                    return model_kind(part)
                except Exception as error:
                    refusals.append(error)
    raise refusals[0]


def causal_classes():
    """(class of configuration, class of model) of all of MODEL_FOR_CAUSAL_LM_MAPPING, each model once."""
    mapping = tf.MODEL_FOR_CAUSAL_LM_MAPPING
    pairs = [
        (config, kind)
        for config, kinds in mapping.items()
        for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
    ]
    return list({kind: (config, kind) for config, kind in pairs}.values())
