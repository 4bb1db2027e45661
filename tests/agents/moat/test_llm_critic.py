"""MOAT's critic behind an endpoint: its verdicts, and runs with one that works, is replayed, is absent or dies."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from mobula.agents.moat.case import Case
from mobula.agents.moat.config import Config
from mobula.agents.moat.critic import CriticFailed, CriticSettings, Grounding, canary_facts, criticise
from mobula.agents.worlds import World, WorldSet
from mobula.cli import main
from mobula.config import build
from mobula.errors import ConfigError
from mobula.models.endpoint import Endpoint, EndpointConfig
from tests.agents.moat import small
from tests.models.chat_server import Response, Server, completion, refused, serving

WRONG = {"arith": "R1 = Calc(99 + 1)", "kb": "R1 = Define(1)", "shop": "R1 = Search(bag)\nAnswer(R1)"}


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return WorldSet("tools", 0).build()


def verdict(name: str, actions: str = "", reason: str = "so") -> str:
    return json.dumps({"verdict": name, "actions": actions, "reason": reason})


def critic(server: Server, **keys: Any) -> CriticSettings:
    config = EndpointConfig(url=server.url, model="judge", retries=0, **keys)
    return CriticSettings("llm", endpoint=Endpoint.open(config), max_verdict=300)


def judged(worlds: dict[str, World], replies: list[Response]) -> tuple[Grounding, Server]:
    """What becomes of a wrong program for the first task."""
    task, left = small.known_tasks()[0], list(replies)
    case = Case(worlds[task.family], task, 0, str(task.gold_plan), WRONG[task.family])
    with serving(lambda body: left.pop(0)) as server:
        (found,) = criticise(critic(server), [case])
    assert not left
    return found, server


@pytest.mark.parametrize(
    ("names", "finished", "wanted"),
    [
        (["accept"], "stop", "accept"),
        (["correct gold"], "stop", "correct"),
        (["correct wrong"], "stop", "drop"),
        (["correct broken"], "stop", "drop"),
        (["drop"], "stop", "drop"),
        (["no json", "no actions", "accept"], "stop", "accept"),
        (["no json"] * 3, "stop", "drop"),
        (["accept"], "length", "drop"),
    ],
)
def test_an_endpoint_judges_and_its_failures_drop(
    worlds: dict[str, World], names: list[str], finished: str, wanted: str
) -> None:
    task = small.known_tasks()[0]
    texts = {
        "accept": verdict("accept", reason="fine"),
        "correct gold": verdict("correct", str(task.gold_actions)),
        "correct wrong": verdict("correct", WRONG[task.family]),
        "correct broken": verdict("correct", "R1 = Calc("),
        "drop": verdict("drop"),
        "no json": "I accept this.",
        "no actions": '{"verdict": "accept", "reason": "fine"}',
    }
    found, server = judged(worlds, [completion(texts[name], finished) for name in names])
    assert found.verdict == wanted
    assert found.used_actions == {"accept": found.generated, "correct": task.gold_actions, "drop": None}[wanted]
    assert found.usage["requests"] == len(names)
    assert found.reason.startswith("the critic failed") == (found.usage["failures"] == 1)
    asked = server.requests[0]
    assert asked["max_tokens"] == 300
    assert task.text in asked["messages"][1]["content"]
    schema = asked["response_format"]["json_schema"]["schema"]
    assert schema["required"] == [*schema["properties"]]


def test_a_batch_is_asked_concurrently_and_judged_in_order(worlds: dict[str, World]) -> None:
    tasks = small.known_tasks()
    together = threading.Barrier(3)  # passed only by three requests at a time

    def respond(body: dict[str, Any]) -> Response:
        together.wait(10)
        return completion(verdict("accept", reason=body["messages"][1]["content"].split("\n")[0]))

    cases = [Case(worlds[task.family], task, 0, "S1: x", str(task.gold_actions)) for task in tasks]
    with serving(respond) as server:
        found = criticise(critic(server, concurrency=3), cases)
        assert server.most_open == 3
    assert [grounding.reason for grounding in found] == [f"Task: {task.text}" for task in tasks]


def test_known_bad_programs_reveal_a_critic_that_accepts_everything(worlds: dict[str, World]) -> None:
    with serving(lambda body: completion(verdict("accept"))) as server, pytest.raises(CriticFailed, match="critic llm"):
        canary_facts(critic(server), worlds, small.known_tasks())
    with serving(lambda body: completion(verdict("drop"))) as server:
        facts = canary_facts(critic(server), worlds, small.known_tasks())
        assert facts["critic_usage"]["requests"] == len(server.requests) > 0
    assert facts["canary_rate"] == 0


# Whole runs.

CONFIG: dict[str, Any] = {
    "method": "moat",
    "name": "judged",
    "arms": ["moat"],
    "tasks": {"train": 30, "align": 24, "probe": 6, "dev": 6, "test_in": 3, "test_out": 3},
    "model": {"width": 32, "layers": 1},
    "moat": {"critic": "llm", "samples": 2, "fewest_pairs": 1, "max_plan": 24, "max_program": 24, "max_leak": 1.0},
    "alternation": {"iterations": 1, "actors": 0},
    "sft": {"workers": 0, "steps": 60, "lr": 5e-3},
    "dpo": {"workers": 0, "steps": 2, "batch": 4},
    "grounder_sft": {"workers": 0, "steps": 2, "batch": 4},
    "evaluation": {"decisive": False, "resamples": 100},
}


def command(directory: Path, url: str, *overrides: str) -> Result:
    """`mobula run` with a critic behind an endpoint."""
    path = directory.with_name(f"{directory.name}.yaml")
    path.write_text(yaml.safe_dump(CONFIG))
    endpoint = [f"moat.endpoint.url={url}", "moat.endpoint.model=judge", "moat.endpoint.retries=0"]
    return CliRunner().invoke(main, ["run", str(path), *endpoint, *overrides, "--out", str(directory)])


def rows(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "seed-0" / "moat" / "iterations.jsonl").read_text().splitlines()
    return [
        {name: v for name, v in json.loads(line).items() if name not in ("seconds", "critic_usage")} for line in lines
    ]


def test_a_run_reports_what_its_critic_spent_and_asks_nothing_twice(tmp_path: Path) -> None:
    """With a record, an arm that is done again comes to the same numbers."""

    def respond(body: dict[str, Any]) -> Response:
        canary = "S1: do it" in body["messages"][-1]["content"]
        return completion(verdict("drop" if canary or len(body["messages"][-1]["content"]) % 2 else "accept"))

    def cost() -> dict[str, float]:
        return json.loads((tmp_path / "run" / "report.json").read_text())["cost"]

    with serving(respond) as server:
        record = f"moat.endpoint.record={tmp_path / 'verdicts.jsonl'}"
        run = (tmp_path / "run", server.url, record, "moat.max_verdict=500")
        done = command(*run)
        assert done.exit_code == 0, done.output
        probe, *verdicts = [body["max_tokens"] for body in server.requests]
        asked = len(verdicts)
        assert (probe, set(verdicts)) == (1, {500})
        first, spent = rows(tmp_path / "run"), cost()
        (tmp_path / "run" / "report.json").unlink()
        shutil.rmtree(tmp_path / "run" / "seed-0" / "moat")
        assert command(*run).exit_code == 0
        assert len(server.requests) == 1 + asked + 1
    assert 0 < first[1]["critic_accept"] < 1
    assert (spent["critic_requests"], spent["critic_replayed"], spent["critic_failures"]) == (asked, 0, 0)
    assert (spent["critic_prompt_tokens"], spent["critic_completion_tokens"]) == (7 * asked, 3 * asked)
    assert rows(tmp_path / "run") == first
    assert (cost()["critic_requests"], cost()["critic_replayed"]) == (0, asked)


def test_an_endpoint_that_cannot_be_used_stops_the_run_before_any_training(tmp_path: Path) -> None:
    with serving(lambda body: refused(404, "no model judge")) as server:
        done = command(tmp_path / "run", server.url)
    assert done.exit_code == 2
    assert f"endpoint {server.url}, model judge: HTTP 404" in done.output
    assert "judge, other" in done.output
    assert not (tmp_path / "run" / "seed-0").exists()


def test_a_critic_that_dies_stops_the_run(tmp_path: Path) -> None:
    """It answers the probe and nothing after it."""
    answered = threading.Event()

    def respond(body: dict[str, Any]) -> Response:
        if answered.is_set():
            return refused(500, "out of memory")
        answered.set()
        return completion("yes")

    with serving(respond) as server:
        done = command(tmp_path / "run", server.url)
    assert done.exit_code == 2
    assert "20 of the latest 20 requests failed for good (100%, more than 20%)" in done.output
    assert "HTTP 500: out of memory" in done.output
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"critic": "llm"}, r"moat\.critic=llm needs endpoint\.url and endpoint\.model"),
        ({"critic_url": "x"}, r"moat\.critic_url was renamed: use moat\.endpoint\.url"),
        ({"critic_model": "x"}, r"moat\.critic_model was renamed: use moat\.endpoint\.model"),
        ({"critic_key": "x"}, r"moat\.critic_key was renamed: use moat\.endpoint\.key"),
        ({"endpoint": {"url": "x"}}, r"moat\.endpoint\.url='x': expected something like http"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Config, {"method": "moat", "moat": change})
