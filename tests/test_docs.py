"""The pages in docs/ are true: generated pages are current, metrics and files are a run's, links lead somewhere."""

import importlib
import importlib.util
import json
import pkgutil
import re
from pathlib import Path

import pytest

import router_r1_jax
from router_r1_jax.reward import FAULTS
from router_r1_jax.training.alarms import SIGNS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "ARCHITECTURE.md", *DOCS.rglob("*.md")])


def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "text"), [("config.md", "config_page"), ("api.md", "api_page")])
def test_generated_pages_are_current(page, text):
    assert (DOCS / "reference" / page).read_text() == getattr(generate(), text)(), "run python docs/generate.py"


def test_every_field_of_the_configuration_has_its_line_and_its_meaning():
    from router_r1_jax.config import base_config

    def leaves(section, prefix=""):
        for name, value in section.items():
            if hasattr(value, "items") and prefix + name != "synthetic.world":
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    lines = {
        line.split("`")[1]: line for line in (DOCS / "reference/config.md").read_text().splitlines() if "| `" in line
    }
    assert set(leaves(base_config())) == set(lines)
    assert all(len(line.rsplit("` | ", 1)[1]) > 8 for line in lines.values())


def test_every_export_has_its_entry():
    text = (DOCS / "reference/api.md").read_text()
    for _, name, is_package in pkgutil.iter_modules(router_r1_jax.__path__):
        if is_package:
            module = importlib.import_module(f"router_r1_jax.{name}")
            for export in getattr(module, "__all__", []):
                assert f"::: router_r1_jax.{name}.{export}\n" in text, (name, export)


def documented(page):
    """The names in the first column of the page's tables."""
    rows = [line.split("|")[1] for line in (DOCS / page).read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def general(key):
    """The name under which the page speaks of a metric."""
    for prefix, name in (
        ("calls/share/", "<model>"),
        ("format/", "<fault>"),
        ("stops/", "<reason>"),
        ("alarms/", "<alarm>"),
    ):
        if key.startswith(prefix):
            return prefix + name
    return key


def test_the_metrics_page_names_what_a_run_writes(finished_run, warm_file):
    names = documented("reference/metrics.md")
    for workdir in (finished_run, warm_file.parent):
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert {general(key) for line in lines for key in line} - names == set()
    source = "".join(path.read_text() for path in Path(router_r1_jax.__file__).parent.rglob("*.py"))
    for name in names:
        words = re.split(r"[/<>]", name)
        known = all(word.rstrip("0123456789") in source for word in words)
        assert known, f"{name} is documented and nowhere written"
    assert len(FAULTS) > 5 and len(SIGNS) > 5


def test_the_workdir_page_names_the_files_of_a_run(finished_run):
    names = documented("reference/workdir.md")
    for path in finished_run.iterdir():
        known = {path.name, f"{path.name}/", "plots/*.png", "checkpoints/STEP/", "episodes/train.jsonl"}
        listed = bool(known & names) and (path.name not in ("plots", "checkpoints", "episodes") or path.is_dir())
        assert listed or path.name.endswith(".stdout"), path.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_that_a_page_names_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    package = ROOT / "router_r1_jax"
    for name in re.findall(r"`((?:router_r1_jax/)?[a-z_]+(?:/[a-z_]+)*\.py)`", text):
        found = [folder / name for folder in (ROOT, package, ROOT / "tests", ROOT / "experiments")]
        assert any(path.exists() for path in found), name
    for module in re.findall(r"python -m (router_r1_jax(?:\.[a-z_]+)*)", text):
        assert importlib.util.find_spec(module) is not None, module


def test_pages_are_short_enough_to_be_read():
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 150
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
