"""How much may be asked of a provider: token buckets over a minute, taken from before a request is sent."""

import threading

_BURST = 0.1  # share of a minute's amount that may go at once after a rest


class TokenBucket:
    """Lets at most `per_minute` pass in any 60 seconds, whatever the pattern; 0 lets everything pass.

    An amount is taken at once and the bucket goes into debt; the caller then waits until the debt is paid. So callers
    are served in the order in which they came, and a large amount is not overtaken for ever by small ones. The first
    tenth may go at once, the rest flows evenly: a bucket that filled to the whole would let twice as much pass in the
    minute after a rest. Threads may share it.
    """

    def __init__(self, per_minute: float) -> None:
        self._burst = max(_BURST * per_minute, 1.0)
        self._rate = max(per_minute - self._burst, per_minute / 2) / 60  # per second
        self._level = self._burst
        self._filled_at: float | None = None
        self._unlimited = per_minute == 0
        self._lock = threading.Lock()

    def take(self, amount: float, now: float) -> float:
        """Take `amount` at `now` (monotonic seconds); returns the seconds to wait before it may be used."""
        if self._unlimited:
            return 0.0
        with self._lock:
            if self._filled_at is not None:
                self._level = min(self._level + (now - self._filled_at) * self._rate, self._burst)
            self._filled_at = now
            self._level -= amount
            return max(-self._level / self._rate, 0.0)

    def give_back(self, amount: float) -> None:
        """Return what was taken and not used; a negative amount is what was used beyond it."""
        if not self._unlimited:
            with self._lock:
                self._level = min(self._level + amount, self._burst)


class RateLimits:
    """A provider's requests and tokens per minute; 0 is no limit."""

    def __init__(self, requests_per_minute: float, tokens_per_minute: float) -> None:
        self._requests = TokenBucket(requests_per_minute)
        self._tokens = TokenBucket(tokens_per_minute)

    def take(self, tokens: float, now: float) -> float:
        """Take one request of at most `tokens` tokens; returns the seconds to wait before it may be sent."""
        return max(self._requests.take(1, now), self._tokens.take(tokens, now))

    def cancel(self, tokens: float) -> None:
        """Return a request that was taken and is not sent."""
        self._requests.give_back(1)
        self._tokens.give_back(tokens)

    def settle(self, taken: float, used: float) -> None:
        """A request that took `taken` tokens has used `used`."""
        self._tokens.give_back(taken - used)
