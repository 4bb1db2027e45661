"""Tools that try what no tool may do."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

from mobula.agents.language import Tool


def read_file() -> str:
    return Path("/etc/hostname").read_text()


def write_file() -> str:
    Path("/tmp/written").write_text("x")
    return "written"


def open_socket() -> str:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    return "opened"


def fork_without_end() -> str:
    while True:
        os.fork()


def start_program() -> str:
    return subprocess.check_output(["id"]).decode()


def start_thread() -> str:
    thread = threading.Thread(target=print)
    thread.start()
    return "started"


def allocate() -> str:
    return str(len(bytearray(10 * 2**30)))


def allocate_slowly() -> str:
    hoard = []
    while True:
        hoard.append(bytearray(2**20))


def loop() -> str:
    while True:
        pass


def recurse() -> str:
    return recurse()


def lift_limits() -> str:
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return "lifted"


def kill_parent() -> str:
    os.kill(os.getppid(), signal.SIGTERM)
    return "killed"


def talk() -> str:
    print("ready")
    return "talked"


def shout() -> str:
    return "x" * 10_000_000


def crash() -> str:
    return ctypes.string_at(0).decode()


def leave() -> str:
    os._exit(3)


def add(value: Any) -> Any:
    return value + 1


def tools(greeting: str = "hello") -> dict[str, Tool]:
    """Every one of them, and two honest ones."""
    bad = (read_file, write_file, open_socket, fork_without_end, start_program, start_thread, allocate,
           allocate_slowly, loop, recurse, lift_limits, kill_parent, talk, shout, crash, leave)  # fmt: skip
    found = {f.__name__: Tool(f.__name__, (), "", f) for f in bad}
    return {**found, "add": Tool("add", ("number",), "", add), "greet": Tool("greet", (), "", lambda: greeting)}
