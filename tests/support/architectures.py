"""Small models of many architectures of transformers, untrained, in training mode."""

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
