from math import sqrt

import pytest
import torch
from torch import nn

from bnnlib.errors import InvalidValue
from bnnlib.layers import BinaryLayer, binarize_parameters_, binary_layers
from bnnlib.losses import squared_hinge_loss
from bnnlib.models import (
    ARCHITECTURES,
    Architecture,
    ParameterCount,
    binarynet,
    count_parameters,
    penalized_parameters,
)

# The published networks: shape of each latent weight and factor on its learning rate.
CONVOLUTIONS = {
    "cifar10": [
        ((128, 3, 3, 3), 28.0357),
        ((128, 128, 3, 3), 39.1918),
        ((256, 128, 3, 3), 48.0000),
        ((256, 256, 3, 3), 55.4256),
        ((512, 256, 3, 3), 67.8823),
        ((512, 512, 3, 3), 78.3837),
        ((1024, 8192), 78.3837),
        ((1024, 1024), 36.9504),
        ((10, 1024), 26.2552),
    ],
    "svhn": [
        ((64, 3, 3, 3), 20.0499),
        ((64, 64, 3, 3), 27.7128),
        ((128, 64, 3, 3), 33.9411),
        ((128, 128, 3, 3), 39.1918),
        ((256, 128, 3, 3), 48.0000),
        ((256, 256, 3, 3), 55.4256),
        ((1024, 4096), 58.4237),
        ((1024, 1024), 36.9504),
        ((10, 1024), 26.2552),
    ],
}
COUNTS = {
    "cifar10": ParameterCount(binary=14_022_016, real=11_550, statistics=7_700),
    "svhn": ParameterCount(binary=6_397_632, real=8_862, statistics=5_908),
}
ORDER = """
    conv1 norm1 act1 conv2 pool2 norm2 act2 conv3 norm3 act3 conv4 pool4 norm4 act4
    conv5 norm5 act5 conv6 pool6 norm6 act6 flatten
    dense7 norm7 act7 dense8 norm8 act8 dense9 norm9
"""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["cifar10", "svhn"])
def published(request):
    """Each published network at full width, with its name."""
    return request.param, binarynet(request.param, generator=seeded())


class TestPublishedNetworks:
    def test_shapes_of_the_latent_weights(self, published):
        name, model = published
        shapes = [tuple(layer.weight.shape) for layer in binary_layers(model)]
        assert shapes == [shape for shape, _ in CONVOLUTIONS[name]]

    def test_scales_of_the_learning_rate_to_four_decimals(self, published):
        name, model = published
        scales = [round(layer.lr_scale, 4) for layer in binary_layers(model)]
        assert scales == [scale for _, scale in CONVOLUTIONS[name]]

    def test_scales_of_the_learning_rate_by_formula(self, published):
        for layer in binary_layers(published[1]):
            units_out, units_in, *kernel = layer.weight.shape
            area = torch.Size(kernel).numel()
            assert layer.lr_scale == pytest.approx(sqrt((units_in + units_out) * area / 1.5))

    def test_parameter_counts(self, published):
        name, model = published
        assert count_parameters(model) == COUNTS[name]
        assert count_parameters(model).trained == COUNTS[name].binary + COUNTS[name].real

    def test_order_is_layer_pool_norm_activation(self, published):
        assert list(dict(published[1].named_children())) == ORDER.split()

    def test_zeros_pad_the_images(self, published):
        convolutions = [layer for layer in binary_layers(published[1]) if layer.weight.dim() == 4]
        assert [layer.pad_value for layer in convolutions] == [0] * 6

    @pytest.mark.parametrize(("target", "prefix"), [("weights", "dense"), ("gamma", "norm")])
    def test_a_penalty_reaches_the_three_dense_layers(self, published, target, prefix):
        _, model = published
        found = penalized_parameters(model, target)
        expected = [model.get_submodule(f"{prefix}{number}").weight for number in (7, 8, 9)]
        assert [id(p) for p in found] == [id(p) for p in expected]

    def test_number_of_penalized_parameters(self, published):
        name, model = published
        inputs = {"cifar10": 8192, "svhn": 4096}[name]
        counts = {
            target: sum(p.numel() for p in penalized_parameters(model, target))
            for target in ("nothing", "weights", "gamma")
        }
        dense = (inputs + 1024 + 10) * 1024
        assert counts == {"nothing": 0, "weights": dense, "gamma": 1024 + 1024 + 10}


