"""Work queue that the replicas of one run share: prompts to begin, finished episodes, and the first error."""

import threading
from collections import deque
from collections.abc import Callable, Sequence

from router_r1_jax.rollout.episode import Episode, Prompt


class WorkQueue:
    """Used from the thread of each replica and, to stop the run, from the main thread."""

    def __init__(
        self, prompts: Sequence[Prompt], *, replicas: int = 1, on_finish: Callable[[Episode], None] | None = None
    ) -> None:
        """`on_finish` is called with every finished episode, one at a time, in a replica's thread."""
        self._pending = deque(prompts)
        self._active = 0
        self._replicas = replicas
        self._on_finish = on_finish
        self._lock = threading.Lock()
        self.finished: list[Episode] = []
        self.error: BaseException | None = None

    @property
    def empty(self) -> bool:
        """Whether every prompt has been taken."""
        return not self._pending

    def can_take(self, occupied: int) -> bool:
        """Whether `take` would give a prompt now."""
        share = -(-(len(self._pending) + self._active) // self._replicas)
        return bool(self._pending) and occupied < share

    def take(self, occupied: int) -> Prompt | None:
        """The next prompt for a replica that has `occupied` rows, or None.

        A replica takes no more than its share of the unfinished episodes. If one replica is slow, its share shrinks as
        the others finish theirs.
        """
        with self._lock:
            if not self.can_take(occupied):
                return None
            self._active += 1
            return self._pending.popleft()

    def finish(self, episode: Episode) -> None:
        """Keep a finished episode."""
        with self._lock:
            self._active -= 1
            self.finished.append(episode)
            if self._on_finish is not None:
                self._on_finish(episode)

    def fail(self, error: BaseException) -> None:
        """End the run with this error, if it is the first. Every replica then leaves its loop."""
        self.error = self.error or error
