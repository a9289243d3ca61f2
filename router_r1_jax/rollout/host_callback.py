"""Host callback (io_callback) of the sampling loop: reads ended turns, calls models, delivers replies and prompts.

It runs inside a JAX callback, where any JAX call can deadlock, so it uses only NumPy and threads. It always returns the
same shapes. It never raises: an error is kept, the loop is told to stop, and the driver raises the error. It blocks
only if no row can go on by itself, and then for at most `PATIENCE` seconds at a time.
"""

import contextlib
import dataclasses
import functools
import queue
import time
from collections import deque
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from router_r1_jax.protocol import close_tag, information_block, open_tag
from router_r1_jax.rollout.episode import Episode, Prompt, Respond
from router_r1_jax.rollout.row_state import REASONS, FromHost, StaticShapes, ToHost, empty_delivery
from router_r1_jax.rollout.stop_tags import ANSWER, ROUTE
from router_r1_jax.rollout.telemetry import Timeline
from router_r1_jax.rollout.work_queue import WorkQueue

PATIENCE = 0.25
READ_PER_TOKEN = 16  # characters of a reply that are tokenized for each token of its budget; a word has about five


class EpisodeLimits(NamedTuple):
    """Limits of an episode, beside the static shapes."""

    max_calls: int  # per episode; after the last call one more turn follows
    reply_tokens: int  # tokens of a reply that enter the context, without its tags
    episode_seconds: float = float("inf")  # after this time no turn begins and no reply is waited for
    reply_seconds: float = float("inf")  # after this time a reply is lost; the pool's deadline comes first


@dataclasses.dataclass(eq=False)
class _Active:
    """An episode in its row. It waits for at most one call; if that reply is lost, the episode ends."""

    row: int
    episode: Episode
    began: float
    asked: float | None = None  # time of the call that it waits for


_Delivery = tuple[int, int | None, list[int]]  # row, number of the episode if it is new, tokens (none: EMPTY)


def route_text(turn: str) -> str:
    """The inside of the turn's last route tag, "" if the closing tag has no opening one before it."""
    body, closed, _ = turn.rpartition(close_tag("search"))
    _, opened, inside = body.rpartition(open_tag("search"))
    return inside if closed and opened else ""


def reply_ids(tokenizer: PreTrainedTokenizerBase, text: str, budget: int) -> tuple[list[int], bool]:
    """Token ids with which a reply enters the context, with its tags, and whether it was truncated to `budget` tokens.

    The reply is read up to READ_PER_TOKEN characters for each token of its budget: 100,000 characters would take 0.3 s.
    The ids hold no special token. Text that only looks like one ("[INST]") is not neutralised.
    """
    encode = functools.partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
    read = text[: READ_PER_TOKEN * (budget + 1)]
    ids = encode(read)
    truncated = len(ids) > budget or len(read) < len(text)
    if truncated:
        text = tokenizer.decode(ids[:budget]).strip()
    return encode(information_block(text)), truncated


