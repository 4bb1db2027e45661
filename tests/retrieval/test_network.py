"""The docid network: who may attend to whom, caching, batching, the codeword prior, saving and loading."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobula.data.records import Document
from mobula.errors import ArtifactError
from mobula.retrieval.arms import Arm
from mobula.retrieval.build import ModelConfig, build_model, codeword_table, construct, load_model, over, save_model
from mobula.retrieval.docids.code_only import CodeOnlyRetriever
from mobula.retrieval.docids.table import DocidTable
from mobula.retrieval.network import NetworkShape
from mobula.training.engine import _groups

QUERIES = 5
PARADIGMS = ("diffusion", "autoregressive")
# Tower and whether the codeword prior is on.
KINDS = [("tokens", False), ("states", False), ("states", True)]


def network(functions, paradigm: str, tower: str = "tokens", prior: bool = False, *, family: str = "rq", **changes):
    """A network with random weights everywhere (at the start some are zero by design), and its docid table."""
    table = functions.table(family)
    codewords = codeword_table(table) if prior else None
    shape = NetworkShape(
        paradigm=paradigm, sizes=tuple(table.sizes.tolist()), width=32, layers=2, heads=2, dropout=0.1, tower=tower,
        query_len=12, input_dim=functions.words.dim, codeword_dim=256 if prior else 0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = construct(replace(shape, **changes), table, codewords).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    return model, table


def query_for(functions, tower: str) -> dict[str, Tensor]:
    return functions.token_query(QUERIES) if tower == "tokens" else functions.state_query(QUERIES)


def some_codes(table: DocidTable, masked: float = 0.0) -> Tensor:
    codes = torch.from_numpy(table.codes[:QUERIES].astype(np.int64))
    hidden = torch.rand(codes.shape, generator=torch.Generator().manual_seed(1)) < masked
    return codes.masked_fill(hidden, -1)


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tower", "prior"), KINDS)
@pytest.mark.parametrize("sees", [False, True])
def test_attention_is_bidirectional(functions, tower: str, prior: bool, sees: bool) -> None:
    """The last position changes the first one's logits in diffusion, and never in the twin (trap 3)."""
    for paradigm in PARADIGMS:
        model, table = network(functions, paradigm, tower, prior, query_sees_docid=sees)
        before = some_codes(table)
        after = before.clone()
        after[:, -1] = (after[:, -1] + 1) % 8
        query = query_for(functions, tower)
        with torch.no_grad():
            a, b = model(query, before), model(query, after)
        changed = (a - b).abs().amax(-1) > 1e-4
        assert changed[:, 0].all() == (paradigm == "diffusion")
        if paradigm == "autoregressive":
            assert not changed.any()


@pytest.mark.parametrize(("tower", "prior"), KINDS)
def test_the_twin_sees_every_code_before_its_own(functions, tower: str, prior: bool) -> None:
    model, table = network(functions, "autoregressive", tower, prior)
    query = query_for(functions, tower)
    for level in range(table.levels):
        after = some_codes(table)
        after[:, level] = (after[:, level] + 1) % 8
        changed = (model(query, after) - model(query, some_codes(table))).abs().amax((0, 2)) > 1e-4
        assert changed.tolist() == [place > level for place in range(table.levels)]


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_the_prior_of_a_level_does_not_depend_on_its_own_code(functions, paradigm: str) -> None:
    """The codeword prior leaves out the codeword that is asked for; else training would copy it."""
    model, table = network(functions, paradigm, "states", True)
    for layer in model.layers:
        nn.init.zeros_(layer.out.weight)
        nn.init.zeros_(layer.mlp[2].weight)
    nn.init.zeros_(model.codes.output)
    query = functions.state_query(QUERIES)
    after = some_codes(table)
    after[:, 1] = (after[:, 1] + 1) % 8
    assert_close(model(query, after)[:, 1], model(query, some_codes(table))[:, 1])


