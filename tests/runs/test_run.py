"""What `run` trains, says and keeps; and the evaluation of a kept run."""

import shutil
from dataclasses import asdict, replace
from itertools import count, pairwise
from math import isnan, nan
from unittest.mock import patch

import numpy as np
import pytest
import torch

from bnnlib.batches import Batches
from bnnlib.errors import DataNotFound, InvalidValue
from bnnlib.experiments.build import build_model, prepare_data
from bnnlib.experiments.experiment import Experiment
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import PROFILES, at_profile, quick, reduced, smoke
from bnnlib.experiments.scored import as_scored
from bnnlib.experiments.variants import named
from bnnlib.history import History
from bnnlib.layers import binary_layers, derive_seed
from bnnlib.losses import error_rate
from bnnlib.models import penalized_parameters
from bnnlib.probes import EVALUATION_MODES, PROBES
from bnnlib.quantizers import sign
from bnnlib.runs import evaluation
from bnnlib.runs.evaluation import evaluate_run
from bnnlib.runs.folder import load_run
from bnnlib.runs.ledger import read_row
from bnnlib.runs.record import trained_on
from bnnlib.runs.result import differences
from bnnlib.runs.run import HISTORY_EVERY, run
from bnnlib.training import EvaluationMode, evaluate

BASE = smoke(published("svhn-random-labels"))
LAYERS = ("conv1", "conv2", "dense3", "dense4", "dense5")  # of the network "small"
EVALUATION = smoke(published("svhn-evaluation"))


def quietly(experiment, out=None):
    return run(experiment, out, device="cpu", progress="none")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------ seeds


def test_the_seed_decides_weights_and_order_bit_for_bit_but_not_the_data(finished):
    assert differences(quietly(BASE), finished) == []
    differing = set(differences(quietly(replace(BASE, seed=1)), finished))
    assert {"train_loss", "conv1.weight"} <= differing
    assert not {"train", "test"} & differing  # the labels


def test_a_run_leaves_pytorchs_global_generator_alone():
    before = torch.get_rng_state()
    quietly(smoke(published("svhn-dropout")))
    assert torch.equal(torch.get_rng_state(), before)


def test_l2_as_coded_is_the_base_bit_for_bit_for_100_steps():
    e = replace(BASE, epochs=50, n_test=0, evaluate_every=25)
    coded = replace(e, l2=published("svhn-l2").l2)
    assert (e.steps, coded.l2, coded.l2_target) == (100, 5e-4, "nothing")
    assert differences(quietly(coded), quietly(e)) == []


@pytest.mark.parametrize("target", ["weights", "gamma"])
def test_l2_that_reaches_something_shrinks_it(finished, target):
    penalized = quietly(replace(BASE, l2=0.1, l2_target=target))
    small, large = (
        sum(p.detach().square().sum().item() for p in penalized_parameters(r.model, target))
        for r in (penalized, finished)
    )
    assert small < large
    start = penalized_parameters(build_model(BASE), target)
    penalty = 0.1 * sum(p.detach().square().sum().item() for p in start)
    added = penalized.history["train_loss"][0] - finished.history["train_loss"][0]
    assert added == pytest.approx(penalty, rel=0.2)  # in the first epoch they have moved little


def test_probes_and_ways_to_evaluate_do_not_influence_the_training(tmp_path):
    e = replace(smoke(named("svhn-tanh-stochastic")), random_labels=0.5)
    plain = quietly(e)
    watched = replace(e, probes=PROBES, evaluation_weights="stochastic", evaluation_samples=2)
    probed = quietly(replace(watched, evaluation_statistics="batch"), tmp_path / "out")
    assert load_run(tmp_path / "out").history.columns == probed.history.columns
    extra = set(probed.history.columns) - set(plain.history.columns)
    asked_for = {name for name in plain.history.columns if name.startswith(("train_e", "test_e"))}
    assert set(differences(probed, plain)) - asked_for == extra
    layers = [f"{probe}_{layer}" for probe in ("flips", "saturation") for layer in LAYERS]
    modes = [f"{split}_error_{mode}" for split in ("train", "test") for mode in EVALUATION_MODES]
    parts = ["train_error_clean", "train_error_corrupted"]
    assert extra == {*layers, *modes, *parts, "critical_sample_ratio", "memorized_bits"}


