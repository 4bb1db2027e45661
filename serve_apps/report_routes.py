"""Reports of finished runs, as every application shows them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, Response

from mobula.serving import pages, reports
from mobula.serving.app import to_json


def report_routes(app: FastAPI, directory: Path | None) -> None:
    """Serve the runs in a directory; none without one."""

    @app.get("/reports", response_model=list[dict[str, Any]], responses=pages.REFUSALS)
    async def report_list() -> Response:
        """Finished runs, newest first."""
        return to_json(await asyncio.to_thread(reports.listed, directory))

    @app.get("/reports/{name}", response_model=dict[str, Any], responses=pages.REFUSALS)
    async def report(name: str) -> Response:
        """The report of a run."""
        return to_json(await asyncio.to_thread(reports.read, directory, name))

    @app.get("/reports/{name}/plots/{file}", responses=pages.REFUSALS, response_class=FileResponse)
    async def plot(name: str, file: str) -> Response:
        """A plot of a run."""
        path = await asyncio.to_thread(reports.plot, directory, name, file)
        return FileResponse(path, media_type=reports.PLOTS[path.suffix], headers=pages.HEADERS)
