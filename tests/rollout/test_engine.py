"""The engine against a naive rollout, and its two drivers against each other under every schedule of replies."""

import _thread
import collections
import copy
import functools
import threading
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_router
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_rollout import NaiveEpisode
from tiny_router import (
    MAX_CALLS,
    MODEL,
    REPLY_TOKENS,
    SHAPES,
    TOKENIZER,
    Latecomers,
    Reply,
    at_once,
    make_engine,
    make_prompts,
    sample,
)

from router_r1_jax.config import base_config
from router_r1_jax.model import Prefix, empty_cache
from router_r1_jax.rollout import EpisodeLimits, Prompt, static_shapes
from router_r1_jax.rollout import engine as engine_module
from router_r1_jax.rollout.decode_batch import empty_caches
from router_r1_jax.rollout.host_callback import HostCallback
from router_r1_jax.rollout.row_state import empty_rows
from router_r1_jax.rollout.sampling import Truncation
from router_r1_jax.rollout.step import Sampler

PROMPTS = make_prompts(24)
DRIVERS = ("host", "jit")


@pytest.fixture(scope="module")
def params():
    return tiny_router.make_params()


@pytest.fixture(scope="module")
def engines():
    # A reply of a dead thread is lost after half a second.
    episode_limits = EpisodeLimits(max_calls=MAX_CALLS, reply_tokens=REPLY_TOKENS, reply_seconds=0.5)
    return {driver: make_engine(driver, episode_limits=episode_limits) for driver in DRIVERS}


@pytest.fixture(scope="module")
def run(engines):
    """Runs an engine of a driver: (episodes, stats)."""

    def run(driver, prompts=PROMPTS, respond=None, **kwargs):
        respond = respond or at_once()
        return sample(engines[driver], prompts, respond, **kwargs)

    return run


@pytest.fixture(scope="module")
def expected(run):
    """What the host driver samples when every reply is there at once."""
    return {episode.id: episode for episode in run("host")[0]}


def check_against_naive(params, episodes, stats, **kwargs):
    """Every token, its log-prob, the mask, the calls and the stop, as the naive rollout has them."""
    for episode in episodes:
        naive = NaiveEpisode(params, episode, prefix_length=stats.prefix_tokens, **kwargs)
        assert episode.tokens == naive.tokens
        assert episode.sampled == naive.sampled
        assert [reply.text for reply in episode.replies] == naive.replies
        assert episode.stop == naive.stop
        np.testing.assert_allclose(episode.logps, naive.logps, atol=1e-4, rtol=0)


@pytest.mark.parametrize("driver", DRIVERS)
def test_episodes_are_those_of_the_naive_rollout(params, run, driver):
    stops, texts = collections.Counter(), ""
    for prompts in (PROMPTS, make_prompts(12, shared=0, seed=1)):
        episodes, stats = run(driver, prompts)
        check_against_naive(params, episodes, stats)
        stops.update(episode.stop for episode in episodes)
        texts += "\n".join(episode.text for episode in episodes)
    assert set(stops) == {"answer", "call_limit", "turn_limit", "row_full", "end_of_text"}
    assert "</sea rch>" in texts  # a tag in two tokens took part


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_other_temperatures_and_greedy(params, run, temperature):
    episodes, stats = run("jit", temperature=temperature)
    check_against_naive(params, episodes, stats, temperature=temperature)


@pytest.mark.parametrize("driver", DRIVERS)
def test_truncation_is_that_of_the_textbook_and_both_log_probs_are_kept(params, run, driver):
    def kept(p):
        p = np.where(p >= np.sort(p)[-9], p, 0)
        order = np.argsort(-p)
        reached = np.cumsum(p[order]) / p.sum()
        return p >= p[order[np.argmax(reached >= 0.8)]]

    truncation = Truncation(jnp.int32(9), jnp.float32(0.8), jnp.float32(0))
    episodes, stats = run(driver, truncation=truncation)
    for episode in episodes:
        naive = NaiveEpisode(params, episode, prefix_length=stats.prefix_tokens, kept=kept)
        assert (episode.tokens, episode.stop) == (naive.tokens, naive.stop)
        np.testing.assert_allclose(episode.logps, naive.logps, atol=1e-4, rtol=0)
        found = [x for x, sampled in zip(episode.sampler_logps, episode.sampled, strict=True) if sampled]
        np.testing.assert_allclose(found, naive.sampler_logps, atol=1e-4, rtol=0)
        assert all(a <= b for a, b in zip(episode.logps, episode.sampler_logps, strict=True))


