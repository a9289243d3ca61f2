"""The router policy at work: prompts, the sampling engine and the pool joined; questions in, rollout batches out.

Training and evaluation use the same `Router`, each with its own parameters. If the run has several processes, each
samples its share of the questions on its own devices, and all of them have all episodes at the end.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from router_r1_jax import prompts, rollout
from router_r1_jax.config import ConfigError
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.distributed import multihost
from router_r1_jax.model import ModelConfig, Params
from router_r1_jax.pool.cards import Card, at_step, draw_candidates, route_names
from router_r1_jax.pool.outcomes import PoolError, provider_fault
from router_r1_jax.pool.pool import Pool
from router_r1_jax.reward import CostNormalizer, Rewards, episode_cost, score
from router_r1_jax.rollout import Episode, RolloutStats

# If more than this share of a rollout's calls fail at the provider, the run stops: it teaches nothing and costs money.
MAX_FAILED_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """The episodes of one rollout, `num_generations` in a row per question, and what their prompts showed.

    Attributes:
      questions: [B] the question of each episode.
      episodes: [B].
      num_generations: episodes per question; they form a group.
      candidates: the cards in the prompt's order, under the names that the prompt shows.
      prefix_length: tokens that all prompts share.
      valid: [B] bool, False if a provider failed. Such an episode teaches nothing: nobody's choice caused the failure.
      stats: telemetry of the rollout; None if no episode was left to sample.
    """

    questions: Sequence[QuestionRecord]
    episodes: Sequence[Episode]
    num_generations: int
    candidates: tuple[Card, ...]
    prefix_length: int
    valid: np.ndarray
    stats: RolloutStats | None

    @property
    def groups(self) -> np.ndarray:
        """[B] int, equal for episodes of the same question."""
        return np.arange(len(self.episodes)) // self.num_generations

    def weights(self, pool: ConfigDict) -> np.ndarray:
        """[B] factors of the episodes' advantages: 1, or `pool.fault_weight` if a provider failed."""
        return np.where(self.valid, 1.0, pool.fault_weight)

    def take(self, indices: np.ndarray) -> "RolloutBatch":
        """The episodes with these indices, which form whole groups."""
        questions, episodes = ([items[i] for i in indices] for items in (self.questions, self.episodes))
        return dataclasses.replace(self, questions=questions, episodes=episodes, valid=self.valid[indices])


