"""The game: every tic-tac-toe position, its best moves by minimax, and how it is written as a prompt.

A board is a string of nine characters, `X`, `O` or `.`, read left to right and top to bottom.
A move is the index of a square, 0 to 8; in prompts and answers squares are numbered 1 to 9.
Only the standard library is used here, so the other scripts can import it at no cost.
"""

from dataclasses import dataclass
from functools import cache

EMPTY_BOARD = "." * 9

LINES = (
    (0, 1, 2), (3, 4, 5), (6, 7, 8),  # rows
    (0, 3, 6), (1, 4, 7), (2, 5, 8),  # columns
    (0, 4, 8), (2, 4, 6),  # diagonals
)


@dataclass(frozen=True)
class Position:
    """An unfinished position with everything the other scripts ask about it."""

    board: str
    legal: tuple[int, ...]
    best: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The raw prompt that asks for a best move."""
        return prompt_of(self.board)

    @property
    def has_single_best(self) -> bool:
        """Whether exactly one move keeps the value of the position."""
        return len(self.best) == 1


def side_to_move(board: str) -> str:
    """X starts, so X is to move whenever both sides have placed equally many marks."""
    return "X" if board.count("X") == board.count("O") else "O"


def winner(board: str) -> str | None:
    """The side that has three in a line, if one has."""
    for a, b, c in LINES:
        if board[a] != "." and board[a] == board[b] == board[c]:
            return board[a]
    return None


def is_finished(board: str) -> bool:
    """Whether the game is over: won, or the board is full."""
    return winner(board) is not None or "." not in board


def legal_moves(board: str) -> tuple[int, ...]:
    """The empty squares."""
    return tuple(square for square in range(9) if board[square] == ".")


def play(board: str, square: int) -> str:
    """The board after the side to move has marked `square`."""
    return board[:square] + side_to_move(board) + board[square + 1 :]


@cache
def value(board: str) -> int:
    """The result under best play for the side to move: 1 win, 0 draw, -1 loss."""
    if winner(board) is not None:
        return -1  # the other side has just completed a line
    if "." not in board:
        return 0
    return max(-value(play(board, square)) for square in legal_moves(board))


def best_moves(board: str) -> tuple[int, ...]:
    """The moves that keep the value of the position; a slower win is as good as a fast one."""
    return tuple(square for square in legal_moves(board) if -value(play(board, square)) == value(board))


def reachable_boards() -> list[str]:
    """All boards that legal play can reach, finished ones included, in the order of the moves played."""
    boards, frontier = [], [EMPTY_BOARD]
    while frontier:
        boards += frontier
        children = {play(b, square) for b in frontier if not is_finished(b) for square in legal_moves(b)}
        frontier = sorted(children)
    return boards


def unfinished_positions() -> list[Position]:
    """Every reachable position in which somebody is to move, always in the same order."""
    return [Position(b, legal_moves(b), best_moves(b)) for b in reachable_boards() if not is_finished(b)]


def prompt_of(board: str) -> str:
    """The board as a prompt. Every board gives the same number of tokens."""
    rows = "\n".join(" ".join(board[start : start + 3]) for start in (0, 3, 6))
    return f"Tic-tac-toe. {side_to_move(board)} to move.\n{rows}\nBest move (1-9):"


def symmetry_class(board: str) -> str:
    """One name for the up to eight boards that are rotations or reflections of each other."""
    variants = []
    for _ in range(4):
        board = "".join(board[square] for square in (6, 3, 0, 7, 4, 1, 8, 5, 2))  # a quarter turn
        variants += [board, board[2::-1] + board[5:2:-1] + board[:5:-1]]  # and its mirror image
    return min(variants)


def random_baseline(positions: list[Position]) -> float:
    """How often a player who picks any legal move at random names a best one."""
    return sum(len(p.best) / len(p.legal) for p in positions) / len(positions)


def main() -> None:
    """Prints the known counts of the game and one prompt."""
    positions = unfinished_positions()
    print(f"reachable positions     {len(reachable_boards())}")
    print(f"unfinished              {len(positions)}")
    print(f"with a single best move {sum(p.has_single_best for p in positions)}")
    print(f"random legal player     {random_baseline(positions):.1%}")
    print(f"\n{positions[2000].prompt}")


if __name__ == "__main__":
    main()
