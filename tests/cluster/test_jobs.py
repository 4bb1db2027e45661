"""Jobs on a real Ray with token authentication, in a cluster of this test's own."""

import json
import os
import shlex
import shutil
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
from mobula.running import run_experiment
from tests import tiny

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[2]
# On a busy machine Ray needs minutes for what takes it seconds on an idle one.
PATIENCE_S = 420
ATTEMPTS = 3
BIN = Path(sys.executable).parent


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
    folder = Path(tempfile.mkdtemp(prefix="mj"))
    head, found = _start_head(folder)
    try:
        yield found
    finally:
        _end(head)
        shutil.rmtree(folder, ignore_errors=True)


def _start_head(folder):
    """A head and its address. Ray gives a node 30 s to come up, which a busy machine may miss: then once more."""
    for attempt in range(ATTEMPTS):
        port, log = free_port(), folder / f"head{attempt}.log"
        # Every port is its own: a second Ray on this machine would leave this one without its agent.
        ports = {"port": free_port(), "dashboard-port": port, "ray-client-server-port": free_port()}
        ports |= {"dashboard-agent-listen-port": free_port(), "dashboard-agent-grpc-port": free_port()}
        ports |= {"metrics-export-port": free_port(), "runtime-env-agent-port": free_port()}
        options = [f"--{name}={number}" for name, number in ports.items()]
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", *options]
        # Ray takes a node that does not answer for some seconds for dead.
        patient = {"RAY_health_check_timeout_ms": "60000", "RAY_agent_register_timeout_ms": "300000"}
        # A job's `python` is the one that the head finds.
        path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
        with log.open("w") as stream:
            head = subprocess.Popen(
                [*command, f"--temp-dir={folder}/{attempt}"],
                env=os.environ | patient | path,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        if _answers(head, port):
            return head, f"http://127.0.0.1:{port}"
        _end(head)
    raise RuntimeError(f"the head did not start: {log.read_text()[-2000:]}")


def _answers(head, port):
    deadline = time.monotonic() + PATIENCE_S / ATTEMPTS
    while time.monotonic() < deadline and head.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=5)
        except urllib.error.HTTPError:
            return True  # 401: it asks for the token
        except OSError:
            time.sleep(0.5)
    return False


def _end(head):
    head.terminate()
    try:
        head.wait(60)
    except subprocess.TimeoutExpired:
        head.kill()


def submit(arguments, **options):
    return jobs.submit(arguments, start_timeout_s=PATIENCE_S, **options)


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
    job = submit(["python", "script.py", *hostile], address=address, working_dir=project, name="hostile-1")
    assert job == "hostile-1"
    output = "".join(jobs.logs(job, address))
    assert jobs.wait(job, address) == "SUCCEEDED"
    printed = next(json.loads(line) for line in output.splitlines() if line.startswith("["))
    assert printed == ["imported", "Linux", *hostile]
    assert not canary.exists()
    assert jobs.status(job, address)["entrypoint"] == shlex.join(["python", "script.py", *hostile])

    with pytest.raises(ClusterError, match="refused the job"):
        submit(["true"], address=address, working_dir=project, name=job)


@pytest.mark.end_to_end
def test_experiment_as_a_job_measures_what_it_measures_at_home(address, tmp_path):
    recipe = tiny.write(tmp_path / "tiny.yaml", arms=["diffusion/rq"])
    train = ["python", "jobs/train.py", str(recipe), "--out", str(tmp_path / "job")]
    job = submit(train, address=address, working_dir=ROOT)
    output = "".join(jobs.logs(job, address))
    assert jobs.wait(job, address) == "SUCCEEDED", output[-3000:]
    assert f"report: {tmp_path / 'job' / 'report.md'}" in output
    run_experiment(recipe, [], tmp_path / "home")
    job_report, report = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("job", "home"))
    assert job_report["measures"] == report["measures"] and report["measures"]
    assert job_report["config_hash"] == report["config_hash"]


@pytest.mark.end_to_end
def test_job_can_be_stopped(address, project):
    job = submit(["sleep", "600"], address=address, working_dir=project)
    assert jobs.stop(job, address)
    assert jobs.wait(job, address) == "STOPPED"


@pytest.mark.end_to_end
def test_job_that_cannot_start_is_stopped_in_time_and_says_why(address, project):
    start = time.monotonic()
    with pytest.raises(ClusterError, match="did not start in time"):
        jobs.submit(["true"], address=address, working_dir=project, cpus=64, start_timeout_s=5)
    assert time.monotonic() - start < PATIENCE_S / 4


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
