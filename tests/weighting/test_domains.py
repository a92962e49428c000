"""Stages that weigh domains move as their papers say, and turn away from what cannot be learnt."""

import math
import random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name

import weighting as wt
from weighting.build.domains import average_weights, domain_weights, proportions, send_feedback

MOVES = 100
SIZES = [1, 2, 10]
"""Numbers of domains."""
CLOSE = 1e-6
"""How far weights in float32 may be from those in float64; 0.7e-6 was seen after 200 moves."""


# Slow rules, one float after the other, as the papers have them -----------------------------------


def softmax(logs):
    """Return exp(x) / sum exp(x)."""
    top = max(logs)
    powers = [math.exp(x - top) for x in logs]
    return [p / math.fsum(powers) for p in powers]


def mixed(weights, share):
    """Return (1 - share) a + share / K."""
    return [(1 - share) * a + share / len(weights) for a in weights]


def mean(values):
    """Return the mean of some numbers."""
    return math.fsum(values) / len(values)


class DoReMi:
    """log a += eta x, softmax, mixed; x of a domain that is away is its last, at first `unseen`."""

    def __init__(self, count, eta, share, unseen=0.0):
        """Begin with equal weights, which the average counts."""
        self.a = [1 / count] * count
        self.x = [unseen] * count
        self.eta, self.share = eta, share
        self.past = [self.a]

    def move(self, scores):
        """Take one step by the scores of the domains, None for one that is away."""
        self.x = [last if x is None else x for x, last in zip(scores, self.x, strict=True)]
        logs = [math.log(a) + self.eta * x for a, x in zip(self.a, self.x, strict=True)]
        self.a = mixed(softmax(logs), self.share)
        self.past.append(self.a)


class DoGE:
    """S = G G', s = lr (S 1) / (mean |g| + 1e-6), within [0, 5 lr]; log w += s / mu, softmax."""

    def __init__(self, count):
        """Begin with equal weights, which the average does not count."""
        self.a = [1 / count] * count
        self.past, self.alignments = [], []

    def move(self, gradients, rate, most, share):
        """Take one step by a gradient for each domain; `rate` is lr / mu."""
        alignment = [
            math.fsum(math.fsum(a * b for a, b in zip(g, h, strict=True)) for h in gradients)
            for g in gradients
        ]
        length = mean([math.sqrt(math.fsum(x * x for x in g)) for g in gradients])
        self.alignments.append([s / (length + 1e-6) for s in alignment])
        clipped = [min(max(s, 0), most) for s in self.alignments[-1]]
        logs = [math.log(a) + rate * s for a, s in zip(self.a, clipped, strict=True)]
        self.a = mixed(softmax(logs), share)
        self.past.append(self.a)


class DynamicLoading:
    """log a += loss - target, softmax, mixed with 1e-4; a loss of None is on target."""

    def __init__(self, count):
        """Begin with equal weights."""
        self.a = [1 / count] * count

    def move(self, losses, targets):
        """Take one step by the validation losses."""
        gaps = [0.0 if x is None else x - t for x, t in zip(losses, targets, strict=True)]
        logs = [math.log(a) + gap for a, gap in zip(self.a, gaps, strict=True)]
        self.a = mixed(softmax(logs), 1e-4)


class Bandit:
    """EXP3: R += reward x / a where drawn, a = (1 - K e_t) softmax(e_{t-1} R) + e_t."""

    def __init__(self, count):
        """Begin with equal weights and no reward."""
        self.a = [1 / count] * count
        self.rewards = [0.0] * count
        self.batches = 0

    def chance(self, batches):
        """Return e_t, the least weight of a domain after some batches: 1 / K at first."""
        count = len(self.a)
        if batches == 0:
            return 1 / count
        return min(1 / count, math.sqrt(math.log(count) / (count * batches)))

    def move(self, scores, reward):
        """Take one step by the mean losses of the domains, None for one that is away."""
        for d, x in enumerate(scores):
            if x is not None:
                self.rewards[d] += reward * x / self.a[d]
        before, now = self.chance(self.batches), self.chance(self.batches + 1)
        exploited = softmax([before * r for r in self.rewards])
        self.a = [(1 - len(self.a) * now) * p + now for p in exploited]
        self.batches += 1


# What moves them ----------------------------------------------------------------------------------


