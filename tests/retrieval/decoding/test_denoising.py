"""The denoising loop, against planted networks."""

import itertools

import numpy as np
import pytest
from planted import Planted, corpus_table, hashed, keys, log_softmax, random_table

from mobula.retrieval.decoding import Decoder, schedule
from mobula.retrieval.decoding.denoise import Proposal, gumbel, softmax
from mobula.retrieval.search import BadSearch, SearchOptions, StepEvent


def decode(table, rule, key=0, **options):
    model = Planted(table, rule)
    (found,) = Decoder(model, table).search(keys(key), [SearchOptions(**options)], trace=True)
    return found, model


VARIANTS = [
    {"steps": 1},
    {"steps": 2, "order": "margin"},
    {"steps": 4, "order": "entropy"},
    {"steps": 3, "order": "random"},
    {"steps": 2, "order": "left_to_right"},
    {"steps": 3, "schedule": "cosine"},
    {"steps": 4, "block": 2},
    {"threshold": 0.6},
    {"threshold": 0.9, "block": 2},
    {"steps": 3, "sampler": "ancestral"},
    {"steps": 2, "temperature": 1.0},
    {"steps": 3, "remask": "low_conf"},
    {"steps": 9, "remask": "low_conf"},
    {"steps": 6, "remask": "low_conf", "remask_conf": "leave_one_out"},
    {"steps": 6, "remask": "remdm"},
    {"steps": 6, "remask": "remdm", "remask_conf": "leave_one_out", "remask_cap": 1.0},
    {"steps": 4, "block": 2, "remask": "low_conf"},
    {"steps": 2, "cfg": 1.5},
]


def test_mask_never_predicted_at_decode():
    table = random_table(np.random.default_rng(0))
    for variant, key in itertools.product(VARIANTS, range(3)):
        for constraint in ("off", "project", "bitset"):
            found, _ = decode(table, hashed(), key, decoder="match", constraint=constraint, **variant)
            assert len(found.raw_code) == table.levels
            assert all(0 <= code < size for code, size in zip(found.raw_code, table.sizes, strict=True))


def test_steps_accounting():
    table = corpus_table(np.random.default_rng(0).integers(0, 5, (60, 8)), [5] * 8)
    for steps in range(1, 9):
        for kind in ("linear", "cosine"):
            found, model = decode(table, hashed(), decoder="match", steps=steps, constraint="off", schedule=kind)
            revealing = [k for k in schedule.commits(8, steps, kind) if k]
            assert found.nfe == len(model.seen) == found.steps_used == len(revealing)
            assert found.rows == found.nfe
            assert [len(event.commits) for event in found.trace] == revealing
    with pytest.raises(BadSearch, match="StepsAboveLength"):
        decode(table, hashed(), steps=9)


def test_left_to_right_visits_positions_in_order():
    table = corpus_table(np.random.default_rng(0).integers(0, 5, (60, 8)), [5] * 8)
    found, _ = decode(table, hashed(), decoder="match", steps=8, order="left_to_right", constraint="off")
    assert [event.commits[0][0] for event in found.trace] == list(range(8))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedule_commits_every_position(kind):
    for length, steps in itertools.product(range(1, 17), range(1, 17)):
        counts = schedule.commits(length, steps, kind)
        assert len(counts) == steps and sum(counts) == length and min(counts) >= 0


def test_ancestral_reveals_are_uniform_in_time():
    steps, rng, when = 4, np.random.default_rng(0), []
    for _ in range(20_000):
        when.append(next(s for s in range(1, steps + 1) if rng.random() < schedule.ancestral_reveal(steps, s)))
    assert np.allclose(np.bincount(when)[1:] / len(when), 1 / steps, atol=0.015)


def test_remdm_keeps_the_schedule_in_the_mean():
    for steps, cap in itertools.product((2, 5, 12), (0.1, 0.5, 1.0)):
        committed = 0.0
        for step in range(1, steps + 1):
            reveal, sigma = schedule.remdm_rates(steps, step, cap)
            assert -1e-12 <= reveal <= 1 + 1e-12
            committed = committed * (1 - sigma) + (1 - committed) * reveal
            assert committed == pytest.approx(step / steps)


