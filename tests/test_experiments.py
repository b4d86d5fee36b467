import shutil
from dataclasses import asdict, replace
from itertools import pairwise
from math import nan

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from bnnlib.batches import Batches
from bnnlib.catalogue import PROFILES, Experiment, at_profile, quick, reduced
from bnnlib.errors import CannotWrite, DamagedFile, DataNotFound, FolderInUse, InvalidValue
from bnnlib.experiments import (
    as_scored,
    build_model,
    evaluate_run,
    is_finished,
    load_run,
    named,
    prepare_data,
    published,
    run,
    smoke,
    sparingly,
    stored_runs,
    stream,
    summary,
)
from bnnlib.history import History
from bnnlib.layers import binarize_parameters_, binary_layers
from bnnlib.losses import error_rate
from bnnlib.models import penalized_parameters
from bnnlib.probes import EVALUATION_MODES, PROBES
from bnnlib.runs import trained_on
from bnnlib.train import EVALUATION_BATCH, EvaluationMode, evaluate

BASE = smoke(published("svhn-random-labels"))
LAYERS = ("conv1", "conv2", "dense3", "dense4", "dense5")  # of the network "small"
EVALUATION = smoke(published("svhn-evaluation"))


def quietly(experiment, out=None):
    return run(experiment, out, device="cpu", progress="none")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_seconds(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# ------------------------------------------------------------------------------------ seeds


def test_same_seed_same_history_and_weights_bit_for_bit(finished):
    again = quietly(BASE)
    assert without_seconds(again.history) == without_seconds(finished.history)
    assert same_weights(again.model, finished.model)


def test_another_seed_differs_in_weights_and_order_but_not_in_the_data(finished):
    other = quietly(replace(BASE, seed=1))
    assert not same_weights(other.model, finished.model)
    assert other.history["train_loss"] != finished.history["train_loss"]
    assert all(torch.equal(other.labels[split], y) for split, y in finished.labels.items())


def test_a_run_leaves_pytorchs_global_generator_alone():
    before = torch.get_rng_state()
    quietly(smoke(published("svhn-dropout")))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def base_100_steps():
    """The base experiment, 50 epochs of two batches."""
    return quietly(replace(BASE, epochs=50, n_test=0, evaluate_every=25))


def test_l2_as_coded_is_the_base_bit_for_bit_for_100_steps(base_100_steps):
    e = base_100_steps.experiment
    assert e.steps == 100
    coded = quietly(replace(e, l2=published("svhn-l2").l2))
    assert (coded.experiment.l2, coded.experiment.l2_target) == (5e-4, "nothing")
    assert same_weights(coded.model, base_100_steps.model)
    # as text, since NaN is not equal to itself
    assert str(without_seconds(coded.history)) == str(without_seconds(base_100_steps.history))


@pytest.mark.parametrize("target", ["weights", "gamma"])
def test_l2_that_reaches_something_shrinks_it(base_100_steps, target):
    penalized = quietly(replace(base_100_steps.experiment, l2=5e-4, l2_target=target))
    small, large = (
        sum(p.detach().square().sum().item() for p in penalized_parameters(r.model, target))
        for r in (penalized, base_100_steps)
    )
    assert small < 0.98 * large
    assert penalized.history["train_loss"][0] > base_100_steps.history["train_loss"][0]


def test_dropout_does_change_the_weights(finished):
    dropped = quietly(smoke(published("svhn-dropout")))
    assert not torch.equal(dropped.model.dense3.weight, finished.model.dense3.weight)


def test_probes_and_ways_to_evaluate_do_not_influence_the_training(tmp_path):
    e = replace(smoke(named("svhn-tanh-stochastic")), random_labels=0.5)
    plain = quietly(e)
    watched = replace(e, probes=PROBES, evaluation_weights="stochastic", evaluation_samples=2)
    probed = quietly(replace(watched, evaluation_statistics="batch"), tmp_path / "out")
    assert same_weights(probed.model, plain.model)
    assert probed.history["train_loss"] == plain.history["train_loss"]
    assert load_run(tmp_path / "out").history.columns == probed.history.columns
    extra = set(probed.history.columns) - set(plain.history.columns)
    layers = [f"{probe}_{layer}" for probe in ("flips", "saturation") for layer in LAYERS]
    modes = [f"{split}_error_{mode}" for split in ("train", "test") for mode in EVALUATION_MODES]
    parts = ["train_error_clean", "train_error_corrupted"]
    assert extra == {*layers, *modes, *parts, "critical_sample_ratio"}


def test_errors_are_those_of_the_evaluation_asked_for():
    e = replace(smoke(named("svhn-stochastic")), n_train=500)
    finished = quietly(e)
    batches = Batches(prepare_data(e)["train"], e.batch_size)
    mode = EvaluationMode("stochastic", "batch", seed=stream(e.seed, "evaluation"))
    found = finished.history.last("train_error")
    assert found == evaluate(finished.model, batches, mode).error
    assert found != evaluate(finished.model, batches, EvaluationMode("deterministic")).error


# ---------------------------------------------------------------------------- what it says


GAUSSIAN = smoke(published("cifar10-gaussian-inputs"))


@pytest.mark.parametrize(
    ("experiment", "images", "text"),
    [
        (
            BASE,
            100,
            "100 images of glyphs (drawn, in place of svhn), random labels; "
            "network small, width 0.125",
        ),
        (
            published("cifar10-random-labels"),
            45_000,
            "45,000 images of cifar10, random labels; network cifar10, width 1",
        ),
        (
            reduced(named("svhn-float-true-labels")),
            881,
            "881 images of svhn_exact_subset.npz (in place of svhn), their own labels; "
            "network svhn, width 0.5, full precision",
        ),
        (
            replace(BASE, name="mine", dataset="/some/where/mine.npz", random_labels=0.125),
            1,
            "1 image of mine.npz, 12.5 % of the labels random; network small, width 0.125",
        ),
        (
            GAUSSIAN,
            100,
            "100 images of shapes (drawn, in place of cifar10), replaced by Gaussian noise, "
            "their own labels; network small, width 0.125",
        ),
        (
            replace(
                GAUSSIAN,
                gaussian_splits=("test",),
                pixels="shuffled",
                random_labels=0.5,
                random_label_splits=("test",),
            ),
            100,
            "100 images of shapes (drawn, in place of cifar10), pixels shuffled, "
            "their own labels; network small, width 0.125",
        ),
        (
            named("capacity"),
            2000,
            "2,000 images of patterns (drawn), their own labels; network dense, width 1",
        ),
    ],
)
def test_data_and_network_are_told_as_they_are(experiment, images, text):
    assert trained_on(experiment, images) == text


def test_a_run_says_what_it_trains_on_where_it_goes_on_too(finished, tmp_path, capsys):
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


def test_a_run_whose_progress_is_not_wanted_says_nothing(tmp_path, capsys):
    quietly(replace(BASE, epochs=1), tmp_path / "out")
    quietly(replace(EVALUATION, run_folder=str(tmp_path / "out")))
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------- run and folder


def test_the_folder_holds_experiment_history_labels_and_parameters(finished):
    assert set(content(finished.folder)) == {
        "experiment.json",
        "history.csv",
        "labels.npz",
        "parameters.safetensors",
    }


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quietly(BASE).folder is None
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_read_and_not_repeated(folder):
    before = content(folder)
    again = quietly(BASE, folder)
    assert content(folder) == before
    assert again.record["started"] == load_run(folder).record["started"]


def test_a_file_in_the_place_of_the_folder_or_above_it_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FolderInUse, match="file is not a folder"):
        quietly(BASE, file)
    with pytest.raises(CannotWrite, match="below cannot be made"):
        quietly(BASE, file / "below")
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("svhn-l2",), "run takes an Experiment"),
        ((BASE, None, "cpu", nan), "checkpoint_every must be 0 seconds or more, got nan"),
        ((BASE, None, "cpu", "5"), "checkpoint_every must be 0 seconds or more, got '5'"),
        ((BASE, 3), "out must be the path of a folder, got 3"),
        ((BASE, ""), "out must be the path of a folder, got ''"),
        ((BASE, None, "cpu", 0, ""), "root must be the path of a folder, got ''"),
        ((BASE, None, None), "device must be text, such as 'cpu', got None"),
        ((BASE, None, "cpu", -1), "checkpoint_every must be 0 seconds or more, got -1"),
        ((BASE, "a\0b"), "is no name for a folder"),
    ],
)
def test_what_run_cannot_take_is_named_before_any_work(arguments, text, monkeypatch):
    monkeypatch.setattr("bnnlib.experiments._training", None)
    names = ("experiment", "out", "device", "checkpoint_every", "root")
    with pytest.raises(InvalidValue, match=text):
        run(**dict(zip(names, arguments, strict=False)), progress="none")


