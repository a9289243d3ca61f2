"""Stop tags, seen at the very token that completes one, whatever the tokenisation.

A matcher over UTF-8 bytes (one state per prefix of a tag) is lifted to the vocabulary: `next_state[s, v]` is where
reading all bytes of token v leads from state s. A tag that ends inside a token counts from that token on: the rest of
the token belongs to the turn, as it was sampled.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class TagAutomaton:
    """A table for the device: one gather per sampled token.

    Attributes:
      next_state: [states, V] uint8. State 0 is the start; state i (1 <= i <= len(tags)) means that tags[i - 1] has just
        been completed; such states are absorbing within a token and count as state 0 for the next one.
      tags: the tags, in order.
    """

    next_state: np.ndarray
    tags: tuple[str, ...]


def _byte_table(tags: Sequence[bytes]) -> np.ndarray:
    """[states, 256] Aho-Corasick table over bytes; states 1 .. len(tags) are the accepting ones."""
    prefixes = sorted({tag[:i] for tag in tags for i in range(1, len(tag))})
    names = [b"", *tags, *prefixes]
    number = {name: i for i, name in enumerate(names)}
    if len(names) > 255:
        raise ValueError(f"the stop tags need {len(names)} states; a byte holds 255")
    table = np.zeros((len(names), 256), np.uint8)
    for state, name in enumerate(names):
        if name in tags:
            table[state] = state  # absorbing, so that a tag completed inside a token is seen at the token's end
            continue
        for byte in range(256):
            seen = name + bytes([byte])
            # The longest suffix of what was read that is still the beginning of a tag.
            table[state, byte] = next(number[seen[i:]] for i in range(len(seen) + 1) if seen[i:] in number)
    return table


def build_automaton(tags: Sequence[str], tokens: Sequence[bytes]) -> TagAutomaton:
    """Lift the tags' matcher to a vocabulary given as the bytes of each token (b"" for special tokens)."""
    encoded = [tag.encode() for tag in tags]
    for tag in encoded:
        if any(tag != other and tag in other for other in encoded):
            raise ValueError(f"stop tag {tag.decode()!r} lies inside another one; tags must not contain each other")
    table = _byte_table(encoded)
    longest = max((len(t) for t in tokens), default=0)
    padded = np.zeros((len(tokens), longest), np.uint8)
    lengths = np.array([len(t) for t in tokens])
    for i, token in enumerate(tokens):
        padded[i, : len(token)] = np.frombuffer(token, np.uint8)
    state = np.repeat(np.arange(len(table), dtype=np.uint8)[:, None], len(tokens), axis=1)
    state[1 : len(tags) + 1] = 0  # a completed tag is behind us when the next token starts
    for j in range(longest):
        state = np.where(j < lengths, table[state, padded[:, j]], state)
    return TagAutomaton(state, tuple(tags))


def _byte_spelling() -> dict[str, int]:
    """The printable character with which byte-level BPE spells each byte, as a map back to the byte.

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes]:
    """The UTF-8 bytes that each token id adds to a text; b"" for special and unused ids.

    Byte-level BPE vocabularies (Qwen, Llama 3, ours) spell each byte as one printable character; anything else, such
    as added tokens, is taken as text.
    """
    unspell = _byte_spelling()
    special = set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    pieces = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))):
        if token is None or i in special:
            pieces.append(b"")
        elif i not in added and all(char in unspell for char in token):
            pieces.append(bytes(unspell[char] for char in token))
        else:
            pieces.append(token.encode())
    return pieces + [b""] * (vocab_size - len(pieces))
