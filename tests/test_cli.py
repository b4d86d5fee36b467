"""The commands: what they list and run, and how they say what is wrong."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import warnings
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from math import inf, nan
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

import bnnlib
from bnnlib.cli import main
from bnnlib.cli.texts import as_text, parse_field, parse_settings
from bnnlib.errors import BnnlibWarning, InvalidValue
from bnnlib.experiments.experiment import FIELDS, MEANINGS
from bnnlib.experiments.originals import PUBLISHED, published
from bnnlib.experiments.variants import EXPERIMENTS, VARIANTS
from bnnlib.files import read_json, write_json
from bnnlib.history import History
from bnnlib.names import LOSSES, USED
from bnnlib.runs.folder import load_run
from bnnlib.runs.record import (
    HISTORY,
    RECORD,
    RESULTS,
    SURROUNDINGS,
    as_duration,
    is_finished,
)
from bnnlib.runs.result import differences
from bnnlib.sweeps.grid import parse_seeds

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


def test_each_field_is_described_with_its_value_and_its_meaning():
    changed = ("--set", "seed=7", "--set", "width=1")
    text = call("describe", "cifar10-dropout", "--profile", "full", *changed).stdout
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    for field, value in [("epochs", "1000"), ("dropout", "0.5,0.5"), ("dataset", "cifar10")]:
        assert f" {field} {value} {MEANINGS[field]} " in words
    assert words.endswith("steps 900000 training steps in all")
    starred = [line[2:24].strip() for line in text.splitlines() if line.startswith("*")]
    assert {"seed", "dropout"} <= set(starred)
    assert not {"name", "width", "loss", "steps"} & set(starred)


@pytest.mark.parametrize(
    "asked",
    [
        ("svhn-l2",),
        ("cifar10-dropout", "--profile", "smoke", "--set", "probes=flips", "--set", "epochs=1"),
        ("svhn-evaluation", "--profile", "smoke", "--set", "width=0.0625", "--set", "epochs=1"),
    ],
)
def test_what_is_described_is_what_is_run(asked, here, monkeypatch):
    described = json.loads(call("describe", *asked, "--json").stdout)
    asked_for = []
    monkeypatch.setattr("bnnlib.runs.run.run", lambda e, out, **_: asked_for.append(e))
    call("run", *asked)  # the last one, after what an evaluation scores
    e = asked_for[-1]
    assert described == json.loads(json.dumps(asdict(e))) | {
        "lr_decay": e.lr_decay,
        "steps": e.steps,
    }


def test_the_names_that_fields_take_are_listed_with_the_dictionaries_to_add_to():
    text = call("names").stdout
    assert max(map(len, text.splitlines())) <= 100
    assert re.search("^weights +QUANTIZERS +deterministic, stochastic, real", text, re.MULTILINE)
    assert re.search("^schedule +exponential, linear$", text, re.MULTILINE)
    assert json.loads(call("names", "--json").stdout)["loss"] == list(LOSSES)


# ------------------------------------------------------------------------------- help, in a shell


@pytest.mark.parametrize("name", main.commands)
def test_help_says_what_each_option_is_and_its_default(name):
    command = main.commands[name]
    with click.Context(command, show_default=True):
        for option in (p for p in command.params if isinstance(p, click.Option)):
            _, text = option.get_help_record(click.get_current_context())
            assert "default: " in text or option.is_flag or option.multiple, option.name
    lines = call("--help").stdout.split("Commands:\n")[1].splitlines()
    assert [line for line in lines if line.split()[0] == name and not line.endswith("...")]


def test_the_version_and_the_installed_command():
    assert call("--version").stdout.split()[-1] == bnnlib.__version__
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, attribute = project["scripts"]["bnnlib"].partition(":")
    assert getattr(import_module(module), attribute) is main


@pytest.mark.parametrize(
    ("words", "begun", "completion"),
    [
        (["describe"], "svhn-l2-g", "svhn-l2-gamma"),
        (["run", "svhn-l2", "--profile"], "qu", "quick"),
        (["run", "svhn-l2", "--use", "nothing.py", "--set"], "ep", "epochs="),
    ],
)
def test_a_shell_completes_names(words, begun, completion):
    complete = ShellComplete(main, {}, "bnnlib", "_BNNLIB_COMPLETE")
    assert [item.value for item in complete.get_completions(words, begun)] == [completion]


WITHOUT_TORCH = """
import json, sys
from click.testing import CliRunner
from bnnlib.cli import main
codes = [[CliRunner().invoke(main, words).exit_code, "torch" in sys.modules]
         for words in json.load(sys.stdin)]