def test_an_empty_folder_and_a_missing_one_are_used(tmp_path):
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        if out.name == "empty":
            out.mkdir()
        assert quietly(BASE, out).folder == out
        assert is_finished(out)


def test_missing_data_leave_no_folder_behind(tmp_path):
    experiment = replace(BASE, dataset="cifar10", n_train=50, n_test=0)
    with pytest.raises(DataNotFound):
        run(experiment, tmp_path / "out", device="cpu", root=tmp_path, progress="none")
    assert not (tmp_path / "out").exists()


def test_too_few_images_for_a_batch_leave_no_folder_behind(tmp_path):
    with pytest.raises(InvalidValue, match="20 images do not fill one batch of 50"):
        quietly(replace(BASE, n_train=20), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_for_images_of_another_size_leaves_no_folder_behind(tmp_path):
    with pytest.raises(InvalidValue, match=r"8 x 8 pixels, .* 32 x 32"):
        quietly(replace(BASE, network="dense"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_epochs_give_the_initial_weights(tmp_path):
    untrained = quietly(replace(BASE, epochs=0), tmp_path / "out")
    assert len(untrained.history) == 0
    assert same_weights(untrained.model, build_model(BASE))
    assert len(load_run(tmp_path / "out").history) == 0


def test_the_twin_and_the_other_profile_run_too():
    twin = quietly(replace(BASE, binary=False, activation="binary_sigmoid"))
    assert binary_layers(twin.model) == []
    assert len(twin.history) == 2


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


def test_what_is_done_sparingly_takes_a_twentieth_of_the_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def write(history):
        now[0] += 0.5
        written.append(now[0])

    written, act = [], sparingly(write)
    for _ in range(1000):  # epochs of a tenth of a second
        act(History())
        now[0] += 0.1
    assert written[0] == 100.5  # at once
    assert 0.5 * len(written) == pytest.approx(0.05 * (now[0] - 100), rel=0.1)


# --------------------------------------------------------------------- evaluating a memorizer


def test_all_rows_give_the_training_error_of_the_last_epoch(finished):
    assert evaluate_run(finished, rows=None) == finished.history.last("train_error")
    assert evaluate_run(finished) == finished.history.last("train_error")  # fewer than 7,000


def test_the_first_rows_are_evaluated(finished):
    wrong = [rows * evaluate_run(finished, rows) for rows in range(1, 101)]
    assert wrong == pytest.approx([round(count) for count in wrong])
    assert {round(b - a) for a, b in pairwise(wrong)} == {0, 1}  # one more row, right or wrong
    assert round(wrong[-1]) == round(100 * finished.history.last("train_error"))


def test_evaluation_leaves_the_run_as_it_is(folder):
    evaluated = load_run(folder)
    evaluate_run(evaluated, rows=10)
    assert same_weights(evaluated.model, load_run(folder).model)
    assert evaluated.model.training


def test_altered_labels_are_refused(folder):
    altered = load_run(folder)
    altered.labels["train"][0] = (altered.labels["train"][0] + 1) % 10
    with pytest.raises(InvalidValue, match="the labels of this run are not those it was trained"):
        evaluate_run(altered)


def test_parameters_of_another_run_of_the_same_network_are_refused(folder, tmp_path):
    other = quietly(replace(BASE, seed=1), tmp_path / "other")
    shutil.copy(other.folder / "parameters.safetensors", folder)
    with pytest.raises(DamagedFile, match=r"parameters\.safetensors is not as the run left it"):
        load_run(folder)
    mixed = replace(load_run(other.folder), record=quietly(BASE).record)
    with pytest.raises(InvalidValue, match="the parameters of this run are not those"):
        evaluate_run(mixed)


def test_images_that_are_not_those_of_the_run_are_refused(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(60, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(60) % 10)
    e = replace(BASE, dataset=str(tmp_path / "mine.npz"), n_test=0)
    kept = quietly(e, tmp_path / "out")
    assert evaluate_run(load_run(kept.folder)) == kept.history.last("train_error")
    images[0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(60) % 10)
    with pytest.raises(InvalidValue, match="the images of this run are not those"):
        evaluate_run(load_run(kept.folder))


@pytest.mark.parametrize("file", ["parameters.safetensors", "labels.npz"])
def test_a_run_that_kept_only_its_history_cannot_be_evaluated(folder, file):
    (folder / file).unlink()
    with pytest.raises(InvalidValue, match="kept its parameters and labels"):
        evaluate_run(load_run(folder))


def test_the_evaluation_is_an_experiment_too(finished, tmp_path):
    experiment = replace(EVALUATION, run_folder=str(finished.folder))
    result = quietly(experiment, tmp_path / "out")
    assert result.history["train_error"] == finished.history["train_error"][-1:]
    assert result.history["epoch"] == [2]
    assert is_finished(tmp_path / "out")
    before = content(tmp_path / "out")
    assert quietly(experiment, tmp_path / "out").experiment == experiment
    assert content(tmp_path / "out") == before


def test_an_evaluation_replaces_no_run_that_ended_meanwhile(finished, tmp_path, monkeypatch):
    def slowly(*arguments, **options):
        quietly(BASE, tmp_path / "out")  # by somebody else
        return evaluate_run(*arguments, **options)

    monkeypatch.setattr("bnnlib.experiments.evaluate_run", slowly)
    with pytest.raises(InvalidValue, match="holds another experiment"):
        quietly(replace(EVALUATION, run_folder=str(finished.folder)), tmp_path / "out")
    assert load_run(tmp_path / "out").experiment == BASE


def test_the_evaluation_needs_the_folder_of_a_run(tmp_path):
    with pytest.raises(InvalidValue, match="svhn-random-labels or any other; name its folder"):
        quietly(EVALUATION)
    with pytest.raises(DataNotFound, match="holds no run"):
        quietly(replace(EVALUATION, run_folder=str(tmp_path)))


@pytest.mark.parametrize("name", ["cifar10-dropout", "svhn-stochastic", "svhn-float"])
def test_the_evaluation_takes_a_run_of_any_experiment_and_tests_its_signs(name, tmp_path):
    source = quietly(smoke(named(name)), tmp_path / "source")
    result = quietly(replace(EVALUATION, run_folder=str(source.folder)), tmp_path / "out")
    batches = Batches(prepare_data(source.experiment)["train"], 50)
    signs = evaluate(source.model, batches, EvaluationMode("deterministic"))
    assert result.history["train_error"] == [signs.error]
    assert result.record["experiment_sha256"] == result.experiment.digest()
    assert result.record["parameter_sha256"] == source.record["parameter_sha256"]
    assert np.isnan(summary(result)["test error (%)"])


# ------------------------------------------------------------ an evaluation says what it scored


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run of another data set, width and dropout than the evaluation's."""
    e = replace(smoke(published("cifar10-dropout")), width=0.0625, seed=3)
    return quietly(e, tmp_path_factory.mktemp("other") / "run")


@pytest.mark.parametrize("profile", PROFILES)
def test_the_evaluation_of_its_own_run_is_the_experiment_it_always_was(profile):
    names = ("svhn-random-labels", "svhn-evaluation")
    source, asked = (at_profile(published(name), profile) for name in names)
    seeds = {"seed": 5, "corruption_seed": 6, "data_seed": 7}
    asked = replace(asked, run_folder="runs/x", **seeds)
    assert as_scored(asked, replace(source, **seeds)) == asked
    assert as_scored(replace(asked, seed=0), replace(source, **seeds)) == asked


def test_the_stored_evaluations_are_those_of_the_stored_runs():
    evaluations, sources = stored_runs("svhn-evaluation"), stored_runs("svhn-random-labels")
    assert len(evaluations) == 3
    for evaluation, source in zip(evaluations, sources, strict=True):
        scored = as_scored(evaluation.experiment, source.experiment)
        assert scored.digest() == evaluation.record["experiment_sha256"]


def test_an_evaluation_has_the_settings_of_the_run_that_it_scored(other, tmp_path):
    asked = replace(EVALUATION, run_folder=str(other.folder), evaluation_rows=60)
    result = quietly(asked, tmp_path / "out")
    own = {"name": asked.name, "summary": asked.summary, "script": asked.script, "epochs": 0}
    own |= {"evaluates": asked.evaluates, "evaluation_rows": 60, "run_folder": asked.run_folder}
    assert asdict(result.experiment) == asdict(other.experiment) | own
    assert result.record["trained_on"] == other.record["trained_on"]
    row = summary(load_run(tmp_path / "out"))
    assert (row["data"], row["width"], row["seed"]) == ("shapes", 0.0625, 3)


def test_a_finished_evaluation_is_read_even_where_its_run_is_gone(finished, tmp_path):
    source = shutil.copytree(finished.folder, tmp_path / "source")
    asked = replace(quick(published("svhn-evaluation")), run_folder=str(source))
    first = quietly(asked, tmp_path / "out")
    before = content(tmp_path / "out")
    shutil.rmtree(source)
    assert quietly(asked, tmp_path / "out").experiment == first.experiment
    assert content(tmp_path / "out") == before
    for changes, text in (
        ({"evaluation_rows": 5}, r"holds another experiment: evaluation_rows \(7000 there, 5"),
        ({"width": 0.5}, "so width can only be 0.125, got 0.5"),
    ):
        with pytest.raises(InvalidValue, match=text):
            quietly(replace(asked, **changes), tmp_path / "out")
    with pytest.raises(DataNotFound, match="source holds no run"):
        quietly(asked, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"width": 0.75}, "width can only be 0.0625, got 0.75"),
        ({"weights": "stochastic"}, "weights can only be 'deterministic', got 'stochastic'"),
        ({"seed": 1}, "seed can only be 3, got 1"),
        ({"epochs": 5}, "epochs can only be 0, got 5"),
        (
            {"l2": 0.5, "dataset": "mine.npz"},
            "dataset can only be 'shapes', got 'mine.npz', and l2 can only be 0.0, got 0.5",
        ),
    ],
)
@pytest.mark.parametrize("profile", PROFILES)
def test_what_the_scored_run_has_not_is_refused_by_name(profile, changes, refused, other, tmp_path):
    asked = replace(at_profile(published("svhn-evaluation"), profile), run_folder=str(other.folder))
    with pytest.raises(InvalidValue) as caught:
        quietly(replace(asked, **changes), tmp_path / "out")
    assert str(caught.value) == (
        f"svhn-evaluation trains nothing and scores the run in {other.folder} as it was trained, "
        f"so {refused}"
    )
    assert not (tmp_path / "out").exists()


def test_what_the_scored_run_has_may_be_asked_for(other):
    asked = replace(EVALUATION, run_folder=str(other.folder))
    chosen = {"width": 0.0625, "seed": 3, "dropout": (0.5, 0.5), "dataset": "shapes"}
    assert quietly(replace(asked, **chosen)).experiment == quietly(asked).experiment


def test_an_evaluation_of_ones_own_name_asks_for_all_that_it_states(finished):
    own = Experiment(
        name="mine",
        summary="my own",
        dataset="glyphs",
        network="small",
        epochs=0,
        lr_final=0.0,
        schedule="linear",
        evaluates="svhn-random-labels",
        run_folder=str(finished.folder),
    )
    result = quietly(own)
    assert (result.experiment.name, result.experiment.width) == ("mine", 0.125)
    with pytest.raises(InvalidValue, match="dataset can only be 'glyphs', got 'shapes'"):
        quietly(replace(own, dataset="shapes"))


def test_an_evaluation_obeys_device_precision_and_download(finished, monkeypatch):
    seen = {}

    def watched(model, batches, mode):
        seen["model"], seen["device"] = model, batches.labels.device
        return evaluate(model, batches, mode)

    def prepared(experiment, root, download):
        seen["download"] = download
        return prepare_data(experiment)

    monkeypatch.setattr("bnnlib.experiments.evaluate", watched)
    monkeypatch.setattr("bnnlib.experiments.prepare_data", prepared)
    asked = replace(EVALUATION, run_folder=str(finished.folder))
    result = run(asked, device="cpu", progress="none", precision="half", download=True)
    assert [layer.precision for layer in binary_layers(seen["model"])] == ["float32"] + ["half"] * 4
    assert result.record["device"] == finished.record["device"] + ", half precision"
    assert result.history["train_error"] == finished.history["train_error"][-1:]
    assert seen["download"] is True
    parameter = next(seen["model"].parameters())
    assert parameter.device == seen["device"] == torch.device("cpu")


def test_rows_are_evaluated_in_batches_as_they_would_be_in_one(finished):
    sizes = []
    hook = register_module_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0])) if hasattr(module, "dense5") else None
    )
    try:
        error = evaluate_run(finished)
    finally:
        hook.remove()
    assert max(sizes) <= EVALUATION_BATCH["cpu"] < sum(sizes) == 100
    data = prepare_data(finished.experiment)["train"]
    x, labels = next(Batches(data, 100).in_order())
    model = build_model(finished.experiment)
    model.load_state_dict(finished.model.state_dict())
    with torch.no_grad():
        assert error == error_rate(binarize_parameters_(model).eval()(x), labels)
