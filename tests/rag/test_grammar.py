"""Lists under a grammar: all of them have probability one, and what is drawn is what is scored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from mobula.models.causal import CausalModel
from mobula.models.constrained import Target, collate_targets, target_log_probs
from mobula.rag.permutations import AmbiguousIds, Grammar, Walk, labels, sample_lists


def by_characters(characters: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single characters, so that numbers of two digits have two tokens."""
    words = ["<eos>", "<unk>", *sorted(set(characters))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def model() -> CausalModel:
    """A tiny Llama of random weights that knows digits and brackets."""
    tokenizer = by_characters("0123456789[]> abcdeABCDEF?")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=1.0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return CausalModel(transformers.LlamaForCausalLM(config), tokenizer, "tiny")


def scored(model: CausalModel, grammar: Grammar, n: int, permutations: list[list[int]]) -> torch.Tensor:
    """log p f32[R] of lists, teacher-forced in one batch."""
    prompt = model.encode("which?")
    targets = [Target(prompt, grammar.tokens(o), [a for _, a in grammar.steps(o, n)], 1.0) for o in permutations]
    with torch.inference_mode():
        return target_log_probs(model.network, collate_targets(targets)).sum(1)


def numbered(model: CausalModel, n: int, k: int, skipped: int = 0) -> Grammar:
    """A grammar for the last n of more passages, so that labels have one digit and two."""
    whole = Grammar.of(model, "numbers", n + skipped, k)
    return Grammar(whole.first[skipped:], whole.later[skipped:], k)


def test_all_lists_together_have_probability_one(model: CausalModel) -> None:
    grammar = numbered(model, 4, 2, skipped=7)  # passages 8, 9, 10 and 11
    assert [len(part) for part in grammar.first] == [3, 3, 4, 4]
    permutations = [list(permutation) for permutation in itertools.permutations(range(4), 2)]
    assert float(scored(model, grammar, 4, permutations).double().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_lists_have_the_probability_that_they_are_drawn_with(model: CausalModel) -> None:
    grammar, prompt = numbered(model, 4, 2, skipped=7), model.encode("which?")
    uniform = np.random.default_rng(0).random((400, grammar.longest))
    walks = sample_lists(model, prompt, grammar, 4, uniform)
    permutations = [walk.permutation for walk in walks]
    assert all(len(set(permutation)) == 2 for permutation in permutations)
    drawn = torch.tensor([sum(walk.log_probs) for walk in walks])
    torch.testing.assert_close(drawn.float(), scored(model, grammar, 4, permutations), atol=1e-4, rtol=1e-4)
    likely = max(map(tuple, permutations), key=lambda permutation: permutations.count(list(permutation)))
    share = permutations.count(list(likely)) / len(permutations)
    assert share == pytest.approx(float(scored(model, grammar, 4, [list(likely)]).exp()), abs=0.1)


def test_a_list_does_not_depend_on_those_beside_it(model: CausalModel) -> None:
    grammar, prompt = numbered(model, 5, 3), model.encode("which?")
    uniform = np.random.default_rng(1).random((6, grammar.longest))
    together = sample_lists(model, prompt, grammar, 5, uniform)
    alone = [sample_lists(model, prompt, grammar, 5, row[None])[0].permutation for row in uniform]
    assert [walk.permutation for walk in together] == alone


def test_the_greedy_list_is_greedy_token_by_token(model: CausalModel) -> None:
    grammar = numbered(model, 4, 1, skipped=7)
    (walk,) = sample_lists(model, model.encode("which?"), grammar, 4, None)
    firsts = scored(model, grammar, 4, [[place] for place in range(4)]).exp()
    # 10 and 11 share their first digit, so together they may beat a number that is likelier than each.
    groups = [float(firsts[0]), float(firsts[1]), float(firsts[2] + firsts[3])]
    assert min(walk.permutation[0], 2) == int(np.argmax(groups))


def test_lists_are_as_long_as_there_are_passages(model: CausalModel) -> None:
    grammar = numbered(model, 5, 4)
    (walk,) = sample_lists(model, model.encode("which?"), grammar, 2, None)
    assert sorted(walk.permutation) == [0, 1]


def test_a_list_reads_as_it_is_written(model: CausalModel) -> None:
    grammar = Grammar.of(model, "numbers", 11, 3)
    assert model.decode(grammar.tokens([9, 0, 10])).replace(" ", "") == "[10]>[1]>[11]"
    for token, allowed in grammar.steps([9, 0, 10], 11):
        assert token in allowed
    walk = Walk(grammar, 11)
    assert len(walk.allowed) == 1  # the bracket
    walk.take(walk.allowed[0])
    assert [model.decode([token]) for token in walk.allowed] == list("123456789")


def test_labels_that_could_be_read_in_two_ways_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = CausalModel(torch.nn.Identity(), by_characters("0123456789> ABCDEF["), "odd")
    # A tokenizer without a closing bracket: "[1" begins "[11".
    monkeypatch.setattr(odd, "encode", lambda text: [ord(character) for character in text.replace("]", "")])
    with pytest.raises(AmbiguousIds, match=r"select\.labels=letters"):
        Grammar.of(odd, "numbers", 11, 2)
    assert Grammar.of(odd, "letters", 11, 2).k == 2


def test_labels() -> None:
    assert labels("numbers", 3) == ["1", "2", "3"]
    assert labels("letters", 3) == ["A", "B", "C"]


def test_letters_are_drawn_as_numbers_are(model: CausalModel) -> None:
    grammar = Grammar.of(model, "letters", 5, 2)
    permutations = [list(permutation) for permutation in itertools.permutations(range(5), 2)]
    assert float(scored(model, grammar, 5, permutations).double().exp().sum()) == pytest.approx(1, abs=1e-5)
