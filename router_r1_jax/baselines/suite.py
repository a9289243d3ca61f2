"""The suite of baselines by name: how each of them is made, fitted on train questions, and measured on questions."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from router_r1_jax.baselines import model_calls, router_lm, simple_routers
from router_r1_jax.baselines.base import Baseline, Example
from router_r1_jax.baselines.cascade import Cascade
from router_r1_jax.baselines.decompose import Decompose, by_model
from router_r1_jax.baselines.features import RouterFeatures
from router_r1_jax.baselines.graph_router import GraphRouter
from router_r1_jax.baselines.router_dc import RouterDC
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.evaluation.answering import answer_questions
from router_r1_jax.evaluation.cache_key import records_key
from router_r1_jax.evaluation.episode_records import Record, make_records
from router_r1_jax.model import Params, add_adapters
from router_r1_jax.pool.outcomes import PoolError, provider_fault
from router_r1_jax.reward import CostNormalizer, make_normalizer
from router_r1_jax.router import RolloutBatch, compute_rewards, provider_answered
from router_r1_jax.setup.policy_weights import fingerprint, first_cost_window
from router_r1_jax.setup.session import Session
from router_r1_jax.storage.checkpoint import CheckpointStore
from router_r1_jax.storage.metrics_writer import MetricsWriter, import_extra
from router_r1_jax.training.warmstart import warm_start

INSTRUCTIONS = {"direct": router_lm.DIRECT, "chain of thought": router_lm.CHAIN_OF_THOUGHT}
LANGUAGE_MODEL = (*INSTRUCTIONS, "prompt only", "fine-tuned")  # baselines that are the router's language model
ORACLE = "oracle of one call"
STAR = "*"  # behind the name of a single-call baseline: the question is decomposed first


class BaselineSuite:
    """Measures baselines in one session. What several baselines need is made once, when it is first used."""

    def __init__(self, config: ConfigDict, session: Session, tries: int) -> None:
        """`tries`: train questions that every model answers, for the baselines to be fitted on."""
        self.config, self.session, self.tries = config, session, tries
        self._checkpoints = session.workdir / "checkpoints"
        # The router's costs are scored by this window, so the baselines' costs are too.
        self._cost_window = first_cost_window(self._checkpoints) if self._checkpoints.exists() else None
        self._fitted: dict[str, Baseline] = {}

    @property
    def makers(self) -> dict[str, Callable[[], Baseline]]:
        """Name of a single-call baseline -> how it is made from the session's present cards."""
        session, alpha, seed = self.session, self.config.reward.alpha, self.config.seed
        cards = session.cards
        return {
            "random": lambda: simple_routers.RandomModel(seed),
            **{f"{card.key} alone": lambda card=card: simple_routers.SingleModel(card.key) for card in cards},
            "largest": lambda: simple_routers.SingleModel(simple_routers.largest(cards).key),
            "knn": lambda: simple_routers.KNNRouter(alpha),
            "mlp": lambda: simple_routers.MLPRouter(alpha, seed),
            "classifier": lambda: simple_routers.LinearClassifier(
                alpha, make_features=lambda _: RouterFeatures(session.model, self.params, session.tokenizer)
            ),
            "routerdc": lambda: RouterDC(alpha, seed),
            "graphrouter": lambda: GraphRouter(cards, alpha, seed),
            "cascade": lambda: Cascade(cards, alpha),
        }

    @property
    def names(self) -> list[str]:
        """All baselines, as --only and the table name them."""
        single = list(self.makers)
        return [*LANGUAGE_MODEL[:2], *single, ORACLE, *(name + STAR for name in single), *LANGUAGE_MODEL[2:]]

    @cached_property
    def params(self) -> Params:
        """The router's parameters before RL: the run's first checkpoint, or else a new warm start."""
        session = self.session
        if self._checkpoints.exists():
            with CheckpointStore(self._checkpoints, keep=None) as store:
                if (first := store.first()) is not None:
                    return store.restore(first, params=session.abstract_params)["params"]
        writer = MetricsWriter(session.workdir / "baselines")
        params = add_adapters(session.model, warm_start(session, writer), session.mesh, self.config.seed)
        writer.close()
        return params

    @cached_property
    def examples(self) -> list[Example]:
        """Random train questions, answered by every model. If a provider failed, the question is left out."""
        questions = self.session.questions("train")
        order = np.random.default_rng(self.config.seed).permutation(len(questions))[: self.tries]
        print(f"trying {len(self.session.cards)} models on {len(order)} train questions")
        tried = self._try_all_models([questions[i] for i in order], "train", "trying all models")
        failed = [[t.reply for t in e.trials.values() if provider_fault(t.reply.outcome)] for e in tried]
        examples = [example for example, replies in zip(tried, failed, strict=True) if not replies]
        print(f"{len(tried) - len(examples)} of them left out: a provider failed")
        if not examples:
            causes = Counter(f"{r.model} {r.outcome} ({r.error})" for replies in failed for r in replies)
            (cause, count), *_ = causes.most_common()
            raise PoolError(
                f"each of the {len(tried)} train questions to fit on failed at a provider, {count} at {cause}; "
                "python -m router_r1_jax.pool.check asks each model, correct what does not answer and run again"
            )
        return examples

    def fitted(self, name: str) -> Baseline:
        """The single-call baseline of this name, ready to choose models.

        Raises MissingExtraError if it needs scikit-learn and that is not installed.
        """
        if name not in self._fitted:
            baseline = self.makers[name]()
            if not isinstance(baseline, (simple_routers.RandomModel, simple_routers.SingleModel)):
                import_extra("sklearn", "baselines", f"baseline {name!r} needs scikit-learn")  # before tries are paid
                baseline.fit(self.examples)
            self._fitted[name] = baseline
        return self._fitted[name]

    def measure(self, name: str, questions: Sequence[QuestionRecord]) -> list[Record]:
        """One record per question, of the baseline of this name."""
        session, split = self.session, self.config.evaluation.split
        if name in LANGUAGE_MODEL:
            return self._measure_language_model(name, questions)
        if name == ORACLE:
            episodes = model_calls.oracle_episodes(self._try_all_models(questions, split, name), session.cards)
        else:
            baseline = self.fitted(name.removesuffix(STAR))
            decompose = self._decompose() if name.endswith(STAR) else None
            running = model_calls.run_baseline(
                session.pool, session.cards, baseline, questions, split=split, name=name, decompose=decompose
            )
            episodes = list(_progress(running, name, len(questions)))
        valid = np.array([provider_answered(episode) for episode in episodes])
        batch = RolloutBatch(questions, episodes, 1, session.cards, 0, valid, None)
        rewards = compute_rewards(batch, self.config.reward, self._normalizer())
        return make_records(batch, rewards, step=0, split=split, policy=name)

    def key(self, name: str, questions: Sequence[QuestionRecord]) -> dict[str, Any]:
        """Everything that the records of this baseline depend on."""
        config = self.config
        uses_params = name in LANGUAGE_MODEL or name.removesuffix(STAR) == "classifier"
        weights = fingerprint(self.params) if uses_params else ""
        fitting = {
            "data": config.data.to_dict(),
            "world": config.synthetic.world.to_dict(),
            "tries": self.tries,
            "steps": config.steps,
            "temperature": config.rollout.temperature,
            "learner": config.learner.to_dict(),
            "cost_window": self._cost_window,
        }
        return records_key(config, self.session.cards, questions, weights) | fitting

    def _measure_language_model(self, name: str, questions: Sequence[QuestionRecord]) -> list[Record]:
        config, session, params = self.config, self.session, self.params
        router = session.router
        if name in INSTRUCTIONS:
            router = router_lm.PoolFreeRouter(session, INSTRUCTIONS[name])
        elif name == "fine-tuned":
            params = router_lm.fine_tune(config, session, params)
        router.sync_weights(params)
        return answer_questions(
            router,
            questions,
            step=0,
            split=config.evaluation.split,
            policy=name,
            normalizer=self._normalizer(),
            progress=True,
        )

    def _normalizer(self) -> CostNormalizer:
        return make_normalizer(self.config.reward.window, frozen=self._cost_window)

    def _decompose(self) -> Decompose:
        environment = self.session.environment
        return environment.decompose if environment else by_model(simple_routers.largest(self.session.cards))

    def _try_all_models(self, questions: Sequence[QuestionRecord], split: str, label: str) -> list[Example]:
        tried = model_calls.try_all_models(self.session.pool, self.session.cards, questions, split=split)
        return list(_progress(tried, label, len(questions)))


def _progress(items: Iterable[Any], label: str, total: int) -> tqdm:
    return tqdm(items, total=total, desc=label, unit="question", dynamic_ncols=True)
