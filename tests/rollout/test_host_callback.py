"""The host side of the callback, driven without a device: what it asks, delivers, finishes, and how it stops."""

import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
from tiny_router import REPLY_TOKENS, SHAPES, TOKENIZER, WORDS, Reply

from router_r1_jax.rollout.episode import Prompt
from router_r1_jax.rollout.host_callback import (
    PATIENCE,
    EpisodeLimits,
    HostCallback,
    reply_ids,
    route_text,
)
from router_r1_jax.rollout.row_state import END_OF_TEXT, ROW_FULL, TOKEN_LIMIT, TURN_LIMIT, ToHost
from router_r1_jax.rollout.stop_tags import ANSWER, ROUTE
from router_r1_jax.rollout.work_queue import WorkQueue

B, E = SHAPES.slots, SHAPES.callback_rows


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def report(*turns, idle=False, counts=(0,) * 6):
    """Ended turns (row, reason, words)."""
    box = ToHost(
        row=np.full(E, B, np.int32),
        reason=np.zeros(E, np.int32),
        turn_length=np.zeros(E, np.int32),
        turn=np.zeros((E, SHAPES.turn_tokens), np.int32),
        logps=np.zeros((E, SHAPES.turn_tokens), np.float32),
        sampler_logps=np.zeros((E, SHAPES.turn_tokens), np.float32),
        turn_began=np.zeros(E, np.int32),
        idle=np.bool_(idle),
        counts=np.array(counts, np.int32),
    )
    for i, (row, reason, words) in enumerate(turns):
        turn = ids(words)
        box.row[i], box.reason[i], box.turn_length[i] = row, reason, len(turn)
        box.turn[i, : len(turn)] = turn
        box.logps[i, : len(turn)] = -1.0
        box.sampler_logps[i, : len(turn)] = -0.5
    return box


class Asked:
    """A pool that keeps the calls and their futures."""

    def __init__(self):
        self.calls, self.futures = [], []

    def __call__(self, route, *, episode, call):
        self.calls.append((route, episode, call))
        self.futures.append(Future())
        return self.futures[-1]


def open_callback(n=1, max_calls=2, respond=None, on_finish=None, **episode_limits):
    """A callback over n prompts of 2 shared and 2 other tokens, and its pool."""
    pool = respond or Asked()
    work_queue = WorkQueue([Prompt(100 + i, (50, 51, 52, 53 + i)) for i in range(n)], on_finish=on_finish)
    allowed = EpisodeLimits(max_calls=max_calls, reply_tokens=REPLY_TOKENS, **episode_limits)
    return HostCallback(SHAPES, TOKENIZER, work_queue, 2, pool, allowed), pool


def entries(result):
    """Deliveries of a callback (row, fresh, episode, ids)."""
    return [
        (int(row), bool(fresh), int(episode), tokens[:length].tolist())
        for row, fresh, episode, length, tokens in zip(*result[:5], strict=True)
        if row < B
    ]


def test_questions_go_to_free_rows_a_few_at_a_time_without_the_shared_prefix():
    callback, _ = open_callback(5)
    first, second = callback(*report(idle=True)), callback(*report())
    assert entries(first) == [(0, True, 100, [52, 53]), (1, True, 101, [52, 54])]
    assert entries(second) == [(2, True, 102, [52, 55]), (3, True, 103, [52, 56])]
    assert first.more and not second.more and not first.stop  # the fifth waits for a row
    third = callback(*report((2, ANSWER, "w1 </answer>")))
    assert entries(third) == [(2, True, 104, [52, 57])]


def test_a_call_and_its_reply():
    callback, pool = open_callback()
    callback(*report())
    assert entries(callback(*report((0, ROUTE, "w1 <search> w2 w3 </search>")))) == []
    assert pool.calls == [(" w2 w3 ", 100, 0)]
    pool.futures[0].set_result(Reply("w4 w5"))
    # The turn's last token was sampled but never read: it comes first.
    reply = ids("<information> w4 w5 </information>")
    assert entries(callback(*report())) == [(0, False, 0, [WORDS.index("</search>"), *reply])]
    last = callback(*report((0, ANSWER, "<answer> w4 </answer>")))
    (episode,) = callback.work_queue.finished
    assert last.stop and episode.stop == "answer"
    assert episode.tokens == ids("w1 <search> w2 w3 </search>") + reply + ids("<answer> w4 </answer>")
    assert episode.sampled == [True] * 5 + [False] * 4 + [True] * 3
    assert episode.logps == [-1.0] * 5 + [0.0] * 4 + [-1.0] * 3
    assert episode.sampler_logps == [-0.5] * 5 + [0.0] * 4 + [-0.5] * 3
    assert episode.replies == [Reply("w4 w5")]


