"""Rollouts with calls to slow models: our sampling loop against `transformers` generate with a barrier per turn.

What it shows: episodes per second of the same work on the same weights. Every episode has a shared prefix of 1024
tokens, a question of 32, three calls and a last turn; every turn samples 40 tokens, every reply brings 64 tokens and
takes as long as a seeded log-normal draw says (median 0.4 s, one in twenty 3 s), from an HTTP server on the loopback.
Turns end by their length, which the benchmark takes for a route tag (the fourth for an answer), so that random weights
do the same work in each system:

- `jit`, `host`: our engine with 64 slots, 512 episodes in groups of 8 per question; on a CPU a replica per core, which
  share the slots, since XLA computes a decode step's attention on one core;
- `generate`: the way that published code goes: 64 episodes at a time, each turn read anew from its first token, all
  episodes wait for the slowest call of the turn, ten threads make the calls;
- `tunix`: the same loop over the sampler of `google-tunix`, where that is installed (it is no dependency of ours);
  its compile time is taken off.

    python experiments/bench_rollout.py            L4 D256, seven to eleven minutes with Tunix
    python experiments/bench_rollout.py --full     also L8 D512, and episodes per second over slots and over latency:
                                                   an hour

`--keep=FILE` notes each part in a file when it is done, and does not repeat what stands there: an interrupted
run goes on with the part in which it stopped. Ratios of parts that ran hours apart say little: a machine's speed moves.

`step_vs_matmul` is the time of a decode step, all slots running at three quarters of their length, over that of its
bare matrix products (weights' and attention's, in one jit). The last line is one JSON object; its top-level keys hold
the worst value over the sizes that ran.

Result of `--full`, 26 November 2026, before there were decode batches smaller than the slots, 2 cores of an AMD EPYC
(Zen 4), jax 0.10.2, torch 2.13.0, google-tunix 0.1.7:

| | jitted | host-driven | generate | Tunix | vs generate | vs Tunix | jit vs host | idle share | step_vs_matmul |
|---|---|---|---|---|---|---|---|---|---|
| L4 D256, episodes/s | 10.4 | 9.49 | 0.789 | 0.488 | 13.2 | 21.4 | 1.10 | 0.011 | 1.17 |
| L8 D512, episodes/s | 2.57 | 2.19 | 0.220 | 0.111 | 11.6 | 23.2 | 1.17 | 0.0001 | 1.22 |
| aim | | | | | 10 | 10 | 1 | 0.05 | 3 |

Of L8 D512 half of the jitted run, a tenth of generate's and half of Tunix's went on beside tests on one of the cores.

The table, `results/rollout_scaling.png`, L4 D256, made later by `scaling` alone, which `--full` calls last, beside jobs
of low priority. Episodes per second of the steady part of a run, in brackets those of the whole run, whose end leaves
slots empty (four fills of the slots, with calls of 15 s among them at a median of 2 s):

| slots | decode batch | 0 s | 0.4 s | 1 s | 2 s |
|---|---|---|---|---|---|
| 64 | all | 16.9 (16.8) | 11.6 (10.2) | 8.0 (6.9) | 5.2 (4.4) |
| 256 | all | 18.5 (18.3) | 17.4 (15.6) | 16.5 (13.0) | 13.2 (9.6) |
| 256 | 64 | 15.0 (15.8) | 14.1 (14.5) | 15.4 (13.9) | 17.9 (12.6) |

and at 0.4 s 0.50, 1.55, 4.2, 11.6 and 17.4 with 1, 4, 16, 64 and 256 slots. A step computes the whole decode
batch, and on a CPU its time grows with it (13.6 ms with 64, 46 with 256). If all slots are in the decode batch, a slot
that waits costs as much as one that decodes, so 64 slots lose two thirds at 2 s. With 256 slots and a decode batch of
64 the rate does not fall: slots do not run out (at 2 s rows with tokens to read still waited for the decode batch in
15 % of the rows' steps), and its spread, 14.1 to 17.9, is that of 512 episodes on a busy machine (the step took 15.5 ms
at 0 s and 13.2 at 2 s). The cost of swapping shows at 0 s, when nothing waits. An accelerator's step is bound by
reading the weights if rows are few, so accelerators need a smaller decode batch less; that has not been measured.
"""

