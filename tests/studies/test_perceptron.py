"""One binary neuron: each rule against an independent one of a few lines, and what theory knows."""

from itertools import product
from math import erf, exp, log, log2, pi, sqrt

import numpy as np
import pytest
import torch

from bnnlib.errors import InvalidValue
from bnnlib.runs.ledger import stored_table
from bnnlib.studies import perceptron
from bnnlib.studies.perceptron import (
    BATCH,
    GRID,
    HEBB_LIMIT,
    beliefs,
    bits_per_weight,
    draw_patterns,
    hebb,
    measure,
    measure_grid,
    most_bits,
    reinforced_bp,
    sbpi,
    train,
)


def solved(weights, x, y):
    return bool((y * (x @ weights) > 0).all())


def test_patterns_are_signs_that_a_seed_decides():
    x, y = draw_patterns(101, 400, 3)
    assert (x.shape, y.shape) == ((400, 101), (400,))
    assert set(x.unique().tolist()) == set(y.unique().tolist()) == {-1, 1}
    assert abs(x.mean()) < 4 / sqrt(x.numel())
    again, other = draw_patterns(101, 400, 3), draw_patterns(101, 400, 4)
    assert all(map(torch.equal, again, (x, y)))
    assert not torch.equal(x, other[0])


def test_bits_are_those_of_the_two_by_two_table():
    counts = {(1, 1): 30, (1, -1): 10, (-1, 1): 20, (-1, -1): 40}  # (predicted, label)
    pairs = torch.tensor([pair for pair, n in counts.items() for _ in range(n)]).float()
    predicted = {1: 40, -1: 60}  # and 50 of each label
    plug_in = sum(n / 100 * log2(n * 100 / (predicted[i] * 50)) for (i, _), n in counts.items())
    expected = 100 * plug_in - 1 / (2 * log(2))  # one degree of freedom
    assert bits_per_weight(torch.ones(1), pairs[:, :1], pairs[:, 1]) == pytest.approx(expected)


def test_clipped_hebb_stores_what_its_formula_says():
    def expected(load):
        q = (1 + erf(1 / sqrt(pi * load))) / 2  # Phi(sqrt(2 / (pi load)))
        return load * (1 + q * log2(q) + (1 - q) * log2(1 - q))

    def found(load, seeds):
        patterns = [draw_patterns(101, round(load * 101), seed) for seed in seeds]
        return np.mean([bits_per_weight(hebb(*p), *p) for p in patterns])

    assert pytest.approx(2 / (pi**2 * log(2))) == HEBB_LIMIT
    assert expected(1000) == pytest.approx(HEBB_LIMIT, rel=1e-3)
    assert found(1, range(200)) == pytest.approx(expected(1), abs=0.02)  # 3 standard errors
    assert found(30, range(100)) == pytest.approx(HEBB_LIMIT, abs=0.03)


def sbpi_by_hand(x, y, passes, seed, p_s, bound):
    """The rule for one weight at a time, in whole numbers, with the same draws."""
    x, y = x.int().tolist(), y.int().tolist()
    rng, n = np.random.default_rng([seed, len(x[0]), 1]), len(x[0])
    h = [-1 if u < 0.5 else 1 for u in rng.random(n)]
    seen = []

    def output(xi):
        return sum((1 if state > 0 else -1) * value for state, value in zip(h, xi, strict=True))

    def errors():
        return sum(label * output(xi) < 0 for xi, label in zip(x, y, strict=True))

    for _ in range(passes):
        seen.append((errors(), [1 if state > 0 else -1 for state in h]))
        if seen[-1][0] == 0:
            break
        for k in rng.permutation(len(x)):
            margin = y[k] * output(x[k])
            barely = margin == 1 and rng.random() < p_s
            for i in range(n):
                towards = y[k] * x[k][i]
                if margin < 0 or (barely and h[i] * towards >= 1):
                    h[i] = max(-bound, min(bound, h[i] + 2 * towards))
    seen.append((errors(), [1 if state > 0 else -1 for state in h]))
    return min(seen, key=lambda pair: pair[0])[1]