def test_a_penalty_reaches_the_weights_of_the_twin():
    twin = binarynet("small", generator=seeded(), width=0.1, binary=False)
    found = penalized_parameters(twin, "weights")
    expected = [twin.dense3.weight, twin.dense4.weight, twin.dense5.weight]
    assert [id(p) for p in found] == [id(p) for p in expected]


def test_unknown_target_of_a_penalty_is_refused():
    with pytest.raises(InvalidValue, match="'weight'; did you mean 'weights'"):
        penalized_parameters(binarynet("dense", generator=seeded()), "weight")


def test_the_dense_network_has_17024_binary_weights_and_takes_8_x_8_images():
    model = binarynet("dense", generator=seeded())
    assert [tuple(layer.weight.shape) for layer in binary_layers(model)] == [
        (64, 192),
        (64, 64),
        (10, 64),
    ]
    assert count_parameters(model).binary == 17_024
    assert list(dict(model.named_children()))[:3] == ["flatten", "dense1", "norm1"]
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("seed", [0, 1])
def test_initial_loss_of_the_svhn_network_is_near_two(seed):
    # unit-variance outputs give 2 Phi(1) + phi(1) = 1.925 in expectation
    generator = seeded(seed)
    model = binarynet("svhn", generator=generator, width=0.25)
    x = torch.rand(200, 3, 32, 32, generator=generator) * 2 - 1
    labels = torch.randint(10, (200,), generator=generator)
    with torch.no_grad():
        assert 1.9 < squared_hinge_loss(model(x), labels).item() < 2.0


def test_a_network_and_its_signs_give_bit_identical_scores(generator):
    model = binarynet("svhn", generator=generator, width=0.25)
    x = torch.rand(20, 3, 32, 32, generator=generator) * 2 - 1
    with torch.no_grad():
        model(x)  # moves the averages away from their start
        scores = model.eval()(x)
        assert torch.equal(binarize_parameters_(model)(x), scores)
    assert scores.shape == (20, 10)


# --------------------------------------------------------------------------------- switches


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.parametrize(
    ("activation", "real_activation", "at_half"),
    [("binary_tanh", nn.Hardtanh, 0.5), ("binary_sigmoid", nn.Module, 0.75)],
)
def test_full_precision_twin_differs_in_layers_and_activations_only(
    name, activation, real_activation, at_half
):
    binary, twin = (
        binarynet(name, generator=seeded(), width=0.1, activation=activation, binary=b)
        for b in (True, False)
    )
    assert shapes(binary) == shapes(twin)
    assert list(dict(binary.named_children())) == list(dict(twin.named_children()))
    assert not any(isinstance(layer, BinaryLayer) for layer in twin)
    assert isinstance(twin.act1, real_activation)
    ends = torch.tensor([-3, -1, 0.5, 1, 3])
    lower = binary.act1(torch.tensor(-1.0)).item()
    assert twin.act1(ends).tolist() == [lower, lower, at_half, 1, 1]
    assert count_parameters(twin) == ParameterCount(
        0, count_parameters(binary).trained, count_parameters(binary).statistics
    )


def test_twin_computes_with_its_weights(tiny, generator):
    twin = binarynet(tiny, generator=generator, binary=False)
    x = torch.randn(5, 3, 8, 8, generator=generator)
    expected = nn.functional.conv2d(x, twin.conv1.weight, twin.conv1.bias, padding=1)
    assert torch.equal(twin.conv1(x), expected)
    assert twin(x).shape == (5, 10)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("dropout", [(), (0.25, 0.5)])
def test_weights_come_from_the_generator_and_no_global_state_moves(tiny, binary, dropout):
    before = torch.get_rng_state()
    one, same, other = (
        binarynet(tiny, generator=seeded(seed), binary=binary, dropout=dropout)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, one.parameters(), same.parameters()))
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    assert not torch.equal(one.dense4.weight, other.dense4.weight)


@pytest.mark.parametrize(
    ("width", "channels", "units"), [(0.25, (8, 16), 128), (2, (64, 128), 1024), (1e-4, (1, 1), 1)]
)
def test_width_multiplies_channels_and_hidden_units_but_not_classes(width, channels, units):
    model = binarynet("small", generator=seeded(), width=width)
    first, second = channels
    assert [tuple(layer.weight.shape) for layer in binary_layers(model)] == [
        (first, 3, 3, 3),
        (second, first, 3, 3),
        (units, second * 8 * 8),
        (units, units),
        (10, units),
    ]


