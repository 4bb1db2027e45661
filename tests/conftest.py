"""What all tests share."""

from __future__ import annotations

import os

# Ray's workers give way to every other process (nice 15). On a busy machine they would starve, and tests of what
# happens in time would fail.
os.environ.setdefault("RAY_worker_niceness", "0")
