"""The table of runs: its rows, what it keeps, what it leaves out, and the runs behind it."""

import csv
import io
import json
import shutil
import sys
import warnings
from dataclasses import replace
from math import nan

import pandas as pd
import pytest
from click.testing import CliRunner
from pandas.testing import assert_frame_equal

from benchmarks.mutations import mutations
from bnnlib.cli import main
from bnnlib.cli.texts import parse_field
from bnnlib.errors import BnnlibWarning, DamagedFile, DataNotFound, InvalidValue, NotInstalled
from bnnlib.experiments.experiment import FIELDS
from bnnlib.experiments.profiles import PROFILES, at_profile
from bnnlib.experiments.variants import named
from bnnlib.runs import ledger
from bnnlib.runs.folder import load_run
from bnnlib.runs.ledger import (
    LEDGER,
    histories,
    load_runs,
    results,
    stored_runs,
    stored_table,
    write_ledger,
)
from bnnlib.runs.record import HISTORY, RECORD, RESULTS, profile_of, read_run

pytestmark = pytest.mark.filterwarnings("error::bnnlib.errors.BnnlibWarning")
BASE = at_profile(named("svhn-dropout"), "reduced")
ROWS = [
    {"epoch": epoch, "train_error": train, "test_error": test, "seconds": 0.5}
    for epoch, train, test in ((1, 0.9, 0.8), (2, 0.09, 0.85), (3, nan, nan), (4, 0.2, 0.9))
]


@pytest.fixture
def folder(write_run, tmp_path):
    """Two finished runs that differ in seed and width, and one that is under way."""
    root = tmp_path / "runs"
    write_run(root / "b" / "seed1", replace(BASE, seed=1), ROWS, seconds=2.5)
    write_run(root / "a", replace(BASE, width=0.25, dropout=()), ROWS[:2], seconds=1)
    write_run(root / "b" / "late", replace(BASE, seed=2, n_train=100), ROWS[:3])
    (root / "a" / "checkpoints").mkdir()
    shutil.copytree(root / "b" / "seed1", root / "a" / "checkpoints" / "no run")
    return root


@pytest.fixture
def reads(monkeypatch):
    """The folders that are read from now on."""
    found, read = [], ledger.read_row
    monkeypatch.setattr(ledger, "read_row", lambda path: found.append(path.name) or read(path))
    return found


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------- the rows


def expected_of(folder):
    """The outcome of a run, by Python's csv module alone."""
    record = json.loads((folder / RECORD).read_text())
    with (folder / HISTORY).open(newline="") as file:
        rows = list(csv.DictReader(file))
    row = {"experiment": record["experiment"]["name"], "seed": record["experiment"]["seed"]}
    for split in ("train", "test"):
        errors = [float(text) for r in rows if (text := r.get(f"{split}_error"))]
        row[f"{split}_error"] = errors[-1] if errors else nan
        row[f"best_{split}_error"] = min(errors) if errors else nan
    for percent in (50, 10, 1):
        reached = [r["epoch"] for r in rows if float(r["train_error"] or 1) <= percent / 100]
        row[f"epochs_to_{percent}"] = int(reached[0]) if reached else pd.NA
    row |= {name: record[name] for name in ("device", "threads", "started", "seconds")}
    row |= {"images": record["images"]["train"], "version": record["versions"]["bnnlib"]}
    return row | {"digest": record["experiment_sha256"], "epochs_done": int(rows[-1]["epoch"])}


def test_a_row_says_what_the_files_of_its_run_say():
    table = results()
    paths = {path.parent for path in RESULTS.rglob(RECORD)}
    assert [RESULTS / run for run in table.index] == sorted(paths)
    for run, row in table.iterrows():
        expected = pd.Series(expected_of(RESULTS / run), name=run)
        pd.testing.assert_series_equal(row[expected.index], expected, check_dtype=False)
        experiment, _, _ = read_run(RESULTS / run)
        assert row["profile"] == profile_of(experiment)
        for name in FIELDS.keys() & row.index:
            value = row[name]
            if isinstance(value, str) and isinstance(getattr(experiment, name), tuple):
                value = parse_field(name, value)  # as `--set` takes it
            assert (None if pd.isna(row[name]) else value) == getattr(experiment, name)


