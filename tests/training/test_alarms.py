"""Alarms: they sound where a sign is over its threshold, speak once, and stop a run only if asked to."""

import pytest

from router_r1_jax.config import base_config
from router_r1_jax.training.alarms import SIGNS, Alarms, CollapseError

SOUND = {
    "entropy": 0.5,
    "kl": 0.01,
    "malformed_share": 0.1,
    "response_tokens": 50.0,
    "calls/share": {"a": 0.6, "b": 0.4},
    "rollout/calls": 100,
    "logp_diff_mean": 1e-6,
    "skipped_updates": 0.0,
}
WRONG = {
    "entropy": {"entropy": 1e-4},
    "kl": {"kl": 2.0},
    "malformed": {"malformed_share": 0.6},
    "length": {"response_tokens": 151.0},
    "one_model": {"calls/share": {"a": 0.96, "b": 0.04}},
    "logp_diff": {"logp_diff_mean": 0.2},
    "skipped": {"skipped_updates": 1.0},
}


@pytest.fixture
def settings():
    return base_config().alarms


@pytest.mark.parametrize("name", SIGNS)
def test_each_sign_sounds_its_own_alarm_and_speaks_when_it_begins_and_ends(settings, name):
    alarms = Alarms(settings)
    silent = {f"alarms/{sign}": 0.0 for sign in SIGNS}
    assert alarms.check(SOUND) == (silent, [])
    figures, lines = alarms.check(SOUND | WRONG[name])
    assert figures == silent | {f"alarms/{name}": 1.0}
    assert len(lines) == 1 and lines[0].startswith(f"alarm {name}: ") and " is " in lines[0]
    assert alarms.check(SOUND | WRONG[name]) == (figures, [])
    figures, lines = alarms.check(SOUND)
    assert figures == silent and len(lines) == 1 and "is no longer" in lines[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_an_alarm(settings, value):
    figures, _ = Alarms(settings).check(SOUND | {"kl": value})
    assert figures["alarms/kl"] == 1.0


def test_few_calls_say_nothing_and_a_run_without_a_reference_has_no_kl(settings):
    metrics = SOUND | WRONG["one_model"] | {"rollout/calls": 5}
    del metrics["kl"]
    assert not any(Alarms(settings).check(metrics)[0].values())


def test_a_run_stops_only_if_asked_and_after_steps_in_a_row(settings):
    alarms = Alarms(settings)
    for _ in range(2 * settings.patience):
        alarms.check(SOUND | WRONG["malformed"])
        alarms.stop_if_collapsed()
    settings.stop = True
    alarms = Alarms(settings)
    for sick in (True, True, False, True, True, True, True):
        alarms.check(SOUND | WRONG["malformed"] if sick else SOUND)
        alarms.stop_if_collapsed()
    alarms.check(SOUND | WRONG["malformed"])
    with pytest.raises(CollapseError, match=r"alarm malformed has stood for 5 steps \(alarms.patience\)"):
        alarms.stop_if_collapsed()


def test_a_restored_one_goes_on_counting(settings):
    settings.stop = True
    first = Alarms(settings)
    for _ in range(settings.patience - 1):
        first.check(SOUND | WRONG["kl"])
    second = Alarms(settings)
    second.restore(first.state())
    assert second.check(SOUND | WRONG["kl"] | WRONG["length"])[0]["alarms/length"] == 1.0  # of the first run's length
    with pytest.raises(CollapseError):
        second.stop_if_collapsed()
