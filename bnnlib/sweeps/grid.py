"""A grid: a TOML file that names experiments, or chapters, and what is varied, as a list of tasks.

    profile = "reduced"                       # of all tables that name none

    [[runs]]                                  # every combination of what stands in a table
    experiments = ["cifar10-noise-50", "cifar10-true-labels"]
    seeds = "0-4"                             # each as seed and corruption_seed
    set = { evaluate_every = 10 }             # alike in all
    product = { width = [0.25, 0.5], binary = [true, false] }     # each with each
    zip = { n_train = [500, 2000], epochs = [120, 60] }           # the first with the first, ...
    list = [{ l2 = 5e-4 }, { l2 = 5e-5, l2_target = "weights" }]  # one after the other
    resources = { GPU = 1, memory = 8e9 }     # what a worker must offer

A table with `chapter = "book/05_random_labels_cifar10.ipynb"` in place of `experiments` varies the
parameters of that notebook.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from bnnlib.errors import DataNotFound, InvalidValue, check_fills_batch, check_name, shown
from bnnlib.experiments.experiment import FIELDS, Experiment
from bnnlib.experiments.profiles import PROFILES, at_profile
from bnnlib.experiments.scored import EVALUATION_FIELDS, as_scored
from bnnlib.experiments.variants import named
from bnnlib.files import read_toml
from bnnlib.sweeps.chapters import chapter_task, read_chapter
from bnnlib.sweeps.tasks import RunTask, Task, label, run_name

TOP = ("profile", "runs")
TABLE = ("experiments", "chapter", "profile", "seeds", "set", "product", "zip", "list", "resources")
MOST_TASKS = 100_000
MOST_SEEDS = 1000
SEED_RANGE = re.compile(r" *([0-9]{1,19})(?:-([0-9]{1,19}))? *")

Point = dict[str, Any]  # fields of an experiment, or parameters of a chapter


def read_grid(path: str | Path, out: Path, profile: str | None = None) -> tuple[list[Task], int]:
    """The tasks of a grid, each once, and how many of its points are the same as another one.

    Runs have folders in `out`. `profile`: of all tables, whatever the file says. What an
    evaluation scores comes before it. Raises DataNotFound where there is no such file, and
    InvalidValue, with the number of the table, for what no grid or no experiment can be.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataNotFound(f"no grid {path}: there is no such file")
    content = read_toml(path)
    _check_keys(str(path), content, TOP)
    tables = content.get("runs")
    if not (isinstance(tables, list) and tables and all(isinstance(t, dict) for t in tables)):
        raise InvalidValue(f"{path} must have tables that begin with [[runs]], in two brackets")
    usual = {"profile": content.get("profile", "quick")}
    given = {} if profile is None else {"profile": profile}
    points = (
        point
        for number, table in enumerate(tables, start=1)
        for point in _of_table(path, number, usual | table | given, out.absolute())
    )
    return _each_once(str(path), points)


def _each_once(source: str, points: Iterator[list[Task]]) -> tuple[list[Task], int]:
    tasks: dict[str, Task] = {}
    named_twice, asked = 0, set()
    for point in points:
        named_twice += point[-1].name in asked
        asked.add(point[-1].name)
        tasks |= {task.name: task for task in point if task.name not in tasks}
        if len(tasks) > MOST_TASKS:
            raise InvalidValue(f"{source} has more than {MOST_TASKS:,} runs")
    return list(tasks.values()), named_twice


