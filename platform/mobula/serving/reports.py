"""Finished runs, for reading: their reports and plots, and no other file.

A run is named by its directory directly under the reports' root. Names never reach the file system unchecked.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, Response

from mobula.serving import pages
from mobula.serving.app import to_json
from mobula.serving.errors import RequestRefused

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
PLOTS = {".png": "image/png", ".svg": "image/svg+xml"}


def report_routes(app: FastAPI, directory: Path | None) -> None:
    """Serve the runs in a directory; none without one."""

    @app.get("/reports", response_model=list[dict[str, Any]], responses=pages.REFUSALS)
    async def report_list() -> Response:
        """Finished runs, newest first."""
        return to_json(await asyncio.to_thread(listed, directory))

    @app.get("/reports/{name}", response_model=dict[str, Any], responses=pages.REFUSALS)
    async def report(name: str) -> Response:
        """The report of a run."""
        return to_json(await asyncio.to_thread(read, directory, name))

    @app.get("/reports/{name}/plots/{file}", responses=pages.REFUSALS, response_class=FileResponse)
    async def report_plot(name: str, file: str) -> Response:
        """A plot of a run."""
        path = await asyncio.to_thread(plot, directory, name, file)
        return FileResponse(path, media_type=PLOTS[path.suffix], headers=pages.HEADERS)


def listed(root: Path | None) -> list[dict[str, Any]]:
    """Name, method, experiment and verdicts of every finished run, newest first."""
    if root is None or not root.is_dir():
        return []
    names = [d.name for d in root.iterdir() if NAME.fullmatch(d.name) and _regular(d / "report.json", root)]
    names.sort(key=lambda name: (root / name / "report.json").stat().st_mtime, reverse=True)
    return [_summary(name, read(root, name)) for name in names]


def read(root: Path | None, name: str) -> dict[str, Any]:
    """The report of a run, with the names of its plots under ``plot_files``.

    Raises:
        RequestRefused: 404 if there is none, or the name is not one.
    """
    directory = _directory(root, name)
    try:
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestRefused(404, "not_found", f"the report of {name} is damaged") from error
    files = sorted(p.name for folder in _plot_folders(directory) for p in folder.glob("*") if p.suffix in PLOTS)
    return {**report, "plot_files": files}


def plot(root: Path | None, name: str, file: str) -> Path:
    """The path of a plot of a run.

    Raises:
        RequestRefused: 404 if there is none.
    """
    directory = _directory(root, name)
    if NAME.fullmatch(file) and Path(file).suffix in PLOTS:
        for folder in _plot_folders(directory):
            if _regular(folder / file, directory):
                return folder / file
    raise RequestRefused(404, "not_found", f"run {name} has no such plot")


def _directory(root: Path | None, name: str) -> Path:
    if root is not None and NAME.fullmatch(name) and _regular(root / name / "report.json", root):
        return root / name
    raise RequestRefused(404, "not_found", "no finished run of that name")


def _plot_folders(directory: Path) -> tuple[Path, Path]:
    return directory, directory / "plots"


def _regular(path: Path, root: Path) -> bool:
    """Whether path is a file that really lies below root: no link on the way leads elsewhere."""
    return path.is_file() and path.resolve() == root.resolve() / path.relative_to(root)


def _summary(name: str, report: dict[str, Any]) -> dict[str, Any]:
    verdicts = [claim["verdict"] for claim in report.get("claims", [])]
    counts = {verdict: verdicts.count(verdict) for verdict in ("holds", "does_not_hold", "undecided")}
    return {"name": name, "method": report.get("method"), "experiment": report.get("experiment"), "verdicts": counts}
