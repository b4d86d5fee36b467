"""Every field of an experiment takes what it should, and refuses the rest by name."""

import hashlib
import json
from copy import copy, deepcopy
from dataclasses import FrozenInstanceError, asdict, replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnnlib.errors import BnnlibError, InvalidValue, shown
from bnnlib.experiments.experiment import ALLOWED, FIELDS, Experiment, Range
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import smoke

BASE = smoke(published("svhn-random-labels"))
LONG = "x" * 10**7
RANGES = """
epochs: 0 to 100,000; lr_final: 0 to 100; lr_start: above 0 and at most 100;
batch_size: 1 to 1,000,000; width: above 0 and at most 64; evaluation_samples: 1 to 10,000;
dropout: at least 0 and below 1; l2: 0 to 1,000,000; random_labels: 0 to 1;
gaussian_variance: 0 to 1,000,000; n_train: 1 to 100,000,000; n_valid: 0 to 100,000,000;
n_test: 0 to 100,000,000; evaluate_every: 1 to 1,000,000; evaluation_rows: 1 to 100,000,000
"""
RANGES = dict(" ".join(entry.split()).split(": ") for entry in RANGES.split(";"))
SEEDS = ("seed", "corruption_seed", "data_seed", "original_seed")
RANGES |= dict.fromkeys(SEEDS, "0 to 9,223,372,036,854,775,807")
NAMES = [name for name, allowed in ALLOWED.items() if not isinstance(allowed, Range)]


def test_every_number_has_a_range_and_every_text_but_five_a_list_of_names():
    numbers = {k for k, hint in FIELDS.items() if {int, float} & {hint, *get_args(hint)}}
    assert numbers == set(RANGES)
    assert {k: str(v) for k, v in ALLOWED.items() if isinstance(v, Range)} == RANGES
    texts = {k for k, hint in FIELDS.items() if str in (hint, *get_args(hint))}
    free = {"name", "summary", "script", "evaluates", "run_folder"}
    assert texts - free == set(NAMES)


@pytest.mark.parametrize("field", RANGES)
def test_the_ends_of_a_range_are_taken_and_what_lies_beyond_is_refused(field):
    def refused(value):
        try:
            replace(BASE, **{field: (value,) if field == "dropout" else value})
        except InvalidValue as error:
            return str(error).startswith(f"{field} must be ") and shown(value) in str(error)
        return False

    r = ALLOWED[field]
    assert refused(r.low) is r.above
    assert refused(r.high) is r.below
    assert all(map(refused, (r.low - 1, r.high + 1, float("nan"), float("inf"))))


@pytest.mark.parametrize("field", NAMES)
def test_an_unknown_name_is_refused_with_the_nearest(field):
    right = next(iter(ALLOWED[field]))
    wrong, several = right[:-1], get_args(FIELDS[field])
    entry, value = (f"entry of {field}", (right, wrong)) if several else (field, wrong)
    with pytest.raises(InvalidValue, match=f"unknown {entry} '{wrong}'; did you mean '{right}'"):
        replace(BASE, **{field: value})


def test_a_data_set_may_be_a_file_and_the_message_says_so():
    with pytest.raises(InvalidValue, match=r"unknown dataset 'x.np' .*, a path ending in \.npz"):
        replace(BASE, dataset="x.np")


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("probes", ("flips", "flips"), r"probes must name each only once, got \('flips', 'flips'"),
        ("name", "x/../y", "name must be .*, got 'x/../y'"),
        ("name", ".hidden", "begin with neither '.' nor '-', got '.hidden'"),
        ("name", "x" * 101, "name must be at most 100 letters"),
        ("summary", "\x1b[2Jgone", "summary must be .* printable characters, got '.*x1b"),
        pytest.param("dataset", LONG + ".npz", "dataset must be at most 1,000 print", id="path"),
    ],
)
def test_a_text_that_could_do_harm_is_refused(field, value, text):
    with pytest.raises(InvalidValue, match=text) as caught:
        replace(BASE, **{field: value})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"binary": False, "weights": "stochastic"}, "weights .* got 'stochastic' and 'determ"),
        ({"binary": False, "evaluation_weights": "real"}, "got 'deterministic' and 'real'"),
        ({"binary": False, "probes": ("parts", "flips")}, "binary=False .* leave flips out of pro"),
        ({"gaussian_matched": True}, "gaussian_matched=True .* gaussian_variance=0.0"),
        ({"gaussian_variance": 0.1, "gaussian_splits": ()}, r"=0.1 .* with gaussian_splits=\(\); "),
        ({"random_label_splits": ()}, r"random_labels=1.0 .* random_label_splits=\(\)"),
        ({"l2_target": "gamma"}, "l2_target='gamma' has no effect with l2=0.0"),
        ({"dropout_position": "after_activation"}, r"dropout_position=.* with dropout=\(\)"),
        ({"evaluation_rows": 7}, "evaluation_rows=7 has no effect with evaluates=''; change one"),
        ({"run_folder": "x"}, "run_folder='x' has no effect with evaluates=''; change one of them"),
        ({"schedule": "exponential"}, "schedule='exponential' cannot end at lr_final=0.0"),
        ({"evaluation_classes": "apart"}, "='apart' needs evaluation_statistics='batch', got 'ru"),
        ({"evaluation_samples": 2}, "=2 needs evaluation_weights='stochastic', got 'determ"),
        ({"dropout": (0.1,) * 4}, "dropout has 3 places before_norm"),
        ({"dropout": (0.1,) * 3, "dropout_position": "after_activation"}, "has 2 places after_act"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(changes, text):
    with pytest.raises(InvalidValue, match=text):
        replace(BASE, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"binary": False, "probes": ("parts", "critical")},
        {"evaluation_samples": 2, "evaluation_weights": "stochastic"},
        {"evaluation_classes": "apart", "evaluation_statistics": "batch"},
        {"dropout": (0.1,) * 3, "l2": 1.0},  # which reaches nothing, as in the original
        {"dropout": (0.1,) * 2, "dropout_position": "after_activation"},
        {"evaluates": "svhn-l2", "evaluation_rows": 7, "run_folder": "x", "n_train": 7},
        {"random_labels": 0.0, "random_label_splits": ()},
        {"name": "Mine_2.1-b", "dataset": "/some where/meine Müll.npz"},
    ],
)
def test_fields_that_agree_are_taken(changes):
    assert asdict(replace(BASE, **changes)) == asdict(BASE) | changes


