"""A parked process with a thread that it must not have: ``python -m threaded_parked FD BASE``."""

from __future__ import annotations

import threading

from tunefleet.runtime import parked

if __name__ == "__main__":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    parked.main()