def test_of_the_settings_there_are_those_that_differ(folder):
    table = results(folder)
    assert list(table.index) == ["a", "b/seed1"]
    settings = [name for name in table if name in FIELDS]
    assert settings == ["seed", "width", "dropout"]
    assert table["dropout"].tolist() == ["", "0.25,0.5"]
    assert table["profile"].tolist() == ["own", "reduced"]
    assert set(results(folder / "a")) & set(FIELDS) == {"seed"}


def test_the_best_error_and_the_last_one_are_those_of_evaluated_epochs(folder):
    row = results(folder).loc["b/seed1"]
    names = ("train_error", "test_error", "best_train_error", "best_test_error")
    assert tuple(row[[*names]]) == (0.2, 0.9, 0.09, 0.8)
    assert (row["epochs_to_50"], row["epochs_to_10"], row["epochs_done"]) == (2, 2, 4)
    assert row["epochs_to_1"] is pd.NA


def test_unfinished_runs_are_asked_for(folder, write_run):
    begun = write_run(folder / "begun", replace(BASE, seed=5), [])
    (begun / HISTORY).unlink()
    table = results(folder, unfinished=True)
    assert table["finished"].to_dict() == {"a": True, "b/late": False, "b/seed1": True} | {
        "begun": False
    }
    late = table.loc["b/late"]
    assert (late["train_error"], late["epochs_done"], late["seconds"]) == (0.09, 3, 1.5)
    assert late["n_train"] == 100
    assert table.loc["a", "n_train"] is pd.NA  # None: all of them
    assert table.loc["begun", ["epochs_done", "seconds"]].tolist() == [0, 0]
    assert pd.isna(table.loc["begun", "best_test_error"])


@pytest.mark.parametrize("profile", PROFILES)
def test_every_row_knows_its_profile_and_what_it_was_made_with(profile, write_run, tmp_path):
    e = replace(at_profile(named("cifar10-noise-25"), profile), seed=3, data_seed=4)
    uses = {"mine.py": ["a" * 64, "b" * 64], "other.py": ["c" * 64]}
    write_run(tmp_path / "run", e, ROWS, seconds=1.0, uses=uses)
    row = results(tmp_path).iloc[0]
    assert row["profile"] == profile
    assert row["uses"] == f"mine.py:{'a' * 12}, mine.py:{'b' * 12}, other.py:{'c' * 12}"


def test_a_folder_without_runs_is_an_empty_table_and_no_folder_is_an_error(tmp_path):
    assert len(results(tmp_path)) == len(load_runs(results(tmp_path))) == 0
    with pytest.raises(DataNotFound, match=f"no folder {tmp_path / 'no'} to look for runs in"):
        results(tmp_path / "no")


def test_a_damaged_run_is_named_and_hides_no_other(folder):
    (folder / "b" / "seed1" / HISTORY).write_text("epoch,train_error\n1\n")
    with pytest.warns(BnnlibWarning, match=r"left out of the table: .*seed1.* shorter") as caught:
        assert list(results(folder).index) == ["a"]
    assert len(caught) == 1
    for i in range(5):
        (folder / f"{i}").mkdir()
        (folder / f"{i}" / RECORD).write_text("{")
    with pytest.warns(BnnlibWarning, match=r"/0/experiment.*/2/experiment.*; and 3 more") as caught:
        results(folder)
    assert len(caught) == 1


def test_a_folder_whose_name_cannot_be_shown_is_left_out(folder):
    try:
        (folder / "a").rename(folder / "a\x1b[2J")
    except OSError:
        pytest.skip("no such names here")
    with pytest.warns(BnnlibWarning, match="left out") as caught:
        assert list(results(folder).index) == ["b/seed1"]
    assert str(caught[0].message).isprintable()