@pytest.mark.parametrize(
    ("dropout", "found"),
    [
        ((), {}),
        ((0.25, 0.5), {"dropout3": 0.25, "dropout4": 0.5}),
        ((0.0, 0.5), {"dropout4": 0.5}),
        ((0.1, 0.2, 0.3), {"dropout3": 0.1, "dropout4": 0.2, "dropout5": 0.3}),
    ],
)
def test_dropout_stands_between_dense_layer_and_norm(dropout, found):
    model = binarynet("small", generator=seeded(), width=0.1, dropout=dropout)
    names = list(dict(model.named_children()))
    assert {name: model.get_submodule(name).p for name in names if "dropout" in name} == found
    for name in found:
        at, number = names.index(name), name[-1]
        assert names[at - 1 : at + 2] == [f"dense{number}", name, f"norm{number}"]


def test_dropout_after_the_activation_and_not_on_the_scores():
    place = {"dropout": (0.25, 0.5), "dropout_position": "after_activation"}
    model = binarynet("small", generator=seeded(), width=0.1, **place)
    names = list(dict(model.named_children()))
    for number, p in (("3", 0.25), ("4", 0.5)):
        at = names.index(f"dropout{number}")
        assert names[at - 2 : at + 1] == [f"norm{number}", f"act{number}", f"dropout{number}"]
        assert model.get_submodule(f"dropout{number}").p == p
    assert names[-1] == "norm5"


def test_mode_of_the_weights_and_pad_value_reach_the_layers(tiny):
    model = binarynet(tiny, generator=seeded(), weights="real", pad_value=-1.0)
    assert {layer.mode for layer in binary_layers(model)} == {"real"}
    assert (model.conv1.pad_value, model.conv2.pad_value) == (-1, -1)


def test_own_architecture_with_its_own_image_size_and_classes():
    own = Architecture((5,), pool_every=1, dense=(6,), image_size=10, classes=3)
    model = binarynet(own, generator=seeded())
    assert model(torch.zeros(2, 3, 10, 10)).shape == (2, 3)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"pool_every": 0}, "pool_every must be a whole number, 1 or more, got 0"),
        ({"convolutions": (4, -8)}, "convolutions must be a whole number, 1 or more, got -8"),
        ({"dense": (2.5,)}, r"dense must be a whole number, 1 or more, got 2\.5"),
        ({"image_size": 0}, "image_size must be a whole number, 1 or more, got 0"),
        ({"classes": True}, "classes must be a whole number, 1 or more, got True"),
        ({"pool_every": 1, "image_size": 7}, "3 pools leave nothing of 7 x 7 pixels.*than 1"),
    ],
)
def test_sizes_of_which_no_network_can_be_made_are_refused(sizes, text):
    good = {"convolutions": (4, 4, 4), "pool_every": 2, "dense": (8,), "image_size": 8}
    assert Architecture(**good)
    with pytest.raises(InvalidValue, match=text):
        Architecture(**good | sizes)


def test_the_last_pool_may_leave_one_pixel(generator):
    least = Architecture((4, 4, 4), pool_every=1, dense=(), image_size=8)
    assert binarynet(least, generator=generator)(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"architecture": "cifar"}, "unknown network 'cifar'; did you mean 'cifar10'"),
        ({"activation": "binary_tan"}, "did you mean 'binary_tanh'"),
        ({"weights": "deterministically"}, "did you mean 'deterministic'"),
        ({"width": 0}, "width must be positive, got 0"),
        ({"width": -1}, "width must be positive, got -1"),
        ({"dropout": (0.5, 1.0)}, "dropout.*got 1.0"),
        ({"dropout": (-0.5,)}, "dropout.*-0.5"),
        ({"dropout": (0.1, 0.1, 0.1, 0.1)}, "more numbers than there are places"),
        ({"dropout_position": "before"}, "did you mean 'before_norm'"),
        ({"dropout_position": "after_activation", "dropout": (0.1,) * 3}, "more numbers than"),
        ({"binary": False, "weights": "real"}, "settings of binary layers only"),
        ({"binary": False, "pad_value": 1.0}, "settings of binary layers only"),
    ],
)
def test_bad_settings_are_refused(settings, text):
    settings = {"architecture": "small", "width": 0.1, **settings}
    with pytest.raises(InvalidValue, match=text):
        binarynet(settings.pop("architecture"), generator=seeded(), **settings)