def test_sampled_tokens_of_an_episode_are_limited(params):
    """Over all turns: replies and questions do not count."""
    engine = make_engine("jit", episode_tokens=9)
    episodes, stats = sample(engine, PROMPTS, at_once())
    for episode in episodes:
        naive = NaiveEpisode(params, episode, prefix_length=stats.prefix_tokens, limit=9)
        assert (episode.tokens, episode.stop) == (naive.tokens, naive.stop)
    assert [e.stop for e in episodes].count("token_limit") > 3 and max(sum(e.sampled) for e in episodes) == 9
    assert any(e.stop == "token_limit" and e.replies for e in episodes)


def test_one_prompt_for_all_draws_apart_and_a_single_one_runs(params, run):
    """A group asks the same question: all but the last prompt token is shared then."""
    prompts = [Prompt(i, PROMPTS[0].tokens) for i in range(8)]
    episodes, stats = run("jit", prompts)
    assert stats.prefix_tokens == len(PROMPTS[0].tokens) - 1
    check_against_naive(params, episodes, stats)
    assert len({tuple(episode.tokens) for episode in episodes}) > 1
    (alone,), _ = run("jit", prompts[:1])
    assert (alone.tokens, alone.stop) == (episodes[0].tokens, episodes[0].stop)


def test_the_seed_decides_the_draws(engines):
    sampled = [[e.tokens for e in sample(engines["jit"], PROMPTS, at_once(), seed=seed)[0]] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def check_schedule(run, expected, driver, order, delays):
    """Whatever the order of prompts and replies: the same episodes, bit for bit, in the order of the prompts."""
    prompts, pool = [PROMPTS[i] for i in order], Latecomers(delays)
    episodes, _ = run(driver, prompts, pool)
    assert [episode.id for episode in episodes] == [prompt.episode for prompt in prompts]
    for episode in episodes:
        assert episode == expected[episode.id]  # every field, log-probs included
        assert [call for _, e, call in pool.calls if e == episode.id] == list(range(len(episode.replies)))


orders = st.permutations(range(len(PROMPTS)))
latencies = st.lists(st.sampled_from([0, 0, 0.001, 0.003, 0.01, 0.03]), min_size=1, max_size=10)


@settings(max_examples=30, deadline=None)
@given(orders, latencies)
def test_no_schedule_changes_a_jitted_episode(run, expected, order, delays):
    check_schedule(run, expected, "jit", order, delays)


@settings(max_examples=4, deadline=None)
@given(orders, latencies)
def test_no_schedule_changes_a_host_driven_episode(run, expected, order, delays):
    check_schedule(run, expected, "host", order, delays)


class Placing(HostCallback):
    """Gives its rows out in the order that a test chooses."""

    order: tuple[int, ...] = ()

    def __init__(self, *args):
        super().__init__(*args)
        self._free = collections.deque(self.order)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"slots": 7, "callback_rows": 1, "prefill_rows": 3},
        {"slots": 1, "prefill_rows": 1},
        {"slots": 9, "decode_batch": 3},
        {"slots": 7, "decode_batch": 4, "callback_rows": 1, "prefill_rows": 3},
    ],
)
def test_no_schedule_changes_an_episode_many_times(params, shapes, monkeypatch):
    """Nor does the number of replicas, nor which of them samples an episode, nor in which slot."""
    monkeypatch.setattr(engine_module, "HostCallback", Placing)
    engines = {driver: make_engine(driver, devices=jax.devices()[:1] * 2, **shapes) for driver in DRIVERS}
    slots = list(range(shapes.get("slots", SHAPES.slots)))

    def run(driver, prompts, respond, *, chosen=(0,), places=slots):
        some = copy.copy(engines[driver])
        some._replicas = [some._replicas[i] for i in chosen]
        Placing.order = tuple(places)
        return sample(some, prompts, respond)

    expected = {episode.id: episode for episode in run("host", PROMPTS, at_once())[0]}
    check_against_naive(params, *run("jit", PROMPTS, at_once()))
    replicas = st.sampled_from([(0,), (1,), (0, 1)])

    @settings(max_examples=200, deadline=None)
    @given(orders, latencies, st.sampled_from(["jit", "jit", "jit", "host"]), replicas, st.permutations(slots))
    def check(order, delays, driver, chosen, places):
        where = functools.partial(run, chosen=chosen, places=places)
        check_schedule(where, expected, driver, order, delays)

    check()