@pytest.mark.parametrize(("n", "patterns", "bound"), [(21, 15, 9), (31, 29, 3), (41, 60, 13)])
def test_sbpi_is_its_rule_step_by_step(n, patterns, bound):
    for seed in range(4):
        x, y = draw_patterns(n, patterns, seed)
        found = sbpi(x, y, 6, seed, p_s=0.5, bound=bound)
        assert found.int().tolist() == sbpi_by_hand(x, y, 6, seed, 0.5, bound)


def train_by_hand(x, y, steps, seed, binary):
    """The recipe in NumPy: gradients by hand, Adam by its paper, the same draws."""
    x, y = x.double().numpy(), y.double().numpy()
    generator, n = torch.Generator().manual_seed(seed), x.shape[1]
    start = 1 if binary else sqrt(6 / (n + 1))
    w = torch.empty(n).uniform_(-start, start, generator=generator).double().numpy()
    parameters = [w, np.array(1 / sqrt(n))]
    moments, order = [[0, 0], [0, 0]], []
    for t in range(1, steps + 1):
        if len(order) < min(BATCH, len(x)):
            order = torch.randperm(len(x), generator=generator).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        w, gain = parameters
        used = np.where(w >= 0, 1, -1) if binary else w
        sums = x[rows] @ used
        slope = -2 * np.maximum(0, 1 - y[rows] * gain * sums) * y[rows] / len(rows)
        rates = [sqrt((n + 1) / 1.5) if binary else 1, 1]
        for k, g in enumerate([gain * slope @ x[rows], slope @ sums]):
            m, v = 0.9 * moments[k][0] + 0.1 * g, 0.999 * moments[k][1] + 0.001 * g**2
            moments[k] = [m, v]
            rate = 1e-3 * (1 - (t - 1) / steps) * rates[k] * sqrt(1 - 0.999**t) / (1 - 0.9**t)
            parameters[k] = parameters[k] - rate * m / (np.sqrt(v) + 1e-8)
        if binary:
            parameters[0] = np.clip(parameters[0], -1, 1)
    return np.where(parameters[0] >= 0, 1, -1) if binary else parameters[0]


@pytest.mark.parametrize("binary", [True, False])
def test_training_is_the_recipe_in_numpy(binary):
    for patterns in (30, 70):
        x, y = draw_patterns(51, patterns, 5)
        found = train(x, y, 60, 5, binary=binary)
        np.testing.assert_allclose(found, train_by_hand(x, y, 60, 5, binary), atol=1e-4)


def test_neurons_that_are_trained_side_by_side_learn_their_own_labels():
    pairs = [draw_patterns(51, 40, seed) for seed in range(3)]
    x, y = (torch.stack(part) for part in zip(*pairs, strict=True))
    weights = train(x, y, 300, 0, binary=False, lr=1e-2)
    assert weights.shape == (3, 51)
    assert all(solved(w, *pair) for w, pair in zip(weights, pairs, strict=True))
    assert torch.equal(hebb(x, y)[1], hebb(*pairs[1]))


def settled(z, steps=100):
    """The means of the weights, where `beliefs` has come to rest."""
    field, pull = np.zeros(z.shape[1]), np.zeros(len(z))
    for _ in range(steps):
        new, pull = beliefs(z, field, pull)
        field = (field + new) / 2
    return np.tanh(field)


def test_beliefs_are_near_the_means_over_all_solutions():
    for seed in range(5):
        x, y = (part.numpy() for part in draw_patterns(9, 3, seed))
        every = np.array(list(product((-1, 1), repeat=9)))
        exact = every[(y * (every @ x.T) > 0).all(1)].mean(0)
        assert np.abs(settled(x * y[:, None]) - exact).max() < 0.12
        assert np.corrcoef(settled(x * y[:, None]), exact)[0, 1] > 0.97


def messages(z, steps=60):
    """Belief propagation, a message for each pattern and weight, in the Gaussian approximation."""
    z = z / sqrt(z.shape[1])
    patterns, n = z.shape
    to_weight = np.zeros((patterns, n))
    for _ in range(steps):
        field = to_weight.sum(0) - to_weight  # without the pattern that asks
        mean = np.tanh(field)
        for k in range(patterns):
            total, spread = z[k] @ mean[k], (1 - mean[k] ** 2) @ z[k] ** 2
            for i in range(n):
                centre = total - z[k, i] * mean[k, i]
                sd = sqrt(spread - (1 - mean[k, i] ** 2) * z[k, i] ** 2)
                q = centre / sd
                pull = exp(-(q**2) / 2) / sqrt(2 * pi) / ((1 + erf(q / sqrt(2))) / 2) / sd
                to_weight[k, i] = (to_weight[k, i] + z[k, i] * pull) / 2
    return np.tanh(to_weight.sum(0))


