"""Rate limits of a provider (token buckets for requests and tokens per minute) and the circuit breaker of a model."""

import threading

_BURST = 0.1  # share of a minute's amount that may pass at once after a rest


class TokenBucket:
    """A token bucket that lets at most `per_minute` pass in any 60 seconds; 0 lets everything pass. Thread-safe.

    The whole amount is taken at once. The bucket then goes into debt, and the caller waits until the debt is paid. So
    callers are served in the order in which they came, and small amounts cannot overtake a large one for ever.
    One tenth of the amount may pass at once and the rest flows evenly. If the bucket could fill up to the whole amount,
    twice as much could pass in the minute after a rest.
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
        """Return what was taken and not used; a negative amount was used in addition."""
        if not self._unlimited:
            with self._lock:
                self._level = min(self._level + amount, self._burst)


class CircuitBreaker:
    """Stops requests to a model that keeps failing. Thread-safe.

    After `failures` failures in a row the circuit is open: no request is sent for `pause` seconds. Then one request
    probes the model. Every probe that fails doubles the pause, up to `pause_max` seconds. Any success closes the
    circuit. With 0 failures it never opens.
    """

    def __init__(self, failures: int, pause: float, pause_max: float) -> None:
        self._failures, self._pause_min, self._pause_max = failures, pause, pause_max
        self._pause = pause
        self._in_row = 0
        self._open_until = 0.0
        self._probing = False
        self._lock = threading.Lock()
        self.last_error = ""  # of the last failed request

    def delay(self, now: float) -> float:
        """Seconds until a request may be sent; 0 lets the caller send one now."""
        with self._lock:
            if not self._failures or self._in_row < self._failures:
                return 0.0
            if now < self._open_until:
                return self._open_until - now
            self._probing = True  # this caller probes; the others wait for the result
            self._open_until = now + self._pause
            return 0.0

    def record_success(self) -> None:
        """The model, or its provider, has answered."""
        with self._lock:
            self._in_row, self._pause, self._probing = 0, self._pause_min, False

    def record_failure(self, error: str, now: float) -> None:
        """A request has failed because of the model or its provider."""
        with self._lock:
            self.last_error = error
            self._in_row += 1
            if self._in_row == self._failures or self._probing:
                self._probing = False
                self._open_until = now + self._pause
                self._pause = min(2 * self._pause, self._pause_max)