def built(text, count):
    """Return a spec, as arrow text or by its shipped name, built for a number of domains."""
    spec = wt.loads(text) if "(" in text or "->" in text else wt.load(text)
    return wt.build(spec, domains=[f"d{i}" for i in range(count)])


def told(fn, factor="pipeline"):
    """Return a factor's weights of the domains, sum one."""
    return domain_weights(fn)[factor].tolist()


def average(fn):
    """Return the average over the run of the only factor that keeps one, sum one."""
    (found,) = average_weights(fn).values()
    return found.tolist()


def close(expected):
    """Return what numbers must be near to, as absolute differences."""
    return pytest.approx(expected, rel=0, abs=CLOSE)


def averaged(past):
    """Return the mean of several weights, domain by domain."""
    return close([mean(a) for a in zip(*past, strict=True)])


def batches(count):
    """Yield the (domain, loss, reference loss, valid) of the tokens of batch after batch.

    Most hold some of the domains only, some hold no valid token at all.
    """
    rng, away, empty = random.Random(count), 0, 0
    for _ in range(MOVES):
        there = rng.sample(range(count), rng.randint(1, count))
        share = 0.0 if rng.random() < 0.05 else 0.8
        numbers = [(rng.uniform(0, 5), rng.uniform(0, 5)) for _ in range(4 * count)]
        tokens = [(rng.choice(there), *pair, rng.random() < share) for pair in numbers]
        away += len({t[0] for t in tokens if t[3]}) < count
        empty += not any(t[3] for t in tokens)
        yield tokens
    assert away > empty > 0 or count == 1


def signals_of(tokens):
    """Return tokens as signals of one row."""
    domain, loss, ref_loss, valid = (torch.tensor([x]) for x in zip(*tokens, strict=True))
    return wt.Signals(loss=loss, ref_loss=ref_loss, domain_ids=domain, valid=valid)


def domain_means(tokens, count, value):
    """Return the mean of `value(loss, reference)` over the valid tokens of each domain, or None."""
    found = [[value(t[1], t[2]) for t in tokens if t[0] == d and t[3]] for d in range(count)]
    return [mean(xs) if xs else None for xs in found]


@pytest.mark.parametrize(("count", "unseen"), [(1, 10.8), (2, 10.8), (10, 0), (10, 10.8)])
def test_doremi_follows_its_formula(count, unseen):
    """Excess is clipped token by token; a domain away counts as last seen, or else as `unseen`."""
    fn = built(f"doremi(step_size=1, smoothing=1e-3, unseen={unseen})", count)
    rule = DoReMi(count, eta=1, share=1e-3, unseen=unseen)
    for step, tokens in enumerate(batches(count), 1):
        fn(signals_of(tokens), step)
        rule.move(domain_means(tokens, count, lambda x, ref: max(x - ref, 0)))
        assert told(fn) == close(rule.a), step
    assert len(rule.past) == MOVES + 1
    assert average(fn) == averaged(rule.past)


@pytest.mark.parametrize("count", SIZES)
def test_doremi_clips_by_domain_when_asked(count):
    """The mean excess of a domain is clipped, and steps are of a tenth."""
    fn = built("doremi-clip-by-domain", count)
    rule, negative = DoReMi(count, eta=0.1, share=0), 0
    for step, tokens in enumerate(batches(count), 1):
        fn(signals_of(tokens), step)
        lag = domain_means(tokens, count, lambda x, ref: x - ref)
        rule.move([None if x is None else max(x, 0) for x in lag])
        negative += any(x is not None and x < 0 for x in lag)
        assert told(fn, "domain") == close(rule.a), step
    assert negative > 20
    assert average(fn) == averaged(rule.past)  # ours counts the beginning in this variant too


@pytest.mark.parametrize("count", SIZES)
def test_bandit_follows_its_formula(count):
    """What is in the batch is rewarded, more where it is rarely drawn; chance fades."""
    fn = built("mean(domain) -> bandit", count)
    rule = Bandit(count)
    for step, tokens in enumerate(batches(count), 1):
        fn(signals_of(tokens), step)
        rule.move(domain_means(tokens, count, lambda x, _: x), reward=0.1)
        assert told(fn) == close(rule.a), step


