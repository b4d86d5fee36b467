"""The commands: what they list and run, and how they say what is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from bnnlib.cli import main, parse_field, parse_seeds, parse_settings
from bnnlib.errors import BnnlibWarning, InvalidValue
from bnnlib.experiments.experiment import FIELDS
from bnnlib.experiments.originals import PUBLISHED, published
from bnnlib.experiments.variants import EXPERIMENTS, VARIANTS
from bnnlib.runs.folder import is_finished, load_run
from bnnlib.runs.result import differences

RUN = ("run", "svhn-random-labels", "--profile", "smoke")
EVALUATE = ("run", "svhn-evaluation", "--profile", "smoke")
in_shell = partial(subprocess.run, stderr=subprocess.PIPE, text=True)


def call(*arguments):
    return CliRunner().invoke(main, arguments, prog_name="python -m bnnlib")


def command(*arguments):
    return [sys.executable, "-m", "bnnlib", *arguments]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------ list and describe


@pytest.mark.parametrize(("options", "listed"), [((), PUBLISHED), (("--variants",), VARIANTS)])
def test_each_experiment_is_listed_in_a_line_or_with_every_field(options, listed):
    lines = call("list", *options).stdout.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        [e.name, e.summary] for e in listed.values()
    ]
    entries = json.loads(call("list", *options, "--json").stdout)
    assert [entry["name"] for entry in entries] == list(listed)
    for entry, e in zip(entries, listed.values(), strict=True):
        assert entry.keys() == FIELDS.keys() | {"lr_decay", "steps"}
        assert (entry["script"], entry["steps"]) == (e.script, e.steps)
        assert entry["lr_decay"] == e.lr_decay


def test_every_field_is_described_at_a_profile():
    lines = call("describe", "cifar10-dropout").stdout.splitlines()
    shown = {line[:23].strip(): line[23:] for line in lines}
    assert shown.keys() == FIELDS.keys() | {"lr_decay", "steps"}
    assert (shown["epochs"], shown["dropout"], shown["dataset"]) == (
        "1000",
        "(0.5, 0.5)",
        "cifar10",
    )
    assert "shapes" in call("describe", "cifar10-dropout", "--profile", "smoke").stdout


# ------------------------------------------------------------- output that nobody can read


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a full disk")
@pytest.mark.parametrize("arguments", [("list",), ("list", "--json"), ("--help",)])
def test_output_that_cannot_be_written_is_one_line_and_status_1(arguments):
    with open("/dev/full", "w") as target:
        result = in_shell(command(*arguments), stdout=target)
    assert result.returncode == 1
    assert result.stderr == "Error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [("list", "--json"), ("--help",)])
def test_a_closed_pipe_is_silent(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    result = in_shell(command(*arguments), stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


# --------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("rnu",), "Did you mean 'run'"),
        (("describe", "svhn-droput"), "did you mean 'svhn-dropout'"),
        (("run", "svhn-l2", "--profile", "quik"), "did you mean 'quick'"),
        ((*RUN, "--set", "epoch=3"), "unknown field 'epoch'; did you mean 'epochs'"),
        ((*RUN, "--set", "epochs"), "--set takes field=value, got 'epochs'"),
        ((*RUN, "--set", "epochs=none"), "epochs takes a whole number, got 'none'"),
        ((*RUN, "--set", "epochs=" + "9" * 5000), "epochs takes a whole number, got '999"),
        ((*RUN, "--set", "binary=yes"), "binary takes true or false, got 'yes'"),
        ((*RUN, "--set", "dropout=a,b"), "dropout takes a number, or several with commas"),
        ((*RUN, "--set", "probes=[flips]"), "or nothing: `probes=`, got '[flips]'"),
        ((*RUN, "--set", "dropout=None"), "or nothing: `dropout=`, got 'None'"),
        ((*RUN, "--set", "seed=1", "--set", " seed =1"), "--set gives seed twice, the second time"),
        ((*RUN, "--set", "n_train=20"), "20 images do not fill one batch of 50; use a batch_size"),
        ((*RUN, "--seeds", "0-2,1"), "--seeds names a seed twice: '0-2,1'"),
        ((*RUN, "--seeds", "1", "--set", "seed=2"), "--seeds gives seed, so --set cannot"),
        ((*RUN, "--seeds", "0," + "9" * 19), "seed must be 0 to 9,223,372,036,854,775,807"),
        (("capacity", "--device", "cud"), "unknown device 'cud'; did you mean 'cuda'"),
        ((*RUN, "--out", ""), "--out must be the path of a folder, got ''"),
        (("svhn-subset", "--data", ""), "--data must be the path of a folder, got ''"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name_and_status_2(arguments, text, here):
    result = call(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)  # not a traceback
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert text in errors[0]
    assert result.stderr.endswith(errors[0] + "\n")
    assert list(here.iterdir()) == []


def test_what_is_not_there_is_one_line_and_status_1(here):
    result = call("svhn-subset", "--data", ".")
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert re.fullmatch("Error: SVHN is not in .*\n", result.stderr)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_warning_is_one_line_and_a_signal_ends_a_command_quietly(number, here, monkeypatch):
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]

    def run(*_, **__):
        warnings.warn("it is late", BnnlibWarning, stacklevel=2)
        signal.raise_signal(number)

    monkeypatch.setattr("bnnlib.cli.run", run)
    result = call(*RUN)
    assert (result.exit_code, result.stderr) == (130, "Warning: it is late\ninterrupted\n")
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before


# ------------------------------------------------------------------------- texts to values


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("epochs", "3", 3),
        ("lr_final", "1e-6", 1e-6),
        ("binary", "False", False),
        ("binary", "true", True),
        ("n_train", "none", None),
        ("n_train", " 100 ", 100),
        ("dropout", "0.25, 0.5", (0.25, 0.5)),
        ("dropout", "", ()),
        ("probes", "flips, parts", ("flips", "parts")),
        ("dataset", "my=set.npz", "my=set.npz"),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(field, text, value):
    parsed = parse_field(field, text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("text", ["", "nan", "-1", "1e999", "\x1b[2J", "x" * 2000, "train,train"])
def test_any_text_for_any_field_is_taken_or_refused_in_one_line(field, text):
    try:
        changed = replace(published("svhn-l2"), **parse_settings((f"{field}={text}",)))
    except InvalidValue as error:
        message = str(error)
        assert re.search(rf"\b{field}\b", message)
    else:
        message = str(vars(changed))
    assert message.isprintable()


@pytest.mark.parametrize(
    ("text", "seeds"), [("4", [4]), ("0-2,5", [0, 1, 2, 5]), (" 7 , 2-3", [7, 2, 3])]
)
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert parse_seeds(text) == seeds
    assert len(parse_seeds("0-999")) == 1000


@pytest.mark.parametrize("text", ["1,,2", "a", "", "1,-2", "0-", "5-2", "1.0", "7,1001-2000"])
def test_other_seeds_are_refused(text):
    with pytest.raises(InvalidValue, match=f"--seeds takes at most 1,000 .* got '{text}'"):
        parse_seeds(text)


# ----------------------------------------------------------------------------------- running


def test_in_a_shell_a_run_ends_with_its_errors_and_its_folder(tmp_path):
    setting = ("--set", "corruption_seed=5", "--device", "cpu")
    result = in_shell(command(*RUN, "--out", "out", *setting), stdout=subprocess.PIPE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    errors, folder = result.stdout.splitlines()
    assert folder == "out"
    assert "train error" in errors
    assert "epoch 2/2" in result.stderr  # in lines, since no terminal is there
    assert load_run(tmp_path / "out").experiment.corruption_seed == 5


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_form_of_seconds(name, here):
    result = call("run", name, "--profile", "smoke", "--device", "cpu")
    assert result.exit_code == 0, result.output
    kept = load_run(f"runs/{name}/smoke-seed0")
    assert kept.experiment.name == name
    assert "seconds" in kept.record
    assert "train error" in result.stdout


def test_each_of_several_seeds_is_the_run_that_it_is_alone(here):
    assert call(*RUN, "--seeds", "1-2").exit_code == 0
    call(*RUN, "--out", "alone", "--set", "seed=2", "--set", "corruption_seed=2")
    first, second = (load_run(f"runs/svhn-random-labels/smoke-seed{seed}") for seed in (1, 2))
    assert differences(second, load_run("alone")) == []
    assert {"conv1.weight", "train"} <= set(differences(first, second))
    call(*RUN, "--seeds", "1,2", "--out", "both", "--set", "epochs=0")
    assert [is_finished(f"both/seed{seed}") for seed in (1, 2)] == [True, True]


def test_a_finished_run_is_named_as_such_with_the_options_that_had_no_effect(tmp_path):
    out = str(tmp_path / "out")
    options = ("--device", "cpu", "--checkpoint-every", "300", "--data", ".", "--download")
    first, second = (call(*RUN, "--out", out, *options) for _ in range(2))
    assert not re.search("again|without effect", first.stderr)
    assert second.stderr == (
        f"{out} holds this run, finished; nothing is run again\n"
        "without effect on a finished run: --device, --checkpoint-every, --download, --data\n"
    )
    assert second.stdout == first.stdout


def test_a_run_without_epochs_was_not_trained(here):
    assert call(*RUN, "--out", "out", "--set", "epochs=0").stdout == "not trained\nout\n"


# -------------------------------------------------------------------------- an evaluation


def test_an_evaluation_trains_the_run_it_needs_once_and_with_the_same_settings(here):
    own = ("--set", "seed=3", "--set", "corruption_seed=4", "--set", "width=0.0625")
    own += ("--set", "epochs=1", "--set", "evaluation_rows=60")
    first = call(*EVALUATE, *own)
    assert "evaluates runs/svhn-random-labels/smoke-seed3; any other: --set" in first.stderr
    source = load_run("runs/svhn-random-labels/smoke-seed3")
    scored = load_run("runs/svhn-evaluation/smoke-seed3").experiment
    trained = source.experiment
    assert (trained.seed, trained.corruption_seed, trained.width) == (3, 4, 0.0625)
    assert (trained.epochs, trained.evaluation_rows) == (1, None)
    assert (scored.width, scored.epochs, scored.evaluation_rows) == (0.0625, 0, 60)
    again = call(*EVALUATE, *own, "--out", "again")
    assert again.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    assert load_run("again").experiment.run_folder == "runs/svhn-random-labels/smoke-seed3"
    assert load_run("runs/svhn-random-labels/smoke-seed3").record == source.record


def test_a_finished_evaluation_is_read_and_no_run_is_trained_for_it(here):
    narrow = ("--set", "width=0.0625")
    first = call(*EVALUATE, *narrow)
    (here / "runs" / "svhn-random-labels").rename(here / "gone")
    again = call(*EVALUATE, *narrow)
    assert again.stdout == first.stdout
    assert again.stderr.endswith("smoke-seed0 holds this run, finished; nothing is run again\n")
    assert again.stderr.count("\n") == 1
    for other in ((), ("--set", "width=0.125")):  # as the profile has it
        refused = call(*EVALUATE, *other)
        assert refused.exit_code == 2
        assert "width (0.0625 there, 0.125 asked for); choose another" in refused.stderr


def test_nothing_is_trained_for_an_evaluation_that_has_no_place(here):
    (here / "notes").mkdir()
    (here / "notes" / "mine.txt").touch()
    refused = call(*EVALUATE, "--out", "notes")
    assert refused.stderr == "Error: notes holds something that is no run; choose another folder\n"
    assert [path.name for path in here.iterdir()] == ["notes"]


def test_an_evaluation_refuses_settings_that_its_run_has_not(here):
    call(*RUN, "--out", "base")
    evaluate = ("run", "svhn-evaluation", "--profile", "reduced", "--set", "run_folder=base")
    refused = call(*evaluate, "--set", "width=0.5")  # also where the profile says the same
    assert refused.exit_code == 2
    assert "so width can only be 0.125, got 0.5\n" in refused.stderr
    assert not (here / "runs").exists()
    kept = call(*evaluate, "--set", "width=0.125", "--precision", "half")
    assert kept.exit_code == 0, kept.output
    assert call(*evaluate, "--set", "width=0.5").stderr == refused.stderr
    assert call(*evaluate).stdout == kept.stdout
    scored = load_run("runs/svhn-evaluation/reduced-seed0")
    assert (scored.experiment.width, scored.experiment.dataset) == (0.125, "glyphs")
    assert scored.record["device"].endswith(", half precision")
