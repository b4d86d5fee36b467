"""Rates, evaluation, a step, an epoch, `fit`, what it shows, and its history."""

import copy
from itertools import pairwise
from math import inf, isnan, nan

import pytest
import torch
from torch import nn

from bnnlib import training
from bnnlib.batches import Batches
from bnnlib.errors import DamagedFile, InvalidValue, NotFinite
from bnnlib.history import TIMES, History, describe_row, epochs_to_reach, parse_epochs
from bnnlib.layers import evaluating, seed_layers
from bnnlib.losses import error_rate, l2_penalty, squared_hinge_loss
from bnnlib.models import Architecture, binarynet
from bnnlib.optim import BinaryAdam, make_optimizer, parameter_groups
from bnnlib.training import (
    EvaluationMode,
    Step,
    TrainingState,
    _repeatable,
    evaluate,
    fit,
    train_epoch,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def start(tiny, noise):
    """Makes the state of a tiny network before its first step, and 60 images in batches of 20."""

    def make(seed=0):
        model = binarynet(tiny, generator=seeded())
        state = TrainingState(model, BinaryAdam(parameter_groups(model)), seeded(seed))
        return state, Batches(noise(), 20)

    return make


@pytest.fixture
def fitted(start):
    """Trains such a network; returns its history and itself."""

    def train(epochs=3, seed=0, **settings):
        state, batches = start(seed)
        rates = training.learning_rates("linear", 1e-3, 0.0, epochs)
        history = fit(state, batches, **{"rates": rates, "progress": "none"} | settings)
        return history, state.model

    return train


def changed(model, before):
    """The names of the parameters and averages that are not as they were."""
    after = model.state_dict()
    return {k for k in after if not torch.equal(after[k].nan_to_num(), before[k].nan_to_num())}


# --------------------------------------------------------------------------- learning rates


def test_exponential_rates_are_those_of_the_scripts():
    rates = training.learning_rates("exponential", 1e-3, 3e-7, 1000)
    assert (len(rates), rates[0]) == (1000, 1e-3)
    assert all(b / a == pytest.approx(0.991921083, abs=5e-10) for a, b in pairwise(rates))
    assert rates[-1] * rates[1] / rates[0] == pytest.approx(3e-7)  # one factor above the final


def test_linear_rates_fall_in_equal_steps_to_one_step_above_the_final():
    assert training.learning_rates("linear", 1.0, 0.2, 4) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_no_epoch_has_no_rate_and_an_unknown_schedule_is_refused():
    assert training.learning_rates("linear", 0.1, 0.01, 0) == []
    with pytest.raises(InvalidValue, match="'exponentail'; did you mean 'exponential'"):
        training.learning_rates("exponentail", 0.1, 0.01, 3)


# ------------------------------------------------------------------------------- evaluation


def test_errors_of_a_constant_prediction_by_class(noise):
    data = noise(n=9, classes=("a", "b", "c", "d"))
    data.labels.copy_(torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3]))
    constant = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    nn.init.zeros_(constant[1].weight)
    constant[1].bias.data = torch.eye(4)[0]
    result = evaluate(constant, Batches(data, 5))
    assert result.error == pytest.approx(6 / 9)
    # Of the third class there is no image.
    assert result.class_errors == pytest.approx((0, 1, nan, 1), nan_ok=True)
    assert result.mistakes.tolist() == [False] * 3 + [True] * 6


@pytest.mark.parametrize(("size", "passes"), [(7, 9), (500, 1)])
def test_every_image_counts_once_whatever_the_batches(start, size, passes, monkeypatch):
    monkeypatch.setitem(training.EVALUATION_BATCH, "cpu", size)
    (state, batches), calls = start(), []
    result = evaluate(state.model, batches, after_batch=lambda: calls.append(1))
    assert len(calls) == passes
    ((x, labels),) = batches.in_order(60)
    assert result.error == error_rate(state.model.eval()(x), labels)
    assert result.error == result.mistakes.sum().item() / 60
    counts = torch.bincount(labels, minlength=10)
    total = (torch.tensor(result.class_errors) * counts).sum().item() / 60
    assert result.error == pytest.approx(total)