def test_parts_of_the_prior_train_at_their_own_rates(functions) -> None:
    config = ModelConfig(
        backbone="encoder", encoder="wordllama", refine_rate=0.03, rows_rate=0.1, sharpness_rate=10.0, width=32
    )
    model = build_model(config, Arm("diffusion", "opq"), functions.table("opq"))
    groups = _groups(list(model.parameters()), 0.01)
    shares = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert shares.pop(id(model.prior.refine.weight)) == 0.03
    assert shares.pop(id(model.codes.output)) == 0.1
    assert shares.pop(id(model.prior.log_sharpness)) == 10.0
    assert set(shares.values()) == {1.0}


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize(("tower", "prior"), KINDS)
@pytest.mark.parametrize("sees", [False, True])
def test_grouped_logits_equal_single_ones(functions, paradigm: str, tower: str, prior: bool, sees: bool) -> None:
    model, table = network(functions, paradigm, tower, prior, query_sees_docid=sees)
    memory = model.memory(query_for(functions, tower))
    groups = torch.stack([some_codes(table, masked) for masked in (0.0, 0.3, 0.6)], 1)
    if paradigm == "autoregressive":
        groups = groups.clamp(min=0)
    with torch.no_grad():
        grouped = model.logits(memory, groups)
        single = [model.logits(memory, groups[:, g]) for g in range(3)]
    assert_close(grouped, torch.stack(single, 1))


@pytest.mark.parametrize(("tower", "prior"), KINDS)
@pytest.mark.parametrize("sees", [False, True])
def test_steps_with_a_cache_equal_teacher_forcing(functions, tower: str, prior: bool, sees: bool) -> None:
    model, table = network(functions, "autoregressive", tower, prior, query_sees_docid=sees)
    memory = model.memory(query_for(functions, tower))
    beams = torch.stack([some_codes(table), some_codes(table).roll(1, 0)], 1)
    with torch.no_grad():
        forced = model.logits(memory, beams)
        cache, previous = model.start(memory, 2), None
        for level in range(table.levels):
            logits, cache = model.step(memory, cache, previous)
            assert_close(logits, forced[:, :, level])
            previous = beams[:, :, level]


def test_reordered_hypotheses_go_on_as_their_parents(functions) -> None:
    model, table = network(functions, "autoregressive", "states", True)
    memory = model.memory(functions.state_query(QUERIES))
    beams = torch.stack([some_codes(table), some_codes(table).roll(1, 0)], 1)
    parents = torch.tensor([[1, 0, 1]]).expand(QUERIES, 3)
    with torch.no_grad():
        _, cache = model.step(memory, model.start(memory, 2), None)
        _, cache = model.step(memory, cache, beams[:, :, 0])
        logits, _ = model.step(memory, cache.reorder(parents), beams[:, :, 1].gather(1, parents))
        forced = model.logits(memory, beams)[:, :, 2]
    assert_close(logits, forced[torch.arange(QUERIES)[:, None], parents])


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize(("tower", "prior"), KINDS)
@pytest.mark.parametrize("sees", [False, True])
def test_rows_of_a_memory_are_the_queries_they_name(
    functions, paradigm: str, tower: str, prior: bool, sees: bool
) -> None:
    model, table = network(functions, paradigm, tower, prior, query_sees_docid=sees)
    memory = model.memory(query_for(functions, tower))
    index = torch.tensor([4, 0, 0])
    chosen = memory.rows(index)
    assert (memory.size, chosen.size) == (QUERIES, 3)
    with torch.no_grad():
        expected = model.logits(memory, some_codes(table))[index]
        assert_close(model.logits(chosen, some_codes(table)[index]), expected)
        joined = type(memory).concat([chosen, memory.rows(torch.tensor([2]))])
        assert_close(model.logits(joined, some_codes(table)[[4, 0, 0, 2]])[:3], expected)


