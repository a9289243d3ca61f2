"""Which room may import which, read from every module's syntax tree: imports inside functions and for types count too.

A room is a folder of the package or a file at its top level. A command may import every room; nobody imports a command.
"""

import ast
from pathlib import Path

import pytest

import router_r1_jax

PACKAGE = "router_r1_jax"
ROOT = Path(router_r1_jax.__file__).parent
FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "torch", "tensorflow"}
FOLDERS = set(
    "baselines data distributed evaluation learner model pool report reward rollout setup storage synthetic "
    "training".split()
)
# What a room may import directly, beside itself.
ALLOWED = {
    "errors": "",
    "protocol": "",
    "config": "errors",
    "config_checks": "config",
    "storage": "errors",
    "distributed": "errors",
    "launcher": "config config_checks distributed errors storage",
    "model": "distributed errors",
    "learner": "distributed errors model",
    "rollout": "distributed errors model protocol",
    "reward": "errors protocol",
    "prompts": "config pool protocol",
    "pool": "config errors launcher protocol",
    "data": "config errors protocol storage",
    "router": "config data distributed model pool prompts rollout reward",
    "report": "protocol storage",
    "evaluation": "config data errors pool prompts protocol reward rollout router storage",
    "setup": "config data distributed model pool prompts router storage synthetic",
    "training": "config data distributed errors evaluation launcher learner model prompts reward router setup storage",
    "synthetic": "baselines config data errors launcher learner pool prompts protocol report reward rollout router "
    "training",
    "baselines": "config data evaluation learner model pool prompts protocol report reward rollout router setup "
    "storage training",
}
# Commands that are libraries too; synthetic.server is no command but a process, which its own library starts.
LIBRARIES = {"training.warmstart", "pool.call_cache", "synthetic.oracle", "synthetic.server"}
WITHOUT_FRAMEWORK = (
    "reward pool protocol prompts data config config_checks launcher errors evaluation.statistics".split()
)
TOP_LEVEL_FILES = 14  # at most: a newcomer opens them first


def read_package(root):
    """Module name -> (syntax tree, whether it is a package) of all files under root."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        modules[".".join(parts[:-1] if is_package else parts)] = (ast.parse(path.read_text()), is_package)
    return modules


def imports(modules, name, *, eager=False):
    """Full names that a module imports: modules of the package if there are such, else the name as written.

    With `eager`, only imports at the top level of the module.
    """
    tree, is_package = modules[name]
    found = set()
    for node in tree.body if eager else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in modules)
    return found


def reach(modules, start, lazy=()):
    """Everything that importing `start` imports, parent packages included, as name -> the module that imports it.

    Of modules in `lazy`, imports inside functions are left out.
    """
    asked_by, queue = {start: None}, [start]
    while queue:
        name = queue.pop()
        parents = [name.rpartition(".")[0]] if name in modules else []
        for other in [*imports(modules, name, eager=name in lazy), *parents] if name in modules else []:
            if other and other not in asked_by:
                asked_by[other] = name
                queue.append(other)
    return asked_by


def room_of(name):
    """`router_r1_jax.pool.cards` -> pool; None outside the package and for the package itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


MODULES = read_package(ROOT)
COMMANDS = {
    name
    for name, (tree, _) in MODULES.items()
    for node in tree.body
    if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
}


def full_names(names):
    return {f"{PACKAGE}.{name}" for name in names}


def in_room(room):
    return [name for name in MODULES if name == f"{PACKAGE}.{room}" or name.startswith(f"{PACKAGE}.{room}.")]


def imports_between_rooms():
    """Pairs (module, module of another room that it imports), without commands that are no libraries."""
    for name in MODULES.keys() - (COMMANDS - full_names(LIBRARIES)):
        for other in imports(MODULES, name):
            if room_of(name) and room_of(other) not in (room_of(name), None):
                yield name, other


def test_every_folder_is_a_known_room_and_the_top_level_stays_small():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == FOLDERS
    assert len(list(ROOT.glob("*.py"))) <= TOP_LEVEL_FILES


def test_every_room_has_its_rule():
    commands = {room_of(name) for name in COMMANDS} - FOLDERS
    assert {room_of(name) for name in MODULES} - {None} - commands == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room):
    wrong = {
        f"{name} imports {other}"
        for name, other in imports_between_rooms()
        if room_of(name) == room and room_of(other) not in ALLOWED[room].split()
    }
    assert wrong == set()


def test_no_two_rooms_import_each_other():
    pairs = {(room_of(name), room_of(other)) for name, other in imports_between_rooms()}
    assert {(a, b) for a, b in pairs if (b, a) in pairs} == set()


def test_only_the_environment_imports_the_synthetic_world_and_only_if_a_configuration_asks_for_it():
    importers = {name for name, other in imports_between_rooms() if room_of(other) == "synthetic"}
    assert importers == full_names({"setup.environment"})
    eager = imports(MODULES, f"{PACKAGE}.setup.environment", eager=True)
    assert not any(room_of(name) == "synthetic" for name in eager)


def test_nobody_imports_a_command():
    """Two commands that share code share it in a room."""
    assert full_names(LIBRARIES) < COMMANDS
    wrong = {
        f"{name} imports {other}"
        for name in MODULES
        for other in imports(MODULES, name)
        if other in COMMANDS - full_names(LIBRARIES)
    }
    assert wrong == set()


@pytest.mark.parametrize("room", WITHOUT_FRAMEWORK)
def test_no_framework_is_reached(room):
    """The launcher imports JAX inside functions, for commands that take a configuration, such as pool.check."""
    assert in_room(room)
    for start in set(in_room(room)) - full_names({"pool.check"}):
        asked_by = reach(MODULES, start, lazy=full_names({"launcher"}))
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
    assert imports(modules, "p.a.x", eager=True) == set()
    for start in ("p.d", "p.e", "p.a.y"):
        assert {"jax.numpy", "flax.struct"} <= set(reach(modules, start)), start
    assert "jax.numpy" not in reach(modules, "p.b")
    assert "jax.numpy" not in reach(modules, "p.e", lazy={"p.a.x"})
