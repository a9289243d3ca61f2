"""results.md and the pictures per set: what is in the results stands there, and nothing breaks the table."""

import pytest
from fake_run import fake_results, fake_sets

from router_r1_jax.evaluate import print_table
from router_r1_jax.report import calls_by_set, em_by_set, results_table
from router_r1_jax.report.style import most_called


@pytest.fixture
def results():
    results = fake_results() | {"changes": ["drop=Titan", "blank"]}
    results["policies"][0] |= fake_sets() | {"samples": {"per_question": 5, "temperature": 0.7, **fake_sets(0.2)}}
    results["policies"][1] |= fake_sets(0.3) | {"paper": {}}
    return results


def rows(text):
    """Cells of every row, all tables one behind the other."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_every_set_stands_beside_the_papers_figure(results):
    text = results_table(results)
    first = next(row for row in rows(text) if row[0] == "nq")
    assert first[:3] == ["nq", "500", "40.0 [36.0, 44.0]"]
    assert first[8] == first[9] == "40.0 [36.0, 44.0]"  # malformed, failed
    assert first[-3:] == ["41.0", "-1.0 [-6.0, +4.0]", "within noise"]
    verdicts = [row[-1] for row in rows(text) if row[0] in ("nq", "popqa", "bamboogle", "synthetic")][:4]
    assert verdicts == ["within noise", "differs", "differs", ""]  # the last set is none of the paper's
    assert "## trained, step 120: 5 samples a question at temperature 0.7" in text
    assert "pool changed: `drop=Titan`, `blank`" in text
    assert "220 / 14 / 166" in text and "3.4e-49" in text


def test_the_console_says_what_a_row_over_several_sets_is(results, capsys):
    results["comparison"] = {}
    for policy in results["policies"]:
        policy["suites"] = fake_sets()["suites"]
    print_table(results)
    assert "greedy; a policy's own row is the mean over its sets\n" in capsys.readouterr().out
    for policy in results["policies"]:
        policy["suites"] = {"nq": policy["suites"]["nq"]}
    print_table(results)
    assert "greedy\n" in capsys.readouterr().out


def test_a_policy_without_the_papers_sets_has_no_such_columns(results):
    results["policies"] = results["policies"][1:]
    results["gain"] = {}
    assert "paper" not in results_table(results).split("Per question, with")[0]


def test_tables_hold_whatever_a_name_is(results):
    wide = {len(row) for row in rows(results_table(results))}
    results["policies"][0]["name"] = "a|b\n<script>"
    hostile = results["policies"][0]["suites"].pop("nq")
    results["policies"][0]["suites"]["n|q\n<b>"] = hostile | {"stops": {"|\n|": 1.0}}
    text = results_table(results)
    assert "<script>" not in text and "<b>" not in text
    assert {len(row) for row in rows(text.replace("\\|", ""))} == wide


def test_pictures_per_set_need_sets(results, tmp_path):
    assert em_by_set(results, tmp_path / "em.png").stat().st_size > 5000
    assert calls_by_set(results, tmp_path / "calls.png").stat().st_size > 5000
    single = fake_results()
    assert em_by_set(single, tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()
    assert calls_by_set(single, tmp_path / "policies.png").exists()  # a bar for each policy
    assert em_by_set({}, tmp_path / "none.png") is calls_by_set({}, tmp_path / "none.png") is None


def test_of_many_models_the_most_called_are_named_and_the_others_counted(results, tmp_path):
    """Twenty models, the first called most: ten columns, and one whose share is the rest."""
    shares = {f"m{i:02}": (20 - i) / 210 for i in range(20)} | {"silent": 0.0}
    for policy in results["policies"]:
        for entry in (policy, *policy.get("suites", {}).values()):
            entry["calls_share"] = shares
    table = rows(results_table(results))
    head = next(i for i, row in enumerate(table) if row[:2] == ["set", "m00"])
    assert table[head][1:13] == [*(f"m{i:02}" for i in range(10)), "10 others", "ended by"]
    assert table[head + 2][11] == f"{100 * sum(range(1, 11)) / 210:.1f} %"
    assert calls_by_set(results, tmp_path / "calls.png")
    eleven = {f"m{i:02}": 1 / 11 for i in range(11)}
    assert most_called(eleven) == (list(eleven), "") and most_called({"a": 0.0, "b": 1.0}) == (["b"], "")
