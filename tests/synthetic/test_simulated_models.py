"""Simulated models: skill, tokens, the share of requests that fail, latency."""

import math
import re
import statistics

import pytest

from router_r1_jax.config import ConfigError, model_card
from router_r1_jax.pool.cards import Card
from router_r1_jax.synthetic.simulated_models import SimulatedModels
from router_r1_jax.synthetic.world import count_tokens


class Parrot:
    """A world whose models repeat the query and state their skill."""

    def reply(self, query, skill):
        return f"{query} {skill['film']:.2f}!"


def _card(name, *, film=0.5, latency=0.0, **faults):
    simulated = model_card(simulated=faults).simulated.to_dict()
    return Card(name, name, "p", f"{name}-id", 1.0, 2.0, latency, {"film": film}, "", (), simulated)


def test_each_model_answers_with_its_own_skill():
    models = SimulatedModels(Parrot(), [_card("a", film=0.25), _card("b", film=0.75)])
    assert models.names == ("a-id", "b-id")
    assert models.answer("a-id", "Who is it?").text == "Who is it? 0.25!"
    assert models.answer("b-id", "Who is it?").text == "Who is it? 0.75!"
    with pytest.raises(KeyError):
        models.answer("a", "Who is it?")


@pytest.mark.parametrize("text", ["", "a", "Who's it? No-one.", "  x  y ", "été: 3.5 %", "_a_ <b>"])
def test_tokens_are_words_and_marks(text):
    assert count_tokens(text) == len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize(("limit", "text", "tokens"), [(1, "Who", 1), (4, "Who is it?", 4), (8, "Who is it? 0.50!", 8)])
def test_a_reply_is_truncated_at_its_token_limit(limit, text, tokens):
    answer = SimulatedModels(Parrot(), [_card("a")]).answer("a-id", "Who is it?", limit)
    assert (answer.text, answer.completion_tokens, answer.prompt_tokens) == (text, tokens, 4)
    assert answer.truncated == (limit < 8)


def test_the_declared_share_of_requests_fails_and_the_same_ones_each_time():
    def faults():
        models = SimulatedModels(
            Parrot(), [_card("a", failure_rate=0.1), _card("never"), _card("ever", failure_rate=1.0)]
        )
        assert not any(models.fault("never-id", "q") for _ in range(100))
        assert all("failure" == models.fault("ever-id", "q") for _ in range(100))
        return [models.fault("a-id", f"question {i}") for i in range(5000) for _ in range(2)]

    fails = [bool(kind) for kind in faults()]
    assert abs(sum(fails) - 1000) < 5 * math.sqrt(900)  # 5 standard deviations
    both = sum(first and second for first, second in zip(fails[::2], fails[1::2], strict=True))
    assert 20 < both < 90  # a question that failed is not lost: its second try may succeed
    assert [bool(kind) for kind in faults()] == fails


def test_latency_varies_around_the_cards():
    models = SimulatedModels(Parrot(), [_card("a", latency=0.2), _card("b")])
    logs = [math.log(models.latency("a-id")) for _ in range(4000)]
    assert statistics.mean(logs) == pytest.approx(math.log(0.2), abs=5 * 0.3 / math.sqrt(4000))
    assert statistics.stdev(logs) == pytest.approx(0.3, abs=0.02)
    assert models.latency("b-id") == 0.0


def test_two_models_of_one_id_cannot_be_told_apart():
    with pytest.raises(ConfigError, match="two simulated models of model id 'a-id'; give each its own id"):
        SimulatedModels(Parrot(), [_card("a"), _card("b"), _card("a")])


def test_the_first_requests_are_slow_where_a_slow_start_is_scripted():
    models = SimulatedModels(Parrot(), [_card("a", slow_start=(2, 1.5))])
    assert [models.latency("a-id", models.next_request("a-id")) for _ in range(4)] == [1.5, 1.5, 0.0, 0.0]
