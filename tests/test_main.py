import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bnnlib.__main__ import main, parse_field, with_settings
from bnnlib.catalogue import Experiment
from bnnlib.errors import InvalidValue
from bnnlib.experiments import PUBLISHED, VARIANTS, is_finished, load_run, named, published

# The nine scripts, typed from a reading of the originals.
SCRIPTS = {
    "svhn-random-labels": "SVHN/svhn_random_labels.py",
    "svhn-evaluation": "SVHN/svhn_evaluation_random_labels.py",
    "svhn-dropout": "SVHN/svhn_random_labels_dropout.py",
    "svhn-l2": "SVHN/svhn_random_labels_l2_regularization.py",
    "svhn-stochastic": "SVHN/svhn_stochastic_sigmoid_random_labels.py",
    "cifar10-random-labels": "CIFAR-10/cifar10_random_labels.py",
    "cifar10-dropout": "CIFAR-10/cifar10_train_acc_dropout.py",
    "cifar10-stochastic": "CIFAR-10/cifar10_stochastic_sigmoid_random_labels.py",
    "cifar10-gaussian-inputs": "CIFAR-10/cifar10_randX_input.py",
}
# Epochs, final learning rate, its factor per epoch, steps in all, NumPy seed.
SCHEDULES = {
    "svhn-random-labels": (500, 1e-6, 0.986279486, 732_500, 1234),
    "svhn-evaluation": (0, 1e-6, None, 0, 1234),
    "svhn-dropout": (500, 1e-6, 0.986279486, 732_500, 1234),
    "svhn-l2": (500, 1e-6, 0.986279486, 732_500, 1234),
    "svhn-stochastic": (1500, 1e-6, 0.995405417, 2_197_500, 1234),
    "cifar10-random-labels": (500, 3e-7, 0.983907435, 450_000, 1234),
    "cifar10-dropout": (1000, 3e-7, 0.991921083, 900_000, None),
    "cifar10-stochastic": (1000, 3e-7, 0.991921083, 900_000, 1234),
    "cifar10-gaussian-inputs": (1000, 3e-7, 0.991921083, 900_000, None),
}
# What all share, and after it what some change.
COMMON = {
    "batch_size": 50,
    "lr_start": 1e-3,
    "schedule": "exponential",
    "width": 1.0,
    "binary": True,
    "activation": "binary_tanh",
    "weights": "deterministic",
    "evaluation_weights": "deterministic",
    "evaluation_statistics": "running",
    "evaluation_samples": 1,
    "dropout": [],
    "dropout_position": "before_norm",
    "l2": 0.0,
    "l2_target": "nothing",
    "random_labels": 1.0,
    "random_label_splits": ["train", "valid", "test"],
    "gaussian_variance": 0.0,
    "gaussian_splits": ["train"],
    "gaussian_matched": False,
    "pixels": "kept",
    "n_train": None,
    "n_valid": None,
    "n_test": None,
    "evaluate_every": 1,
    "evaluates": "",
    "evaluation_rows": None,
}
DIFFERENCES = {
    "svhn-evaluation": {"evaluates": "svhn-random-labels", "evaluation_rows": 7000},
    "svhn-dropout": {"dropout": [0.25, 0.5]},
    "svhn-l2": {"l2": 5e-4},
    "svhn-stochastic": {
        "activation": "binary_sigmoid",
        "weights": "stochastic",
        "evaluation_weights": "stochastic",
        "evaluation_statistics": "batch",
        "random_label_splits": ["train", "valid"],
    },
    "cifar10-dropout": {"dropout": [0.5, 0.5]},
    "cifar10-stochastic": {
        "activation": "binary_sigmoid",
        "weights": "stochastic",
        "evaluation_weights": "real",
    },
    "cifar10-gaussian-inputs": {
        "random_labels": 0.0,
        "random_label_splits": [],
        "gaussian_variance": 0.1,
    },
}


def call(*arguments):
    return CliRunner().invoke(main, arguments, prog_name="python -m bnnlib")


def in_shell(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "bnnlib", *arguments], capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def listed():
    return {entry["name"]: entry for entry in json.loads(call("list", "--json").stdout)}


