"""What all tests share."""

from __future__ import annotations

import os

# Ray's workers give way to every other process (nice 15). On a busy machine they would starve, and tests of what
# happens in time would fail.
os.environ.setdefault("RAY_worker_niceness", "0")
# Two libraries with a thread per core each (torch and faiss) wait for one another, busily, when cores are few.
os.environ.setdefault("OMP_NUM_THREADS", "1")
