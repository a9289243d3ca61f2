"""Writes the generated reference pages: docs/reference/config.md from config.py, docs/reference/api.md from __all__.

    python docs/generate.py

`make docs` runs it, and a test compares the pages with what it would write.
"""

import ast
import importlib
import pkgutil
import re
import tokenize
from pathlib import Path

import router_r1_jax
import router_r1_jax.config
from router_r1_jax.__main__ import list_commands

PAGES = Path(__file__).parent / "reference"
CONFIG_HEAD = """# Config fields

Every field of a configuration, with its default. The page is generated from `router_r1_jax/config.py`.

A file in `configs/` starts from `base_config()` and changes what it needs. A command line changes it once more:
`--config.reward.alpha=0.6`. An unknown field and a wrong type are refused. `config_checks.validate` refuses what has
the right type and still cannot run; its message names the field, the value and the fix.
"""
API_HEAD = """# Python API

What each package exports, and the modules behind it. The page is generated from `__all__` and module docstrings. On
the built site every name is followed by its signature and docstring.

Commands (`python -m router_r1_jax` lists them too):

"""


def config_fields() -> list[tuple[str, str, str]]:
    """(field, default as written, comment) of every assignment in `base_config`, in order; a section has default ""."""
    path = Path(router_r1_jax.config.__file__)
    source = path.read_text()
    lines = source.split("\n")
    with open(path, "rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens}
    function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "base_config")
    fields = []
    for node in function.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)):
            continue
        name = ast.unparse(node.targets[0]).removeprefix("c.")
        above, number = [], node.lineno - 1
        while lines[number - 1].lstrip().startswith("#"):
            above.insert(0, comments[number])
            number -= 1
        comment = " ".join([*above, *([comments[node.end_lineno]] if node.end_lineno in comments else [])])
        named = isinstance(node.value, ast.Name)  # a constant of the module
        value = repr(getattr(router_r1_jax.config, node.value.id)) if named else ast.unparse(node.value)
        fields.append((name, "" if value == "ConfigDict()" else value, comment))
    return fields


def config_page() -> str:
    """The text of docs/reference/config.md."""
    parts, section = [CONFIG_HEAD, "## Top level\n", "| field | default | meaning |", "|---|---|---|"], ""
    for name, default, comment in config_fields():
        top = name.partition(".")[0]
        if "." not in name and not default:
            section = top
            parts += [
                f"\n## {top}\n",
                f"{_sentence(comment)}\n" if comment else "",
                "| field | default | meaning |",
                "|---|---|---|",
            ]
        elif default:
            assert "." not in name or top == section, name
            parts.append(f"| `{name}` | `{_cell(default)}` | {_sentence(_cell(comment))} |")
    return "\n".join(part for part in parts if part) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    """The comment as a sentence; a list of choices keeps its first word as the configuration spells it."""
    if not re.match(r"\S+ (\\|:|\|)", text):
        text = text[:1].upper() + text[1:]
    return text if text.endswith(".") or not text else text + "."


def api_page() -> str:
    """The text of docs/reference/api.md."""
    parts = [
        API_HEAD + "\n".join(f"- `python -m router_r1_jax.{name}`: {text}" for name, text in list_commands().items())
    ]
    packages = [name for _, name, is_package in pkgutil.iter_modules(router_r1_jax.__path__) if is_package]
    files = [name for _, name, is_package in pkgutil.iter_modules(router_r1_jax.__path__) if not is_package]
    parts.append(
        "\n## Top level\n\n" + "\n".join(_module_line(f"router_r1_jax.{name}") for name in files if name != "__main__")
    )
    for package in packages:
        full = f"router_r1_jax.{package}"
        module = importlib.import_module(full)
        parts.append(f"\n## {package}\n\n{_headline(full)}\n")
        exported = getattr(module, "__all__", [])
        if exported:
            parts.append("Exports: " + ", ".join(f"`{name}`" for name in exported) + ".\n")
        inside = [name for _, name, _ in pkgutil.iter_modules(module.__path__) if name != "__main__"]
        parts.append("\n".join(_module_line(f"{full}.{name}") for name in inside))
        parts += [f"\n::: {full}.{name}" for name in exported]
    return "\n".join(parts) + "\n"


def _headline(module: str) -> str:
    path = Path(router_r1_jax.__file__).parent.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(re.split(r"\n\s*\n", docstring)[0].split())


def _module_line(module: str) -> str:
    return f"- `{module}`: {_headline(module)}"


if __name__ == "__main__":
    for name, text in (("config.md", config_page()), ("api.md", api_page())):
        (PAGES / name).write_text(text)
        print(f"wrote docs/reference/{name}")
