"""Every field of an experiment takes what it should, and refuses the rest by name."""

import json
from copy import deepcopy
from dataclasses import asdict, fields, replace
from types import NoneType
from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnnlib.catalogue import Experiment, published, smoke
from bnnlib.errors import BnnlibError, InvalidValue, shown
from bnnlib.limits import RANGES

BASE = smoke(published("svhn-random-labels"))
LONG = "x" * 10**7


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("dataset", "cifar", "unknown dataset 'cifar'; did you mean 'cifar10'"),
        ("network", "smal", "did you mean 'small'"),
        ("schedule", "lin", "allowed: exponential, linear"),
        ("activation", "tanh", "did you mean 'binary_tanh'"),
        ("weights", "determinist", "did you mean 'deterministic'"),
        ("evaluation_weights", "reel", "did you mean 'real'"),
        ("evaluation_statistics", "runing", "did you mean 'running'"),
        ("l2_target", "latent", "unknown l2_target 'latent'"),
        ("random_label_splits", ("train", "tests"), "did you mean 'test'"),
        ("gaussian_splits", ("valdi",), "did you mean 'valid'"),
        ("dropout_position", "before", "did you mean 'before_norm'"),
        ("pixels", "shuffle", "did you mean 'shuffled'"),
        ("probes", ("flips", "part"), "unknown entry of probes 'part'; did you mean 'parts'"),
        ("evaluation_samples", 0, "evaluation_samples must be 1 to 10,000, got 0"),
        ("epochs", -1, "epochs must be 0 to 100,000, got -1"),
        ("batch_size", 0, "batch_size must be 1 to 1,000,000, got 0"),
        ("evaluate_every", 0, "evaluate_every must be 1 to 1,000,000, got 0"),
        ("width", 0.0, "width must be above 0 and at most 64, got 0.0"),
        ("width", 64.1, "width must be above 0 and at most 64, got 64.1"),
        ("lr_start", 0.0, "lr_start must be above 0 and at most 100, got 0.0"),
        ("lr_final", -1e-9, "lr_final must be 0 to 100, got -1e-09"),
        ("random_labels", 1.01, "random_labels must be 0 to 1, got 1.01"),
        ("gaussian_variance", -0.1, "gaussian_variance must be 0 to 1,000,000, got -0.1"),
        ("l2", -1.0, "l2 must be 0 to 1,000,000, got -1.0"),
        ("dropout", (0.5, 1.0), r"dropout must be .* at least 0 and below 1, got \(0.5, 1.0\)"),
        ("dropout", (float("nan"),), r"below 1, got \(nan,\)"),
        ("dropout", (0.1,) * 4, "dropout must be at most three numbers"),
        ("n_train", 0, "n_train must be none or 1 to 100,000,000, got 0"),
        ("n_valid", -1, "n_valid must be none or 0 to 100,000,000, got -1"),
        ("n_test", -1, "n_test must be none or 0 to 100,000,000, got -1"),
        ("seed", -1, "seed must be 0 to 9,223,372,036,854,775,807, got -1"),
        ("seed", 2**63, "seed must be 0 to 9,223,372,036,854,775,807, got 9223372036854775808"),
        ("original_seed", -1, "original_seed must be none or 0 to .*, got -1"),
        ("corruption_seed", -1, "corruption_seed.*-1"),
        ("data_seed", -1, "data_seed.*-1"),
        ("evaluation_rows", 0, "evaluation_rows.*0"),
        (
            "probes",
            ("flips", "flips"),
            r"probes must name each only once, got \('flips', 'flips'\)",
        ),
        ("random_label_splits", ("test", "test"), "random_label_splits must name each only once"),
        ("name", "../../x", "name must be .*, got '../../x'"),
        ("name", "a/b", "name must be .*, got 'a/b'"),
        ("name", ".hidden", "begin with neither '.' nor '-', got '.hidden'"),
        ("name", "", "name must be .*, got ''"),
        ("name", "x" * 101, "name must be at most 100 letters"),
        ("summary", "\x1b[2Jgone", "summary must be .* printable characters, got '.*x1b"),
        pytest.param(
            "dataset", LONG + ".npz", "dataset must be at most 1,000 print", id="long path"
        ),
        pytest.param("network", LONG, "network must be at most 1,000 print", id="long name"),
    ],
)
def test_a_bad_field_is_refused_with_its_name_and_what_is_allowed(field, value, text):
    with pytest.raises(InvalidValue, match=text):
        replace(BASE, **{field: value})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"binary": False, "weights": "stochastic"}, "weights .* got 'stochastic' and 'determ"),
        ({"binary": False, "evaluation_weights": "stochastic"}, "binary=False has real weights"),
        ({"binary": False, "evaluation_weights": "real"}, "got 'deterministic' and 'real'"),
        (
            {"binary": False, "probes": ("parts", "flips")},
            "binary=False .* leave flips out of prob",
        ),
        ({"gaussian_matched": True}, "gaussian_matched=True .* gaussian_variance=0.0"),
        (
            {"gaussian_variance": 0.1, "gaussian_splits": ()},
            r"gaussian_variance=0.1 has no effect with gaussian_splits=\(\); change one of them",
        ),
        ({"random_label_splits": ()}, r"random_labels=1.0 .* random_label_splits=\(\)"),
        ({"l2_target": "gamma"}, "l2_target='gamma' has no effect with l2=0.0"),
        (
            {"dropout_position": "after_activation"},
            r"dropout_position=.* no effect with dropout=\(\)",
        ),
        ({"evaluation_rows": 7}, "evaluation_rows=7 has no effect with evaluates=''"),
        ({"run_folder": "x"}, "run_folder='x' has no effect with evaluates=''"),
        (
            {"n_train": 49},
            "49 images do not fill one batch of 50; use a larger n_train, or a batch_s",
        ),
        ({"batch_size": 101}, "100 images do not fill one batch of 101; .* at most 100"),
        ({"network": "dense"}, "network='dense' takes images of 8 x 8 .* dataset='glyphs' are 32"),
        ({"dataset": "patterns"}, "network='small' takes images of 32 x 32 .*'patterns' are 8 x 8"),
        ({"schedule": "exponential"}, "schedule='exponential' cannot end at lr_final=0.0"),
        ({"evaluation_samples": 2}, "=2 needs evaluation_weights='stochastic', got 'determ"),
        ({"evaluation_samples": 3, "evaluation_weights": "real"}, "=3 needs .*, got 'real'"),
        ({"dropout": (0.1,) * 3, "dropout_position": "after_activation"}, "dropout"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(changes, text):
    with pytest.raises(InvalidValue, match=text):
        replace(BASE, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"binary": False},
        {"evaluation_samples": 2, "evaluation_weights": "stochastic"},
        {"dropout": (0.1,) * 3},
        {"dropout": (0.1,) * 2, "dropout_position": "after_activation"},
        {"l2": 1.0},  # reaches nothing, as in the original
        {"binary": False, "probes": ("parts", "critical")},
        {"evaluates": "svhn-l2", "evaluation_rows": 7, "run_folder": "x", "n_train": 7},
        {"dataset": "mine.npz", "network": "dense"},  # only the file knows
        {"dataset": "svhn", "network": "cifar10", "n_train": None, "batch_size": 73_257},
        {"random_labels": 0.0, "random_label_splits": ()},
        {"n_train": 50},
        {"evaluate_every": 1_000_000, "seed": 2**63 - 1, "width": 64.0},
        {"name": "Mine_2.1-b", "dataset": "/some where/meine Müll.npz"},
    ],
)
def test_fields_that_agree_are_taken(changes):
    assert asdict(replace(BASE, **changes)) == asdict(BASE) | changes


