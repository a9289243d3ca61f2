"""The configuration: every field with its default, its unit and its meaning, and the checks that need more than a type.

A file in `configs/` starts from `base_config()` and changes what it needs; `--config.a.b=v` changes it once more.
ml_collections refuses an unknown field and a wrong type; `validate` refuses what is well-typed and still wrong, and
says which field, which value and what to write instead.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict, config_dict

SPLITS = ("train", "validation", "test")


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the field, the value and the fix."""


def model_card(**fields: object) -> ConfigDict:
    """One external model, declared once; the prompt, the parser, the prices and the client all read this card.

    Prices are dollars per million tokens, latency is seconds (None: nobody measured it, and the prompt states none),
    performance maps a topic to a score in [0, 1].
    price_cached, for prompt tokens that the provider has cached, lowers what is spent, never what is charged: whether a
    provider remembers a prompt is not the router's doing. None: price_in.
    price_changes are (step, price_in, price_out), each valid from that training step on, for prompt and charge alike.
    `simulated` is read by the simulated server only. Shares of requests: failure_rate (HTTP 503), malformed_rate (half
    a JSON body), wrong_type_rate (a page of HTML), dropped_rate (the connection is cut). By number of request to the
    model, from 0: outage (first, end) is answered with HTTP 503; slow_start (requests, seconds) makes the first ones
    later; downgrade (first, model id) answers from there on with the skill of another model, and does not say so.
    requests_per_minute answers more with HTTP 429 and Retry-After.
    """
    card = ConfigDict(
        dict(
            name="",
            provider="",
            model="",
            price_in=0.0,
            price_out=0.0,
            price_cached=config_dict.placeholder(float),
            price_changes=(),
            latency=config_dict.placeholder(float),
            performance=ConfigDict(),
            description="",
            aliases=(),
            simulated=ConfigDict(
                dict(
                    failure_rate=0.0,
                    malformed_rate=0.0,
                    wrong_type_rate=0.0,
                    dropped_rate=0.0,
                    outage=(0, 0),
                    slow_start=(0, 0.0),
                    downgrade=(0, ""),
                    requests_per_minute=0,
                )
            ),
        )
    ).lock()
    with card.unlocked():
        card.performance.update(fields.pop("performance", {}))
    card.simulated.update(fields.pop("simulated", {}))
    card.update(fields)
    return card


def provider(**fields: object) -> ConfigDict:
    """One OpenAI-compatible endpoint. `key_env` names the environment variable that holds the key; "" sends none.

    The key goes as "Bearer KEY" into the header Authorization, and as it stands into any other `key_header`, such as
    x-goog-api-key.

    requests_per_minute and tokens_per_minute hold us back before the provider does (0: no limit). concurrency (calls in
    flight) and request_timeout (seconds) are pool.concurrency and pool.request_timeout where they are 0.
    """
    entry = ConfigDict(
        dict(
            name="",
            base_url="",
            key_env="",
            key_header="Authorization",
            headers=ConfigDict(),
            parameters=ConfigDict(),
            requests_per_minute=0,
            tokens_per_minute=0,
            concurrency=0,
            request_timeout=0.0,
        )
    ).lock()
    with entry.headers.unlocked(), entry.parameters.unlocked():
        entry.headers.update(fields.pop("headers", {}))
        entry.parameters.update(fields.pop("parameters", {}))
    entry.update(fields)
    return entry