@pytest.mark.parametrize("tower", ["tokens", "states"])
def test_padding_of_the_query_changes_nothing(functions, tower: str) -> None:
    model, table = network(functions, "diffusion", tower)
    if tower == "tokens":
        short = {"ids": torch.tensor([[5, 9, 7]])}
        long = {"ids": torch.tensor([[5, 9, 7, 0, 0, 0]])}
    else:
        long = {name: values[:1].clone() for name, values in functions.state_query(QUERIES).items()}
        long["mask"][:, 3:] = False
        short = {name: values[:, :3] if name != "vector" else values for name, values in long.items()}
    with torch.no_grad():
        assert_close(model(long, some_codes(table)[:1]), model(short, some_codes(table)[:1]))


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_mask_never_predicted_and_impossible_codes_are_out(functions, paradigm: str) -> None:
    """There are K codes and no output for [MASK]; a level of fewer codes has -inf above them (trap 4)."""
    table = functions.table("rq", collision="append")
    sizes = tuple(table.sizes.tolist())
    assert len(set(sizes)) > 1
    shape = NetworkShape(
        paradigm=paradigm, sizes=sizes, width=32, layers=1, heads=2, dropout=0.0, tower="tokens", query_len=12,
        input_dim=256,
    )  # fmt: skip
    model = construct(shape, table, None).eval()
    logits = model(functions.token_query(QUERIES), torch.full((QUERIES, len(sizes)), -1).clamp(min=0))
    assert logits.shape == (QUERIES, len(sizes), max(sizes))
    for level, size in enumerate(sizes):
        assert torch.isfinite(logits[:, level, :size]).all()
        assert (logits[:, level, size:] == float("-inf")).all()


def test_the_unconditional_memory_knows_nothing_of_the_query(functions) -> None:
    for (tower, prior), sees in itertools.product(KINDS, (False, True)):
        model, table = network(functions, "diffusion", tower, prior, query_sees_docid=sees)
        memory = model.unconditional(model.memory(query_for(functions, tower)))
        with torch.no_grad():
            logits = model.logits(memory, torch.full((QUERIES, table.levels), -1))
        assert torch.isfinite(logits).all()
        assert_close(logits, logits[:1].expand_as(logits))


def fresh(functions, family: str, paradigm: str):
    """A network as training starts from, on the quantiser's codewords."""
    table = functions.table(family)
    model, _ = network(functions, paradigm, "states", True, family=family)
    torch.manual_seed(1)
    return construct(model.shape, table, codeword_table(table), sharpness=10.0).eval(), table


@pytest.mark.parametrize("family", ["rq", "pq", "opq"])
def test_a_network_starts_from_the_codes_distance_where_it_is_a_sum_over_levels(functions, family: str) -> None:
    """Of residual codes it is none: levels' codewords are not orthogonal, and the sum would be another ranking."""
    table = functions.table(family)
    model = build_model(ModelConfig(backbone="encoder", encoder="wordllama"), Arm("diffusion", family), table)
    words = table.space.codewords().astype(np.float64)
    products = np.einsum("akd,bjd->abkj", words, words)
    across = np.abs(products[~np.eye(len(words), dtype=bool)]).max()
    assert (across < 1e-6) == (model.prior is not None)


@pytest.mark.parametrize("family", ["pq", "opq"])
def test_the_untrained_prior_ranks_documents_as_their_codes_distance_does(functions, family: str) -> None:
    model, table = fresh(functions, family, "diffusion")
    query = functions.state_query(QUERIES)
    with torch.no_grad():
        scores = torch.log_softmax(model(query, torch.full((QUERIES, table.levels), -1)), -1)
    levels = torch.arange(table.levels)
    ours = scores[:, levels, torch.from_numpy(table.codes.astype(np.int64))].sum(-1).numpy()
    embeddings = functions.words.embed(functions.queries(QUERIES))
    theirs = CodeOnlyRetriever("adc", table, functions.words, lambda d: d.text).scores(embeddings)
    for a, b in zip(ours, theirs, strict=True):
        # Equal up to a constant of the query and the sharpness, hence the same ranks.
        np.testing.assert_allclose(a - a.mean(), 10 * (b - b.mean()), atol=1e-3)
        assert (np.diff(a[np.argsort(-b, kind="stable")]) <= 1e-4).all()