# ------------------------------------------------------------------------- types of the fields


@pytest.mark.parametrize(
    ("field", "value", "stored"),
    [
        ("random_labels", 1, 1.0),
        ("width", np.float32(0.5), 0.5),
        ("width", np.int64(2), 2.0),
        ("epochs", np.int32(3), 3),
        ("n_test", np.uint8(7), 7),
        ("binary", np.False_, False),
        ("network", np.str_("svhn"), "svhn"),
        ("dropout", [0, 0.5], (0.0, 0.5)),
        ("random_label_splits", ["train"], ("train",)),
        ("n_valid", None, None),
    ],
)
def test_a_value_is_stored_as_the_type_of_its_field(field, value, stored):
    found = getattr(replace(BASE, **{field: value}), field)
    assert (found, type(found)) == (stored, type(stored))
    if isinstance(stored, tuple):
        assert [type(part) for part in found] == [type(part) for part in stored]


def test_one_and_one_point_zero_are_the_same_experiment():
    one, same = (replace(published("svhn-l2"), random_labels=x, width=x) for x in (1, 1.0))
    assert one == same
    assert one.digest() == same.digest()
    assert replace(one, l2=np.float64(1)).digest() == replace(one, l2=1).digest()


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("epochs", "3", "epochs must be a whole number, got '3'"),
        ("epochs", 3.0, "epochs must be a whole number, got 3.0"),
        ("epochs", True, "epochs must be a whole number, got True"),
        ("epochs", None, "epochs must be a whole number, got None"),
        ("width", False, "width must be a number, got False"),
        ("width", 1j, "width must be a number, got 1j"),
        pytest.param("lr_start", 10**400, "lr_start is far too large: 1000", id="lr_start"),
        ("binary", 1, "binary must be true or false, got 1"),
        ("n_train", "all", "n_train must be a whole number or none, got 'all'"),
        ("network", 3, "network must be text, got 3"),
        (
            "probes",
            "flips",
            "probes must be a tuple, each part text, got 'flips'; write ('flips',)",
        ),
        ("dropout", 0.5, "dropout must be a tuple, each part a number, got 0.5; write (0.5,)"),
        ("dropout", ["0.5"], "dropout must be a tuple, each part a number, got ['0.5']"),
        ("dropout", (True,), "dropout must be a tuple, each part a number, got (True,)"),
        ("probes", {"flips"}, "probes must be a tuple, each part text, got {'flips'}"),
        ("seed", np.zeros((2, 1)), "seed must be a whole number, got array([[0.], [0.]])"),
    ],
)
def test_a_value_of_another_type_is_refused(field, value, text):
    with pytest.raises(InvalidValue) as caught:
        replace(BASE, **{field: value})
    assert str(caught.value).startswith(text)


