"""The weights of every shipped spec, as its header says, by the slow parts of `reference`.

A method that remembers is a class: made for the names of the domains, called with one batch after
the other.
"""

import itertools
import math
from fractions import Fraction

from reference import (
    by_domain,
    by_sequence,
    capped,
    domain_means,
    draws,
    each,
    flat,
    kept,
    mean_one,
    minus,
    normalized,
    placed,
    row_means,
    sequence_losses,
    softmax,
)

CAP = 2.0
TEMPERATURE = 0.4
TABLE = {"code": 1.0, "data": 0.5, "docs": 1.5, "tables": 0.5, "tests": 1.0}


def _times(batch, *factors):
    """Return the product of token weights, scaled to mean one."""
    return mean_one(
        each(batch, lambda row, column: math.prod(w[row][column] for w in factors)), batch.valid
    )


# Sequences, by their loss alone -------------------------------------------------------------------


def _by_shape(batch, shape, temperature=TEMPERATURE):
    h = normalized(sequence_losses(batch))
    weights = softmax([None if x is None else shape(x) for x in h], temperature)
    return by_sequence(batch, capped(weights, CAP))


def _linupper(batch, temperature):
    return _by_shape(batch, lambda h: min(h + 1, 1), temperature)


def _linupper_sequences(batch):
    """Return LinUpper's weight of each row, which has mean one over rows, not over tokens."""
    h = normalized(sequence_losses(batch))
    scores = [None if x is None else min(x + 1, 1) for x in h]
    return capped(softmax(scores, TEMPERATURE), CAP)


def linupper(batch):
    """W = softmax(min(h + 1, 1) / r), w <= 2/n."""
    return _linupper(batch, TEMPERATURE)


def linupper_1p4b(batch):
    """As LinUpper, r = 100 before step 2,000 and 1 from there."""
    return _linupper(batch, 100 if batch.step < 2000 else 1)


def linupper_7b(batch):
    """As LinUpper, r = 100 before step 2,000 and 2 from there."""
    return _linupper(batch, 100 if batch.step < 2000 else 2)


def quadratic(batch):
    """W = softmax((1 - h^2) / r), w <= 2/n."""
    return _by_shape(batch, lambda h: 1 - h * h)


def extremes(batch):
    """W = softmax(|h| / r), w <= 2/n."""
    return _by_shape(batch, abs)


def after_burn_in(method):
    """Return a method that weighs all alike before step 1,001."""
    return lambda batch: method(batch) if batch.step > 1000 else drawn_plainly(batch)


def upper(batch):
    """W = softmax((h + 1) / 2 / r), w <= 2/n."""
    return _by_shape(batch, lambda h: (h + 1) / 2)


def prop1(batch):
    """W = min(2/n, s exp(h / r)) with the s that makes the sum one."""
    return _by_shape(batch, lambda h: h)


def dro_kl(batch):
    """W = softmax(l / lambda), lambda = 1."""
    return by_sequence(batch, softmax(sequence_losses(batch), 1.0))


def term(batch):
    """W = softmax(t l), t = 2."""
    doubled = [None if x is None else 2 * x for x in sequence_losses(batch)]
    return by_sequence(batch, softmax(doubled, 1.0))


def rgd(batch):
    """W = exp(min(l, tau) / (tau + 1)), tau = 2, not normalised."""
    means = sequence_losses(batch)
    return each(batch, lambda row, _: math.exp(min(means[row], 2) / 3))


def irdro_rank(batch):
    """W = 8 for the fourth eighth of the sequences by loss, the highest first, else 0."""
    return _kept_sequences(batch, batch.loss, Fraction(1, 8), skip=3)


def rho_loss(batch):
    """W = 10 for the tenth of the sequences with the highest mean of l - ref_loss, else 0."""
    return _kept_sequences(batch, minus(batch.loss, batch.ref_loss), Fraction(1, 10))


def _kept_sequences(batch, values, keep, skip=0):
    means = row_means(batch, values)
    following = iter(kept([x for x in means if x is not None], keep, skip))
    return by_sequence(batch, [None if x is None else next(following) for x in means])


# Tokens -------------------------------------------------------------------------------------------


def uniform(batch):
    """w_t = 1."""
    return each(batch, lambda _row, _column: 1.0)