import argparse
import functools
import importlib.util
import json
import os
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measure import describe_machine, in_turns, load_torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.model import KV, Cache, ModelConfig, Params, Prefix, RouterLM, init_params, unroll
from router_r1_jax.rollout import Engine, EpisodeLimits, Prompt, StaticShapes, engine
from router_r1_jax.rollout.decode_batch import empty_caches
from router_r1_jax.rollout.host_callback import HostCallback
from router_r1_jax.rollout.row_state import DECODE, TURN_LIMIT, FromHost, ToHost, empty_rows
from router_r1_jax.rollout.step import Sampler, decode_step
from router_r1_jax.rollout.stop_tags import ANSWER, ROUTE

SIZES = {
    "L4 D256": dict(num_layers=4, width=256, mlp=1024, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=4096),
    "L8 D512": dict(num_layers=8, width=512, mlp=2048, num_heads=8, num_kv_heads=2, head_dim=64, vocab_size=32_768),
}
PREFIX, QUESTION, TURN, REPLY, CALLS, GROUP = 1024, 32, 40, 64, 3, 8
ROW = QUESTION + (CALLS + 1) * TURN + CALLS * REPLY
SLOTS, MEDIANS = (1, 4, 16, 64, 256), (0.0, 0.4, 1.0, 2.0)  # of the table, all in the decode batch
LINES = {(256, 64): "#0072B2", (256, 256): "#009E73", (64, 64): "#D55E00"}  # (slots, decode batch) over latency
TAGS = ("<information>", "</information>", "[UNK]")


class Latency(NamedTuple):
    """Seconds of a reply: log-normal around the median, and `slow` once in twenty."""

    median: float = 0.4
    slow: float = 3.0

    def of(self, episode: int, call: int) -> float:
        """Of one call of one episode: the same in every system."""
        draw = np.random.default_rng([7, episode, call])
        return self.slow if draw.random() < 0.05 else float(self.median * np.exp(0.35 * draw.standard_normal()))


# The models that are called


class _Replies(BaseHTTPRequestHandler):
    """POST /, with {"seconds": s}: answers with 62 words after s seconds."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(json.loads(body)["seconds"])
        text = " ".join(f"w{i}" for i in range(REPLY - 2)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 512  # as many connections as there may be calls at a time
    daemon_threads = True


def _serve(port: Any) -> None:
    with _Server(("127.0.0.1", 0), _Replies) as server:
        port.send(server.server_address[1])
        server.serve_forever()


@contextmanager
def reply_server() -> Iterator[str]:
    """The address of a server in a process of its own."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=[there], daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}/"
    finally:
        process.terminate()


def ask(address: str, seconds: float) -> str:
    """One reply."""
    body = json.dumps({"seconds": seconds}).encode()
    with urllib.request.urlopen(urllib.request.Request(address, body), timeout=60) as reply:
        return reply.read().decode()