@pytest.fixture
def sampled(tiny, noise):
    """A network with stochastic weights and dropout that has seen a batch; 60 images."""
    model = binarynet(tiny, generator=seeded(), weights="stochastic", dropout=(0.5,))
    batches = Batches(noise(), 20)
    seed_layers(model, 7)(next(batches.in_order())[0])
    return model, batches


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("weights", [None, "deterministic", "stochastic", "real"])
def test_evaluation_leaves_mode_weights_averages_and_generator(
    sampled, weights, statistics, training
):
    (model, batches), mode = sampled, EvaluationMode(weights, statistics, 2, classes="apart")
    model.train(training)
    before, random = copy.deepcopy(model.state_dict()), model.conv1.generator.get_state()
    first = evaluate(model, batches, mode)
    assert {module.training for module in model.modules()} == {training}
    assert changed(model, before) == set()
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


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"), [(60, 20, [20] * 3), (50, 20, [17, 17, 16]), (19, 20, [19])]
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


@pytest.mark.parametrize(("per_class", "sizes"), [(2, [2]), (20, [20]), (21, [11, 10])])
def test_class_errors_apart_are_those_of_a_network_in_training_on_one_class(
    tiny, noise, per_class, sizes
):
    data = noise(3 * per_class, classes=("a", "b", "c", "none"))
    data.labels.copy_(torch.arange(3).repeat(per_class))
    model, batches = binarynet(tiny, generator=seeded()), Batches(data, 20)
    mixed, apart = (
        evaluate(model, batches, EvaluationMode(statistics="batch", classes=classes))
        for classes in ("mixed", "apart")
    )
    assert (apart.error, isnan(apart.class_errors[3])) == (mixed.error, True)
    assert torch.equal(apart.predicted, mixed.predicted)
    twin = copy.deepcopy(model).train()  # which normalizes with the batch
    for label in range(3):
        parts = torch.split(data.images[data.labels == label] / 127.5 - 1, sizes)
        with torch.no_grad():
            wrong = torch.cat([twin(x).argmax(1) != label for x in parts])
        assert apart.class_errors[label] == pytest.approx(wrong.double().mean().item())


def test_where_statistics_are_stored_it_matters_not_that_classes_are_apart(start):
    state, batches = start()
    train_epoch(Step(state, batches))
    mixed, apart = (
        evaluate(state.model, batches, EvaluationMode(classes=classes))
        for classes in ("mixed", "apart")
    )
    assert apart.class_errors == mixed.class_errors
    with pytest.raises(InvalidValue, match="unknown classes 'appart'; did you mean 'apart'"):
        evaluate(state.model, batches, EvaluationMode(classes="appart"))


# --------------------------------------------------------------------------------- training


def test_an_epoch_returns_the_mean_loss_and_the_share_of_mistakes_of_its_steps(start):
    state, batches = start()
    state.model.eval()
    loss, error = train_epoch(Step(state, batches))
    assert state.model.training
    assert loss == pytest.approx(state.losses.mean().item())
    assert error == state.wrong.sum().item() / 60


def test_the_loss_is_any_function_of_scores_and_labels(start):
    (state, batches), seen = start(), []
    batches.batch_size = 60
    plain = copy.deepcopy(state.model)
    x, labels = next(batches.shuffled(seeded()))
    expected = nn.functional.cross_entropy(plain(x), labels, label_smoothing=0.1)
    expected.backward()

    def smoothed(scores, labels):
        seen.append((scores.shape, labels.shape))
        return nn.functional.cross_entropy(scores, labels, label_smoothing=0.1)

    history = fit(state, batches, rates=[1e-3], loss=smoothed, progress="none")
    assert seen == [((60, 10), (60,))]
    assert history["train_loss"] == [pytest.approx(expected.item(), rel=1e-6)]
    torch.testing.assert_close(state.model.conv1.weight.grad, plain.conv1.weight.grad)


