import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnnlib.errors import InvalidValue
from bnnlib.layers import BinaryLayer, binary_layers
from bnnlib.models import (
    ARCHITECTURES,
    Architecture,
    ParameterCount,
    binary_resnet18,
    binarynet,
    count_parameters,
    penalized_parameters,
)
from bnnlib.quantizers import real

# Of the published networks: the factor on the learning rate of each latent weight.
SCALES = {
    "cifar10": "28.0357 39.1918 48.0000 55.4256 67.8823 78.3837 78.3837 36.9504 26.2552",
    "svhn": "20.0499 27.7128 33.9411 39.1918 48.0000 55.4256 58.4237 36.9504 26.2552",
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


AFTER = {"dropout_position": "after_activation"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["cifar10", "svhn"])
def published(request):
    """Each published network at full width, with its name."""
    return request.param, binarynet(request.param, generator=seeded())


class TestPublishedNetworks:
    def test_scales_of_the_learning_rate_to_four_decimals(self, published):
        name, model = published
        scales = [f"{layer.lr_scale:.4f}" for layer in binary_layers(model)]
        assert scales == SCALES[name].split()

    def test_parameter_counts(self, published):
        name, model = published
        assert count_parameters(model) == COUNTS[name]
        assert count_parameters(model).trained == sum(p.numel() for p in model.parameters())

    def test_order_is_layer_pool_norm_activation(self, published):
        assert list(dict(published[1].named_children())) == ORDER.split()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("target", "layers"),
    [
        ("weights", ["dense3", "dense4", "dense5"]),
        ("gamma", ["norm3", "norm4", "norm5"]),
        ("nothing", []),  # what the original's reached
    ],
)
def test_a_penalty_reaches_the_dense_layers_also_of_the_twin(target, layers, binary):
    model = binarynet("small", generator=seeded(), width=0.1, binary=binary)
    found = penalized_parameters(model, target)
    assert [id(p) for p in found] == [id(model.get_submodule(n).weight) for n in layers]


def test_an_unknown_target_of_a_penalty_is_refused():
    with pytest.raises(InvalidValue, match="'weight'; did you mean 'weights'"):
        penalized_parameters(nn.Sequential(), "weight")


def test_a_penalty_finds_dense_layers_in_any_network_and_never_reaches_nothing_unasked():
    model = binary_resnet18(generator=seeded(), width=1 / 16)
    assert penalized_parameters(model, "weights") == [model.dense.weight]
    with pytest.raises(InvalidValue, match="this network has no gamma of dense layers to penalize"):
        penalized_parameters(model, "gamma")
    one = nn.ModuleDict({"in": nn.Linear(2, 3), "norm": nn.BatchNorm1d(3), "out": nn.Linear(3, 1)})
    assert penalized_parameters(one, "weights") == [one["in"].weight, one["out"].weight]
    assert penalized_parameters(one, "gamma") == [one["norm"].weight]


def test_the_dense_network_has_17024_binary_weights_and_takes_8_x_8_images():
    model = binarynet("dense", generator=seeded())
    assert count_parameters(model).binary == 17_024
    assert list(dict(model.named_children()))[:3] == ["flatten", "dense1", "norm1"]
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


# --------------------------------------------------------------------------------- switches


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "linear"])  # no activation
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
    ("width", "channels", "units"), [(0.05, (2, 3), 26), (2, (64, 128), 1024), (1e-4, (1, 1), 1)]
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
    ("settings", "top"),
    [
        ({}, "dense norm act dense norm act dense norm"),
        ({"dropout": (0.1, 0.2, 0.3)}, "dense 0.1 norm act dense 0.2 norm act dense 0.3 norm"),
        ({"dropout": (0.0, 0.5)}, "dense norm act dense 0.5 norm act dense norm"),
        ({"dropout": (0.1, 0.2)} | AFTER, "dense norm act 0.1 dense norm act 0.2 dense norm"),
    ],
)
def test_dropout_stands_before_the_norm_or_after_the_activation(settings, top):
    model = binarynet("small", generator=seeded(), width=0.1, **settings)
    names = [
        str(layer.p) if "dropout" in name else name.rstrip("0123456789")
        for name, layer in model.named_children()
    ]
    assert names[names.index("dense") :] == top.split()
    assert not settings or model.dropout4.p


def test_quantizer_and_pad_value_reach_the_layers(tiny):
    model = binarynet(tiny, generator=seeded(), weights="real", pad_value=-1.0)
    assert {layer.quantizer for layer in binary_layers(model)} == {real}
    assert (model.conv1.pad_value, model.conv2.pad_value) == (-1, -1)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"pool_every": 0}, "pool_every .* 1 or more, got 0"),
        ({"convolutions": (4, -8)}, "convolutions .* 1 or more, got -8"),
        ({"dense": (2.5,)}, r"dense must be a whole number, .* got 2\.5"),
        ({"image_size": 0}, "image_size .* 1 or more, got 0"),
        ({"classes": True}, "classes must be a whole number, .* got True"),
        ({"pool_every": 1, "image_size": 7}, "3 pools leave nothing of 7 x 7 pixels.*than 1"),
    ],
)
def test_sizes_of_which_no_network_can_be_made_are_refused(sizes, text):
    good = {"convolutions": (4, 4, 4), "pool_every": 2, "dense": (8,), "image_size": 8}
    with pytest.raises(InvalidValue, match=text):
        Architecture(**good | sizes)


