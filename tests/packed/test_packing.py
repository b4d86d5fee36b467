"""A packed network gives every activation and every score of the network, to the last bit."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from bnnlib.batches import Batches
from bnnlib.cli import main
from bnnlib.data.images import scale_pixels
from bnnlib.errors import DamagedFile, InvalidValue
from bnnlib.kernels.precision import set_precision
from bnnlib.layers import (
    Activation,
    BatchNorm,
    BinaryConv2d,
    BinaryLayer,
    BinaryLinear,
    BinarySigmoid,
    BinaryTanh,
    evaluating,
    seed_layers,
)
from bnnlib.models import Architecture, binary_resnet18, binarynet
from bnnlib.optim import make_optimizer
from bnnlib.packed.network import ABOUT, PackedNetwork, load_packed
from bnnlib.packed.packing import pack
from bnnlib.packed.steps import Flatten, Flip, Layer, Pool, Sums, unpack_bits
from bnnlib.quantizers import approx_step, binary_sigmoid, scaled_sign
from bnnlib.tensors import tensor_bytes
from bnnlib.training import TrainingState, fit

SIZES = (1, 2, 63, 64, 65)
LAST = torch.channels_last
A_NORM = (BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d)


def pixels(n, size=8, channels=3, seed=0):
    """Noise; one image all dark, one all bright, where there are so many."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    x[1:2], x[2:3] = 0, 255
    return x


@torch.no_grad()
def stirred(model, seed=0, ties=False):
    """Biases, averages, and gammas of which 15 % are negative and one in ten is 0.

    `ties`: sums are often exactly at the threshold, whole numbers as they are.
    """
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, BinaryLayer) and m.bias is not None:
            m.bias.normal_(generator=g)
        if isinstance(m, A_NORM):
            n = m.weight.numel()
            m.weight.uniform_(0.2, 1, generator=g)
            m.weight[torch.rand(n, generator=g) < 0.15] *= -1
            m.weight[torch.rand(n, generator=g) < 0.1] = 0
            m.bias.normal_(0, 0.3, generator=g)
            m.running_mean.normal_(0, 2, generator=g)
            spread = m.running_inv_std if isinstance(m, BatchNorm) else m.running_var
            spread.uniform_(0.05, 0.3, generator=g)
            if ties:
                m.bias.zero_()
                m.running_mean.round_()
        if ties and isinstance(m, BinaryLayer) and m.bias is not None:
            m.bias.round_()
    return model


@torch.no_grad()
def plain(model, x):
    """The scores of the network, and its activations in order."""
    found = []
    acts = [m for m in model.modules() if isinstance(m, BinaryTanh | BinarySigmoid | Activation)]
    hooks = [m.register_forward_hook(lambda *a: found.append(a[2])) for m in acts]
    with evaluating(model, "deterministic"):
        scores = model(scale_pixels(x))
    for hook in hooks:
        hook.remove()
    return scores, found


def packed_activations(network, x):
    """What the layers that take words are fed with, as bits (N, C, H, W)."""
    found, after = [], network.steps[1:]
    for step, following in zip(network.steps, after, strict=False):
        x = step(x)
        if isinstance(following, Layer | Sums | Flatten) and not isinstance(step, Flatten):
            channels = out_of(network.steps[: network.steps.index(following)])
            found.append(torch.from_numpy(unpack_bits(x, channels)).permute(0, 3, 1, 2))
    return found


def out_of(steps):
    return next(step.out for step in reversed(steps) if hasattr(step, "out"))


def assert_same(model, x, network=None):
    """Scores and activations, from pixels and from floats."""
    network = network or pack(model)
    for images in (x, scale_pixels(x)):
        scores, acts = plain(model, images)
        assert torch.equal(network(images), scores)
        if isinstance(model, nn.Sequential):
            found = packed_activations(network, images)
            assert len(found) == len(acts)
            for bits, act in zip(found, acts, strict=True):
                assert torch.equal(bits.flatten(1) == 1, act.flatten(1) == 1)
    return network


networks = st.fixed_dictionaries(
    {
        "convolutions": st.lists(st.integers(1, 70), max_size=3).map(tuple),
        "pool_every": st.integers(1, 3),
        "dense": st.lists(st.integers(1, 130), max_size=2).map(tuple),
        "image_size": st.integers(8, 11),
        "in_channels": st.sampled_from([1, 3]),
        "classes": st.integers(1, 12),
    }
)