# Ours


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... and the information tags; no token holds a part of a stop tag."""
    words = [*TAGS, *(f"w{i}" for i in range(vocab_size - len(TAGS)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


class ForcedCallback(HostCallback):
    """Takes the end of a turn by length for a route tag, and that of the fourth turn for an answer."""

    def _handle(self, report: ToHost) -> FromHost:
        reasons = [
            reason
            if reason != TURN_LIMIT
            else ANSWER
            if len(self._active[int(row)].episode.replies) == CALLS
            else ROUTE
            for row, reason in zip(report.row, report.reason, strict=True)
        ]
        return super()._handle(report._replace(reason=np.array(reasons, np.int32)))


class Reply(NamedTuple):
    """What the engine needs of a reply."""

    text: str


def static_shapes(slots: int, decode_batch: int) -> StaticShapes:
    """A chunk of 33 holds a question, and two a reply; looks for replies cost little beside steps of many ms."""
    prefill_tokens = max(QUESTION, REPLY + 1)
    room = engine.CALLBACK_BYTES // (4 * max(prefill_tokens, TURN))
    return StaticShapes(
        slots=slots,
        decode_batch=decode_batch,
        row_tokens=ROW,
        turn_tokens=TURN,
        episode_tokens=ROW,
        prefill_tokens=prefill_tokens,
        prefill_chunk=33,
        prefill_rows=min(8, decode_batch),
        prefill_wait=8,
        callback_rows=min(slots, room),
        poll_every=2,
    )


def make_prompts(config: ModelConfig, episodes: int) -> list[Prompt]:
    """Groups of 8 ask the same question."""
    rng = np.random.default_rng(1)
    first = len(TAGS)
    prefix = rng.integers(first, config.vocab_size, PREFIX).tolist()
    questions = rng.integers(first, config.vocab_size, (-(-episodes // GROUP), QUESTION))
    questions[:, 0] = first + np.arange(len(questions)) % (config.vocab_size - first)  # the shared part ends before it
    return [Prompt(i, (*prefix, *questions[i // GROUP].tolist())) for i in range(episodes)]


def our_rollout(
    config: ModelConfig, params: Params, address: str, *, driver: str, slots: int, decode_batch: int, latency: Latency
) -> dict[str, Any]:
    """Metrics of one run that fills the slots four times or more; a short one before it has compiled everything.

    `steady_per_s` leaves out as many of the first and of the last episodes to end as there are slots.
    """
    episodes = max(16, 4 * slots, min(512, 8 * slots))
    limits = EpisodeLimits(max_calls=CALLS, reply_tokens=REPLY)
    devices = jax.local_devices()[:slots]
    shapes = static_shapes(slots // len(devices), decode_batch // len(devices))
    where = {"driver": driver, "devices": devices, "tensor": 1}
    runner = Engine(config, shapes, make_tokenizer(config.vocab_size), limits, **where)
    runner.sync_weights(params)
    with ThreadPoolExecutor(slots) as threads:

        def respond(route: str, *, episode: int, call: int) -> Future:
            return threads.submit(lambda: Reply(ask(address, latency.of(episode, call))))

        prompts = make_prompts(config, episodes)
        draws = {"temperature": 1.0, "seed": 0, "prefix_tokens": PREFIX}
        runner.run(prompts[: 2 * GROUP], respond, **draws)
        ends: list[float] = []
        found, stats = runner.run(prompts, respond, on_finish=lambda _: ends.append(time.monotonic()), **draws)
    for episode in found:
        assert (episode.stop, len(episode.replies), len(episode.tokens)) == ("answer", CALLS, ROW - QUESTION)
        assert sum(episode.sampled) == (CALLS + 1) * TURN
    return {
        "episodes_per_s": episodes / stats.seconds,
        "steady_per_s": (episodes - 2 * slots) / (ends[-slots - 1] - ends[slots - 1]),
        "idle_share": stats.idle_share,
        "slots_used": stats.slots_used,
        "decode_share": stats.decode_seconds / stats.seconds,
        "prefill_share": stats.prefill_seconds / stats.seconds,
        "decode_batch_wait_share": stats.decode_batch_wait_share,
        "decode_step_ms": 1e3 * stats.decode_seconds / stats.decode_steps,
        "calls_in_flight": stats.calls_in_flight,
        "latency_p50": stats.latency(50),
    }


# The published way: all episodes in one batch, a barrier per turn, everything read anew each turn

Turn = Callable[[np.ndarray], np.ndarray]  # [B, T] ids -> [B, TURN] ids sampled behind them


def generate_turns(config: ModelConfig, params: Params) -> Turn:
    """`generate` of `transformers` on torch."""
    import torch

    model = load_torch(config, params).eval()
    settings = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "min_new_tokens": TURN,
        "max_new_tokens": TURN,
        "pad_token_id": 0,
        "eos_token_id": None,
    }

    def turn(contexts: np.ndarray) -> np.ndarray:
        ids = torch.tensor(contexts)
        with torch.no_grad():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, ids.shape[1] :].numpy()

    turn(np.ones((2, 64), np.int64))
    return turn


class _Ids:
    """The tokenizer that Tunix asks for: texts are ids with blanks between them."""

    def encode(self, text: str, **_: object) -> list[int]:
        return [int(token) for token in text.split()]

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return " ".join(map(str, ids))

    bos_id = pad_id = eos_id = staticmethod(lambda: 0)


def tunix_turns(config: ModelConfig) -> Turn:
    """The `Sampler` of Tunix, with random weights of the same shapes and a cache that just holds an episode."""
    from flax import nnx
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.qwen3 import model as qwen3

    c = config
    model = qwen3.Qwen3(
        qwen3.ModelConfig(
            num_layers=c.num_layers,
            vocab_size=c.vocab_size,
            embed_dim=c.width,
            hidden_dim=c.mlp,
            num_heads=c.num_heads,
            head_dim=c.head_dim,
            num_kv_heads=c.num_kv_heads,
            rope_theta=int(c.rope_theta),
            norm_eps=c.rms_eps,
            use_tied_embedding=c.tie_embeddings,
        ),
        rngs=nnx.Rngs(0),
    )
    sampler = Sampler(model, _Ids(), CacheConfig(PREFIX + ROW, c.num_layers, c.num_kv_heads, c.head_dim))

    def turn(contexts: np.ndarray) -> np.ndarray:
        texts = [" ".join(map(str, ids)) for ids in contexts]
        # No id is the end of a text, so that every turn has its whole length.
        settings = {"temperature": 1.0, "top_p": 1.0, "eos_tokens": [c.vocab_size + 1], "seed": contexts.shape[1]}
        out = sampler(texts, max_generation_steps=TURN, max_prompt_length=contexts.shape[1], **settings)
        return np.stack(out.tokens)

    return turn


class _Compiling:
    """Seconds that JAX has spent on tracing and compiling since this was made."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += seconds


