"""DRO on text, with small networks and with language models: what rows refer to, what is learned, and whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mobula import artifacts, methods
from mobula.alternation import Row
from mobula.artifacts import read_jsonl, sha256, write_jsonl
from mobula.config import build
from mobula.data.records import Document
from mobula.errors import ConfigError
from mobula.models.causal import CausalModel
from mobula.models.constrained import Target, collate_targets, target_log_probs
from mobula.models.language_model import Sampling
from mobula.rag.candidates import RETRIEVER_ERROR, Request
from mobula.rag.dro.config import COLD, Config
from mobula.rag.dro.data import RetrievedQuestions
from mobula.rag.dro.dro import objective
from mobula.rag.dro.networks import MStep, Networks, network_of
from mobula.rag.dro.networks.language import LanguageSelector, tokenizer_of
from mobula.rag.dro.study import Arms
from mobula.rag.em import SampleWorker, ScoreWorker, SnapshotMismatch
from mobula.rag.objective import ANSWER, LATENT, em_loss
from mobula.rag.prompts import Prompts, RowTooLong, line
from mobula.training.checkpoints import export_weights
from tests.rag.dro import small

KINDS = ["passages", "language", "free"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    small.write_nq(folder)
    small.write_squad(folder)
    small.write_base(folder / "base")
    return folder


def config_of(data: Path, kind: str) -> dict[str, Any]:
    if kind == "passages":
        return small.values(data, arms=["dro", "supervised", "rag_sft", "reinforce", "distillation"])
    model = {"base": str(data / "base"), "lora": {"rank": 4, "alpha": 8.0}, "answer_tokens": 4, "positions": 400}
    model["engine"] = {"kind": "torch"}  # vLLM wants heads of 32 and more
    arms = ["dro", "generator_only", "closed_book", "distillation"]
    return small.values(data, arms=arms, model=model, select={"decode": "free" if kind == "free" else "constrained"})


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {kind: small.run_in(root / kind, config_of(data, kind)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def arms(data: Path, runs: dict[str, Path], kind: str) -> Arms:
    return Arms(build(Config, config_of(data, kind)), runs[kind])


def networks_of(data: Path, runs: dict[str, Path], kind: str) -> Networks:
    whole = arms(data, runs, kind)
    return Networks.of(whole.questions, **whole.checkpoint("dro", 0))


def of_split(networks: Networks, split: str, queries: list[int]) -> list[Request]:
    return networks.questions.take(split, queries)


def test_a_run_leaves_its_report(runs: dict[str, Path], kind: str) -> None:
    report = json.loads((runs[kind] / "report.json").read_text())
    named = {name.split("/")[0] for name in report["measures"]}
    baselines = {"cold_start, passages retriever", "cold_start, passages first"}
    assert {COLD, "dro", "dro, passages gold", "dro, passages no_gold", *baselines} <= named
    found = {name.split("/")[1] for name in report["measures"] if name.startswith("dro/")}
    # Exact match, F1 and accuracy are never told apart from one another.
    assert {"exact", "f1", "acc", "hit@1", "hit@2", "tau"} <= found
    claims = {claim["name"] for claim in report["claims"]}
    assert {"dro - cold_start, hit@1", "dro - cold_start, passages retriever, hit@2"} <= claims
    assert ("dro/log_p" in report["measures"]) == (kind == "passages")
    assert ("dro/repaired" in report["measures"]) == (kind == "free")
    iterations = runs[kind] / "seed-0" / "dro" / "iterations.jsonl"
    assert "NaN" not in iterations.read_text()
    rows = read_jsonl(iterations)
    likelihoods = {"passages": {"train_log_p", "dev_log_p"}}.get(kind, {"dev_iwae_bound"})
    assert all(likelihoods <= set(row) for row in rows)
    assert {"iwae_bound", "ess", "all_fail", "distinct_fraction"} <= set(rows[-1])
    assert ({"malformed", "repaired"} <= set(rows[-1])) == (kind == "free")
    assert report["measures"]["cold_start, passages retriever/tau"]["value"] == 1


def test_an_artifact_answers(runs: dict[str, Path], kind: str) -> None:
    predictor = methods.get("dro").load(artifacts.open_artifact(runs[kind] / "artifact"))
    asked, failed = predictor.find("where was Mira born")
    assert not failed and len(asked.candidates) == 6
    picks = predictor.select(asked)
    assert len({pick.document.id for pick in picks}) == 2
    assert all(pick.probability is None if kind == "free" else 0 < pick.probability <= 1 for pick in picks)
    assert isinstance(predictor.answer(asked, picks), str)
    again, _ = predictor.find("where was Mira born")
    assert predictor.select(again) == picks and predictor.answer(again, picks) == predictor.answer(asked, picks)


def test_samples_name_passages_once_and_see_no_answer(data: Path, runs: dict[str, Path], kind: str) -> None:
    whole = arms(data, runs, kind)
    em = whole.em("dro", 0)
    checkpoint = em.current_checkpoint(whole.outcome("dro", 0).history)
    sample, score = SampleWorker(em.latent(checkpoint, "train"), 1), ScoreWorker(em.latent(checkpoint, "train"))
    samples = sample.process([{"query": q} for q in range(6)], 0)
    assert all(len(set(z)) == 2 and max(z) < 6 for row in samples for z in row["permutations"])
    assert sample.process([{"query": 4}], 3) == [samples[4]]
    assert not any(city in json.dumps(samples) for city in small.CITIES)
    scored = score.process(samples, 0)
    assert score.process([samples[4]], 0)[0]["log_lik"] == pytest.approx(scored[4]["log_lik"], abs=1e-4)
    assert np.isfinite([value for row in scored for value in row["log_lik"]]).all()
    with pytest.raises(SnapshotMismatch):
        ScoreWorker(em.latent(em.start, "train")).process(samples, 0)


def rows_for(kind: str) -> list[Row]:
    """One to three permutations of four questions; free ones named two, one and no passages by themselves."""
    permutations = [[0, 3], [5, 1], [2, 4]]
    weights = {1: [1.0], 2: [0.75, 0.25], 3: [0.5, 0.3, 0.2]}
    rows: list[Row] = [
        {"query": q, "permutations": permutations[:m], "weights": weights[m]} for q, m in enumerate((1, 2, 3, 1))
    ]
    return [{**row, "valid": [2, 1, 0][: len(row["permutations"])]} for row in rows] if kind == "free" else rows


@pytest.fixture
def long_answers(data: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of one to three words, which stand in every passage."""
    for kind in KINDS:
        splits = arms(data, runs, kind).questions.candidates.splits  # type: ignore[attr-defined]
        longer = [
            replace(one, answers=(" ".join(["was", "born", "in"][: 1 + i % 3]),))
            for i, one in enumerate(splits["train"])
        ]
        monkeypatch.setitem(splits, "train", longer)