def test_a_penalty_adds_its_value_to_the_loss_and_twice_the_parameter_to_the_gradient(start):
    state, batches = start()
    batches.batch_size = 60
    plain = copy.deepcopy(state.model)
    x, labels = next(batches.shuffled(seeded()))
    loss = squared_hinge_loss(plain(x), labels)
    loss.backward()
    weight, before = state.model.dense3.weight, plain.dense3.weight
    found, _ = train_epoch(Step(state, batches, lambda: 0.01 * l2_penalty([weight])))
    assert found == pytest.approx((loss + 0.01 * before.square().sum()).item(), rel=1e-6)
    torch.testing.assert_close(weight.grad, before.grad + 0.02 * before)
    assert torch.equal(state.model.conv1.weight.grad, plain.conv1.weight.grad)


@pytest.fixture
def memorized(noise):
    """60 images of noise, a small network that has memorized their labels, and its history."""
    architecture = Architecture((16, 32), pool_every=1, dense=(256, 256), image_size=16)
    model = binarynet(architecture, generator=seeded())
    batches = Batches(noise(n=60, size=16), 30)
    history = fit(
        TrainingState(model, BinaryAdam(parameter_groups(model)), seeded()),
        batches,
        test=Batches(noise(n=500, size=16, seed=1), 500),
        rates=training.learning_rates("linear", 3e-3, 0.0, 60),
        evaluate_every=60,
        progress="none",
    )
    return batches, model, history


def test_a_small_network_memorizes_random_labels_and_learns_nothing_else(memorized):
    _, _, history = memorized
    assert history.last("train_error") <= 0.02
    assert history.last("test_error") > 0.8
    assert history.last("train_loss") < history["train_loss"][0] / 3


def test_class_errors_apart_say_nothing_about_what_a_network_has_memorized(memorized):
    batches, model, _ = memorized
    mixed, apart = (
        evaluate(model, batches, EvaluationMode(statistics="batch", classes=classes))
        for classes in ("mixed", "apart")
    )
    assert mixed.error == apart.error < 0.1
    assert sum(mixed.class_errors) / 10 < 0.1
    assert sum(apart.class_errors) / 10 > 0.7


# ------------------------------------------------------------------------- watched numbers


def test_a_loss_that_is_no_number_ends_the_training_before_the_step(start):
    state, batches = start()
    nn.init.constant_(state.model.norm4.bias, nan)
    before = copy.deepcopy(dict(state.model.named_parameters()))
    with pytest.raises(NotFinite, match="became nan at step 1 of epoch 1, first in layer norm4; a"):
        train_epoch(Step(state, batches))
    assert not changed(state.model, before | dict(state.model.named_buffers()))


def test_the_first_layer_that_is_not_finite_is_found_behind_a_sign(start):
    state, batches = start()
    model = state.model
    x, _ = next(batches.in_order())
    assert training.first_not_finite(model, x) is None
    nn.init.constant_(model.dense4.bias, inf)
    assert training.first_not_finite(model, x) == "layer dense4"
    nn.init.constant_(model.norm1.bias, nan)
    assert training.first_not_finite(model, x) == "layer norm1"
    x[0, 0, 0, 0] = nan
    assert training.first_not_finite(model, x) == "the input"
    assert not any(layer._forward_hooks for layer in model.modules())