@settings(max_examples=25, deadline=None)
@given(
    sizes=networks,
    activation=st.sampled_from(["binary_tanh", "binary_sigmoid", "approx_sign", "approx_step"]),
    weights=st.sampled_from(["deterministic", "stochastic", "real", "clipped"]),
    padding=st.sampled_from([0.0, 0.0, 1.0, -1.0]),
    n=st.sampled_from(SIZES),
    form=st.sampled_from([LAST, torch.contiguous_format]),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_binarynet(sizes, activation, weights, padding, n, form, ties, seed):
    a = Architecture(**sizes)
    if activation in ("binary_sigmoid", "approx_step"):
        padding = abs(padding)
    how = {"activation": activation, "weights": weights, "pad_value": padding}
    generator = torch.Generator().manual_seed(seed)
    model = binarynet(a, generator=generator, dropout=(0.2, 0.5)[: len(a.dense)], **how)
    model = stirred(model, seed, ties).to(memory_format=form)
    x = pixels(n, a.image_size, a.in_channels, seed).contiguous(memory_format=form)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_same(model, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("weights", ["deterministic", "stochastic"])
def test_a_trained_network(noise, tiny, generator, weights):
    model = binarynet(tiny, generator=generator, weights=weights)
    seed_layers(model, 1)
    state = TrainingState(model, make_optimizer("binary_adam", model, 0.01), generator)
    train = Batches(noise(60), 20)
    fit(state, train, rates=[0.01] * 3, progress="none")
    assert_same(model, noise(60, seed=3).images)
    assert_same(model, pixels(65))


def conv_net(*between, act=BinaryTanh, flat=True, **how):
    generator = torch.Generator().manual_seed(3)
    conv = partial(BinaryConv2d, generator=generator)
    layers = [conv(3, 9, 3), nn.BatchNorm2d(9), act(), conv(9, 70, (3, 1), **how), *between]
    layers += [nn.Flatten(), BinaryLinear(70 * 16, 5, generator=generator)] if flat else []
    return nn.Sequential(*layers)


POOL = nn.MaxPool2d(2)
OTHERS = {
    "pool, norm": conv_net(POOL, nn.BatchNorm2d(70), BinaryTanh()),
    "norm, pool": conv_net(nn.BatchNorm2d(70), POOL, BinaryTanh()),
    "after the activation": conv_net(nn.BatchNorm2d(70), nn.Dropout(0.5), BinarySigmoid(), POOL),
    "no norm": conv_net(POOL, Activation(approx_step)),
    "stride, groups of 1": conv_net(BatchNorm(70), BinaryTanh(), stride=2),
    "zero and one": conv_net(POOL, BatchNorm(70), BinaryTanh(), act=BinarySigmoid),
    "function": conv_net(POOL, BatchNorm(70), Activation(binary_sigmoid)),
    "overlapping pool": conv_net(
        nn.MaxPool2d(3, 1), nn.MaxPool2d((3, 3), 1), BatchNorm(70), BinaryTanh()
    ),
    "nested": nn.Sequential(
        nn.Sequential(conv_net(POOL, BatchNorm(70), BinaryTanh())), nn.BatchNorm1d(5)
    ),
    "real ends": nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), BinaryTanh(), BinaryConv2d(7, 6, 3),
        nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3),
    ),
    "real, flattened": nn.Sequential(
        nn.Conv2d(3, 7, 3, 3), BatchNorm(7), BinarySigmoid(), nn.Flatten(),
        BinaryLinear(7 * 4, 3, bias=False),
    ),
    "classes by convolution": nn.Sequential(
        BinaryConv2d(3, 8, 3), BatchNorm(8), BinaryTanh(), BinaryConv2d(8, 4, 8, padding=0),
        nn.Flatten(), BatchNorm(4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("n", [1, 65])
@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_ones_own(name, n, tmp_path):
    model = stirred(OTHERS[name], 5)
    network = pack(model)
    network.save(tmp_path / "net")
    scores, _ = plain(model, pixels(n))
    assert torch.equal(network(pixels(n)), scores)
    assert torch.equal(load_packed(tmp_path / "net")(pixels(n)), scores)


@pytest.mark.parametrize("form", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("activation", ["binary_tanh", "binary_sigmoid"])
def test_a_residual_network(activation, form, generator, tmp_path):
    model = stirred(binary_resnet18(width=0.1, activation=activation, generator=generator))
    model, network = model.to(memory_format=form), pack(model.to(memory_format=form))
    assert network.first_layer == "float"
    network.save(tmp_path / "net")
    for n in (1, 3):
        scores, _ = plain(model, pixels(n, 20))
        for found in (network, load_packed(tmp_path / "net")):
            assert torch.equal(found(pixels(n, 20)), scores)


def test_integers_decide_where_a_sum_lies_on_the_threshold(generator):
    a = Architecture((20,), 1, (), image_size=8)
    model = stirred(binarynet(a, generator=generator), ties=True)
    with torch.no_grad():
        model.conv1.bias.zero_()
    network = assert_same(model, pixels(65))
    assert network.first_layer == "integers"


def test_a_first_layer_of_many_terms_stays_float(generator):
    a = Architecture((), 1, (20,), image_size=8)
    network = assert_same(stirred(binarynet(a, generator=generator)), pixels(65, 8))
    assert network.first_layer == "float"
    assert "first layer in float: First" in repr(network)


def test_a_layer_that_was_trained_in_half_precision(tiny, generator):
    model = stirred(binarynet(tiny, generator=generator))
    assert_same(model, pixels(5), pack(set_precision(model, torch.randn(4, 3, 8, 8))))


def test_slices_change_nothing(tiny, generator, monkeypatch):
    network, x = pack(stirred(binarynet(tiny, generator=generator))), pixels(12)
    whole = network(x)
    monkeypatch.setattr("bnnlib.packed.network.SLICE", 5)
    assert torch.equal(network(x), whole)
    assert torch.equal(network(x.numpy()), whole)
    assert network(x[:0]).shape == (0, 10)


# ------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "has no binary layers"),
        (binarynet("small", binary=False), "act1 cannot be packed: Hardtanh of real numbers"),
        (
            nn.PReLU(),
            "the network cannot be packed: PReLU of real numbers; what can be packed: an nn",
        ),
        (conv_net(nn.ReLU(), flat=False), "4 cannot be packed: ReLU of real numbers"),
        (conv_net(BinaryTanh(), flat=False), "scores are an activation"),
        (conv_net(BinaryTanh(), nn.Linear(8, 3), flat=False), "Linear after an activation"),
        (conv_net(BinaryTanh(), BinaryLinear(8, 3), flat=False), "dense layer takes what"),
        (conv_net(groups=1, quantizer=scaled_sign), "3 cannot be packed: its weights are not"),
        (conv_net(nn.MaxPool2d(3, 2, 1), BinaryTanh()), "a pool with padding"),
        (conv_net(BinaryTanh(), act=BinarySigmoid, pad_value=-1.0), "pad_value is -1.0"),
        (conv_net(BinaryTanh(), pad_value=0.5), "pad_value is 0.5"),
        (nn.Sequential(BinaryConv2d(3, 6, 3, groups=3), BinaryTanh()), "3 groups"),
        (conv_net(nn.BatchNorm2d(70, track_running_stats=False)), "no running averages"),
        (binarynet("small").double(), "packed in float32, got torch.float64"),
    ],
)
def test_what_cannot_be_packed_is_named(model, why):
    with pytest.raises(InvalidValue, match=why):
        pack(model)


@pytest.mark.parametrize(
    ("x", "why"),
    [
        ([[1]], "must be"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), "must be"),
        (torch.zeros(3, 8, 8), "must be"),
        (pixels(2, channels=1), "images of 3 channels"),
        (pixels(2, 16), "another size"),
        (pixels(2, 1), "leaves nothing"),
    ],
)
def test_images_that_do_not_fit_are_refused(x, why, tiny, generator):
    with pytest.raises(InvalidValue, match=why):
        pack(binarynet(tiny, generator=generator))(x)