class HostCallback:
    """The host side of one replica: takes a ToHost, returns a FromHost. The module docstring lists its rules."""

    def __init__(
        self,
        shapes: StaticShapes,
        tokenizer: PreTrainedTokenizerBase,
        work_queue: WorkQueue,
        prefix_length: int,
        respond: Respond,
        limits: EpisodeLimits,
    ) -> None:
        """`prefix_length` tokens of every prompt are in the shared prefix; a row reads the rest of its prompt."""
        self._shapes, self._tokenizer, self.work_queue = shapes, tokenizer, work_queue
        self._prefix_length, self._respond, self._limits = prefix_length, respond, limits
        self._free = deque(range(shapes.slots))
        self._to_empty: set[int] = set()  # free rows that still wait in the device's state
        self._active: dict[int, _Active] = {}  # by row
        # The episode that called, the reply or an error, its token ids, and whether they were truncated.
        self._replies: queue.SimpleQueue[tuple[_Active, Any, list[int], bool]] = queue.SimpleQueue()
        self.timeline = Timeline(shapes.slots)

    def __call__(self, *leaves: np.ndarray) -> FromHost:
        """The callback: leaves of a ToHost in, a FromHost out."""
        began, report = time.monotonic(), ToHost(*map(np.asarray, leaves))
        try:
            result = self._handle(report)
        except BaseException as error:  # noqa: BLE001  a callback that raises poisons the device
            self.work_queue.fail(error)
            result = self._result([], stop=True)
        self.timeline.callback_ends(began, report.counts, sum(x.nbytes for x in (*report, *result)))
        return result

    def _handle(self, report: ToHost) -> FromHost:
        for i in np.flatnonzero(report.row < self._shapes.slots):
            self._turn_ended(self._active[int(report.row[i])], i, report)
        self._end_overdue()
        deliveries = self._deliveries([])
        if not deliveries and report.idle and self._active and self.work_queue.error is None:
            started = time.monotonic()
            with contextlib.suppress(queue.Empty):
                deliveries = self._reply_delivery(*self._replies.get(timeout=PATIENCE))
            self.timeline.idle_seconds += time.monotonic() - started
            deliveries = self._deliveries(deliveries)
        finished = not self._active and self.work_queue.empty
        return self._result(deliveries, stop=finished or self.work_queue.error is not None)

    def _turn_ended(self, active: _Active, i: int, report: ToHost) -> None:
        episode, n, reason = active.episode, int(report.turn_length[i]), int(report.reason[i])
        turn = report.turn[i, :n].tolist()
        episode.sample(turn, report.logps[i, :n].tolist(), report.sampler_logps[i, :n].tolist())
        self.timeline.turn_ends(active.row, int(report.turn_began[i]))
        if reason != ROUTE:
            self._finish(active, "answer" if reason == ANSWER else REASONS[reason])
        elif len(episode.replies) >= self._limits.max_calls:
            self._finish(active, "call_limit")
        elif sum(episode.sampled) >= self._shapes.episode_tokens:  # nothing may follow a reply, so none is paid for
            self._finish(active, "token_limit")
        else:
            self.timeline.wait_begins(active.row)
            active.asked = time.monotonic()
            text = self._tokenizer.decode(turn)
            future = self._respond(route_text(text), episode=episode.id, call=len(episode.replies))
            future.add_done_callback(lambda done: self._replied(active, done))

    def _replied(self, active: _Active, done: Future) -> None:
        """Turn a reply into ids. This runs in the pool's thread, so the loop does not wait for the tokenizer."""
        try:
            self.timeline.call_times.append((active.asked, time.monotonic()))
            reply = done.result()
            ids, truncated = reply_ids(self._tokenizer, reply.text, self._limits.reply_tokens)
            self._replies.put((active, reply, ids, truncated))
        except BaseException as error:  # noqa: BLE001  the loop's thread handles it
            self._replies.put((active, error, [], False))

    def _end_overdue(self) -> None:
        """End episodes that wait for a reply and have no time left. A turn in progress may end first."""
        now = time.monotonic()
        for active in [active for active in self._active.values() if active.asked is not None]:
            if now - active.began > self._limits.episode_seconds:
                self._finish(active, "time_limit")
            elif now - active.asked > self._limits.reply_seconds:
                self._finish(active, "no_reply")

    def _finish(self, active: _Active, stop: str) -> None:
        row, episode = active.row, active.episode
        del self._active[row]
        episode.stop, episode.text = stop, self._tokenizer.decode(episode.tokens)
        self.timeline.episode_ends(row, episode)
        self._free.append(row)
        self._to_empty.add(row)
        self.work_queue.finish(episode)

    def _deliveries(self, deliveries: list[_Delivery]) -> list[_Delivery]:
        """Fill up to E deliveries: with replies first, then with prompts, then with rows that become EMPTY."""
        room = self._shapes.callback_rows
        while not self._replies.empty() and len(deliveries) < room:
            deliveries += self._reply_delivery(*self._replies.get())
        while self._free and len(deliveries) < room and (prompt := self.work_queue.take(len(self._active))):
            deliveries.append(self._prompt_delivery(self._free.popleft(), prompt))
        while self._to_empty and len(deliveries) < room:
            deliveries.append((self._to_empty.pop(), None, []))
        return deliveries

    def _reply_delivery(self, active: _Active, reply: Any, ids: list[int], truncated: bool) -> list[_Delivery]:
        """The delivery of a reply; none if it comes too late or has no room in its row. Raises a reply's error."""
        row, episode, shapes = active.row, active.episode, self._shapes
        if self._active.get(row) is not active:
            return []
        if isinstance(reply, BaseException):
            raise reply
        active.asked = None
        episode.replies.append(reply)
        position = len(episode.prompt) - self._prefix_length + len(episode.tokens)
        # The turn's last token was sampled but not read yet, so it comes first. One position is left to sample at.
        tokens = [episode.tokens[-1], *ids]
        if len(tokens) > shapes.prefill_tokens or position + len(ids) + 2 > shapes.row_tokens:
            self._finish(active, "row_full")
            return []
        episode.inject(ids)
        self.timeline.truncated_replies += truncated
        self.timeline.prefill_begins(row)
        return [(row, None, tokens)]

    def _prompt_delivery(self, row: int, prompt: Prompt) -> _Delivery:
        self._to_empty.discard(row)
        self._active[row] = _Active(row, Episode(prompt.episode, prompt.tokens), time.monotonic())
        self.timeline.prefill_begins(row)
        return row, prompt.episode, list(prompt.tokens[self._prefix_length :])

    def _result(self, deliveries: list[_Delivery], *, stop: bool) -> FromHost:
        result = empty_delivery(self._shapes)
        for i, (row, new_episode, ids) in enumerate(deliveries):
            result.row[i], result.length[i], result.tokens[i, : len(ids)] = row, len(ids), ids
            result.fresh[i], result.episode[i] = new_episode is not None, new_episode or 0
        more = not self._replies.empty() or self._to_empty
        more = more or (self._free and self.work_queue.can_take(len(self._active)))
        return result._replace(more=np.bool_(bool(deliveries) and bool(more)), stop=np.bool_(stop))