def test_errors_are_those_of_the_evaluation_asked_for():
    e = replace(smoke(named("svhn-stochastic")), n_train=500, evaluation_samples=2)
    finished = quietly(e)
    batches = Batches(prepare_data(e)["train"], e.batch_size)
    mode = EvaluationMode("stochastic", "batch", 2, derive_seed(e.seed, "evaluation"), "apart")
    found = evaluate(finished.model, batches, mode.afresh(f"train {e.epochs}"))
    assert finished.history.last("train_error") == found.error
    classes = [finished.history.last(f"train_error_class_{i}") for i in range(10)]
    assert classes == pytest.approx(found.class_errors, nan_ok=True)
    assert found.error != evaluate(finished.model, batches, EvaluationMode("deterministic")).error


def test_no_epochs_give_the_initial_weights(tmp_path):
    untrained = quietly(replace(BASE, epochs=0), tmp_path / "out")
    assert len(load_run(tmp_path / "out").history) == len(untrained.history) == 0
    assert differences(untrained, replace(untrained, model=build_model(BASE))) == []


def test_half_precision_is_recorded_and_taken_by_binary_layers_alone(finished, tmp_path):
    half = run(BASE, tmp_path / "half", device="cpu", progress="none", precision="half")
    assert half.record["device"] == finished.record["device"] + ", half precision"
    assert [layer.precision for layer in binary_layers(half.model)] == ["float32"] + ["half"] * 4
    losses, others = half.history["train_loss"], finished.history["train_loss"]
    assert losses != others
    assert losses == pytest.approx(others, rel=0.1)
    again = load_run(tmp_path / "half")
    assert {layer.precision for layer in binary_layers(again.model)} == {"float32"}
    assert evaluate_run(again) == again.history.last("train_error")
    twin = run(replace(BASE, binary=False), device="cpu", progress="none", precision="half")
    assert twin.record["device"] == finished.record["device"]


# ---------------------------------------------------------------------------- what it says

CIFAR10 = published("cifar10-random-labels")
GAUSSIAN = smoke(published("cifar10-gaussian-inputs"))
ELSEWHERE = {"gaussian_splits": ("test",), "random_label_splits": ("test",), "random_labels": 0.5}
OWN = replace(BASE, name="mine", dataset="/some/where/mine.npz", random_labels=0.125)
TOLD = {
    "45,000 images of cifar10, random labels; network cifar10, width 1": (CIFAR10, 45_000),
    "881 images of svhn_exact_subset.npz (in place of svhn), their own labels; "
    "network svhn, width 0.5, full precision": (reduced(named("svhn-float-true-labels")), 881),
    "1 image of mine.npz, 12.5 % of the labels random; network small, width 0.125": (OWN, 1),
    "100 images of shapes (drawn, in place of cifar10), replaced by Gaussian noise, "
    "their own labels; network small, width 0.125": (GAUSSIAN, 100),
    # What becomes of the test set is not what it trains on.
    "100 images of shapes (drawn, in place of cifar10), pixels shuffled, their own labels; "
    "network small, width 0.125": (replace(GAUSSIAN, pixels="shuffled", **ELSEWHERE), 100),
}


@pytest.mark.parametrize("text", TOLD)
def test_data_and_network_are_told_as_they_are(text):
    assert trained_on(*TOLD[text]) == text


