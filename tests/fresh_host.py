"""A host process whose replicas are fresh processes: ``fresh_host.py STATE_DIR fresh|threaded``.

Because there is nothing else, or because its parked process has too many threads to be forked.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from tunefleet.runtime import host
from tunefleet.runtime.fresh import FreshStarts
from tunefleet.runtime.parking import Parking
from tunefleet.runtime.supervisor import Supervisor

STARTERS = {"fresh": FreshStarts, "threaded": functools.partial(Parking, module="threaded_parked")}

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    host.main(functools.partial(Supervisor, starter=STARTERS[sys.argv[2]]))