def test_loop_follows_the_rule_by_brute_force():
    """Unconstrained confidence decoding, written again without the machinery."""
    table = corpus_table(np.random.default_rng(0).integers(0, 5, (60, 6)), [5] * 6)
    for key, steps in itertools.product(range(5), (1, 2, 3, 4, 6)):
        z = [-1] * 6
        for count in schedule.commits(6, steps, "linear"):
            probs = np.exp(log_softmax(hashed()(key, tuple(z))))
            masked = sorted((i for i in range(6) if z[i] < 0), key=lambda i: -probs[i].max())
            for i in masked[:count]:
                z[i] = int(probs[i].argmax())
        found, _ = decode(table, hashed(), key, decoder="match", steps=steps, constraint="off")
        assert found.raw_code == tuple(z)


def test_parallel_commit_never_invalid():
    """Adversarial logits: the most probable code of every position leads to no document."""
    rng = np.random.default_rng(1)
    for trial in range(12):
        table = random_table(rng, documents=12)
        codes = {tuple(code) for code in table.codes[table.live].tolist()}

        def adversarial(key, z, table=table):
            favoured = np.zeros((table.levels, table.width))
            favoured[np.arange(table.levels), (table.codes[key % len(table)] + np.arange(table.levels)) % 5] = 40
            return favoured + hashed()(key, z)

        for variant in VARIANTS:
            found, _ = decode(table, adversarial, trial, decoder="match", **variant)
            assert found.raw_code in codes and found.raw_valid
            assert all(event.valid_left > 0 for event in found.trace)


def test_codes_the_network_rules_out_stay_in_the_corpus():
    table = corpus_table([[0, 1], [1, 0]])
    certain = np.where(np.eye(2), 0.0, -3e38)
    found, _ = decode(table, lambda key, z: certain, decoder="match", steps=1)
    assert found.raw_code in {(0, 1), (1, 0)}


def test_remask_then_valid_recomputed():
    table = random_table(np.random.default_rng(2), documents=30, levels=5)
    live = table.codes[table.live]
    remasked = 0
    for key, remask in itertools.product(range(20), ("low_conf", "remdm")):
        found, _ = decode(table, hashed(1.0), key, decoder="match", steps=8, remask=remask)
        z = np.full(table.levels, -1)
        for event in found.trace:
            for level, code, _ in event.commits:
                z[level] = code
            z[event.remasked] = -1
            agree = ((live == z) | (z < 0)).all(1)
            assert event.valid_left == agree.sum()
            remasked += len(event.remasked)
        assert tuple(z) == found.raw_code
    assert remasked > 50


def test_committed_never_revised_without_remask():
    table = random_table(np.random.default_rng(3))
    for variant, key in itertools.product(VARIANTS, range(5)):
        if variant.get("remask"):
            continue
        found, _ = decode(table, hashed(), key, decoder="match", **variant)
        levels = [level for event in found.trace for level, _, _ in event.commits]
        assert sorted(levels) == list(range(4))
        assert not any(event.remasked for event in found.trace)


def test_low_confidence_remask_revises():
    table = corpus_table(list(itertools.product(range(3), repeat=4)), [3] * 4)
    events = [
        event
        for key in range(10)
        for event in decode(table, hashed(1.0, 3), key, decoder="match", steps=4, remask="low_conf")[0].trace
    ]
    assert any(event.remasked for event in events)
    assert any(len(event.commits) > 1 for event in events)


def two_documents(key, z):
    """Sure of code 0 at level 1, fairly sure of it at level 2, and for code 1 at level 0."""
    return np.log([[0.4, 0.6], [0.99, 0.01], [0.9, 0.1]])


@pytest.mark.parametrize("remask_conf", ["at_commit", "leave_one_out"])
def test_the_surest_stays_and_the_forced_goes(remask_conf: str) -> None:
    """After the surest code one document is left, so the constraint makes the other levels certain. They are not."""
    table = corpus_table([[0, 0, 0], [1, 1, 1]], [2, 2, 2])
    options = {"decoder": "match", "steps": 3, "remask": "low_conf", "remask_conf": remask_conf}
    found, _ = decode(table, two_documents, **options)
    first, second, last = found.trace
    confident = {level: conf for level, _, conf in first.commits}
    assert [confident[level] for level in range(3)] == pytest.approx([0.4, 0.99, 0.9])
    assert (first.remasked, second.remasked, last.remasked) == ([0, 2], [0], [])
    assert found.raw_code == (0, 0, 0)


