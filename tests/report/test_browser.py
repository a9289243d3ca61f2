"""The page in a real browser, where there is one: episodes are drawn, filtered and harmless."""

import json
import re
import shutil
import subprocess

import pytest

from router_r1_jax.report.html_report import write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")]
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


def drawn(path):
    """The page's HTML once its script has run, the data block left out."""
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=5000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return re.sub(r'<script type="application/json".*?</script>', "", done.stdout, flags=re.S)


def test_questions_are_drawn_a_page_at_a_time_and_the_first_is_open(run, results):
    page = drawn(write_report(run, results, [], {}))
    assert page.count('<details class="question"') == 40 and page.count('open=""') == 1
    assert "40 of 40 questions" in page
    assert page.count('<section class="episode') == 2  # both policies' answer to the open question
    assert '<option value="10">only trained right</option>' in page


def test_one_policy_can_be_read_alone(run, results):
    path = write_report(run, results, [], {})
    choose = (
        'const beside = document.querySelector("[name=right]"); beside.value = "";'
        'beside.dispatchEvent(new Event("input", { bubbles: true }));'
    )
    page = re.sub("script-src '[^']*'", "script-src 'unsafe-inline'", path.read_text())
    path.write_text(page.replace("</main>", "</main><script>onload = () => { " + choose + " };</script>"))
    page = drawn(path)
    assert page.count('<section class="episode') == 1 and "40 of 40 questions" in page
    assert "only trained right" not in page


def test_hostile_text_is_read_and_not_run(run, results):
    for path in (run / "episodes").iterdir():
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            record["question"] = record["stop"] = record["dataset"] = HOSTILE
            record["response"] = f"<think>{HOSTILE}</think><answer>{HOSTILE}</answer>"
            record["calls"] = [call | {"model": HOSTILE, "outcome": HOSTILE} for call in record["calls"]]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = drawn(write_report(run, results, [], {}))
    assert "<title>Router run:" in page and "<img" not in page
    assert page.count("&lt;script&gt;") > 40
