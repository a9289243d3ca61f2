"""The demo's kept warm start: it has the format and copies, it does not know whom to ask, it can be made again."""

import runpy
from pathlib import Path

import mains
import numpy as np
import pytest

from router_r1_jax.data.world import claim, query_text
from router_r1_jax.evaluation.records import make_records, summarise
from router_r1_jax.reward import CostNormalizer
from router_r1_jax.session import open_session
from router_r1_jax.train import judge
from router_r1_jax.warmstart import load_warm_start

DEMO = Path(__file__).parents[1] / "configs" / "demo.py"
MOST_BYTES = 16e6


def answers(path, workdir):
    """Records of all validation questions answered by a warm start, sampled, under eight orders of the cards."""
    config = runpy.run_path(str(DEMO))["get_config"]()
    with open_session(config, workdir, load_source=False) as session:
        session.router.push(load_warm_start(path, session))
        questions, records = session.questions("validation"), []
        for roster in range(8):
            found = session.router.answer(
                questions, group=1, temperature=1.0, seed=(0, roster), step=0, split="validation"
            )
            rewards = judge(config, found, CostNormalizer(config.reward.window))
            records += make_records(
                found.questions, found.episodes, rewards, step=0, split="validation", policy="warm start"
            )
        return records, session.world, session.cards


def follows_the_script(record, world, cards):
    """Whether each call asks for the fact that is due and the answer is what the last reply named, right or wrong."""
    question = next(q for q in world.questions("validation") if q.id == record["id"])
    if len(record["calls"]) != len(question.hops):
        return False
    skills = {card.key: card.performance for card in cards}
    entity = question.hops[0].subject
    for hop, call in zip(question.hops, record["calls"], strict=True):
        if call["model"] not in skills or call["query"] != query_text(hop.relation, entity):
            return False
        entity = claim(world.fact(hop.relation, entity), skills[call["model"]])
    return record["response"].rstrip().endswith(f"<answer> {entity} </answer>")


def assert_ready_for_rl(path, workdir):
    """Well-formed and faithful nearly always; the best model is asked no more often than a random choice would."""
    assert path.stat().st_size <= MOST_BYTES
    records, world, cards = answers(path, workdir)
    figures = summarise(records, cards)
    assert figures["malformed_share"] <= 0.02
    assert figures["two_hop_two_calls"] >= 0.98
    assert np.mean([follows_the_script(record, world, cards) for record in records]) >= 0.95
    # One in five is chance; between orders of the cards it varies by 0.03, so eight of them tell it to 0.01.
    assert figures["best_model_share"] <= 0.25
    assert all(0.1 < share < 0.3 for share in figures["calls/share"].values()), figures["calls/share"]


def test_the_kept_warm_start_knows_the_format_and_not_whom_to_ask(tmp_path):
    assert_ready_for_rl(DEMO.parent / "demo_warmstart.safetensors", tmp_path)


@pytest.mark.slow
def test_the_documented_command_makes_it_again(tmp_path):
    made = tmp_path / "made.safetensors"
    mains.succeed("warmstart", tmp_path / "run", f"warmstart.file={made}", config=DEMO, timeout=45 * 60)
    assert_ready_for_rl(made, tmp_path / "run")