def use_pool(config: ConfigDict, path: str | Path) -> None:
    """Take providers, models and price date from a file such as configs/pools/simulated.py."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    pool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pool)
    config.pool.providers, config.pool.models = pool.providers(), pool.models()
    config.pool.price_date = pool.PRICE_DATE


# What `learner` holds where a published method is taken whole, beside _PLAIN. In those without clipping the ratio is
# that of an importance weight.
_UNCLIPPED = dict(clip_low=1.0, clip_high=1e9)
LOSSES = {
    "grpo": dict(advantage="grpo", mean_over="sequence", kl_coef=0.04),
    "dr_grpo": dict(advantage="dr_grpo", mean_over="constant"),
    "dapo": dict(advantage="grpo", clip_high=0.28, resample=3),
    "gspo": dict(advantage="grpo", ratio="sequence", mean_over="sequence", clip_low=3e-4, clip_high=4e-4),
    "rloo": dict(advantage="rloo", mean_over="constant") | _UNCLIPPED,
    "reinforce": dict(advantage="reinforce") | _UNCLIPPED,
    "ppo": dict(
        advantage="gae", kl="k1", kl_in="reward", kl_coef=0.001, entropy_coef=0.001, value_coef=0.1, value_clip=0.5
    ),
}
_PLAIN = dict(
    ratio="token", mean_over="token", clip_low=0.2, clip_high=0.2, dual_clip=0.0, kl="k3", kl_in="loss", kl_coef=0.0,
    entropy_coef=0.0, value_coef=0.0, value_clip=0.0, resample=0,
)  # fmt: skip


def use_loss(config: ConfigDict, name: str) -> None:
    """Set the loss' fields of `config.learner` to those of LOSSES[name].

    Raises ConfigError for another name.
    """
    _one_of("loss", name, tuple(LOSSES))
    config.learner.update(_PLAIN | LOSSES[name])


PAPER_SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")


def use_paper_data(config: ConfigDict) -> None:
    """Questions as in the published protocol: train on 7,000 of nq and 7,000 of hotpotqa, test on 500 of each set.

    Otherwise than there, validation questions are none of the test split's. Bamboogle has but 125 questions. The sets
    are read from data.dir, "data" where none is given:
    `python -m router_r1_jax.data.prepare --sets=paper --source=DIR_OR_URL --dir=data` puts them there.
    """
    config.data.dir = config.data.dir or "data"
    config.data.train = config.data.validation = ("nq", "hotpotqa")
    config.data.test = PAPER_SETS
    config.data.per_set.update(dict(train=7000, validation=100, test=500))
    config.validation.questions = 200
    config.evaluation.questions = 500 * len(PAPER_SETS)


def base_config() -> ConfigDict:
    """All fields with their defaults. Lengths are tokens, times seconds, money dollars, if a comment says no other."""
    c = ConfigDict()
    c.seed = 0
    c.steps = 100  # GRPO updates

    c.model = ConfigDict()
    c.model.source = ""  # Hugging Face folder or hub name; "" initialises `arch` at random
    c.model.tokenizer = ""  # folder or hub name; "" takes model.source's, or trains a BPE on the synthetic world's text
    # Of parameters and activations; softmax, norms and log-probs are float32 at least, and bfloat16 parameters are
    # trained on float32 copies. float16 has too little range for gradients: to evaluate only.
    c.model.dtype = "float32"
    c.model.attention = "einsum"  # einsum | xla | cudnn (a GPU with dtype bfloat16 or float16)
    c.model.remat = "full"  # the backward pass recomputes: none | dots (all but the projections) | full (every block)
    c.model.lora = ConfigDict(dict(rank=0, alpha=32.0, targets=("q", "k", "v", "o", "gate", "up", "down")))  # 0: off
    c.model.arch = ConfigDict(
        dict(
            family="qwen3",  # qwen2 | qwen3 | llama
            num_layers=4,
            width=128,
            mlp=384,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            rope_theta=10_000.0,
            tie_embeddings=True,
            initializer_range=0.02,  # standard deviation of random kernels
            embedding_range=0.02,  # that of random embeddings
            induction_heads=0,  # kv heads of the first layer that begin as a part of such (qwen2)
        )
    )

    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1: the devices that are left, of all processes

    c.distributed = ConfigDict()  # how several processes become one run; not part of the configuration's hash
    c.distributed.coordinator = ""  # "": one process | auto: SLURM, Open MPI, TPU pods, GKE | host:port of process 0
    c.distributed.processes = 1  # with host:port, how many there are
    c.distributed.process = 0  # with host:port, which of them this is

    c.data = ConfigDict()
    c.data.dir = ""  # where prepared sets lie; "" is <workdir>/data. All but synthetic: `data.prepare`
    c.data.train = ("synthetic",)  # the sets whose train split is trained on
    c.data.validation = ("synthetic",)
    c.data.test = ("synthetic",)
    c.data.per_set = ConfigDict(dict(train=0, validation=0, test=0))  # questions drawn of each set, at most; 0: all
    c.data.seed = 0  # of that draw: runs of other seeds get the same questions
    c.data.drop_overlap = True  # leave out questions that a later split's sets ask too, by their text
    c.data.world = ConfigDict(
        dict(seed=7, films=60, songs=60, clubs=60, persons=80, cities=60, countries=20, rivers=20)
    )

    c.prompt = ConfigDict()
    c.prompt.template = "router"  # a file of router_r1_jax/templates without its suffix, or a path
    c.prompt.system = ""  # system message where the tokenizer has a chat template; "" leaves it to the template
    c.prompt.thinking = True  # enable_thinking of chat templates that know it; False: they close an empty thought first
    c.prompt.question_tokens = 256  # longest question: what differs between the prompts of a batch

    c.pool = ConfigDict()
    c.pool.providers = ()  # provider(...)
    c.pool.models = ()  # model_card(...)
    c.pool.price_date = ""  # the day on which the prices were read, YYYY-MM-DD
    c.pool.shown = 0  # cards of a prompt, drawn from all anew for each batch of prompts; 0: all of them
    c.pool.shuffle = True  # order of the cards, drawn anew for each batch of prompts
    c.pool.rename = False  # names of the models, drawn anew for each batch of prompts: the router must read the cards
    c.pool.names = ()  # that rename draws from; (): those of the models
    c.pool.simulate = False  # start the simulated models' HTTP server on a free loopback port, for provider "simulated"
    c.pool.concurrency = 64  # calls in flight at a provider that declares no other number
    c.pool.deadline = 60.0  # of one call, retries and pauses included
    c.pool.request_timeout = 20.0  # of one HTTP request, at a provider that declares no other
    c.pool.backoff = 0.2  # first pause between retries; doubles, with jitter, up to backoff_max
    c.pool.backoff_max = 5.0
    c.pool.breaker = ConfigDict(dict(failures=50, pause=1.0, pause_max=10.0))  # pool.limits.Breaker; 0 failures: off
    c.pool.hedge = False  # ask a second time after the p95 of the model's latencies; the sooner answer counts
    c.pool.budget = 0.0  # dollars really paid, calls in flight still are; then the run stops; 0: none
    c.pool.fault_weight = 0.0  # factor of the advantages of an episode whose provider failed; 0: it is left out of all
    c.pool.max_tokens = 512  # asked of the external model
    c.pool.temperature = 0.0
    c.pool.tape = ConfigDict(dict(mode="off", path=""))  # off | record | replay | strict; "" is <workdir>/tape.sqlite

    c.rollout = ConfigDict()
    c.rollout.questions = 16  # per step
    c.rollout.group = 8  # episodes per question
    c.rollout.replicas = 0  # sampling loops, each on devices of its own; 0: as many as this process's devices allow
    c.rollout.tensor = 1  # devices of one replica, which share every product
    c.rollout.slots = 64  # rows of a replica's sampling loop
    # Rows of them that compute at a time, while others wait for replies; 0: all. On a CPU, where a step's time grows
    # with its rows, 32 with 128 slots were worth it at latencies of 2 s: `experiments/bench_rollout.py`.
    c.rollout.lanes = 0
    c.rollout.temperature = 1.0
    c.rollout.top_k = 0  # draw among the k most probable tokens only; 0: all
    c.rollout.top_p = 1.0  # then among the most probable ones that together reach p
    c.rollout.min_p = 0.0  # then among those at least this times as probable as the most probable
    c.rollout.max_calls = 4  # per episode; then one last turn
    c.rollout.max_turn_tokens = 1024  # sampled tokens per turn
    c.rollout.max_episode_tokens = 0  # sampled tokens per episode; 0: as many as max_tokens lets
    c.rollout.max_episode_seconds = 0.0  # then no further turn begins; 0: no limit. Results then depend on the machine
    c.rollout.reply_tokens = 600  # of a reply that enter the context, tags not counted
    c.rollout.max_tokens = 4096  # of one row behind the shared prefix: question, turns and replies
    c.rollout.chunk = 64  # tokens fed to a row at a time
    c.rollout.feed_rows = 8  # rows fed at a time
    c.rollout.feed_wait = 8  # decode steps that a row may be held back until enough others are to be fed; 0: none
    c.rollout.poll_every = 8  # decode steps between looks for replies while rows wait
    c.rollout.ahead = False  # sample the next step's episodes while this one's update runs: one step off-policy
    c.rollout.driver = "jit"  # jit: one while_loop with a host callback | host: the same step driven from Python

    c.reward = ConfigDict()
    c.reward.preset = "official"  # official | paper | group | success_gated: `reward.score.PRESETS`
    c.reward.alpha = 0.0  # weight of the cost term
    c.reward.cost = "output"  # output | tokens | all | seconds: what an episode's cost counts, `reward.cost.COSTS`
    c.reward.router_price = 0.0  # dollars per million tokens that the router samples; counted in cost "all"
    c.reward.metric = "em"  # em | f1
    c.reward.window = 1000  # raw costs in the normaliser's window

    c.learner = ConfigDict()
    c.learner.learning_rate = 1e-6
    c.learner.warmup = 5  # updates
    c.learner.decay = False  # cosine to a tenth at the last update
    c.learner.weight_decay = 0.0
    c.learner.max_grad_norm = 1.0
    # The loss: `use_loss(c, name)` sets the next fields to a published choice, see LOSSES and `learner.PolicyLoss`.
    c.learner.advantage = "grpo"  # grpo | dr_grpo | rloo | reinforce: `learner.group_advantages`; gae: against a critic
    c.learner.resample = 0  # times that groups without a spread are replaced by those of new questions, at most (DAPO)
    c.learner.ratio = "token"  # token | sequence: what one ratio of policies spans
    c.learner.old_logps = "sampler"  # sampler | learner: who says what ratios compare with; learner: one pass more
    c.learner.importance_cap = 0.0  # bound of the weights old policy / sampler's distribution; 0: no weights
    c.learner.mean_over = "token"  # token | sequence | constant: all alike, each row alike, sum over rollout.max_tokens
    c.learner.clip_low = 0.2
    c.learner.clip_high = 0.2
    c.learner.dual_clip = 0.0  # bound, above 1, of the ratios of negative advantages; 0: none
    c.learner.kl = "k3"  # k1 | k2 | k3: estimate of the KL to the warm-started reference; none: no reference is kept
    c.learner.kl_in = "loss"  # loss | reward: where it counts
    c.learner.kl_coef = 0.001
    c.learner.entropy_coef = 0.0
    c.learner.discount, c.learner.gae_lambda = 1.0, 1.0  # of advantage "gae", per sampled token
    c.learner.value_coef = 0.0  # factor of the critic's loss: its share in the gradient of the router's body
    c.learner.value_clip = 0.0  # how far a value may move in one rollout's updates; 0: freely
    c.learner.value_learning_rate = 1e-5  # of the critic's head
    # Factors of the components' own advantages, each normalised within its group; all 0: those of the total reward.
    c.learner.component_weights = ConfigDict(dict(format=0.0, outcome=0.0, cost=0.0))
    c.learner.micro_tokens = 16384  # positions, padding included, per device and forward-backward pass; at least a row
    c.learner.length_buckets = 3  # lengths that rows are padded to, each half of the next, up to rollout.max_tokens
    c.learner.epochs = 1  # passes over a rollout
    c.learner.minibatches = 1  # updates per pass
    c.learner.logit_chunk = 64  # positions whose logits are held at a time

    # Signs of collapse, each an alarm in the metrics and on the screen: `alarms.SIGNS`; inf (entropy: 0) turns one off.
    c.alarms = ConfigDict()
    c.alarms.entropy = 1e-3  # nats per token; below it the router no longer explores
    c.alarms.kl = 1.0  # nats per token to the reference
    c.alarms.malformed = 0.5  # share of the episodes
    c.alarms.length = 3.0  # times the first step's tokens per episode
    c.alarms.one_model = 0.95  # share of the calls
    c.alarms.logp_diff = 0.1  # nats per token between sampler and learner, on average
    c.alarms.skipped = 0.0  # updates of a step whose loss or gradient was not finite
    c.alarms.stop = False  # an alarm that stands for `patience` steps ends the run
    c.alarms.patience = 5

    c.warmstart = ConfigDict()
    c.warmstart.seed = 0  # of its own: runs of other seeds start from the same warm start
    c.warmstart.steps = 0  # supervised updates on scripted episodes whose choice of model is random
    c.warmstart.file = ""  # safetensors with the result; read instead of training when it exists
    c.warmstart.batch = 64
    c.warmstart.learning_rate = 2e-3
    c.warmstart.warmup = 50
    # First of all, to learn reading: ("copy", updates, shortest, longest period) of repeating sequences, and ("read",
    # updates, models, lines) of tables from which names are recited; from small to large (lessons.py).
    c.warmstart.lessons = ()
    c.warmstart.copy_steps = 0  # then updates in which half of the batch are exercises: `warmstart.scripted_rows`
    c.warmstart.copy_periods = (8, 40)  # of the random sequences among them that repeat, in tokens, both included

    c.checkpoint = ConfigDict(dict(every=20, keep=2))  # steps; latest ones kept beside first and best

    c.validation = ConfigDict(dict(every=20, questions=100))  # greedy, on the validation split; 0 questions: never

    c.evaluation = ConfigDict()
    c.evaluation.split = "test"
    c.evaluation.questions = 500  # at most, of all sets together
    c.evaluation.samples = 0  # episodes per question at `temperature`, beside the greedy one
    c.evaluation.temperature = 1.0
    c.evaluation.bootstrap = 10_000  # resamples of the intervals
    c.evaluation.tape = True  # where pool.tape is off, evaluation/tape.sqlite keeps the calls, baselines' too
    c.evaluation.baseline = "first"  # checkpoint compared with on the same questions: first (warm start), a step, or ""

    c.logging = ConfigDict(dict(tensorboard=False, wandb="", episodes_every=10))  # wandb: project name
    return c.lock()  # a misspelt field in a configuration file is an error, not a new field


_COUNTS = (
    "rollout.questions", "rollout.tensor", "rollout.slots", "rollout.max_turn_tokens", "rollout.reply_tokens",
    "rollout.max_tokens", "rollout.chunk", "rollout.feed_rows", "rollout.poll_every", "prompt.question_tokens",
    "pool.concurrency", "pool.max_tokens", "learner.micro_tokens", "learner.length_buckets", "learner.epochs",
    "learner.minibatches", "learner.logit_chunk", "reward.window", "checkpoint.every", "checkpoint.keep",
    "validation.every", "logging.episodes_every", "alarms.patience", "evaluation.questions", "evaluation.bootstrap",
    "warmstart.batch", "model.arch.num_layers", "model.arch.width", "model.arch.mlp", "model.arch.num_heads",
    "model.arch.num_kv_heads", "model.arch.head_dim", "distributed.processes",
)  # fmt: skip
_POSITIVE = (
    "pool.deadline", "pool.request_timeout", "pool.backoff", "pool.backoff_max", "pool.breaker.pause",
    "pool.breaker.pause_max", "evaluation.temperature", "learner.max_grad_norm", "model.arch.rope_theta",
    "model.arch.initializer_range", "model.arch.embedding_range",
)  # fmt: skip
_NOT_NEGATIVE = (
    "seed", "steps", "data.per_set.train", "data.per_set.validation", "data.per_set.test", "data.seed",
    "model.lora.rank", "model.arch.induction_heads", "pool.shown", "pool.temperature", "pool.breaker.failures",
    "pool.budget", "reward.router_price", "rollout.temperature", "rollout.replicas", "rollout.lanes", "rollout.top_k",
    "rollout.feed_wait", "rollout.max_calls", "rollout.max_episode_tokens", "rollout.max_episode_seconds",
    "alarms.entropy", "validation.questions", "evaluation.samples",
    "learner.learning_rate", "learner.warmup", "learner.weight_decay", "learner.clip_low", "learner.clip_high",
    "learner.dual_clip", "learner.kl_coef", "learner.entropy_coef", "learner.value_coef", "learner.value_clip",
    "learner.value_learning_rate", "learner.importance_cap", "learner.resample", "learner.component_weights.format",
    "learner.component_weights.outcome", "learner.component_weights.cost", "warmstart.seed", "warmstart.steps",
    "warmstart.learning_rate", "warmstart.warmup", "warmstart.copy_steps", "distributed.process",
)  # fmt: skip


def _at_least(least: float, config: ConfigDict, fields: Sequence[str], *, beyond: bool = False) -> None:
    """Each field is finite and at least `least`, or with `beyond` greater than it."""
    rule = f"{'greater than' if beyond else 'at least'} {least}"
    for field in fields:
        node = config
        for part in field.split("."):
            node = node[part]
        if not (math.isfinite(node) and (node > least if beyond else node >= least)):
            raise ConfigError(f"{field} is {node}; it must be {rule}")


def _one_of(field: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field} is {value!r}; choose one of {', '.join(allowed)}")


def _entries(field: str, entries: Sequence[object], made_by: Callable[..., ConfigDict]) -> None:
    """A tuple's entries come from `made_by`: all code behind this relies on their fields."""
    known = set(made_by())
    for i, entry in enumerate(entries):
        if not isinstance(entry, ConfigDict) or set(entry) != known:
            raise ConfigError(
                f"{field}[{i}] is {entry!r}; make it with {made_by.__name__}(...) in a configuration file"
            )


