"""The host side of the callback: reads ended turns, makes calls, hands out replies and new questions.

It runs inside a JAX callback, where any JAX call can deadlock: NumPy and threads only. It never raises (an error is
kept, the loop is told to stop, and the driver raises it), always returns the same shapes, and blocks only when no row
can go on by itself, and then for at most `PATIENCE` seconds at a time.
"""

import queue
import time
from collections import deque
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from router_r1_jax.protocol import close_tag, information_block, open_tag
from router_r1_jax.rollout.agenda import Agenda
from router_r1_jax.rollout.episode import Episode, Prompt, Respond
from router_r1_jax.rollout.state import (
    END_OF_TEXT,
    ROW_FULL,
    TOKEN_LIMIT,
    TURN_LIMIT,
    Inbox,
    Limits,
    Outbox,
    inbox_spec,
)
from router_r1_jax.rollout.trace import Trace

PATIENCE = 0.25
READ_PER_TOKEN = 16  # characters of a reply that are read at first for each token of its budget

STOP_TAGS = (close_tag("search"), close_tag("answer"))
ROUTE, ANSWER = 1, 2  # accepting states of the automaton over STOP_TAGS
_STOPS = {
    ANSWER: "answer", TURN_LIMIT: "turn_limit", TOKEN_LIMIT: "token_limit", ROW_FULL: "row_full",
    END_OF_TEXT: "end_of_text",
}  # fmt: skip


class Manners(NamedTuple):
    """What a rollout allows beside the sizes it was compiled for."""

    max_calls: int  # per episode; then one last turn
    reply_tokens: int  # of a reply that enter the context, tags not counted
    episode_seconds: float = float("inf")  # then no further turn begins and no reply is waited for
    reply_seconds: float = float("inf")  # then a reply is lost: the pool's own deadline comes first


class _Entry(NamedTuple):
    """A delivery to a row; `ids` empty: the row becomes EMPTY."""

    row: int
    fresh: bool
    episode: int
    ids: list[int]


class _Call(NamedTuple):
    """What a row waits for. Each call is another object, so that a reply that comes late finds its row gone on."""

    row: int
    asked: float


class _Answer(NamedTuple):
    """What came of a call: a reply and its ids, or an error."""

    call: _Call
    reply: object
    ids: list[int]
    cut: bool


def route_text(turn: str) -> str:
    """The inside of the turn's last route tag, "" if the closing tag has no opening one before it."""
    body, closed, _ = turn.rpartition(close_tag("search"))
    _, opened, inside = body.rpartition(open_tag("search"))
    return inside if closed and opened else ""


def reply_ids(tokenizer: PreTrainedTokenizerBase, text: str, budget: int) -> tuple[list[int], bool]:
    """Token ids with which a reply enters the context, its tags whole; and whether it was cut, to `budget` tokens.

    No special token is among them, however a tokenizer spells its own ("[INST]" is not neutralised).
    """
    ids = _first_ids(tokenizer, text, budget)
    cut = len(ids) > budget
    if cut:
        text = tokenizer.decode(ids[:budget]).strip()
    return _plain_ids(tokenizer, information_block(text)), cut


def _first_ids(tokenizer: PreTrainedTokenizerBase, text: str, budget: int) -> list[int]:
    """Ids of the text, more than `budget` of them where it has as many; of a megabyte only a beginning is read."""
    read = READ_PER_TOKEN * (budget + 1)
    while True:
        ids = _plain_ids(tokenizer, text[:read])
        if read >= len(text) or len(ids) > budget + 1:  # the last token may end where the text was cut
            return ids
        read *= 4


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


