"""Trains one of the two models and writes its folder: `python train.py qwen2` or `python train.py gpt2`.

Both learn from all 4,520 unfinished positions. There is no test set, on purpose: the game is small
enough to be learned by heart, and the demo asks how well a model knows it, not how well it guesses.
"""

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from positions import Position, unfinished_positions
from vocabulary import build_tokenizer

MODELS = Path(__file__).parent / "models"
SEED = 20240607
THREADS = 2  # part of the recipe: another number adds floats in another order
BATCH = 256

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Form:
    """A way to ask: what stands before and after the prompt, and before the digit of the answer."""

    before: str
    after: str
    answer_prefix: str


RAW = Form(before="", after="", answer_prefix=" ")
CHAT = Form(before="<|im_start|>user\n", after="<|im_end|>\n<|im_start|>assistant\n", answer_prefix="")


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. Batches take the forms in turn."""

    special_tokens: list[str]
    end_token: str
    forms: tuple[Form, ...]
    steps: int
    peak_rate: float
    evaluate_every: int
    stop_at: float  # the share of best moves at which training ends early; above 1 means never


RECIPES = {
    "qwen2": Recipe(
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        end_token="<|im_end|>",
        forms=(RAW, RAW, CHAT),
        steps=4000,
        peak_rate=3e-3,
        evaluate_every=200,
        stop_at=2.0,
    ),
    "gpt2": Recipe(
        special_tokens=["<|endoftext|>"],
        end_token="<|endoftext|>",
        forms=(RAW,),
        steps=4000,
        peak_rate=1e-3,
        evaluate_every=10,
        stop_at=0.77,
    ),
}


def build_model(name: str, vocab_size: int, end_id: int) -> PreTrainedModel:
    """The untrained model."""
    if name == "qwen2":
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=vocab_size,
                hidden_size=128,
                intermediate_size=192,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                initializer_range=0.05,
                bos_token_id=None,
                eos_token_id=end_id,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_embd=64,
            n_layer=4,
            n_head=4,
            n_positions=256,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            initializer_range=0.05,
            bos_token_id=end_id,
            eos_token_id=end_id,
        )
    )


class Lessons:
    """All positions as token ids, in one form. Every row has the same length, so nothing is padded."""

    def __init__(self, tokenizer, positions: list[Position], form: Form):
        texts = [form.before + p.prompt + form.after for p in positions]
        self.prompts = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
        answers = [tokenizer.encode(f"{form.answer_prefix}{digit}").ids for digit in range(1, 10)]
        assert all(len(ids) == 1 for ids in answers)
        self.answers = torch.tensor(answers).squeeze(1)
        self.best = torch.zeros(len(positions), 9, dtype=torch.bool)
        for row, position in enumerate(positions):
            self.best[row, list(position.best)] = True

    def loss(self, model: PreTrainedModel, rows: torch.Tensor, end_id: int) -> torch.Tensor:
        """The cost of naming anything but a best move, plus that of not ending after it.

        Where several moves are best, the model may spread its belief over them as it likes: what
        counts is their sum. The digit it is shown before the end token is a random best one.
        """
        best = self.best[rows]
        shown = self.answers[torch.multinomial(best.float(), 1)]
        logits = last_logits(model, torch.cat([self.prompts[rows], shown], dim=1), 2)
        log_probs = logits.log_softmax(dim=-1)
        named = log_probs[:, 0, self.answers].masked_fill(~best, -math.inf).logsumexp(dim=-1)
        ended = log_probs[:, 1, end_id]
        return -(named + ended).mean()

    @torch.no_grad()
    def accuracy(self, model: PreTrainedModel) -> float:
        """The share of positions in which the most likely next token is a best move."""
        named = torch.cat([last_logits(model, chunk, 1)[:, 0].argmax(dim=-1) for chunk in self.prompts.split(512)])
        hits = (named[:, None] == self.answers) & self.best
        return hits.any(dim=1).float().mean().item()


def last_logits(model: PreTrainedModel, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The logits after the last `count` tokens; the earlier ones are never computed."""
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, -count:])


def rate_at(step: int, recipe: Recipe) -> float:
    """A short warm-up, then half a cosine down to nothing."""
    warm_up = 100
    if step < warm_up:
        return recipe.peak_rate * (step + 1) / warm_up
    return recipe.peak_rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (recipe.steps - warm_up)))


def train(model: PreTrainedModel, recipe: Recipe, lessons: list[Lessons], end_id: int) -> None:
    """Runs the recipe; `lessons` has one entry for each of its forms."""
    order = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    rows: list[int] = []
    started = time.monotonic()
    for step in range(recipe.steps):
        if len(rows) < BATCH:  # the few that are left over wait for a later round
            rows = order.sample(range(len(lessons[0].prompts)), len(lessons[0].prompts))
        batch, rows = torch.tensor(rows[:BATCH]), rows[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, recipe)
        loss = lessons[step % len(lessons)].loss(model, batch, end_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % recipe.evaluate_every == 0:
            accuracy = lessons[0].accuracy(model)
            seconds = time.monotonic() - started
            print(f"step {step + 1:5}  loss {loss.item():.4f}  best moves {accuracy:.2%}  {seconds:.0f} s", flush=True)
            if accuracy >= recipe.stop_at:
                return


def save(name: str, model: PreTrainedModel, tokenizer, recipe: Recipe) -> None:
    """Writes the folder in the layout of Hugging Face, in the spelling of transformers 4."""
    folder = MODELS / name
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner only
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    if rope := config.pop("rope_parameters", None):
        config["rope_theta"], config["rope_scaling"] = rope["rope_theta"], None
    write_json(folder / "config.json", config)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        "eos_token": recipe.end_token,
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    if CHAT in recipe.forms:
        settings["chat_template"] = CHAT_TEMPLATE
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, value: dict) -> None:
    """Readable JSON with a newline at its end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Builds, trains and saves the model named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=RECIPES)
    name = parser.parse_args().model
    recipe = RECIPES[name]

    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    tokenizer = build_tokenizer(recipe.special_tokens)
    end_id = tokenizer.token_to_id(recipe.end_token)
    model = build_model(name, tokenizer.get_vocab_size(), end_id)
    print(f"{name}: {model.num_parameters():,} parameters")
    positions = unfinished_positions()
    by_form = {form: Lessons(tokenizer, positions, form) for form in recipe.forms}
    train(model, recipe, [by_form[form] for form in recipe.forms], end_id)
    for form, lessons in by_form.items():
        print(f"{'chat' if form is CHAT else 'raw'} form: {lessons.accuracy(model):.2%} best moves")
    save(name, model, tokenizer, recipe)


if __name__ == "__main__":
    main()
