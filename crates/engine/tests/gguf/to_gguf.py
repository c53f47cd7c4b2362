"""Converts a small model from Hugging Face layout to GGUF, as llama.cpp's convert_hf_to_gguf.py does.

    python to_gguf.py FOLDER OUT.gguf TYPE        (TYPE: f32, f16, bf16, q8_0, q5_0, q4_0)

Needs gguf, numpy, safetensors (requirements.txt). Families: Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3. Byte-level
tokenizers must split like GPT-2. Norms, biases and matrices whose width does not fit the type's blocks stay float32.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open

LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
GEMMA2 = LAYER | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
NAMES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
FOUR_NORMS = ("gemma2", "gemma3_text")
GEMMAS = ("gemma", *FOUR_NORMS)


def load_file(path):
    """The tensors of a file in float32; numpy has no bfloat16."""
    def values(file, name):
        part = file.get_slice(name)
        if part.get_dtype() != "BF16":
            return file.get_tensor(name).astype(np.float32)
        start, end = header[name]["data_offsets"]
        halves = np.frombuffer(data[start:end], dtype="<u2").astype(np.uint32) << 16
        return halves.view(np.float32).reshape(part.get_shape())

    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    with safe_open(path, "np") as file:
        return {name: values(file, name) for name in file.keys()}


def name_of(name, family):
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{(GEMMA2 if family in FOUR_NORMS else LAYER)[part]}.{kind}"


def stored(name, values, config, family):
    """The values in the order, and with the offset, that a GGUF file has them."""
    part = name.split(".")[-2]
    if family in ("llama", "mistral") and part in ("q_proj", "k_proj"):
        heads = config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
        values = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2)
        values = values.reshape(-1, *values.shape[3:])
    if family in GEMMAS and name.endswith("norm.weight"):
        values = values + 1
    return np.ascontiguousarray(values)


def rope(config, layers="full_attention"):
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parameters = parameters.get(layers, parameters)
    return parameters, parameters.get("rope_theta", config.get("rope_theta", 10000.0))


def llama3_divisors(config):
    parameters, theta = rope(config)
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    context, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    divisors = []
    for wave in 2 * np.pi * theta ** (np.arange(0, width, 2) / width):
        smooth = (context / wave - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1 if wave < context / high else factor if wave > context / low else between)
    return np.array(divisors, dtype=np.float32)


def write_config(writer, config, family):
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    parameters, theta = rope(config)
    writer.add_rope_freq_base(theta)
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    if parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    if family == "gemma3_text":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_sliding_window(config["sliding_window"])


def write_byte_level(writer, folder, config):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    by_id = {id: token for token, id in tokenizer["model"]["vocab"].items()}
    types = dict.fromkeys(by_id, gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        by_id[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    count = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([by_id.get(id, f"[PAD{id}]") for id in range(count)])
    writer.add_token_types([types.get(id, gguf.TokenType.UNUSED) for id in range(count)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    begins = "SpecialToken" in json.dumps((tokenizer.get("post_processor") or {}).get("single", []))
    writer.add_add_bos_token(begins)


def write_sentence_pieces(writer, model, first_space):
    """The pieces of a sentencepiece model, with scores and types."""
    kinds = gguf.TokenType
    types = [
        kinds.CONTROL if model.is_control(id) else kinds.UNKNOWN if model.is_unknown(id)
        else kinds.BYTE if model.is_byte(id) else kinds.NORMAL
        for id in range(model.vocab_size())
    ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([model.id_to_piece(id) for id in range(len(types))])
    writer.add_token_scores([model.get_score(id) for id in range(len(types))])
    writer.add_token_types(types)
    writer.add_unk_token_id(model.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(first_space)


def write_tokens(writer, folder, config):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    template = folder / "chat_template.jinja"
    template = template.read_text() if template.exists() else settings.get("chat_template")
    if template:
        writer.add_chat_template(template)
    ends = config["eos_token_id"]
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    if config.get("bos_token_id") is not None:
        writer.add_bos_token_id(config["bos_token_id"])


def type_of(name, values, wanted):
    if values.ndim < 2:
        return Type.F32
    # As llama.cpp does where a width does not fit the blocks of k-quants.
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    for kind in (wanted, Type.Q8_0, Type.F32):
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        if values.shape[-1] % block == 0:
            return kind
    raise ValueError(name)


def write_tensors(writer, tensors, config, family, wanted):
    """Writes the tensors, and returns the values that they stand for, by their names in transformers."""
    meant = {}
    for name, values in tensors.items():
        values = values.astype(np.float32)
        kind = type_of(name, values, wanted)
        meant[name] = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        data = gguf.quants.quantize(stored(name, values, config, family), kind)
        writer.add_tensor(name_of(name, family), data, raw_dtype=kind)
    return meant


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    folder, out, wanted = Path(sys.argv[1]), sys.argv[2], Type[sys.argv[3].upper()]
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    writer = gguf.GGUFWriter(out, NAMES[family])
    write_config(writer, config, family)
    write_byte_level(writer, folder, config)
    write_tokens(writer, folder, config)
    write_tensors(writer, load_file(folder / "model.safetensors"), config, family, wanted)
    finish(writer)


if __name__ == "__main__":
    main()
