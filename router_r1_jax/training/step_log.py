"""The log of a training run: a step's metrics, its episodes, and the timeline of its rollout, as files."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.distributed import multihost
from router_r1_jax.evaluation.episode_records import Record, make_records, summarise
from router_r1_jax.router import RolloutBatch, concat_batches
from router_r1_jax.setup.session import Session
from router_r1_jax.storage.json_lines import EPISODES_FOLDER, JsonLines, replace_file, up_to_step
from router_r1_jax.storage.metrics_writer import MetricsWriter
from router_r1_jax.training.rollouts import Round

TIMELINE_FILE = "rollout.json"


@contextmanager
def open_log(
    config: ConfigDict, workdir: Path, resume_step: int | None
) -> Iterator[tuple[MetricsWriter | multihost.NullWriter, JsonLines | multihost.NullWriter]]:
    """Write config.json; open metrics.jsonl and episodes/train.jsonl. Process 0 writes, the others write nothing."""
    if not multihost.is_primary():
        yield multihost.NullWriter(), multihost.NullWriter()
        return
    settings = json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n"
    replace_file(workdir / "config.json", settings.encode())
    c, episodes_file = config.logging, workdir / EPISODES_FOLDER / "train.jsonl"
    with (
        closing(MetricsWriter(workdir, tensorboard=c.tensorboard, wandb=c.wandb, resume_step=resume_step)) as metrics,
        closing(JsonLines(episodes_file, keep=up_to_step(resume_step))) as episodes,
    ):
        yield metrics, episodes


def rollout_metrics(session: Session, rounds: Sequence[Round], step: int) -> tuple[list[Record], dict[str, Any]]:
    """Records of all episodes of a step, and the metrics of its rollouts.

    Times are seconds, money is dollars. The telemetry is that of the first round.
    """
    records = [
        record
        for rollouts, rewards in rounds
        for record in make_records(rollouts, rewards, step=step, split="train", policy="training")
    ]
    rollouts = concat_batches([one.rollouts for one in rounds])
    stats, stops = rollouts.stats, Counter(episode.stop for episode in rollouts.episodes)
    return records, summarise(records, session.cards) | {
        "sampling_rounds": len(rounds),
        "failed_episodes": int(np.sum(~rollouts.valid)),
        "response_tokens": float(np.mean([len(e.tokens) for e in rollouts.episodes])),
        "tokens_per_second": stats.decoded_tokens / stats.seconds,
        "call_cache_hit_rate": _hit_rate(rollouts),
        "spent_dollars": session.spent,
        **{f"stops/{reason}": count / len(rollouts.episodes) for reason, count in stops.items()},
        **{f"rollout/{name}": value for name, value in stats.metrics().items()},
    }


def _hit_rate(rollouts: RolloutBatch) -> float:
    """Of the calls that reached a model, the share answered by the call cache or by another row's request."""
    hits = [reply.hit for episode in rollouts.episodes for reply in episode.replies if reply.model]
    return float(np.mean(hits)) if hits else 0.0


def write_timeline(workdir: Path, rollouts: RolloutBatch, step: int) -> None:
    """Write the timeline of every row in a step's rollout (decode, wait, prefill), for the plot."""
    if multihost.is_primary():
        s = rollouts.stats
        timeline = {"step": step, "seconds": s.seconds, "rows": s.rows, "idle_share": s.idle_share, "spans": s.spans}
        replace_file(workdir / TIMELINE_FILE, json.dumps(timeline).encode())
