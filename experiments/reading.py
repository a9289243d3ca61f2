"""How well a warm start reads cards: which names, scores and other words of scripted episodes it predicts.

The episodes have candidates that the warm start has not seen. Each token is predicted from all tokens before it. A
name "behind a score" must be looked up in the cards; "said again" is the same name in the call. The script samples
the scores at random, so no router can predict them. The script needs the tokenizer that
`experiments/studies/unseen_models.py` makes.

    python experiments/reading.py

The last line is one JSON object. For each kind it has the number of tokens, the share of tokens with a probability
above one half ("foreseen"), and the mean nats.
Result: experiments/studies/README.md, *What it takes to learn reading*.
"""

import collections
import json
import runpy
import tempfile
from pathlib import Path

import numpy as np

from router_r1_jax.learner import Learner, SupervisedLoss, make_layout, make_optimizer
from router_r1_jax.model import Params
from router_r1_jax.pool.cards import all_in_prompts
from router_r1_jax.setup import Session, open_session
from router_r1_jax.synthetic.warmstart_rows import warmstart_phases
from router_r1_jax.training import warmstart

CONFIG = Path(__file__).parents[1] / "configs/sweeps/demo_cards.py"
BATCHES = 6


def foreseen(session: Session, params: Params, batches: int) -> dict[str, dict[str, float]]:
    """For each kind of token in the episodes of so many updates: the count, the share foreseen, and the mean nats."""
    config, nats = session.config, collections.defaultdict(list)
    episodes = warmstart_phases(session.environment.world, session.router)[-1][-1]
    optimizer, _ = make_optimizer(
        learning_rate=0.0, warmup=1, total=1, decay=False, weight_decay=0.0, max_grad_norm=1.0
    )
    layout = make_layout(episodes.longest, buckets=1, tokens=config.learner.micro_tokens, rows=episodes.rows)
    learner = Learner(
        session.model.base,
        optimizer,
        SupervisedLoss(),
        session.mesh,
        session.abstract_base,
        layout=layout,
        chunk=config.learner.logit_chunk,
    )
    names = {card.name for card in all_in_prompts(session.cards, config.pool)}
    for step in range(config.warmstart.steps, config.warmstart.steps + batches):  # as if training went on
        prefix, rows = episodes.batch(step)
        for row, scores in zip(rows, learner.score(params, prefix, rows), strict=True):
            said = [session.tokenizer.decode([token]).strip() for token in row.tokens]
            for i in np.flatnonzero(row.mask):
                if said[i] in names:
                    kind = "name behind a score" if said[i - 1].isdigit() else "name said again"
                else:
                    kind = "score" if said[i].isdigit() else "other"
                nats[kind].append(-float(scores.logps[i]))
    return {
        kind: {"tokens": len(x), "foreseen": float(np.mean(np.array(x) < np.log(2))), "nats": float(np.mean(x))}
        for kind, x in nats.items()
    }


def main() -> None:
    config = runpy.run_path(str(CONFIG))["get_config"]()
    with tempfile.TemporaryDirectory() as folder, open_session(config, Path(folder), load_source=False) as session:
        params = warmstart.load_warm_start(Path(config.warmstart.file), session)
        print(json.dumps(foreseen(session, params, BATCHES)))


if __name__ == "__main__":
    main()