# ------------------------------------------------------------------------------ what is kept


def test_rows_are_kept_until_a_file_of_their_run_changes(folder, write_run, reads):
    before = results(folder, unfinished=True)
    assert write_ledger(folder) == folder / LEDGER
    reads.clear()
    kept = files_in(folder)
    assert_frame_equal(results(folder, unfinished=True), before)
    assert reads == []
    write_run(folder / "b" / "late", replace(BASE, seed=2, n_train=100), ROWS, seconds=3.0)
    write_run(folder / "new", BASE, ROWS, seconds=1.0)
    shutil.rmtree(folder / "a")
    table = results(folder)
    assert reads == ["late", "new"]
    assert list(table.index) == ["b/late", "b/seed1", "new"]
    assert table.loc["b/late", "train_error"] == 0.2
    assert (folder / LEDGER).read_bytes() == kept[folder / LEDGER]  # nothing but asking writes
    write_ledger(folder)
    reads.clear()
    assert_frame_equal(results(folder), table)
    assert reads == []


def test_nothing_is_written_by_looking(folder):
    before = files_in(folder)
    load_runs(results(folder, unfinished=True))
    stored_runs(folder=folder)
    assert files_in(folder) == before


def parquet(**columns):
    return pd.DataFrame(columns).to_parquet()


STRANGERS = {
    "no Parquet": (b"PAR1 and no more PAR1", "is no Parquet file that can be read"),
    "empty": (b"", "is no Parquet file that can be read"),
    "another table": (parquet(run=["a"], train_error=[0.0]), "is no ledger of this version"),
}


@pytest.mark.parametrize(("content", "reason"), STRANGERS.values(), ids=STRANGERS)
def test_what_is_no_ledger_is_passed_over_with_a_warning(content, reason, folder, reads):
    before = results(folder)
    (folder / LEDGER).write_bytes(content)
    reads.clear()
    with pytest.warns(BnnlibWarning, match=rf"{LEDGER} {reason}.*; the runs are read instead"):
        assert_frame_equal(results(folder), before)
    assert sorted(reads) == ["a", "late", "seed1"]
    with pytest.warns(BnnlibWarning, match=reason):
        write_ledger(folder)
    assert_frame_equal(results(folder), before)


def test_a_ledger_of_another_format_is_passed_over(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "FORMAT", b"0")
        write_ledger(folder)
    with pytest.warns(BnnlibWarning, match="is no ledger of this version"):
        results(folder)


