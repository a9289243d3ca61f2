"""When a request may be sent: rates per minute, a breaker for models that are down, and the usual latency."""

import threading
from collections import deque

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


class Breaker:
    """Spares a model that fails and fails: after `failures` in a row nothing is sent for a while, then one request.

    The while doubles with every such probe that fails, from `pause` to `pause_max` seconds; any success ends it.
    0 failures: never. Threads may share it.
    """

    def __init__(self, failures: int, pause: float, pause_max: float) -> None:
        self._failures, self._pause_min, self._pause_max = failures, pause, pause_max
        self._pause = pause
        self._in_row = 0
        self._open_until = 0.0
        self._probing = False
        self._lock = threading.Lock()

    def delay(self, now: float) -> float:
        """Seconds until a request may be sent; 0 lets the caller send one now."""
        with self._lock:
            if not self._failures or self._in_row < self._failures:
                return 0.0
            if now < self._open_until:
                return self._open_until - now
            self._probing = True  # this caller's; the others wait for what becomes of it
            self._open_until = now + self._pause
            return 0.0

    def succeeded(self) -> None:
        """The model answered."""
        with self._lock:
            self._in_row, self._pause, self._probing = 0, self._pause_min, False

    def failed(self, now: float) -> None:
        """A request failed in a way that is the model's or its provider's."""
        with self._lock:
            self._in_row += 1
            if self._in_row == self._failures or self._probing:
                self._probing = False
                self._open_until = now + self._pause
                self._pause = min(2 * self._pause, self._pause_max)


class Latencies:
    """The latest latencies of a model's answers, in seconds. Threads may share it."""

    def __init__(self, *, least: int = 20, most: int = 200) -> None:
        self._least = least
        self._seconds: deque[float] = deque(maxlen=most)
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """An answer took so long."""
        with self._lock:
            self._seconds.append(seconds)

    def p95(self) -> float | None:
        """95 of 100 answers came sooner; None while too few are known to say so."""
        with self._lock:
            if len(self._seconds) < self._least:
                return None
            return sorted(self._seconds)[int(0.95 * len(self._seconds))]
