"""List of all commands: `python -m router_r1_jax` prints each with the first sentence of its `main`'s docstring."""

import ast
from pathlib import Path


def list_commands() -> dict[str, str]:
    """Module name of every command, such as "data.prepare", and its description. No module is imported."""
    commands = {}
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        source = path.read_text()
        if "\n    launch(" not in source:
            continue
        main = next(
            node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "main"
        )
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__main__")
        commands[name] = " ".join((ast.get_docstring(main) or "").split()).partition(". ")[0].removesuffix(".") + "."
    return commands


if __name__ == "__main__":
    commands = list_commands()
    width = max(map(len, commands)) + 2
    for name, description in commands.items():
        print(f"python -m router_r1_jax.{name.ljust(width)}{description}")
