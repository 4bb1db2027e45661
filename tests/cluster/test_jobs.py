"""Jobs on a real Ray with token authentication, in a cluster of this test's own."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mobula import environment
from mobula.cluster import jobs
from mobula.errors import ClusterError


@pytest.mark.parametrize("name", ["", "a" * 65, "../x", "a b", "a/b", "a\n", "$(id)", "ä"])
def test_s8_names_of_jobs_are_checked_before_anything_is_sent(name):
    with pytest.raises(ClusterError, match="1 to 64"):
        jobs.submit(["true"], address="http://127.0.0.1:1", name=name)


def test_nothing_to_submit_is_refused():
    with pytest.raises(ClusterError, match="--"):
        jobs.submit([])


def test_no_cluster_is_said_in_one_line():
    with pytest.raises(ClusterError) as caught:
        jobs.client(f"http://127.0.0.1:{free_port()}")
    assert str(caught.value).startswith(("no cluster answers", "the cluster at")) and "\n" not in str(caught.value)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def address():
    """The job API of a Ray that a process of this test holds. It uses this user's token: Ray reads it only once."""
    environment.driver_environment()
    folder, port = tempfile.mkdtemp(prefix="mj"), free_port()
    # Every port is its own: a second Ray on this machine would leave this one without its agent.
    ports = {"port": free_port(), "dashboard-port": port, "dashboard-agent-listen-port": free_port()}
    ports |= {"dashboard-agent-grpc-port": free_port(), "metrics-export-port": free_port()}
    options = [f"--{name}={number}" for name, number in ports.items()]
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=2", *options]
    head = subprocess.Popen([*command, f"--temp-dir={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _await(port):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError("the head did not start")


@pytest.fixture
def project(tmp_path):
    """A directory to submit: a platform/ with a package, and a script that prints its arguments."""
    (tmp_path / "platform" / "pack").mkdir(parents=True)
    (tmp_path / "platform" / "pack" / "__init__.py").write_text("word = 'imported'")
    script = "import json, sys, pack, platform; print(json.dumps([pack.word, platform.system(), *sys.argv[1:]]))"
    (tmp_path / "script.py").write_text(script)
    return tmp_path


@pytest.mark.end_to_end
def test_s9_hostile_arguments_arrive_as_they_are_and_do_not_run(address, project):
    canary = project / "owned"
    hostile = [f"name=a; touch {canary}", f"$(touch {canary})", f"`touch {canary}`", "a b", "'\"", "&& true", "*"]
    job = jobs.submit(["python", "script.py", *hostile], address=address, working_dir=project, name="hostile-1")
    assert job == "hostile-1"
    output = "".join(jobs.logs(job, address))
    assert jobs.wait(job, address) == "SUCCEEDED"
    printed = next(json.loads(line) for line in output.splitlines() if line.startswith("["))
    assert printed == ["imported", "Linux", *hostile]
    assert not canary.exists()
    assert jobs.status(job, address)["entrypoint"] == shlex.join(["python", "script.py", *hostile])


@pytest.mark.end_to_end
def test_name_of_another_job_is_refused(address, project):
    with pytest.raises(ClusterError, match="refused the job"):
        jobs.submit(["true"], address=address, working_dir=project, name="hostile-1")


@pytest.mark.end_to_end
def test_job_can_be_stopped(address, project):
    job = jobs.submit(["sleep", "600"], address=address, working_dir=project)
    assert jobs.stop(job, address)
    assert jobs.wait(job, address) == "STOPPED"


@pytest.mark.end_to_end
def test_job_that_cannot_start_is_stopped_in_time_and_says_why(address, project):
    start = time.monotonic()
    with pytest.raises(ClusterError, match="did not start in time"):
        jobs.submit(["true"], address=address, working_dir=project, cpus=64, start_timeout_s=5)
    assert time.monotonic() - start < 60


@pytest.mark.end_to_end
def test_unknown_job_is_said_so(address):
    for call in (jobs.status, jobs.stop, lambda *a: next(jobs.logs(*a))):
        with pytest.raises(ClusterError, match="no job 'nobody'"):
            call("nobody", address)


@pytest.mark.end_to_end
def test_s1_job_api_refuses_a_missing_and_a_wrong_token(address):
    def status(token):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            return urllib.request.urlopen(urllib.request.Request(f"{address}/api/version", headers=headers)).status
        except urllib.error.HTTPError as error:
            return error.code

    right = os.environ.get("RAY_AUTH_TOKEN") or environment.token_file().read_text().strip()
    assert [status(None), status("f" * 64), status(right)] == [401, 403, 200]


def test_environment_of_a_job_holds_no_secret(monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "MOBULA_API_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "secret")
    assert "secret" not in environment.job_environment().values()
    assert environment.job_environment()["PYTHONPATH"] == "platform"
    assert not Path(environment.job_environment()["PYTHONPATH"]).is_absolute()
