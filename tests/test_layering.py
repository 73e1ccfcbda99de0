"""Imports in python/quire point down only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python" / "quire"

# Lowest first. A module may import from lower layers only; modules of one layer do not know each other.
LAYERS = [
    {"errors"},
    {"_native", "ancillary", "matching"},
    {
        "advice",
        "arrays",
        "closing",
        "locks",
        "memfd",
        "messages",
        "output",
        "pictures",
        "ranges",
        "zipwriter",
    },
    {"capabilities", "helper", "purgeable", "transport"},
    {"handover"},
    {"snapshot"},
    {"live", "segment", "sources"},
    {"functions", "linking"},
    {"packing", "region", "remote", "wheels"},
    {"image", "space", "wire"},
    {"broker", "process", "sandbox"},
    {"aio", "client"},
    {"__init__"},
    {"costs"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
FILES = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")])


def layer_of(path: Path) -> str:
    """Name the module, or for one in a subpackage the subpackage."""
    return path.relative_to(PACKAGE).parts[0].split(".")[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported(tree: ast.AST) -> set[str]:
    """The modules of quire that are imported at run time, inside functions too."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        for name in names:
            package, *rest = name.split(".")
            if package == "quire":
                found.add(rest[0] if rest and rest[0] in RANK else "__init__")
        found |= imported(node)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    module = layer_of(path)
    assert module in RANK, f"give {module} a place in LAYERS"
    for target in imported(ast.parse(path.read_text("utf-8"))) - {module}:
        assert RANK[target] < RANK[module], f"{module} imports {target}, which is not below it"


def test_layers_name_only_what_exists() -> None:
    assert set(RANK) == {layer_of(path) for path in FILES}
