"""The language-model application on Serve and vLLM: what `openai` and `lm_eval` get, against our own scores."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from mobula.cluster import spec as specs
from mobula.cluster.connect import connect
from mobula.models.causal import CausalModel
from mobula.models.language_model import vllm_installed
from mobula.models.pretrained import Pretrained
from mobula.serving import deploy
from tests.end_to_end.test_serve_command import free_port
from tests.models.changed_adapter import BASE, save_changed_adapter

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not vllm_installed(), reason="vLLM is not installed"),
]
ROOT = Path(__file__).parents[2]
KEY = "a-key-of-the-tests-0123"
PROMPT, TARGET = "The capital of France is the city of", " Paris, of course."
CHAT: Any = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_changed_adapter(tmp_path_factory.mktemp("adapter") / "model")


@pytest.fixture(scope="module")
def url(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The application of cluster.yaml with an adapter beside its model, behind a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"{KEY}\n")
    file = specs.load(ROOT / "cluster.yaml")
    application = next(a for a in file.platform.serve["applications"] if a["name"] == "language_model")
    application["args"] |= {
        "models": [{"id": "smollm2", "base": BASE}, {"id": "tuned@1", "adapter": str(adapter)}],
        "context": 512,
        "cache_gb": 0.25,
        "key_required": True,
        "key_file": str(keys),
        "burst": 60,
        "requests_per_s": 0.5,
    }
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PYTHONPATH", f"{ROOT / 'platform'}:{ROOT}")
        with connect(cpus=4):
            (endpoint,) = deploy.serve(file, ["language_model"], port=free_port(), timeout_s=600)
            yield f"{endpoint.url}v1"


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module", params=["smollm2", "tuned@1"])
def asked(request: pytest.FixtureRequest, adapter: Path) -> tuple[str, CausalModel]:
    """What a client calls a model, and the model by PyTorch."""
    return request.param, CausalModel.open(BASE if request.param == "smollm2" else str(adapter))


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2", "tuned@1"]


def test_a_completion_has_our_log_probabilities(client: openai.OpenAI, asked: tuple[str, CausalModel]) -> None:
    name, model = asked
    ids = [model.encode(text) for text in (PROMPT, TARGET)]
    (expected,) = model.log_probs([ids[0]], [ids[1]])
    # A prompt of token ids, given back with what each of them was worth.
    scored = client.completions.create(
        model=name, prompt=ids[0] + ids[1], max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    assert scored.choices[0].logprobs is not None
    found = scored.choices[0].logprobs.token_logprobs[len(ids[0]) : len(ids[0]) + len(ids[1])]
    assert found == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_chat_is_answered_whole_and_in_chunks(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="smollm2", messages=CHAT, max_tokens=8, temperature=0, logprobs=True)
    said = whole.choices[0].message.content
    assert said and "Paris" in said
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content
    chunks = client.chat.completions.create(model="smollm2", messages=CHAT, max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said


def test_refusals_are_the_clients_own_exceptions(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="x", max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="512"):
        client.completions.create(model="smollm2", prompt=[5] * 600, max_tokens=1)
    wrong: Any = "many"
    with pytest.raises(openai.UnprocessableEntityError, match="max_tokens"):
        client.completions.create(model="smollm2", prompt="x", max_tokens=wrong)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="a-key-of-somebody-else", max_retries=0).models.list()


TASKS: dict[str, dict[str, Any]] = {
    "capitals": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "ends": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    },
}
DOCUMENTS = [
    {"question": "The capital of France is", "choices": [" Paris", " Oslo"], "answer": 0},
    {"question": "The capital of Norway is", "choices": [" Paris", " Oslo"], "answer": 1},
]


def test_lm_eval_scores_two_tasks_as_we_do(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in DOCUMENTS))
    for name, task in TASKS.items():
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        files["target_delimiter"] = ""
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **files, **task}))
    folder = Pretrained.find(BASE).folder
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "smollm2",
            "base_url": f"{url}/completions",
            "tokenizer": str(folder),
            "num_concurrent": 1,
            "max_length": 512,
        },
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    assert results is not None
    model = CausalModel.open(BASE)
    for name, number in (("capitals", 2), ("ends", 1)):
        for sample in results["samples"][name]:
            document = sample["doc"]
            prompts = [model.encode(document["question"])] * number
            targets = [model.encode(choice) for choice in document["choices"][:number]]
            expected = [float(row.double().sum()) for row in model.log_probs(prompts, targets)]
            found = [float(response[0]) for response in _flat(sample["filtered_resps"])]
            assert found == pytest.approx(expected, abs=1e-4)


def _flat(responses: list[Any]) -> list[Any]:
    """(log-likelihood, greedy) of each choice, however deep lm_eval has put them."""
    return [each for one in responses for each in (one if isinstance(one[0], list | tuple) else [one])]


def test_more_requests_than_allowed_are_a_rate_limit_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError, match="requests per second"):
        for _ in range(100):
            client.models.list()
