"""Writes experiment.yaml: 200 positions for `genmill experiment run`, drawn with a fixed seed.

No two of them are rotations or reflections of each other, so 200 prompts are 200 different problems.
"""

import random
from pathlib import Path

from positions import Position, symmetry_class, unfinished_positions

SEED = 200
COUNT = 200
FILE = Path(__file__).parent / "experiment.yaml"

HEADER = """\
# Two small models, one of them also quantised, play tic-tac-toe: who names a best move more often?
#
# Each prompt is a position; `expect` lists the moves that are best by minimax (they keep the win,
# the draw, or what a lost position has left) and `choices` all legal ones, from which the score of
# a random player follows. Written by make_experiment.py; change it there.
name: tictactoe
models: [vllm_tictactoe-qwen2, llamacpp_tictactoe-qwen2-q8_0, hf_tictactoe-gpt2]
request:
  max_tokens: 4
  temperature: 0
prompts:
"""


def sampled_positions() -> list[Position]:
    """The positions of the experiment, those with the fewest marks first."""
    positions = unfinished_positions()
    random.Random(SEED).shuffle(positions)
    sample: dict[str, Position] = {}
    for position in positions:
        sample.setdefault(symmetry_class(position.board), position)
    chosen = list(sample.values())[:COUNT]
    return sorted(chosen, key=lambda position: (-len(position.legal), position.board))


def entry(number: int, position: Position) -> str:
    """One item of `prompts`. The block style `|-` keeps the lines as they are and adds no newline at the end."""
    block = "\n".join(f"      {line}" for line in position.prompt.split("\n"))
    return (
        f'  - id: "{number:03}"\n'
        f"    prompt: |-\n{block}\n"
        f"    expect: {squares(position.best)}\n"
        f"    choices: {squares(position.legal)}\n"
    )


def squares(moves: tuple[int, ...]) -> str:
    """Moves as a YAML list of quoted squares."""
    return "[" + ", ".join(f'"{square + 1}"' for square in moves) + "]"


def main() -> None:
    """Writes the file beside this script."""
    entries = [entry(number, position) for number, position in enumerate(sampled_positions(), start=1)]
    FILE.write_text(HEADER + "".join(entries))
    print(f"{FILE.name}: {len(entries)} prompts")


if __name__ == "__main__":
    main()
