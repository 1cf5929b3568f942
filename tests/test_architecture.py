"""Imports point down the layers, files stay small, and what computes does no I/O: read off the syntax of the package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fedmoe_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 320
FOUNDATION = {
    "devices",
    "base",
    "experts",
    "grouped",
    "mass",
    "kernels",
    "norms",
    "conditional",
    "ragged",
    "probe",
    "packed",
    "gpu",
    "sampling",
    "conditions",
    "cache",
    "store",
    "scaffold",
    "posterior",
    "distil",
    "sharding",
    "state",
}
STAGES = {"alignment", "local", "aggregation", "nn"}
EDGE = {"training", "distributed", "deploy"}
MAY_IMPORT = {
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    "devices": set(),
    **{stage: FOUNDATION | {stage} for stage in STAGES},
    "models": FOUNDATION | {"nn", "models"},
    "data": {"data"},
    "info": FOUNDATION | {"alignment"},
    "invariants": FOUNDATION,
    "arguments": FOUNDATION | {"aggregation"},
    "round": FOUNDATION | {"alignment", "aggregation", "local", "info", "invariants", "arguments"},
    **dict.fromkeys(EDGE, FOUNDATION | STAGES | EDGE | {"models", "data", "info", "invariants", "round"}),
    "bench": FOUNDATION | STAGES | {"models", "data", "info", "round", "bench"},
    "cli": FOUNDATION | STAGES | EDGE | {"models", "data", "info", "round", "bench", "cli"},
}
PURE = set(MAY_IMPORT) - EDGE - {"data", "bench", "cli"}
IMPURE_IMPORTS = {"time", "logging", "datetime", "os", "sys", "io", "pathlib", "shutil", "subprocess", "socket", "tempfile", "random"}
IMPURE_CALLS = {"open", "print", "input"}


def layer(path):
    """The first component below the package: a file's name or its folder's."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree, path=PACKAGE / "module.py"):
    """Every imported module, dotted; `from a import b` gives a.b, and a relative import is made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(PACKAGE.parent).with_suffix("").parts[: -node.level] if node.level else ()
            yield from (".".join([*package, *([node.module] if node.module else []), alias.name]) for alias in node.names)


def wrong_imports(tree, path):
    """Imports of the package that the layer of `path` may not make."""
    inside = [name.split(".")[1] for name in imports(tree, path) if name.startswith("fedmoe_jax.")]
    allowed = MAY_IMPORT[layer(path)]
    if path == PACKAGE / "data" / "population.py":
        allowed = allowed | {"base"}
    return sorted(set(inside) - allowed)


def impurities(tree):
    """Imports and calls that do I/O, tell the time, write logs or draw from a hidden generator."""
    found = {name.split(".")[0] for name in imports(tree)} & IMPURE_IMPORTS
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    found |= {call.id for call in calls if isinstance(call, ast.Name)} & IMPURE_CALLS
    debug = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return sorted(found | debug & {"jax.debug.print", "jax.debug.callback", "jax.pure_callback", "np.random", "numpy.random"})


@pytest.fixture(params=MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def module(request):
    path = request.param
    return path, path.read_text(encoding="utf-8")


def test_the_package_is_there():
    assert {"devices", "base", "experts", "kernels", "sampling", "round", "alignment", "local", "aggregation", "nn"} <= {
        layer(p) for p in MODULES
    }


def test_file(module):
    path, text = module
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the first line says what the file is"
    assert len(text.splitlines()) <= MOST_LINES
    if path == PACKAGE / "__init__.py":
        return
    assert layer(path) in MAY_IMPORT, f"{layer(path)} is in no layer"
    assert wrong_imports(tree, path) == []
    if layer(path) in PURE:
        assert impurities(tree) == []
    if layer(path) == "data" and path.name != "population.py":
        assert not {name.split(".")[0] for name in imports(tree, path)} & {"jax", "jaxlib", "flax", "optax"}


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("alignment/x.py", "from fedmoe_jax.local import primal"),
        ("local/x.py", "from fedmoe_jax import nn"),
        ("nn/x.py", "import fedmoe_jax.aggregation.mean"),
        ("aggregation/x.py", "from ..alignment import assign"),
        ("base.py", "from fedmoe_jax.round import State"),
        ("devices.py", "from fedmoe_jax.base import ClientProfile"),
        ("round.py", "from fedmoe_jax.training import metrics"),
        ("training/x.py", "def f():\n    from fedmoe_jax import cli"),
        ("models/x.py", "from fedmoe_jax.alignment import fitness"),
        ("data/sources.py", "from fedmoe_jax.base import Batch"),
    ],
)
def test_upward_and_sideways_imports_are_seen(where, line):
    assert len(wrong_imports(ast.parse(line), PACKAGE / where)) == 1


def test_neighbours_and_lower_layers_are_allowed():
    text = "from . import assign\nfrom fedmoe_jax.base import Cohort\nimport jax"
    assert wrong_imports(ast.parse(text), PACKAGE / "alignment" / "x.py") == []


@pytest.mark.parametrize("line", ["import time", "from logging import info", "open('x')", "print(1)", "jax.debug.print('x')"])
def test_impurities_are_seen(line):
    assert len(impurities(ast.parse(line))) == 1