def gradients(
    questions: RetrievedQuestions, network: str, path: Path, rows: list[Row], parts: list[list[int]]
) -> torch.Tensor:
    """The mean over parts of the gradient of their losses."""
    write_jsonl(path, rows)
    task = MStep(network_of(network, questions), "train", path, 0)
    model = task.build()
    for part in parts:
        batch = task.batch(torch.tensor(part), torch.Generator())
        assert not batch["weights"].requires_grad
        (task.loss(model, batch)[0] / len(parts)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.usefixtures("long_answers")
@pytest.mark.parametrize("network", ["selector", "generator"])
def test_gradients_do_not_depend_on_micro_batches(
    data: Path, runs: dict[str, Path], kind: str, network: str, tmp_path: Path
) -> None:
    questions = arms(data, runs, kind).questions
    whole, halves, single = (
        gradients(questions, network, tmp_path / "rows.jsonl", rows_for(kind), parts)
        for parts in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]])
    )
    assert whole.abs().max() > 0
    torch.testing.assert_close(halves, whole, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(single, whole, atol=1e-5, rtol=1e-3)


@pytest.mark.usefixtures("long_answers")
@pytest.mark.parametrize("kind", ["passages", "language"])
@pytest.mark.parametrize("network", ["selector", "generator"])
def test_what_is_trained_is_what_was_sampled_and_scored(
    data: Path, runs: dict[str, Path], kind: str, network: str
) -> None:
    """The same passages in the same order, and sums over tokens: the objective of a row is its log-probability."""
    networks, permutation = networks_of(data, runs, kind), [3, 0]
    question = of_split(networks, "train", [2])
    if network == "generator":
        wanted = networks.generator.score(question, [[permutation]])[0].log_lik[0]
    elif kind == "passages":
        wanted = float(networks.exact(question)[0][0, networks.questions.permutations().index(permutation)])
    else:
        (selection,) = networks.selector.select(question)
        permutation, wanted = selection.permutation, sum(selection.log_probs)
    trained = getattr(networks, network)
    rows = trained.rows([{"query": 2, "permutations": [permutation], "weights": [1.0]}])
    assert objective(trained, rows, 4) == pytest.approx(wanted, abs=1e-3)


def test_the_pointers_greedy_permutation_takes_the_likeliest_passage_each_time(
    data: Path, runs: dict[str, Path]
) -> None:
    networks = networks_of(data, runs, "passages")
    dev, every = of_split(networks, "dev", [0, 1]), torch.tensor(networks.questions.permutations())
    prior, _ = networks.exact(dev)
    for probabilities, selection in zip(prior.exp(), networks.selector.select(dev), strict=True):
        first = int(torch.stack([probabilities[every[:, 0] == z].sum() for z in range(6)]).argmax())
        rest = torch.where(every[:, 0] == first, probabilities, 0).argmax()
        assert selection.permutation == every[rest].tolist()


def test_the_pointer_samples_permutations_as_often_as_it_says(data: Path, runs: dict[str, Path]) -> None:
    networks = networks_of(data, runs, "passages")
    dev, every = of_split(networks, "dev", [0]), networks.questions.permutations()
    (row,) = networks.selector.sample(dev, 4000, [0])
    counts = torch.bincount(torch.tensor([every.index(z) for z in row["permutations"]]), minlength=30)
    assert float((counts / 4000 - networks.exact(dev)[0][0].exp()).abs().sum()) / 2 < 0.05


@pytest.mark.parametrize("kind", ["language", "free"])
def test_language_models_are_measured_greedily(
    data: Path, runs: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, seen = networks_of(data, runs, kind), []
    sample = CausalModel.sample

    def spy(self: CausalModel, prompts: Any, sampling: Sampling, *rest: Any, **named: Any) -> Any:
        seen.append(sampling.temperature)
        return sample(self, prompts, sampling, *rest, **named)

    monkeypatch.setattr(CausalModel, "sample", spy)
    networks.evaluate(of_split(networks, "test", [0, 1]), "selector")
    assert set(seen) == {0}


def test_free_lists_are_parsed_filled_and_counted(data: Path, runs: dict[str, Path]) -> None:
    selector: Any = network_of("selector", arms(data, runs, "free").questions)
    texts = ("[3]", "the baker", "[3] > [1] > [2]")
    parsed = [selector.parse(selector.prompts.model.encode(text), 6) for text in texts]
    assert parsed == [([2, 0], 1), ([0, 1], 0), ([2, 0], 2)]
    row = {"permutations": [z for z, _ in parsed], "valid": [valid for _, valid in parsed]}
    shares = arms(data, runs, "free").em("dro", 0).facts([row])
    assert shares == {"malformed": pytest.approx(1 / 3), "repaired": pytest.approx(1 / 3)}


@pytest.mark.parametrize("network", ["selector", "generator"])
def test_equal_permutations_count_as_one_with_their_weights(
    data: Path, runs: dict[str, Path], network: str, tmp_path: Path
) -> None:
    for kind in ("passages", "language"):
        questions: Any = arms(data, runs, kind).questions
        some = [[0, 3], [5, 1], [2, 4]]  # one of them has the answer
        twice = [{"query": 0, "permutations": [*some, *some], "weights": [0.1, 0.2, 0.3, 0.1, 0.2, 0.1]}]
        counted = [{"query": 0, "permutations": some, "weights": [0.2, 0.4, 0.4]}]
        without = [{"query": 0, "permutations": some, "weights": [0.1, 0.2, 0.3]}]
        path, cases = tmp_path / "rows.jsonl", (twice, counted, without)
        each = [gradients(questions, network, path, rows, [[0]]) for rows in cases]
        torch.testing.assert_close(each[0], each[1], atol=1e-6, rtol=1e-4)
        assert not torch.allclose(each[0], each[2], atol=0, rtol=1e-3)


def targets(questions: Any, kind: str, row: Row) -> list[Target]:
    network: Any = network_of(kind, questions)
    return network.targets(questions.take("train", [row["query"]]), network.rows([row]))


def test_what_filled_a_list_is_not_learned(data: Path, runs: dict[str, Path]) -> None:
    questions = arms(data, runs, "free").questions
    row = {"query": 0, "permutations": [[4, 0], [1, 0], [2, 3]], "valid": [1, 0, 2], "weights": [0.2, 0.3, 0.5]}
    learned = targets(questions, "selector", row)
    model = tokenizer_of(str(data / "base"))
    assert [(model.decode(t.tokens), t.weight) for t in learned] == [("[5]", 0.2), ("[3] > [4]", 0.5)]
    assert [t.tokens[-1] == model.eos for t in learned] == [False, True]
    assert len(targets(questions, "generator", row)) == 3
    nothing = {"query": 0, "permutations": [[1, 0]], "valid": [0], "weights": [1.0]}
    assert network_of("selector", questions).rows([nothing]) == []


def test_lists_contexts_and_prompts_mean_the_same_passages(data: Path, runs: dict[str, Path]) -> None:
    questions: Any = arms(data, runs, "language").questions
    request = questions.candidates.splits["train"][0]
    names = [questions.candidates.document(id).title for id in request.candidates]
    row = {"query": 0, "permutations": [[4, 2]], "weights": [1.0]}
    model = tokenizer_of(str(data / "base"))
    (chosen,), (answered,) = (targets(questions, kind, row) for kind in ("selector", "generator"))
    assert model.decode(chosen.tokens) == "[5] > [3]"
    prompt = model.tokenizer.decode(chosen.prompt)
    shown = [prompt.index(f"[{i}] {name.split()[0]}") for i, name in enumerate(names, 1)]
    assert shown == sorted(shown)
    context = model.tokenizer.decode(answered.prompt)
    first, second = (context.index(f"[{i}] {names[at].split()[0]}") for i, at in ((1, 4), (2, 2)))
    assert first < second
    assert all(name.split()[0] not in context for at, name in enumerate(names) if at not in (4, 2))
    assert model.decode(answered.tokens) == request.answers[0]


def test_every_prompt_writes_passages_alike() -> None:
    document = Document("d", "Rays", "They live in the sea.")
    assert line("3", document) == "[3] Rays: They live in the sea."

    class Words:
        name, eos, tokenizer = "words", 0, None

        def encode(self, text: str) -> list[str]:
            return text.split(" ")

        def decode(self, ids: list[str]) -> str:
            return " ".join(ids)

    prompts = Prompts(Words(), 3, 100, "numbers")  # type: ignore[arg-type]
    shown = "[1] Rays: They live in\n[2] Rays: They live in"
    asked = " ".join(prompts.select("what?", [document] * 2, 2))  # type: ignore[arg-type]
    told = " ".join(prompts.answer("what?", [document] * 2))  # type: ignore[arg-type]
    assert shown in asked and shown in told and "the form [2] > [1]" in asked
    assert "[1]" not in " ".join(prompts.answer("what?", []))  # type: ignore[arg-type]
    with pytest.raises(RowTooLong, match=r"model\.positions=10"):
        Prompts(Words(), 3, 10, "numbers").answer("what?", [document])  # type: ignore[arg-type]


@pytest.mark.parametrize(("grammar", "learned"), [(True, LATENT), (False, LATENT), (False, ANSWER)])
def test_prompts_and_padding_are_not_learned(grammar: bool, learned: int) -> None:
    """The gradient reaches the logits that predict targets, and no others."""

    class Fixed(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> Any:
            logits = torch.randn(*input_ids.shape, 11, generator=torch.Generator().manual_seed(0))
            self.logits = logits.requires_grad_()
            return type("Output", (), {"logits": self.logits[:, -logits_to_keep:]})

    model = Fixed()
    allowed = ([[5, 7], [6, 8]], [[9, 10]]) if grammar else (None, None)
    batch = collate_targets([Target([1, 2, 3, 4], [5, 6], allowed[0], 1.0), Target([1, 2], [9], allowed[1], 1.0)])
    log_probs = target_log_probs(model, batch)
    em_loss(log_probs, batch["mask"][:, -log_probs.shape[1] :] * learned, batch["weights"], 2, 1.5).backward()
    touched = model.logits.grad.abs().sum(-1) > 0  # type: ignore[union-attr]
    # Rows end together; the logits before a token predict it.
    assert touched.tolist() == [[False] * 3 + [True, True, False], [False] * 4 + [True, False]]
    among = (model.logits.grad.abs() > 0)[0, 3].nonzero().flatten().tolist()  # type: ignore[union-attr]
    assert among == ([5, 7] if grammar else list(range(11)))


def test_evaluation_is_greedy(data: Path, runs: dict[str, Path], kind: str) -> None:
    networks = networks_of(data, runs, kind)
    test = of_split(networks, "test", networks.questions.queries("test"))
    assert networks.evaluate(test, "selector") == networks.evaluate(test, "selector")


def test_arms_train_what_they_say(runs: dict[str, Path]) -> None:
    for kind, arm, trained in (
        ("passages", "supervised", {"selector"}),
        ("passages", "rag_sft", {"generator"}),
        ("language", "generator_only", {"generator"}),
        ("language", "closed_book", {"generator"}),
        ("language", "dro", {"selector", "generator"}),
    ):
        (fit,) = (runs[kind] / "seed-0" / arm).glob("*/*-fit")
        assert {path.name for path in fit.iterdir() if path.is_dir()} == trained, (kind, arm)
        (sample,) = (runs[kind] / "seed-0" / arm).glob("*/*-sample")
        rows = [row for file in sorted(sample.glob("shard-*.jsonl")) for row in read_jsonl(file)]
        assert len(rows) == 10
        if arm == "closed_book":
            assert all(row["permutations"] == [[]] for row in rows)
        if arm == "supervised":
            assert all(len(row["permutations"]) == 1 for row in rows)


def test_a_policy_gradients_generator_learns_from_greedy_permutations(runs: dict[str, Path]) -> None:
    (weigh,) = (runs["passages"] / "seed-0" / "reinforce").glob("*/*-weigh")
    greedy = read_jsonl(weigh / "greedy.jsonl")
    assert len(greedy) == 10 and all(row["weights"] == [1.0] and len(row["permutations"]) == 1 for row in greedy)


@pytest.mark.parametrize("kind", ["passages", "language"])
def test_distillation_weighs_every_passage_by_itself(runs: dict[str, Path], kind: str) -> None:
    (weigh,) = (runs[kind] / "seed-0" / "distillation").glob("*/*-weigh")
    (score,) = (runs[kind] / "seed-0" / "distillation").glob("*/*-score")
    scores = {row["query"]: row for file in score.glob("shard-*.jsonl") for row in read_jsonl(file)}
    for row in read_jsonl(weigh / "permutations.jsonl"):
        assert row["permutations"] == [[position] for position in range(6)]
        log_lik = torch.tensor(scores[row["query"]]["log_lik"], dtype=torch.float64)
        assert row["weights"] == pytest.approx(torch.softmax(log_lik, 0).tolist())


def test_distillation_is_a_divergence_from_the_first_choice(data: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """Up to a constant; a question with fewer passages is filled with weight 0."""
    whole = arms(data, runs, "passages")
    file, wanted = tmp_path / "rows.jsonl", [[0.1, 0.2, 0.3, 0.0, 0.25, 0.15], [0.5, 0.5]]
    rows = [{"query": q, "permutations": [[z] for z in range(len(w))], "weights": w} for q, w in enumerate(wanted)]
    write_jsonl(file, rows)
    task = MStep(network_of("selector", whole.questions, whole.start(0)["selector"]), "train", file, 0)
    model: Any = task.build()
    batch = task.batch(torch.arange(2), torch.Generator())
    loss, _ = task.loss(model, batch)
    asked, states = model.states(batch["question"], batch["passages"], batch["ranks"])
    first = model.step(0, asked, states, None, batch["ranks"] == 0)
    cross = [-(torch.tensor(w) * row[: len(w)]).sum() for w, row in zip(wanted, first, strict=True)]
    assert float(loss.detach()) == pytest.approx(float(torch.stack(cross).detach().mean()) / task.tokens, rel=1e-5)


def test_questions_that_the_retriever_failed_count_as_wrong(data: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    whole = arms(data, runs, "passages")
    out = tmp_path / "failed"
    out.mkdir()
    for file in (runs["passages"] / "questions").iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    for split in ("train", "test"):
        rows = read_jsonl(out / f"{split}.jsonl")
        rows[1] |= {"candidates": [], "ranks": [], "flag": RETRIEVER_ERROR}
        write_jsonl(out / f"{split}.jsonl", rows)
    questions = RetrievedQuestions(whole.config, out)
    assert questions.queries("train") == [0, *range(2, 10)]
    assert questions.queries("test") == [0, 1, 2, 3]
    networks = Networks.of(questions, **whole.checkpoint("dro", 0))
    for how in ("selector", "retriever", "gold"):
        evaluated = networks.evaluate(questions.take("test", [0, 1, 2, 3]), how)
        assert [evaluated[1][name] for name in ("exact", "f1", "acc", "hit@1", "hit@2")] == [0] * 5
        assert all(np.isfinite(row["log_p"]) for row in evaluated)


def test_where_passages_are_shown_does_not_matter_to_a_pointer(runs: dict[str, Path]) -> None:
    predictor = methods.get("dro").load(artifacts.open_artifact(runs["passages"] / "artifact"))
    asked, _ = predictor.find("where was Mira born")
    turned = replace(asked, candidates=asked.candidates[::-1], ranks=asked.ranks[::-1])
    picks, others = predictor.select(asked), predictor.select(turned)
    assert [pick.document.id for pick in picks] == [pick.document.id for pick in others]
    assert [pick.probability for pick in picks] == pytest.approx([pick.probability for pick in others], rel=1e-3)
    assert predictor.answer(asked, picks) == predictor.answer(turned, others)


def test_the_exact_likelihood_is_the_sum_over_permutations(data: Path, runs: dict[str, Path]) -> None:
    networks = networks_of(data, runs, "passages")
    dev = of_split(networks, "dev", [0, 1])
    prior, likelihood = networks.exact(dev)
    assert prior.shape == likelihood.shape == (2, 30)
    assert prior.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)
    number = networks.questions.permutations().index([3, 0])
    (scores,) = networks.generator.score(dev[1:], [[[3, 0]]])
    assert scores.log_lik[0] == pytest.approx(float(likelihood[1, number]))


def test_the_same_run_again_has_the_same_weights(data: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    again = small.run_in(tmp_path / "again", config_of(data, "passages"))
    for file in (runs["passages"] / "seed-0").rglob("*.safetensors"):
        assert sha256(file) == sha256(again / file.relative_to(runs["passages"])), file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retrieve": {"choose": 7}}, "choose=7 passages of candidates=6"),
        ({"retrieve": {"pool": "own", "url": "http://x"}}, "url ranks the whole corpus"),
        ({"select": {"decode": "free", "labels": "letters"}}, "labels=letters needs decode=constrained"),
        ({"arms": ["closed_book"]}, "closed_book needs model.base"),
        ({"model": {"lora_rank": 4}}, "model.lora_rank was renamed: use model.lora.rank"),
        ({"model": {"finetune": True}}, "model.finetune=true needs base"),
        ({"model": {"lora": {"targets": "q_proj"}}}, "model.lora.targets='q_proj': expected all-linear or a list"),
        ({"data": {"source": "facts"}}, "rag_sft need real questions"),
        ({"data": {"source": "facts"}, "arms": ["dro"], "model": {"base": "x"}}, "model.base is for real questions"),
    ],
)
def test_contradictions_are_named(data: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Config, small.values(data, **change))


def test_language_models_read_a_context_once(
    data: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, prompts = networks_of(data, runs, "language"), []
    log_probs = CausalModel.log_probs

    def spy(self: CausalModel, asked: Any, *rest: Any) -> Any:
        prompts.extend(asked)
        return log_probs(self, asked, *rest)

    monkeypatch.setattr(CausalModel, "log_probs", spy)
    (scores,) = networks.generator.score(of_split(networks, "train", [0]), [[[1, 2], [3, 0], [1, 2]]])
    assert len(prompts) == 2
    assert scores.log_lik[0] == scores.log_lik[2] != scores.log_lik[1]
    assert scores.answer_tokens == 2  # the city and the end of turn


@pytest.mark.parametrize("finetune", [False, True])
def test_the_weights_of_a_language_model_open_again(data: Path, tmp_path: Path, finetune: bool) -> None:
    """Those of its adapter, or all of them."""
    values = {**config_of(data, "language")["model"], "finetune": finetune}
    questions = SimpleNamespace(config=build(Config, small.values(data, model=values)))
    network = LanguageSelector(questions).build(0)
    plain = CausalModel.open(str(data / "base")).network
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert (trained == {name for name, _ in plain.named_parameters()}) == finetune
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * parameter.requires_grad
    export_weights(tmp_path / "weights.safetensors", network.state_dict())
    again = LanguageSelector(questions, tmp_path / "weights.safetensors").build(1)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in network.named_parameters())


def test_a_generators_arm_is_reported_with_the_metric_that_judges_it(data: Path, tmp_path: Path) -> None:
    changed = {"arms": ["dro", "rag_sft"], "alternation": {"monitor": "dev_hit@1"}}
    report = json.loads((small.run_in(tmp_path / "run", small.values(data, **changed)) / "report.json").read_text())
    assert "rag_sft: its best iteration is chosen by dev_f1, since it trains no selector" in report["notes"]
