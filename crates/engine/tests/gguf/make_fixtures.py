"""Makes the GGUF fixtures with the logits that their weights should give.

    python make_fixtures.py REFERENCE_FOLDER

REFERENCE_FOLDER has checkpoints of several families in Hugging Face layout with reference.json, as in ../fixtures/qwen2.
Never run by tests: what it made is committed beside it. The weights are read back as the gguf package dequantises
them, and the logits computed with numpy in float64 below; on the float32 checkpoints that forward pass is held
against the logits of transformers first, so nothing of the engine takes part.
"""

import json
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
from gguf import GGMLQuantizationType as Type

import to_gguf
from to_gguf import FOUR_NORMS, GEMMAS, load_file

HERE = Path(__file__).parent
PROMPTS = ["The scheduler hands each job", "1 + 1 =", "gr\u00fc\u00dfe \u4f60\u597d \U0001f680", " two  spaces\n"]


def logits(weights, config, family, ids):
    """The logits after the last token, in float64."""
    weights = {name: values.astype(np.float64) for name, values in weights.items()}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, width = config["num_key_value_heads"], config.get("head_dim") or hidden // heads
    gemma, four_norms = family in GEMMAS, family in FOUR_NORMS

    def norm(x, name):
        weight = weights[name + ".weight"] + (1 if gemma else 0)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight

    def linear(x, name):
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0)

    def angles(layers):
        parameters, theta = to_gguf.rope(config, layers)
        frequencies = theta ** (-np.arange(0, width, 2) / width)
        if parameters.get("rope_type") == "llama3":
            frequencies = frequencies / to_gguf.llama3_divisors(config).astype(np.float64)
        if parameters.get("rope_type") == "linear":
            frequencies = frequencies / parameters["factor"]
        angles = np.arange(len(ids))[:, None] * frequencies
        return np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rotate(x, cosines, sines):
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)

    x = weights["model.embed_tokens.weight"][ids] * (np.sqrt(hidden) if gemma else 1)
    distance = np.arange(len(ids))[:, None] - np.arange(len(ids))
    for layer in range(config["num_hidden_layers"]):
        part = f"model.layers.{layer}."
        # Of Mistral's window GGUF files say nothing, so all that is read must fit into it.
        windowed = family == "gemma2" and layer % 2 == 0
        if family == "gemma3_text":
            windowed = config["layer_types"][layer] == "sliding_attention"
        window = config["sliding_window"] if windowed else len(ids)
        turn = angles("sliding_attention" if windowed else "full_attention")
        h = norm(x, part + "input_layernorm")
        q = linear(h, part + "self_attn.q_proj").reshape(len(ids), heads, width)
        k = linear(h, part + "self_attn.k_proj").reshape(len(ids), kv_heads, width)
        v = linear(h, part + "self_attn.v_proj").reshape(len(ids), kv_heads, width)
        if family in ("qwen3", "gemma3_text"):
            q, k = norm(q, part + "self_attn.q_norm"), norm(k, part + "self_attn.k_norm")
        q, k = rotate(q, *turn), np.repeat(rotate(k, *turn), heads // kv_heads, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(config.get("query_pre_attn_scalar", width))
        if family == "gemma2":
            scores = np.tanh(scores / config["attn_logit_softcapping"]) * config["attn_logit_softcapping"]
        scores = np.where((distance >= 0) & (distance < window), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), np.repeat(v, heads // kv_heads, 1))
        out = linear(attended.reshape(len(ids), -1), part + "self_attn.o_proj")
        x = x + (norm(out, part + "post_attention_layernorm") if four_norms else out)
        h = norm(x, part + ("pre_feedforward_layernorm" if four_norms else "post_attention_layernorm"))
        gate = linear(h, part + "mlp.gate_proj")
        if gemma:
            gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        out = linear(gate * linear(h, part + "mlp.up_proj"), part + "mlp.down_proj")
        x = x + (norm(out, part + "post_feedforward_layernorm") if four_norms else out)
    head = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    out = norm(x[-1], "model.norm") @ weights[head].T
    cap = config.get("final_logit_softcapping")
    return np.tanh(out / cap) * cap if cap else out


def greedy(weights, config, family, ids, count=8):
    ids, margin = list(ids), np.inf
    start = len(ids)
    for _ in range(count):
        out = logits(weights, config, family, ids)
        second, best = np.sort(out)[-2:]
        margin = min(margin, best - second)
        ids.append(int(out.argmax()))
    return ids[start:], float(margin)


def check_forward(folder):
    """Holds the forward pass against transformers."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    for case in json.loads((folder / "reference.json").read_text())["cases"]:
        if len(case["input_ids"]) > 32 and config["model_type"] == "mistral":
            continue
        ours = logits(weights, config, config["model_type"], case["input_ids"])
        worst = np.abs(ours - case["next_logits"]).max()
        assert worst < 2e-4, (folder, worst)


def encoder(folder, vocabulary, first_space):
    """What encodes, and what writes the tokenizer: the folder's byte-level BPE, or a new sentencepiece model."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if json.loads(tokenizer.to_str())["decoder"]["type"] == "ByteLevel":
        return lambda text: tokenizer.encode(text).ids, None
    text = HERE.parents[3] / "README.md"
    with tempfile.TemporaryDirectory() as out:
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{out}/m", vocab_size=vocabulary, model_type="bpe", byte_fallback=True,
            add_dummy_prefix=first_space, normalization_rule_name="identity", remove_extra_whitespaces=False,
            character_coverage=0.98, minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=f"{out}/m.model")
    return lambda text: [model.bos_id()] + model.encode(text), model


def save(name, folder, config, write, first_space=True):
    family = config["model_type"]
    path = HERE / f"{name}.gguf"
    writer = gguf.GGUFWriter(str(path), to_gguf.NAMES[family])
    to_gguf.write_config(writer, config, family)
    encode, pieces = encoder(folder, config["vocab_size"], first_space)
    if pieces is None:
        to_gguf.write_byte_level(writer, folder, config)
    else:
        to_gguf.write_sentence_pieces(writer, pieces, first_space)
    to_gguf.write_tokens(writer, folder, config)
    weights = write(writer)
    to_gguf.finish(writer)
    cases = []
    for prompt in PROMPTS:
        ids = encode(prompt)
        next_logits = logits(weights, config, family, ids)
        greedy_ids, margin = greedy(weights, config, family, ids)
        assert margin > 0.002, (name, prompt, margin)
        cases.append({
            "prompt": prompt, "input_ids": ids, "next_logits": [round(float(v), 5) for v in next_logits],
            "greedy_ids": greedy_ids, "smallest_margin": round(margin, 5),
        })
    reference = {"class": config["architectures"][0], "cases": cases}
    path.with_suffix(".json").write_text(json.dumps(reference))
    print(name, path.stat().st_size)


def k_quants(config, kinds):
    """Random k-quants, for the gguf package can only read them: blocks of random bytes with small factors."""
    random = np.random.default_rng(7)
    # Where in a block the half-precision factors stand, and a size that gives weights of about 0.05.
    factors = {Type.Q4_K: ((0, 2), 2e-4), Type.Q5_K: ((0, 2), 1e-4), Type.Q6_K: ((208,), 3e-5)}

    def tensor(name, shape):
        kind = next((kind for part, kind in kinds.items() if part in name), kinds[""])
        if len(shape) == 1:
            values = random.normal(1.0 if "norm" in name else 0.0, 0.1, shape).astype(np.float32)
            return values, Type.F32, values
        if shape[-1] % 256:
            data = gguf.quants.quantize(random.normal(0, 0.1, shape).astype(np.float32), Type.Q8_0)
            return data, Type.Q8_0, gguf.quants.dequantize(data, Type.Q8_0)
        size = gguf.GGML_QUANT_SIZES[kind][1]
        blocks = random.integers(0, 256, (shape[0], shape[1] // 256, size), dtype=np.uint8)
        places, scale = factors[kind]
        for place in places:
            half = random.uniform(0.5, 1.5, blocks.shape[:2]).astype(np.float32) * scale
            blocks[..., place : place + 2] = half.astype(np.float16)[..., None].view(np.uint8)
        data = blocks.reshape(shape[0], -1)
        return data, kind, gguf.quants.dequantize(data, kind)

    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        part = f"model.layers.{layer}."
        for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
            shapes[part + f"self_attn.{name}_proj.weight"] = (outputs, hidden)
            shapes[part + f"self_attn.{name}_proj.bias"] = (outputs,)
        shapes[part + "self_attn.o_proj.weight"] = (hidden, queries)
        shapes[part + "mlp.gate_proj.weight"] = shapes[part + "mlp.up_proj.weight"] = (inner, hidden)
        shapes[part + "mlp.down_proj.weight"] = (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[part + name + ".weight"] = (hidden,)

    def write(writer):
        meant = {}
        for name, shape in shapes.items():
            data, kind, meant[name] = tensor(name, shape)
            writer.add_tensor(to_gguf.name_of(name, "qwen2"), data, raw_dtype=kind)
        return meant

    return write


def main():
    reference = Path(sys.argv[1])

    def convert(name, folder, kind, first_space=True, **changed):
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        family = config["model_type"]
        check_forward(folder)
        config |= changed
        save(name, folder, config, lambda w: to_gguf.write_tensors(w, tensors, config, family, kind), first_space)

    qwen2 = HERE.parent / "fixtures/qwen2"
    for kind in ("f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
        convert(f"qwen2-{kind}", qwen2, Type[kind.upper()])
    config = json.loads((qwen2 / "config.json").read_text()) | {
        "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32,
    }
    save("qwen2-q4_k_m", qwen2, config, k_quants(config, {"v_proj": Type.Q6_K, "down": Type.Q6_K, "": Type.Q4_K}))
    save("qwen2-q5_k", qwen2, config, k_quants(config, {"": Type.Q5_K}))
    save("qwen2-q6_k", qwen2, config, k_quants(config, {"": Type.Q6_K}))
    for name in ("llama2", "llama3", "mistral", "qwen3"):
        convert(f"{name}-q8_0", reference / name, Type.Q8_0)
    convert("gemma2-q8_0", reference / "gemma2", Type.Q8_0, first_space=False)
    convert("gemma1-q5_0", HERE.parent / "fixtures/gemma1", Type.Q5_0, first_space=False)
    # Files do not tell what scores are divided by: it is the width of a head.
    gemma3 = HERE.parent / "fixtures/gemma3"
    convert("gemma3-q8_0", gemma3, Type.Q8_0, first_space=False, query_pre_attn_scalar=16)


if __name__ == "__main__":
    main()
