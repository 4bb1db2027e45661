"""Word problems that people wrote: GSM8K with its annotated calculations, and three older sets held out from training.

GSM8K (Cobbe et al. 2021, arXiv 2110.14168) writes ``<<48/2=24>>`` where a solution calculates. Each becomes a call of
Calc, its numbers that earlier calls returned become references to those, and the sentence around it, without the
calculation, the subgoal.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from mobula.agents.language import (
    ANSWER,
    MOST_STATEMENTS,
    Argument,
    Execution,
    Operation,
    Program,
    ProgramError,
    Result,
    Statement,
    Tool,
    execute,
    parse,
    serialise,
)
from mobula.agents.worlds.world import Task, World
from mobula.data.sources import blocks, hub_rows, read_jsonl, read_text, require_folder, text_field
from mobula.errors import BadRecord, DataError

GSM8K = "gsm8k"
HELD_OUT = ("asdiv", "addsub", "multiarith")
LEARNED = ("train", "align", "probe", "dev")  # splits that are taken from GSM8K's training problems
UNPLANNED = ("align",)
CALC = Tool("Calc", ("number",), "the value of a formula", lambda value: value)
# A calculation with what is written out before and after it: "48/2 = $<<48/2=24>>24".
_CALCULATION = re.compile(r"(?:[\d.,$%()+\-*/x×÷ ]*=)?[ $]*<<(?P<formula>[^<>]*)=(?P<value>[^<>=]*)>>[ $]*[\d.,/]*\d%?")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_LEADING_POINT = re.compile(r"(?<![\d.])\.(?=\d)")


@dataclass(frozen=True)
class Solved:
    """A problem with its answer, and plan and program where its solution has them."""

    text: str
    answer: str
    plan: str | None = None
    program: Program | None = None


class Problems(World):
    """Word problems whose answer is a number. A family is the set that they come from."""

    def __init__(self, family: str, path: str = "") -> None:
        self.family, self.path = family, path

    def tools(self) -> dict[str, Tool]:
        """Calc."""
        return {CALC.name: CALC}

    def reward(self, task: Task, execution: Execution) -> float:
        """1 for the exact number."""
        return float(execution.status == "ok" and execution.answer == Fraction(task.answer))

    def annotated(self, task: Task, styles: Sequence[float], rng: random.Random) -> str:
        """The plan as people wrote it: they have one style."""
        return str(task.gold_plan)


def build(seed: int, path: str = "") -> dict[str, World]:
    """The families; nothing in them is drawn.

    ``path`` is a folder with GSM8K's files or a Hugging Face id such as openai/gsm8k; empty: MOBULA_DATA.
    """
    return {family: Problems(family, path if family == GSM8K else "") for family in (GSM8K, *HELD_OUT)}


def load(worlds: Mapping[str, Problems], sizes: Mapping[str, int], seed: int) -> dict[str, list[Task]]:
    """Tasks of every split, drawn with the seed.

    Training splits are GSM8K's training problems that have a plan and a program; ``test_in`` are its test problems,
    with or without; ``test_out`` are the held-out sets in turn, of which only the answer is known.

    Raises:
        DataError: if a file is missing or there are not as many problems.
    """
    rng, path = random.Random(f"problems {seed}"), worlds[GSM8K].path
    known = [problem for problem in _gsm8k(path, "train") if problem.program]
    rng.shuffle(known)
    tasks: dict[str, list[Task]] = {}
    for split in LEARNED:
        chosen, known = known[: sizes[split]], known[sizes[split] :]
        tasks[split] = _tasks(GSM8K, split, chosen, sizes[split], f"tasks.{split}")
    tests = list(_gsm8k(path, "test"))
    rng.shuffle(tests)
    tasks["test_in"] = _tasks(GSM8K, "test_in", tests, sizes["test_in"], "tasks.test_in")
    tasks["test_out"] = _held_out(sizes["test_out"], rng)
    return {split: tasks[split] for split in sizes}


def _tasks(family: str, split: str, problems: Sequence[Solved], count: int, key: str) -> list[Task]:
    if len(problems) < count:
        raise DataError(f"{key}={count}: {family} has only {len(problems)} problems left for it; ask for fewer")
    tasks = []
    for number, problem in enumerate(problems[:count]):
        program = problem.program
        tasks.append(
            Task(
                id=f"{family}-{split}-{number:05}",
                family=family,
                split=split,
                text=problem.text,
                state=None,
                tools=(CALC.name,),
                gold_plan=None if split in UNPLANNED else problem.plan,
                gold_actions=serialise(program) if program else None,
                answer=problem.answer,
                meta={"n_steps": len(program) if program else None},
            )
        )
    return tasks


def _held_out(count: int, rng: random.Random) -> list[Task]:
    share = [count // len(HELD_OUT) + (i < count % len(HELD_OUT)) for i in range(len(HELD_OUT))]
    tasks = []
    for family, size in zip(HELD_OUT, share, strict=True):
        problems = list(_small(family))
        rng.shuffle(problems)
        tasks += _tasks(family, "test_out", problems, size, "tasks.test_out")
    return tasks


def _gsm8k(path: str, split: str) -> Iterator[Solved]:
    rows: Iterable[tuple[int, dict[str, Any]]]
    if path and not Path(path).expanduser().is_dir():
        rows, where = enumerate(hub_rows(path, "main", split), 1), f"{path} {split}"
    else:
        file = require_folder(GSM8K, path, f"{split}.jsonl", subfolder=GSM8K)[0] / f"{split}.jsonl"
        rows, where = read_jsonl(file), str(file)
    for number, row in rows:
        position = f"{where}, line {number}"
        question, solution = (text_field(row, (name,), position) for name in ("question", "answer"))
        answer = solution.rpartition("####")[2].strip().replace(",", "")
        if not _is_number(answer):
            raise BadRecord(f"{position}: field answer must end in #### and a number, found {answer[:40]!r}")
        plan, program = convert(question, solution, answer) or (None, None)
        yield Solved(question, answer, plan, program)


def convert(question: str, solution: str, answer: str) -> tuple[str, Program] | None:
    """Plan and program of an annotated solution.

    None if nothing is calculated, the program is too long or does not reach the answer, or a subgoal tells the result
    that it asks for.
    """
    given = _numbers(question)
    values: list[str] = []
    subgoals, statements = [], []
    for line in solution.splitlines():
        match = _CALCULATION.search(line)
        if match is None:
            continue
        number, value = len(values) + 1, _plain(match["value"])
        argument = _formula(match["formula"], values)
        subgoal = _subgoal(line, values, given)
        if argument is None or not subgoal or (value in _numbers(subgoal) - given):
            return None
        subgoals.append(f"S{number}: {subgoal}")
        statements.append(Statement(CALC.name, (argument,), number))
        values.append(value)
    if not 0 < len(statements) < MOST_STATEMENTS:
        return None
    program = (*statements, Statement(ANSWER, (Result(len(statements)),), None))
    reached = execute(program, {CALC.name: CALC}).answer
    return ("\n".join(subgoals), program) if reached == Fraction(answer) else None


def _formula(text: str, values: Sequence[str]) -> Argument | None:
    """A formula with references to the latest earlier result of the same value; None if it cannot be read."""
    try:
        ((argument,),) = (statement.arguments for statement in parse(f"R1 = {CALC.name}({_plain(text)})"))
    except (ProgramError, ValueError):
        return None
    results = {Fraction(value): Result(number) for number, value in enumerate(values, 1) if _is_number(value)}
    return _referring(argument, results)


def _referring(argument: Argument, results: Mapping[Fraction, Result]) -> Argument:
    if isinstance(argument, Operation):
        left, right = (_referring(side, results) for side in (argument.left, argument.right))
        return Operation(argument.operator, left, right)
    return results.get(argument, argument) if isinstance(argument, Fraction) else argument


def _subgoal(line: str, values: Sequence[str], given: set[str]) -> str:
    """A line without its calculation; numbers that only earlier steps have found become references to those."""
    earlier = {value: number for number, value in enumerate(values, 1)}

    def refer(match: re.Match[str]) -> str:
        value = match[0].replace(",", "")
        return f"R{earlier[value]}" if value in earlier and value not in given else match[0]

    words = " ".join(_CALCULATION.sub(" ", line).split())
    return re.sub(r" ([.,;])", r"\1", _NUMBER.sub(refer, words))


def _numbers(text: str) -> set[str]:
    return {number.replace(",", "") for number in _NUMBER.findall(text)}


def _plain(text: str) -> str:
    """A formula or number as the action language writes it."""
    return _LEADING_POINT.sub("0.", text.strip())


def _is_number(text: str) -> bool:
    try:
        Fraction(text)
    except (ValueError, ZeroDivisionError):
        return False
    return True


def _small(family: str) -> Iterator[Solved]:
    """Problems of a held-out set whose answer is a number."""
    files = {"asdiv": "ASDiv.xml", "addsub": "AddSub.json", "multiarith": "MultiArith.json"}
    path = require_folder(family, "", files[family], subfolder="math_small")[0] / files[family]
    read = _asdiv if family == "asdiv" else _solutions
    for text, answer in read(path):
        if _is_number(answer):
            yield Solved(" ".join(text.split()), answer)


def _asdiv(path: Path) -> Iterator[tuple[str, str]]:
    problems = re.findall(r"<Problem [^>]*>(.*?)</Problem>", read_text(path), flags=re.DOTALL)
    for number, problem in enumerate(problems, 1):
        parts = [blocks(problem, tag) for tag in ("Body", "Question", "Answer")]
        if any(len(part) != 1 for part in parts):
            raise BadRecord(f"{path}, problem {number}: expected one Body, one Question and one Answer")
        body, question, answer = (part[0] for part in parts)
        yield f"{body} {question}", answer.split("(")[0].strip().replace(",", "")


def _solutions(path: Path) -> Iterator[tuple[str, str]]:
    try:
        rows = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    for number, row in enumerate(rows, 1):
        try:
            yield row["sQuestion"], str(row["lSolutions"][0])
        except (KeyError, IndexError, TypeError) as error:
            raise BadRecord(f"{path}, record {number}: expected sQuestion and lSolutions ({error!r})") from error
