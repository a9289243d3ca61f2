"""Configuration: every field with its default, unit and meaning; model cards, providers, losses by name; its hash.

A file in `configs/` starts from `base_config()` and changes what it needs. `--config.a.b=v` overrides one field.
ml_collections refuses an unknown field and a wrong type; `config_checks` refuses a value that cannot run.
"""

import hashlib
import json
import runpy
from pathlib import Path

from ml_collections import ConfigDict, config_dict

from router_r1_jax.errors import ConfigError as ConfigError

SPLITS = ("train", "validation", "test")
QUERY = "{query}"  # the place of the query in pool.prompt
SYNTHETIC = "synthetic"  # the data set that the synthetic environment builds; prepared sets have other names
PAPER_SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")


def model_card(**fields: object) -> ConfigDict:
    """One external model, declared once; the prompt, the parser, the prices and the client all read this card."""
    card = ConfigDict()
    card.name = ""  # name that the prompt shows and that the router calls
    card.provider = ""  # name of the provider that serves the model
    card.model = ""  # the provider's identifier of the model
    card.price_in = 0.0  # dollars per million prompt tokens
    card.price_out = 0.0  # dollars per million completion tokens
    # Dollars per million prompt tokens that the provider has cached; None is price_in. It lowers what is spent, but not
    # what the router is charged, because the router does not decide whether a provider remembers a prompt.
    card.price_cached = config_dict.placeholder(float)
    # (step, price_in, price_out), each valid from that training step on, for the prompt and for the charge.
    card.price_changes = ()
    card.latency = config_dict.placeholder(float)  # seconds of a call; None: not measured, and the prompt states none
    card.performance = ConfigDict(fields.pop("performance", {}))  # topic -> score in [0, 1]
    card.description = ""  # a few words for the prompt
    card.aliases = ()  # other names by which the router may call the model
    card.system = ""  # system message of every request to the model; "": none
    # Further parameters of the JSON body of its requests. They replace the provider's, and None takes one away.
    card.parameters = ConfigDict(fields.pop("parameters", {}))
    # Faults of a simulated model; read by the simulated server only.
    card.simulated = ConfigDict()
    card.simulated.failure_rate = 0.0  # share of requests that are answered with HTTP 503
    card.simulated.malformed_rate = 0.0  # share of requests that are answered with half a JSON body
    card.simulated.wrong_type_rate = 0.0  # share of requests that are answered with a page of HTML
    card.simulated.dropped_rate = 0.0  # share of requests whose connection is closed without an answer
    card.simulated.outage = (0, 0)  # (first, end): requests of these numbers, counted from 0, get HTTP 503
    card.simulated.slow_start = (0, 0.0)  # (requests, seconds): the first requests are answered so much later
    card.simulated.requests_per_minute = 0  # further requests get HTTP 429 with Retry-After; 0: no limit
    card.lock()
    card.simulated.update(fields.pop("simulated", {}))
    card.update(fields)
    return card


def provider(**fields: object) -> ConfigDict:
    """One OpenAI-compatible endpoint that serves models."""
    entry = ConfigDict()
    entry.name = ""  # name that model cards refer to
    entry.base_url = ""  # address in front of /chat/completions, such as https://api.deepinfra.com/v1/openai
    entry.key_env = ""  # environment variable that holds the key; "" sends no key
    # Header that carries the key: "Bearer KEY" in Authorization, KEY alone in any other, such as x-goog-api-key.
    entry.key_header = "Authorization"
    entry.headers = ConfigDict(fields.pop("headers", {}))  # further HTTP headers of every request
    entry.parameters = ConfigDict(fields.pop("parameters", {}))  # further parameters of every request's JSON body
    entry.requests_per_minute = 0  # most requests that are sent in a minute; 0: no limit
    entry.tokens_per_minute = 0  # most tokens that requests may use in a minute; 0: no limit
    entry.concurrency = 0  # most calls in flight; 0: pool.concurrency
    entry.request_timeout = 0.0  # seconds of one HTTP request; 0: pool.request_timeout
    entry.lock()
    entry.update(fields)
    return entry


