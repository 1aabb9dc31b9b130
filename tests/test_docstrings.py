"""Every public function and class of the product has a docstring, and docstrings write shapes as `` `(B, T)` ``."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dsmr_mlx", "convert", "examples", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DEFINITION = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# A dimension is a letter with an optional factor or index, a number, an ellipsis, or one of these words.
WORD = r"d_\w+|n_\w+|rope_dims|batch_size|lanes|size|in|out|length|rows|inner|columns"
DIMENSION = rf"(?:(?:\d+ ?)?[A-Za-wz](?:_[a-z]\w*)?|\d*[A-Z]|\d+|…|\.\.\.|{WORD})"
SIZE = rf"{DIMENSION}(?: ?[+−/*·×-] ?{DIMENSION}| {DIMENSION})*"
SHAPE = re.compile(rf"(?<![\w`(])\((?=[^()]*[A-Za-z])(?:{SIZE}(?:, {SIZE})+,?|(?:{SIZE}|\w+),)\)")


def definitions(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the functions and classes of a module or class, and those of its classes; none inside functions."""
    for child in getattr(node, "body", []):
        if isinstance(child, DEFINITION):
            yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from definitions(child)


def unquoted_shapes(docstring: str) -> list[str]:
    """Return the shapes outside backquotes, without those in comments of code."""
    plain = re.sub(r" # .*", "", re.sub(r"`[^`]*`", "``", docstring))
    return SHAPE.findall(plain)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_definitions_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = [node for node in definitions(tree) if not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", FILES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shapes_are_in_backquotes(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    docstrings = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, (ast.Module, *DEFINITION))]
    assert [shape for docstring in docstrings for shape in unquoted_shapes(docstring)] == []


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        ("ids (T,) and logits (B, T, V) of q (B, H_kv, M + f + T)", ["(T,)", "(B, T, V)", "(B, H_kv, M + f + T)"]),
        (
            "a weight (in, out) of (2N,) values, (d, 3 d) and (B / size, …)",
            ["(in, out)", "(2N,)", "(d, 3 d)", "(B / size, …)"],
        ),
        ("ids `(T,)`, a function of (seed, epoch), a point (x, y), about (2, 3), see f(a, b)", []),
        ("a pedal (CC64), onset, offset (seconds)", []),
    ],
)
def test_shapes_are_recognized(docstring, found):
    assert unquoted_shapes(docstring) == found
