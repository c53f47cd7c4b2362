"""The tokenizer of both models: byte-level BPE as GPT-2 and Qwen2 use it, with next to no merges.

All 256 bytes are tokens, so any text can be written. The words of the prompt, and each square and
answer with the space before it, get a token of their own, which keeps a prompt at 30 tokens.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WORDS = (
    "Tic", "tac", "toe", " to", " move", "Best", " (", "):", "user", "assistant", "system",
    " X", " O", " .", *(f" {digit}" for digit in range(1, 10)),
)  # fmt: skip


def build_tokenizer(special_tokens: list[str]) -> Tokenizer:
    """A tokenizer with the special tokens first (ids 0, 1, ...), then the bytes, then WORDS and their parts."""
    tokens = special_tokens + sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = bpe(tokens, merges).model.tokenize(word.replace(" ", "Ġ"))
        left, *rest = [piece.value for piece in pieces]
        for right in rest:  # join what earlier merges have left apart, from left to right
            merges.append((left, right))
            left += right
            tokens.append(left)
    tokenizer = bpe(tokens, merges)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens])
    for word in WORDS:
        assert len(tokenizer.encode(word).ids) == 1, f"{word!r} is not one token"
    return tokenizer


def bpe(tokens: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """A byte-level BPE tokenizer with these tokens, numbered in this order."""
    assert len(set(tokens)) == len(tokens), "a token is listed twice"
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