def test_leave_one_out_counts_its_rows():
    table = corpus_table(list(itertools.product(range(3), repeat=4)), [3] * 4)
    found, _ = decode(
        table,
        hashed(1.0, 3),
        decoder="match",
        steps=4,
        remask="low_conf",
        remask_conf="leave_one_out",
        constraint="off",
    )
    # Steps 2..4 start with 1, 2 and 3 committed positions, each measured in a row of its own.
    assert found.nfe == 4 and found.rows == 4 + 1 + 2 + 3


def test_forced_fill_costs_no_call():
    codes = np.random.default_rng(0).integers(0, 50, (5, 8))
    table = corpus_table(codes, [50] * 8)
    found, model = decode(table, hashed(width=50), decoder="match", steps=8)
    assert found.nfe == len(model.seen) == found.steps_used < 8
    assert len(found.trace[-1].commits) > 1
    # What nothing else is left for is no surer for that: the confidence is the network's.
    z = np.full(8, -1)
    for event in found.trace:
        own = np.exp(log_softmax(hashed(width=50)(0, tuple(z.tolist()))))
        for level, code, conf in event.commits:
            z[level] = code
            assert conf == pytest.approx(own[level, code], rel=1e-5)


def test_threshold_commits_what_is_sure():
    table = corpus_table(list(itertools.product(range(3), repeat=4)), [3] * 4)
    sure = np.zeros((4, 3))
    sure[[0, 2], [1, 2]] = 9.0
    found, _ = decode(table, lambda key, z: sure, decoder="match", threshold=0.9, constraint="off")
    assert [sorted(c[0] for c in event.commits) for event in found.trace] == [[0, 2], [1], [3]]
    assert found.steps_used == 3


def test_ties_go_to_the_lowest_position():
    table = corpus_table(list(itertools.product(range(3), repeat=4)), [3] * 4)
    found, _ = decode(table, lambda key, z: np.zeros((4, 3)), decoder="match", steps=4, constraint="off")
    assert [event.commits[0][:2] for event in found.trace] == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_gumbel_float64():
    noise = gumbel(np.random.default_rng(0), (20_000,))
    assert noise.dtype == np.float64
    assert (noise != noise.astype(np.float32)).mean() > 0.99
    # argmax(logits + noise) samples from softmax(logits), while conf stays that of the softmax itself.
    logits = np.array([2.0, 1.0, 0.0, -2.0])
    rng = np.random.default_rng(1)
    tiled = np.tile(logits, (20_000, 1))
    many = Proposal(np.zeros(20_000, int), tiled, gumbel(rng, (20_000, 4)), softmax(tiled))
    expected = np.exp(log_softmax(logits))
    assert np.allclose(np.bincount(many.codes, minlength=4) / 20_000, expected, atol=0.01)
    assert np.allclose(many.conf, expected[many.codes])


def eager_end(key, z):
    """Sure of the end late in the docid; once an end is committed, sure of it everywhere."""
    logits = np.zeros((len(z), 4))
    logits[np.arange(len(z)), [1, 2, 3, 1]] = 1.0
    if 0 in z:
        logits[:, 0] = 9.0
    elif -1 in z[:2]:
        logits[2:, 0] = 9.0
    return logits


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
def test_eos_not_first(order):
    table = corpus_table(list(itertools.product(range(4), repeat=4)), [4] * 4, family="text.lead")
    last, _ = decode(table, eager_end, decoder="match", steps=4, order=order, eos_conf="last", constraint="off")
    free, _ = decode(table, eager_end, decoder="match", steps=4, order=order, eos_conf="free", constraint="off")
    assert last.raw_code == (1, 2, 3, 1)
    assert free.raw_code == (0, 0, 0, 0)