def gradients(count):
    """Yield a gradient for each domain, move after move: of all sizes, some of them zero."""
    rng = random.Random(count)
    for _ in range(MOVES):
        sizes = [rng.choice([0.0, 10 ** rng.uniform(-3, 1)]) for _ in range(count)]
        yield [[size * rng.gauss(0, 1) for _ in range(6)] for size in sizes]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize(
    ("text", "rate", "share"),
    [
        ("doge-proxy", lambda _: 0.05, 0.0),
        (
            "doge(step_size=linear(0.05, 0.01, over=100), smoothing=0.02)",
            lambda step: 0.05 - 0.04 * min(step / 100, 1),
            0.02,
        ),
    ],
    ids=["shipped", "with a schedule"],
)
def test_doge_follows_its_formula(count, text, rate, share):
    """Alignment with all gradients, the own one too, over their mean length, from 0 to 5."""
    fn = built(text, count)
    rule = DoGE(count)
    assert average(fn) == close(rule.a)  # until it moves there is nothing else to export
    for step, found in enumerate(gradients(count), 1):
        g = torch.tensor(found, dtype=torch.float64)
        send_feedback(fn, "gradients", g @ g.T, step)
        rule.move(found, rate(step), 5, share)
        assert told(fn) == close(rule.a), step
    assert len(rule.past) == MOVES
    assert average(fn) == averaged(rule.past)
    clipped = [x for xs in rule.alignments for x in xs]
    assert min(clipped) < 0 or count == 1
    assert max(clipped) > 5
    assert 0 in clipped


@pytest.mark.parametrize(
    ("count", "targets"), [(n, k) for n in SIZES for k in (1, 2) if n > k], ids=str
)
def test_doge_with_targets_follows_its_formula(count, targets):
    """Alignment with the targets alone; they weigh nothing, and lengths are those of the others."""
    names = [f"d{i}" for i in reversed(range(count - targets, count))]
    written = names[0] if targets == 1 else f"[{', '.join(names)}]"
    fn = built(f"doge(0.05, smoothing=0.02, target={written})", count)
    a = [1 / (count - targets)] * (count - targets)
    assert told(fn) == close([*a, *[0] * targets])
    past = []
    for step, found in enumerate(gradients(count), 1):
        g = torch.tensor(found, dtype=torch.float64)
        send_feedback(fn, "gradients", g @ g.T, step)
        others, aims = found[:-targets], found[-targets:]
        length = mean([math.sqrt(sum(x * x for x in one)) for one in others]) + 1e-6
        along = [
            math.fsum(x * y for aim in aims for x, y in zip(one, aim, strict=True))
            for one in others
        ]
        helps = [min(max(x / length, 0), 5) for x in along]
        raised = [x * math.exp(0.05 * y) for x, y in zip(a, helps, strict=True)]
        a = [0.98 * x / sum(raised) + 0.02 / len(a) for x in raised]
        past.append([*a, *[0] * targets])
        assert told(fn) == close(past[-1]), step
    assert average(fn) == averaged(past)
    assert len(a) == 1 or max(a) - min(a) > 1e-3


def test_a_target_of_doge_is_a_domain_beside_others():
    """A name that is none is told with the nearest."""
    with pytest.raises(wt.SpecError, match="the data has no domain 'wikj'; did you mean 'wiki'"):
        wt.build(wt.loads("doge(target=wikj)"), domains=["web", "wiki"])
    for targets, domains in {"wiki": ["wiki"], "[web, wiki]": ["wiki", "web"]}.items():
        with pytest.raises(wt.SpecError, match="every domain is a target; add another"):
            wt.build(wt.loads(f"doge(target={targets})"), domains=domains)


def test_one_target_of_doge_is_a_list_of_one():
    """The spec is the same value with the same hash, in arrow text and YAML."""
    one = wt.loads("doge(target=wiki)")
    for text in ("doge(target=[wiki])", "version: 1\npipeline: [{doge: {target: [wiki]}}]\n"):
        assert wt.loads(text).hash == one.hash
    assert wt.dumps(one).endswith("pipeline: doge(target=wiki)\n")
    two = wt.loads('doge(0.5, target=[wiki, "my books"])')
    assert wt.dumps(two).endswith('pipeline: doge(step_size=0.5, target=[wiki, "my books"])\n')
    assert wt.loads(wt.dumps(two)) == wt.loads(wt.dumps(two, "yaml")) == two