def _check_keys(where: str, found: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for key in found:
        check_name(f"key in {where}:", key, allowed)


def _of_table(path: Path, number: int, table: Mapping[str, Any], out: Path) -> Iterator[list[Task]]:
    """For each point of a table its task, after those that it needs."""
    where = f"{path}, table {number} of [[runs]]"
    _check_keys(where, table, TABLE)
    kinds = [kind for kind in ("experiments", "chapter") if kind in table]
    if len(kinds) != 1:
        raise InvalidValue(f"{where} must name either experiments or a chapter")
    try:
        check_name("profile", table["profile"], PROFILES)
        resources = _resources(table.get("resources", {}))
        if kinds == ["chapter"]:
            yield from _chapters(table, path.parent, out, resources)
        else:
            yield from _experiments(table, out, resources)
    except (InvalidValue, DataNotFound) as error:
        raise type(error)(f"{where}: {error}") from None


# ------------------------------------------------------------------------------ what is varied


def _points(table: Mapping[str, Any]) -> Iterator[Point]:
    """Every combination of what a table varies; raises InvalidValue for a name given twice."""
    own = [_rows(table), _zipped(table), *_products(table), _seeds(table)]
    for parts in product(*own):
        point: Point = {}
        for part in (*parts, _dictionary("set", table)):
            if twice := sorted(point.keys() & part.keys()):
                places = "two of list, zip, product, seeds and set"
                raise InvalidValue(f"{' and '.join(twice)} given twice, by {places}")
            point |= part
        yield point


def _dictionary(kind: str, table: Mapping[str, Any]) -> Point:
    found = table.get(kind, {})
    if not isinstance(found, dict):
        raise InvalidValue(f"{kind} must be a table of names and values, got {shown(found)}")
    return found


def _lists(kind: str, table: Mapping[str, Any]) -> dict[str, list]:
    found = _dictionary(kind, table)
    for name, values in found.items():
        if not isinstance(values, list) or not values:
            raise InvalidValue(
                f"{kind}: {name} must be a list of one value or more, got {shown(values)}"
            )
    return found


def _rows(table: Mapping[str, Any]) -> list[Point]:
    rows = table.get("list", [{}])
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InvalidValue(f"list must be a list of tables such as {{ l2 = 5e-4 }}, got {rows!r}")
    return rows


def _zipped(table: Mapping[str, Any]) -> list[Point]:
    found = _lists("zip", table)
    lengths = {name: len(values) for name, values in found.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidValue(f"zip: its lists must be equally long, they have {lengths}")
    rows = zip(*found.values(), strict=True)
    return [dict(zip(found, row, strict=True)) for row in rows] or [{}]


def _products(table: Mapping[str, Any]) -> list[list[Point]]:
    found = _lists("product", table)
    return [[{name: value} for value in values] for name, values in found.items()]


def _seeds(table: Mapping[str, Any]) -> list[Point]:
    if "seeds" not in table:
        return [{}]
    found = table["seeds"]
    text = ",".join(map(str, found)) if isinstance(found, list) else str(found)
    seeds = parse_seeds(text, "seeds")
    if "chapter" in table:
        return [{"seed": seed} for seed in seeds]
    return [both_seeds(seed) for seed in seeds]


def both_seeds(seed: int) -> Point:
    """A seed of a sweep is that of the network and that of the corruption."""
    return {"seed": seed, "corruption_seed": seed}


def parse_seeds(text: str, name: str = "--seeds") -> list[int]:
    """The seeds in a text such as "0,1,2" or "0-2,5", in its order, each once.

    Raises InvalidValue for another form, a range that runs backwards, a seed that occurs twice,
    and more than `MOST_SEEDS`.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = SEED_RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or len(seeds) + last - first >= MOST_SEEDS:
            raise InvalidValue(
                f"{name} takes at most {MOST_SEEDS:,} whole numbers and ranges that rise, with "
                f"commas between them, such as 0,1,2 or 0-2,5; got {shown(text)}"
            )
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise InvalidValue(f"{name} names a seed twice: {shown(text)}")
    return seeds


def _resources(found: Any) -> dict[str, float]:
    numbers = isinstance(found, dict) and all(type(v) in (int, float) for v in found.values())
    if not numbers or any(value <= 0 for value in found.values()):
        raise InvalidValue(
            f"resources must be numbers above 0, such as {{ GPU = 1 }}, got {shown(found)}"
        )
    return {name: float(value) for name, value in found.items()}


# ------------------------------------------------------------------------------------- tasks


def _experiments(
    table: Mapping[str, Any], out: Path, resources: Mapping[str, float]
) -> Iterator[list[Task]]:
    names = table["experiments"]
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise InvalidValue(f"experiments must be a list of names, got {shown(names)}")
    for name, point in product(names, list(_points(table))):
        for field in point:
            check_name("field", field, FIELDS)
        changes = {field: _value(field, value) for field, value in point.items()}
        try:
            yield _run_tasks(
                at_profile(named(name), table["profile"]), changes, table, out, resources
            )
        except InvalidValue as error:
            raise InvalidValue(f"{_label(name, point, table)}: {error}") from None


def _value(field: str, value: Any) -> Any:
    """TOML has no null, so a field that may be nothing takes the text "none"."""
    return None if value == "none" and NoneType in get_args(FIELDS[field]) else value


def _label(name: str, point: Point, table: Mapping[str, Any]) -> str:
    alike = {*table.get("set", ()), *(["corruption_seed"] if "seeds" in table else [])}
    return label(name, {k: v for k, v in point.items() if k not in alike})


def _run_tasks(
    base: Experiment,
    changes: Point,
    table: Mapping[str, Any],
    out: Path,
    resources: Mapping[str, float],
) -> list[Task]:
    """The task of an experiment; before it that of the run which it scores, if it scores one."""
    e = replace(base, **changes)
    if (images := e.images("train")) is not None:
        check_fills_batch(images, e.batch_size)
    if not e.evaluates or e.run_folder:
        return [_run_task(e, _label(base.name, changes, table), out, resources)]
    changes = {k: v for k, v in changes.items() if k not in EVALUATION_FIELDS}
    source = replace(at_profile(named(e.evaluates), table["profile"]), **changes)
    first = _run_task(source, _label(source.name, changes, table), out, resources)
    # As seen from the folder of the evaluation: so its digest does not depend on `out`.
    e = as_scored(replace(e, epochs=0, run_folder=f"../../{first.name}"), source, {})
    then = _run_task(e, _label(base.name, changes, table), out, resources)
    return [first, replace(then, needs=first.name)]


def _run_task(e: Experiment, said: str, out: Path, resources: Mapping[str, float]) -> RunTask:
    name = run_name(e)
    return RunTask(e, out / name, name, said, "", dict(resources))


def _chapters(
    table: Mapping[str, Any], beside: Path, out: Path, resources: Mapping[str, float]
) -> Iterator[list[Task]]:
    path, own, code = read_chapter(table["chapter"], beside)
    profile = {} if table["profile"] == own.get("profile") else {"profile": table["profile"]}
    for point in _points(table):
        point = (profile if "profile" not in point else {}) | point
        yield [chapter_task(path, own, code, point, out, resources)]
