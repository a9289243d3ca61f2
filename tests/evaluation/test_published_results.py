"""The published results, and a verdict that is a test of the difference of two proportions."""

import numpy as np
import pytest

from router_r1_jax.evaluation import published_results


def table(em, n=500):
    half = 1.96 * np.sqrt(em * (1 - em) / n)
    return {"em": em, "em_ci": [em - half, em + half]}


@pytest.mark.parametrize(("family", "mean"), [("qwen2", 0.416), ("llama", 0.409)])
def test_the_published_mean_is_that_of_the_sets(family, mean):
    """The paper states the mean too: a mistyped number would show."""
    published = published_results.EXACT_MATCH[published_results.base_model(family)]
    assert np.mean(list(published.values())) == pytest.approx(mean, abs=5e-4) and len(published) == 7
    same = published_results.compare_with_paper({name: table(em) for name, em in published.items()}, family)
    assert same["mean"]["em"] == pytest.approx(mean, abs=5e-4)
    assert {row["verdict"] for row in same.values()} == {"within noise"}


def test_only_the_papers_sets_are_held_against_it():
    assert list(published_results.compare_with_paper({"synthetic": table(0.9), "nq": table(0.4)}, "qwen3")) == ["nq"]


def test_a_mean_over_more_sets_than_the_papers_is_not_held_against_its_mean():
    """The row "mean over sets" would show the mean of eight beside a difference of seven."""
    seven = {name: table(0.4) for name in published_results.EXACT_MATCH["Qwen2.5-3B-Instruct"]}
    assert "mean" in published_results.compare_with_paper(seven, "qwen2")
    assert set(published_results.compare_with_paper(seven | {"own": table(0.9)}, "qwen2")) == set(seven)


@pytest.mark.parametrize(("name", "n"), [("nq", 500), ("bamboogle", 125)])
def test_the_verdict_is_wrong_as_often_as_it_may_be(name, n):
    """Two samples of one proportion: "differs" about one time in twenty; of quite different ones: nearly always."""
    rng, trials = np.random.default_rng(0), 4000
    published = published_results.EXACT_MATCH["Qwen2.5-3B-Instruct"][name]
    # The paper's number is fixed in the module, so the true proportion is drawn around it instead.
    truth = published + rng.standard_normal(trials) * np.sqrt(published * (1 - published) / n)
    ours = rng.binomial(n, truth) / n
    differs = [
        published_results.compare_with_paper({name: table(em, n)}, "qwen2")[name]["verdict"] == "differs" for em in ours
    ]
    assert 0.03 < np.mean(differs) < 0.07
    far = published_results.compare_with_paper({name: table(published + 0.2, n)}, "qwen2")[name]
    assert far["verdict"] == "differs" and far["ci"][0] > 0 and far["difference"] == pytest.approx(0.2)
