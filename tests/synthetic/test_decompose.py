"""Decomposition by pattern: nested questions are split from the inside, others stay whole."""

from router_r1_jax.synthetic.decompose import by_pattern


def test_nested_questions_are_split_from_the_inside():
    assert by_pattern("What is the birthplace of the director of Velmora?") == [
        "director of Velmora?",
        "birthplace of {previous}?",
    ]
    assert by_pattern("Who is the director of Velmora?") == ["Who is the director of Velmora?"]
    assert by_pattern("How many rivers are there?") == ["How many rivers are there?"]