def focal(batch):
    """w_t = (1 - p_t) / mean_t (1 - p_t)."""
    return mean_one([[-math.expm1(-x) for x in row] for row in batch.loss], batch.valid)


def mile(batch):
    """w_t = (1 + H_t) / mean_t (1 + H_t)."""
    return mean_one([[1 + h for h in row] for row in batch.entropy], batch.valid)


def dft(batch):
    """w_t = p_t, not normalised."""
    return each(batch, lambda row, column: batch.target_prob[row][column])


def beyond_ll(batch):
    """w_t = p_t^q, q = 0.5, not normalised."""
    return each(batch, lambda row, column: math.sqrt(batch.target_prob[row][column]))


def eaft(batch):
    """w_t = H_20 / 3, not normalised."""
    return each(batch, lambda row, column: batch.columns["topk_entropy_20"][row][column] / 3)


def longce(batch):
    """w_t = min(exp(short_loss_t - loss_t), 5), not normalised."""
    gain = minus(batch.columns["short_loss_4096"], batch.loss)
    return each(batch, lambda row, column: min(math.exp(gain[row][column]), 5))


def inverse_frequency(batch):
    """w_t = 1 / max(c_t, 1), c_t how often the label is one."""
    counts = batch.columns["label_count"]
    return mean_one([[1 / max(c, 1) for c in row] for row in counts], batch.valid)


def class_balanced(batch):
    """w_t = (1 - beta) / (1 - beta^c_t), beta = 0.9999, c_t at least 1."""
    counts = batch.columns["label_count"]

    def balanced(count):
        return (1 - 0.9999) / (1 - 0.9999**count)

    return mean_one([[balanced(max(c, 1)) for c in row] for row in counts], batch.valid)


def token_cleaning(batch):
    """w_t = 1 / 0.6 where base - better is among the highest 60 % of the batch, else 0."""
    gain = minus(batch.columns["ref_loss_base"], batch.columns["ref_loss_better"])
    return placed(batch, kept(flat(batch, gain), Fraction(6, 10)))


