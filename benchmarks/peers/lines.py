"""Size of source files: `python benchmarks/peers/lines.py FILE...`.

Prints lines, functions, the longest function (its docstring left out) and the deepest nesting of
if, for, while, with and try, of all files together.
"""

import ast
import sys
from pathlib import Path

BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith)


def length(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    documented = ast.get_docstring(function) is not None
    doc = function.body[0].end_lineno - function.body[0].lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - doc


def depth(node: ast.AST) -> int:
    """Blocks around the innermost statement; an elif is not deeper than its if."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def main(*files: str) -> None:
    """Prints one line."""
    lines, lengths, deepest = 0, [], 0
    for file in files:
        text = Path(file).read_text(encoding="utf-8")
        lines += len(text.splitlines())
        tree = ast.parse(text)
        deepest = max(deepest, depth(tree))
        functions = [
            n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        lengths += map(length, functions)
    print(f"{lines} lines, {len(lengths)} functions, longest {max(lengths)}, nesting {deepest}")


if __name__ == "__main__":
    main(*sys.argv[1:])