# ------------------------------------------------------------------------------------- files


@pytest.fixture
def file(tiny, generator, tmp_path):
    """The packed network in a file, with at least one flip."""
    network = pack(stirred(binarynet(tiny, generator=generator), 1))
    assert {type(step) for step in network.steps} >= {Flip, Pool, Flatten}
    network.save(tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.mark.parametrize(("name", "limit"), [("cifar10", 1_850_000), ("svhn", 850_000)])
def test_files_are_as_small_as_their_bits(name, limit, generator, tmp_path):
    assert pack(binarynet(name, generator=generator)).save(tmp_path / "net") < limit
    assert (tmp_path / "net").stat().st_size < limit


def test_a_file_gives_the_same_network(file, tiny, generator):
    model = stirred(binarynet(tiny, generator=generator.manual_seed(0)), 1)
    network = assert_same(model, pixels(65), load_packed(file))
    assert network.first_layer == pack(model).first_layer
    with pytest.raises(InvalidValue, match="is there already"):
        network.save(file)


def test_a_file_can_be_read_as_its_documentation_says(file, tiny, generator):
    model = stirred(binarynet(tiny, generator=generator.manual_seed(0)), 1)
    words = load_file(file)["0.words"].numpy().view(np.uint8)  # (4, 3, 3, 8)
    for o, y, x, c in np.ndindex(4, 3, 3, 3):
        bit = words[o, y, x, c // 8] >> (c % 8) & 1
        assert (bit == 1) == (model.conv1.weight[o, c, y, x] >= 0)


def change(path, alter):
    """Write the file anew, with other tensors or another description."""
    from bnnlib.tensors import read_tensors

    tensors, about = read_tensors(path)
    text = json.loads(about[ABOUT])
    alter(tensors, text)
    path.write_bytes(tensor_bytes(tensors, {ABOUT: json.dumps(text)}))


def setting(i, name, value):
    return lambda tensors, text: text["steps"][i].__setitem__(name, value)


def tensor(ending, made):
    def alter(tensors, text):
        name = next(name for name in sorted(tensors) if name.endswith(ending))
        tensors[name] = made(tensors[name])

    return alter


ALTERED = {
    "format": lambda tensors, text: text.update(format=2),
    "no steps": lambda tensors, text: text.pop("steps"),
    "no list": lambda tensors, text: text.update(steps=3),
    "nothing": lambda tensors, text: (text.update(steps=[]), tensors.clear()),
    "kind": setting(0, "kind", "layers"),
    "no kind": lambda tensors, text: text["steps"][0].pop("kind"),
    "unknown setting": setting(0, "strides", [1, 1]),
    "channels": setting(0, "channels", 700),
    "other channels": setting(0, "channels", 2),
    "huge channels": setting(0, "channels", 10**30),
    "stride": setting(0, "stride", [0, 1]),
    "padding": setting(0, "padding", "same"),
    "pad value": setting(0, "pad_value", 2),
    "dense": setting(0, "dense", True),
    "low": setting(1, "low", 1),
    "pool": setting(2, "size", [0, 0]),
    "module": setting(-1, "module", "Dropout"),
    "features": setting(-1, "features", 10**9),
    "missing": lambda tensors, text: tensors.pop("0.words"),
    "too many": lambda tensors, text: tensors.update(more=torch.zeros(1)),
    "type": tensor(".thresholds", lambda t: t.double()),
    "shape": tensor(".thresholds", lambda t: t[:-1]),
    "bits past the last": tensor("0.words", lambda t: torch.full_like(t.long(), -1).view(t.dtype)),
    "as a list": tensor(".thresholds", lambda t: t[None]),
    "chain": lambda tensors, text: text["steps"].pop(1),
    "long flips": tensor(".flips", lambda t: t.repeat(2)),
    "flips": tensor(".flips", lambda t: t.int()),
    "norm": tensor(".weight", lambda t: t[:-1]),
}


@pytest.mark.parametrize("name", ALTERED)
def test_a_file_whose_parts_do_not_fit_is_refused(name, file):
    change(file, ALTERED[name])
    with pytest.raises(DamagedFile, match=r"net\.safetensors"):
        load_packed(file)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_file_that_was_cut_off_is_refused(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DamagedFile):
        load_packed(file)


def test_a_file_of_something_else_is_refused(file):
    file.write_bytes(tensor_bytes({"x": torch.zeros(3)}))
    with pytest.raises(DamagedFile, match="no packed network"):
        load_packed(file)
    with pytest.raises(DamagedFile):
        load_packed(file.with_name("absent"))


# ------------------------------------------------------------------------------ command line


def call(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="bnnlib")


def test_a_run_is_packed_and_scored_alike(finished, tmp_path):
    out = tmp_path / "packed.safetensors"
    said = call("pack", finished.folder, "--out", out).stdout.splitlines()
    assert said[0].startswith(f"{out.stat().st_size:,} bytes, first layer in ")
    assert said[1] == str(out)
    assert isinstance(load_packed(out), PackedNetwork)
    assert "is there already" in call("pack", finished.folder, "--out", out).stderr
    score = call("evaluate", finished.folder).stdout.strip()
    assert call("evaluate", finished.folder, "--packed").stdout == f"{score}, packed\n"
    refused = call("evaluate", finished.folder, "--packed", "--device", "cuda")
    assert (refused.exit_code, "on the CPU, got" in refused.stderr) == (2, True)


def test_a_run_that_kept_no_parameters_cannot_be_packed(folder):
    (folder / "parameters.safetensors").unlink()
    for command, done in (("pack", "packed"), ("export", "exported")):
        refused = call(command, folder)
        assert (refused.exit_code, f"cannot be {done}: it kept no" in refused.stderr) == (2, True)


def test_a_run_is_exported_and_checked(finished, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "model.onnx"
    said = call("export", finished.folder, "--out", out).stdout
    assert "the same class for 16 of 16 images of noise, scores differ by " in said
    assert "is there already" in call("export", finished.folder, "--out", out).stderr
