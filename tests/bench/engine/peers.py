"""Measures a peer: python peers.py llama_cpp|transformers PATH THREADS.

Loads the model, prints the package's version, then for each line of input (how many sequences, tokens of each prompt,
tokens decoded after the first that follows a prompt) a line: tokens a second, of prompts where nothing is decoded.
Exits with 3 when the package is missing.
"""

import importlib
import sys
import time

SEQUENCES_MAX, ROWS_MAX, CONTEXT = 16, 512, 4096
name, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
try:
    package = importlib.import_module(name)
except ImportError:
    sys.exit(3)


def ids(number, count):
    return [3 + (number * 7 + index * 11) % 200 for index in range(count)]


def llama():
    import llama_cpp as c

    # Its log would fill a pipe that nobody reads; errors still come as exceptions.
    quiet = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(quiet, None)
    c.llama_backend_init()
    weights = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, ROWS_MAX, ROWS_MAX, SEQUENCES_MAX
    # Without this each sequence has a sixteenth of the room.
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = threads
    context = c.llama_init_from_model(weights, params)
    batch = c.llama_batch_init(ROWS_MAX, 0, 1)

    def decode(rows):
        """Rows of (token, position, sequence, whether its logits are wanted)."""
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
            batch.seq_id[index][0], batch.logits[index] = sequence, wanted
        if c.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        c.llama_synchronize(context)

    def measure(sequences, tokens, decoded):
        _ = quiet
        c.llama_memory_clear(c.llama_get_memory(context), True)
        begun = time.perf_counter()
        for sequence in range(sequences):
            decode([(id, at, sequence, at == tokens - 1) for at, id in enumerate(ids(sequence, tokens))])
        if decoded == 0:
            return time.perf_counter() - begun
        begun = time.perf_counter()
        for step in range(decoded):
            decode([(3 + step, tokens + step, sequence, True) for sequence in range(sequences)])
        return time.perf_counter() - begun

    return measure


def transformers():
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def measure(sequences, tokens, decoded):
        with torch.inference_mode():
            begun = time.perf_counter()
            prompts = torch.tensor([ids(row, tokens) for row in range(sequences)])
            out = model(prompts, use_cache=True, logits_to_keep=1)
            if decoded == 0:
                return time.perf_counter() - begun
            begun = time.perf_counter()
            for _ in range(decoded):
                best = out.logits[:, -1:].argmax(-1)
                out = model(best, past_key_values=out.past_key_values, use_cache=True)
            return time.perf_counter() - begun

    return measure


measure = llama() if name == "llama_cpp" else transformers()
print(package.__version__, flush=True)
for line in sys.stdin:
    sequences, tokens, decoded = map(int, line.split())
    print(sequences * (decoded or tokens) / measure(sequences, tokens, decoded), flush=True)