def _sets(config: ConfigDict) -> None:
    """Each split names its sets, none twice; simulated models are of use for the synthetic world's questions only."""
    named = set()
    for split in SPLITS:
        sets = config.data[split]
        if not sets or len(set(sets)) < len(sets) or not all(isinstance(name, str) and name for name in sets):
            raise ConfigError(
                f"data.{split} is {sets!r}; name one or more sets, none twice, such as ('nq', 'hotpotqa')"
            )
        named.update(sets)
    if config.pool.simulate and "synthetic" not in named:
        raise ConfigError(
            "pool.simulate is True; the simulated models only know the set 'synthetic'. Set it to False and declare "
            "providers, for instance with use_pool(c, 'configs/pools/current.py')"
        )


def _lessons(lessons: Sequence[Sequence[object]]) -> None:
    """Each is of a known kind and takes some updates."""
    for i, lesson in enumerate(lessons):
        kind, *numbers = lesson or ("",)
        right = len(numbers) == 3 and all(isinstance(number, int) and number >= 1 for number in numbers)
        if kind not in ("copy", "read") or not right or (kind == "copy" and numbers[1] > numbers[2]):
            raise ConfigError(
                f"warmstart.lessons[{i}] is {lesson!r}; write ('copy', updates, shortest period, longest period) or "
                "('read', updates, models, lines), whole numbers from 1 on"
            )


