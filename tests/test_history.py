import re
from math import inf, isnan, nan

import pytest

import bnnlib.files
from bnnlib.errors import DamagedFile, InvalidValue
from bnnlib.history import History, read_table

LONG = History(
    [
        {"epoch": 1, "learning_rate": 1e-3, "train_loss": 1 / 3, "train_error": nan},
        {"epoch": 2, "learning_rate": 5e-4, "train_loss": 2e-30, "train_error": 0.25},
    ]
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history.csv"


def test_history_is_read_as_it_was_written(path):
    LONG.save(path)
    loaded = History.load(path)
    assert [list(row) for row in loaded.rows] == [list(row) for row in LONG.rows]
    for row, saved in zip(loaded.rows, LONG.rows, strict=True):
        assert list(row.values()) == pytest.approx(list(saved.values()), rel=1e-8, nan_ok=True)
        assert isinstance(row["epoch"], int)
    assert [file.name for file in path.parent.iterdir()] == ["history.csv"]


def test_rows_of_different_columns_are_kept_with_gaps(path):
    history = History([{"epoch": 1, "late": nan}, {"epoch": 2, "b": 0.5}, {"a": 3.0, "epoch": 3}])
    assert history.columns == ["epoch", "late", "b", "a"]
    history.save(path)
    assert path.read_text().split() == ["epoch,late,b,a", "1,,,", "2,,0.5,", "3,,,3"]
    loaded = History.load(path)
    assert loaded.columns == history.columns
    for column in history.columns:
        assert loaded[column] == pytest.approx(history[column], nan_ok=True)


def test_what_was_loaded_is_saved_without_a_change(path):
    LONG.save(path)
    again = path.with_name("again.csv")
    History.load(path).save(again)
    assert path.read_bytes() == again.read_bytes()


def test_a_history_without_epochs_is_kept_too(path):
    History().save(path)
    assert History.load(path).rows == []
    assert isnan(History().last("train_error"))


def test_columns_by_name():
    history = History([{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0}])
    assert len(history) == 2
    assert history["train_loss"] == [2.0, 1.0]
    assert history.last("train_loss") == 1.0
    with pytest.raises(InvalidValue, match="'trainloss'; did you mean 'train_loss'"):
        history["trainloss"]


def test_a_table_of_numbers_need_not_be_a_history(path):
    path.write_text("bits,width\n1,inf\r\n-2.5,\n")
    first, second = read_table(path)
    assert first == {"bits": 1, "width": inf}
    assert second["bits"] == -2.5
    assert isnan(second["width"])


NO_TABLE = {
    "a short row": ("a,b\n1,2\n3\n", "line 3 has 1 cells, the header 2"),
    "a long row": ("a,b\n1,2,3\n", "line 2 has 3 cells, the header 2"),
    "an empty row": ("a,b\n\n1,2\n", "line 2 has 0 cells, the header 2"),
    "words": ("a,b\n1,two\n", "line 2: \"could not convert string to float: 'two'\""),
    "a code": ("a\n\x1b[2J\n", "line 2: .*x1b"),
    "one name twice": ("a,b,a\n1,2,3\n", "two columns have one name"),
    "a name of codes": ("a,\x1b[2J\n1,2\n", r"a column has the name '\\x1b\[2J'"),
    "a long name": ("a" * 101 + "\n1\n", "a column has the name 'aaa"),
    "no name": ("a,\n1,2\n", "a column has the name ''"),
    "a long cell": ("a\n" + "1" * 200_000 + "\n", "field limit"),
    "half a quote": ('a\n"1\n', "unexpected end of data"),
}


@pytest.mark.parametrize(("text", "reason"), NO_TABLE.values(), ids=NO_TABLE)
def test_what_is_no_table_of_numbers_is_refused_with_the_line(text, reason, path):
    path.write_text(text)
    with pytest.raises(DamagedFile) as caught:
        read_table(path)
    assert re.match(f"{path} is not a table of numbers: .*{reason}", str(caught.value))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["loss\n1\n", "epoch,loss\n,1\n", "epoch\n1.5\n", "epoch\ninf\n"])
def test_a_history_without_whole_epochs_is_refused(text, path):
    path.write_text(text)
    with pytest.raises(DamagedFile, match=r"history\.csv is no history: a row has no epoch"):
        History.load(path)


def test_a_table_of_very_many_rows_is_refused_before_they_are_made(path, monkeypatch):
    monkeypatch.setattr(bnnlib.files, "MAX_VALUES", 1000)
    path.write_text("epoch\n" + "1\n" * 500)
    assert len(read_table(path)) == 500
    path.write_text("epoch\n" + "1\n" * 1000)
    monkeypatch.setattr("csv.reader", None)
    with pytest.raises(DamagedFile, match=r"history\.csv holds more than 1,000 values"):
        read_table(path)


def test_whole_numbers_keep_every_digit_and_exact_ones_every_bit(tmp_path):
    row = {"epoch": 1, "seed": 2**40, "larger": 2**60 + 1, "width": 1 / 3, "binary": True}
    History([row]).save(tmp_path / "a.csv", exact=True)
    assert read_table(tmp_path / "a.csv") == [row]
    History([row]).save(tmp_path / "a.csv")
    assert read_table(tmp_path / "a.csv") == [row | {"width": 0.333333333}]


def test_chance_is_that_of_the_classes_whose_errors_were_counted():
    columns = {f"{split}_error_class_{i}": nan for split in ("train", "test") for i in range(4)}
    assert History([{"epoch": 1, **columns}]).chance == 0.75
    assert History([{"epoch": 1, "train_error": 0.5}]).chance == 0.9
