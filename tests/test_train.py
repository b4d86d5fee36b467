import copy
from itertools import pairwise
from math import inf, isnan, nan

import pytest
import torch
from torch import nn

from bnnlib.batches import Batches
from bnnlib.errors import InvalidValue, NotFinite
from bnnlib.layers import evaluating, seed_layers
from bnnlib.losses import error_rate, l2_penalty, squared_hinge_loss
from bnnlib.models import Architecture, binarynet, penalized_parameters
from bnnlib.optim import BinaryAdam, parameter_groups
from bnnlib.train import (
    EVALUATION_BATCH,
    EvaluationMode,
    Position,
    check_finite,
    describe_row,
    evaluate,
    first_not_finite,
    fit,
    learning_rates,
    train_epoch,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def start(tiny, noise):
    """Makes a tiny network, its optimizer, and 60 images in batches of 20."""

    def make(seed=0):
        model = binarynet(tiny, generator=seeded(seed))
        return model, BinaryAdam(parameter_groups(model)), Batches(noise(), 20)

    return make


# --------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize(
    ("final", "epochs", "decay", "half_life"),
    [
        (1e-6, 500, 0.986279486, 50.2),
        (1e-6, 1500, 0.995405417, 150.5),
        (3e-7, 500, 0.983907435, 42.7),
        (3e-7, 1000, 0.991921083, 85.5),
    ],
)
def test_exponential_rates_are_those_of_the_scripts(final, epochs, decay, half_life):
    rates = learning_rates("exponential", 1e-3, final, epochs)
    assert len(rates) == epochs
    assert rates[0] == 1e-3
    assert all(b / a == pytest.approx(decay, abs=5e-10) for a, b in pairwise(rates))
    assert rates[-1] * rates[1] / rates[0] == pytest.approx(final)  # one factor above the final
    assert rates[round(half_life)] == pytest.approx(5e-4, rel=0.01)


def test_linear_rates_fall_in_equal_steps_to_one_step_above_the_final():
    assert learning_rates("linear", 1.0, 0.0, 4) == [1.0, 0.75, 0.5, 0.25]


def test_one_epoch_has_the_starting_rate_and_none_has_none():
    for schedule in ("linear", "exponential"):
        assert learning_rates(schedule, 0.1, 0.01, 1) == [0.1]
        assert learning_rates(schedule, 0.1, 0.01, 0) == []


def test_unknown_schedule_is_refused_with_the_nearest():
    with pytest.raises(InvalidValue, match="'exponentail'; did you mean 'exponential'"):
        learning_rates("exponentail", 0.1, 0.01, 3)


# ------------------------------------------------------------------------------- evaluation