def barrier_rollout(
    name: str, turn: Turn, config: ModelConfig, address: str, *, episodes: int, latency: Latency, threads: int = 10
) -> dict[str, Any]:
    """Metrics of a rollout in which all episodes wait for the slowest call of each turn. Compilation is not counted."""
    tokenizer = make_tokenizer(config.vocab_size)
    contexts = np.array([p.tokens for p in make_prompts(config, episodes)])
    calling, compiling, started = 0.0, _Compiling(), time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for call in range(CALLS + 1):
            contexts = np.concatenate([contexts, turn(contexts)], axis=1)
            assert contexts.shape == (episodes, PREFIX + QUESTION + (call + 1) * TURN + call * REPLY)
            if call < CALLS:
                asked = time.monotonic()
                replies = list(pool.map(lambda e, c=call: ask(address, latency.of(e, c)), range(episodes)))
                ids = [tokenizer.encode(f"{TAGS[0]} {r} {TAGS[1]}", add_special_tokens=False) for r in replies]
                contexts = np.concatenate([contexts, ids], axis=1)
                calling += time.monotonic() - asked
            print(f"  {name}: turn {call + 1} of {CALLS + 1} after {time.monotonic() - started:.0f} s", flush=True)
    seconds = time.monotonic() - started - compiling.seconds
    return {"episodes_per_s": episodes / seconds, "calling_share": calling / seconds, "compiling_s": compiling.seconds}


# A decode step and its products