class Exchange:
    """One replica's host side: call it with an Outbox, get an Inbox. See the module docstring for its manners."""

    def __init__(
        self,
        limits: Limits,
        tokenizer: PreTrainedTokenizerBase,
        agenda: Agenda,
        prefix_length: int,
        respond: Respond,
        manners: Manners,
    ) -> None:
        """`prefix_length` tokens of every prompt are in the shared prefix; the rest is fed to the episode's row."""
        self._limits = limits
        self._tokenizer = tokenizer
        self.agenda = agenda
        self._prefix_length = prefix_length
        self._respond = respond
        self._manners = manners
        self._free = deque(range(limits.slots))
        self._release: set[int] = set()  # free rows that the device still takes for waiting
        self._at: dict[int, Episode] = {}  # row -> its episode
        self._began: dict[int, float] = {}  # row -> when its episode began
        self._calls: dict[int, _Call] = {}  # row -> the call that it waits for
        self._ready: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._held: deque[_Answer] = deque()  # taken from _ready, not delivered yet
        self.trace = Trace(limits.slots)

    def __call__(self, *leaves: np.ndarray) -> Inbox:
        """The callback: leaves of an Outbox in, an Inbox out."""
        came, out = time.monotonic(), Outbox(*map(np.asarray, leaves))
        try:
            inbox = self._exchange(out)
        except BaseException as error:  # noqa: BLE001  a callback that raises poisons the device
            self.agenda.fail(error)
            inbox = self._inbox([], stop=True)
        self.trace.met(came, out.counts, sum(x.nbytes for x in (*out, *inbox)))
        return inbox

    def _exchange(self, out: Outbox) -> Inbox:
        for i, row in enumerate(out.row):
            if row < self._limits.slots:
                self._turn_ended(int(row), i, out)
        self._end_what_is_late()
        entries = self._entries()
        if not entries and out.idle and self._at and not self.agenda.over:
            started = time.monotonic()
            self._wait()
            self.trace.idle_seconds += time.monotonic() - started
            entries = self._entries()
        if self.agenda.over:
            return self._inbox([], stop=True)
        return self._inbox(entries, stop=not self._at and self.agenda.empty)

    def _wait(self) -> None:
        try:
            self._held.append(self._ready.get(timeout=PATIENCE))
        except queue.Empty:
            pass

    def _turn_ended(self, row: int, i: int, out: Outbox) -> None:
        episode, n, reason = self._at[row], int(out.length[i]), int(out.reason[i])
        turn = out.turn[i, :n].tolist()
        episode.sample(turn, out.logps[i, :n].tolist(), out.drawn_logps[i, :n].tolist())
        self.trace.turn_ended(row, int(out.began[i]))
        if reason != ROUTE:
            self._finish(row, _STOPS[reason])
        elif len(episode.replies) >= self._manners.max_calls:
            self._finish(row, "call_limit")
        elif sum(episode.sampled) >= self._limits.episode_tokens:  # a reply that nothing may follow is not paid for
            self._finish(row, "token_limit")
        else:
            self.trace.waits(row)
            call = self._calls[row] = _Call(row, time.monotonic())
            text = self._tokenizer.decode(turn)
            future = self._respond(route_text(text), episode=episode.id, call=len(episode.replies))
            future.add_done_callback(lambda done: self._replied(call, done))

    def _replied(self, call: _Call, done: Future) -> None:
        """In the pool's thread: turn the reply into ids there, so that the loop does not wait for the tokenizer."""
        try:
            self.trace.calls.append((call.asked, time.monotonic()))
            reply = done.result()
            ids, cut = reply_ids(self._tokenizer, reply.text, self._manners.reply_tokens)
            self._ready.put(_Answer(call, reply, ids, cut))
        except BaseException as error:  # noqa: BLE001  handed to the loop's own thread
            self._ready.put(_Answer(call, error, [], False))

    def _end_what_is_late(self) -> None:
        """End episodes that wait for a reply and have no time left for it. A turn under way is let end."""
        now, manners = time.monotonic(), self._manners
        for call in list(self._calls.values()):
            if now - self._began[call.row] > manners.episode_seconds:
                self._finish(call.row, "time_limit")
            elif now - call.asked > manners.reply_seconds:
                self._finish(call.row, "no_reply")

    def _finish(self, row: int, stop: str) -> None:
        episode = self._at.pop(row)
        self._calls.pop(row, None)
        self.trace.freed(row)
        episode.stop = stop
        episode.text = self._tokenizer.decode(episode.tokens)
        self._free.append(row)
        self._release.add(row)
        self.agenda.finish(episode)

    def _entries(self) -> list[_Entry]:
        """Up to E deliveries: replies first, then questions, then rows to be emptied."""
        room, entries = self._limits.exchange_rows, []
        while not self._ready.empty():
            self._held.append(self._ready.get())
        while self._held and len(entries) < room:
            entries += self._reply_entry(self._held.popleft())
        while self._free and len(entries) < room and (prompt := self.agenda.take(len(self._at))):
            entries.append(self._question_entry(self._free.popleft(), prompt))
        while self._release and len(entries) < room:
            entries.append(_Entry(self._release.pop(), False, 0, []))
        return entries

    def _reply_entry(self, answer: _Answer) -> list[_Entry]:
        """The delivery of a reply; none if it comes too late, brings an error, or has no room in its row."""
        call, reply, ids, cut = answer
        row, limits = call.row, self._limits
        if self._calls.get(row) is not call:
            return []
        if isinstance(reply, BaseException):
            self.agenda.fail(reply)
            return []
        del self._calls[row]
        episode = self._at[row]
        episode.replies.append(reply)
        own = len(episode.prompt) - self._prefix_length + len(episode.tokens)
        # The turn's last token was sampled but not read yet: it leads the feed. One position is left to sample at.
        feed = [episode.tokens[-1], *ids]
        if len(feed) > limits.feed_tokens or own + len(ids) + 2 > limits.row_tokens:
            self._finish(row, "row_full")
            return []
        if time.monotonic() - self._began[row] > self._manners.episode_seconds:
            self._finish(row, "time_limit")
            return []
        episode.inject(ids)
        self.trace.cut_replies += cut
        self.trace.fed(row)
        return [_Entry(row, False, 0, feed)]

    def _question_entry(self, row: int, prompt: Prompt) -> _Entry:
        self._release.discard(row)
        self._at[row] = Episode(prompt.episode, prompt.tokens)
        self._began[row] = time.monotonic()
        self.trace.fed(row)
        return _Entry(row, True, prompt.episode, list(prompt.tokens[self._prefix_length :]))

    def _inbox(self, entries: list[_Entry], *, stop: bool) -> Inbox:
        box = Inbox(*[np.zeros(x.shape, x.dtype) for x in inbox_spec(self._limits)])
        box.row[:] = self._limits.slots
        for i, (row, fresh, episode, ids) in enumerate(entries):
            box.row[i], box.fresh[i], box.episode[i], box.length[i] = row, fresh, episode, len(ids)
            box.feed[i, : len(ids)] = ids
        unsent = self._held or not self._ready.empty() or self._release
        unsent = unsent or (self._free and self.agenda.gives(len(self._at)))
        return box._replace(more=np.bool_(bool(entries) and bool(unsent)), stop=np.bool_(stop))