def test_only_steps_of_known_parts_become_a_graph(tiny, generator):
    def captured(change=lambda model: None, loss=squared_hinge_loss, name="binary_adam"):
        model = binarynet(tiny, generator=generator, activation="approx_sign")
        change(model)
        state = TrainingState(model, make_optimizer(name, model, 0.1), generator)
        return training._can_be_captured(state, loss)

    def own(x):
        return x

    class Own(nn.Identity):
        pass

    assert captured()
    assert captured(loss=nn.functional.cross_entropy)
    assert not captured(loss=own)
    assert not captured(name="bop")
    assert not captured(name="SGD")
    assert not captured(lambda model: setattr(model.act1, "function", own))
    assert not captured(lambda model: setattr(model.conv1, "quantizer", own))
    assert not captured(lambda model: setattr(model, "norm1", Own()))


def test_a_layer_of_several_outputs_is_passed_over():
    class Twice(nn.Module):
        def forward(self, x):
            return x, x

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.dense = Twice(), nn.Linear(2, 2)

        def forward(self, x):
            return self.dense(self.twice(x)[0])

    model = Network()
    nn.init.constant_(model.dense.bias, nan)
    assert training.first_not_finite(model, torch.zeros(1, 2)) == "layer dense"


def test_the_step_at_which_a_loss_becomes_infinite_is_named(fitted):
    penalties = iter([0.0, 0.0, 0.0, 0.0, inf])
    with pytest.raises(NotFinite, match="became inf at step 2 of epoch 2; a smaller"):
        fitted(penalty=lambda: next(penalties))


@pytest.mark.parametrize(("name", "value"), [("norm1.bias", nan), ("dense3.bias", inf)])
def test_a_nan_that_a_sign_hides_from_the_loss_is_seen_after_the_epoch(start, name, value):
    state, batches = start()
    nn.init.constant_(state.model.get_parameter(name), value)
    with pytest.raises(NotFinite, match="is not finite after step 3 of epoch 1"):
        train_epoch(Step(state, batches))


def test_a_moment_that_overflows_is_seen_though_its_weights_just_stand_still(start):
    state, batches = start()
    state.optimizer.moments(state.model.conv1.weight)["exp_avg_sq"][0] = inf
    with pytest.raises(NotFinite, match=r"exp_avg_sq of conv1\.weight is not finite"):
        train_epoch(Step(state, batches))


def test_a_loss_that_only_the_device_knows_is_found_when_it_is_read(start):
    state, _ = start()
    state.losses, state.done = torch.tensor([1.0, nan, nan, nan]), 3
    with pytest.raises(NotFinite, match="became nan at step 2 of epoch 1"):
        state.check_finite()
    state.done = 1
    state.check_finite()


# -------------------------------------------------------------------------------------- fit


def test_a_row_for_each_epoch_with_the_stated_columns(fitted, noise):
    valid = Batches(noise(n=30, seed=1), 20)
    history, model = fitted(valid=valid, test=valid)
    classes = [f"_error_class_{i}" for i in range(10)]
    assert list(history.rows[0]) == [
        *("epoch", "learning_rate", "train_loss", "train_mode_error"),
        *("train_error", *("train" + c for c in classes)),
        "valid_error",
        *("test_error", *("test" + c for c in classes)),
        *TIMES,
    ]
    assert history["epoch"] == [1, 2, 3]
    assert history["learning_rate"] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert history.last("valid_error") == history.last("test_error") == evaluate(model, valid).error
    assert min(history["seconds"]) > 0
    assert min(history["cpu_seconds"]) > 0


def test_the_rate_of_each_epoch_reaches_the_optimizer(start, fitted):
    before = start()[0].model.state_dict()
    _, model = fitted(rates=[0.0])
    assert changed(model, before) == {name for name, _ in model.named_buffers()}


@pytest.mark.parametrize(
    ("epochs", "every", "evaluated"), [(5, 2, [2, 4, 5]), (4, 2, [2, 4]), (3, 9, [3])]
)
def test_errors_are_computed_every_so_many_epochs_and_after_the_last(
    fitted, epochs, every, evaluated
):
    history, _ = fitted(epochs, evaluate_every=every)
    known = [row["epoch"] for row in history.rows if not isnan(row["train_error"])]
    assert known == evaluated
    assert all(map(isnan, history["valid_error"] + history["test_error"]))
    assert not any(map(isnan, history["train_loss"] + history["train_mode_error"]))