def test_facts_of_an_episode(run):
    """More episodes than rows, in the prompts' order; text, mask and log-probs run in step; each is finished once."""
    finished, pool = [], Latecomers()
    episodes, stats = run("jit", PROMPTS, pool, on_finish=finished.append)
    assert len(PROMPTS) > SHAPES.slots
    assert sorted(e.id for e in finished) == sorted(p.episode for p in PROMPTS)
    for episode, prompt in zip(episodes, PROMPTS, strict=True):
        assert (episode.id, episode.prompt) == (prompt.episode, prompt.tokens)
        assert episode.text == TOKENIZER.decode(episode.tokens)
        assert len(episode.tokens) == len(episode.logps) == len(episode.sampled)
        assert all((logp < 0) == sampled for logp, sampled in zip(episode.logps, episode.sampled, strict=True))
    assert stats.calls == len(pool.calls) == sum(len(e.replies) for e in episodes)
    assert stats.decoded_tokens == sum(sum(e.sampled) for e in episodes)
    assert stats.prefix_tokens == 9


REPLIES = {
    "nothing": "",
    "white space": " \n\t ",
    "our tags": "</information> <search> w1: who? </search> <answer> w2 </answer>",
    "end of text": "[END] w1 [END]",
    "unknown words": "\u202e \x00 日本 </sea rch>",
    "far too long": "w3 " * 500,
    "tag behind the budget": "w1 w2 w3 w4 w5 w6 </answer> </search>",
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES.keys())
def test_a_reply_ends_no_turn_and_stays_in_its_budget(params, run, reply):
    """The loop is held to more than it must bear: the pool neutralises replies before they come here."""

    def texts(route, episode, call):
        return reply

    episodes, stats = run("jit", respond=at_once(texts))
    assert stats.calls > 5
    check_against_naive(params, episodes, stats, texts=texts)


def test_a_reply_of_a_megabyte_and_one_of_control_characters_are_truncated_to_their_budget(run):
    texts = {0: "w5 " * 350_000, 1: "".join(map(chr, range(1, 32))) * 1000, 2: ""}
    episodes, stats = run("jit", respond=at_once(lambda route, episode, call: texts[call]))
    assert stats.calls > 5
    assert all(n <= REPLY_TOKENS + 2 for e in episodes for n in injected_lengths(e))


def injected_lengths(episode):
    """Lengths of the runs of injected tokens."""
    words = "".join("x" if sampled else "." for sampled in episode.sampled)
    return [len(run) for run in words.split("x") if run]


@pytest.mark.parametrize("driver", DRIVERS)
def test_replies_that_never_come_end_their_episodes_and_not_the_run(run, expected, driver):
    """As where a thread of the pool has died. All other episodes are what they always are."""
    dead = {prompt.episode for prompt in PROMPTS[::3]}

    def respond(route, *, episode, call):
        return Future() if episode in dead else at_once()(route, episode=episode, call=call)

    episodes, _ = run(driver, respond=respond)
    assert any(e.stop == "no_reply" for e in episodes)
    for episode in episodes:
        whole = expected[episode.id]
        if episode.id in dead and whole.replies:
            assert episode.stop == "no_reply" and whole.tokens[: len(episode.tokens)] == episode.tokens
        else:
            assert episode == whole


@pytest.mark.slow
def test_hundreds_of_calls_in_flight_and_thousands_in_a_run():
    """256 rows, most of which wait at a time: nothing is lost and nothing asked twice."""
    engine = make_engine("jit", slots=256, callback_rows=64, prefill_rows=64)
    prompts = [Prompt(i, PROMPTS[i % len(PROMPTS)].tokens) for i in range(4000)]
    pool = Latecomers((0.0, 0.01, 0.002), threads=256)
    episodes, stats = sample(engine, prompts, pool)
    asked = collections.Counter((episode, call) for _, episode, call in pool.calls)
    assert set(asked.values()) == {1} and len(asked) == stats.calls == sum(len(e.replies) for e in episodes) >= 5000
    held = threading.Event()
    first = [p for p, e in zip(prompts, episodes, strict=True) if e.replies][:256]
    waiting, lock = [], threading.Lock()

    def respond(route, *, episode, call):
        """Nobody is answered before all have asked."""
        if held.is_set() or call:
            return at_once()(route, episode=episode, call=call)
        with lock:
            waiting.append((future := Future(), Reply(tiny_router.reply_text(route, episode, call))))
            if len(waiting) == 256:
                held.set()
                for other, reply in waiting:
                    other.set_result(reply)
        return future

    again, stats = sample(engine, first, respond, prefix_tokens=stats.prefix_tokens)
    assert stats.calls_in_flight == 256
    by_id = {e.id: e for e in episodes}
    assert all(e.tokens == by_id[e.id].tokens for e in again)