@pytest.mark.parametrize(
    ("changes", "decay", "steps"),
    [
        ({"epochs": 0}, None, 0),
        ({"schedule": "linear", "n_train": 120}, None, 1_000),
        ({"n_train": 10**6}, 1e-3 ** (1 / 500), 732_500),  # there are 73,257 images
        ({"dataset": "mine.npz"}, 1e-3 ** (1 / 500), None),
        ({"dataset": "glyphs"}, 1e-3 ** (1 / 500), 100_000),  # 10,000 are drawn by default
        ({"dataset": "glyphs", "n_train": 20_000}, 1e-3 ** (1 / 500), 200_000),
    ],
)
def test_numbers_that_follow_from_the_fields(changes, decay, steps):
    experiment = replace(published("svhn-random-labels"), **changes)
    assert experiment.lr_decay == pytest.approx(decay)
    assert experiment.steps == steps


@pytest.mark.parametrize(
    ("field", "value", "stored"),
    [
        ("random_labels", 1, 1.0),
        ("width", np.float32(0.5), 0.5),
        ("epochs", np.int32(3), 3),
        ("binary", np.False_, False),
        ("network", np.str_("svhn"), "svhn"),
        ("dropout", [0, 0.5], (0.0, 0.5)),
    ],
)
def test_a_value_is_stored_as_the_type_of_its_field(field, value, stored):
    made = replace(BASE, **{field: value})
    found = getattr(made, field)
    assert (found, type(found)) == (stored, type(stored))
    assert made.digest() == replace(BASE, **{field: stored}).digest()


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("epochs", 3.0, "epochs must be a whole number, got 3.0"),
        ("epochs", None, "epochs must be a whole number, got None"),
        ("epochs", True, "epochs must be a whole number, got True"),
        pytest.param("lr_start", 10**400, "lr_start is far too large: 1000", id="lr_start"),
        ("binary", 1, "binary must be true or false, got 1"),
        ("n_train", "all", "n_train must be a whole number or none, got 'all'"),
        ("network", 3, "network must be text, got 3"),
        ("probes", "flips", "probes must be a tuple, each part text, got 'flips'; write ('flips',"),
        ("dropout", 0.5, "dropout must be a tuple, each part a number, got 0.5; write (0.5,)"),
        ("probes", {"flips"}, "probes must be a tuple, each part text, got {'flips'}"),
        ("seed", np.zeros((2, 1)), "seed must be a whole number, got array([[0.], [0.]])"),
    ],
)
def test_a_value_of_another_type_is_refused(field, value, text):
    with pytest.raises(InvalidValue) as caught:
        replace(BASE, **{field: value})
    assert str(caught.value).startswith(text)


def test_an_unknown_field_is_refused_with_the_nearest_and_a_missing_one_by_python():
    with pytest.raises(InvalidValue, match="unknown field 'epoch'; did you mean 'epochs'"):
        replace(BASE, epoch=3)
    with pytest.raises(InvalidValue, match=f"unknown field '{LONG[:40]}") as caught:
        Experiment(**asdict(BASE), **{LONG: 1})
    assert len(str(caught.value)) < 1000
    with pytest.raises(TypeError, match="'summary', 'network', and 'lr_final'"):
        Experiment("mine", dataset="svhn", epochs=3)


def test_an_experiment_can_be_copied_and_not_changed():
    assert Experiment(*asdict(BASE).values()) == deepcopy(BASE) == BASE
    with pytest.raises(FrozenInstanceError):
        BASE.epochs = 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=6,
)
NEARLY_RIGHT = st.sampled_from(
    [
        *(0, 1, 2, 50, 0.5, 1.0, True, "", "svhn", "dense", "patterns", "mine.npz", "linear"),
        *("stochastic", "real", "gamma", "after_activation", ["train"], ["flips"], [0.5]),
    ]
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(list(FIELDS)), JSON | NEARLY_RIGHT, max_size=4))
def test_any_json_gives_an_experiment_or_our_own_error_in_one_line(values):
    try:
        made = Experiment(**{**asdict(BASE), **values})
    except BnnlibError as error:
        text = str(error)
    else:
        text = f"{made.digest()} {made.steps} {made.lr_decay}"
        assert Experiment(**json.loads(json.dumps(asdict(made)))) == made
    assert text.isprintable()
    assert len(text) < 2000


@pytest.mark.parametrize("field", FIELDS)
def test_the_digest_changes_with_every_field_but_the_two_texts(field):
    other = copy(BASE)
    object.__setattr__(other, field, "another")  # past all checks
    assert (other.digest() != BASE.digest()) is (field not in ("summary", "script"))
    assert (field in BASE.spec()) is (field not in ("summary", "script"))


def test_fields_at_their_defaults_leave_the_digest_alone():
    said = {"name": "x", "dataset": "svhn", "network": "svhn", "epochs": 1, "lr_final": 0.5}
    text = json.dumps(said, sort_keys=True)
    assert Experiment(**said, summary="").digest() == hashlib.sha256(text.encode()).hexdigest()