def test_each_evaluation_draws_stochastic_weights_of_its_own(start, monkeypatch):
    state, batches = start()
    seeds, plain = [], training.evaluate
    spy = lambda model, b, mode, *more: seeds.append(mode.seed) or plain(model, b, mode, *more)  # noqa: E731
    monkeypatch.setattr(training, "evaluate", spy)
    mode = EvaluationMode("stochastic", seed=3)
    predicted = []
    fit(
        state,
        batches,
        test=batches,
        rates=[0.0] * 3,
        mode=mode,
        measure=lambda _, found: predicted.extend(e.predicted for e in found.values()) or {},
        progress="none",
    )
    assert len(set(seeds)) == 6
    assert seeds == [mode.afresh(f"{s} {e}").seed for e in (1, 2, 3) for s in ("train", "test")]
    assert not torch.equal(predicted[0], predicted[1])  # of one set, in one epoch
    assert torch.equal(predicted[5], plain(state.model, batches, mode.afresh("test 3")).predicted)


def test_the_seed_decides_the_training_and_evaluation_does_not_influence_it(fitted):
    (often, one), (rarely, twin) = (fitted(seed=3, evaluate_every=n) for n in (1, 3))
    assert often["train_loss"] == rarely["train_loss"] != fitted(seed=4)[0]["train_loss"]
    assert changed(one, twin.state_dict()) == set()


def test_a_measure_is_given_the_evaluations_and_adds_columns(fitted, noise):
    given = []

    def measure(state, results):
        given.append({split: result.error for split, result in results.items()})
        return {"wrong": results["train"].mistakes.sum().item()} if results else {"idle": 1.0}

    history, _ = fitted(measure=measure, test=Batches(noise(30), 20), evaluate_every=2)
    assert [list(errors) for errors in given] == [[], ["train", "test"], ["train", "test"]]
    assert given[-1] == {s: history.last(f"{s}_error") for s in ("train", "test")}
    assert history["wrong"][1:] == [round(60 * error) for error in history["train_error"][1:]]
    assert isnan(history["wrong"][0])
    assert history["idle"] == pytest.approx([1, nan, nan], nan_ok=True)


def test_it_calls_after_each_step_each_evaluated_batch_and_each_epoch(fitted):
    calls = []
    fitted(
        epochs=2,
        after_step=lambda: calls.append("step"),
        after_batch=lambda: calls.append("batch"),
        after_epoch=lambda history: calls.append(len(history)),
    )
    assert calls == [*["step"] * 3, *["batch"] * 2, 1, *["step"] * 3, *["batch"] * 2, 2]


# --------------------------------------------------------------------------------- progress


@pytest.mark.parametrize(
    ("epochs", "every", "shown"),
    [(30, 1, [1, *range(3, 31, 3)]), (60, 5, [1, *range(10, 61, 10)])],
)
def test_lines_name_the_first_the_last_and_some_evaluated_epochs_between(
    fitted, capsys, epochs, every, shown
):
    fitted(rates=[0.0] * epochs, evaluate_every=every, progress="lines")
    first, *others = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in (first, *others)] == [
        f"epoch {e}/{epochs}" for e in shown
    ]
    assert "loss" in first
    assert all("train error" in line for line in others)


@pytest.mark.parametrize("progress", ["none", "auto"])
def test_progress_can_be_silent(fitted, capsys, monkeypatch, progress):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    fitted(progress=progress)
    assert capsys.readouterr().err == ""


def test_unknown_style_of_progress_is_refused(fitted):
    with pytest.raises(InvalidValue, match="'line'; did you mean 'lines'"):
        fitted(progress="line")


