"""The denoising loop: from a masked code to a full one, a few positions a step (spec 5 and 6.1).

:func:`denoise` is written for one row; rows of many requests advance side by side because it yields what it
wants to ask of the network (see :mod:`.batched_calls`), so each keeps its own budget, state and random numbers
and leaves when it is done. L levels, K codes a level; -1 is [MASK].

Two probabilities of a proposed code are told apart. What is committed next goes by the one under the constraint: it
is the network's posterior over the documents that are left. What is masked again goes by the network's own, from the
step's table before any constraint: under the constraint a code that nothing else is left for has probability 1
however unlikely the network finds it, so the forced codes would stay and the surest would go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mobula.retrieval.decoding import schedule
from mobula.retrieval.decoding.batched_calls import Decoding
from mobula.retrieval.decoding.corpus import Corpus
from mobula.retrieval.search import SearchOptions, StepEvent

MASK = -1
LEAST = -1e9  # log-probability of a possible code that the network rules out: unlikely, never impossible


@dataclass
class Proposal:
    """What the network says about some masked ``positions`` i64[m].

    ``logits`` f64[m, K] carry no noise and are -inf where a code is ruled out, ``noise`` is added to choose. ``own``
    f64[m, K] are the network's probabilities before anything was ruled out.
    """

    positions: np.ndarray
    logits: np.ndarray
    noise: np.ndarray
    own: np.ndarray
    codes: np.ndarray = field(init=False)
    conf: np.ndarray = field(init=False)
    probs: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.codes = (self.logits + self.noise).argmax(1)
        # Confidence is read without the noise, also where the code was sampled.
        self.probs = softmax(self.logits)
        self.conf = self.probs[np.arange(len(self.positions)), self.codes]


class Row:
    """One docid being denoised: its codes, the confidence of each commit and the documents still possible."""

    def __init__(
        self,
        corpus: Corpus,
        options: SearchOptions,
        first: np.ndarray,
        rng: np.random.Generator,
        events: list[StepEvent] | None = None,
        forbidden: np.ndarray | None = None,
    ) -> None:
        """``first`` f64[L, K] is the table with everything masked. ``forbidden`` bool[L, K] rules codes out for
        the very first commit only, which forces an early error (:mod:`.recovery`)."""
        self.corpus, self.options, self.first, self.rng = corpus, options, first, rng
        self.events, self.forbidden = events, forbidden
        self.z = np.full(corpus.levels, MASK, np.int64)
        self.conf = np.zeros(corpus.levels)
        self.steps = 0
        self.bitset = corpus.bitset if options.constraint == "bitset" else None
        self.valid = np.zeros((1, 0), np.uint64) if self.bitset is None else self.bitset.all_valid(1)
        self._news: list[tuple[int, int, float]] = []

    def masked(self, positions: range) -> np.ndarray:
        """The masked ones among ``positions``, i64[m]."""
        return positions.start + np.flatnonzero(self.z[positions.start : positions.stop] == MASK)

    def committed(self, positions: range) -> np.ndarray:
        """The committed ones among ``positions``, i64[m]."""
        return positions.start + np.flatnonzero(self.z[positions.start : positions.stop] != MASK)

    def ask(self, leave_out: np.ndarray) -> Decoding[tuple[np.ndarray, np.ndarray]]:
        """The network's tables f64[L, K] for the present code and for it without each position in ``leave_out``.

        Nothing is asked where everything is masked: that answer is known.
        """
        if not len(leave_out) and (self.z == MASK).all():
            return self.first, self.first[:0]
        z = np.repeat(self.z[None], 1 + len(leave_out), axis=0)
        z[1 + np.arange(len(leave_out)), leave_out] = MASK
        tables = yield z
        return tables[0], tables[1:]

    def propose(self, table: np.ndarray, positions: np.ndarray) -> Proposal:
        """Codes and confidences for masked ``positions``; draws this step's noise."""
        logits = self._logits(table, positions)
        own, temperature = softmax(logits), self.options.noise
        if self.bitset is not None:
            allowed = self.bitset.allowed_all(self.valid)[0, positions]
            logits = np.where(allowed, np.maximum(logits, LEAST), -np.inf)
        noise = temperature * gumbel(self.rng, logits.shape) if temperature else np.zeros_like(logits)
        return Proposal(positions, logits, noise, own)

    def _logits(self, table: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The network's logits f64[m, K] of ``positions``, after the end token's handicap."""
        logits = table[positions]
        if self.options.eos_logit_off and self.corpus.end is not None:
            logits = logits - self.options.eos_logit_off * self.corpus.end[positions]
        return logits

    def values(self, proposal: Proposal) -> np.ndarray:
        """By what ``order`` ranks the proposed positions, f64[m]; higher is committed earlier."""
        order = self.options.order
        if order == "left_to_right":
            return -proposal.positions.astype(np.float64)
        if order == "random":
            return self.rng.random(len(proposal.positions))
        values = {"confidence": confidence, "margin": margin, "entropy": negative_entropy}[order](proposal)
        if self.options.eos_conf == "last" and self.corpus.end is not None:
            ends = self.corpus.end[proposal.positions, proposal.codes]
            if not ends.all():
                values = np.where(ends, -np.inf, values)
        return values

    def commit(self, proposal: Proposal, ranking: np.ndarray) -> None:
        """Commit the proposed positions at ``ranking``, one after the other.

        Under a constraint each commit may rule out the next one's code: it chooses anew among what is left, so
        some document agrees with the code at any time.
        """
        for i in ranking:
            position, code = int(proposal.positions[i]), self._choose(proposal, i)
            if self.bitset is not None:
                self.valid = self.bitset.commit(self.valid, position, np.array([code]))
            self._set(position, code, float(proposal.own[i, code]))

    def _choose(self, proposal: Proposal, i: int) -> int:
        """The code for the i-th proposed position, given what has been committed since."""
        position, logits = int(proposal.positions[i]), proposal.logits[i]
        if self.bitset is not None:
            logits = np.where(self.bitset.allowed(self.valid, position)[0], logits, -np.inf)
        code = int((logits + proposal.noise[i]).argmax())
        if self.forbidden is not None:
            wrong = np.where(self.forbidden[position], -np.inf, logits)
            # Where only right codes are possible there is no error to force.
            code = code if np.isneginf(wrong).all() else int(wrong.argmax())
            self.forbidden = None
        return code

    def _set(self, position: int, code: int, conf: float) -> None:
        self.z[position], self.conf[position] = code, conf
        self._news.append((position, code, conf))

    def mask_again(self, positions: np.ndarray) -> None:
        """Mask committed ``positions`` again; what is possible follows from the codes that stay."""
        if not len(positions):
            return
        self.z[positions] = MASK
        if self.bitset is not None:
            self.valid = self.bitset.of_codes(self.z[None])

    def remeasure(self, positions: np.ndarray, tables: np.ndarray) -> None:
        """Confidence of committed ``positions`` i64[m] anew, each from its table f64[L, K] without that position."""
        for position, table in zip(positions, tables, strict=True):
            self.conf[position] = softmax(self._logits(table, np.array([position])))[0, self.z[position]]

    def forced(self) -> np.ndarray | None:
        """The one code i64[L] that is left, if one is; documents may share it."""
        if self.bitset is None:
            return None
        rows = self.bitset.documents(self.valid)[0]
        codes = self.bitset.columns[:, rows]
        code = codes[:, 0]
        return code if (codes == code[:, None]).all() else None

    def fill(self, positions: range, table: np.ndarray) -> None:
        """Fill what is masked where one code is left: no network call can change it.

        Its confidence is the network's in the step's ``table`` f64[L, K].
        """
        masked = self.masked(positions)
        code = self.forced() if len(masked) else None
        if code is None:
            return
        own = softmax(self._logits(table, masked))
        for row, position in enumerate(masked.tolist()):
            self._set(position, int(code[position]), float(own[row, code[position]]))

    def end_step(self, remasked: np.ndarray | Sequence[int] = ()) -> None:
        """Count the step and report it."""
        self.steps += 1
        if self.events is not None:
            left = len(self.corpus) if self.bitset is None else int(self.bitset.count(self.valid)[0])
            self.events.append(StepEvent(self.steps, self._news, [int(p) for p in remasked], left))
        self._news = []


def denoise(row: Row) -> Decoding[Row]:
    """Denoise block after block; the row, all its positions committed."""
    options, levels = row.options, row.corpus.levels
    runs = schedule.blocks(levels, options.block)
    steps = options.budget(levels) // len(runs)
    for run in runs:
        if options.remask == "low_conf":
            yield from _low_confidence(row, run, steps)
        elif options.remask == "remdm":
            yield from _remdm(row, run, steps)
        elif options.sampler == "ancestral":
            yield from _ancestral(row, run, steps)
        elif options.threshold is not None:
            yield from _threshold(row, run, options.threshold)
        else:
            yield from _scheduled(row, run, steps)
    return row


def _scheduled(row: Row, run: range, steps: int) -> Decoding[None]:
    """LLaDA: the k_s positions that rank highest; a committed code is never revised."""
    for count in schedule.commits(len(run), steps, row.options.schedule):
        masked = row.masked(run)
        if count and len(masked):
            yield from _commit_best(row, run, masked, count)


def _commit_best(row: Row, run: range, masked: np.ndarray, count: int) -> Decoding[None]:
    table, _ = yield from row.ask(masked[:0])
    proposal = row.propose(table, masked)
    row.commit(proposal, ranked(row.values(proposal))[:count])
    row.fill(run, table)
    row.end_step()


def _threshold(row: Row, run: range, threshold: float) -> Decoding[None]:
    """Fast-dLLM: every position at least this confident, and the best one where none is."""
    while len(masked := row.masked(run)):
        table, _ = yield from row.ask(masked[:0])
        proposal = row.propose(table, masked)
        values = row.values(proposal)
        ranking = ranked(values)
        # The end token waits (value -inf) however confident it is.
        sure = (proposal.conf >= threshold) & ~np.isneginf(values)
        row.commit(proposal, ranking[sure[ranking]] if sure.any() else ranking[:1])
        row.fill(run, table)
        row.end_step()


def _ancestral(row: Row, run: range, steps: int) -> Decoding[None]:
    """MDLM: a random set is revealed, each with its own code; an empty set costs no call."""
    for step in range(1, steps + 1):
        masked = row.masked(run)
        revealed = masked[row.rng.random(len(masked)) < schedule.ancestral_reveal(steps, step)]
        if not len(revealed):
            continue
        table, _ = yield from row.ask(revealed[:0])
        proposal = row.propose(table, revealed)
        row.commit(proposal, ranked(proposal.conf))
        row.fill(run, table)
        row.end_step()


def _low_confidence(row: Row, run: range, steps: int) -> Decoding[None]:
    """Commit everything, then mask the least confident again until m_s are left (ours, after MaskGIT)."""
    for step in range(1, steps + 1):
        masked, committed = row.masked(run), row.committed(run)
        if not len(masked):
            return
        measured = committed if row.options.remask_conf == "leave_one_out" else committed[:0]
        table, without = yield from row.ask(measured)
        row.remeasure(measured, without)
        proposal = row.propose(table, masked)
        row.commit(proposal, ranked(proposal.conf))
        positions = np.arange(run.start, run.stop)
        dropped = np.sort(positions[ranked(row.conf[positions])[schedule.kept(len(run), steps, step) :]])
        row.mask_again(dropped)
        row.end_step(dropped)


def _remdm(row: Row, run: range, steps: int) -> Decoding[None]:
    """ReMDM: masked positions are revealed and committed ones masked again, both at random."""
    for step in range(1, steps + 1):
        reveal, sigma = schedule.remdm_rates(steps, step, row.options.remask_cap)
        masked, committed = row.masked(run), row.committed(run)
        revealed = masked[row.rng.random(len(masked)) < reveal]
        draws = row.rng.random(len(committed))
        measured = committed if row.options.remask_conf == "leave_one_out" and sigma > 0 else committed[:0]
        proposal = None
        if len(revealed) or len(measured):
            table, without = yield from row.ask(measured)
            row.remeasure(measured, without)
            proposal = row.propose(table, revealed)
        # softmax(-conf) averages 1/|F|, so the factor |F| makes sigma the mean rate.
        share = softmax(-row.conf[None, committed])[0] if len(committed) else draws
        dropped = committed[draws < np.minimum(1.0, len(committed) * share * sigma)]
        if proposal is not None:
            row.commit(proposal, ranked(proposal.conf))
        row.mask_again(dropped)
        if proposal is not None or len(dropped):
            row.end_step(dropped)


def ranked(values: np.ndarray) -> np.ndarray:
    """Indices by descending value, ties by index."""
    return np.argsort(-values, kind="stable")


def confidence(proposal: Proposal) -> np.ndarray:
    """Probability of the chosen code, f64[m]."""
    return proposal.conf


def margin(proposal: Proposal) -> np.ndarray:
    """Probability of the best code minus that of the second, f64[m]."""
    if proposal.probs.shape[1] == 1:
        return proposal.probs[:, 0]
    best = np.partition(proposal.probs, -2, axis=1)
    return best[:, -1] - best[:, -2]


def negative_entropy(proposal: Proposal) -> np.ndarray:
    """Minus the entropy in nats, f64[m]."""
    probs = proposal.probs
    return (probs * np.log(np.where(probs > 0, probs, 1.0))).sum(1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax f64[m, K] of logits f64[m, K]; each row has a finite entry."""
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def gumbel(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Standard Gumbel noise in float64: in float32 its tail is cut and sampling sharpens (2409.02908)."""
    return rng.gumbel(size=shape)