# ------------------------------------------------------------------------ list and describe


def test_the_nine_are_listed_in_order(listed):
    assert list(listed) == list(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_and_schedule(listed, name):
    entry = listed[name]
    epochs, lr_final, decay, steps, seed = SCHEDULES[name]
    assert entry["script"] == SCRIPTS[name]
    assert entry["dataset"] == entry["network"] == name.split("-")[0]
    assert (entry["epochs"], entry["lr_final"], entry["steps"]) == (epochs, lr_final, steps)
    assert entry["lr_decay"] == pytest.approx(decay, abs=5e-10)
    assert entry["original_seed"] == seed


@pytest.mark.parametrize("name", SCRIPTS)
def test_settings(listed, name):
    expected = COMMON | DIFFERENCES.get(name, {})
    assert {field: listed[name][field] for field in expected} == expected


def test_every_field_is_compared_but_text_and_our_own_seeds(listed):
    compared = set(COMMON) | {"script", "epochs", "lr_final", "lr_decay", "steps", "original_seed"}
    compared |= {"name", "dataset", "network"}
    ours = {"summary", "probes", "run_folder", "seed", "corruption_seed", "data_seed"}
    for entry in listed.values():
        assert set(entry) == compared | ours


def test_list_has_a_line_for_each():
    for arguments, names in ((("list",), SCRIPTS), (("list", "--variants"), VARIANTS)):
        lines = call(*arguments).stdout.splitlines()
        assert [line.split()[0] for line in lines] == list(names)
        assert all(named(line.split()[0]).summary in line for line in lines)


def test_variants_are_listed_with_every_field_too(listed):
    entries = json.loads(call("list", "--variants", "--json").stdout)
    assert [entry["name"] for entry in entries] == list(VARIANTS)
    assert {frozenset(entry) for entry in entries} == {frozenset(listed["svhn-l2"])}


def test_describe_shows_every_field(listed):
    lines = call("describe", "cifar10-dropout").stdout.splitlines()
    shown = {line[:23].strip(): line[23:] for line in lines}
    assert set(shown) == set(listed["cifar10-dropout"])
    assert (shown["epochs"], shown["dropout"]) == ("1000", "(0.5, 0.5)")


def test_describe_at_a_profile():
    assert "glyphs" in call("describe", "svhn-l2", "--profile", "smoke").stdout


# ------------------------------------------------------------- output that nobody can read


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a full disk")


@full
@pytest.mark.parametrize(
    "arguments", [("list",), ("list", "--json"), ("describe", "svhn-l2"), ("--help",)]
)
def test_output_that_cannot_be_written_is_one_line_and_status_1(arguments):
    command = [sys.executable, "-m", "bnnlib", *arguments]
    with open("/dev/full", "w") as target:
        result = subprocess.run(command, stdout=target, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "Error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [("list", "--json"), ("--help",)])
def test_a_closed_pipe_is_silent(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "bnnlib", *arguments]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


# --------------------------------------------------------------------------------- mistakes


RUN = ("run", "svhn-random-labels", "--profile", "smoke", "--out", "unused")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("rnu",), "Did you mean 'run'"),
        (("list", "--jsn"), "--json"),
        (("describe", "svhn-droput"), "did you mean 'svhn-dropout'"),
        (("run", "svhn-random-label"), "did you mean 'svhn-random-labels'"),
        (("run", "svhn-l2", "--profile", "quik"), "did you mean 'quick'"),
        (("describe", "svhn-l2", "--profile", "smok"), "did you mean 'smoke'"),
        ((*RUN, "--set", "epoch=3"), "unknown field 'epoch'; did you mean 'epochs'"),
        ((*RUN, "--set", "epochs=three"), "epochs takes a whole number, got 'three'"),
        ((*RUN, "--set", "epochs=1.5"), "epochs takes a whole number, got '1.5'"),
        ((*RUN, "--set", "binary=yes"), "binary takes true or false, got 'yes'"),
        ((*RUN, "--set", "width=wide"), "width takes a number, got 'wide'"),
        ((*RUN, "--set", "n_train=few"), "n_train takes a whole number or none, got 'few'"),
        ((*RUN, "--set", "dropout=a,b"), "dropout takes a number, or several with commas"),
        ((*RUN, "--set", "dropout=1.0"), "below 1, got (1.0,)"),
        ((*RUN, "--set", "dropout=nan"), "dropout must be at most three numbers"),
        ((*RUN, "--set", "width=nan"), "width must be above 0 and at most 64, got nan"),
        ((*RUN, "--set", "width=1e999"), "width must be above 0 and at most 64, got inf"),
        ((*RUN, "--set", "width=0"), "width must be above 0 and at most 64, got 0.0"),
        ((*RUN, "--set", "lr_start=-inf"), "lr_start must be above 0 and at most 100, got -inf"),
        ((*RUN, "--set", "epochs=-1"), "epochs must be 0 to 100,000, got -1"),
        ((*RUN, "--set", "epochs=" + "9" * 5000), "epochs takes a whole number, got '999"),
        ((*RUN, "--set", "epochs=none"), "epochs takes a whole number, got 'none'"),
        ((*RUN, "--set", "random_labels=50"), "random_labels must be 0 to 1, got 50.0"),
        ((*RUN, "--set", "n_train=20"), "20 images do not fill one batch of 50; use a larger"),
        ((*RUN, "--set", "batch_size=0"), "batch_size must be 1 to 1,000,000, got 0"),
        ((*RUN, "--set", "network=dense"), "network='dense' takes images of 8 x 8 pixels"),
        ((*RUN, "--set", "binary=false", "--set", "weights=real"), "binary=False has real weights"),
        ((*RUN, "--set", "l2_target=gamma"), "l2_target='gamma' has no effect with l2=0.0"),
        ((*RUN, "--set", "run_folder=x"), "run_folder='x' has no effect with evaluates=''"),
        ((*RUN, "--set", "name=../../x"), "name must be at most 100 letters"),
        ((*RUN, "--set", "seed=1", "--set", "seed=2"), "--set gives seed twice"),
        ((*RUN, "--set", "seed=1", "--set", " seed =1"), "--set gives seed twice, the second time"),
        ((*RUN, "--set", "network=smal"), "did you mean 'small'"),
        ((*RUN, "--set", "random_label_splits=trian"), "did you mean 'train'"),
        ((*RUN, "--set", "epochs"), "--set takes field=value, got 'epochs'"),
        ((*RUN, "--set", "seed=-1"), "seed"),
        ((*RUN, "--device", "cud"), "unknown device 'cud'; did you mean 'cuda'"),
        ((*RUN, "--device", "tpu"), "(allowed: auto, cpu, cuda, cuda:N)"),
        (("capacity", "--device", "tpu"), "(allowed: auto, cpu, cuda, cuda:N)"),
        ((*RUN, "--out", ""), "Invalid value for '--out': a folder needs a name, got ''"),
        ((*RUN, "--data", ""), "Invalid value for '--data': a folder needs a name, got ''"),
        (("capacity", "--out", ""), "a folder needs a name, got ''"),
        (("svhn-subset", "--data", ""), "a folder needs a name, got ''"),
        *[
            ((*RUN, "--set", f"{field}={text}"), f"or nothing: `{field}=`, got '{text}'")
            for field in ("probes", "dropout", "random_label_splits")
            for text in ("[]", "()", "None", "[flips]")
        ],
        (("run", "svhn-l2-wieghts-5e-4"), "did you mean 'svhn-l2-weights-5e-4'"),
        ((*RUN, "--set", "probes=flip"), "did you mean 'flips'"),
        ((*RUN, "--set", "evaluation_samples=3"), "needs evaluation_weights='stochastic'"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name_and_status_2(
    arguments, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)  # not a traceback
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert text in errors[0]
    assert result.stderr.endswith(errors[0] + "\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("run", "svhn-float", "--profile", "reduced", "--data", "."), "no file"),
        (("svhn-subset", "--data", "."), "SVHN is not in"),
        (("run", "cifar10-dropout", "--profile", "full", "--data", "."), "CIFAR10 is not in"),
    ],
)
def test_what_is_not_there_is_one_line_and_status_1(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith(f"Error: {text}")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_quietly(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bnnlib.__main__.run", interrupt)
    result = call(*RUN)
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


def test_sigterm_ends_quietly_too_wherever_it_comes(monkeypatch):
    monkeypatch.setattr("bnnlib.__main__.run", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    result = call(*RUN)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ---------------------------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("epochs", "3", 3),
        ("width", "0.5", 0.5),
        ("lr_final", "1e-6", 1e-6),
        ("binary", "False", False),
        ("binary", "true", True),
        ("n_train", "none", None),
        ("n_train", " 100 ", 100),
        ("dropout", "0.25, 0.5", (0.25, 0.5)),
        ("dropout", "0.5", (0.5,)),
        ("dropout", "", ()),
        ("random_label_splits", "train,valid", ("train", "valid")),
        ("probes", "flips, parts", ("flips", "parts")),
        ("dataset", "my=set.npz", "my=set.npz"),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(field, text, value):
    parsed = parse_field(field, text)
    assert (parsed, type(parsed)) == (value, type(value))
    assert getattr(with_settings(published("svhn-l2"), (f"{field}={text}",)), field) == value


def test_settings_are_applied_together():
    changed = with_settings(published("svhn-l2"), ("schedule=linear", "lr_final=0", "epochs = 3"))
    assert (changed.schedule, changed.lr_final, changed.epochs) == ("linear", 0.0, 3)


@pytest.mark.parametrize("field", [f.name for f in fields(Experiment)])
@pytest.mark.parametrize("text", ["", "nan", "-1", "1e999", "\x1b[2J", "x" * 2000, "train,train"])
def test_any_text_for_any_field_is_taken_or_refused_in_one_line(field, text):
    try:
        changed = with_settings(published("svhn-l2"), (f"{field}={text}",))
    except InvalidValue as error:
        message = str(error)
        assert re.search(rf"\b{field}\b", message)
    else:
        message = str(vars(changed))
    assert message.isprintable()


def test_a_field_that_is_not_there_is_refused():
    with pytest.raises(InvalidValue, match="did you mean 'evaluate_every'"):
        parse_field("evaluate_evry", "3")


# ----------------------------------------------------------------------------------- running


def test_in_a_shell_a_run_ends_with_its_errors_and_its_folder(tmp_path):
    out = tmp_path / "out"
    setting = "corruption_seed=5"
    result = in_shell(*RUN[:-1], str(out), "--set", setting, "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    errors, folder = result.stdout.splitlines()
    assert folder == str(out)
    assert "train error" in errors
    assert "epoch 2/2" in result.stderr  # in lines, since no terminal is there
    assert load_run(out).experiment.corruption_seed == 5


def test_in_a_shell_a_mistake_has_no_traceback(tmp_path):
    result = in_shell("run", "svhn-random-label", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: unknown experiment")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [*PUBLISHED, *VARIANTS])
def test_every_experiment_and_variant_has_a_form_of_seconds(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    result = call("run", name, "--profile", "smoke", "--device", "cpu")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / name / "smoke-seed0"
    assert is_finished(folder)
    assert load_run(folder).experiment.name == name
    assert "train error" in result.stdout


def test_an_evaluation_trains_the_run_it_needs_once_and_with_the_same_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    command = ("run", "svhn-evaluation", "--profile", "smoke")
    seeds = ("--set", "seed=3", "--set", "corruption_seed=4")
    first = call(*command, *seeds)
    source = load_run(tmp_path / "runs" / "svhn-random-labels" / "smoke-seed3")
    assert "evaluates runs/svhn-random-labels/smoke-seed3; any other: --set" in first.stderr
    assert (source.experiment.seed, source.experiment.corruption_seed) == (3, 4)
    again = call(*command, *seeds, "--out", "again")
    assert again.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    assert f"{100 * source.history.last('train_error'):.1f} %" in first.stdout
    assert load_run("again").experiment.run_folder == "runs/svhn-random-labels/smoke-seed3"
    assert len(list(tmp_path.glob("runs/svhn-random-labels/*"))) == 1


def test_the_settings_of_an_evaluation_are_given_to_the_run_it_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("run", "svhn-evaluation", "--profile", "smoke", "--set", "evaluation_rows=60")
    narrow = ("--set", "width=0.0625", "--set", "epochs=1")
    first = call(*command, *narrow)
    source = load_run(tmp_path / "runs" / "svhn-random-labels" / "smoke-seed0").experiment
    scored = load_run(tmp_path / "runs" / "svhn-evaluation" / "smoke-seed0").experiment
    assert (source.width, source.epochs, source.evaluation_rows) == (0.0625, 1, None)
    assert (scored.width, scored.epochs, scored.evaluation_rows) == (0.0625, 0, 60)
    for path in (tmp_path / "runs" / "svhn-random-labels").rglob("*"):
        path.is_file() and path.unlink()
    again = call(*command, *narrow)  # what is finished is read, and no run is trained for it
    assert again.stdout == first.stdout
    assert again.stderr.endswith("smoke-seed0 holds this run, finished; nothing is run again\n")
    assert again.stderr.count("\n") == 1
    for other in ((), ("--set", "width=0.125")):  # as the profile has it
        refused = call(*command, *other)
        assert refused.exit_code == 2
        assert "width (0.0625 there, 0.125 asked for); choose another" in refused.stderr


def test_nothing_is_trained_for_an_evaluation_that_has_no_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    refused = call("run", "svhn-evaluation", "--profile", "smoke", "--out", "notes")
    assert refused.stderr == "Error: notes holds something that is no run; choose another folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_an_evaluation_refuses_settings_that_its_run_has_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(*RUN[:-1], "base")
    command = ("run", "svhn-evaluation", "--profile", "reduced", "--set", "run_folder=base")
    refused = call(*command, "--set", "width=0.5")  # also where the profile says the same
    assert refused.exit_code == 2
    assert refused.stderr == (
        "Error: svhn-evaluation trains nothing and scores the run in base as it was trained, "
        "so width can only be 0.125, got 0.5\n"
    )
    assert not (tmp_path / "runs").exists()
    kept = call(*command, "--set", "width=0.125", "--precision", "half")
    assert kept.exit_code == 0, kept.output
    assert call(*command, "--set", "width=0.5").stderr == refused.stderr
    assert call(*command).stdout == kept.stdout
    scored = load_run("runs/svhn-evaluation/reduced-seed0")
    assert (scored.experiment.width, scored.experiment.dataset) == (0.125, "glyphs")
    assert scored.record["device"].endswith(", half precision")


def test_options_without_effect_on_a_finished_run_are_named(tmp_path):
    command = (*RUN[:-1], str(tmp_path / "out"))
    options = ("--device", "cpu", "--checkpoint-every", "300", "--data", ".", "--download")
    assert "without effect" not in call(*command, *options).stderr
    *_, told = call(*command, *options).stderr.splitlines()
    named_ones = "--device, --data, --download, --checkpoint-every"
    assert told == f"without effect on a finished run: {named_ones}"


def test_another_experiment_is_told_the_way_out(tmp_path):
    command = (*RUN[:-1], str(tmp_path / "out"))
    call(*command)
    refused = call(*command, "--set", "width=0.0625")
    assert refused.exit_code == 2
    assert "width (0.125 there, 0.0625 asked for); choose another folder (--out" in refused.stderr


def test_a_finished_run_is_named_as_such_and_left_alone(tmp_path):
    command = [*RUN[:-1], str(tmp_path / "out")]
    first, second = call(*command), call(*command)
    assert "again" not in first.stderr
    assert second.stderr == f"{tmp_path / 'out'} holds this run, finished; nothing is run again\n"
    assert second.stdout == first.stdout


def test_a_run_without_epochs_ends_without_a_traceback(tmp_path):
    result = call(*RUN[:-1], str(tmp_path / "out"), "--set", "epochs=0")
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_commands_explain_themselves():
    assert isinstance(main, click.Group)
    for command in main.commands:
        result = call(command, "-h")
        assert result.exit_code == 0
        assert main.commands[command].help.splitlines()[0] in result.stdout