print(json.dumps(codes))
"""


def test_what_needs_no_pytorch_does_not_load_it(tmp_path):
    stored = str(RESULTS / "svhn-l2" / "reduced-seed0")
    good = [
        *("--help", "--version", "list", "list --variants --json", "names", "run --help"),
        *("describe svhn-l2 --set seed=1", "describe svhn-evaluation", "show @", "compare @ @"),
        "results @",
    ]
    bad = [
        *("rnu", "describe svhn-l3", "describe svhn-l2 --profile quik", "run svhn-l2 --set x=1"),
        *("run svhn-l2 --set epochs=-1", "run svhn-l2 --device cud", "run svhn-l2 --precision x"),
        *("run svhn-l2 --seeds 2-1", "run svhn-l2 --set n_train=20", "run svhn-l2 --data no"),
        *("run svhn-l2 --set dataset=no.npz", "run svhn-l2 --out @", "show no", "plot @ no"),
        *("run svhn-evaluation --set run_folder=no", "run svhn-l2 --checkpoint-every nan"),
        *("evaluate @", "list --use no.py", "plot @ --out a.gif"),
        *("results no", "results @ --csv @"),
    ]
    commands = [*good, *bad, "plot @"]  # the last one, so that PyTorch is noticed
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input=json.dumps(
            [[word.replace("@", stored) for word in line.split()] for line in commands]
        ),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = dict(zip(commands, json.loads(result.stdout), strict=True))
    assert found.pop("plot @") == [0, True]
    assert [line for line in good if found[line] != [0, False]] == []
    assert [line for line in bad if found[line] not in ([1, False], [2, False])] == []


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
        (("run", "capacity", "--device", "cud"), "unknown device 'cud'; did you mean 'cuda'"),
        ((*RUN, "--out", ""), "--out must be the path of a folder, got ''"),
        (("svhn-subset", "--data", ""), "--data must be the path of a folder, got ''"),
        (("show", ""), "RUN must be the path of a folder, got ''"),
        ((*RUN, "--precision", "hlaf"), "unknown precision 'hlaf'; did you mean 'half'"),
        ((*RUN, "--checkpoint-every", "nan"), "must be 0 seconds or more, got nan"),
        ((*RUN, "--use", "mine.txt"), "a file to use must end in .py, got"),
        (
            ("plot", str(RESULTS), "--out", "e.pgn"),
            "unknown ending of --out '.pgn'; did you mean '.png'",
        ),
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


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("svhn-subset", "--data", "."), "SVHN is not in .*"),
        ((*RUN, "--data", "nowhere"), "--data: there is no folder nowhere"),
        ((*RUN, "--set", "dataset=my.npz"), "no file .*my.npz; a relative path is looked for.*"),
        (("show", "nowhere"), "nowhere holds no run .*: there is no experiment.json in it"),
        (("plot", str(RESULTS), "--out", "not/e.png"), "no folder not to write e.png in"),
        (("list", "--use", "mine.py"), "no file .*mine.py to use"),
    ],
)
def test_what_is_not_there_is_one_line_and_status_1(arguments, text, here):
    result = call(*arguments)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert re.fullmatch(f"Error: {text}\n", result.stderr)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_warning_is_one_line_and_a_signal_ends_a_command_quietly(number, here, monkeypatch):
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]

    def run(*_, **__):
        warnings.warn("it is late", BnnlibWarning, stacklevel=2)
        signal.raise_signal(number)

    monkeypatch.setattr("bnnlib.runs.run.run", run)
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


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_value_is_written_as_it_is_read(name):
    for field, value in vars(EXPERIMENTS[name]).items():
        assert parse_field(field, as_text(value)) == value


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0.054, "0.054 s"), (9.4, "9.4 s"), (59.4, "59 s"), (478, "7 min 58 s")],
        *[(3599.6, "1 h 0 min"), (370_000, "102 h 47 min"), (nan, "an unknown time")],
        *[(-1, "an unknown time"), (inf, "an unknown time")],
    ],
)
def test_a_time_has_at_most_two_units(seconds, text):
    assert as_duration(seconds) == text


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
    call(*RUN, "--seeds", "1", "--out", "both", "--set", "epochs=0")
    assert is_finished("both/seed1")


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


# -------------------------------------------------------------------------- looking at runs


def shown(folder, *options):
    """What `show` says of a run, by its titles."""
    result = call("show", str(folder), *options)
    assert result.exit_code == 0, result.output
    return dict(re.split("  +", line, maxsplit=1) for line in result.stdout.splitlines())


def edit_record(folder, *without, **changes):
    record = read_json(folder / RECORD)
    write_json(folder / RECORD, {k: v for k, v in record.items() if k not in without} | changes)


def unfinished(folder, epochs):
    """The folder of a finished run, as it was after so many epochs of 100 seconds."""
    edit_record(folder, "seconds", "history_sha256", "parameter_sha256")
    rows = History.load(folder / HISTORY).rows[:epochs]
    History([row | {"seconds": 100.0} for row in rows]).save(folder / HISTORY)
    return folder


def test_a_finished_run_shows_what_it_is_and_its_errors(finished):
    about, e, record = shown(finished.folder), finished.experiment, finished.record
    train, test = (100 * finished.history.last(f"{split}_error") for split in ("train", "test"))
    assert about["experiment"] == f"{e.name}: {e.summary}"
    assert about["made by"] == f"bnnlib run {e.name} --profile smoke"
    assert about["data"] == record["trained_on"]
    assert about["images"] == "100 in train, 100 in test"
    assert about["state"] == f"finished: 2 epochs in {as_duration(record['seconds'])}"
    assert about["errors"].endswith(
        f"train error {train:.1f} %  test error {test:.1f} %  (epoch 2)"
    )
    assert about["device"] == f"{record['device']}, 1 thread"
    assert about["versions"].startswith(f"bnnlib {bnnlib.__version__}, ")


def test_an_unfinished_run_shows_how_far_it_is_and_how_to_go_on(folder):
    continued = read_json(folder / RECORD)
    edit_record(unfinished(folder, 1), continued=[{k: continued[k] for k in SURROUNDINGS}])
    about = shown(folder)
    assert about["goes on by"].endswith(f"svhn-random-labels --profile smoke --out {folder}")
    expected = "under way: epoch 1 of 2 after 1 min 40 s, about 1 min 40 s left; written .* s ago"
    assert re.fullmatch(expected, about["state"])
    assert about["errors"].endswith("(epoch 1)")
    assert about["continued"] == f"1 time, last {continued['started']}"
    (folder / HISTORY).unlink()
    assert shown(folder)["state"].startswith("under way: in the first epoch of 2; written ")
    assert shown(folder)["errors"] == "none yet"


def test_the_command_that_is_shown_makes_the_run(here):
    call(*RUN, "--set", "epochs=1", "--set", "seed=3", "--set", "dropout=0.5, 0.25")
    first = Path("runs/svhn-random-labels/smoke-seed3")
    words = shlex.split(shown(first)["made by"])
    assert words[0] == "bnnlib"
    assert "without" not in call(*words[1:]).stderr  # the default folder holds this run
    assert "finished; nothing is run again" in call(*words[1:]).stderr


def test_two_runs_are_compared_by_settings_errors_and_bits(here):
    for seed in ("1", "2"):
        settings = (f"{name}={seed}" for name in ("seed", "corruption_seed"))
        settings = [word for setting in settings for word in ("--set", setting)]
        call(*RUN, "--out", f"two/seed{seed}", *settings, "--set", "epochs=12")
    text = call("compare", "two/seed1", "two/seed2").stdout
    one, other = (load_run(f"two/seed{seed}") for seed in (1, 2))
    rows = [line.split() for line in text.splitlines()]
    assert ["seed", "1", "2"] in rows
    assert not [row for row in rows if row[:1] == ["width"]]
    table = rows[rows.index(["epoch", "train", "A", "train", "B", "test", "A", "test", "B"]) + 1 :][
        :8
    ]
    assert [row[0] for row in table] == ["1", "3", "4", "6", "7", "9", "10", "12"]
    for epoch, *errors in table:
        expected = [
            r.history[f"{s}_error"][int(epoch) - 1] for s in ("train", "test") for r in (one, other)
        ]
        assert errors == [f"{100 * error:.2f}" for error in expected]
    assert f"A: loss {one.history.last('train_loss'):.3f}  train error " in text
    assert "equal bit for bit: images\ncolumns that differ: train_loss, train_mode_error, " in text
    same = call("compare", "two/seed1", "two/seed1").stdout
    assert same.endswith("\nequal bit for bit: history, times aside, images, labels, parameters\n")
    call(*RUN, "--out", "none", "--set", "epochs=0")
    text = call("compare", "two/seed1", "none").stdout
    assert "no epoch was evaluated in both" in text
    assert "B: no epoch yet" in text


def test_runs_are_drawn_into_a_new_file_and_nothing_is_overwritten(finished, folder, here):
    assert call("plot", str(finished.folder), str(folder)).stdout == "errors.png\n"
    picture = Path("errors.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    again = call("plot", str(folder))
    assert (again.exit_code, again.stderr) == (
        2,
        "Error: errors.png is there already; name another file with --out\n",
    )
    assert Path("errors.png").read_bytes() == picture
    drawn = call("plot", str(finished.folder), str(folder), "--out", "errors.svg")
    assert drawn.exit_code == 0, drawn.output
    assert Path("errors.svg").read_text().count("stroke-dasharray: 7.4,3.2") == 4  # lines, legend
    (unfinished(folder, 1) / HISTORY).unlink()
    assert "has no errors yet" in call("plot", str(folder), "--out", "none.png").stderr
    assert not Path("none.png").exists()


def test_a_run_is_scored_on_what_it_was_trained_on(finished, folder):
    error = 100 * finished.history.last("train_error")
    assert call("evaluate", str(folder)).stdout == f"train error {error:.2f} % on 100 images\n"
    assert call("evaluate", str(folder), "--rows", "1").stdout.endswith(" % on 1 image\n")
    refused = call("evaluate", str(unfinished(folder, 1)))
    assert refused.exit_code == 2
    assert "is not finished; `bnnlib show` says how far it is" in refused.stderr


# ------------------------------------------------------------------------ files of the user's

MINE = """
from bnnlib import LOSSES
from bnnlib.losses import hinge_loss
open("imports", "a").write("1")
LOSSES["mine"] = hinge_loss
"""


@pytest.fixture
def mine(here, monkeypatch):
    """A file that registers a loss, and keeps count of its imports."""
    monkeypatch.setattr(LOSSES, "data", dict(LOSSES.data))
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("imports").touch()
    Path("mine.py").write_text(MINE)
    yield "mine.py"
    USED.clear()


def forget():
    LOSSES.data.pop("mine", None)


def test_a_file_of_the_users_is_imported_where_it_is_named_and_only_there(mine):
    asked = (*RUN, "--set", "loss=mine", "--out", "out")
    assert "unknown loss 'mine'" in call(*asked).stderr
    assert call(*asked, "--use", mine).exit_code == 0
    uses = load_run("out").record["uses"]
    for words in (("show", "out"), ("compare", "out", "out"), ("plot", "out"), ("evaluate", "out")):
        forget()
        before = Path("imports").read_text()
        refused = call(*words)
        assert refused.exit_code == 2
        assert "was made with mine.py: name that file (--use FILE" in refused.stderr
        assert Path("imports").read_text() == before
        used = call(*words, "--use", mine)
        assert used.exit_code == 0, used.output
        assert Path("imports").read_text() == before + "1"
    assert shown("out")["uses mine.py"] == f"SHA-256 {uses['mine.py'][0][:12]}..."
    assert "--set loss=mine --use mine.py" in shown("out")["made by"]
    assert re.search("LOSSES .*, mine$", call("names").stdout, re.MULTILINE)
    assert '"mine"' in call("describe", "svhn-l2", "--set", "loss=mine", "--json").stdout


@pytest.mark.parametrize("name", ["uses", "versions"])
def test_no_name_of_a_record_steers_a_terminal(name, folder):
    value = {"uses": {"\x1b[2J": ["0"]}, "versions": {"\x1b[2J": "0"}}[name]
    edit_record(folder, **{name: value})
    refused = call("show", str(folder))
    assert (refused.exit_code, "\x1b" in refused.output) == (1, False)
