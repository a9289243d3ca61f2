"""Run state: what a run carries from step to step, and how a checkpoint keeps and restores it (exact resume).

A checkpoint holds the parameters, the optimizer state, and the host state as JSON: place in the data, cost windows,
ledger sums, alarms. The host state is recorded when a step's rollouts are complete, so a step that is interrupted
leaves no trace in a checkpoint.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from tqdm import tqdm

from router_r1_jax.config import config_hash
from router_r1_jax.data.questions import QuestionIterator
from router_r1_jax.distributed import multihost
from router_r1_jax.learner import TrainState
from router_r1_jax.reward import CostNormalizer
from router_r1_jax.setup.session import Session
from router_r1_jax.storage.checkpoint import CheckpointStore
from router_r1_jax.training.alarms import Alarms


@dataclasses.dataclass
class RunState:
    """The state of a run.

    Attributes:
      state: parameters and optimizer state after `step` updates.
      first_cost_window: the cost window after the first rollout; validation is judged by it.
      host_state: what a checkpoint of `step` holds beside the arrays.
      synced_step: step of the parameters that the rollout has; -1 for none.
      sync_metrics: metrics of the last weight sync.
    """

    session: Session
    iterator: QuestionIterator
    normalizer: CostNormalizer
    alarms: Alarms
    state: TrainState | None = None
    step: int = 0
    first_cost_window: dict[str, Any] | None = None
    host_state: dict[str, Any] = dataclasses.field(default_factory=dict)
    saved_step: int = -1
    synced_step: int = -1
    sync_metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def record_host_state(self) -> dict[str, Any]:
        """The host state after the rollouts that were collected last."""
        return {
            "data": self.iterator.state(),
            "cost_window": self.normalizer.state(),
            "first_cost_window": self.first_cost_window,
            "pools": self.session.pool_states(),
            "config": config_hash(self.session.config),
        }

    def advance(self, state: TrainState, step: int, host_state: dict[str, Any]) -> None:
        """Take the state after `step` updates, and the host state that was recorded after the step's rollouts."""
        self.state, self.step, self.host_state = state, step, host_state | {"alarms": self.alarms.state()}

    def sync_weights(self) -> None:
        """Copy the present parameters to the rollout's devices, unless they are there."""
        if self.synced_step != self.step:
            self.sync_metrics = self.session.router.sync_weights(self.state.params)
            self.synced_step = self.step

    def check_alarms(self, metrics: dict[str, Any]) -> dict[str, float]:
        """The alarms of this step's metrics. Alarms that begin or end are printed."""
        alarms, lines = self.alarms.check(metrics)
        for line in lines if multihost.is_primary() else []:
            tqdm.write(f"step {self.step}: {line}")
        self.host_state["alarms"] = self.alarms.state()
        return alarms

    def update_ledger_sums(self) -> None:
        """Record the ledger's sums again: the calls of a validation belong to the step that it follows."""
        self.host_state["pools"] = self.session.pool_states()

    def save(self, store: CheckpointStore, metric: float | None) -> None:
        """Write a checkpoint of this step; `metric` is its validation reward, None if it was not validated."""
        train = _train_tree(self.state)
        store.save(self.step, params=self.state.params, train=train, run=self.host_state, metric=metric)
        self.saved_step = self.step

    def restore(self, store: CheckpointStore, step: int, abstract: TrainState) -> None:
        """Become the run that checkpoint `step` holds."""
        saved = store.restore(step, params=abstract.params, train=_train_tree(abstract), run=None)
        host = saved["run"]
        if host["config"] != config_hash(self.session.config):
            multihost.log_primary(
                f"note: step {step} was made with another configuration; going on with the present one"
            )
        self.iterator.restore(host["data"])
        self.normalizer.restore(host["cost_window"])
        self.first_cost_window = host["first_cost_window"]
        self.session.restore_pools(host["pools"], step)
        self.alarms.restore(host["alarms"])
        self.advance(TrainState(saved["params"], **saved["train"]), step, self.record_host_state())
        self.saved_step = step

    @contextmanager
    def saved_on_error(self, store: CheckpointStore) -> Iterator[None]:
        """Save the last whole step if anything ends the block: an error, Ctrl-C, a failing pool.

        A process that fails alone cannot save: either all processes write a checkpoint, or none does.
        """
        try:
            yield
        except BaseException:
            whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))  # else cut inside an update
            if self.step > self.saved_step and whole and multihost.all_can_act():
                self.save(store, None)
                store.wait()
                multihost.log_primary(f"\nstopped; step {self.step} is kept in {store.directory}")
            raise


def _train_tree(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state beside its parameters."""
    return {"opt_state": state.opt_state, "step": state.step} | ({"critic": state.critic} if state.critic else {})
