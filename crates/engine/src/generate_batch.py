"""Measures transformers' continuous batching (`generate_batch`) on a folder's weights.

Reads a job from standard input, {"folder", "device", "output_tokens", "runs": [[prompt's token ids, ...], ...]}, and prints
one line: {"seconds": [...], "output_tokens": [...]} of each run but the first, which only warms up, or {"missing": why}.
"""

import json
import os
import signal
import sys
import time

# Ends the process.
signal.alarm(1800)
job = json.load(sys.stdin)
try:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig
except ImportError as error:
    print(json.dumps({"missing": str(error)}))
    sys.exit()
transformers.logging.set_verbosity_error()

cuda = torch.cuda.is_available()
device = f"cuda:{job['device']}" if cuda else "cpu"
# Some processors have no bfloat16.
dtype = torch.bfloat16 if cuda else torch.float32
model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype, attn_implementation="sdpa")
model = model.to(device).eval()
if not hasattr(model, "generate_batch"):
    print(json.dumps({"missing": f"transformers {transformers.__version__} has no generate_batch"}))
    sys.exit()
# -1: no token ends a text.
settings = GenerationConfig(max_new_tokens=job["output_tokens"], do_sample=False, eos_token_id=-1, pad_token_id=0)

seconds, tokens = [], []
with torch.no_grad():
    for prompts in job["runs"]:
        begun = time.perf_counter()
        # The manager stays, with its cache and its graphs.
        results = model.generate_batch(prompts, generation_config=settings, persistent_manager=True)
        seconds.append(time.perf_counter() - begun)
        tokens.append(sum(len(result.generated_tokens) for result in results.values()))
found = {"version": transformers.__version__, "torch": torch.__version__, "device": device}
found |= {"attention": model.config._attn_implementation, "seconds": seconds[1:], "output_tokens": tokens[1:]}
print(json.dumps(found), flush=True)
# Threads of the manager would keep the process up.
os._exit(0)
