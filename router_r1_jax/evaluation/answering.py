"""Batched answering: a policy answers questions batch by batch, resumes from the episode cache, and gives records."""

from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.evaluation.episode_cache import EpisodeCache
from router_r1_jax.evaluation.episode_records import Record, make_records
from router_r1_jax.reward import CostNormalizer
from router_r1_jax.rollout import Episode
from router_r1_jax.router import Router, compute_rewards, provider_answered, questions_per_batch


class SamplingParams(NamedTuple):
    """How an evaluation samples: episodes per question, their temperature, and the number of the random stream."""

    name: str
    num_generations: int
    temperature: float
    stream: int


GREEDY = SamplingParams("greedy", 1, 0.0, 1)


def answer_questions(
    router: Router,
    questions: Sequence[QuestionRecord],
    *,
    sampling: SamplingParams = GREEDY,
    step: int,
    split: str,
    policy: str,
    normalizer: CostNormalizer,
    cache: EpisodeCache | None = None,
    progress: bool = False,
) -> list[Record]:
    """Records of the answers that the router gives with its present weights; by default one greedy answer per question.

    Questions go in batches of `questions_per_batch`; the candidates are drawn anew for each batch.

    Args:
      step: training step that prices belong to.
      policy: name of the policy in the records and in the progress bar.
      normalizer: cost window for the rewards; the costs enter it in order.
      cache: its episodes are not sampled again, and it takes every newly sampled episode as soon as it is finished. An
        episode in which a provider failed is not kept, so that it is asked again.
      progress: show a progress bar.

    Raises:
      PoolError: most calls of a batch failed at their provider.
    """
    config, records = router.config, []
    batch_size = questions_per_batch(config, sampling.num_generations)
    total = len(questions) * sampling.num_generations
    with tqdm(total=total, desc=policy, unit="episode", dynamic_ncols=True, disable=not progress) as bar:
        for start in range(0, len(questions), batch_size):
            finished = cache.finished(start) if cache is not None else {}
            bar.update(len(finished))

            def keep(episode: Episode, start: int = start) -> None:
                if cache is not None and provider_answered(episode):
                    cache.add(start, episode)
                bar.update()

            batch = router.answer(
                questions[start : start + batch_size],
                num_generations=sampling.num_generations,
                temperature=sampling.temperature,
                seed=(config.seed, 0, sampling.stream, start),
                step=step,
                split=split,
                on_finish=keep,
                finished=finished,
            )
            rewards = compute_rewards(batch, config.reward, normalizer)
            records += make_records(batch, rewards, step=step, split=split, policy=policy)
    return records