def test_an_own_architecture_whose_last_pool_leaves_one_pixel():
    own = Architecture((4, 4, 4), pool_every=1, dense=(), image_size=8, classes=3)
    assert binarynet(own, generator=seeded())(torch.zeros(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"architecture": "cifar"}, "unknown architecture 'cifar'; did you mean 'cifar10'"),
        ({"activation": "binary_tan"}, "did you mean 'binary_tanh'"),
        ({"weights": "deterministically"}, "did you mean 'deterministic'"),
        ({"width": 0}, "width must be positive, got 0"),
        ({"dropout": (0.5, 1.0)}, "dropout.*got 1.0"),
        ({"dropout": (0.1, 0.1, 0.1, 0.1)}, "more numbers than there are places"),
        ({"dropout_position": "before"}, "did you mean 'before_norm'"),
        ({"dropout": (0.1, 0.1, 0.1)} | AFTER, "more numbers than there are places"),
        ({"binary": False, "weights": "real"}, "settings of binary layers only"),
        ({"binary": False, "pad_value": 1.0}, "settings of binary layers only"),
    ],
)
def test_bad_settings_are_refused(settings, text):
    settings = {"architecture": "small", "width": 0.1, **settings}
    with pytest.raises(InvalidValue, match=text):
        binarynet(settings.pop("architecture"), generator=seeded(), **settings)


# --------------------------------------------------------------------------- the residual network


def normalized(x, norm):
    """Evaluation: with the averages, written out."""
    view = (1, -1, 1, 1)
    x = (x - norm.running_mean.view(view)) * norm.running_inv_std.view(view)
    return x * norm.weight.view(view) + norm.bias.view(view)


def residual_by_functions(model, x, act, weight):
    """The scores of `binary_resnet18` by calls of `torch.nn.functional` alone."""
    x = normalized(F.conv2d(x, model.conv1.weight, padding=1), model.norm1)
    for stage in range(1, 5):
        for number in range(1, 5):
            unit = model.get_submodule(f"unit{stage}_{number}")
            stride = 2 if stage > 1 and number == 1 else 1
            y = F.conv2d(act(x), weight(unit.conv.weight), stride=stride, padding=1)
            if stride == 2:
                _, project, norm = unit.shortcut
                x = normalized(F.conv2d(F.avg_pool2d(x, 2), project.weight), norm)
            x = normalized(y, unit.norm) + x
    return F.linear(x.mean((2, 3)), model.dense.weight, model.dense.bias)


def signs(x):
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


RESIDUAL = {
    "binary": ({}, signs, signs),
    "approx": ({"activation": "approx_sign", "weights": "approx_sign"}, signs, signs),
    "scaled": (
        {"weights": "scaled_sign"},
        signs,
        lambda w: signs(w) * w.abs().mean((1, 2, 3), keepdim=True),
    ),
    "float": ({"binary": False}, lambda x: x.clamp(-1, 1), lambda w: w),
}


@pytest.mark.parametrize(("settings", "act", "weight"), RESIDUAL.values(), ids=RESIDUAL)
def test_the_residual_network_is_its_formula(settings, act, weight):
    model = binary_resnet18(generator=seeded(), width=1 / 8, in_channels=1, classes=7, **settings)
    model, x = model.double(), torch.randn(5, 1, 16, 16, generator=seeded(1)).double()
    model(x)  # moves the averages
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.rand(p.shape, generator=seeded(2)) - 0.5)
        scores = model.eval()(x)
        assert scores.shape == (5, 7)
        torch.testing.assert_close(scores, residual_by_functions(model, x, act, weight))


def test_the_residual_network_has_16_binary_convolutions_between_real_layers():
    model = binary_resnet18(generator=seeded())
    layers = binary_layers(model)
    assert [tuple(layer.weight.shape[:2]) for layer in layers[::4]] == [
        (64, 64), (128, 64), (256, 128), (512, 256),
    ]  # fmt: skip
    assert len(layers) == 16
    count = count_parameters(model)
    assert count.binary == 9 * (
        64 * 64 * 4 + 128 * (64 + 3 * 128) + 256 * (128 + 3 * 256) + 512 * (256 + 3 * 512)
    )
    twin = count_parameters(binary_resnet18(generator=seeded(), binary=False))
    assert (twin.binary, twin.trained) == (0, count.trained)


@pytest.mark.parametrize("size", [7, 32, 33])
def test_the_residual_network_takes_images_of_any_size(size):
    model = binary_resnet18(generator=seeded(), width=1 / 16)
    assert model(torch.randn(2, 3, size, size, generator=seeded())).shape == (2, 10)