def numbers_of(kind):
    return {k for k, hint in get_type_hints(Experiment).items() if kind in (hint, *get_args(hint))}


def test_every_number_has_a_range():
    assert set(RANGES) == (numbers_of(int) | numbers_of(float)) - {"dropout"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", sorted(numbers_of(float) - {"dropout"}))
def test_a_number_that_is_none_is_refused(field, value):
    with pytest.raises(InvalidValue, match=f"{field} must be .*, got {value}"):
        replace(BASE, **{field: value})


@pytest.mark.parametrize("field", RANGES)
def test_the_ends_of_a_range_are_in_it_and_what_lies_beyond_is_not(field):
    allowed = RANGES[field]
    low, high = allowed.low, allowed.high
    assert (low in allowed) is not allowed.above
    assert high in allowed
    assert low - 1 not in allowed
    assert high + 1 not in allowed
    assert str(allowed) in (f"{low:,} to {high:,}", f"above {low:,} and at most {high:,}")


def test_none_is_taken_only_where_the_type_allows_it():
    hints = get_type_hints(Experiment)
    allowed = {name for name in hints if NoneType in get_args(hints[name])}
    assert allowed == {"n_train", "n_valid", "n_test", "original_seed", "evaluation_rows"}
    for name in hints.keys() - allowed:
        with pytest.raises(InvalidValue, match=f"{name} must be"):
            replace(BASE, **{name: None})


def test_a_field_that_is_not_there_is_refused_with_the_nearest():
    for make in (lambda **f: replace(BASE, **f), lambda **f: Experiment(**asdict(BASE), **f)):
        with pytest.raises(InvalidValue, match="unknown field 'epoch'; did you mean 'epochs'"):
            make(epoch=3)


def test_an_unknown_field_with_an_endless_name_is_refused_briefly():
    with pytest.raises(InvalidValue) as caught:
        replace(BASE, **{LONG: 1})
    assert str(caught.value).startswith(f"unknown field '{LONG[:100]}'; ")
    assert len(str(caught.value)) < 1000


def test_fields_that_are_missing_are_named():
    with pytest.raises(InvalidValue, match="an experiment needs summary, network, lr_final too"):
        Experiment("mine", dataset="svhn", epochs=3)


def test_an_experiment_can_be_copied():
    assert deepcopy(BASE) == BASE
    assert Experiment(*asdict(BASE).values()) == BASE


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param("x" * 1000, f"'{'x' * 47}...{'x' * 48}'", id="text"),
        (np.eye(2), "array([[1., 0.], [0., 1.]])"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, ...]"),
        pytest.param(10**5000, "a number too long to be shown", id="5001 digits"),
    ],
)
def test_what_an_error_shows_is_one_short_line(value, text):
    assert shown(value) == text


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
FIELDS = st.sampled_from([f.name for f in fields(Experiment)])


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, JSON | NEARLY_RIGHT, max_size=4))
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
