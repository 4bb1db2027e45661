"""Tools in a process of their own that can compute and answer, and nothing else.

A workshop imports and builds the tools. A sandbox is a copy of its process that locks itself for good: seccomp lets
through only the system calls of a process that computes and talks over the two pipes it was born with. It cannot open a
file or a socket, start a process or a thread, or lift its limit of memory. It is killed when a call takes too long, and
another one opened. Linux on x86-64 and arm64; elsewhere a sandbox refuses to start rather than run unprotected.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import platform
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from mobula.agents.language import Interpreter, ProgramError, Status, Tool, parse, show
from mobula.errors import MobulaError

START_S = 60.0  # importing and building the tools
READY = b"ready\n"
# A process with one thread can be copied.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
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
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 1, 38, 22, 2
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


class Workshop:
    """Builds tools once and opens sandboxes with them, in milliseconds each. Close it, or use ``with``.

    Its process stays unlocked and runs no program: for every sandbox it makes a copy of itself, which locks itself
    before it reads a word. ``source`` is ``module:function``; the function gets ``arguments`` (JSON) and returns the
    tools by name.

    Raises:
        SandboxError: if the tools cannot be built, or this machine cannot lock a process.
    """

    def __init__(self, source: str, arguments: Mapping[str, Any], limits: Limits | None = None) -> None:
        self.source = source
        self.limits = limits or Limits()
        self._asking = threading.Lock()
        self._socket, theirs = socket.socketpair()
        setup = {"source": source, "arguments": dict(arguments), "limits": asdict(self.limits)}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), json.dumps(setup)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C.UTF-8", **ONE_THREAD},
                pass_fds=[theirs.fileno()],
            )
        self._socket.settimeout(START_S)
        try:
            self._opened().close()
        except SandboxError:
            self.close()
            raise

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> Sandbox:
        """A sandbox for one conversation.

        Raises:
            SandboxError: if there is no memory or process for it.
        """
        return Sandbox(self)

    def close(self) -> None:
        """End the process and every sandbox it opened."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _opened(self) -> _Opened:
        with self._asking:
            try:
                self._socket.sendall(b"+")
                message, descriptors, *_ = socket.recv_fds(self._socket, 4096, 3)
            except OSError as error:
                raise SandboxError(f"the sandbox of {self.source} did not start: {error}") from error
        if len(descriptors) != 3:
            reason = message.decode(errors="replace").strip() or "its process ended"
            raise SandboxError(f"the sandbox of {self.source} did not start: {reason}")
        opened = _Opened(int(message), *descriptors)
        ready = opened.read(START_S, 4096)
        if ready != READY:
            opened.close()
            reason = ready.decode(errors="replace").strip() or "no reply"
            raise SandboxError(f"the sandbox of {self.source} did not start: {reason}")
        return opened


class Sandbox:
    """An interpreter of the action language in a locked process, for one conversation. Close it, or use ``with``."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self._opened = workshop._opened()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process in which statements are carried out now."""
        return self._opened.pid

    def step(self, statement: str) -> Step:
        """Carry out one statement. One that overruns its limits costs the process, and every earlier result with it."""
        limits = self.workshop.limits
        try:
            self._opened.write(json.dumps(statement).encode() + b"\n")
            reply = self._opened.read(limits.seconds, limits.reply_bytes)
        except BrokenPipeError:
            reply = b""
        if reply.endswith(b"\n"):
            return Step(**json.loads(reply))
        reason = self._why(reply)
        self.close()
        self._opened = self.workshop._opened()
        return Step("limit", reason=reason)

    def close(self) -> None:
        """Kill the process."""
        self._opened.close()

    def _why(self, reply: bytes) -> str:
        limits = self.workshop.limits
        if len(reply) > limits.reply_bytes:
            return f"the reply is longer than {limits.reply_bytes} bytes"
        return "the tools' process ended" if self._opened.ended(0.1) else f"no reply within {limits.seconds:g} s"


@dataclass(frozen=True)
class _Opened:
    """A locked process: its number, the pipes to and from it, and a descriptor that names it for good."""

    pid: int
    into: int
    out: int
    process: int

    def write(self, message: bytes) -> None:
        while message:
            message = message[os.write(self.into, message) :]

    def read(self, seconds: float, most: int) -> bytes:
        """A line; less of one where time, space or the process ended."""
        end = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n") and len(line) <= most:
            if not _readable(self.out, end - time.monotonic()):
                break
            part = os.read(self.out, 65_536)
            if not part:
                break
            line += part
        return line

    def ended(self, seconds: float) -> bool:
        return _readable(self.process, seconds)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, signal.SIGKILL)
        for descriptor in (self.into, self.out, self.process):
            os.close(descriptor)


def _readable(descriptor: int, seconds: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(max(0.0, seconds)))


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


def carry_out(interpreter: Interpreter, text: str) -> Step:
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


def _open_sandboxes(requests: socket.socket, setup: dict[str, Any]) -> None:
    """The workshop's process: build the tools, and make a copy of itself whenever it is asked to."""
    module, _, function = setup["source"].partition(":")
    tools: dict[str, Tool] = getattr(importlib.import_module(module), function)(**setup["arguments"])
    carry_out(Interpreter(tools), "R1 = Nothing()")  # what Python imports on first use is imported now
    gc.freeze()  # a collection would write to, and so copy, all the memory that copies share
    while requests.recv(1):
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        their_in, into = os.pipe()
        out, their_out = os.pipe()
        pid = os.fork()
        if pid == 0:
            for descriptor in (requests.detach(), into, out):
                os.close(descriptor)
            _converse(their_in, their_out, Interpreter(tools), Limits(**setup["limits"]))
        process = os.pidfd_open(pid)
        socket.send_fds(requests, [str(pid).encode()], [into, out, process])
        for descriptor in (their_in, their_out, into, out, process):
            os.close(descriptor)


def _converse(source: int, replies: int, interpreter: Interpreter, limits: Limits) -> NoReturn:
    """The copy: lock, answer line by line until the pipe closes, and never return."""
    try:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        lines = os.fdopen(source, "rb")
        lock(limits)
        os.write(replies, READY)
        for line in lines:
            step = carry_out(interpreter, json.loads(line))
            message = json.dumps(asdict(step)).encode() + b"\n"
            while message:
                message = message[os.write(replies, message) :]
    except Exception as error:
        os.write(replies, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            _open_sandboxes(connection, json.loads(sys.argv[2]))
        except Exception as error:
            connection.sendall(f"{type(error).__name__}: {error}\n".encode())
