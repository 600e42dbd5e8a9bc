"""A host process whose replicas come from a poisoned parked process: ``poisoned_host.py STATE_DIR``."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from tunefleet.runtime import host
from tunefleet.runtime.parking import Parking
from tunefleet.runtime.supervisor import Supervisor

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    starter = functools.partial(Parking, module="poisoned_parked")
    host.main(functools.partial(Supervisor, starter=starter))
