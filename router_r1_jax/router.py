"""The router at work: questions in, scored-ready episodes out.

Joins prompt text, the sampling engine and the pool. Training and evaluation both ask it, with their own parameters. Of
several processes each samples its share of the questions on its own devices, and has all episodes at the end.
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

from router_r1_jax import hosts, prompts
from router_r1_jax.config import ConfigError
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.model import ModelConfig, Params
from router_r1_jax.pool.cards import Card, at_step, roster, roster_settings
from router_r1_jax.pool.outcomes import PoolError, provider_fault
from router_r1_jax.pool.pool import Pool
from router_r1_jax.reward import episode_cost
from router_r1_jax.rollout import (
    Engine,
    Episode,
    Manners,
    Prompt,
    RolloutStats,
    Spread,
    common_prefix,
    joined,
    make_cut,
    make_limits,
)

# A rollout of which more calls than this failed at the provider teaches nothing and costs money: the run stops.
MAX_FAILED_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Answers:
    """Episodes of one rollout, `group` in a row per question, and what they were shown.

    Attributes:
      questions: [B] the question of each episode.
      episodes: [B].
      group: episodes per question.
      roster: the cards in the prompt's order, under the names it shows.
      prefix_length: tokens that all prompts share.
      stats: of the rollout; None where no episode was left to sample.
      valid: [B] bool, False where a provider failed: such an episode is nobody's fault and teaches nothing.
    """

    questions: list[QuestionRecord]
    episodes: list[Episode]
    group: int
    roster: tuple[Card, ...]
    prefix_length: int
    valid: np.ndarray
    stats: RolloutStats | None

    @property
    def groups(self) -> np.ndarray:
        """[B] int, equal for episodes of the same question."""
        return np.arange(len(self.episodes)) // self.group

    def weights(self, pool: ConfigDict) -> np.ndarray:
        """[B], factors of the episodes' advantages: 1, or `pool.fault_weight` where a provider failed."""
        return np.where(self.valid, 1.0, pool.fault_weight)

    def take(self, episodes: np.ndarray) -> "Answers":
        """Some whole groups, by the numbers of their episodes."""
        return dataclasses.replace(
            self, questions=[self.questions[i] for i in episodes], episodes=[self.episodes[i] for i in episodes],
            valid=self.valid[episodes],
        )  # fmt: skip

    def raw_costs(self, reward: ConfigDict) -> np.ndarray:
        """[B] raw costs of the kind and unit that `config.reward` chooses."""
        return np.array(
            [episode_cost(reward.cost, e.replies, int(sum(e.sampled)), reward.router_price) for e in self.episodes]
        )


def join_answers(parts: Sequence[Answers]) -> Answers:
    """Answers of one roster, one after the other; the telemetry is the first's."""
    return dataclasses.replace(
        parts[0],
        questions=[question for part in parts for question in part.questions],
        episodes=[episode for part in parts for episode in part.episodes],
        prefix_length=min(part.prefix_length for part in parts),
        valid=np.concatenate([part.valid for part in parts]),
    )