def step_against_products(config: ModelConfig, params: Params, slots: int) -> dict[str, float]:
    """Milliseconds of a decode step with all slots running, and of its bare matrix products."""
    c, shapes = config, static_shapes(slots, slots)
    flat = unroll(params, c.num_layers)
    rng = np.random.default_rng(0)
    kv = KV(*(jnp.asarray(rng.normal(size=(PREFIX, c.num_kv_heads, c.head_dim)), c.dtype) for _ in range(2))).to_cache()
    prefix = Prefix((kv,) * c.num_layers, jnp.int32(PREFIX))
    table = jnp.zeros((16, c.vocab_size), jnp.uint8)
    sampler = Sampler(flat, prefix, table, jnp.int32(-1), jnp.float32(1), jax.random.key(0), None)
    rows = empty_rows(shapes).replace(
        status=jnp.full(slots, DECODE),
        position=jnp.full(slots, 3 * ROW // 4),
        episode=jnp.arange(slots, dtype=jnp.uint32),
    )
    step = jax.jit(functools.partial(decode_step, RouterLM(c, unrolled=True), shapes), donate_argnums=1)
    caches = [empty_caches(c, shapes, ROW)]

    def run_step() -> None:
        caches[0], found = step(sampler, caches[0], rows)
        jax.block_until_ready(found)

    @jax.jit
    def products(flat: Params, x: jax.Array, caches: tuple[Cache, ...]) -> jax.Array:
        """The same products in the same order of axes, without norms, rotary positions, softmax and sampling."""
        G, total = c.num_heads // c.num_kv_heads, jnp.float32(0)
        for i in range(c.num_layers):
            layer = flat[f"layer_{i}"]
            q, k, v = (x @ layer["attention"][n]["kernel"].reshape(c.width, -1) for n in "qkv")
            q = q.reshape(slots, c.num_kv_heads, G, c.head_dim)
            own = jnp.einsum("BKGH,BKHS->BKGS", q, caches[i].k)
            heads = q.swapaxes(0, 1).reshape(c.num_kv_heads, slots * G, c.head_dim)
            before = jnp.einsum("KRH,KHP->KRP", heads, prefix.kv[i].k)
            shared = jnp.einsum("KRP,KPH->KRH", before, prefix.kv[i].v).reshape(c.num_kv_heads, slots, G, c.head_dim)
            out = jnp.einsum("BKGS,BKSH->BKGH", own, caches[i].v) + shared.swapaxes(0, 1)
            x = out.reshape(slots, -1) @ layer["attention"]["o"]["kernel"].reshape(-1, c.width)
            gate, up = (x @ layer["mlp"][n]["kernel"] for n in ("gate", "up"))
            x = (gate + up) @ layer["mlp"]["down"]["kernel"]
            total += k[0, 0] + v[0, 0]
        return jnp.sum(x @ flat["embed"].T) + total

    x = jnp.asarray(rng.normal(size=(slots, c.width)), c.dtype)
    calls = {"step": run_step, "products": lambda: jax.block_until_ready(products(flat, x, caches[0].batch))}
    seconds = in_turns(calls, repeats=30)
    return {f"{name}_ms": 1e3 * value for name, value in seconds.items()} | {
        "step_vs_matmul": seconds["step"] / seconds["products"]
    }


# The whole


class Parts:
    """Runs the benchmark's parts; the metrics of finished parts stay in a file, if one is named."""

    def __init__(self, path: Path | None, address: str) -> None:
        """`address` is the reply server's."""
        self._path, self._address = path, address
        self._done: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}

    def metrics(self, name: str, part: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Of this part, which runs now unless it stands in the file."""
        if name not in self._done:
            self._done[name] = part()
            if self._path:
                self._path.write_text(json.dumps(self._done, indent=1))
        print(f"{name}: {self._done[name]}", flush=True)
        return self._done[name]

    def ours(self, size: str, *, driver: str, slots: int, decode_batch: int, latency: Latency) -> dict[str, Any]:
        """Metrics of one of our rollouts."""
        settings = {"driver": driver, "slots": slots, "decode_batch": decode_batch, "latency": latency}
        name = f"{size}, {driver}, {slots} slots, decode batch {decode_batch}, median {latency.median} s"
        return self.metrics(name, lambda: our_rollout(*make_router(size), self._address, **settings))

    def theirs(self, size: str, system: str) -> dict[str, Any]:
        """Metrics of one of the systems with a barrier per turn."""
        config, params = make_router(size)
        turns = {"generate": lambda: generate_turns(config, params), "tunix": lambda: tunix_turns(config)}
        settings = {"episodes": 64, "latency": Latency()}
        name = f"{size}, {system}"
        return self.metrics(name, lambda: barrier_rollout(system, turns[system](), config, self._address, **settings))


def make_router(size: str) -> tuple[ModelConfig, Params]:
    """Random weights of this size."""
    config = ModelConfig(**SIZES[size], family="qwen3", remat="none")
    return config, init_params(config, make_mesh(1, 1, 1, jax.devices()[:1]), seed=0)


def compare(parts: Parts, size: str) -> dict[str, Any]:
    """All systems at one size."""
    result = {"step": parts.metrics(f"{size}, step", lambda: step_against_products(*make_router(size), 64))}
    for driver in ("jit", "host"):
        result[driver] = parts.ours(size, driver=driver, slots=64, decode_batch=64, latency=Latency())
    theirs = ["generate", *(["tunix"] if importlib.util.find_spec("tunix") else [])]
    for system in theirs:
        result[system] = parts.theirs(size, system)
    per_s = result["jit"]["episodes_per_s"]
    return result | {
        **{f"ratio_vs_{system}": per_s / result[system]["episodes_per_s"] for system in theirs},
        "ratio_jit_vs_host": per_s / result["host"]["episodes_per_s"],
        "idle_share": result["jit"]["idle_share"],
        "step_vs_matmul": result["step"]["step_vs_matmul"],
    }


def scaling(parts: Parts) -> list[dict[str, float]]:
    """Rows of a table: episodes per second of the first size, over slots, decode batch and median latency."""

    def row(slots: int, decode_batch: int, median: float) -> dict[str, float]:
        latency = Latency(median, 7.5 * median)
        metrics = parts.ours("L4 D256", driver="jit", slots=slots, decode_batch=decode_batch, latency=latency)
        return {"slots": slots, "decode_batch": decode_batch, "median": median, **metrics}

    points = {(slots, slots, MEDIANS[1]) for slots in SLOTS} | {(*line, median) for line in LINES for median in MEDIANS}
    return [row(*point) for point in sorted(points)]


def draw(table: Sequence[dict[str, float]], path: Path) -> None:
    """The table as one picture: over slots, and over latency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)

    def line(axes: Any, rows: Sequence[dict[str, float]], x: str, colour: str, label: str | None = None) -> None:
        axes.plot([row[x] for row in rows], [row["steady_per_s"] for row in rows], "o-", color=colour, label=label)

    whole = [row for row in table if row["slots"] == row["decode_batch"]]
    line(left, [row for row in whole if row["median"] == MEDIANS[1]], "slots", "#555555")
    for (slots, batch), colour in LINES.items():
        rows = [row for row in table if (row["slots"], row["decode_batch"]) == (slots, batch)]
        label = f"{slots} slots, {batch if batch < slots else 'all'} in the decode batch"
        line(right, rows, "median", colour, label)
    left.set_xscale("log", base=2)
    left.set_xticks(SLOTS, SLOTS)
    left.set(xlabel="slots", ylim=(0, None))
    right.set(xlabel="median latency of a call, s", xticks=MEDIANS)
    right.legend(loc="lower left", frameon=False, labelcolor="linecolor", fontsize=9)
    left.set_title(f"Episodes per second, steady; calls of {MEDIANS[1]} s", loc="left", fontsize=10, fontweight="bold")
    right.set_title("Episodes per second, steady, over latency", loc="left", fontsize=10, fontweight="bold")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4", linewidth=0.7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="also the larger size, and the table")
    parser.add_argument("--keep", type=Path, help="a file that keeps what is done, so that a run can be interrupted")
    args = parser.parse_args()
    engine.HostCallback = ForcedCallback
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))  # read on a CPU only
    machine = describe_machine()
    table = None
    if importlib.util.find_spec("tunix") is None:
        print("tunix is not installed (pip install google-tunix): left out")
    with reply_server() as address:
        parts = Parts(args.keep, address)
        sizes = {size: compare(parts, size) for size in list(SIZES)[: 1 + args.full]}
        if args.full:
            table = scaling(parts)
            draw(table, Path(__file__).parent / "results" / "rollout_scaling.png")
    keys = {"ratio_jit_vs_host": min, "idle_share": max, "step_vs_matmul": max}
    keys |= {key: min for key in ("ratio_vs_generate", "ratio_vs_tunix") if key in sizes["L4 D256"]}
    worst = {key: of(size[key] for size in sizes.values()) for key, of in keys.items()}
    for system in ("jit", "host", "generate", "tunix"):
        if system in sizes["L4 D256"]:
            worst[f"episodes_per_s_{system}"] = min(size[system]["episodes_per_s"] for size in sizes.values())
    print(json.dumps(worst | {"sizes": sizes, "scaling": table, "machine": machine}))


if __name__ == "__main__":
    main()