def use_pool(config: ConfigDict, path: str | Path) -> None:
    """Take providers, models, price date and prompt from a file such as configs/pools/simulated.py.

    The prompt is the file's PROMPT. If it has none, queries travel as they are.
    """
    pool = runpy.run_path(str(path))
    config.pool.providers, config.pool.models = pool["providers"](), pool["models"]()
    config.pool.price_date = pool["PRICE_DATE"]
    config.pool.prompt = pool.get("PROMPT", QUERY)


# Published losses: the fields of `learner` that each sets beside _PLAIN_LOSS. Methods without clipping have a ratio all
# the same, as an importance weight.
_UNCLIPPED = dict(clip_low=1.0, clip_high=1e9)
LOSSES = {
    "grpo": dict(advantage="grpo", loss_agg="sequence", kl_coef=0.04),
    "dr_grpo": dict(advantage="dr_grpo", loss_agg="constant"),
    "dapo": dict(advantage="grpo", clip_high=0.28, dynamic_sampling=3),
    "gspo": dict(advantage="grpo", importance_level="sequence", loss_agg="sequence", clip_low=3e-4, clip_high=4e-4),
    "rloo": dict(advantage="rloo", loss_agg="constant") | _UNCLIPPED,
    "reinforce": dict(advantage="reinforce") | _UNCLIPPED,
    "ppo": dict(
        advantage="gae", kl="k1", kl_in="reward", kl_coef=0.001, entropy_coef=0.001, value_coef=0.1, value_clip=0.5
    ),
}
_PLAIN_LOSS = dict(importance_level="token", loss_agg="token", clip_low=0.2, clip_high=0.2, kl="k3", kl_in="loss")
_PLAIN_LOSS |= dict.fromkeys(
    ("dual_clip", "kl_coef", "entropy_coef", "value_coef", "value_clip", "dynamic_sampling"), 0
)


def use_loss(config: ConfigDict, name: str) -> None:
    """Set the fields of `config.learner` that define the loss LOSSES[name]; ConfigError for an unknown name."""
    if name not in LOSSES:
        raise ConfigError(f"loss is {name!r}; choose one of {', '.join(LOSSES)}")
    config.learner.update(_PLAIN_LOSS | LOSSES[name])


def use_paper_data(config: ConfigDict) -> None:
    """Questions of the published protocol: train on 7,000 of nq and 7,000 of hotpotqa, test on 500 of each set.

    Unlike in the published protocol, no validation question is in the test split. Bamboogle has only 125 questions. The
    sets are read from data.dir, or from the folder "data" if data.dir is empty. This command puts them there:
    `python -m router_r1_jax.data.prepare --sets=paper --source=DIR_OR_URL --dir=data`.
    """
    config.data.dir = config.data.dir or "data"
    config.data.train = config.data.validation = ("nq", "hotpotqa")
    config.data.test = PAPER_SETS
    config.data.per_set.update(dict(train=7000, validation=100, test=500))
    config.validation.questions = 200
    config.evaluation.questions = 500 * len(PAPER_SETS)


