"""DeepSpeed on CPU: nothing is compiled, and the one private switch we rely on is still there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

FIT = """
import sys
from pathlib import Path
from small_task import ByteTask
from mobula.training import TrainingConfig, fit

fit(ByteTask(), TrainingConfig(steps=2, batch=4, zero=int(sys.argv[2]), workers=0), Path(sys.argv[1]), seed=0, name="t")
"""


def test_no_compiler_runs_on_cpu(tmp_path: Path) -> None:
    """Compilers that leave a mark and fail come first on PATH, and no earlier build is in reach."""
    mark = tmp_path / "compiled"
    for name in ("g++", "c++", "gcc", "cc", "clang++", "ninja", "nvcc"):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\necho {name} $@ >> {mark}\nexit 1\n")
        script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{HERE}",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    arguments = [sys.executable, "-c", FIT, str(tmp_path / "run"), "1"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not mark.exists(), mark.read_text()
    assert not (tmp_path / "extensions").exists()


def test_deepspeed_still_has_the_switch_of_its_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Engine`` sets a private attribute; an upgrade that renames it would bring the compiler back."""
    import deepspeed.ops
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import OpBuilder

    def builds(self: OpBuilder, *_: object, **__: object) -> None:
        raise AssertionError(f"builds {self.name}")

    monkeypatch.setattr(OpBuilder, "load", builds)
    monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", dict.fromkeys(ALL_OPS, False))
    assert "deepspeed_shm_comm" in ALL_OPS
    assert build_shm_op() is None
    monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", dict.fromkeys(ALL_OPS, True))
    with pytest.raises(AssertionError, match="builds deepspeed_shm_comm"):
        build_shm_op()


def test_a_start_is_quiet(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{HERE}"}
    arguments = [sys.executable, "-c", FIT, str(tmp_path / "run"), "3"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr
    assert "INFO" not in done.stdout + done.stderr