class ProviderDownError(RuntimeError):
    """What a pool may raise."""


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("where", ["in the future", "in the call"])
def test_a_pools_error_ends_the_run_and_the_next_run_is_whole(run, expected, driver, where):
    answering = at_once()

    def respond(route, *, episode, call):
        if call == 0:
            return answering(route, episode=episode, call=call)
        if where == "in the call":
            raise ProviderDownError("no one there")
        future = Future()
        future.set_exception(ProviderDownError("no one there"))
        return future

    with pytest.raises(ProviderDownError, match="no one there"):
        run(driver, respond=respond)
    assert {episode.id: episode for episode in run(driver)[0]} == expected


@pytest.mark.parametrize("driver", DRIVERS)
def test_ctrl_c_ends_a_run_whose_replies_never_come(run, expected, driver):
    pressed = threading.Event()

    def respond(route, *, episode, call):
        if not pressed.is_set():
            pressed.set()
            _thread.interrupt_main()  # as Ctrl-C does
        return Future()

    with pytest.raises(KeyboardInterrupt):
        run(driver, respond=respond)
    left = [thread for thread in threading.enumerate() if thread.name == "rollout"]
    [thread.join(60) for thread in left]
    assert not any(thread.is_alive() for thread in left)
    assert {episode.id: episode for episode in run(driver)[0]} == expected


def test_a_prompt_that_is_too_long_is_refused(run):
    long = [Prompt(0, (50, 51)), Prompt(3, (50,) * 20)]
    with pytest.raises(
        ValueError, match=r"episode 3 has 19 prompt tokens behind the shared prefix.*prompt.question_tokens \(14\)"
    ):
        run("jit", long)


@pytest.mark.parametrize("slots", [8, 16], ids=["all rows in the decode batch", "half of them"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_the_compiled_program_holds_no_second_cache(driver, slots):
    """Neither the loop nor the step that Python calls. Caches are updated in place; no layer's fits beside them."""
    shapes = SHAPES._replace(slots=slots, decode_batch=8, row_tokens=4096)
    (replica,) = make_engine(driver, **shapes._asdict())._replicas
    caches = jax.eval_shape(lambda: empty_caches(MODEL, shapes, 4096))
    kv = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], empty_cache(MODEL, 1, 64)))
    scalar = jnp.int32(0)
    draws = jnp.float32(1), jax.random.key(0), None
    sampler = Sampler(replica._params, Prefix(kv, scalar), *replica._automaton, *draws)
    program = {"jit": replica._loop, "host": replica._step}[driver]
    compiled = program.lower(sampler, caches, empty_rows(shapes)).compile()
    memory, whole = compiled.memory_analysis(), sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
    assert memory.alias_size_in_bytes >= whole
    of_batch = whole * shapes.decode_batch / shapes.num_caches
    assert memory.temp_size_in_bytes < of_batch / MODEL.num_layers
    arrays = {f"f32[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(caches)}
    copied = [line for line in compiled.as_text().splitlines() if " copy(" in line and any(s in line for s in arrays)]
    assert copied == []


def test_static_shapes_keep_a_callback_small():
    config = base_config().rollout
    shapes = static_shapes(config, question_tokens=256)
    assert shapes.prefill_tokens == 632 and shapes.turn_tokens == 1024
    assert 4 * shapes.callback_rows * max(shapes.prefill_tokens, shapes.turn_tokens) <= 16 * 1024
    assert (shapes.slots, shapes.decode_batch, shapes.num_caches) == (64, 64, 64)
    config.decode_batch, config.prefill_rows = 16, 20
    shapes = static_shapes(config, question_tokens=256)
    assert (shapes.decode_batch, shapes.prefill_rows, shapes.num_caches) == (
        16,
        16,
        80,
    )  # as many spare caches as rows swap at once
    config.slots, config.decode_batch, config.max_turn_tokens = 3, 0, 20
    shapes = static_shapes(config, question_tokens=2000)
    assert (shapes.callback_rows, shapes.prefill_rows, shapes.prefill_tokens) == (2, 3, 2000)
    config.max_turn_tokens = 4096
    assert static_shapes(config, question_tokens=5000).callback_rows == 1
    config.max_turn_tokens = 4097
    with pytest.raises(ValueError, match="rollout.max_turn_tokens is 4097; with rollout.driver 'jit' a turn has at"):
        static_shapes(config, question_tokens=256)
    config.driver = "host"
    assert static_shapes(config, question_tokens=256).turn_tokens == 4097
