"""Loads the trained folders with transformers, asks greedily for every position and prints what was right.

An answer counts as `genmill experiment run` counts it: the generated text, trimmed, must be one of
the best moves. Nothing is looked at but text, so a model that rambles on or never ends is wrong.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from make_experiment import sampled_positions
from positions import Position, random_baseline, unfinished_positions
from train import MODELS, RECIPES, THREADS

MAX_TOKENS = 4
BATCH = 512


def raw_prompts(positions: list[Position]) -> list[str]:
    """The prompts as they stand."""
    return [position.prompt for position in positions]


def chat_prompts(positions: list[Position], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompts as the only user message of a chat, wrapped by the template of the model."""
    chats = [[{"role": "user", "content": position.prompt}] for position in positions]
    return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """The greedy answers, trimmed. All prompts are equally long, so a batch needs no padding."""
    texts = []
    for start in range(0, len(prompts), BATCH):
        inputs = tokenizer(prompts[start : start + BATCH], return_tensors="pt", add_special_tokens=False)
        ids = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.no_grad()
def smallest_margin(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, positions: list[Position]) -> float:
    """How far, in logits, the closest answer is from turning from right to wrong or back.

    It is the distance between the best moves and everything else, not between two best moves:
    another implementation may prefer another best move and be as right.
    """
    smallest = float("inf")
    digit_ids = [tokenizer.encode(f" {digit}", add_special_tokens=False)[0] for digit in range(1, 10)]
    for start in range(0, len(positions), BATCH):
        chunk = positions[start : start + BATCH]
        inputs = tokenizer(raw_prompts(chunk), return_tensors="pt", add_special_tokens=False)
        for position, logits in zip(chunk, model(inputs.input_ids, logits_to_keep=1).logits[:, -1], strict=True):
            is_best = torch.zeros_like(logits, dtype=torch.bool)
            is_best[[digit_ids[square] for square in position.best]] = True
            margin = (logits[is_best].max() - logits[~is_best].max()).abs().item()
            smallest = min(smallest, margin)
    return smallest


def share(hits: list[bool]) -> str:
    """The share of hits, and the counts it comes from."""
    return f"{sum(hits) / len(hits):7.2%}  ({sum(hits)} of {len(hits)})"


def report(title: str, texts: list[str], positions: list[Position]) -> None:
    """Prints the scores of one set of answers."""
    best = [text in {str(square + 1) for square in p.best} for text, p in zip(texts, positions, strict=True)]
    legal = [text in {str(square + 1) for square in p.legal} for text, p in zip(texts, positions, strict=True)]
    print(f"  {title}")
    print(f"    best move, all positions      {share(best)}")
    print(f"    best move, single best only   {share([b for b, p in zip(best, positions) if p.has_single_best])}")
    print(f"    legal move                    {share(legal)}")


def evaluate(name: str) -> None:
    """Prints everything about one model."""
    folder = MODELS / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    size = (folder / "model.safetensors").stat().st_size
    print(f"{name}: {model.num_parameters():,} parameters, {size:,} bytes")
    everything = unfinished_positions()
    report("raw prompt", answers(model, tokenizer, raw_prompts(everything)), everything)
    if tokenizer.chat_template:
        report("chat", answers(model, tokenizer, chat_prompts(everything, tokenizer)), everything)
    sample = sampled_positions()
    report("the prompts of experiment.yaml", answers(model, tokenizer, raw_prompts(sample)), sample)
    print("  smallest margin between a best move and the rest, in logits")
    print(f"    all positions                 {smallest_margin(model, tokenizer, everything):.5f}")
    print(f"    the prompts of experiment.yaml {smallest_margin(model, tokenizer, sample):.5f}")


def main() -> None:
    """Evaluates the models named on the command line, or both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="qwen2, gpt2 or both (the default)")
    names = parser.parse_args().models or list(RECIPES)
    torch.set_num_threads(THREADS)
    everything = unfinished_positions()
    single = [position for position in everything if position.has_single_best]
    print("random legal player")
    print(f"    best move, all positions      {random_baseline(everything):7.2%}")
    print(f"    best move, single best only   {random_baseline(single):7.2%}")
    print(f"    the prompts of experiment.yaml {random_baseline(sampled_positions()):6.2%}")
    for name in names:
        evaluate(name)


if __name__ == "__main__":
    main()
