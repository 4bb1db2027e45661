"""What all tests share."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from pathlib import Path

# Ray's workers give way to every other process (nice 15). On a busy machine they would starve, and tests of what
# happens in time would fail.
os.environ.setdefault("RAY_worker_niceness", "0")
# Two libraries with a thread per core each (torch and faiss) wait for one another, busily, when cores are few.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _own_token() -> None:
    """Token authentication for every Ray of the tests, with a token of their own.

    Ray reads both when it is imported, so whether a user has a token, and which test module imports Ray first, would
    otherwise decide what a test sees.
    """
    folder = Path(tempfile.mkdtemp(prefix="token"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


_own_token()