def concat_batches(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """Batches with the same candidates, one after the other; the telemetry is the first one's."""
    return dataclasses.replace(
        batches[0],
        questions=[question for batch in batches for question in batch.questions],
        episodes=[episode for batch in batches for episode in batch.episodes],
        prefix_length=min(batch.prefix_length for batch in batches),
        valid=np.concatenate([batch.valid for batch in batches]),
    )


def compute_rewards(batch: RolloutBatch, reward: ConfigDict, normalizer: CostNormalizer) -> Rewards:
    """Rewards as `config.reward` asks for them. Valid costs enter the normaliser's window in the episodes' order."""
    costs = [episode_cost(reward.cost, e.replies, int(sum(e.sampled)), reward.router_price) for e in batch.episodes]
    return score(
        [episode.text for episode in batch.episodes],
        [question.golds for question in batch.questions],
        np.array(costs),
        route_names(batch.candidates),
        preset=reward.preset,
        alpha=reward.alpha,
        metric=reward.metric,
        normalizer=normalizer,
        groups=batch.groups,
        valid=batch.valid,
    )


class Router:
    """Samples episodes: it renders prompts, runs the engine, and lets the pool answer the calls.

    Attributes:
      config: the run's configuration.
      tokenizer: of the language model.
      cards: the models that prompts show; calls are accepted and charged by them. May be replaced between rollouts.
      template: text of the prompt template.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        cards: Sequence[Card],
        pool: Pool,
        mesh: Mesh,
    ) -> None:
        """`mesh` is the learner's mesh, from which parameters come. Nothing is compiled before the first question.

        Raises ConfigError if there are too few devices, or if turns are too long for the driver.
        """
        self.config, self.tokenizer, self.cards, self._pool = config, tokenizer, tuple(cards), pool
        self.template = prompts.load_template(config.prompt.template)
        r, devices = config.rollout, jax.local_devices()
        wanted = r.replicas * r.tensor or len(devices)
        if wanted > len(devices) or len(devices) % r.tensor:
            raise ConfigError(
                f"rollout.replicas is {r.replicas} and rollout.tensor {r.tensor}; each replica takes rollout.tensor "
                f"devices, of which this process has {len(devices)}, a multiple of rollout.tensor"
            )
        shapes = rollout.static_shapes(r, config.prompt.question_tokens)
        limits = episode_limits(config, replicas=wanted // r.tensor)
        self._engine = rollout.Engine(
            model, shapes, tokenizer, limits, driver=r.driver, devices=devices[:wanted], tensor=r.tensor
        )
        self._truncation = rollout.make_truncation(r)
        self._weight_sync = rollout.WeightSync(model, mesh, r.tensor)

    def sync_weights(self, params: Params) -> dict[str, float]:
        """Copy stacked parameters from the learner's mesh to the rollout's devices, with LoRA adapters merged.

        Returns metrics: `weight_sync_seconds`, and `weight_sync_bytes` that devices received from other devices, over
        all processes.
        """
        started = time.monotonic()
        self._engine.sync_weights(self._weight_sync(params))
        return {"weight_sync_seconds": time.monotonic() - started, "weight_sync_bytes": self._weight_sync.nbytes}

    def stop(self) -> None:
        """End the rollout that another thread is running, if there is one."""
        self._engine.stop()

    def draw_candidates(self, *seed: int) -> tuple[Card, ...]:
        """The cards as one batch of prompts shows them: selected, shuffled and renamed as the configuration says."""
        return draw_candidates(self.cards, np.random.default_rng(seed), self.config.pool)

    def prompt_ids(self, question: str, cards: Sequence[Card]) -> tuple[int, ...]:
        """Token ids of a question's whole prompt."""
        prompt = self.config.prompt
        text = prompts.render(self.template, cards, question, self.config.rollout.max_calls)
        return tuple(prompts.encode(self.tokenizer, text, system=prompt.system, thinking=prompt.thinking))

    def answer(
        self,
        questions: Sequence[QuestionRecord],
        *,
        num_generations: int,
        temperature: float,
        seed: tuple[int, ...],
        step: int,
        split: str,
        candidates_seed: tuple[int, ...] | None = None,
        on_finish: Callable[[Episode], None] | None = None,
        finished: Mapping[int, Episode] | None = None,
    ) -> RolloutBatch:
        """Sample `num_generations` episodes per question.

        Args:
          seed: decides every random draw, and the candidates unless `candidates_seed` does.
          step: training step, for prices and the ledger.
          split: split of the questions, for the ledger.
          on_finish: called with every sampled episode, one at a time, in another thread.
          finished: episodes by index that an interrupted call with the same arguments has finished. They are not
            sampled again, and the other episodes become what they would have been.

        Raises:
          PoolError: most calls failed at their provider.
        """
        cards = at_step(self.draw_candidates(*(seed if candidates_seed is None else candidates_seed)), step)
        finished = finished or {}
        repeated = [question for question in questions for _ in range(num_generations)]
        ids = [self.prompt_ids(question.question, cards) for question in questions]
        shared = self._shared_tokens(ids, cards)  # of all prompts, also of those that are finished
        mine = [i for i in range(len(repeated)) if multihost.owns_item(i // num_generations)]  # whole groups
        kept = [finished[i] for i in mine if i in finished]
        asked = [rollout.Prompt(i, ids[i // num_generations]) for i in mine if i not in finished]
        name = "-".join(map(str, (split, *seed)))

        def respond(route: str, *, episode: int, call: int) -> Future:
            where = {"episode": f"{name}-{episode}", "call": call, "step": step, "split": split}
            return self._pool.respond(route, cards=cards, **where)

        def sample() -> tuple[list[Episode], list[RolloutStats]]:
            if not asked:  # all episodes are finished, or there are fewer questions than processes
                return kept, []
            draws = {"temperature": temperature, "truncation": self._truncation, "seed": _draw_seed(seed)}
            episodes, stats = self._engine.run(asked, respond, **draws, prefix_tokens=shared, on_finish=on_finish)
            read = stats.prefix_tokens + stats.prefilled_tokens
            self._pool.ledger.add_router(step=step, split=split, read_tokens=read, sampled_tokens=stats.decoded_tokens)
            return kept + episodes, [stats]

        parts = multihost.run_on_all(sample)
        episodes = sorted((e for part, _ in parts for e in part), key=lambda episode: episode.id)
        all_stats = [stats for _, part in parts for stats in part]
        multihost.run_on_all(lambda: _refuse_outage(episodes))
        return RolloutBatch(
            questions=repeated,
            episodes=episodes,
            num_generations=num_generations,
            candidates=cards,
            prefix_length=shared,
            valid=np.array([provider_answered(episode) for episode in episodes]),
            stats=rollout.concat_stats(all_stats) if all_stats else None,
        )

    def _shared_tokens(self, prompt_ids: Sequence[tuple[int, ...]], cards: Sequence[Card]) -> int:
        """Tokens that the prompts of any questions share on these cards.

        Two more questions are probed. Otherwise questions that happen to begin alike would lengthen the prefix, and
        every length of it compiles a program. A tokenizer that merges across the border makes it shorter.
        """
        probes = [self.prompt_ids(question, cards) for question in ("0", "Why")]
        return rollout.common_prefix([*prompt_ids, *probes])


def _refuse_outage(episodes: Sequence[Episode]) -> None:
    replies = [reply for episode in episodes for reply in episode.replies]
    failed = [reply for reply in replies if provider_fault(reply.outcome)]
    if len(failed) > MAX_FAILED_SHARE * len(replies):
        last = failed[-1]
        raise PoolError(
            f"{len(failed)} of {len(replies)} calls failed at their provider (the last one: model {last.model!r}, "
            f"{last.outcome}, {last.error}); see ledger.jsonl, mend the provider and run the same command again"
        )


def questions_per_batch(config: ConfigDict, num_generations: int = 1) -> int:
    """Questions of an evaluation batch, which share their candidates: as many as fill a training step.

    If candidates or names are drawn at random, a batch holds the questions of one training step only, so that an
    evaluation sees many draws.
    """
    if config.pool.candidates or config.pool.rename:
        return config.rollout.prompts_per_step
    return max(1, config.rollout.prompts_per_step * config.rollout.num_generations // num_generations)


def provider_answered(episode: Episode) -> bool:
    """Whether the provider answered every call of the episode. If not, the failure is not the policy's."""
    return episode.stop != "no_reply" and not any(provider_fault(reply.outcome) for reply in episode.replies)


def episode_limits(config: ConfigDict, *, replicas: int) -> rollout.EpisodeLimits:
    """The limits of an episode. A reply is lost once the pool, at its slowest, must have given it up."""
    r, pool = config.rollout, config.pool
    concurrency = min((p.concurrency or pool.concurrency for p in pool.providers), default=pool.concurrency)
    rounds = -(-r.slots * replicas // concurrency) + 1  # calls that queue for a connection wait that many deadlines
    return rollout.EpisodeLimits(
        max_calls=r.max_calls,
        reply_tokens=r.reply_tokens,
        episode_seconds=r.max_episode_seconds or float("inf"),
        reply_seconds=rounds * pool.deadline,
    )


def _draw_seed(seed: tuple[int, ...]) -> int:
    """One number from several, so that every rollout of a run draws from its own random stream."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
