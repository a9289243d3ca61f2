"""Stop-tag automaton: a turn ends at the token that completes a closing tag, also if the tag ends inside the token.

An Aho-Corasick automaton over UTF-8 bytes (one state per prefix of a tag) is lifted to the vocabulary: the table says
where reading all bytes of a token leads. If a tag ends inside a token, the rest of the token still belongs to the turn.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from router_r1_jax.protocol import close_tag

STOP_TAGS = (close_tag("search"), close_tag("answer"))
ROUTE, ANSWER = 1, 2  # accepting states of the automaton over STOP_TAGS


def build_automaton(tags: Sequence[str], tokens: Sequence[bytes]) -> np.ndarray:
    """Build the table of next states [states, V] uint8, which the device reads with one gather per sampled token.

    State 0 is the start. State i (1 <= i <= len(tags)) means that tags[i - 1] has just been completed. Such a state
    does not change within a token, and counts as state 0 for the next one.

    Args:
      tags: the stop tags, none of which lies inside another.
      tokens: the bytes of each token of the vocabulary, b"" for special tokens.
    """
    table = _byte_table([tag.encode() for tag in tags])
    longest = max((len(t) for t in tokens), default=0)
    padded = np.zeros((len(tokens), longest), np.uint8)
    lengths = np.array([len(t) for t in tokens])
    for i, token in enumerate(tokens):
        padded[i, : len(token)] = np.frombuffer(token, np.uint8)
    state = np.repeat(np.arange(len(table), dtype=np.uint8)[:, None], len(tokens), axis=1)
    state[1 : len(tags) + 1] = 0  # the token before completed a tag: this one starts anew
    for j in range(longest):
        state = np.where(j < lengths, table[state, padded[:, j]], state)
    return state


def _byte_table(tags: Sequence[bytes]) -> np.ndarray:
    """[states, 256] Aho-Corasick table over bytes; states 1 .. len(tags) are the accepting ones."""
    prefixes = sorted({tag[:i] for tag in tags for i in range(1, len(tag))})
    names = [b"", *tags, *prefixes]
    number = {name: i for i, name in enumerate(names)}
    table = np.zeros((len(names), 256), np.uint8)
    for state, name in enumerate(names):
        if name in tags:
            table[state] = state  # it stays, so that a tag completed inside a token is seen at the token's end
            continue
        for byte in range(256):
            seen = name + bytes([byte])
            # The longest suffix of the bytes read so far that is still the beginning of a tag.
            table[state, byte] = next(number[seen[i:]] for i in range(len(seen) + 1) if seen[i:] in number)
    return table


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes]:
    """The UTF-8 bytes that each token id adds to a text; b"" for special and unused ids.

    Byte-level BPE vocabularies (Qwen, Llama 3) spell each byte as one printable character. Printable Latin-1 bytes
    stand for themselves, and the others take the code points from 256 on, in order. Other tokens, such as added ones,
    are taken as text.
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    unspell = {chr(byte): byte for byte in itself} | {chr(256 + i): byte for i, byte in enumerate(others)}
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
