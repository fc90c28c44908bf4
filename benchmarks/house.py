"""Sizes of lddyn/ as CONTRIBUTING.md quotes them: files, lines, functions, arrows between rooms.

python benchmarks/house.py
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
APART = {"lab", "demo"}  # experiments and demonstration: counted, and left out of one number


def module_of(path: Path) -> str:
    """lddyn/ops/gram.py → lddyn.ops.gram; a package's __init__.py → the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def arrows(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Room → rooms that it imports, for any reason (type checking, inside a function)."""
    graph = defaultdict(set)
    for module, tree in trees.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                here, there = module.split(".")[1:2], name.split(".")[1:2]
                if here and there and here != there and name in trees:
                    graph[here[0]].add(there[0])
    return graph


def in_circles(graph: dict[str, set[str]]) -> list[str]:
    """Rooms that reach themselves."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    return sorted(room for room in graph if room in reached(room))


def main() -> None:
    """Command line."""
    paths = sorted((ROOT / "lddyn").rglob("*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    trees = {module_of(path): ast.parse(text) for path, text in texts.items()}
    lines = {path: text.count("\n") for path, text in texts.items()}
    functions = [
        (node.end_lineno - node.lineno + 1, f"{module}.{node.name}")
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    core = sum(n for path, n in lines.items() if not APART & set(path.parts))
    large = sorted(((n, module_of(path)) for path, n in lines.items() if n > 600), reverse=True)
    flat = [path for path in paths if path.parent == ROOT / "lddyn"]
    # A line that imports Any says nothing yet.
    any_lines = [
        line
        for text in texts.values()
        for line in text.splitlines()
        if re.search(r"\bAny\b", line) and "import" not in line
    ]
    rooms = {module.split(".")[1] for module in trees if "." in module}
    print(f"files: {len(paths)}; lines: {sum(lines.values()):,}, {core:,} without lab and demo")
    print(f"modules side by side: {len(flat)}; rooms: {len(rooms)}")
    print(f"files beyond 600 lines: {len(large)} {large}")
    print(f"longest functions: {sorted(functions, reverse=True)[:3]}")
    print(f"rooms in circles: {in_circles(arrows(trees))}")
    skips = sum(text.count("fmt: skip") for text in texts.values())
    print(f"lines with Any: {len(any_lines)}; fmt: skip: {skips}")
    print(f"README: {len((ROOT / 'README.md').read_text(encoding='utf-8').splitlines())} lines")


if __name__ == "__main__":
    main()