def test_the_untrained_twin_is_the_residual_decomposition(functions) -> None:
    """Given the codes before it, a level scores 2 r.v - |v|^2 with r the query minus their codewords."""
    model, table = fresh(functions, "rq", "autoregressive")
    query = functions.state_query(QUERIES)
    codes = table.codes[:QUERIES]
    with torch.no_grad():
        logits = model(query, torch.from_numpy(codes.astype(np.int64))).numpy()
    residual = query["vector"].numpy().copy()
    books = table.space.codewords()
    for level in range(table.levels):
        expected = 10 * (2 * residual @ books[level].T - (books[level] ** 2).sum(1))
        np.testing.assert_allclose(logits[:, level], expected, atol=1e-3)
        residual -= books[level][codes[:, level]]


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_codes_that_are_tokens_share_the_frozen_table(functions, paradigm: str) -> None:
    model, table = network(functions, paradigm, family="text.keywords")
    rows = functions.words.table[table.space.arrays["vocabulary"][1:]]
    np.testing.assert_array_equal(model.codes.table[1:].numpy(), rows)
    assert "codes.table" not in dict(model.named_parameters()) and "codes.table" not in model.state_dict()
    at_first, at_last = model.codes.embed(torch.tensor([3, 3]), torch.tensor([0, table.levels - 1]))
    assert torch.equal(at_first, at_last)
    logits = model(functions.token_query(QUERIES), some_codes(table))
    assert logits.shape == (QUERIES, table.levels, table.width)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_new_token_admission(functions, paradigm: str) -> None:
    """A docid with a token that no docid had before can be generated, and no weight changes."""
    model, table = network(functions, paradigm, family="text.title")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grown, _ = table.insert([Document("new", "xylophone zither", "xylophone zither")])
    assert len(grown.tokens) > 0
    wider = over(model, grown)
    query, code = functions.token_query(1), torch.from_numpy(grown.codes[-1:].astype(np.int64))
    assert int(code.max()) >= table.width
    with torch.no_grad():
        logits = wider(query, code)
        old = model(query, some_codes(table)[:1])
        same = wider(query, some_codes(table)[:1])
    assert logits.shape[-1] == grown.width
    assert torch.isfinite(logits.gather(-1, code.unsqueeze(-1))).all()
    assert_close(same[..., : table.width], old)
    assert all(torch.equal(value, before[name]) for name, value in wider.state_dict().items())
    assert over(model, table) is model


@pytest.mark.parametrize(("tower", "prior", "family"), [("tokens", False, "text.lead"), ("states", True, "opq")])
def test_a_saved_model_is_the_same_model(functions, tmp_path: Path, tower: str, prior: bool, family: str) -> None:
    model, table = network(functions, "diffusion", tower, prior, family=family)
    save_model(tmp_path, model, table.hash)
    again = load_model(tmp_path, table)
    assert not again.training
    query, z = query_for(functions, tower), some_codes(table, 0.5)
    with torch.no_grad():
        assert torch.equal(again(query, z), model(query, z))


def test_space_hash_refused_by_the_model(functions, tmp_path: Path) -> None:
    """A model says no to a docid table whose codes mean something else (trap 20)."""
    model, table = network(functions, "diffusion")
    save_model(tmp_path, model, table.hash)
    with pytest.raises(ArtifactError, match="trained on another docid space"):
        load_model(tmp_path, functions.table("pq"))
    fewer = table.delete([table.doc_ids[0]])
    assert load_model(tmp_path, fewer).levels == table.levels


def test_weights_of_another_shape_are_refused(functions, tmp_path: Path) -> None:
    model, table = network(functions, "diffusion")
    save_model(tmp_path / "a", model, table.hash)
    other, _ = network(functions, "diffusion", width=64)
    save_model(tmp_path / "b", other, table.hash)
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(ArtifactError, match="not fit the model"):
        load_model(tmp_path / "a", table)


def test_a_classifier_has_no_attention(functions) -> None:
    from mobula.retrieval.build import build_model

    model = build_model(ModelConfig(width=32), Arm("classifier", "rq"), functions.table("rq")).eval()
    assert len(model.layers) == 0
    query = functions.token_query(QUERIES)
    seen = model(query, some_codes(functions.table("rq")).index_fill(1, torch.tensor([0]), -1))
    masked = model(query, torch.full((QUERIES, 4), -1))
    assert_close(seen[:, 0], masked[:, 0])
