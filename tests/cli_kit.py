"""The command as a shell runs it, in this process."""

from __future__ import annotations

import sys

import pytest

from tunefleet.cli import main


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["tunefleet", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main.run()
    return int(left.value.code or 0)
