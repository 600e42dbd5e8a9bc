"""What is installed is what is in the folders."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]


def test_every_package_folder_is_listed() -> None:
    found = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            relative = path.parent.relative_to(ROOT / folder)
            found.add(".".join([package, *relative.parts]))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("name", ["runtime", "adapters_store", "examples"])
def test_no_module_of_framework_hides_a_sub_package(name: str) -> None:
    assert not list((ROOT / "framework").glob(f"{name}*"))


def test_every_dependency_has_a_tested_pin() -> None:
    pins = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *extras["serve"], *extras["dev"]]
    names = {
        "".join(c if c.isalnum() or c in "-_" else " " for c in item).split()[0].lower() for item in needed
    }
    assert names <= pins


def test_the_base_install_needs_no_torch() -> None:
    assert not [
        item for item in PROJECT["project"]["dependencies"] if item.startswith(("torch", "transformers"))
    ]
