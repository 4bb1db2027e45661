"""The sandbox: honest tools work in it, and whatever else is tried is stopped, reported and survived."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobula.agents.sandbox import Limits, Sandbox, SandboxError, Step, Workshop
from mobula.agents.worlds import WorldSet
from mobula.agents.worlds.tool_world import generate

HOSTILE = "tests.agents.hostile:tools"
LIMITS = Limits(seconds=1.0, memory_mb=64)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Workshop(HOSTILE, {"greeting": "good day"}, LIMITS) as workshop, workshop.open() as opened:
        yield opened


def works(sandbox: Sandbox) -> bool:
    """Whether the sandbox is usable, from scratch or as it was."""
    return sandbox.step("R9 = add(4)") == Step("ok", "5") and sandbox.step("Answer(R9)") == Step("ok", "5")


def test_results_are_kept_from_step_to_step(sandbox: Sandbox) -> None:
    assert sandbox.step("R1 = add(1)") == Step("ok", "2")
    assert sandbox.step("R2 = add(R1 * 3)") == Step("ok", "7")
    assert sandbox.step("R3 = greet()") == Step("ok", "good day")
    assert sandbox.step("R4 = add(R3)").status == "bad_argument"
    assert sandbox.step("R4 = add(R7)").status == "unbound_variable"
    assert sandbox.step("R4 = sing()").status == "unknown_tool"
    assert sandbox.step("R4 = add(1)\nR5 = add(2)") == Step("parse_error", reason="one statement at a time")
    assert sandbox.step("nonsense").status == "parse_error"


@pytest.mark.parametrize(
    "attempt",
    ["read_file", "write_file", "open_socket", "fork_without_end", "start_program", "start_thread", "lift_limits",
     "kill_parent"],
)  # fmt: skip
def test_what_needs_the_system_is_refused(sandbox: Sandbox, attempt: str) -> None:
    step = sandbox.step(f"R1 = {attempt}()")
    assert step.status == "tool_error"
    assert any(words in step.reason for words in ("not permitted", "not allowed", "can't start new thread"))
    assert works(sandbox)
    assert not Path("/tmp/written").exists()


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        ("allocate", "out of memory"),
        ("allocate_slowly", "out of memory"),
        ("recurse", "recursion"),
        ("loop", "no reply within 1 s"),
        ("shout", "longer than 65536 bytes"),
        ("crash", "process ended"),
        ("leave", "process ended"),
    ],
)
def test_what_uses_too_much_is_stopped(sandbox: Sandbox, attempt: str, reason: str) -> None:
    started = time.monotonic()
    step = sandbox.step(f"R1 = {attempt}()")
    assert (step.status, step.returned) == ("limit", "")
    assert reason in step.reason
    assert time.monotonic() - started < 20
    assert works(sandbox)


@pytest.mark.parametrize("family", ["arith", "kb", "shop"])
def test_the_worlds_work_inside(family: str) -> None:
    world = WorldSet("tools", 0).build()[family]
    tasks = generate({family: world}, {"test_in": 5}, seed=0)["test_in"]
    try:
        workshop = Workshop("mobula.agents.worlds:tools", {"source": "tools", "seed": 0, "path": "", "family": family})
    except SandboxError as error:
        if "ModelError" in str(error):
            pytest.skip(str(error))
        raise
    with workshop, workshop.open() as sandbox:
        for task in tasks:
            steps = [sandbox.step(line) for line in str(task.gold_actions).splitlines()]
            assert steps[-1] == Step("ok", task.answer)
        if family == "kb":
            facts = sandbox.step('R1 = Retrieve("the mentor of e5", 3)')
            assert facts.status == "ok"
            assert facts.returned.count("is e") == 3


def test_what_a_tool_prints_is_not_taken_for_a_reply(sandbox: Sandbox) -> None:
    assert sandbox.step("R1 = talk()") == Step("ok", "talked")
    assert works(sandbox)


def test_results_of_a_stopped_process_are_gone(sandbox: Sandbox) -> None:
    sandbox.step("R1 = add(1)")
    sandbox.step("R2 = loop()")
    assert sandbox.step("R3 = add(R1)").status == "unbound_variable"


def test_the_environment_does_not_reach_the_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBULA_SECRET", "x")
    with Workshop(HOSTILE, {}, LIMITS) as workshop, workshop.open() as sandbox:
        assert b"MOBULA_SECRET" not in Path(f"/proc/{sandbox.pid}/environ").read_bytes()


def test_conversations_are_apart_and_open_fast() -> None:
    with Workshop(HOSTILE, {}, LIMITS) as workshop:
        started = time.monotonic()
        with workshop.open() as first, workshop.open() as second:
            assert time.monotonic() - started < 1
            assert first.pid != second.pid
            first.step("R1 = add(1)")
            assert second.step("R2 = add(R1)").status == "unbound_variable"
            assert first.step("R2 = loop()").status == "limit"
            assert works(first) and works(second)
        for _ in range(50):
            with workshop.open() as sandbox:
                assert sandbox.step("R1 = add(1)") == Step("ok", "2")
        descriptors = len(os.listdir(f"/proc/{workshop._process.pid}/fd"))
        assert descriptors < 12  # nothing of a conversation stays behind


def test_a_closed_workshop_ends_its_sandboxes() -> None:
    workshop = Workshop(HOSTILE, {}, LIMITS)
    sandbox = workshop.open()
    workshop.close()
    gone(sandbox.pid)
    with pytest.raises(SandboxError, match="did not start"):
        sandbox.step("R1 = add(1)")


def test_tools_that_cannot_be_built_are_an_error_with_the_reason() -> None:
    with pytest.raises(SandboxError, match=r"did not start: .*no_such_module"):
        Workshop("no_such_module:tools", {}, LIMITS)
    with pytest.raises(SandboxError, match=r"did not start: .*unexpected keyword argument"):
        Workshop(HOSTILE, {"colour": "red"}, LIMITS)


def gone(pid: int) -> None:
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < end, "the tools' process outlived its parent"
        time.sleep(0.1)


def test_a_process_without_a_parent_ends() -> None:
    """Even in the midst of an endless loop."""
    code = (
        "import os, threading, time; from mobula.agents.sandbox import Workshop, Limits;"
        f"s = Workshop('{HOSTILE}', {{}}, Limits(seconds=60)).open(); print(s.pid, flush=True);"
        "threading.Thread(target=s.step, args=('R1 = loop()',), daemon=True).start(); time.sleep(0.5); os._exit(1)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    gone(int(done.stdout))
