"""``mobula`` as a process that a test can kill, forked from one that has imported everything already.

Importing PyTorch and transformers takes seconds, and a test that kills a run in each of its phases starts many.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from mobula import cli
from mobula.methods import METHODS

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["mobula.cli", "transformers", "deepspeed", *(e.module for e in METHODS.values())])


@dataclass
class Command:
    """A command that has been started, and the file of its output."""

    process: ForkServerProcess
    log: Path

    @property
    def output(self) -> str:
        """The end of what it has printed."""
        return self.log.read_text()[-3000:]

    def wait(self, timeout: float = 900) -> int:
        """Its exit status."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"not over after {timeout:g} s: {self.output}"
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()


def start(arguments: Sequence[str], directory: Path) -> Command:
    """``mobula`` with these arguments in a directory, where it finds no cluster file but one of the test's own."""
    log = directory / "command.log"
    process = SERVER.Process(target=_main, args=(list(arguments), log, directory))
    process.start()
    return Command(process, log)


def _main(arguments: list[str], log: Path, directory: Path) -> None:
    with log.open("wb") as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    os.chdir(directory)
    cli.main(arguments)