def base_config() -> ConfigDict:
    """All fields with their defaults. Lengths are in tokens unless the comment says otherwise."""
    c = ConfigDict()
    c.seed = 0  # seed of initial weights, sampling and the order of questions
    c.steps = 100  # training steps: one rollout and its updates each

    c.model = ConfigDict()  # the router's language model
    c.model.source = ""  # Hugging Face folder or hub name; "" initialises model.arch at random
    c.model.tokenizer = ""  # folder or hub name; "": model.source's, or a BPE trained on the synthetic world's text
    # Type of parameters and activations: float32 | bfloat16 | float16. Softmax, norms and log-probs are float32 at
    # least. bfloat16 parameters are trained on float32 copies. float16 has too little range for gradients, so it is for
    # evaluation only.
    c.model.dtype = "float32"
    c.model.attention = "einsum"  # einsum | xla | cudnn (a GPU with dtype bfloat16 or float16)
    c.model.remat = "full"  # what the backward pass recomputes: none | dots (all but the projections) | full (blocks)
    c.model.lora = ConfigDict()
    c.model.lora.rank = 0  # rank of the LoRA adapters; 0: all parameters are trained
    c.model.lora.alpha = 32.0  # the adapters' product is scaled by alpha / rank
    c.model.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")  # projections that get adapters
    c.model.arch = ConfigDict()  # architecture of a random start; read only if model.source is empty
    c.model.arch.family = "qwen3"  # qwen2 | qwen3 | llama
    c.model.arch.num_layers = 4  # number of transformer blocks
    c.model.arch.width = 128  # size of the hidden states
    c.model.arch.mlp = 384  # size of the feed-forward layer
    c.model.arch.num_heads = 4  # number of query heads
    c.model.arch.num_kv_heads = 2  # number of key and value heads; divides num_heads
    c.model.arch.head_dim = 32  # size of one head
    c.model.arch.rope_theta = 10_000.0  # base of the rotary position frequencies
    c.model.arch.tie_embeddings = True  # the head uses the embedding matrix
    c.model.arch.initializer_range = 0.02  # standard deviation of random kernels
    c.model.arch.embedding_range = 0.02  # standard deviation of random embeddings
    c.model.arch.induction_heads = 0  # kv heads of the first layer that start as part of induction heads (qwen2)

    c.mesh = ConfigDict()  # devices along each axis; one axis may be -1: all devices that are left, of all processes
    c.mesh.data = -1  # copies of the parameters, each with its share of a batch's rows
    c.mesh.fsdp = 1  # parts that every parameter is sharded into along its model width (FSDP)
    c.mesh.tensor = 1  # devices that share one matrix product (tensor parallelism)

    c.distributed = ConfigDict()  # how several processes become one run (multi-host); not part of `config_hash`
    c.distributed.coordinator = ""  # "": one process | auto: SLURM, Open MPI, TPU pods, GKE | host:port of process 0
    c.distributed.processes = 1  # with host:port, the number of processes
    c.distributed.process = 0  # with host:port, the number of this process

    c.data = ConfigDict()  # data sets of questions
    # Folder that `router_r1_jax.data.prepare` has filled with sets; "" is <workdir>/data. The run itself builds the set
    # "synthetic" there.
    c.data.dir = ""
    c.data.train = ("synthetic",)  # names of the sets whose train split is trained on
    c.data.validation = ("synthetic",)  # names of the sets whose validation split is validated on
    c.data.test = ("synthetic",)  # names of the sets whose test split is evaluated on
    c.data.per_set = ConfigDict()
    c.data.per_set.train = 0  # most train questions that are sampled from each set; 0: all
    c.data.per_set.validation = 0  # most validation questions that are sampled from each set; 0: all
    c.data.per_set.test = 0  # most test questions that are sampled from each set; 0: all
    c.data.seed = 0  # seed of this sampling, so that runs of other seeds get the same questions
    c.data.decontaminate = True  # drop questions whose text also stands in a later split

    c.prompt = ConfigDict()  # what the router reads first
    c.prompt.template = "router"  # a file of router_r1_jax/templates without its suffix, or a path
    c.prompt.system = ""  # system message if the tokenizer has a chat template; "" leaves it to the chat template
    # enable_thinking of chat templates that know it; if False, they begin with an empty thought.
    c.prompt.thinking = True
    c.prompt.question_tokens = 256  # longest question; it is the only part that differs between the prompts of a batch

    c.pool = ConfigDict()  # external models and their client
    c.pool.providers = ()  # endpoints, each made with provider(...)
    c.pool.models = ()  # external models, each made with model_card(...)
    c.pool.price_date = ""  # day on which the prices were read, YYYY-MM-DD
    c.pool.candidates = 0  # models that a prompt shows, sampled anew for each batch of prompts; 0: all
    c.pool.shuffle = True  # shuffle the order of the candidates anew for each batch of prompts
    c.pool.rename = False  # sample names anew for each batch of prompts, so that the router must read the cards
    c.pool.names = ()  # names that pool.rename samples from; (): the models' names
    c.pool.concurrency = 64  # most calls in flight at a provider that declares no other number
    c.pool.deadline = 60.0  # seconds of one call, with its retries and pauses
    c.pool.request_timeout = 20.0  # seconds of one HTTP request, at a provider that declares no other timeout
    c.pool.backoff = 0.2  # seconds before the first retry; the pause doubles with every retry, with jitter
    c.pool.backoff_max = 5.0  # seconds; longest pause between retries
    c.pool.circuit_breaker = ConfigDict()
    c.pool.circuit_breaker.failures = 50  # failures in a row after which requests to a model pause; 0: never
    c.pool.circuit_breaker.pause = 1.0  # seconds of the first pause; it doubles as long as the model fails
    c.pool.circuit_breaker.pause_max = 10.0  # seconds; longest pause
    c.pool.budget = 0.0  # dollars after which the run stops; calls in flight are still paid; 0: no limit
    # Factor in [0, 1] of the advantages of an episode whose provider failed; at 0 it also leaves its group's baseline.
    c.pool.fault_weight = 0.0
    c.pool.prompt = QUERY  # text in which every query travels to its model
    c.pool.max_tokens = 512  # most completion tokens that are asked of an external model
    c.pool.temperature = 0.0  # sampling temperature of the external models
    c.pool.call_cache = ConfigDict()
    # off | record: keep every new reply | replay: repeat kept replies, faults too | strict: replay without new calls.
    c.pool.call_cache.mode = "off"
    c.pool.call_cache.path = ""  # SQLite file; "" is <workdir>/call_cache.sqlite

    c.rollout = ConfigDict()  # sampling of episodes
    c.rollout.prompts_per_step = 16  # questions per training step
    c.rollout.num_generations = 8  # episodes per question
    c.rollout.replicas = 0  # sampling loops, each on other devices; 0: as many as this process's devices allow
    c.rollout.tensor = 1  # devices of one replica, which share every matrix product
    c.rollout.slots = 64  # episodes that a replica holds at a time, each with its KV cache
    # Rows of one decode step, while other slots wait for replies; 0: all slots. Fewer rows pay off if a step's time
    # grows with its rows, as on a CPU, and calls are slow.
    c.rollout.decode_batch = 0
    c.rollout.temperature = 1.0  # sampling temperature of the router; 0: greedy
    c.rollout.top_k = 0  # sample among the k most probable tokens only; 0: all
    c.rollout.top_p = 1.0  # of these, the most probable ones that together reach this probability
    c.rollout.min_p = 0.0  # of these, the ones with at least this share of the highest probability
    c.rollout.max_calls = 4  # calls per episode; one last turn follows
    c.rollout.max_turn_tokens = 1024  # sampled tokens per turn
    c.rollout.max_episode_tokens = 0  # sampled tokens per episode; 0: as many as max_row_tokens allows
    # Seconds after which an episode begins no further turn; 0: no limit. With a limit, results depend on the machine.
    c.rollout.max_episode_seconds = 0.0
    c.rollout.reply_tokens = 600  # tokens of a reply that enter the context, tags not counted
    c.rollout.max_row_tokens = 4096  # tokens of one row behind the shared prefix: question, turns and replies
    c.rollout.prefill_chunk = 64  # tokens of a row that one prefill step reads (chunked prefill)
    c.rollout.prefill_rows = 8  # rows that one prefill step reads
    # Sample the next step's episodes while this step's update runs, with weights that are one step old.
    c.rollout.one_step_off_policy = False
    c.rollout.driver = "jit"  # jit: one while_loop with a host callback | host: the same step, called from Python

    c.reward = ConfigDict()  # how episodes are scored
    c.reward.preset = "official"  # official | paper | group | success_gated, see `router_r1_jax.reward`
    c.reward.alpha = 0.0  # weight of the cost term, in [0, 1]
    # What the cost counts: output (tokens of replies) | tokens (prompt and reply) | all (the router's tokens too) |
    # seconds (of calls).
    c.reward.cost = "output"
    c.reward.router_price = 0.0  # dollars per million tokens that the router samples; counted if reward.cost is all
    c.reward.metric = "em"  # outcome: em (exact match) | f1
    c.reward.window = 1000  # latest raw costs that the cost normaliser compares with

    c.learner = ConfigDict()  # the update of the router; `use_loss(c, name)` sets the loss to a published choice
    c.learner.learning_rate = 1e-6  # peak learning rate of AdamW
    c.learner.warmup = 5  # updates of linear warm-up
    c.learner.decay = False  # decay the learning rate by a cosine to a tenth at the last update
    c.learner.weight_decay = 0.0  # AdamW's weight decay
    c.learner.max_grad_norm = 1.0  # gradients are clipped to this global norm
    c.learner.advantage = "grpo"  # grpo | dr_grpo | rloo | reinforce: group advantages; gae: against a critic (PPO)
    c.learner.dynamic_sampling = 0  # most times that groups of equal rewards are replaced by new questions (DAPO)
    c.learner.importance_level = "token"  # token | sequence: what one importance ratio covers
    # Log-probs in the denominator of the ratios: sampler (the rollout's) | learner (computed again, one pass more).
    c.learner.old_logps = "sampler"
    c.learner.tis_cap = 0.0  # cap of the weights learner / sampler (truncated importance sampling); 0: no weights
    # Loss of a batch: token (mean over tokens) | sequence (mean over rows of the mean over a row's tokens) | constant
    # (mean over rows of a row's sum divided by rollout.max_row_tokens).
    c.learner.loss_agg = "token"
    c.learner.clip_low = 0.2  # ratios are clipped at 1 - clip_low
    c.learner.clip_high = 0.2  # ratios are clipped at 1 + clip_high
    c.learner.dual_clip = 0.0  # upper bound, above 1, of the ratios of negative advantages; 0: none
    c.learner.kl = "k3"  # estimate of the KL to the reference policy: k1 | k2 | k3; none: no reference is kept
    c.learner.kl_in = "loss"  # loss | reward: the KL is a term of one of them
    c.learner.kl_coef = 0.001  # factor of the KL
    c.learner.entropy_coef = 0.0  # factor of the entropy bonus
    c.learner.discount = 1.0  # gamma of GAE per sampled token, in [0, 1]
    c.learner.gae_lambda = 1.0  # lambda of GAE per sampled token, in [0, 1]
    c.learner.value_coef = 0.0  # factor of the critic's loss: its share in the gradient of the router's body
    c.learner.value_clip = 0.0  # how far a value may move in one rollout's updates; 0: no limit
    c.learner.value_learning_rate = 1e-5  # learning rate of the critic's head
    # Weights of the advantages of single reward components, each normalised in its group. If all are 0, the advantages
    # are those of the total reward.
    c.learner.component_weights = ConfigDict()
    c.learner.component_weights.format = 0.0  # weight of the format's advantage
    c.learner.component_weights.outcome = 0.0  # weight of the outcome's advantage
    c.learner.component_weights.cost = 0.0  # weight of the cost's advantage
    c.learner.micro_tokens = 16384  # tokens, with padding, per device and micro-batch; at least one row
    c.learner.length_buckets = 3  # lengths that rows are padded to, each half of the next, up to max_row_tokens
    c.learner.epochs = 1  # passes over a rollout
    c.learner.minibatches = 1  # updates per pass; divides the episodes of a step
    c.learner.logit_chunk = 64  # positions of a row whose logits are computed at a time

    c.alarms = ConfigDict()  # thresholds beyond which a metric is a sign of collapse; inf (for entropy 0): no alarm
    c.alarms.entropy = 1e-3  # nats per token; below it the router no longer explores
    c.alarms.kl = 1.0  # nats per token to the reference policy
    c.alarms.malformed = 0.5  # share of the episodes that are malformed
    c.alarms.length = 3.0  # tokens per episode, as a multiple of the first step's
    c.alarms.one_model = 0.95  # share of the calls that go to one model
    c.alarms.logp_diff = 0.1  # mean difference of log-probs between sampler and learner, in nats per token
    c.alarms.skipped = 0.0  # updates of a step that were skipped because loss or gradient was not finite
    c.alarms.stop = False  # an alarm that lasts for `patience` steps stops the run
    c.alarms.patience = 5  # steps in a row

    c.warmstart = ConfigDict()  # supervised learning, before RL, on scripted episodes that choose models at random
    c.warmstart.seed = 0  # seed of the warm start, so that runs of other seeds share one
    c.warmstart.steps = 0  # supervised updates; 0: no warm start
    c.warmstart.file = ""  # safetensors file with the result; if it exists it is read, and nothing is trained
    c.warmstart.batch = 64  # rows per update
    c.warmstart.learning_rate = 2e-3  # peak learning rate
    c.warmstart.warmup = 50  # updates of linear warm-up

    c.synthetic = ConfigDict()  # the synthetic world; read by the room `synthetic` alone
    # Seed, and numbers of things per kind, of the world that the data set "synthetic" asks about.
    c.synthetic.world = ConfigDict(
        dict(seed=7, films=60, songs=60, clubs=60, persons=80, cities=60, countries=20, rivers=20)
    )
    c.synthetic.simulate_models = False  # serve the models of provider "simulated" on a free loopback port
    # First updates of a warm start, which teach reading: ("copy", updates, shortest, longest period) repeats sequences,
    # ("read", updates, models, lines) recites names from tables. Write them from small to large.
    c.synthetic.curriculum = ()
    c.synthetic.copy_steps = 0  # updates after the curriculum in which half of the batch are copying exercises
    c.synthetic.copy_periods = (8, 40)  # shortest and longest period of the sequences in those exercises

    c.checkpoint = ConfigDict()  # when checkpoints are saved
    c.checkpoint.every = 20  # steps between checkpoints
    c.checkpoint.keep = 2  # latest checkpoints that are kept beside the first and the best

    c.validation = ConfigDict()  # greedy answers during training; they choose the best checkpoint
    c.validation.every = 20  # steps between validations
    c.validation.questions = 100  # questions per validation; 0: no validation

    c.evaluation = ConfigDict()  # `router_r1_jax.evaluate` and the baselines
    c.evaluation.split = "test"  # train | validation | test
    c.evaluation.questions = 500  # most questions, of all sets together
    c.evaluation.samples = 0  # episodes per question at evaluation.temperature, beside the greedy one
    c.evaluation.temperature = 1.0  # sampling temperature of these episodes
    c.evaluation.bootstrap = 10_000  # bootstrap resamples of the confidence intervals
    c.evaluation.call_cache = True  # if pool.call_cache is off, keep calls in <workdir>/evaluation/call_cache.sqlite
    # Baseline checkpoint for the reported gain: first (the warm start), a step, or "" for none.
    c.evaluation.baseline = "first"

    c.logging = ConfigDict()  # where metrics and episodes go
    c.logging.tensorboard = False  # also write metrics for TensorBoard
    c.logging.wandb = ""  # Weights & Biases project that also gets the metrics; "": none
    c.logging.episodes_every = 10  # steps between episode files
    return c.lock()  # a misspelt field in a configuration file is an error, not a new field


def config_hash(config: ConfigDict) -> str:
    """A short hash of the configuration without the section `distributed`: processes do not change a run."""
    fields = json.loads(config.to_json_best_effort())
    del fields["distributed"]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