class Constant(nn.Module):
    """Predicts class 0, whatever it sees."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(torch.eye(4)[0])

    def forward(self, x):
        return self.scores.expand(len(x), 4)


def test_errors_of_a_constant_prediction_by_class(noise):
    data = noise(n=9, classes=("a", "b", "c", "d"))
    data.labels.copy_(torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3]))
    result = evaluate(Constant(), Batches(data, 5))
    assert result.error == pytest.approx(6 / 9)
    assert result.class_errors[:2] == (0, 1)
    assert isnan(result.class_errors[2])  # no image of that class
    assert result.class_errors[3] == 1
    assert result.mistakes.tolist() == [False] * 3 + [True] * 6


@pytest.mark.parametrize("size", [7, 60, 500])
def test_class_errors_average_to_the_error_over_every_image(start, size, monkeypatch):
    monkeypatch.setitem(EVALUATION_BATCH, "cpu", size)
    model, _, batches = start()
    result = evaluate(model, batches)
    counts = torch.bincount(batches.labels, minlength=10).tolist()
    assert min(counts) > 0
    total = sum(e * n for e, n in zip(result.class_errors, counts, strict=True)) / 60
    assert result.error == pytest.approx(total)
    assert result.error == result.mistakes.sum().item() / 60
    ((x, labels),) = batches.in_order(60)
    assert result.error == error_rate(model.eval()(x), labels)


WAYS = [
    EvaluationMode(weights, statistics, samples)
    for weights in (None, "deterministic", "stochastic", "real")
    for statistics in ("running", "batch")
    for samples in (1, 3)
]


@pytest.fixture
def sampled(tiny, noise):
    """A network with stochastic weights and dropout that has seen a batch; 60 images."""
    model = binarynet(tiny, generator=seeded(), weights="stochastic", dropout=(0.5,))
    batches = Batches(noise(), 20)
    seed_layers(model, 7)(next(batches.in_order())[0])
    return model, batches


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [None, *WAYS], ids=str)
def test_evaluation_leaves_mode_weights_averages_and_generator(sampled, mode, training):
    model, batches = sampled
    model.train(training)
    state, random = copy.deepcopy(model.state_dict()), model.conv1.generator.get_state()
    first = evaluate(model, batches, mode)
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.conv1.generator.get_state(), random)
    assert torch.equal(evaluate(model, batches, mode).mistakes, first.mistakes)


@pytest.mark.parametrize("samples", [1, 4])
def test_the_scores_of_several_samples_are_averaged(sampled, samples):
    model, batches = sampled
    ((x, labels),) = batches.in_order(60)
    with evaluating(model, "stochastic", seed=5), torch.no_grad():
        scores = torch.stack([model(x) for _ in range(samples)])
    found = evaluate(model, batches, EvaluationMode("stochastic", samples=samples, seed=5))
    assert torch.equal(found.mistakes, scores.mean(0).argmax(1) != labels)
    other = evaluate(model, batches, EvaluationMode("stochastic", samples=samples, seed=6))
    assert not torch.equal(found.mistakes, other.mistakes)


def test_weights_to_test_with_are_signs_or_latent_ones(sampled):
    model, batches = sampled
    ((x, labels),) = batches.in_order(60)
    found = {w: evaluate(model, batches, EvaluationMode(w)) for w in ("deterministic", "real")}
    for weights, result in found.items():
        own = copy.deepcopy(model).eval()
        for layer in (own.conv1, own.conv2, own.dense3, own.dense4):
            layer.mode = "real"
            if weights == "deterministic":
                layer.weight.data.copy_(torch.where(layer.weight >= 0, 1.0, -1.0))
        assert torch.equal(result.mistakes, own(x).argmax(1) != labels)
    assert not torch.equal(found["deterministic"].mistakes, found["real"].mistakes)


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(60, 20, [20] * 3), (50, 20, [17, 17, 16]), (19, 20, [19])],
)
def test_with_statistics_of_the_batch_the_batches_are_nearly_equal(
    tiny, noise, n, batch_size, sizes
):
    model, batches = binarynet(tiny, generator=seeded()), Batches(noise(n), batch_size)
    trained, seen = copy.deepcopy(model), []
    model.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = evaluate(model, batches, EvaluationMode(statistics="batch"))
    assert [len(x) for x in seen] == sizes
    with torch.no_grad():  # in training it normalizes with the batch too
        predicted = torch.cat([trained.train()(x).argmax(1) for x in seen])
    assert torch.equal(found.mistakes, predicted != batches.labels)


# --------------------------------------------------------------------------------- training


def test_an_epoch_changes_every_parameter_with_a_gradient_and_keeps_the_clip(start):
    model, optimizer, batches = start()
    before = copy.deepcopy(model.state_dict())
    loss, error = train_epoch(model, optimizer, batches, seeded())
    assert 0 < loss < 10
    assert round(error * 60) == pytest.approx(error * 60)  # a share of the 60 images
    for name, value in model.state_dict().items():
        if name.startswith("norm") or name.endswith("weight"):
            assert not torch.equal(value, before[name]), name
        if name.endswith("weight") and not name.startswith("norm"):
            assert value.abs().max() <= 1


# ------------------------------------------------------------------------- watched numbers


def test_a_loss_that_is_no_number_ends_the_training_before_the_step(start):
    model, optimizer, batches = start()
    nn.init.constant_(model.norm4.bias, nan)
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(NotFinite, match="became nan at step 1 of epoch 1, first in layer norm4; a"):
        train_epoch(model, optimizer, batches, seeded())
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num())


def test_the_first_layer_that_is_not_finite_is_found_behind_a_sign(start):
    model, _, batches = start()
    x, _ = next(batches.in_order())
    assert first_not_finite(model, x) is None
    nn.init.constant_(model.dense4.bias, inf)
    assert first_not_finite(model, x) == "layer dense4"
    nn.init.constant_(model.norm1.bias, nan)
    assert first_not_finite(model, x) == "layer norm1"
    x[0, 0, 0, 0] = nan
    assert first_not_finite(model, x) == "the input"
    assert not any(layer._forward_hooks for layer in model.modules())


def test_the_step_at_which_a_loss_becomes_infinite_is_named(start):
    model, optimizer, batches = start()
    penalties = iter([0.0, 0.0, 0.0, 0.0, inf])
    with pytest.raises(NotFinite, match="became inf at step 2 of epoch 2; a smaller"):
        fit(
            *(model, optimizer, batches),
            rates=[0.1] * 3,
            generator=seeded(),
            penalty=lambda: next(penalties),
            progress="none",
        )


@pytest.mark.parametrize(("name", "value"), [("norm1.bias", nan), ("dense3.bias", inf)])
def test_a_nan_that_a_sign_hides_from_the_loss_is_seen_after_the_epoch(start, name, value):
    model, optimizer, batches = start()
    nn.init.constant_(model.get_parameter(name), value)
    with pytest.raises(NotFinite, match="is not finite after step 3 of epoch 1"):
        train_epoch(model, optimizer, batches, seeded())


def test_a_moment_that_overflows_is_seen_too(start):
    model, optimizer, batches = start()
    train_epoch(model, optimizer, batches, seeded())
    optimizer.moments(model.conv1.weight)["exp_avg_sq"][0] = inf  # its weights just stand still
    with pytest.raises(NotFinite, match=r"exp_avg_sq of conv1\.weight is not finite"):
        train_epoch(model, optimizer, batches, seeded())


def test_a_loss_that_only_the_device_knows_is_found_when_it_is_read(start):
    model, optimizer, _ = start()
    losses = torch.tensor([1.0, nan, 2.0, nan])
    order = seeded().get_state()
    with pytest.raises(NotFinite, match="became nan at step 2 of epoch 1"):
        check_finite(model, optimizer, Position(order=order, done=3, losses=losses))
    check_finite(model, optimizer, Position(order=order, done=1, losses=losses))


@pytest.mark.parametrize(("target", "kind"), [("weights", "dense"), ("gamma", "norm")])
def test_a_penalty_adds_its_value_to_the_loss_and_twice_the_parameter_to_the_gradient(
    start, target, kind
):
    model, optimizer, batches = start()
    batches.batch_size = 60
    plain = copy.deepcopy(model)
    x, labels = next(batches.shuffled(seeded()))
    loss = squared_hinge_loss(plain(x), labels)
    loss.backward()
    penalized = penalized_parameters(model, target)
    found, _ = train_epoch(
        model, optimizer, batches, seeded(), penalty=lambda: 0.01 * l2_penalty(penalized)
    )
    reached = {f"{kind}{number}.weight" for number in (3, 4)}
    squares = sum(plain.get_parameter(name).square().sum() for name in reached)
    assert found == pytest.approx((loss + 0.01 * squares).item(), rel=1e-6)
    for (name, p), before in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name in reached:
            torch.testing.assert_close(p.grad, before.grad + 0.02 * before)
            assert not torch.equal(p.grad, before.grad)
        else:
            assert torch.equal(p.grad, before.grad), name


def test_a_small_network_memorizes_random_labels_and_learns_nothing_else(noise):
    architecture = Architecture((16, 32), pool_every=1, dense=(256, 256), image_size=16)
    model = binarynet(architecture, generator=seeded())
    history = fit(
        model,
        BinaryAdam(parameter_groups(model)),
        Batches(noise(n=60, size=16), 30),
        test=Batches(noise(n=500, size=16, seed=1), 500),
        rates=learning_rates("linear", 3e-3, 0.0, 60),
        generator=seeded(),
        evaluate_every=60,
        progress="none",
    )
    assert history.last("train_error") <= 0.02
    assert history.last("test_error") > 0.8
    assert history.last("train_loss") < history["train_loss"][0] / 3


def fitted(start, epochs=3, seed=0, **settings):
    model, optimizer, batches = start()
    rates = learning_rates("linear", 1e-3, 0.0, epochs)
    history = fit(
        model,
        optimizer,
        batches,
        rates=rates,
        generator=seeded(seed),
        progress="none",
        **settings,
    )
    return history, model


def test_a_row_for_each_epoch_with_the_stated_columns(start, noise):
    valid = Batches(noise(n=30, seed=1), 20)
    history, model = fitted(start, valid=valid, test=valid)
    classes = [f"_error_class_{i}" for i in range(10)]
    assert list(history.rows[0]) == [
        *("epoch", "learning_rate", "train_loss", "train_mode_error"),
        *("train_error", *("train" + c for c in classes)),
        "valid_error",
        *("test_error", *("test" + c for c in classes)),
        "seconds",
    ]
    assert history["epoch"] == [1, 2, 3]
    assert history["learning_rate"] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert history.last("valid_error") == history.last("test_error") == evaluate(model, valid).error
    assert min(history["seconds"]) > 0


def test_the_rate_of_each_epoch_reaches_the_optimizer(start):
    model, optimizer, batches = start()
    before = copy.deepcopy(model.state_dict())
    fit(model, optimizer, batches, rates=[0.0], generator=seeded(), progress="none")
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize(
    ("epochs", "every", "evaluated"), [(5, 2, [2, 4, 5]), (4, 2, [2, 4]), (3, 9, [3])]
)
def test_errors_are_computed_every_so_many_epochs_and_after_the_last(
    start, epochs, every, evaluated
):
    history, _ = fitted(start, epochs, evaluate_every=every)
    known = [row["epoch"] for row in history.rows if not isnan(row["train_error"])]
    assert known == evaluated
    assert all(map(isnan, history["valid_error"] + history["test_error"]))
    assert not any(map(isnan, history["train_loss"] + history["train_mode_error"]))


def test_same_seed_same_history_and_weights_and_another_seed_differs(start):
    (first, model), (again, twin), (other, _) = (fitted(start, seed=s) for s in (3, 3, 4))
    assert first["train_loss"] == again["train_loss"]
    assert first["train_loss"] != other["train_loss"]
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


def test_evaluation_does_not_influence_the_training(start):
    often, rarely = (fitted(start, evaluate_every=n)[1] for n in (1, 3))
    assert all(map(torch.equal, often.state_dict().values(), rarely.state_dict().values()))


def test_errors_are_those_of_the_mode_asked_for(start):
    for mode in (EvaluationMode("real"), EvaluationMode("real", "batch")):
        history, model = fitted(start, mode=mode)
        found = evaluate(model, start()[2], mode)
        assert history.last("train_error") == found.error
        assert found.error != evaluate(model, start()[2]).error


def test_a_penalty_reaches_every_epoch_and_nothing_is_no_penalty(start):
    plain, none, some = (
        fitted(start, penalty=penalty)[0]["train_loss"]
        for penalty in (None, lambda: l2_penalty([]), lambda: torch.tensor(0.5))
    )
    assert none == plain
    assert some == pytest.approx([loss + 0.5 for loss in plain])


def test_a_measure_is_given_the_evaluations_and_adds_columns(start, noise):
    given = []

    def measure(model, results):
        given.append({split: result.error for split, result in results.items()})
        return {"wrong": results["train"].mistakes.sum().item()} if results else {"idle": 1.0}

    history, _ = fitted(start, measure=measure, test=Batches(noise(30), 20), evaluate_every=2)
    assert [list(errors) for errors in given] == [[], ["train", "test"], ["train", "test"]]
    assert given[-1] == {s: history.last(f"{s}_error") for s in ("train", "test")}
    assert history["wrong"][1:] == [round(60 * error) for error in history["train_error"][1:]]
    assert isnan(history["wrong"][0])
    assert history["idle"][0] == 1
    assert all(map(isnan, history["idle"][1:]))


def test_after_each_epoch_the_history_so_far_is_handed_out(start):
    lengths = []
    fitted(start, after_epoch=lambda history: lengths.append(len(history)))
    assert lengths == [1, 2, 3]


# --------------------------------------------------------------------------------- progress


def test_a_call_after_each_full_batch(start):
    model, optimizer, batches = start()
    calls = []
    fit(
        *(model, optimizer, batches),
        rates=[0.1],
        generator=seeded(),
        progress="none",
        after_step=lambda: calls.append(model.training),
    )
    assert calls == [True] * 3


def test_lines_name_the_first_the_last_and_some_epochs_between(start, capsys):
    model, optimizer, batches = start()
    fit(model, optimizer, batches, rates=[0.0] * 30, generator=seeded(), progress="lines")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        f"epoch {epoch}/30" for epoch in (1, *range(3, 31, 3))
    ]
    assert "loss" in lines[0]


def test_lines_between_are_those_of_evaluated_epochs(start, capsys):
    model, optimizer, batches = start()
    settings = {"generator": seeded(), "evaluate_every": 5, "progress": "lines"}
    fit(model, optimizer, batches, rates=[0.0] * 60, **settings)
    first, *others = capsys.readouterr().err.splitlines()
    assert "error" not in first
    assert [line.split("/")[0] for line in others] == [f"epoch {e}" for e in range(10, 61, 10)]
    assert all("train error" in line for line in others)


def test_progress_can_be_silent(start, capsys, monkeypatch):
    model, optimizer, batches = start()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    for progress in ("none", "auto"):
        fit(model, optimizer, batches, rates=[0.0], generator=seeded(), progress=progress)
    assert capsys.readouterr().err == ""


def test_unknown_style_of_progress_is_refused(start):
    model, optimizer, batches = start()
    with pytest.raises(InvalidValue, match="'line'; did you mean 'lines'"):
        fit(model, optimizer, batches, rates=[0.0], generator=seeded(), progress="line")


def test_an_epoch_in_words_leaves_out_what_is_not_known():
    row = {"train_loss": 0.12345, "train_error": 0.25, "valid_error": nan, "test_error": 0.9}
    assert describe_row(row) == "loss 0.123  train error 25.0 %  test error 90.0 %"
    assert describe_row({"train_error": 0.25}) == "train error 25.0 %"
