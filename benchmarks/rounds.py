"""What is measured at a setting: paces in interleaved rounds, peaks of memory, and growth.

In: a `Setting`. Out: rows for the file. In each round every contender takes its turn while the
others are idle, and so does the machine's own limit; ratios are taken within a round, so that a
slow moment of the machine slows both sides.
"""

import time
from collections.abc import Iterator, Sequence
from statistics import median, quantiles
from typing import Any

from benchmarks.settings import Setting, training_flops
from benchmarks.workers import CONTENDERS, LIMIT, TEST_IMAGES, Crew, working

Row = dict[str, Any]
TWIN, TUNED = "float twin", "float twin, tuned"
GROWING = ("bnnlib", TWIN)
PAUSE = 0.3  # seconds after a turn, in which its idle threads stop spinning


def turns(crew: Crew, rounds: int) -> dict[str, list[Any]]:
    """What each worker answered in each round; who begins changes from round to round.

    A first round, which includes compilation and allocation, is not kept.
    """
    names = list(crew.workers)
    answers: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in rotated(names, number):
            answer = crew.workers[name].ask("measure" if name == LIMIT else "epoch")
            time.sleep(PAUSE)
            if number:
                answers[name].append(answer)
    return answers


def rotated(names: list, number: int) -> list:
    """The names in the order of a round: who begins changes."""
    first = number % len(names)
    return names[first:] + names[:first]


def compare(setting: Setting, rounds: int) -> tuple[list[Row], Row, dict[str, Row]]:
    """A row for each contender, the machine's limit, and what each worker said of itself."""
    with working([*CONTENDERS, LIMIT], setting) as crew:
        answers = turns(crew, rounds)
    limit = limit_row(setting, answers.pop(LIMIT))
    steps = {name: [s / setting.steps for s in taken] for name, taken in answers.items()}
    rows = [
        {"network": setting.network, "width": setting.width, "contender": name}
        | speed(name, steps, limit["seconds"], setting.batch_size)
        for name in steps
    ]
    return rows, limit, crew.about


def speed(name: str, steps: dict[str, list[float]], limit: Sequence[float], batch_size: int) -> Row:
    """One contender's pace, from the seconds of a step of all of them in each round.

    `speed_to_twin`, `speed_to_tuned_twin` and `share_of_limit` are quartiles of the rounds'
    ratios: 2 is twice as fast.
    """
    own = steps[name]
    return {
        "milliseconds": quartiles([1000 * s for s in own]),
        "images_per_second": quartiles([batch_size / s for s in own]),
        "speed_to_twin": paired(steps[TWIN], own),
        "speed_to_tuned_twin": paired(steps[TUNED], own),
        "share_of_limit": paired(limit, own),
        "rounds": [1000 * s for s in own],
    }


def paired(reference: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    """Quartiles of how many times faster `own` is, round by round."""
    return quartiles([r / s for r, s in zip(reference, own, strict=True)])


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": middle, "high": high}


def limit_row(setting: Setting, rounds: Sequence[Row]) -> Row:
    """The machine's limit: each product in the layout that is faster in the median."""
    products = [best_layout(p) for p in zip(*(r["products"] for r in rounds), strict=True)]
    seconds = [sum(of_round) for of_round in zip(*(p.pop("rounds") for p in products), strict=True)]
    return {
        "network": setting.network,
        "width": setting.width,
        "flops": setting.batch_size * training_flops(setting.network, setting.width),
        "seconds": seconds,
        "products": products,
        "gemm_flops_per_second": quartiles([r["gemm_flops_per_second"] for r in rounds]),
    }


def best_layout(rounds: Sequence[Row]) -> Row:
    """One product, from its seconds by layout in each round."""
    first = rounds[0]
    taken = {way: [r["seconds"][way] for r in rounds] for way in first["seconds"]}
    middle = {way: median(seconds) for way, seconds in taken.items()}
    layout = min(middle, key=middle.get)
    about = {name: first[name] for name in ("layer", "kind", "flops")}
    return about | {"layout": layout, "seconds": middle[layout], "rounds": taken[layout]}


def memory(setting: Setting, rounds: int) -> list[Row]:
    """Peak memory of each contender that holds both sets, when it has trained, and tested too.

    In new processes each round: where the C library puts things differs from one to the next.
    """
    fields = ("network", "width", "batch_size", "images", "test_images")
    shared = {name: getattr(setting, name) for name in fields} | {"tested": TEST_IMAGES}
    seen: dict[str, list[Row]] = {}
    for _ in range(rounds):
        with working(CONTENDERS, setting) as crew:
            for name, worker in crew.workers.items():
                row = {"imports_bytes": crew.about[name]["imports_bytes"]}
                for act, peak in (("epoch", "trained_peak_bytes"), ("evaluate", "peak_bytes")):
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
