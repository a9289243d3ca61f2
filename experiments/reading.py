"""How well a warm start reads cards: of the names, scores and other words of scripted episodes, which are foreseen.

Episodes on rosters that the warm start has not seen, each token judged given all before it. A name "behind a score" is
the one that has to be looked up in the cards; "said again" is the same name in the call. Scores are drawn at random by
the script, so no router foresees them. Needs the tokenizer that `experiments/studies/unseen_models.py` makes first.

    python experiments/reading.py

The last line is one JSON object: per kind its tokens, the share that has a probability above one half, and nats.
Result: experiments/studies/README.md, *What it takes to learn reading*.
"""

import collections
import json
import runpy
import tempfile
from pathlib import Path

import numpy as np

from router_r1_jax import warmstart
from router_r1_jax.learner import Learner, SupervisedLoss, make_layout, make_optimizer
from router_r1_jax.model import Params
from router_r1_jax.pool.cards import all_in_prompts
from router_r1_jax.session import Session, open_session

CONFIG = Path(__file__).parents[1] / "configs/sweeps/demo_cards.py"
BATCHES = 6


def foreseen(session: Session, params: Params, batches: int) -> dict[str, dict[str, float]]:
    """Per kind of token of so many updates' episodes: how many there are, the share foreseen, and mean nats."""
    config, nats = session.config, collections.defaultdict(list)
    optimizer, _ = make_optimizer(
        learning_rate=0.0, warmup=1, total=1, decay=False, weight_decay=0.0, max_grad_norm=1.0
    )
    layout = make_layout(
        warmstart.longest_row(session), buckets=1, tokens=config.learner.micro_tokens, rows=config.warmstart.batch
    )
    reader = Learner(
        session.model.base, optimizer, SupervisedLoss(), session.mesh, session.abstract_base,
        layout=layout, chunk=config.learner.logit_chunk,
    )  # fmt: skip
    names = {card.name for card in all_in_prompts(session.cards, config.pool)}
    for step in range(config.warmstart.steps, config.warmstart.steps + batches):  # as if training went on
        prefix, rows = warmstart.scripted_rows(session, step)
        for row, reading in zip(rows, reader.read(params, prefix, rows), strict=True):
            said = [session.tokenizer.decode([token]).strip() for token in row.tokens]
            for i in np.flatnonzero(row.mask):
                if said[i] in names:
                    kind = "name behind a score" if said[i - 1].isdigit() else "name said again"
                else:
                    kind = "score" if said[i].isdigit() else "other"
                nats[kind].append(-float(reading.logps[i]))
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
