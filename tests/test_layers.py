"""Imports point one way: ground <- adapters_store <- runtime <- the rest; routers have no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "tunefleet": "framework",
    "tunefleet.adapters_store": "adapters_store",
    "tunefleet.runtime": "runtime",
}
GROUND = {"tunefleet.errors", "tunefleet.core", "tunefleet.messages", "tunefleet.config"}
PURE = ("scheduler", "slots", "rows", "scaler", "placement", "sequence", "losses")


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def imports(path: Path) -> set[str]:
    """Modules that a file imports, also inside functions; a name from a package counts as its module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def layer(module: str) -> int:
    if module in GROUND:
        return 0
    return {"adapters_store": 1, "runtime": 2}.get(module.split(".")[1] if "." in module else "", 3)


@pytest.mark.parametrize(("module", "path"), list(modules()))
def test_a_module_imports_only_from_its_own_layer_and_below(module: str, path: Path) -> None:
    known = {name for name, _ in modules()}
    above = {name for name in imports(path) & known - {"tunefleet"} if layer(name) > layer(module)}
    assert not above


@pytest.mark.parametrize("name", PURE)
def test_decisions_import_no_torch_no_clock_and_no_io(name: str) -> None:
    forbidden = {"torch", "time", "asyncio", "socket", "os", "pathlib", "subprocess"}
    assert not imports(ROOT / "runtime" / f"{name}.py") & forbidden


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("tunefleet", ["torch", "starlette", "msgspec", "numpy"]),
        ("tunefleet.client", ["torch", "starlette", "numpy", "sqlalchemy"]),
        ("tunefleet.cli.main", ["torch", "starlette", "numpy", "sqlalchemy", "transformers"]),
        ("tunefleet.http.app", ["torch", "transformers", "peft"]),
        ("tunefleet.runtime.machine", ["torch", "transformers"]),
        ("tunefleet.runtime.host", ["torch", "transformers", "starlette"]),
    ],
)
def test_importing_a_module_does_not_import(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
