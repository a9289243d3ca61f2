"""The tiny configuration on prepared sets: --config=real_config.py:data=DIR,pool=URL,source=FOLDER.

`source` is a router that the synthetic world has taught to call and to answer; the set "mine" holds questions of that
world in FlashRAG's form, so that real sets, which it cannot answer, stand beside one that it can.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.config import PAPER_SETS, use_paper_data


def tiny_config() -> ConfigDict:
    """What tiny_config.py says."""
    spec = importlib.util.spec_from_file_location("tiny_config", Path(__file__).with_name("tiny_config.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def get_config(arg: str) -> ConfigDict:
    given = dict(part.split("=", 1) for part in arg.split(","))
    c = tiny_config()
    use_paper_data(c)
    c.data.dir = given["data"]
    c.data.train, c.data.validation, c.data.test = ("mine", "hotpotqa"), ("mine", "nq"), ("mine", *PAPER_SETS)
    c.data.per_set.update(dict(train=40, validation=4, test=5))
    c.synthetic.simulate_models = False
    c.pool.providers[0].base_url = given["pool"]
    c.model.source = given["source"]
    c.warmstart.steps = 0
    c.steps = 2
    c.prompt.question_tokens = 160
    c.rollout.max_row_tokens = 256
    c.validation.questions = 8
    return c
