"""One arm of the serving benchmark, in a process of its own: ``python -m benchmarks.serving_arm ARM PORT ARTIFACT``."""

from __future__ import annotations

import sys
from pathlib import Path

from mobula.cluster import spec as specs
from mobula.serving import deploy, pages

ROOT = Path(__file__).resolve().parents[1]
UNLIMITED = {"key_required": False, "requests_per_s": 1e9, "burst": 10**9, "calibration_s": 0}


def under_serve(port: int, artifact: Path, haproxy: bool) -> None:
    """The retriever with the settings of cluster.yaml, until SIGTERM."""
    file = specs.load(ROOT / "cluster.yaml")
    file.platform.haproxy = haproxy
    (application,) = file.platform.serve["applications"]
    application["args"] = {**UNLIMITED, "artifact": str(artifact)}
    deploy.run(file, port=port)


def under_uvicorn(port: int, artifact: Path) -> None:
    """The same application, one process, no proxy."""
    import uvicorn

    from serve_apps.retriever import Corpus, RetrieverArgs, State, create_app

    args = RetrieverArgs(artifact=artifact, **UNLIMITED)  # type: ignore[arg-type]
    pages.use_threads(args.threads)
    app = create_app(State(Corpus.load(args)), args)
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    arm, number, directory = sys.argv[1:]
    if arm == "uvicorn":
        under_uvicorn(int(number), Path(directory))
    else:
        under_serve(int(number), Path(directory), haproxy=arm == "haproxy")
