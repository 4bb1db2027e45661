"""The source root is called platform: it must never hide Python's standard module of that name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = "import platform; platform.system(); import mobula; print(platform.__file__)"


def test_platform_is_not_a_package_and_holds_no_module() -> None:
    assert not list((ROOT / "platform").glob("*.py"))


@pytest.mark.parametrize("mode", ["-c", "-m", "script", "PYTHONPATH", "pytest"])
def test_the_standard_module_platform_is_found_from_the_root(mode: str, tmp_path: Path) -> None:
    script = tmp_path / "probe_layout.py"
    script.write_text(CODE)
    paths = [str(ROOT / "platform"), str(tmp_path)]
    if mode == "PYTHONPATH":
        paths.insert(0, str(ROOT))
    (tmp_path / "test_probe.py").write_text(f"def test_probe():\n    {CODE}\n")
    arguments = {
        "-c": ["-c", CODE],
        "-m": ["-m", "probe_layout"],
        "script": [str(script)],
        "PYTHONPATH": ["-c", CODE],
        "pytest": ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_probe.py")],
    }[mode]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if mode != "pytest":
        assert str(ROOT) not in done.stdout
