"""The host side of the callback: reads ended turns, makes calls, hands out replies and new questions.

It runs inside a JAX callback, where any JAX call can deadlock: NumPy and threads only. It never raises (an error is
kept, the loop is told to stop, and the driver raises it), always returns the same shapes, and blocks only when no row
can go on by itself, and then for at most `PATIENCE` seconds at a time.
"""

import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
from transformers import PreTrainedTokenizerBase

from router_r1_jax.protocol import close_tag, information_block, open_tag
from router_r1_jax.rollout.episode import Episode, Prompt, Respond
from router_r1_jax.rollout.state import END_OF_TEXT, ROW_FULL, TURN_LIMIT, Inbox, Limits, Outbox, inbox_spec

PATIENCE = 0.25

STOP_TAGS = (close_tag("search"), close_tag("answer"))
ROUTE, ANSWER = 1, 2  # accepting states of the automaton over STOP_TAGS
_STOPS = {ANSWER: "answer", TURN_LIMIT: "turn_limit", ROW_FULL: "row_full", END_OF_TEXT: "end_of_text"}


def route_text(turn: str) -> str:
    """The inside of the turn's last route tag, "" if the closing tag has no opening one before it."""
    body, closed, _ = turn.rpartition(close_tag("search"))
    _, opened, inside = body.rpartition(open_tag("search"))
    return inside if closed and opened else ""


