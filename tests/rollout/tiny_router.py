"""A router small enough to check by hand: a tokenizer of words, a random model, a pool that replies at once or late."""

import dataclasses
import hashlib
import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.model import ModelConfig, abstract_params
from router_r1_jax.rollout import Engine, EpisodeLimits, Prompt, StaticShapes, common_prefix

# Many words end a tag, some in their middle, so that random sampling makes calls and answers often.
CLOSING = [f"{a}</search>{b}" for a in ("", "a", "b", "c") for b in ("", ".", "!")]
CLOSING += ["</answer>", "d</answer>e", "?</answer>", "</answer></search>"]
# Halves of a tag: their bytes are seen as one, though decoding sets words apart.
HALVES = [f"{a}</sea" for a in ("", *"abcdefg")] + [f"rch>{b}" for b in ("", *".!?;,+-")] + ["</ans", "wer>"]
TAGS = ["<search>", "<answer>", "<think>", "</think>", "<information>", "</information>"]
WORDS = ["[UNK]", "[END]", *TAGS, *CLOSING, *HALVES, *(f"w{i}" for i in range(60))]

SHAPES = StaticShapes(
    slots=4,
    decode_batch=4,
    row_tokens=40,
    turn_tokens=12,
    episode_tokens=99,
    prefill_tokens=14,
    prefill_chunk=4,
    prefill_rows=2,
    prefill_wait=2,
    callback_rows=2,
    poll_every=3,
)
MAX_CALLS = 3
REPLY_TOKENS = 6
SEED = 11


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word, words set apart by white space."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[END]")


TOKENIZER = make_tokenizer()
MODEL = ModelConfig(
    vocab_size=len(WORDS), num_layers=2, width=16, mlp=24, num_heads=4, num_kv_heads=2, head_dim=4, remat="none"
)


def make_params():
    """Stacked parameters, large enough that the next word really depends on what stands before it."""
    rng = np.random.default_rng(0)
    shapes = abstract_params(MODEL, make_mesh(1, 1, 1, jax.devices()[:1]))

    def leaf(path, shape):
        centre, spread = (1.0, 0.1) if "scale" in str(path) else (0.0, 0.25)
        return (centre + spread * rng.normal(size=shape.shape)).astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def make_engine(driver: str = "jit", *, devices=None, tensor: int = 1, episode_limits=None, **shapes: int) -> Engine:
    """An engine of this model with its random parameters, on the first device; `shapes` replace those of SHAPES.

    Without `decode_batch` all rows are in the decode batch.
    """
    shapes = {"decode_batch": shapes.get("slots", SHAPES.slots)} | shapes
    episode_limits = episode_limits or EpisodeLimits(max_calls=MAX_CALLS, reply_tokens=REPLY_TOKENS)
    where = {"driver": driver, "devices": devices or jax.devices()[:1], "tensor": tensor}
    engine = Engine(MODEL, SHAPES._replace(**shapes), TOKENIZER, episode_limits, **where)
    engine.sync_weights(make_params())
    return engine


def make_prompts(n: int, *, shared: int = 9, seed: int = 0) -> list[Prompt]:
    """Prompts with `shared` common tokens and 1 to 10 of their own; episode numbers are not row numbers."""
    rng = np.random.default_rng(seed)
    head = rng.integers(20, len(WORDS), size=shared).tolist()
    tails = [[30 + i, *rng.integers(20, len(WORDS), size=rng.integers(0, 10)).tolist()] for i in range(n)]
    return [Prompt(int(rng.integers(1 << 20)) * n + i, tuple(head + tail)) for i, tail in enumerate(tails)]


def sample(engine: Engine, prompts, respond, *, seed: int = SEED, **kwargs):
    """Episodes and stats of a run whose prefix is the prompts' common one, at temperature 1."""
    settings = {"temperature": 1.0, "prefix_tokens": common_prefix([p.tokens for p in prompts])} | kwargs
    return engine.run(prompts, respond, seed=seed, **settings)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the pool gives back."""

    text: str


def reply_text(route: str, episode: int, call: int) -> str:
    """A reply that depends on all the loop passed on: 0 to 9 words."""
    digest = hashlib.sha256(f"{route}|{episode}|{call}".encode()).digest()
    return " ".join(f"w{byte % 60}" for byte in digest[1 : 1 + digest[0] % 10])


class Latecomers:
    """A pool whose replies take the given times, in seconds, dealt out over the calls in the order they come in."""

    def __init__(self, delays=(0.0,), texts=reply_text, threads=8):
        self._delays, self._texts = list(delays), texts
        self._threads = ThreadPoolExecutor(threads)
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, route: str, *, episode: int, call: int) -> Future:
        delay = self._delays[len(self.calls) % len(self._delays)]
        self.calls.append((route, episode, call))
        return self._threads.submit(self._answer, delay, route, episode, call)

    def _answer(self, delay: float, *call) -> Reply:
        time.sleep(delay)
        return Reply(self._texts(*call))


def at_once(texts=reply_text):
    """A pool that has replied before the call returns."""

    def respond(route: str, *, episode: int, call: int) -> Future:
        future = Future()
        future.set_result(Reply(texts(route, episode, call)))
        return future

    return respond
