"""Tools in a process of their own that can compute and answer, and nothing else.

The child imports and builds its tools, then locks itself for good: seccomp lets through only the system calls of a
process that computes and talks over the two pipes it was born with. It cannot open a file or a socket, start a process
or a thread, or lift its limits of memory and processor time. Its parent kills it when a call takes too long, and starts
another. Linux on x86-64 and arm64; elsewhere a sandbox refuses to start rather than run unprotected.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import platform
import resource
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobula.agents.language import Interpreter, ProgramError, Status, Tool, parse, show
from mobula.errors import MobulaError

START_S = 60.0  # importing and building the tools
# System calls of a process that computes, by name: number on x86-64, number on arm64.
ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "rseq": (334, 293),
}
# Audit numbers of the architectures that the columns stand for.
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32 = 0x40000000  # x86-64's second table of system calls, which shares the audit number
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # refuse: EPERM


class SandboxError(MobulaError):
    """A sandbox cannot be started or locked on this machine."""


@dataclass(frozen=True)
class Limits:
    """What one call may use; ``memory_mb`` is beyond what the tools take when they are built."""

    seconds: float = 2.0
    memory_mb: int = 256
    reply_bytes: int = 65_536


@dataclass(frozen=True)
class Step:
    """What came of a statement: its status, what it returned, as text, and the reason of a failure."""

    status: Status
    returned: str = ""
    reason: str = ""


class Sandbox:
    """An interpreter of the action language in a locked process, for one conversation. Close it, or use ``with``.

    ``source`` is ``module:function``; the function gets ``arguments`` (JSON) and returns the tools by name.
    """

    def __init__(self, source: str, arguments: Mapping[str, Any], limits: Limits | None = None) -> None:
        self.source = source
        self.arguments = dict(arguments)
        self.limits = limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, statement: str) -> Step:
        """Carry out one statement. One that overruns its limits costs the process, and every earlier result with it."""
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(statement).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._read(self.limits.seconds)
        except BrokenPipeError:
            reply = b""
        if reply and reply.endswith(b"\n"):
            return Step(**json.loads(reply))
        reason = self._why(reply)
        self.close()
        self._start()
        return Step("limit", reason=reason)

    def close(self) -> None:
        """Kill the process."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process = None

    def _start(self) -> None:
        setup = {"source": self.source, "arguments": self.arguments, "limits": asdict(self.limits)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"},
            close_fds=True,
        )
        ready = self._read(START_S)
        if ready != b"ready\n":
            self.close()
            raise SandboxError(f"the sandbox of {self.source} did not start: {ready.decode(errors='replace').strip()}")

    def _read(self, seconds: float) -> bytes:
        """A line; less of one where time, space or the process ended."""
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        end = time.monotonic() + seconds
        found = b""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not found.endswith(b"\n") and len(found) <= self.limits.reply_bytes:
                if not selector.select(max(0.0, end - time.monotonic())):
                    break
                part = os.read(descriptor, 65_536)
                if not part:
                    break
                found += part
        return found

    def _why(self, reply: bytes) -> str:
        assert self._process is not None
        if len(reply) > self.limits.reply_bytes:
            return f"the reply is longer than {self.limits.reply_bytes} bytes"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.1)
            return f"the tools' process ended with code {self._process.returncode}"
        return f"no reply within {self.limits.seconds:g} s"


def lock(limits: Limits) -> None:
    """Take from this process, for good, everything but computing and the descriptors it has.

    Raises:
        SandboxError: if the kernel or the architecture cannot do that.
    """
    if platform.system() != "Linux" or platform.machine() not in ARCHITECTURES:
        raise SandboxError(f"no sandbox on {platform.system()} {platform.machine()}; use Linux on x86-64 or arm64")
    _limit_resources(limits)
    filters = _program(*ARCHITECTURES[platform.machine()])
    array = (_Instruction * len(filters))(*filters)
    program = _Filter(len(filters), array)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0):
        raise SandboxError(f"this kernel has no seccomp filters ({os.strerror(ctypes.get_errno())})")


def _limit_resources(limits: Limits) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, used + limits.memory_mb * 2**20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(kind, (most, most))


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("true", ctypes.c_ubyte), ("false", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def _program(column: int, audit: int) -> list[_Instruction]:
    """A seccomp filter: kill under another architecture, allow what is listed, refuse the rest."""
    numbers = [pair[column] for pair in ALLOWED.values()]
    allow = [_Instruction(_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    return [
        _Instruction(_LOAD, 0, 0, 4),  # the architecture
        _Instruction(_EQUAL, 1, 0, audit),
        _Instruction(_RETURN, 0, 0, _KILL),
        _Instruction(_LOAD, 0, 0, 0),  # the number of the call
        _Instruction(_AT_LEAST, len(numbers), 0, X32),
        *allow,
        _Instruction(_RETURN, 0, 0, _REFUSE),
        _Instruction(_RETURN, 0, 0, _ALLOW),
    ]


def _carry_out(interpreter: Interpreter, text: str) -> Step:
    """A statement's outcome; whatever a tool does wrong is reported, not raised."""
    try:
        statements = parse(text)
        if len(statements) > 1:
            return Step("parse_error", reason="one statement at a time")
        return Step("ok", show(interpreter.step(statements[0])))
    except ProgramError as error:
        return Step(error.status, reason=str(error))
    except MemoryError:
        return Step("limit", reason="out of memory")
    except RecursionError:
        return Step("limit", reason="too deep a recursion")
    except Exception as error:
        return Step("tool_error", reason=f"{type(error).__name__}: {error}")


def _serve(setup: dict[str, Any]) -> None:
    """The child: build the tools, lock, answer line by line until the pipe closes."""
    module, _, function = setup["source"].partition(":")
    tools: dict[str, Tool] = getattr(importlib.import_module(module), function)(**setup["arguments"])
    interpreter = Interpreter(tools)
    _carry_out(interpreter, "R1 = Nothing()")  # what Python imports on first use is imported now
    # Tools that print must not speak for the sandbox.
    replies = os.dup(sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    lines = sys.stdin.buffer
    lock(Limits(**setup["limits"]))
    os.write(replies, b"ready\n")
    for line in lines:
        step = _carry_out(interpreter, json.loads(line))
        message = json.dumps(asdict(step)).encode() + b"\n"
        while message:
            message = message[os.write(replies, message) :]


if __name__ == "__main__":
    try:
        _serve(json.loads(sys.argv[1]))
    except Exception as error:
        os.write(1, f"{type(error).__name__}: {error}\n".encode())
        sys.exit(1)
