"""An evaluation has the settings of the run that it scores."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bnnlib.errors import InvalidValue, shown
from bnnlib.experiments.experiment import DEFAULTS, Experiment
from bnnlib.experiments.originals import PUBLISHED
from bnnlib.experiments.profiles import PROFILES, at_profile

# What an evaluation decides itself; all else was decided by the run that it scores.
EVALUATION_FIELDS = ("name", "summary", "script", "evaluates", "evaluation_rows", "run_folder")


def as_scored(
    evaluation: Experiment, source: Experiment, asked: Mapping[str, Any] | None = None
) -> Experiment:
    """The evaluation of a run of `source`, with the settings of that run: what is scored.

    Raises InvalidValue where settings in `asked` are others. None: whatever is not as in the
    experiment of the evaluation's name, at the profile that it is closest to.
    """
    own = {name: getattr(evaluation, name) for name in EVALUATION_FIELDS}
    scored = replace(source, **own, epochs=0)
    refused = [
        f"{name} can only be {shown(there)}, got {shown(value)}"
        for name, value in (_asked(evaluation) if asked is None else asked).items()
        if (there := getattr(scored, name)) != value
    ]
    if refused:
        raise InvalidValue(
            f"{evaluation.name} trains nothing and scores the run in {evaluation.run_folder} as "
            f"it was trained, so {', and '.join(refused)}"
        )
    return scored


def _asked(e: Experiment) -> dict[str, Any]:
    """The settings of an evaluation that somebody chose; one of no known name states them all."""
    bases = [DEFAULTS | {"epochs": 0}]
    if (original := PUBLISHED.get(e.name)) and original.evaluates:
        bases = [vars(at_profile(original, profile)) for profile in PROFILES]
    chosen = (
        {k: v for k, v in vars(e).items() if k not in EVALUATION_FIELDS and v != base[k]}
        for base in bases
    )
    return min(chosen, key=len)