def test_doge_outlives_a_gradient_that_is_not_finite():
    """Such a move leaves the weights, and the next one is as if it had not been."""
    fn, calm = built("doge-proxy", 2), built("doge-proxy", 2)
    good = torch.tensor([[4.0, 1.0], [1.0, 0.5]])
    for bad in (torch.nan, torch.inf):
        send_feedback(fn, "gradients", torch.tensor([[bad, 1.0], [1.0, 0.5]]))
    assert told(fn) == close([0.5, 0.5])
    for one in (fn, calm):
        send_feedback(one, "gradients", good)
    assert told(fn) == close(told(calm))
    assert told(fn)[0] > 0.5


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("drop", [0, 0.5], ids=["fixed targets", "targets that fall"])
def test_dynamic_loading_follows_its_formula(count, drop):
    """A domain behind its target rises, one ahead falls, one without validation text stays."""
    firsts = [2 + d / 8 for d in range(count)]
    entries = (f"d{d}=step({x}, {x - drop}, at={MOVES // 2})" for d, x in enumerate(firsts))
    fn = built(f"dynamic_loading({', '.join(entries)})", count)
    rule, rng, away = DynamicLoading(count), random.Random(count), 0
    for step in range(1, MOVES + 1):
        targets = [x - drop * (step >= MOVES // 2) for x in firsts]
        # Numbers that float32 holds exactly: only what the stage does with them is measured.
        gaps = [rng.randint(-256, 256) / 256 for _ in targets]
        losses = [None if rng.random() < 0.2 else sum(x) for x in zip(targets, gaps, strict=True)]
        news = torch.tensor([math.nan if x is None else x for x in losses])
        send_feedback(fn, "validation", news, step)
        rule.move(losses, targets)
        away += None in losses
        assert told(fn) == close(rule.a), step
    assert away > MOVES / 20


@pytest.mark.parametrize("count", SIZES)
def test_the_validation_bandit_is_the_bandit_over_validations(count):
    """EXP3 with a validation as a round, stopped or not; without text a reward stays as it is."""
    fn = built("validation_bandit(reward=0.3)", count)
    rule, rng, away = Bandit(count), random.Random(count), 0
    for step in range(1, MOVES + 1):
        losses = [None if rng.random() < 0.2 else rng.randint(0, 512) / 128 for _ in range(count)]
        news = torch.tensor([math.nan if x is None else x for x in losses])
        send_feedback(fn, "validation", news, step)
        rule.move(losses, 0.3)
        away += None in losses
        if step == MOVES // 2:
            state, fn = fn.state_dict(), built("validation_bandit(reward=0.3)", count)
            fn.load_state_dict(state)
        assert told(fn) == close(rule.a), step
    assert away > MOVES / 20


@pytest.mark.parametrize("news", ["gradients", "validation"])
def test_feedback_changes_only_the_stages_that_listen_to_it(news):
    """A stage hears its own kind of news, and a batch moves none that lives by news."""
    text = {"gradients": "doge(step_size=0.5)", "validation": "dynamic_loading(d0=2, d1=2)"}
    x = {"gradients": torch.tensor([[4.0, 1.0], [1.0, 0.5]]), "validation": torch.tensor([3.0, 2])}
    for kind, pipeline in text.items():
        fn = built(pipeline, 2)
        assert fn.plan.listens_to == {kind}
        fn(signals_of([(0, 1.0, 1.0, True), (1, 4.0, 1.0, True)]), 1)
        send_feedback(fn, news, x[news], 1)
        moved = told(fn) != close([0.5, 0.5])
        assert moved == (kind == news)
        assert not moved or told(fn)[0] > 0.5


# Where the answer is known ------------------------------------------------------------------------

WORDS, ROWS, LENGTH = 16, 48, 16
SEEDS = range(3)


def two_of_many(rng):
    """Return a chain that follows each word by one of two: a loss of log 2 can be learnt."""
    likely = torch.rand(WORDS, WORDS, generator=rng).topk(2).indices
    return torch.zeros(WORDS, WORDS).scatter(1, likely, 0.5)


def anything(_rng):
    """Return a chain that follows each word by any: there is nothing to learn."""
    return torch.full((WORDS, WORDS), 1 / WORDS)


def two_and_noise(seed, rng):
    """Return two chains to learn, noise among them, and which is the noise."""
    noise, chains = seed % 3, [two_of_many(rng), two_of_many(rng)]
    chains.insert(noise, anything(rng))
    return torch.stack(chains), noise


def three_alike(rng):
    """Return one chain thrice, under the names of three domains."""
    return two_of_many(rng).expand(3, -1, -1)


class Model(torch.nn.Module):
    """The next word from this one and its domain: embeddings, a hidden layer, an output layer."""

    def __init__(self, width=64):
        """Begin with an output layer of zeros, which predicts every word alike."""
        super().__init__()
        self.words = torch.nn.Embedding(WORDS, width)
        self.domains = torch.nn.Embedding(3, width)
        self.hidden = torch.nn.Linear(width, width)
        self.out = torch.nn.Parameter(torch.zeros(WORDS, width))

    def forward(self, words, domains):
        """Return the input of the output layer."""
        return F.relu(self.hidden(self.words(words) + self.domains(domains)))


def drawn(chains, domains, rng):
    """Return a row of words of each of the domains, [R, LENGTH + 1], and the domain of each."""
    words = [torch.randint(WORDS, domains.shape, generator=rng)]
    for _ in range(LENGTH):
        words.append(torch.multinomial(chains[domains, words[-1]], 1, generator=rng)[:, 0])
    return torch.stack(words, 1), domains[:, None].expand(-1, LENGTH)


def doremi_finds(chains, rng):
    """Train by DoReMi, the reference being the truth; return weights at the end and averaged."""
    steps = 100
    floors = -(chains * chains.clamp(min=1e-9).log()).sum(-1).mean(-1)  # the entropy of a word
    fn, model = built("doremi-proxy", 3), Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(1, steps + 1):
        drawn_by = proportions(fn, step)
        fn.drawn.copy_(drawn_by)
        which = torch.multinomial(drawn_by, ROWS, replacement=True, generator=rng)
        words, ids = drawn(chains, which, rng)
        loss, _ = wt.linear_weighted_cross_entropy(
            model(words[:, :-1], ids),
            model.out,
            words[:, 1:],
            fn,
            step=step,
            domain_ids=ids,
            ref_loss=floors[ids],
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return told(fn, "domain"), average(fn)


def doge_finds(chains, rng):
    """Train by DoGE, a gradient for each domain; return weights at the end and averaged."""
    steps = 60  # then all is learnt, and what is left of the gradients is chance
    fn, model = built("doge-proxy", 3), Model()
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for step in range(1, steps + 1):
        found = []
        for domain in range(3):
            words, ids = drawn(chains, torch.full((ROWS // 3,), domain), rng)
            logits = F.linear(model(words[:, :-1], ids), model.out)
            loss = F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())
            gradient = torch.autograd.grad(loss, parameters)
            found.append(torch.cat([g.flatten() for g in gradient]))
        rows = torch.stack(found)
        send_feedback(fn, "gradients", rows @ rows.T, step)
        combined = domain_weights(fn, step)["pipeline"] @ rows
        sizes = [p.numel() for p in parameters]
        for parameter, g in zip(parameters, combined.split(sizes), strict=True):
            parameter.grad = g.view_as(parameter)
        optimizer.step()
    return told(fn), average(fn)


@pytest.mark.slow
@pytest.mark.parametrize("finds", [doremi_finds, doge_finds])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_noisy_domain_is_drawn_less(finds, seed):
    """Of two domains to learn and one of noise, the noise ends below a third, and is on average.

    Of 40 seeds the highest average was 0.17, and the highest end 0.005.
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    chains, noise = two_and_noise(seed, rng)
    final, over_time = finds(chains, rng)
    assert sum(final) == pytest.approx(1)
    assert over_time[noise] < 0.25
    assert final[noise] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("finds", [doremi_finds, doge_finds])
@pytest.mark.parametrize("seed", [0])
def test_domains_as_easy_as_each_other_are_drawn_alike(finds, seed):
    """Of three domains alike none ends where the noise does: each is near a third on average.

    Of 40 seeds all averages were between 0.20 and 0.49.
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    _, over_time = finds(three_alike(rng), rng)
    assert min(over_time) > 0.15
    assert max(over_time) < 0.55