@pytest.mark.parametrize("max_calls", [0, 1, 2])
def test_no_call_beyond_the_limit(max_calls):
    callback, pool = open_callback(max_calls=max_calls)
    callback(*report())
    for i in range(max_calls):
        callback(*report((0, ROUTE, "<search> w1 </search>")))
        pool.futures[i].set_result(Reply("w2"))
        callback(*report())
    assert callback(*report((0, ROUTE, "<search> w9 </search>"))).stop
    assert len(pool.calls) == max_calls
    assert callback.work_queue.finished[0].stop == "call_limit"


@pytest.mark.parametrize(
    ("reason", "stop"),
    [
        (ANSWER, "answer"),
        (TURN_LIMIT, "turn_limit"),
        (TOKEN_LIMIT, "token_limit"),
        (ROW_FULL, "row_full"),
        (END_OF_TEXT, "end_of_text"),
    ],
)
def test_stops(reason, stop):
    callback, _ = open_callback()
    callback(*report())
    callback(*report((0, reason, "w1 w2")))
    assert callback.work_queue.finished[0].stop == stop


def test_a_reply_for_which_the_row_has_no_room_ends_the_episode_and_is_kept():
    callback, pool = open_callback(max_calls=9)
    callback(*report())
    for i in range(3):  # 2 tokens of the question, then 9 + 5 by each turn and reply, of 40
        callback(*report((0, ROUTE, "w1 w2 w3 w4 w5 w6 w7 w8 </search>")))
        pool.futures[i].set_result(Reply("w1 w2 w3"))
        result = callback(*report())
        assert result.stop == (i == 2)
    (episode,) = callback.work_queue.finished
    assert episode.stop == "row_full" and len(episode.replies) == 3
    assert len(episode.tokens) == 3 * 9 + 2 * 5  # the last reply never entered


def test_an_idle_callback_waits_for_a_reply_and_a_busy_one_does_not():
    callback, pool = open_callback()
    callback(*report())
    callback(*report((0, ROUTE, "<search> w1 </search>")))
    assert entries(callback(*report())) == [] and callback.timeline.idle_seconds == 0
    threading.Timer(PATIENCE / 5, pool.futures[0].set_result, [Reply("w2")]).start()
    tries = 0
    while not (delivered := entries(callback(*report(idle=True)))):
        tries += 1  # a loaded machine may need another turn of patience
        assert tries < 100
    assert len(delivered) == 1 and callback.timeline.idle_seconds > 0


def test_a_bounded_wait_ends_without_a_reply():
    callback, _ = open_callback()
    callback(*report())
    result = callback(*report((0, ROUTE, "<search> w1 </search>"), idle=True))  # returns although no reply ever comes
    assert entries(result) == [] and not result.stop and not result.more


def test_a_reply_that_never_comes_ends_its_episode_and_a_later_one_finds_the_row_gone_on():
    callback, pool = open_callback(5, reply_seconds=0.05)
    callback(*report()), callback(*report())
    callback(*report((0, ROUTE, "<search> w1 </search>")))
    result = callback(*report())
    while not entries(result):  # the fifth question takes the row
        result = callback(*report())
    assert entries(result) == [(0, True, 104, [52, 57])]
    (episode,) = callback.work_queue.finished
    assert (episode.id, episode.stop, episode.replies) == (100, "no_reply", [])
    callback(*report((0, ROUTE, "<search> w2 </search>")))
    pool.futures[0].set_result(Reply("late"))
    assert entries(callback(*report())) == []
    pool.futures[1].set_result(Reply("w9"))
    (entry,) = entries(callback(*report()))
    assert entry[0] == 0 and WORDS.index("w9") in entry[3]


def test_an_episode_whose_time_is_over_waits_no_longer_and_begins_no_turn():
    callback, pool = open_callback(2, episode_seconds=0.2)
    callback(*report())
    callback(*report((0, ROUTE, "<search> w1 </search>"), (1, ROUTE, "<search> w1 </search>")))
    pool.futures[0].set_result(Reply("in time"))
    assert [entry[0] for entry in entries(callback(*report()))] == [0]
    time.sleep(0.2)
    callback(*report((0, ROUTE, "<search> w1 </search>")))
    assert {(e.id, e.stop, len(e.replies)) for e in callback.work_queue.finished} == {
        (100, "time_limit", 1),
        (101, "time_limit", 0),
    }


