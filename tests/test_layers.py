"""Who may import whom, read from every module's syntax tree: imports inside functions and for types count too."""

import ast
from pathlib import Path

import pytest

import router_r1_jax

PACKAGE = "router_r1_jax"
ROOT = Path(router_r1_jax.__file__).parent
FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "torch", "tensorflow"}
ROOMS = {"model", "rollout", "pool", "reward", "learner", "data", "evaluation", "report", "baselines"}
# What may be imported directly, beside the room itself. Only the mains and what they share see all rooms.
ALLOWED = {
    "mesh": set(),
    "hosts": set(),
    "protocol": set(),
    "config": set(),
    "checkpoint": set(),
    "prompts": {"config", "pool", "protocol"},
    "model": {"mesh"},
    "learner": {"mesh", "model"},
    "rollout": {"mesh", "model", "protocol"},
    "reward": {"protocol"},
    "pool": {"config", "protocol", "data"},  # data: the simulated models answer from the synthetic world
    "data": {"config", "pool", "prompts", "protocol"},  # pool: the cards
    "evaluation": {"config", "pool", "reward", "report", "protocol"},  # report: JSON lines
    "report": {"protocol"},
    # Policies beside the router, with a main of their own: they meet all rooms.
    "baselines": {
        "checkpoint", "cli", "config", "data", "evaluate", "evaluation", "experience", "learner", "learning", "model",
        "pool", "prompts", "protocol", "report", "reward", "router", "session", "train", "warmstart", "weights",
    },
}  # fmt: skip
WITHOUT_FRAMEWORK = ("reward", "pool", "protocol", "prompts", "data", "evaluation.statistics", "config")


def read_package(root):
    """Module name -> (syntax tree, whether it is a package) of all files under root."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        modules[".".join(parts[:-1] if is_package else parts)] = (ast.parse(path.read_text()), is_package)
    return modules


def imports(modules, name):
    """Full names that a module imports: modules of the package where there are such, else the name as written."""
    tree, is_package = modules[name]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in modules)
    return found


def reach(modules, start):
    """All that importing `start` imports, parent packages included, as name -> the module that asked for it."""
    asked_by, queue = {start: None}, [start]
    while queue:
        name = queue.pop()
        parents = [name.rpartition(".")[0]] if name in modules else []
        for other in [*imports(modules, name), *parents] if name in modules else []:
            if other and other not in asked_by:
                asked_by[other] = name
                queue.append(other)
    return asked_by


def room_of(name):
    """`router_r1_jax.pool.cards` -> pool; None outside the package and for the package itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


MODULES = read_package(ROOT)


def in_room(room):
    return [name for name in MODULES if name == f"{PACKAGE}.{room}" or name.startswith(f"{PACKAGE}.{room}.")]


def test_every_folder_is_a_known_room():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == ROOMS


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room):
    assert in_room(room)
    wrong = {
        f"{name} imports {other}"
        for name in in_room(room)
        for other in imports(MODULES, name)
        if room_of(other) not in ALLOWED[room] | {room, None}
    }
    assert wrong == set()


@pytest.mark.parametrize("room", WITHOUT_FRAMEWORK)
def test_no_framework_is_reached(room):
    assert in_room(room)
    for start in in_room(room):
        asked_by = reach(MODULES, start)
        wrong = {f"{by} imports {name}" for name, by in asked_by.items() if name.split(".")[0] in FRAMEWORKS}
        assert wrong == set(), f"reached from {start}"


def test_the_reader_sees_every_kind_of_import(tmp_path):
    """The rules above hold only as far as the imports are found."""
    root = tmp_path / "p"
    (root / "a").mkdir(parents=True)
    files = {
        "__init__.py": "",
        "a/__init__.py": "from .x import f",
        "a/x.py": "def f():\n    import jax.numpy as jnp\n",
        "a/y.py": "from p import b",
        "b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import c\n",
        "c.py": "import os, flax.struct",
        "d.py": "from .a.y import b",
        "e.py": "import p.a.y",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    modules = read_package(root)
    assert imports(modules, "p.a") == {"p.a.x"}
    assert imports(modules, "p.a.x") == {"jax.numpy"}
    assert imports(modules, "p.a.y") == {"p", "p.b"}
    assert imports(modules, "p.b") == {"typing", "p", "p.c"}
    for start in ("p.d", "p.e", "p.a.y"):
        assert {"jax.numpy", "flax.struct"} <= set(reach(modules, start)), start
    assert "jax.numpy" not in reach(modules, "p.b")