def test_a_run_says_what_it_trains_on_or_scores_or_nothing(finished, tmp_path, capsys):
    run(replace(BASE, epochs=1), tmp_path / "out", device="cpu", progress="lines")
    about, epoch = capsys.readouterr().err.splitlines()
    device = finished.record["device"]
    assert about == (
        "svhn-random-labels: 100 images of glyphs (drawn, in place of svhn), random labels; "
        f"network small, width 0.125; 1 epoch on {device}, 1 thread; in {tmp_path / 'out'}"
    )
    assert epoch.startswith("epoch 1/1")
    assert load_run(tmp_path / "out").record["trained_on"] in about
    run(replace(EVALUATION, run_folder=str(tmp_path / "out")), device="cpu", progress="lines")
    (about,) = capsys.readouterr().err.splitlines()
    assert about == (
        "svhn-evaluation: 100 images of glyphs (drawn, in place of svhn), random labels; network "
        f"small, width 0.125; {tmp_path / 'out'} is scored, at most 7,000 rows, on {device}, "
        "1 thread"
    )
    quietly(replace(BASE, epochs=1), tmp_path / "quiet")
    quietly(replace(EVALUATION, run_folder=str(tmp_path / "quiet")))
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------- run and folder


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quietly(BASE).folder is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"experiment": "svhn-l2"}, "run takes an Experiment"),
        ({"checkpoint_every": nan}, "checkpoint_every must be 0 seconds or more, got nan"),
        ({"checkpoint_every": "5"}, "checkpoint_every must be 0 seconds or more, got '5'"),
        ({"out": ""}, "out must be the path of a folder, got ''"),
        ({"root": ""}, "root must be the path of a folder, got ''"),
    ],
)
def test_what_run_cannot_take_is_named_before_any_work(arguments, text, monkeypatch):
    monkeypatch.setattr("bnnlib.runs.run._build_trial", None)
    with pytest.raises(InvalidValue, match=text):
        run(**{"experiment": BASE, "device": "cpu", "progress": "none"} | arguments)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"dataset": "cifar10", "n_train": 50}, DataNotFound, "is not in"),
        ({"n_train": 20}, InvalidValue, "20 images do not fill one batch of 50; use a batch_size"),
        ({"dataset": "wide.npz"}, InvalidValue, "must be square, those of wide are 6 x 8"),
        ({"binary": False, "optimizer": "bop"}, InvalidValue, "Bop needs binary weights"),
        (
            {"network": "binary_resnet18", "l2": 1.0, "l2_target": "gamma"},
            InvalidValue,
            "no gamma of dense layers to penalize",
        ),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder_behind(changes, error, text, tmp_path):
    wide = np.zeros((60, 1, 6, 8), np.uint8)
    np.savez(tmp_path / "wide.npz", images=wide, labels=np.arange(60) % 10)
    with pytest.raises(error, match=text):
        run(replace(BASE, **changes), tmp_path / "out", device="cpu", root=tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_history_of_short_epochs_is_written_at_intervals(monkeypatch, tmp_path):
    written, save, clock = [], History.save, count()
    monkeypatch.setattr(History, "save", lambda h, path: written.append(len(h)) or save(h, path))
    monkeypatch.setattr("time.monotonic", lambda: next(clock) / 4)  # a quarter second a look
    quietly(replace(BASE, epochs=60), tmp_path / "out")
    first, *others, last = written
    assert (first, last) == (1, 60)
    assert 1 < len(others) < 60 / HISTORY_EVERY
    assert load_run(tmp_path / "out").history["epoch"] == list(range(1, 61))


# --------------------------------------------------------------------- evaluating a memorizer


def test_the_error_is_that_of_the_signs_on_all_rows_as_one_batch(finished):
    data = prepare_data(finished.experiment)["train"]
    x, labels = next(Batches(data, 100).in_order())
    model = build_model(finished.experiment)
    model.load_state_dict(finished.model.state_dict())
    with torch.no_grad():
        for layer in binary_layers(model):
            layer.weight.copy_(sign(layer.weight))
        error = error_rate(model.eval()(x), labels)
    assert evaluate_run(finished, rows=None) == evaluate_run(finished) == error
    assert error == finished.history.last("train_error")


def test_the_first_rows_are_evaluated(finished):
    wrong = [rows * evaluate_run(finished, rows) for rows in range(1, 101)]
    assert wrong == pytest.approx([round(count) for count in wrong])
    assert {round(b - a) for a, b in pairwise(wrong)} == {0, 1}  # one more row, right or wrong
    assert round(wrong[-1]) == round(100 * finished.history.last("train_error"))


def test_evaluation_leaves_the_run_as_it_is(finished):
    evaluated = load_run(finished.folder)
    evaluate_run(evaluated, rows=10)
    assert differences(evaluated, load_run(finished.folder)) == []
    assert evaluated.model.training


def test_what_another_run_trained_on_or_left_is_refused_and_so_is_nothing(finished):
    other = quietly(replace(BASE, seed=1, corruption_seed=1))
    drawn_anew = finished.record | {"image_sha256": {"train": "0" * 64}}
    mixed = {"images": {"record": drawn_anew}, "labels": {"labels": other.labels}}
    for what, part in (mixed | {"parameters": {"model": other.model}}).items():
        with pytest.raises(InvalidValue, match=f"the {what} of this run are not those it was tr"):
            evaluate_run(replace(finished, **part))
    for part in ("labels", "model"):
        with pytest.raises(InvalidValue, match="kept its parameters and labels"):
            evaluate_run(replace(finished, **{part: None}))


# ---------------------------------------------------------- an evaluation is an experiment too


def evaluation_of(scored, **changes):
    return replace(EVALUATION, run_folder=str(scored.folder), **changes)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run of another data set, width and dropout than the evaluation's."""
    e = replace(smoke(published("cifar10-dropout")), width=0.0625, seed=3)
    return quietly(e, tmp_path_factory.mktemp("other") / "run")


def test_an_evaluation_replaces_no_run_that_ended_meanwhile(finished, tmp_path, monkeypatch):
    def slowly(*arguments, **options):
        quietly(BASE, tmp_path / "out")  # by somebody else
        return evaluate_run(*arguments, **options)

    monkeypatch.setattr("bnnlib.runs.run.evaluate_run", slowly)
    with pytest.raises(InvalidValue, match="holds another experiment"):
        quietly(evaluation_of(finished), tmp_path / "out")
    assert load_run(tmp_path / "out").experiment == BASE


def test_the_evaluation_needs_the_folder_of_a_run(tmp_path):
    with pytest.raises(InvalidValue, match="svhn-random-labels or any other; name its folder"):
        quietly(EVALUATION)
    with pytest.raises(DataNotFound, match="holds no run"):
        quietly(replace(EVALUATION, run_folder=str(tmp_path)))


@pytest.mark.parametrize("name", ["svhn-stochastic", "svhn-float"])
def test_the_evaluation_takes_a_run_of_any_experiment_and_tests_its_signs(name, tmp_path):
    source = quietly(smoke(named(name)), tmp_path / "source")
    result = quietly(evaluation_of(source), tmp_path / "out")
    batches = Batches(prepare_data(source.experiment)["train"], 50)
    signs = evaluate(source.model, batches, EvaluationMode("deterministic"))
    assert result.history["train_error"] == [signs.error]
    assert result.record["experiment_sha256"] == result.experiment.digest()
    assert result.record["parameter_sha256"] == source.record["parameter_sha256"]
    assert isnan(read_row(result.folder)["test_error"])


@pytest.mark.parametrize("profile", PROFILES)
def test_the_evaluation_of_its_own_run_is_the_experiment_it_always_was(profile):
    names = ("svhn-random-labels", "svhn-evaluation")
    source, asked = (at_profile(published(name), profile) for name in names)
    seeds = {"seed": 5, "corruption_seed": 6, "data_seed": 7}
    asked = replace(asked, run_folder="runs/x", **seeds)
    assert as_scored(asked, replace(source, **seeds)) == asked
    assert as_scored(replace(asked, seed=0), replace(source, **seeds)) == asked


def test_an_evaluation_has_the_settings_of_its_run_asked_for_or_not(other, tmp_path):
    asked = evaluation_of(other, evaluation_rows=60)
    result = quietly(asked, tmp_path / "out")
    own = {"name": asked.name, "summary": asked.summary, "script": asked.script, "epochs": 0}
    own |= {"evaluates": asked.evaluates, "evaluation_rows": 60, "run_folder": asked.run_folder}
    assert asdict(result.experiment) == asdict(other.experiment) | own
    assert result.record["trained_on"] == other.record["trained_on"]
    row = read_row(tmp_path / "out")
    assert (row["dataset"], row["width"], row["seed"]) == ("shapes", 0.0625, 3)
    chosen = {"width": 0.0625, "seed": 3, "dropout": (0.5, 0.5), "dataset": "shapes"}
    assert quietly(replace(asked, **chosen)).experiment == result.experiment


def test_a_finished_evaluation_is_kept_and_read_even_where_its_run_is_gone(finished, tmp_path):
    source, out = shutil.copytree(finished.folder, tmp_path / "source"), tmp_path / "out"
    asked = replace(quick(published("svhn-evaluation")), run_folder=str(source))
    first = quietly(asked, out)
    assert first.history["train_error"] == finished.history["train_error"][-1:]
    assert first.history["epoch"] == [2]
    before = content(out)
    shutil.rmtree(source)
    assert quietly(asked, out).experiment == first.experiment
    for changes, text in (
        ({"evaluation_rows": 5}, r"holds another experiment: evaluation_rows \(7000 there, 5"),
        ({"width": 0.5}, "so width can only be 0.125, got 0.5"),
    ):
        with pytest.raises(InvalidValue, match=text):
            quietly(replace(asked, **changes), out)
    assert content(out) == before
    with pytest.raises(DataNotFound, match="source holds no run"):
        quietly(asked, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("profile", "changes", "refused"),
    [
        *[(p, {"width": 0.75}, "width can only be 0.0625, got 0.75") for p in PROFILES],
        ("smoke", {"epochs": 5}, "epochs can only be 0, got 5"),
        (
            "full",
            {"l2": 0.5, "seed": 1},
            "l2 can only be 0.0, got 0.5, and seed can only be 3, got 1",
        ),
    ],
)
def test_what_the_scored_run_has_not_is_refused_by_name(profile, changes, refused, other, tmp_path):
    asked = replace(at_profile(published("svhn-evaluation"), profile), run_folder=str(other.folder))
    with pytest.raises(InvalidValue) as caught:
        quietly(replace(asked, **changes), tmp_path / "out")
    assert str(caught.value) == (
        f"svhn-evaluation trains nothing and scores the run in {other.folder} as it was trained, "
        f"so {refused}"
    )
    assert not (tmp_path / "out").exists()


def test_an_evaluation_of_ones_own_name_asks_for_all_that_it_states(finished):
    stated = {"dataset": "glyphs", "network": "small", "schedule": "linear", "lr_final": 0.0}
    scores = {"evaluates": "svhn-random-labels", "run_folder": str(finished.folder)}
    own = Experiment(name="mine", summary="my own", epochs=0, **stated, **scores)
    result = quietly(own)
    assert (result.experiment.name, result.experiment.width) == ("mine", 0.125)
    with pytest.raises(InvalidValue, match="dataset can only be 'glyphs', got 'shapes'"):
        quietly(replace(own, dataset="shapes"))


def test_an_evaluation_obeys_precision_and_download(finished):
    spied = (patch.object(evaluation, f.__name__, side_effect=f) for f in (prepare_data, evaluate))
    with next(spied) as prepared, next(spied) as evaluated:
        how = {"precision": "half", "download": True}
        result = run(evaluation_of(finished), device="cpu", progress="none", **how)
    assert prepared.call_args.args[2] is True
    layers = binary_layers(evaluated.call_args.args[0])
    assert [layer.precision for layer in layers] == ["float32"] + ["half"] * 4
    assert result.record["device"] == finished.record["device"] + ", half precision"