def test_stopping_and_errors_leave_the_loop():
    callback, pool = open_callback()
    callback(*report())
    callback.work_queue.fail(KeyboardInterrupt())
    assert callback(*report((0, ROUTE, "<search> w1 </search>"), idle=True)).stop

    callback, pool = open_callback(2)
    callback(*report())
    callback(*report((0, ROUTE, "<search> w1 </search>"), (1, ROUTE, "<search> w1 </search>")))
    error = RuntimeError("down")
    pool.futures[1].set_exception(error)
    assert callback(*report()).stop
    assert callback.work_queue.error is error


@pytest.mark.parametrize("what", ["respond", "on_finish", "reply"])
def test_nothing_raises_through_the_callback(what):
    def fail(*args, **kwargs):
        raise ValueError(f"{what} failed")

    kwargs = {"respond": {"respond": fail}, "on_finish": {"on_finish": fail}, "reply": {}}[what]
    callback, pool = open_callback(**kwargs)
    callback(*report())
    if what == "reply":
        callback(*report((0, ROUTE, "<search> w1 </search>")))
        pool.futures[0].set_result(object())  # has no text
        assert callback(*report(idle=True)).stop
        assert isinstance(callback.work_queue.error, AttributeError)
    else:
        turn = (0, ANSWER, "w1 </answer>") if what == "on_finish" else (0, ROUTE, "<search> w1 </search>")
        assert callback(*report(turn)).stop
        assert str(callback.work_queue.error) == f"{what} failed"


def test_replies_that_come_while_others_are_delivered_are_not_lost():
    callback, pool = open_callback(4)
    callback(*report()), callback(*report())
    callback(*report((0, ROUTE, "<search> w1 </search>"), (1, ROUTE, "<search> w1 </search>")))
    callback(*report((2, ROUTE, "<search> w1 </search>"), (3, ROUTE, "<search> w1 </search>")))
    for i in (3, 0, 2):
        pool.futures[i].set_result(Reply(f"w{i}"))
    first = callback(*report(idle=True))
    pool.futures[1].set_result(Reply("w1"))
    second = callback(*report(idle=True))
    assert [entry[0] for entry in entries(first) + entries(second)] == [3, 0, 2, 1]  # first come, first served
    assert first.more and not second.more


def test_many_threads_replying_at_once_lose_nothing():
    callback, pool = open_callback(4)
    callback(*report()), callback(*report())
    turns = [(row, ROUTE, "<search> w1 </search>") for row in range(4)]
    callback(*report(*turns[:2])), callback(*report(*turns[2:]))
    gate = threading.Barrier(4)

    def reply(future):
        gate.wait()
        future.set_result(Reply("w2 " * 20))

    threads = [threading.Thread(target=reply, args=[future]) for future in pool.futures]
    [thread.start() for thread in threads]
    rows = []
    for _ in range(200):  # each waits a little while nothing is there
        rows += [entry[0] for entry in entries(callback(*report(idle=len(rows) < 4)))]
    assert sorted(rows) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("turn", "route"),
    [
        ("<think> a </think> <search> X: who? </search>", " X: who? "),
        ("<search> one <search> X: two </search>", " X: two "),
        ("<search> X: who? </search> rest of a token", " X: who? "),
        ("no opening tag </search>", ""),
        ("<search> never closed", ""),
        ("<search></search>", ""),
        ("", ""),
    ],
)
def test_route_text(turn, route):
    assert route_text(turn) == route


def test_a_reply_of_few_tokens_is_read_to_sixteen_characters_for_each_token_of_its_budget():
    text = "w1" + " " * (16 * (REPLY_TOKENS + 1) - 4)
    whole, cut = (ids(f"<information> {words} </information>") for words in ("w1 w2", "w1"))
    assert reply_ids(TOKENIZER, text + "w2", REPLY_TOKENS) == (whole, False)
    assert reply_ids(TOKENIZER, text + "  w2", REPLY_TOKENS) == (cut, True)


@pytest.mark.parametrize("n", [0, 1, REPLY_TOKENS - 1, REPLY_TOKENS, REPLY_TOKENS + 1, 1000])
def test_a_reply_is_truncated_before_its_closing_tag(n):
    words = [f"w{i % 60}" for i in range(n)]
    expected = ["<information>", *words[:REPLY_TOKENS], "</information>"]
    assert reply_ids(TOKENIZER, " ".join(words), REPLY_TOKENS) == (ids(" ".join(expected)), n > REPLY_TOKENS)
