"""The shared prefix against a loop, and an episode's lists that run in step."""

from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.rollout import Episode, common_prefix


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=5))
def test_common_prefix_is_the_longest_that_leaves_each_a_token(prompts):
    lengths = [n for n in range(6) if all(p[:n] == prompts[0][:n] and len(p) > n for p in prompts)]
    assert common_prefix(prompts) == max(lengths)


def test_an_episode_keeps_tokens_log_probs_and_mask_in_step():
    episode = Episode(3, (1, 2))
    episode.sample([5, 6], [-0.5, -0.25], [-0.25, 0.0])
    episode.inject([7])
    assert (episode.tokens, episode.sampled) == ([5, 6, 7], [True, True, False])
    assert (episode.logps, episode.sampler_logps) == ([-0.5, -0.25, 0.0], [-0.25, 0.0, 0.0])