def test_a_ledger_with_text_that_cannot_be_shown_is_passed_over(folder, monkeypatch):
    before = results(folder)
    rows = [row | {"device": "\x1b[2J"} for row in ledger._rows(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_rows", lambda folder: rows)
        write_ledger(folder)
    with pytest.warns(BnnlibWarning, match="text that cannot be shown"):
        assert_frame_equal(results(folder), before)


def test_a_folder_in_place_of_the_ledger_is_passed_over(folder):
    (folder / LEDGER).mkdir()
    with pytest.warns(BnnlibWarning, match="cannot be read"):
        assert len(results(folder)) == 2


def test_a_damaged_ledger_changes_no_row(folder):
    before = results(folder)
    content = write_ledger(folder).read_bytes()
    for damaged in mutations(content, 100, seed=0):
        (folder / LEDGER).write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BnnlibWarning)
            assert_frame_equal(results(folder), before)


def test_without_pyarrow_the_folders_are_enough(folder, monkeypatch):
    before = results(folder)
    write_ledger(folder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_frame_equal(results(folder), before)
    for ask in (lambda: write_ledger(folder), lambda: ledger.as_parquet(before)):
        with pytest.raises(NotInstalled, match=r"pip install '.\[sweep\]'"):
            ask()


# ---------------------------------------------------------------------------- the runs of rows


def test_a_table_is_read_again_from_csv_and_parquet(folder):
    table = results(folder, unfinished=True)
    again = pd.read_parquet(io.BytesIO(ledger.as_parquet(table)))
    assert_frame_equal(again, table)
    assert [run.folder for run in load_runs(again)] == [folder / run for run in table.index]
    text = io.StringIO(table.to_csv())
    again = pd.read_csv(text, index_col="run", dtype=dict(table.dtypes), keep_default_na=True)
    texts = [name for name in table if pd.api.types.is_string_dtype(table[name])]
    again[texts] = again[texts].fillna("")
    assert_frame_equal(again, table, check_dtype=False)


def test_the_runs_of_some_rows_are_loaded_in_their_order_and_no_others(folder):
    table = results(folder, unfinished=True)
    (folder / "a" / HISTORY).unlink()
    chosen = table[table["seed"] > 0].sort_values("seed", ascending=False)
    assert [run.experiment.seed for run in load_runs(chosen)] == [2, 1]
    for rows in (table.query("seed == 1"), table.loc[["b/seed1"]], table[table["seed"] == 1]):
        assert [run.folder for run in load_runs(rows)] == [folder / "b" / "seed1"]
    with pytest.raises(DataNotFound, match=r"no history\.csv"):
        load_runs(table)
    for lost in (table.reset_index(), pd.DataFrame(table.to_dict("list"), table.index)):
        with pytest.raises(InvalidValue, match="does not say where its runs are"):
            load_runs(lost)


def test_histories_are_read_as_they_are_asked_for(folder, write_run, monkeypatch):
    for i in range(20):
        write_run(folder / "more" / f"{i:02}", replace(BASE, seed=10 + i), ROWS, seconds=1.0)
    table = results(folder)
    read, begun = ledger.read_run, []
    monkeypatch.setattr(ledger, "read_run", lambda path: begun.append(path) or read(path))
    found = histories(table)
    assert begun == []
    run, history = next(found)
    assert (run, len(history)) == ("a", 2)
    assert 0 < len(begun) <= ledger.AHEAD < len(table)
    found.close()
    every = dict(histories(table))
    assert list(every) == list(table.index)
    assert every["b/seed1"]["train_error"][:2] == [0.9, 0.09]


def test_stored_runs_are_of_one_name_and_one_profile(folder):
    assert [run.experiment.seed for run in stored_runs(folder=folder)] == [1]
    assert len(stored_runs("svhn-dropout", None, folder)) == 2
    assert len(stored_runs("svhn-dropout", "own", folder)) == 1
    assert stored_runs("svhn-float", None, folder) == stored_runs(None, "full", folder) == []
    with pytest.raises(InvalidValue, match="'ful'; did you mean 'full'"):
        stored_runs(None, "ful", folder)
    assert (
        stored_runs("svhn-dropout")[0].record
        == load_run(RESULTS / "svhn-dropout" / "reduced-seed0").record
    )


def test_a_run_that_was_damaged_since_is_refused_when_it_is_loaded(folder):
    table = results(folder)
    (folder / "a" / RECORD).write_text("{}")
    with pytest.raises(DamagedFile, match="describes no run"):
        load_runs(table)


# ------------------------------------------------------------------------------- the command


def call(*arguments):
    return CliRunner().invoke(main, ["results", *map(str, arguments)])


def test_the_command_shows_a_table(folder, write_run):
    lines = call(folder).stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["experiment", "profile", "seed", "train", "%", "test", "%", "to", "10", "%", "time"],
        ["svhn-dropout", "own", "0", "9.00", "85.00", "2", "1", "s"],
        ["svhn-dropout", "reduced", "1", "20.00", "90.00", "2", "2.5", "s"],
    ]
    write_run(folder / "c", replace(BASE, seed=7), [{"epoch": 1}], seconds=9000.0)
    write_run(folder / "d", replace(BASE, corruption_seed=7), ROWS, seconds=5.0)
    header, _, fourth, _, third = call(folder).stdout.splitlines()  # sorted by seed
    assert header.split()[:4] == ["experiment", "profile", "seed", "corruption_seed"]
    assert third.split()[1:] == ["reduced", "7", "0", *"---", "2", "h", "30", "min"]
    assert fourth.split()[1:4] == ["reduced", "0", "7"]


def test_a_table_that_is_too_long_or_too_wide_says_what_is_missing(folder, write_run):
    for i in range(60):
        changes = {"seed": i, "corruption_seed": i, "lr_start": 1e-3 + i / 1e7, "epochs": 100 + i}
        changes |= {"evaluate_every": 1 + i, "random_labels": 1 - i / 100, "l2": i / 1e3}
        write_run(folder / "more" / str(i), replace(BASE, **changes), ROWS, seconds=1.0)
    lines = call(folder).stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-2] == "and 22 runs more: --csv FILE has all"
    assert lines[-1].startswith("no room for ")
    assert "corruption_seed: --csv FILE has them" in lines[-1]


