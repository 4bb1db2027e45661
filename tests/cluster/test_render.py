"""Rendered manifests parse back to what cluster.yaml says."""

import shlex
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from mobula.cluster import spec
from mobula.cluster.render import in_a_pod, render
from mobula.errors import ConfigError
from mobula.serving import schema

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setenv("MOBULA_API_KEY", "a-secret-key-of-this-test")
    overrides = [
        "storage=/shared/mobula",
        "nodes={head: {cpus: 2}, worker: {cpus: 4, gpus: 1, memory_gb: 16, min: 0, max: 3}}",
    ]
    return spec.load(ROOT / "cluster.yaml", overrides)


def test_kuberay_manifests_parse_back(loaded):
    serve = schema.check(loaded)
    text = render(loaded, "kuberay", serve=serve)
    cluster, job, service = yaml.safe_load_all(text)
    assert [m["kind"] for m in (cluster, job, service)] == ["RayCluster", "RayJob", "RayService"]
    assert {m["apiVersion"] for m in (cluster, job, service)} == {"ray.io/v1"}
    bodies = [cluster["spec"], job["spec"]["rayClusterSpec"], service["spec"]["rayClusterConfig"]]
    assert all(body == bodies[0] and body["authOptions"] == {"mode": "token"} for body in bodies)
    back = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert back == in_a_pod(serve) and ServeDeploySchema.model_validate(back)


def test_nodes_become_groups_with_their_resources(loaded):
    cluster = next(yaml.safe_load_all(render(loaded)))["spec"]
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 3)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "4", "memory": "16384Mi", "nvidia.com/gpu": "1"}
    assert cluster["enableInTreeAutoscaling"] is True


def test_s9_entrypoint_of_the_job_is_quoted(loaded):
    hostile = ["python", "jobs/train.py", "x.yaml", "name=a; touch /tmp/owned $(id) `id`"]
    job = list(yaml.safe_load_all(render(loaded, job=hostile)))[1]["spec"]
    assert shlex.split(job["entrypoint"]) == hostile
    assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["PYTHONPATH"] == "/app/platform"


def test_s10_no_secret_is_rendered(loaded):
    assert "a-secret-key-of-this-test" not in render(loaded, serve=schema.check(loaded))


def test_ray_target_is_a_file_for_ray_up(loaded):
    overlaid = spec.load(ROOT / "cluster.yaml", overlay=ROOT / "cluster.aws.yaml")
    file = yaml.safe_load(render(overlaid, "ray"))
    assert spec.launcher_problems(file) == []
    assert file["available_node_types"]["worker"]["resources"] == {"CPU": 8}
    assert file["metadata"]["train"]["workers"] == 2


def test_s1_endpoint_in_a_pod_is_public_and_wants_a_key(loaded):
    serve = schema.check(loaded)
    public = in_a_pod(serve)
    assert public["http_options"]["host"] == "0.0.0.0" and serve["http_options"]["host"] == "127.0.0.1"
    assert public["applications"] and all(a["args"]["key_required"] for a in public["applications"])


def test_file_as_it_stands_renders_with_its_storage_on_the_claim():
    cluster = next(yaml.safe_load_all(render(spec.load(ROOT / "cluster.yaml"))))
    container = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert container["workingDir"] == "/app" and container["volumeMounts"][0]["mountPath"] == "/app/runs"


def test_unknown_target_is_refused(loaded):
    with pytest.raises(ConfigError, match="kuberay, ray"):
        render(loaded, "nomad")