def test_eos_waits_under_a_threshold_and_can_be_handicapped():
    table = corpus_table(list(itertools.product(range(4), repeat=4)), [4] * 4, family="text.lead")
    found, _ = decode(table, eager_end, decoder="match", threshold=0.95, constraint="off")
    assert found.raw_code == (1, 2, 3, 1)
    found, _ = decode(table, eager_end, decoder="match", steps=4, eos_conf="free", eos_logit_off=20.0, constraint="off")
    assert found.raw_code == (1, 2, 3, 1)


def test_eos_of_an_appended_level_is_an_index():
    table = corpus_table(list(itertools.product(range(4), repeat=3)), [4] * 3, family="text.lead")
    appended = corpus_table(list(itertools.product(range(4), repeat=4)), [4] * 4, family="text.lead")
    appended = type(appended)(table.space, appended.codes, appended.doc_ids, appended.live, appended.sizes, "append")
    end = Decoder(Planted(appended, hashed(width=4)), appended).corpus.end
    assert end[:3, 0].all() and not end[3].any() and not end[:, 1:].any()


def test_length_not_from_gold():
    """The docid has L positions whatever the gold says, and gold changes nothing but raw_exact."""
    table = corpus_table([[1, 2, 0, 0], [1, 2, 3, 1], [3, 0, 0, 0]], [4] * 4, family="text.lead")
    model = Planted(table, hashed(width=4))
    results = [
        Decoder(model, table).search(keys(0), [SearchOptions(constraint="off")], gold=gold)[0]
        for gold in (None, [{"d0"}], [{"d1"}], [{"d2"}])
    ]
    assert all(len(found.raw_code) == 4 for found in results)
    assert len({(found.raw_code, tuple(found.hits), found.nfe) for found in results}) == 1


def test_trace_streams_the_same_steps():
    table = random_table(np.random.default_rng(4), levels=6)
    model = Planted(table, hashed())
    decoder = Decoder(model, table)
    for decode_with in ("match_rerank", "beam", "best_of_n", "one_pass"):
        options = SearchOptions(decoder=decode_with, steps=3)
        stream = decoder.trace(keys(1), options)
        model.seen.clear()
        events = []
        for item in stream:
            if isinstance(item, StepEvent):
                events.append(item)
                if len(events) == 1:
                    assert len(model.seen) == 1  # told as it happens, not at the end
            else:
                result = item
        (found,) = decoder.search(keys(1), [options], trace=True)
        assert result == found and events == found.trace


WRONG = [
    {"threshold": 0.5, "steps": 2},
    {"threshold": 0.5, "sampler": "ancestral"},
    {"threshold": 0.5, "remask": "low_conf"},
    {"sampler": "ancestral", "remask": "remdm"},
    {"block": 3},
    {"block": 2, "steps": 1},
    {"steps": 5},
    {"steps": 17, "remask": "low_conf"},
    {"order": "margin", "remask": "low_conf"},
    {"order": "random", "sampler": "ancestral"},
    {"schedule": "cosine", "threshold": 0.5},
    {"remask_conf": "leave_one_out"},
    {"decoder": "best_of_n", "temperature": 0.0},
    {"decoder": "beam", "beam_per_step": 3},
    {"decoder": "greedy"},
    {"cfg": float("nan")},
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_wrong_combinations_are_refused(options):
    table = random_table(np.random.default_rng(0))
    with pytest.raises(BadSearch):
        decode(table, hashed(), **options)


def test_threshold_with_blocks_needs_no_step_count():
    table = random_table(np.random.default_rng(0))
    found, _ = decode(table, hashed(), threshold=0.5, block=1)
    assert found.steps_used <= table.levels


def test_model_in_training_mode_is_refused():
    table = random_table(np.random.default_rng(0))
    model = Planted(table, hashed()).train()
    with pytest.raises(BadSearch, match="eval"):
        Decoder(model, table).search(keys(0), [SearchOptions()])


def test_model_must_fit_table_and_paradigm():
    table = random_table(np.random.default_rng(0))
    with pytest.raises(BadSearch, match="autoregressive"):
        Decoder(Planted(table, hashed(), "autoregressive"), table)
    other = random_table(np.random.default_rng(0), width=4)
    with pytest.raises(BadSearch, match="sizes"):
        Decoder(Planted(other, hashed(width=4)), table)