def _critic(learner: ConfigDict) -> None:
    """What belongs to advantage "gae" is there with it, and nowhere else."""
    for field in ("discount", "gae_lambda"):
        if not 0.0 <= learner[field] <= 1.0:
            raise ConfigError(f"learner.{field} is {learner[field]}; it lies in [0, 1]")
    if learner.advantage != "gae" and learner.value_coef:
        raise ConfigError(
            f"learner.value_coef is {learner.value_coef}, but learner.advantage {learner.advantage!r} has no critic; "
            "set one of them to 0 or 'gae'"
        )
    if learner.advantage == "gae" and any(learner.component_weights.values()):
        raise ConfigError("learner.component_weights compare within groups; learner.advantage 'gae' takes none of them")
    if learner.advantage == "gae" and not learner.value_coef:
        raise ConfigError("learner.value_coef is 0; with learner.advantage 'gae' the critic learns by it, 0.1 is usual")


def validate(config: ConfigDict) -> None:
    """Raise ConfigError for a configuration that cannot run. Cards are checked where they are built (`pool.cards`)."""
    _at_least(1, config, _COUNTS)
    _at_least(0, config, _POSITIVE, beyond=True)
    _at_least(0, config, _NOT_NEGATIVE)
    _entries("pool.providers", config.pool.providers, provider)
    _entries("pool.models", config.pool.models, model_card)
    _one_of("reward.metric", config.reward.metric, ("em", "f1"))
    _one_of("reward.preset", config.reward.preset, ("official", "paper", "group", "success_gated"))
    _one_of("reward.cost", config.reward.cost, ("output", "tokens", "all", "seconds"))
    _one_of("learner.advantage", config.learner.advantage, ("grpo", "dr_grpo", "rloo", "reinforce", "gae"))
    _one_of("learner.ratio", config.learner.ratio, ("token", "sequence"))
    _one_of("learner.mean_over", config.learner.mean_over, ("token", "sequence", "constant"))
    _one_of("learner.kl", config.learner.kl, ("k1", "k2", "k3", "none"))
    _one_of("learner.kl_in", config.learner.kl_in, ("loss", "reward"))
    _one_of("learner.old_logps", config.learner.old_logps, ("sampler", "learner"))
    _critic(config.learner)
    c = config.learner
    if c.kl_in == "reward" and c.kl != "none" and any(c.component_weights.values()):
        raise ConfigError(
            "learner.kl_in is 'reward', but learner.component_weights compare components of the reward, none of which "
            "holds the KL; set it to 'loss', or learner.kl to 'none'"
        )
    if 0.0 < config.learner.dual_clip <= 1.0:
        raise ConfigError(
            f"learner.dual_clip is {config.learner.dual_clip}; it is greater than 1 (3 is usual), or 0 for no bound"
        )
    _one_of("rollout.driver", config.rollout.driver, ("jit", "host"))
    _one_of("pool.tape.mode", config.pool.tape.mode, ("off", "record", "replay", "strict"))
    _one_of("model.attention", config.model.attention, ("einsum", "xla", "cudnn"))
    _one_of("model.remat", config.model.remat, ("none", "dots", "full"))
    _one_of("model.dtype", config.model.dtype, ("float32", "bfloat16", "float16"))
    _one_of("model.arch.family", config.model.arch.family, ("qwen2", "qwen3", "llama"))
    if not 0.0 <= config.reward.alpha <= 1.0:
        raise ConfigError(f"reward.alpha is {config.reward.alpha}; the weight of the cost term lies in [0, 1]")
    if not 0.0 < config.rollout.top_p <= 1.0:
        raise ConfigError(f"rollout.top_p is {config.rollout.top_p}; it lies in (0, 1], and 1 keeps all")
    if not 0.0 <= config.rollout.min_p <= 1.0:
        raise ConfigError(f"rollout.min_p is {config.rollout.min_p}; it lies in [0, 1], and 0 keeps all")
    if config.rollout.lanes > config.rollout.slots:
        raise ConfigError(
            f"rollout.lanes is {config.rollout.lanes}, more than rollout.slots ({config.rollout.slots}); lanes are the "
            "slots that compute at a time: lower it, or 0 for all of them"
        )
    needs_group = config.learner.advantage not in ("gae", "reinforce") or config.learner.resample
    if config.rollout.group < (2 if needs_group else 1):
        raise ConfigError(
            f"rollout.group is {config.rollout.group}; learner.advantage {config.learner.advantage!r} and "
            "learner.resample compare at least 2 episodes per question"
        )
    episodes = config.rollout.questions * config.rollout.group
    if episodes % config.learner.minibatches:
        raise ConfigError(
            f"learner.minibatches is {config.learner.minibatches}; it must divide the {episodes} episodes of a step "
            "(rollout.questions x rollout.group)"
        )
    if not 0.0 <= config.pool.fault_weight <= 1.0:
        raise ConfigError(
            f"pool.fault_weight is {config.pool.fault_weight}; it lies in [0, 1], and 0 leaves episodes out"
        )
    d = config.distributed
    if d.coordinator not in ("", "auto") and not re.fullmatch(r"\S+:\d+", d.coordinator):
        raise ConfigError(
            f"distributed.coordinator is {d.coordinator!r}; write host:port of process 0, auto, or nothing"
        )
    if d.process >= d.processes:
        raise ConfigError(
            f"distributed.process is {d.process} of distributed.processes={d.processes}; processes count from 0"
        )
    if not config.pool.models:
        raise ConfigError("pool.models is empty; declare at least one model with model_card(...)")
    if config.pool.shown > len(config.pool.models):
        raise ConfigError(
            f"pool.shown is {config.pool.shown}, and pool.models are {len(config.pool.models)}; 0 shows them all"
        )
    _one_of("evaluation.split", config.evaluation.split, SPLITS)
    _sets(config)
    _lessons(config.warmstart.lessons)
