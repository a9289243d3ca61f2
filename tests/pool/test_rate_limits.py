from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.pool.rate_limits import TokenBucket

arrivals = st.lists(st.tuples(st.floats(0.0, 40.0), st.integers(1, 30)), min_size=1, max_size=40)


@given(per_minute=st.integers(1, 300), arrivals=arrivals)
def test_no_minute_lets_more_pass_than_it_may(per_minute, arrivals):
    bucket, now, passed = TokenBucket(per_minute), 0.0, []
    for pause, amount in arrivals:
        now += pause
        passed.append((now + bucket.take(amount, now), amount))
    for start, _ in passed:
        # An amount that is longer than its wait may begin inside of the minute and belongs to it in part only.
        within = [amount for at, amount in passed if start - 1e-6 < at < start + 60 - 1e-6]
        assert sum(within) - max(within[0], within[-1]) <= per_minute + 1e-6


@given(per_minute=st.integers(1, 300), pauses=st.lists(st.floats(0.0, 40.0), min_size=1, max_size=80))
def test_single_requests_keep_to_the_limit_exactly(per_minute, pauses):
    bucket, now, passed = TokenBucket(per_minute), 0.0, []
    for pause in pauses:
        now += pause
        passed.append(now + bucket.take(1, now))
    assert passed == sorted(passed)  # first come, first served
    for start in passed:
        assert sum(start <= at < start + 60 - 1e-6 for at in passed) <= max(per_minute, 1)


def test_what_is_given_back_may_be_taken_again_and_no_limit_never_waits():
    bucket = TokenBucket(60)
    assert bucket.take(6, 0.0) == 0.0
    assert bucket.take(9, 0.0) == 10.0  # 54 a minute flow after the first tenth
    bucket.give_back(9)
    assert bucket.take(0, 0.0) == 0.0
    free = TokenBucket(0)
    assert [free.take(10**9, 0.0) for _ in range(3)] == [0.0] * 3