def reply_ids(tokenizer: PreTrainedTokenizerBase, text: str, budget: int) -> list[int]:
    """Token ids with which a reply enters the context; the reply is cut to `budget` tokens, its tags never are."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) > budget:
        text = tokenizer.decode(ids[:budget]).strip()
    return tokenizer.encode(information_block(text), add_special_tokens=False)


class Exchange:
    """One rollout's host side: call it with an Outbox, get an Inbox. See the module docstring for its manners."""

    def __init__(
        self,
        limits: Limits,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[Prompt],
        prefix_length: int,
        respond: Respond,
        *,
        max_calls: int,
        reply_tokens: int,
        on_finish: Callable[[Episode], None] | None = None,
    ) -> None:
        """`prefix_length` tokens of every prompt are in the shared prefix; the rest is fed to the episode's row."""
        self._limits = limits
        self._tokenizer = tokenizer
        self._prefix_length = prefix_length
        self._respond = respond
        self._max_calls = max_calls
        self._reply_tokens = reply_tokens
        self._on_finish = on_finish
        self._pending = deque(prompts)
        self._free = deque(range(limits.slots))
        self._release: set[int] = set()  # free rows that the device still takes for waiting
        self._at: dict[int, Episode] = {}  # row -> its episode
        self._ready: queue.SimpleQueue = queue.SimpleQueue()  # (row, reply | exception, ids)
        self._held: deque = deque()  # taken from _ready, not delivered yet
        self.finished: list[Episode] = []
        self.error: BaseException | None = None
        self.stopping = False
        self.exchanges = 0
        self.idle_seconds = 0.0

    def __call__(self, *leaves: np.ndarray) -> Inbox:
        """The callback: leaves of an Outbox in, an Inbox out."""
        try:
            self.exchanges += 1
            return self._exchange(Outbox(*[np.asarray(x) for x in leaves]))
        except BaseException as error:  # noqa: BLE001  a callback that raises poisons the device
            self.error = self.error or error
            return self._inbox([], stop=True)

    def _exchange(self, out: Outbox) -> Inbox:
        for i, row in enumerate(out.row):
            if row < self._limits.slots:
                n = int(out.length[i])
                self._turn_ended(int(row), int(out.reason[i]), out.turn[i, :n].tolist(), out.logps[i, :n].tolist())
        entries = self._entries()
        if not entries and out.idle and self._at and not self.stopping:
            started = time.monotonic()
            self._wait()
            self.idle_seconds += time.monotonic() - started
            entries = self._entries()
        if self.error is not None or self.stopping:
            return self._inbox([], stop=True)
        return self._inbox(entries, stop=not self._at and not self._pending)

    def _wait(self) -> None:
        try:
            self._held.append(self._ready.get(timeout=PATIENCE))
        except queue.Empty:
            pass

    def _turn_ended(self, row: int, reason: int, turn: list[int], logps: list[float]) -> None:
        episode = self._at[row]
        episode.extend(turn, logps)
        if reason != ROUTE:
            self._finish(row, _STOPS[reason])
        elif len(episode.replies) >= self._max_calls:
            self._finish(row, "call_limit")
        else:
            text = self._tokenizer.decode(turn)
            future = self._respond(route_text(text), episode=episode.id, call=len(episode.replies))
            future.add_done_callback(lambda done, row=row: self._replied(row, done))

    def _replied(self, row: int, done: Future) -> None:
        """In the pool's thread: turn the reply into ids there, so that the loop does not wait for the tokenizer."""
        try:
            reply = done.result()
            self._ready.put((row, reply, reply_ids(self._tokenizer, reply.text, self._reply_tokens)))
        except BaseException as error:  # noqa: BLE001  handed to the loop's own thread
            self._ready.put((row, error, []))

    def _finish(self, row: int, stop: str) -> None:
        episode = self._at.pop(row)
        episode.stop = stop
        episode.text = self._tokenizer.decode(episode.tokens)
        self.finished.append(episode)
        self._free.append(row)
        self._release.add(row)
        if self._on_finish is not None:
            self._on_finish(episode)

    def _entries(self) -> list[tuple[int, bool, int, list[int]]]:
        """Up to E deliveries (row, fresh, episode, ids): replies first, then questions, then rows to be emptied."""
        room, entries = self._limits.exchange_rows, []
        while not self._ready.empty():
            self._held.append(self._ready.get())
        while self._held and len(entries) < room:
            row, reply, ids = self._held.popleft()
            if isinstance(reply, BaseException):
                self.error = self.error or reply
                continue
            entry = self._reply_entry(row, reply, ids)
            if entry is not None:
                entries.append(entry)
        while self._pending and self._free and len(entries) < room:
            entries.append(self._question_entry(self._free.popleft(), self._pending.popleft()))
        if not self._pending:
            while self._release and len(entries) < room:
                entries.append((self._release.pop(), False, 0, []))
        return entries

    def _reply_entry(self, row: int, reply: object, ids: list[int]) -> tuple[int, bool, int, list[int]] | None:
        episode = self._at[row]
        episode.replies.append(reply)
        own = len(episode.prompt) - self._prefix_length + len(episode.tokens)
        # The turn's last token was sampled but not read yet: it leads the feed. One position is left to sample at.
        feed = [episode.tokens[-1], *ids]
        if len(feed) > self._limits.feed_tokens or own + len(ids) + 2 > self._limits.row_tokens:
            self._finish(row, "row_full")
            return None
        episode.extend(ids, None)
        return row, False, 0, feed

    def _question_entry(self, row: int, prompt: Prompt) -> tuple[int, bool, int, list[int]]:
        self._release.discard(row)
        self._at[row] = Episode(prompt.episode, prompt.tokens)
        return row, True, prompt.episode, list(prompt.tokens[self._prefix_length :])

    def _inbox(self, entries: list[tuple[int, bool, int, list[int]]], *, stop: bool) -> Inbox:
        box = Inbox(*[np.zeros(x.shape, x.dtype) for x in inbox_spec(self._limits)])
        box.row[:] = self._limits.slots
        for i, (row, fresh, episode, ids) in enumerate(entries):
            box.row[i], box.fresh[i], box.episode[i], box.length[i] = row, fresh, episode, len(ids)
            box.feed[i, : len(ids)] = ids
        unsent = self._held or not self._ready.empty() or self._release or (self._pending and self._free)
        return box._replace(more=np.bool_(bool(entries) and bool(unsent)), stop=np.bool_(stop))