def test_an_epoch_in_words_leaves_out_what_is_not_known():
    row = {"train_loss": 0.12345, "train_error": 0.25, "valid_error": nan, "test_error": 0.9}
    assert describe_row(row) == "loss 0.123  train error 25.0 %  test error 90.0 %"
    assert describe_row({"train_error": 0.25}) == "train error 25.0 %"


# ---------------------------------------------------------------------------------- history

LONG = History(
    [
        {"epoch": 1, "learning_rate": 1e-3, "train_loss": 1 / 3, "train_error": nan},
        {"epoch": 2, "learning_rate": 5e-4, "train_loss": 2e-30, "train_error": 0.25},
    ]
)


def test_history_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "history.csv"
    LONG.save(path)
    loaded = History.load(path)
    assert loaded.columns == LONG.columns
    for row, saved in zip(loaded.rows, LONG.rows, strict=True):
        assert row == pytest.approx(saved, rel=1e-8, nan_ok=True)
        assert isinstance(row["epoch"], int)
    before = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == before


def test_rows_of_different_columns_are_kept_with_gaps(tmp_path):
    path = tmp_path / "history.csv"
    history = History([{"epoch": 1, "late": nan}, {"epoch": 2, "b": 0.5}, {"a": 3.0, "epoch": 3}])
    history.save(path)
    assert path.read_text().split() == ["epoch,late,b,a", "1,,,", "2,,0.5,", "3,,,3"]
    assert History.load(path).columns == history.columns


def test_columns_by_name():
    assert len(LONG) == 2
    assert LONG["learning_rate"] == [1e-3, 5e-4]
    assert LONG.last("train_error") == 0.25
    assert isnan(History().last("train_error"))
    with pytest.raises(InvalidValue, match="'trainloss'; did you mean 'train_loss'"):
        LONG["trainloss"]


@pytest.mark.parametrize("epoch", ["", "1.5", "inf", "1e16", None])
def test_a_history_without_whole_epochs_is_refused(epoch, tmp_path):
    path = tmp_path / "history.csv"
    text = "loss\n1\n" if epoch is None else f"epoch,loss\n{epoch},1\n"
    path.write_text(text)
    for read in (History.load, lambda path: parse_epochs(text, path, ["loss"])):
        with pytest.raises(DamagedFile, match=r"history\.csv is no history: a row has no epoch"):
            read(path)


def test_epochs_to_reach_are_the_first_evaluated_ones_at_or_under_each_limit():
    errors = [0.9, nan, 0.5, nan, 0.08, 0.3, 0.02]
    history = History([{"epoch": i, "train_error": e} for i, e in enumerate(errors, start=1)])
    assert epochs_to_reach(history) == [3, 5, None]
    assert epochs_to_reach(history, (0.02, 0.95)) == [7, 1]
    assert epochs_to_reach(History()) == [None] * 3
    history = History([{"epoch": 4, "train_error": 0.9, "test_error": 0.1}])
    assert epochs_to_reach(history, (0.5,), "test_error") == [4]
    with pytest.raises(InvalidValue, match="did you mean 'test_error'"):
        epochs_to_reach(history, (0.5,), "tets_error")


def test_chance_is_that_of_the_classes_whose_errors_were_counted():
    columns = {f"{split}_error_class_{i}": nan for split in ("train", "test") for i in range(4)}
    assert History([{"epoch": 1, **columns}]).chance == 0.75
    assert History([{"epoch": 1, "train_error": 0.5}]).chance == 0.9


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("cpu", False)])
def test_a_step_on_a_gpu_adds_in_one_order(device, expected):
    """cuDNN may add in another order each time; two runs on an H100 then differed."""
    cudnn = torch.backends.cudnn
    assert not cudnn.deterministic
    with _repeatable(torch.device(device)):
        assert cudnn.deterministic == expected
    assert not cudnn.deterministic