class Router:
    """Asks the router questions. Parameters are pushed to the engine's devices with `push`.

    `template` is the text of the prompt's template.
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
        """`mesh` is the learner's, from which parameters come. Nothing is compiled before the first question.

        Raises ConfigError where there are too few devices, or turns are too long for the driver.
        """
        self._config, self._tokenizer, self._cards, self._pool = config, tokenizer, tuple(cards), pool
        self.template = prompts.load_template(config.prompt.template)
        r = config.rollout
        devices = jax.local_devices()
        wanted = r.replicas * r.tensor or len(devices)
        if wanted > len(devices) or len(devices) % r.tensor:
            raise ConfigError(
                f"rollout.replicas is {r.replicas} and rollout.tensor {r.tensor}; each replica takes rollout.tensor "
                f"devices, of which this process has {len(devices)}, a multiple of rollout.tensor"
            )
        try:
            limits = make_limits(r, config.prompt.question_tokens)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._engine = Engine(
            model,
            limits,
            tokenizer,
            make_manners(config, replicas=wanted // r.tensor),
            driver=r.driver,
            devices=devices[:wanted],
            tensor=r.tensor,
        )
        self._cut = make_cut(r)
        self._spread = Spread(model, mesh, r.tensor)

    def push(self, params: Params) -> dict[str, float]:
        """Take stacked parameters from the learner's mesh to the rollout's devices, adapters merged.

        Returns metrics: `push_seconds`, and `push_bytes` that devices (of all processes) received from other devices.
        """
        started = time.monotonic()
        self._engine.push(self._spread(params))
        return {"push_seconds": time.monotonic() - started, "push_bytes": self._spread.nbytes}

    def stop(self) -> None:
        """End the rollout that another thread has under way, if there is one."""
        self._engine.stop()

    def show(self, cards: Sequence[Card]) -> None:
        """From now on prompts show these cards, and calls are taken and charged by them."""
        self._cards = tuple(cards)

    def roster(self, *seed: int) -> tuple[Card, ...]:
        """The cards as one batch of prompts shows them: drawn, shuffled and renamed as the configuration says."""
        return roster(self._cards, np.random.default_rng(seed), **roster_settings(self._config.pool))

    def prompt_ids(self, question: str, cards: Sequence[Card]) -> tuple[int, ...]:
        """Token ids of a question's whole prompt."""
        prompt = self._config.prompt
        text = prompts.render(self.template, cards, question, self._config.rollout.max_calls)
        return tuple(prompts.encode(self._tokenizer, text, system=prompt.system, thinking=prompt.thinking))

    def answer(
        self,
        questions: Sequence[QuestionRecord],
        *,
        group: int,
        temperature: float,
        seed: tuple[int, ...],
        step: int,
        split: str,
        roster_seed: tuple[int, ...] | None = None,
        on_finish: Callable[[Episode], None] | None = None,
        finished: Mapping[int, Episode] | None = None,
    ) -> Answers:
        """Sample `group` episodes per question.

        `seed` decides every draw and, where no `roster_seed` does, the roster. `finished` are episodes by number that
        an interrupted call of the same arguments has finished: they are not sampled again, and the others become what
        they would have been with them. `on_finish` is called with every episode that is sampled, one at a time, in
        another thread. Raises PoolError where most calls failed at their provider.
        """
        cards = at_step(self.roster(*(seed if roster_seed is None else roster_seed)), step)
        finished = finished or {}
        repeated = [question for question in questions for _ in range(group)]
        ids = [self.prompt_ids(question.question, cards) for question in questions]
        shared = self._shared_tokens(ids, cards)  # of all prompts, whichever are left
        mine = [i for i in range(len(repeated)) if hosts.is_mine(i // group)]  # whole groups
        kept = [finished[i] for i in mine if i in finished]
        asked = [Prompt(i, ids[i // group]) for i in mine if i not in finished]
        name = "-".join(map(str, (split, *seed)))

        def respond(route: str, *, episode: int, call: int) -> Future:
            return self._pool.respond(
                route, cards=cards, episode=f"{name}-{episode}", call=call, step=step, split=split
            )

        def sample() -> tuple[list[Episode], list[RolloutStats]]:
            if not asked:  # all are finished, or there are fewer questions than processes
                return kept, []
            episodes, stats = self._engine.run(
                asked, respond, temperature=temperature, cut=self._cut, seed=_draw_seed(seed), prefix_tokens=shared,
                on_finish=on_finish,
            )  # fmt: skip
            read = stats.prefix_tokens + stats.fed_tokens
            self._pool.note_router(step=step, split=split, read_tokens=read, sampled_tokens=stats.decoded_tokens)
            return kept + episodes, [stats]

        parts = hosts.together(sample)
        episodes = sorted((e for part, _ in parts for e in part), key=lambda episode: episode.id)
        all_stats = [s for _, part in parts for s in part]
        stats = joined(all_stats) if all_stats else None
        valid = np.array([is_valid(episode) for episode in episodes])
        hosts.together(lambda: self._refuse_outage(episodes))
        return Answers(repeated, episodes, group, cards, shared, valid, stats)

    def _shared_tokens(self, prompts: Sequence[tuple[int, ...]], cards: Sequence[Card]) -> int:
        """Tokens that the prompts of any questions share on these cards; fewer where a tokenizer joins across them.

        Not what these happen to share: questions that begin alike would make prefixes of another length.
        """
        probes = [self.prompt_ids(question, cards) for question in ("0", "Why")]
        return common_prefix([*prompts, *probes])

    def _refuse_outage(self, episodes: Sequence[Episode]) -> None:
        replies = [reply for episode in episodes for reply in episode.replies]
        failed = [reply for reply in replies if provider_fault(reply.outcome)]
        if len(failed) > MAX_FAILED_SHARE * len(replies):
            last = failed[-1]
            raise PoolError(
                f"{len(failed)} of {len(replies)} calls failed at their provider (the last one: model {last.model!r}, "
                f"{last.outcome}, {last.error}); see ledger.jsonl, mend the provider and run the same command again"
            )


def batch_size(config: ConfigDict, group: int = 1) -> int:
    """Questions that share a roster: as many as fill a training step, with `group` episodes each.

    Where a roster is a draw of cards or names, only as many as in a training step: an evaluation then sees many.
    """
    if config.pool.shown or config.pool.rename:
        return config.rollout.questions
    return max(1, config.rollout.questions * config.rollout.group // group)


def is_valid(episode: Episode) -> bool:
    """Whether every call of the episode was answered: False where a provider failed, which is nobody's fault."""
    return episode.stop != "no_reply" and not any(provider_fault(reply.outcome) for reply in episode.replies)


def make_manners(config: ConfigDict, *, replicas: int) -> Manners:
    """What the rollout allows. A reply is lost when the pool, at its slowest, must have given it up."""
    r, pool = config.rollout, config.pool
    concurrency = min((p.concurrency or pool.concurrency for p in pool.providers), default=pool.concurrency)
    turns = -(-r.slots * replicas // concurrency) + 1  # calls that wait for a free connection wait so many deadlines
    return Manners(
        max_calls=r.max_calls,
        reply_tokens=r.reply_tokens,
        episode_seconds=r.max_episode_seconds or float("inf"),
        reply_seconds=turns * pool.deadline,
    )


def _draw_seed(seed: tuple[int, ...]) -> int:
    """One number from several, so that every rollout of a run draws from a stream of its own."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
