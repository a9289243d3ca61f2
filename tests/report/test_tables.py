"""Results tables and the plots per dataset: what is in the results stands there, and nothing breaks a table."""

import pytest
from fake_run import fake_datasets, fake_results

from router_r1_jax.report import calls_by_dataset, em_by_dataset
from router_r1_jax.report.colours import GREY, share_columns
from router_r1_jax.report.tables import Table, baselines_markdown, results_markdown, results_text, sweep_markdown


@pytest.fixture
def results():
    results = fake_results() | {"changes": ["drop=Titan", "blank"]}
    results["policies"][0] |= fake_datasets() | {
        "samples": {"per_question": 5, "temperature": 0.7, **fake_datasets(0.2)}
    }
    results["policies"][1] |= fake_datasets(0.3) | {"paper": {}}
    return results


def rows(text):
    """Cells of every row, all tables one behind the other."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_every_dataset_stands_beside_the_papers_result(results):
    text = results_markdown(results)
    first = next(row for row in rows(text) if row[0] == "nq")
    assert first[:3] == ["nq", "500", "40.0 [36.0, 44.0]"]
    assert first[8] == first[9] == "40.0 [36.0, 44.0]"  # malformed, failed
    assert first[-3:] == ["41.0", "-1.0 [-6.0, +4.0]", "within noise"]
    verdicts = [row[-1] for row in rows(text) if row[0] in ("nq", "popqa", "bamboogle", "synthetic")][:4]
    assert verdicts == ["within noise", "differs", "differs", ""]  # the last dataset is none of the paper's
    assert "## trained, step 120: 5 samples a question at temperature 0.7" in text
    assert "pool changed: `drop=Titan`, `blank`" in text
    assert "220 / 14 / 166" in text and "3.4e-49" in text


def test_the_console_says_what_a_row_over_several_datasets_is(results):
    for policy in results["policies"]:
        policy["datasets"] = fake_datasets()["datasets"]
    text = results_text(results)
    assert "greedy; EM, F1 and shares in percent; a policy's own row is the mean over its datasets\n" in text
    row = next(line for line in text.splitlines() if line.startswith("trained: nq"))
    assert row.split()[2:5] == ["40.0", "[36.0,", "44.0]"]
    for policy in results["policies"]:
        policy["datasets"] = {"nq": policy["datasets"]["nq"]}
    assert "greedy; EM, F1 and shares in percent\n" in results_text(results)


def test_a_policy_without_the_papers_datasets_has_no_such_columns(results):
    results["policies"] = results["policies"][1:]
    results["gain"] = {}
    assert "paper" not in results_markdown(results).split("Per question, with")[0]


def test_tables_hold_whatever_a_name_is(results):
    wide = {len(row) for row in rows(results_markdown(results))}
    results["policies"][0]["name"] = "a|b\n<script>"
    hostile = results["policies"][0]["datasets"].pop("nq")
    results["policies"][0]["datasets"]["n|q\n<b>"] = hostile | {"stops": {"|\n|": 1.0}}
    text = results_markdown(results)
    assert "<script>" not in text and "<b>" not in text
    assert {len(row) for row in rows(text.replace("\\|", ""))} == wide


def test_plots_per_dataset_need_datasets(results, tmp_path):
    assert em_by_dataset(results, tmp_path / "em.png").stat().st_size > 5000
    assert calls_by_dataset(results, tmp_path / "calls.png").stat().st_size > 5000
    single = fake_results()
    assert em_by_dataset(single, tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()
    assert calls_by_dataset(single, tmp_path / "policies.png").exists()  # a bar for each policy


def test_of_many_models_the_most_called_are_named_and_the_others_counted(results, tmp_path):
    """Twenty models, the first called most: ten columns, and one whose share is the rest."""
    shares = {f"m{i:02}": (20 - i) / 210 for i in range(20)} | {"silent": 0.0}
    for policy in results["policies"]:
        for entry in (policy, *policy["datasets"].values()):
            entry["calls_share"] = shares
    table = rows(results_markdown(results))
    head = next(i for i, row in enumerate(table) if row[:2] == ["dataset", "m00"])
    assert table[head][1:13] == [*(f"m{i:02}" for i in range(10)), "10 others", "ended by"]
    assert table[head + 2][11] == f"{100 * sum(range(1, 11)) / 210:.1f} %"
    assert calls_by_dataset(results, tmp_path / "calls.png")


def test_share_columns_leave_no_share_out():
    eleven = {f"m{i:02}": 1 / 11 for i in range(11)}
    columns, rows = share_columns([eleven])
    assert list(columns) == list(eleven) and rows == [eleven]
    columns, rows = share_columns([{"a": 0.0, "b": 1.0}, {"c": 0.5}])
    assert list(columns) == ["b", "c"] and rows == [{"b": 1.0, "c": 0.0}, {"b": 0.0, "c": 0.5}]
    columns, rows = share_columns([eleven | {"m11": 0.01}, {"m11": 0.02, "m05": 0.3}])
    assert columns["2 others"] == GREY and len(columns) == 11
    assert [sum(row.values()) for row in rows] == pytest.approx([1.01, 0.32])


def test_a_table_is_markdown_or_text():
    table = Table(["policy", "EM"], [["a*|b", "1.0"], ["long name", "100.0"]])
    assert table.markdown().splitlines() == [
        "| policy | EM |",
        "| --- | ---: |",
        "| a\\*\\|b | 1.0 |",
        "| long name | 100.0 |",
    ]
    assert table.text().splitlines() == ["policy        EM", "a*|b         1.0", "long name  100.0"]


def test_a_sweep_has_a_line_per_setting_and_per_run():
    run = {"name": "alpha=0.6,seed=1", "overrides": {"reward.alpha": 0.6, "seed": 1}, "em": 0.41, "em_ci": [0.0, 1.0]}
    setting = {"setting": {"reward.alpha": 0.6}, "seeds": 2, "em": {"mean": 0.4, "ci": [0.3, 0.5]}}
    text = sweep_markdown({"runs": [run], "settings": [setting], "failed": {"x": "not finished"}})
    found = rows(text)
    assert found[2][:3] == ["reward.alpha=0.6", "2", "40.0 [30.0, 50.0]"] and found[5][:2] == [run["name"], "41.0"]
    assert text.endswith("|\n\n- missing: x: not finished\n")
    assert sweep_markdown({"runs": [], "settings": [setting], "failed": {}}).endswith("|\n")


def test_baselines_stand_beside_the_routers_lead():
    policy = {"name": "knn*", "em": 0.4, "em_ci": [0.36, 0.44], "f1": 0.5, "dollars_per_question": 1.2e-5}
    policy |= {"calls_per_question": 1.25, "router_ahead": {"em": {"mean": 0.1, "ci": [-0.02, 0.2]}}}
    results = {"questions": 3, "split": "test", "policies": [policy], "models": 9, "candidates": 5}
    text = baselines_markdown(results)
    assert rows(text)[2] == ["knn\\*", "40.0 [36.0, 44.0]", "50.0", "$0.00001200", "1.25", "+10.0 [-2.0, +20.0]"]
    assert text.startswith("3 questions of the test split, mean of its datasets; intervals are 95 % bootstrap over")
    assert "choose among all 9 models, the router among the 5 it is shown.\n\n| policy |" in text