def test_the_command_writes_new_files_and_a_ledger(folder, tmp_path):
    csv_file, parquet_file = tmp_path / "all.csv", tmp_path / "all.parquet"
    assert call(folder, "--csv", csv_file, "--parquet", parquet_file).stdout.split() == [
        str(csv_file),
        str(parquet_file),
    ]
    assert csv_file.read_text() == results(folder).to_csv()
    assert_frame_equal(pd.read_parquet(parquet_file), results(folder))
    for option in ("--csv", "--parquet"):
        before = csv_file.read_bytes()
        result = call(folder, option, csv_file)
        assert result.exit_code == 2
        assert f"is there already; name another file with {option}" in result.stderr
        assert csv_file.read_bytes() == before
    for _ in range(2):  # what is derived is replaced
        assert call(folder, "--ledger").stdout == f"{folder / LEDGER}\n"
    assert call(tmp_path / "no").exit_code == 1
    (tmp_path / "empty").mkdir()
    assert call(tmp_path / "empty").stdout == f"no finished run in {tmp_path / 'empty'}\n"


# ------------------------------------------------------------------------------- stored tables


@pytest.fixture
def tables(tmp_path):
    """A folder for tables, and what writes one of them."""

    def write(content, name="t"):
        path = tmp_path / "tables" / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path.parent

    return write


def test_a_table_that_was_written_as_csv_is_read_as_it_was(folder, tables):
    table = results(folder)
    assert_frame_equal(stored_table("t", tables(table.to_csv())), table)
    written = table.assign(bits=[1.5, nan], rule=["SBPI", ""], won=[True, False])
    read = stored_table("t", tables(written.to_csv()))
    assert_frame_equal(read[list(table.columns)], table)
    assert read["bits"].tolist()[0] == 1.5
    assert read["bits"].isna().tolist() == [False, True]
    assert read["won"].tolist() == [True, False]


def test_a_table_may_have_other_columns_than_runs(tables):
    table = stored_table("t", tables("seed,rule,bits\n0,SBPI,0.7\n1,Hebb,0.3\n"))
    assert table.query("rule == 'SBPI'").to_dict("records") == [
        {"seed": 0, "rule": "SBPI", "bits": 0.7}
    ]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "seed,bits\n",
        "seed,bits\n1\n",
        "seed,bits\n1,2,3\n",
        "seed,seed\n1,2\n",
        'seed,bits\n"1,2\n',
        "seed,bits\none,2\n",
        "seed,bits\n1.5,2\n",
        "seed,\x1b[31m\n1,2\n",
        b"\xff\xfe",
    ],
)
def test_what_is_no_table_is_refused(content, tables):
    with pytest.raises(DamagedFile, match=r"t\.csv"):
        stored_table("t", tables(content))


@pytest.mark.parametrize("name", ["chaso", "../t", "", "/etc/passwd", None])
def test_a_table_that_is_not_there_is_named_with_those_that_are(name, tables, tmp_path):
    folder = tables("seed\n1\n", "chaos")
    with pytest.raises(DataNotFound, match=r"no table .*\(there are: chaos\)"):
        stored_table(name, folder)
    with pytest.raises(DataNotFound, match=r"\(there are: none\)"):
        stored_table(name, tmp_path / "nowhere")
