"""A rollout by the plainest means, against which the engine is held.

One episode at a time, and for each token the whole text so far through the stacked model: no cache, no shared prefix,
no automaton, no rows. Turn ends are found by searching the text of words.
"""

import jax
import numpy as np
from tiny_router import MAX_CALLS, MODEL, REPLY_TOKENS, SEED, SHAPES, WORDS, reply_text

from router_r1_jax.model import RouterLM

NEAR = 1e-5  # a draw this close to a boundary of the CDF may go either way: float32 sums differ in their order
LONGEST = 64  # tokens of a whole episode, prompt included


@jax.jit
def _forward(params, tokens, last, seed, episode, position):
    """Logits [V] behind tokens[0, last], and the uniform draw of this episode at this position."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), episode), position)
    return RouterLM(MODEL).apply({"params": params}, tokens)[0, last], jax.random.uniform(key)


class NaiveEpisode:
    """Walks through an episode under test and asks at each sampled token whether it is the one that the draw gives.

    Where the draw lies at a boundary of the CDF the episode's own token is followed. Raises AssertionError at the first
    token that should be another.
    """

    def __init__(
        self, params, episode, *, prefix_length, temperature=1.0, seed=SEED, texts=reply_text, kept=None, limit=99
    ):
        """`kept` maps probabilities [V] to those that truncation keeps; `limit` counts the episode's sampled tokens."""
        self._params, self._episode, self._texts = params, episode, texts
        self._temperature, self._seed, self._kept, self._limit = temperature, seed, kept, limit
        self.sampler_logps = []
        self._context = list(episode.prompt)
        self._prefix_length = prefix_length
        self.tokens, self.sampled, self.logps, self.replies = [], [], [], []
        self.stop = ""
        while not self.stop:
            self._turn()

    @property
    def _row_tokens(self) -> int:
        return len(self._context) - self._prefix_length

    def _turn(self):
        turn = []
        while not self.stop:
            turn.append(self._sample())
            bytes_read = "".join(WORDS[i] for i in turn)  # a tag may come in several tokens
            searched, answered = bytes_read.find("</search>"), bytes_read.find("</answer>")
            if searched >= 0 and (answered < 0 or searched < answered):
                self._call(" ".join(WORDS[i] for i in turn))
                return
            if answered >= 0:
                self.stop = "answer"
            elif WORDS[turn[-1]] == "[END]":
                self.stop = "end_of_text"
            elif sum(self.sampled) == self._limit:
                self.stop = "token_limit"
            elif len(turn) == SHAPES.turn_tokens:
                self.stop = "turn_limit"
            elif self._row_tokens == SHAPES.row_tokens:
                self.stop = "row_full"

    def _call(self, text):
        if len(self.replies) == MAX_CALLS:
            self.stop = "call_limit"
            return
        if sum(self.sampled) == self._limit:
            self.stop = "token_limit"
            return
        before = text[: text.rindex("</search>")] if "</search>" in text else ""
        route = before[before.rindex("<search>") + len("<search>") :] if "<search>" in before else ""
        reply = self._texts(route, self._episode.id, len(self.replies))
        self.replies.append(reply)
        words = ["<information>", *reply.split()[:REPLY_TOKENS], "</information>"]
        if self._row_tokens + len(words) + 2 > SHAPES.row_tokens:
            self.stop = "row_full"
            return
        ids = [WORDS.index(word) if word in WORDS else 0 for word in words]
        self._append(ids, False, [0.0] * len(ids))

    def _sample(self) -> int:
        at = len(self.tokens)
        name = f"episode {self._episode.id}, token {at}"
        assert at < len(self._episode.tokens), f"{name}: the episode ended too early"
        logits, uniform = self._look()
        scaled = logits / (self._temperature or 1.0)
        logps = scaled - scaled.max() - np.log(np.sum(np.exp(scaled - scaled.max())))
        token = self._episode.tokens[at]
        if self._temperature == 0:
            assert token == np.argmax(logits), name
        else:
            kept = np.exp(logps) * (1 if self._kept is None else self._kept(np.exp(logps)))
            self.sampler_logps.append(float(np.log(kept[token] / kept.sum())))
            cdf = np.cumsum(kept) / kept.sum()
            near = np.min(np.abs(cdf - uniform)) < NEAR
            assert token == np.searchsorted(cdf, uniform, side="right") or near, name
        self._append([token], True, [float(logps[token])])
        return token

    def _look(self):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(self._context)] = self._context
        last = len(self._context) - 1
        args = self._params, padded, last, self._seed, np.uint32(self._episode.id), self._row_tokens - 1
        logits, uniform = jax.device_get(_forward(*args))
        return logits.astype(np.float64), float(uniform)

    def _append(self, ids, sampled, logps):
        self._context += ids
        self.tokens += ids
        self.sampled += [sampled] * len(ids)
        self.logps += logps
