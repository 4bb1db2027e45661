"""Reports on disk and on the terminal."""

import io
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from mobula.errors import MobulaError
from mobula.evaluation import plots
from mobula.evaluation.report import print_report, print_table, write
from mobula.experiment import Claim, DataFacts, Measure, Report


@pytest.fixture
def report():
    return Report(
        method="diffugr",
        experiment="smoke",
        seed=0,
        config_hash="abc",
        data=[DataFacts("functions", "package", "f" * 64, 10)],
        measures={"bm25 Hit@1": Measure(0.5, 0.4, float("nan"), 10)},
        claims=[Claim("A", "more steps are better", -0.1, -0.2, -0.05, 10, "does_not_hold")],
        cost={"wall_s": np.float64(1.5)},
        tables={"Budgets": [["T", "Hit@1 | share"], [1, 0.123456]]},
        notes=["A note."],
        plots={"front": {"kind": "pareto", "x": "ms", "y": "Hit@10", "series": {"a": [(1, 0.1), (2, 0.05)]}}},
    )


def test_report_json_has_its_keys_and_no_nan(report, tmp_path):
    write(report, tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    values = json.loads(text)
    keys = ["method", "experiment", "seed", "config_hash", "data", "measures", "claims", "cost"]
    assert list(values)[:8] == keys
    assert values["measures"]["bm25 Hit@1"] == {"value": 0.5, "low": 0.4, "high": None, "n": 10}
    assert values["claims"][0]["verdict"] == "does_not_hold"
    assert values["cost"] == {"wall_s": 1.5}


def test_means_by_seed_and_p_values_stand_in_the_json_alone(report, tmp_path):
    report.measures["trained"] = Measure(0.5, 0.4, 0.6, 10, [0.4567, 0.5433])
    report.claims.append(Claim("B", "better", 0.1, 0.05, 0.15, 10, "holds", 0.0123))
    write(report, tmp_path)
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["measures"]["trained"]["seeds"] == [0.4567, 0.5433]
    assert values["claims"][1]["p"] == 0.0123
    assert "p" not in values["claims"][0] and "seeds" not in values["measures"]["bm25 Hit@1"]
    text = (tmp_path / "report.md").read_text()
    assert "0.457" not in text and "0.012" not in text


def test_report_markdown_shows_failed_claims_and_plots(report, tmp_path):
    write(report, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| A | more steps are better | -0.100 | [-0.200, -0.050] | 10 | does not hold |" in text
    assert "Hit@1 \\| share" in text
    assert "![front](plots/front.png)" in text
    assert (tmp_path / "plots/front.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "plots/front.svg").read_text()


def test_report_json_is_written_last(report, tmp_path):
    report.plots = {"bad": {"kind": "pie"}}
    with pytest.raises(MobulaError, match="unknown kind 'pie'"):
        write(report, tmp_path)
    assert not (tmp_path / "report.json").exists()


def test_report_on_the_terminal(report):
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=120))
    for text in ("Budgets", "does not hold (1): A", "A note.", "in the report besides: Data, Claims, Measures, Cost"):
        assert text in stream.getvalue()
    assert "more steps are better" not in stream.getvalue(), "statements are in the report"


def test_a_terminal_shows_the_first_table_alone(report):
    stream = io.StringIO()
    report.tables["Second"] = [["x"], ["hidden"]]
    print_report(report, Console(file=stream, width=120))
    assert "hidden" not in stream.getvalue() and "Second" in stream.getvalue()


def test_report_without_tables_prints_its_measures(report):
    report.tables = {}
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=120))
    assert "Measures" in stream.getvalue()


def test_table_cells_are_text_not_markup():
    stream = io.StringIO()
    print_table("Ids", [["id", "value"], ["[bold]x[/bold]", 0.00012], [None, 12345.6]], Console(file=stream, width=80))
    assert "[bold]x[/bold]" in stream.getvalue()
    assert "0.00012" in stream.getvalue() and "12,346" in stream.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "line", "series": {"a": [(1, 2), (2, 3)], "b": [(1, 1)]}, "log_x": True},
        {"kind": "scatter", "points": [(1, 2), (2, 3)], "labels": ["p", "q"], "line": [(1, 2), (2, 3)]},
        {"kind": "bars", "bars": {"bm25": [0.5, 0.4, 0.6], "dense": 0.3}},
    ],
)
def test_every_kind_of_plot_is_drawn(data, tmp_path):
    assert plots.draw(data, tmp_path, "p") == "p"
    assert (tmp_path / "p.png").stat().st_size > 2000
    assert (tmp_path / "p.svg").stat().st_size > 2000


def test_pareto_front():
    points = [(1, 0.1), (2, 0.3), (3, 0.2), (2, 0.25), (4, 0.4), (5, 0.4)]
    assert plots.pareto_front(points) == [(1, 0.1), (2, 0.3), (4, 0.4)]


def test_twenty_lines_look_different() -> None:
    axes = Figure().add_subplot()
    plots._line(axes, {"series": {str(i): [(0, i), (1, i)] for i in range(20)}})
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 20
    assert len({line.get_color() for line in axes.lines}) == 20
