"""What is measured at a setting: paces in interleaved rounds, peaks of memory, and growth.

In: a `Setting`. Out: rows for the file. In each round every contender takes its turn while the
others are idle, and so does the machine's own limit; ratios are taken within a round, so that a
slow moment of the machine slows both sides.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from benchmarks.limits import WORDS
from benchmarks.settings import Setting, training_flops
from benchmarks.workers import LIMIT, RATES, Crew, working

Row = dict[str, Any]
WHERE = ("network", "width", "batch_size", "threads")
GROWING = ("bnnlib", "float twin")
PAUSE = 0.1  # seconds after a turn, in which its idle threads stop spinning


def turns(crew: Crew, rounds: int) -> dict[str, list[Any]]:
    """What each worker answered in each round; who begins changes from round to round.

    A first round, which includes compilation and allocation, is not kept.
    """
    names = list(crew.workers)
    answers: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in rotated(names, number):
            answer = crew.workers[name].ask("measure" if name in (LIMIT, RATES) else "epoch")
            time.sleep(PAUSE)
            if number:
                answers[name].append(answer)
    return answers


def rotated(names: list, number: int) -> list:
    """The names in the order of a round: who begins changes."""
    first = number % len(names)
    return names[first:] + names[:first]


@dataclass
class Comparison:
    """What became of the rounds at one setting."""

    setting: Setting
    seconds: dict[str, list[float]]  # of a step of each contender, round by round
    limit: list[Row]  # what the machine's limit answered
    about: dict[str, Row]  # what each worker said when it was built
    last: dict[str, Any]  # what each answered to a question in the end

    @property
    def where(self) -> Row:
        """What tells the setting from others."""
        return {name: getattr(self.setting, name) for name in WHERE}

    def row(self, name: str, references: dict[str, Sequence[float]]) -> Row:
        """A contender's pace."""
        about = {**self.where, "contender": name}
        return about | speed(self.seconds[name], self.setting.batch_size, references)

    @property
    def libraries(self) -> dict[str, str]:
        """The versions of what contenders imported."""
        return {k: v for said in self.about.values() for k, v in said.get("versions", {}).items()}

    @property
    def skipped(self) -> dict[str, str]:
        """Which were not measured, and why."""
        return {name: said["missing"] for name, said in self.about.items() if "missing" in said}


def compare(
    names: Iterable[str], setting: Setting, rounds: int, limit: str = LIMIT, question: str = ""
) -> Comparison:
    """Every contender in interleaved rounds, with the limit of that name; then the question."""
    with working([*names, limit], setting) as crew:
        answers = turns(crew, rounds)
        asked = {n: w.ask(question) for n, w in crew.workers.items() if question and n != limit}
    limits = answers.pop(limit)
    seconds = {name: [s / setting.steps for s in taken] for name, taken in answers.items()}
    return Comparison(setting, seconds, limits, crew.about, asked)


def speed(own: Sequence[float], batch_size: int, references: dict[str, Sequence[float]]) -> Row:
    """One contender's pace, from the seconds of a step in each round.

    The references, such as "speed_to_twin", become quartiles of the rounds' ratios: 2 is twice as
    fast.
    """
    return {
        "milliseconds": quartiles([1000 * s for s in own]),
        "images_per_second": quartiles([batch_size / s for s in own]),
        **{name: paired(reference, own) for name, reference in references.items()},
        "rounds": [1000 * s for s in own],
    }


def paired(reference: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    """Quartiles of how many times faster `own` is, round by round."""
    return quartiles([r / s for r, s in zip(reference, own, strict=True)])


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": middle, "high": high}


def limit_row(found: Comparison) -> Row:
    """The machine's limit: each product in the layout that is faster in the median.

    "kernel_seconds" is the same where the kernels take the products that they are faster at.
    """
    products = [fastest(p) for p in zip(*(r["products"] for r in found.limit), strict=True)]
    floats, kernels = (
        [sum(of_round) for of_round in zip(*(p.pop(name) for p in products), strict=True)]
        for name in ("rounds", "kernel_rounds")
    )
    s = found.setting
    return {
        **found.where,
        "flops": s.batch_size * training_flops(s.network, s.width),
        "seconds": floats,
        "kernel_seconds": kernels,
        "products": products,
        "rates": rates_row(found.limit),
    }


def rates_row(rounds: Sequence[Row]) -> Row:
    """Quartiles of each of the machine's rates."""
    return {name: quartiles([r["rates"][name] for r in rounds]) for name in rounds[0]["rates"]}


def fastest(rounds: Sequence[Row]) -> Row:
    """One product, from its seconds by way in each round.

    "seconds" are those of the faster layout, "kernel_seconds" those of the kernels: None where
    they do not take it.
    """
    first = rounds[0]
    taken = {way: [r["seconds"][way] for r in rounds] for way in first["seconds"]}
    middle = {way: median(seconds) for way, seconds in taken.items()}
    kernel = middle.pop(WORDS, None)
    layout = min(middle, key=middle.get)
    faster = WORDS if kernel and kernel < middle[layout] else layout
    return {
        **{name: first[name] for name in ("layer", "kind", "flops", "bytes")},
        "layout": layout,
        "seconds": middle[layout],
        "kernel_seconds": kernel,
        "rounds": taken[layout],
        "kernel_rounds": taken[faster],
    }


def memory(
    names: Iterable[str], setting: Setting, rounds: int, acts: dict[str, str], **shared: Any
) -> list[Row]:
    """The peak of each contender's memory after each act, by the names of `acts`.

    In new processes each round: where the C library puts things differs from one to the next.
    """
    fields = ("network", "width", "batch_size", "images", "test_images")
    shared |= {name: getattr(setting, name) for name in fields}
    seen: dict[str, list[Row]] = {}
    for _ in range(rounds):
        with working(names, setting) as crew:
            for name, worker in crew.workers.items():
                row = {"imports_bytes": crew.about[name]["imports_bytes"]}
                for peak, act in acts.items():
                    worker.ask(act)
                    row[peak] = worker.ask("memory")
                seen.setdefault(name, []).append(row)
    return [
        {"contender": name, **{k: quartiles([row[k] for row in rows]) for k in rows[0]}, **shared}
        for name, rows in seen.items()
    ]


def growth(by: str, settings: Sequence[Setting], rounds: int) -> Iterator[Row]:
    """Seconds of a step and peak memory of bnnlib and of its twin at each setting."""
    for setting in settings:
        with working(GROWING, setting) as crew:
            for name, taken in turns(crew, rounds).items():
                yield {
                    "by": by,
                    "value": getattr(setting, by),
                    **_about(setting, name),
                    "milliseconds": quartiles([1000 * s / setting.steps for s in taken]),
                    "peak_bytes": crew.workers[name].ask("memory"),
                }


def growth_by_epochs(setting: Setting, epochs: Sequence[int], rounds: int) -> Iterator[Row]:
    """Seconds of so many epochs in a row, of one contender after the other."""
    with working(GROWING, setting) as crew:
        turns(crew, 0)  # the unmeasured round
        for number in epochs:
            for name, worker in crew.workers.items():
                taken = [sum(worker.ask("epoch") for _ in range(number)) for _ in range(rounds)]
                about = {"by": "epochs", "value": number, **_about(setting, name)}
                yield about | {"seconds": quartiles(taken)}


def _about(setting: Setting, name: str) -> Row:
    fields = ("network", "width", "batch_size")
    return {"contender": name} | {field: getattr(setting, field) for field in fields}