def talr(batch):
    """W = softmax(-l / median l) over the tokens of the batch."""
    losses = flat(batch, batch.loss)
    there = sorted(losses)
    median = max(there[(len(there) - 1) // 2], 1e-30) if there else 1
    return placed(batch, softmax([-x for x in losses], median))


def unlearning(batch):
    """w_t = keep of its document, not normalised."""
    return each(batch, lambda row, column: batch.columns["keep"][row][column])


def npo(batch):
    """w_t = keep_t, times 2 / (1 + exp(0.1 (L - R))) in rows whose mean keep is below 0."""
    keep = batch.columns["keep"]
    gaps, means = row_means(batch, minus(batch.loss, batch.ref_loss)), row_means(batch, keep)

    def weight(row, column):
        if means[row] >= 0:
            return keep[row][column]
        summed = gaps[row] * sum(batch.valid[row])
        return keep[row][column] * 2 * math.exp(-math.log1p(math.exp(0.1 * summed)))

    return each(batch, weight)


def critical_tokens(batch):
    """w_t = the column `weight`, from 0 to 1."""
    return each(batch, lambda row, column: min(max(batch.columns["weight"][row][column], 0), 1))


def iwsi_column(batch):
    """w_s = min(max(weight_s, 0), 2), not normalised."""
    return each(batch, lambda row, column: min(max(batch.columns["weight"][row][column], 0), 2))


def ukpl(batch):
    """W = 0.75 + 0.25 v, v_t = |loss_t - short_loss_t| scaled to mean one in each sequence."""
    change = minus(batch.loss, batch.columns["short_loss_1024"])
    rows = [
        mean_one([[abs(x) for x in row]], [oks])[0]
        for row, oks in zip(change, batch.valid, strict=True)
    ]
    mixed = each(batch, lambda row, column: 0.75 + 0.25 * rows[row][column])
    return mean_one(mixed, batch.valid)


def cvar(batch):
    """w_t = 10 where l_t is among the highest 10 % of the batch, else 0."""
    return placed(batch, kept(flat(batch, batch.loss), Fraction(1, 10)))


def rho_1(batch):
    """w_t = 1 / 0.6 where loss - ref_loss is among the highest 60 % of the batch, else 0."""
    excess = minus(batch.loss, batch.ref_loss)
    return placed(batch, kept(flat(batch, excess), Fraction(6, 10)))


def sstoken(batch):
    """w_t = n / k where ref_loss - loss is among the highest 60 % of its sequence, else 0."""
    weights = []
    for row, oks in zip(minus(batch.ref_loss, batch.loss), batch.valid, strict=True):
        weights += kept([x for x, ok in zip(row, oks, strict=True) if ok], Fraction(6, 10))
    return placed(batch, weights)


def eslm(batch):
    """w_t = 1 where H_t is among the highest 90 % of the batch, else 0; mean one."""
    weights = kept(flat(batch, batch.entropy), Fraction(9, 10))
    return mean_one(placed(batch, weights), batch.valid)


def error_norm(batch):
    """w_t = 1 where |p - y|_2 is among the lowest 90 % of the batch, else 0; not normalised."""
    lowest = kept([-x for x in flat(batch, batch.error_norm)], Fraction(9, 10))
    return placed(batch, [1.0 if w else 0.0 for w in lowest])


# Several levels -----------------------------------------------------------------------------------


def linupper_x_mile(batch):
    """u_t = w_s v_t / mean_t (w_s v_t), w of LinUpper and v of MiLe."""
    w = _linupper_sequences(batch)
    return _times(batch, each(batch, lambda row, _: w[row]), mile(batch))


def table_x_linupper(batch):
    """u_t = a_d w_s / mean_t (a_d w_s), a of the table and w of LinUpper."""
    w = _linupper_sequences(batch)
    entries = each(batch, lambda row, column: TABLE[batch.domain[row][column]])
    return _times(batch, each(batch, lambda row, _: w[row]), entries)


def drawn_linupper(batch):
    """u_t = w_s / mean_t w_s, w of LinUpper; the table says what is drawn."""
    return mean_one(_linupper(batch, TEMPERATURE), batch.valid)


def drawn_plainly(batch):
    """u_t = 1; the weights say what is drawn."""
    return mean_one(each(batch, lambda _row, _column: 1.0), batch.valid)


def term_hierarchical(batch):
    """u_t = v_t w_d, v = softmax(-2 l) in d, w = softmax(10 L), L = -log(mean(exp(-2 l))) / 2."""
    losses = by_domain(batch, batch.loss)
    tilted = {
        d: math.log(math.fsum(math.exp(-2 * x) for x in xs) / len(xs)) / -2
        for d, xs in losses.items()
    }
    across = dict(zip(tilted, softmax(list(tilted.values()), 1 / 10), strict=True))
    within = {d: iter(softmax([-x for x in xs], 1 / 2)) for d, xs in losses.items()}
    names = flat(batch, batch.domain)
    return mean_one(placed(batch, [across[d] * next(within[d]) for d in names]), batch.valid)


# What remembers -----------------------------------------------------------------------------------


class ABSGD:
    """W = exp(l / lambda) / u, u <- 0.9 u + 0.1 mean(exp(l / lambda)), lambda = 1."""

    def __init__(self, domains):
        """Wait for the first batch that has a sequence, which sets u."""
        del domains
        self.u = None

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        powers = [None if x is None else math.exp(x) for x in sequence_losses(batch)]
        there = [p for p in powers if p is not None]
        if there:
            mean = math.fsum(there) / len(there)
            self.u = mean if self.u is None else 0.9 * self.u + 0.1 * mean
        return each(batch, lambda row, _: powers[row] / self.u)


class DomainWeights:
    """A <- a exp(step_size x) / Z, a <- (1 - c) a + c / K, from a = 1 / K."""

    def __init__(self, domains, step_size, smoothing, *, remembers):
        """Begin with equal weights; with `remembers` absent domains count with their last x."""
        self.a = dict.fromkeys(domains, 1 / len(domains))
        self.x = dict.fromkeys(domains, 0.0)
        self.past = [self.a]
        self.step_size, self.smoothing, self.remembers = step_size, smoothing, remembers

    def move(self, scores):
        """Take one step by the scores of the domains that are present."""
        before = self.x if self.remembers else dict.fromkeys(self.x, 0.0)
        self.x = {**before, **scores}
        raised = {d: a * math.exp(self.step_size * self.x[d]) for d, a in self.a.items()}
        z, c = math.fsum(raised.values()), self.smoothing
        self.a = {d: (1 - c) * r / z + c / len(raised) for d, r in raised.items()}
        self.past.append(self.a)

    @property
    def average(self):
        """The mean of a over all batches and the beginning."""
        return {d: math.fsum(a[d] for a in self.past) / len(self.past) for d in self.a}


class DoReMi(DomainWeights):
    """u_t = a_d / mean_t a_d, x_d the mean over tokens of max(loss - ref_loss, 0)."""

    def __init__(self, domains):
        """Begin with equal weights."""
        super().__init__(domains, step_size=1, smoothing=1e-3, remembers=True)

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        excess = minus(batch.loss, batch.ref_loss)
        self.move(domain_means(batch, [[max(x, 0) for x in row] for row in excess]))
        return mean_one(each(batch, lambda r, c: self.a[batch.domain[r][c]]), batch.valid)


class DoReMiClipByDomain(DomainWeights):
    """The loss is sum_d a_d L_d, x_d = max(mean of (loss - ref_loss), 0), steps of 0.1."""

    def __init__(self, domains):
        """Begin with equal weights; absent domains count with their last x."""
        super().__init__(domains, step_size=0.1, smoothing=0, remembers=True)

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        lag = domain_means(batch, minus(batch.loss, batch.ref_loss))
        self.move({d: max(x, 0) for d, x in lag.items()})
        sizes = {d: len(xs) for d, xs in by_domain(batch, batch.loss).items()}

        def share(row, column):
            d = batch.domain[row][column]
            return self.a[d] / sizes[d]

        return mean_one(each(batch, share), batch.valid)


class DoReMiLinUpperMiLe(DoReMi):
    """u_t = a_d w_s v_t / mean_t (a_d w_s v_t), of DoReMi, LinUpper and MiLe."""

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        return _times(batch, super().__call__(batch), linupper_x_mile(batch))


class GroupDRO(DomainWeights):
    """The loss is sum_d q_d L_d, q <- q exp(0.01 L_d) / Z, L_d the mean loss of a domain."""

    def __init__(self, domains):
        """Begin with equal weights; absent domains keep theirs, up to Z."""
        super().__init__(domains, step_size=0.01, smoothing=0, remembers=False)

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        self.move(domain_means(batch, batch.loss))
        sizes = {d: len(xs) for d, xs in by_domain(batch, batch.loss).items()}

        def share(row, column):
            d = batch.domain[row][column]
            return self.a[d] / sizes[d]

        return mean_one(each(batch, share), batch.valid)


class ToReMi:
    """Every 100 batches w_d <- w_d (1 + gap_d), later w_d (1 - gap_d), 0.1 <= w_d <= 5.

    At first the weights of topics below the mean stay, as the title says.
    """

    def __init__(self, domains):
        """Begin with weights of one."""
        self.w = dict.fromkeys(domains, 1.0)
        self.batches = 0
        self.seen = {d: [] for d in domains}

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        self.batches += 1
        for d, loss in domain_means(batch, batch.loss).items():
            self.seen[d].append(loss)
        if self.batches % 100 == 0:
            self.move(batch.step)
        return each(batch, lambda row, column: self.w[batch.domain[row][column]])

    def move(self, step):
        """Change the weights by the losses since the last move."""
        everything = [x for losses in self.seen.values() for x in losses]
        for d, losses in self.seen.items():
            if losses:
                mean = math.fsum(everything) / len(everything)
                gap = (math.fsum(losses) / len(losses) - mean) / mean
                gain = 1 + max(gap, 0) if step < 7001 else 1 - gap
                self.w[d] = min(max(self.w[d] * gain, 0.1), 5)
        self.seen = {d: [] for d in self.seen}


class ToReMiTopics:
    """w_t = mean of v_k over the topics of t; v_k moves every 100 batches as in ToReMi."""

    def __init__(self, domains):
        """Begin with weights of one."""
        del domains
        self.v = [1.0] * 8
        self.batches = 0
        self.seen = [[] for _ in self.v]

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        self.batches += 1
        for row, oks in enumerate(batch.valid):
            for column, ok in enumerate(oks):
                for k in self.topics(batch, row, column) if ok else ():
                    self.seen[k].append(batch.loss[row][column])
        if self.batches % 100 == 0:
            self.move(batch.step)
        return each(batch, lambda row, column: self.weight(self.topics(batch, row, column)))

    def topics(self, batch, row, column):
        """Return the numbers of the bits of the token's column."""
        bits = int(batch.columns["topics"][row][column])
        return [k for k in range(8) if bits & 2**k]

    def weight(self, topics):
        """Return the mean weight of some topics, 0 of none."""
        return math.fsum(self.v[k] for k in topics) / len(topics) if topics else 0.0

    def move(self, step):
        """Change the weights by the losses since the last move."""
        everything = [x for losses in self.seen for x in losses]
        for k, losses in enumerate(self.seen):
            if losses:
                mean = math.fsum(everything) / len(everything)
                gap = (math.fsum(losses) / len(losses) - mean) / mean
                gain = 1 + max(gap, 0) if step < 7001 else 1 - gap
                self.v[k] = min(max(self.v[k] * gain, 0.1), 5)
        self.seen = [[] for _ in self.v]


class LoshchilovHutter:
    """w_s ~ 100^(share of sequences whose latest known loss is lower), that of its examples."""

    def __init__(self, domains):
        """Know of no example."""
        del domains
        self.latest, self.tied = {}, False

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        found = {}
        for row, oks in enumerate(batch.valid):
            for column, ok in enumerate(oks):
                if ok:
                    example = int(batch.columns["example"][row][column])
                    found.setdefault(example, []).append(batch.loss[row][column])
        means = {example: math.fsum(x) / len(x) for example, x in found.items()}
        known = {**means, **self.latest}
        scores = each(batch, lambda row, column: self.score(batch, known, row, column))
        self.latest |= means
        losses = row_means(batch, scores)
        there = sorted(x for x in losses if x is not None)
        gaps = [b - a for a, b in itertools.pairwise(there)]
        self.tied = any(gap < 1e-5 for gap in gaps)
        shares = [None if x is None else sum(y < x for y in there) / len(there) for x in losses]
        return mean_one(by_sequence(batch, softmax(shares, 1 / math.log(100))), batch.valid)

    def score(self, batch, known, row, column):
        """Return what is known of a token's example."""
        ok = batch.valid[row][column]
        return known[int(batch.columns["example"][row][column])] if ok else 0.0


class SelectiveBackprop:
    """w_s = 1 with probability (#{h : h < l_s} / |h|)^3, else 0, scaled to mean one."""

    def __init__(self, domains):
        """Begin without a history."""
        del domains
        self.history, self.batches = [], 0

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        self.batches += 1
        losses = sequence_losses(batch)
        self.history = ([x for x in losses if x is not None] + self.history)[:1024]
        weights = []
        lots = iter(draws(0, self.batches, len(losses)))  # one for each sequence with a label
        for x in losses:
            lower = sum(h < x for h in self.history) if x is not None else 0
            kept = x is not None and next(lots) < (lower / len(self.history)) ** 3
            weights.append(1.0 if kept else 0.0)
        return mean_one(each(batch, lambda row, _: weights[row]), batch.valid, of_nothing=0.0)


class Importance:
    """w_s = times drawn / (k p_s), p_s = g_s / sum g; g = 1 while the sample size is high."""

    def __init__(self, domains):
        """Begin with an effective sample size of one: equal norms."""
        del domains
        self.ess, self.batches = 1.0, 0

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        self.batches += 1
        g = row_means(batch, batch.error_norm)
        there = [x for x in g if x is not None]
        n, squares = len(there), math.fsum(x * x for x in there)
        if not n:
            return each(batch, lambda _row, _column: 0.0)
        self.ess = 0.9 * self.ess + 0.1 * (math.fsum(there) ** 2 / (n * squares) if squares else 1)
        if self.ess >= 0.25:
            g = [None if x is None else 1.0 for x in g]
        total = math.fsum(x for x in g if x is not None)
        p = [0.0 if x is None else x / total if total else 1 / n for x in g]
        k = max(1, math.floor(Fraction(1, 3) * n))
        times = [0] * len(p)
        for draw in draws(0, self.batches, len(p))[:k]:
            times[next(i for i in range(len(p)) if math.fsum(p[: i + 1]) > draw)] += 1
        return by_sequence(
            batch, [c / (k * x) if c else 0.0 for c, x in zip(times, p, strict=True)]
        )


def ohem(batch):
    """w_s = 4 for the quarter of the sequences with the highest loss, else 0."""
    return _kept_sequences(batch, batch.loss, Fraction(1, 4))


def self_paced(batch):
    """w_s = 1 for the lowest half of the sequences by loss, of more later, else 0."""
    share = 0.5 + 0.5 * min(batch.step, 10000) / 10000
    there = sorted(x for x in sequence_losses(batch) if x is not None)
    return _up_to(batch, sequence_losses(batch), there, share)


def _up_to(batch, scores, ordered, share):
    """Return 1 for sequences up to the given share of some ordered scores, at least one, else 0."""
    at = ordered[max(1, math.floor(share * len(ordered) + 1e-9)) - 1] if ordered else 0
    return each(batch, lambda row, _: 1.0 if scores[row] <= at else 0.0)


def gce(batch):
    """w_t = p_t^0.7, not normalised."""
    return each(batch, lambda row, column: batch.target_prob[row][column] ** 0.7)


def sce(batch):
    """w_t = 0.1 + 4 p_t, not normalised."""
    return each(batch, lambda row, column: 0.1 + 4 * batch.target_prob[row][column])


def iw_sft(batch):
    """w_s = min(exp(sum (ref_loss - loss)), 2), not normalised."""
    gains = [
        math.fsum(x for x, ok in zip(row, oks, strict=True) if ok)
        for row, oks in zip(minus(batch.ref_loss, batch.loss), batch.valid, strict=True)
    ]
    return each(batch, lambda row, _: math.exp(min(gains[row], math.log(2))))


def psft(batch):
    """w_t = r_t where r_t <= 1.2, else 0;  r_t = exp(ref_loss_t - loss_t)."""
    gain = minus(batch.ref_loss, batch.loss)
    return each(
        batch, lambda row, column: math.exp(g) if (g := gain[row][column]) <= math.log(1.2) else 0.0
    )


def profit(batch):
    """w_t = 1 where p_t >= 0.1, else 0."""
    return each(batch, lambda row, column: float(batch.target_prob[row][column] >= 0.1))


def flow(batch):
    """W = softmax(-f / median f), f the mean reference loss of a sequence."""
    f = row_means(batch, batch.ref_loss)
    there = sorted(x for x in f if x is not None)
    median = max(there[(len(there) - 1) // 2], 1e-30) if there else 1
    return by_sequence(batch, softmax([None if x is None else -x for x in f], median))


def ifd(batch):
    """w_s = 10 for the tenth with the highest ratio of loss to ref_loss of those up to 1."""
    pairs = zip(sequence_losses(batch), row_means(batch, batch.ref_loss), strict=True)
    ratios = [None if x is None else x / max(y, 1e-12) for x, y in pairs]
    scores = [x if x is not None and x <= 1 else 0.0 for x in ratios]
    there = [x for x, ratio in zip(scores, ratios, strict=True) if ratio is not None]
    following = iter(kept(there, Fraction(1, 10)))
    return by_sequence(batch, [None if x is None else next(following) for x in ratios])


class LossTruncation:
    """w_s = 1 up to the lowest 60 % of the last 1,024 summed losses and the batch, else 0."""

    def __init__(self, domains):
        """Begin without a history."""
        del domains
        self.history = []

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        sums = [
            math.fsum(x for x, ok in zip(row, oks, strict=True) if ok) if any(oks) else None
            for row, oks in zip(batch.loss, batch.valid, strict=True)
        ]
        everything = [x for x in sums if x is not None] + self.history
        self.history = everything[:1024]
        return _up_to(batch, sums, sorted(everything), 0.6)


class InfoBatch:
    """w_s = 1 / q_s with probability q_s: 1 from the mean loss on, else 0.5."""

    def __init__(self, domains):
        """Count batches from 0."""
        del domains
        self.batches = 0

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        self.batches += 1
        losses = sequence_losses(batch)
        there = [x for x in losses if x is not None]
        lots = iter(draws(0, self.batches, len(losses)))
        weights = []
        for x in losses:
            if x is not None:
                chance = 1.0 if x >= math.fsum(there) / len(there) - 1e-6 else 0.5
                weights.append(1 / chance if next(lots) < chance else 0.0)
            else:
                weights.append(0.0)
        return each(batch, lambda row, _: weights[row])


class DWA:
    """The loss is sum_d a_d L_d, a = softmax(L_d(t - 1) / L_d(t - 2) / 2)."""

    def __init__(self, domains):
        """Begin without losses."""
        self.past = {d: [] for d in domains}

    def __call__(self, batch):
        """Return the token weights of the next batch."""
        means = domain_means(batch, batch.loss)
        for d, loss in means.items():
            self.past[d].append(loss)
        ratios = [self.ago(d, 1) / max(self.ago(d, 2), 1e-12) for d in means]
        a = dict(zip(means, softmax(ratios, 2), strict=True))
        sizes = {d: len(xs) for d, xs in by_domain(batch, batch.loss).items()}

        def share(row, column):
            d = batch.domain[row][column]
            return a[d] / sizes[d]

        return mean_one(each(batch, share), batch.valid)

    def ago(self, d, batches):
        """Return the loss of a domain some batches back, or the oldest."""
        return self.past[d][max(len(self.past[d]) - 1 - batches, 0)]


MEMORIES = {
    "absgd": ABSGD,
    "doremi-clip-by-domain": DoReMiClipByDomain,
    "doremi-proxy": DoReMi,
    "doremi-x-linupper-x-mile": DoReMiLinUpperMiLe,
    "dwa": DWA,
    "group-dro": GroupDRO,
    "importance": Importance,
    "infobatch": InfoBatch,
    "loss-truncation": LossTruncation,
    "loshchilov-hutter": LoshchilovHutter,
    "selective-backprop": SelectiveBackprop,
    "toremi": ToReMi,
    "toremi-topics": ToReMiTopics,
}
"""The methods that remember, to be made for the names of the domains."""

FORMULAS = {
    "ado": drawn_plainly,
    "beyond-ll": beyond_ll,
    "class-balanced": class_balanced,
    "critical-tokens": critical_tokens,
    "cvar": cvar,
    "dft": dft,
    "doge-proxy": drawn_plainly,
    "doge-table": drawn_plainly,
    "doge-table-x-linupper": after_burn_in(drawn_linupper),
    "doremi-table": drawn_plainly,
    "doremi-table-x-linupper": after_burn_in(drawn_linupper),
    "dro-kl": dro_kl,
    "dro-kl-gpt2": after_burn_in(dro_kl),
    "dynamic-loading": drawn_plainly,
    "eaft": eaft,
    "error-norm": error_norm,
    "eslm": eslm,
    "extremes": extremes,
    "extremes-gpt2": after_burn_in(extremes),
    "flow": flow,
    "focal": focal,
    "ifd": ifd,
    "gce": gce,
    "inverse-frequency": inverse_frequency,
    "irdro-rank": irdro_rank,
    "iw-sft": iw_sft,
    "iwsi-column": iwsi_column,
    "linupper": linupper,
    "linupper-1p4b": linupper_1p4b,
    "linupper-gpt2": after_burn_in(linupper),
    "linupper-7b": linupper_7b,
    "linupper-x-mile": linupper_x_mile,
    "longce": longce,
    "mile": mile,
    "npo": npo,
    "odm": drawn_plainly,
    "odm-validation": drawn_plainly,
    "profit": profit,
    "ohem": ohem,
    "prop1": prop1,
    "psft": psft,
    "quadratic": quadratic,
    "quadratic-gpt2": after_burn_in(quadratic),
    "rgd": rgd,
    "rho-1": rho_1,
    "rho-loss": rho_loss,
    "self-paced": self_paced,
    "sce": sce,
    "sstoken": sstoken,
    "talr": talr,
    "table-x-linupper": table_x_linupper,
    "term": term,
    "term-hierarchical": term_hierarchical,
    "ukpl": ukpl,
    "uniform": uniform,
    "uniform-domains": uniform,
    "token-cleaning": token_cleaning,
    "unlearning": unlearning,
    "upper": upper,
    "velocitune": drawn_plainly,
}
"""The methods that weigh every batch by itself."""


def reference(name, domains):
    """Return what weighs batch after batch as the header of a spec says."""
    return MEMORIES[name](domains) if name in MEMORIES else FORMULAS[name]