def test_beliefs_sum_up_the_messages_of_belief_propagation():
    x, y = (part.numpy().astype(float) for part in draw_patterns(101, 25, 0))
    found, expected = settled(x * y[:, None]), messages(x * y[:, None])
    assert np.abs(found - expected).max() < 0.03
    assert np.corrcoef(found, expected)[0, 1] > 0.999


@pytest.mark.parametrize("seed", [10, 11, 12])
def test_two_methods_store_what_training_does_not(seed):
    x, y = draw_patterns(301, round(0.6 * 301), seed)
    assert solved(sbpi(x, y, 1000, seed), x, y)
    assert solved(reinforced_bp(x, y, 1000), x, y)
    trained = train(x, y, 1000, seed)
    assert not solved(trained, x, y)
    assert bits_per_weight(trained, x, y) < 0.57 < bits_per_weight(sbpi(x, y, 1000, seed), x, y)


def test_a_row_for_each_load_and_seed(tmp_path):
    rows = measure("sbpi", 51, (0.4, 2.0), (6, 7), 100)
    assert [(r["load"], r["seed"], r["solved"]) for r in rows] == [
        (0.4, 6, 1), (0.4, 7, 1), (2.0, 6, 0), (2.0, 7, 0)
    ]  # fmt: skip
    x, y = draw_patterns(51, 102, 7)
    assert rows[3]["bits"] == bits_per_weight(sbpi(x, y, 100, 7), x, y)
    assert measure("hebb", 51, (0.4,), (6,), 1)[0]["bits"] <= 0.4

    measure_grid(
        tmp_path / "small.csv",
        [("sbpi", 51, (0.4, 2.0), (6, 7), 100), ("float", 51, (0.4,), (6, 7), 20)],
    )
    table = stored_table("small", tmp_path)
    assert table["method"].tolist() == ["sbpi"] * 4 + ["float"] * 2
    assert table["bits"].tolist()[:4] == pytest.approx([r["bits"] for r in rows], rel=1e-5)
    best = most_bits(table)["sbpi", 51, 100]
    assert best[7] == pytest.approx(max(rows[1]["bits"], rows[3]["bits"]), rel=1e-5)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(InvalidValue, match="n_inputs must be odd, got 100"):
        draw_patterns(100, 10, 0)
    with pytest.raises(InvalidValue, match="n_patterns must be a whole number, 1 or more, got 0"):
        measure("hebb", 11, (0.01,), (0,), 1)
    with pytest.raises(InvalidValue, match="unknown method 'spbi'; did you mean 'sbpi'"):
        measure("spbi", 11, (0.5,), (0,), 1)
    for method in (train, sbpi, reinforced_bp):
        with pytest.raises(InvalidValue, match="steps must be a whole number, 1 or more, got 0"):
            method(*draw_patterns(11, 5, 0), 0, 0)


def test_the_stored_table_is_whole():
    table = stored_table("perceptron")
    columns = ["method", "n_inputs", "load", "steps", "seed"]
    expected = [
        (method, n, load, steps, seed)
        for method, n, loads, seeds, steps in GRID
        for load in loads
        for seed in seeds
    ]
    assert [*table[columns].itertuples(index=False, name=None)] == expected
    assert (table["bits"] / table["load"]).between(0, 1.01).all()  # rounded numbers of patterns
    assert table["solved"].isin([0, 1]).all()
    hebb_again = measure(*GRID[0])
    own = table[(table["method"] == "hebb") & (table["n_inputs"] == GRID[0][1])]
    assert own["bits"].tolist() == pytest.approx([r["bits"] for r in hebb_again], rel=1e-5)


def test_the_numbers_of_theory_are_in_order():
    limits = (HEBB_LIMIT, perceptron.ALGORITHMIC, perceptron.KRAUTH_MEZARD, perceptron.UPPER_BOUND)
    assert [*limits, 1, perceptron.COVER] == sorted([*limits, 1, perceptron.COVER])
