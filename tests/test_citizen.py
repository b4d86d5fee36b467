"""Layers, networks and optimizers inside PyTorch's machinery: each works, or says why not."""

import copy
import io
import os
import pickle
import shutil
import sys
from itertools import cycle
from math import inf, nan

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from bnnlib.batches import Batches
from bnnlib.errors import InvalidValue
from bnnlib.layers import (
    BatchNorm,
    BinaryConv2d,
    BinaryLinear,
    BinaryTanh,
    Dropout,
    binary_layers,
    seed_layers,
)
from bnnlib.losses import squared_hinge_loss
from bnnlib.models import Architecture, binary_resnet18, binarynet, make_activation
from bnnlib.names import ACTIVATIONS, OPTIMIZERS, QUANTIZERS
from bnnlib.optim import (
    BinaryAdam,
    clip_latent_weights,
    make_optimizer,
    parameter_groups,
    set_rate,
)
from bnnlib.quantizers import sign
from bnnlib.training import evaluate

# said by PyTorch to itself, as its compiler is imported
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(*shape, seed=1):
    return torch.randn(shape, generator=seeded(seed))


X, LABELS = numbers(6, 3, 8, 8), torch.arange(6)
OURS = ("binary_adam", "bop")


# -------------------------------------------------------------------------------- the networks


def binarynet_(seed=0, **settings):
    shape = Architecture((4, 6), pool_every=2, dense=(12,), image_size=8)
    return binarynet(shape, generator=seeded(seed), **settings)


def resnet(seed=0):
    return binary_resnet18(generator=seeded(seed), width=1 / 16)


def two_layers():
    kernel = BinaryConv2d(3, 4, 3, generator=seeded()), BinaryTanh(), nn.Flatten()
    return nn.Sequential(*kernel, BinaryLinear(256, 10, generator=seeded()))


def short_resnet(seed=0):
    whole = resnet(seed)
    first = [whole.conv1, whole.norm1, whole.unit1_1, whole.unit2_1, whole.pool, whole.flatten]
    return nn.Sequential(*first, BinaryLinear(8, 10, generator=seeded(seed)))


def random_net(seed=0):
    return binarynet_(seed, weights="stochastic", dropout=(0.3, 0.3))


def every_part(seed=0, quantizers=tuple(QUANTIZERS)):
    """Both kinds of layer, every one of these quantizers, and every activation."""
    generator, layers, channels = seeded(seed), [], 3
    units = list(zip(quantizers, cycle(ACTIVATIONS), strict=False))

    def unit(kind, *sizes, quantizer, activation):
        layer = kind(*sizes, quantizer=QUANTIZERS[quantizer], generator=generator)
        return [layer, BatchNorm(sizes[1]), make_activation(activation)]

    for quantizer, activation in units[::2]:
        layers += unit(BinaryConv2d, channels, 4, 3, quantizer=quantizer, activation=activation)
        channels = 4
    layers += [nn.MaxPool2d(4), nn.Flatten()]
    for quantizer, activation in units[1::2]:
        layers += unit(BinaryLinear, 16, 16, quantizer=quantizer, activation=activation)
    return nn.Sequential(*layers, BinaryLinear(16, 10, generator=generator), BatchNorm(10))


def every_fixed_part(seed=0):
    return every_part(seed, [name for name in QUANTIZERS if name != "stochastic"])


FIXED = {"binarynet": binarynet_, "resnet": resnet, "every part": every_fixed_part}
ALL = {"binarynet": binarynet_, "resnet": resnet, "random": random_net, "every part": every_part}
each_network = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
each_fixed_network = pytest.mark.parametrize("make", FIXED.values(), ids=FIXED)


def with_averages(model):
    """The model in evaluation, with averages that no sum of signs falls upon."""
    with torch.no_grad():
        for _ in range(3):
            model(X)
        for norm in model.modules():
            if isinstance(norm, BatchNorm):
                norm.running_mean += 0.013  # of units whose sums all were 0, up to rounding
    return model.eval()


def results(model, x=X, module=None):
    """Scores, loss and gradients, with draws of PyTorch's own that begin at one place."""
    module = module or model
    module.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        scores = model(x)
        loss = squared_hinge_loss(scores, LABELS)
        loss.backward()
    return [scores.detach(), loss.detach(), *(p.grad.clone() for p in module.parameters())]


def train(model, optimizer, steps=1, x=X):
    """So many steps on one batch; returns the losses before each."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = squared_hinge_loss(model(x), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(found, expected):
    return all(map(torch.equal, found, expected))


# -------------------------------------------------------------------------------------- copies


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def restored(pair, fresh):
    """The new pair with the numbers of the other, which pass through a file of tensors alone."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in pair], file)
    file.seek(0)
    for part, state in zip(fresh, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    return fresh


COPIES = {
    "deepcopy": lambda pair, fresh: copy.deepcopy(pair),
    "pickle": lambda pair, fresh: pickle.loads(pickle.dumps(pair)),
    "save": lambda pair, fresh: saved(pair),
    "state_dict": restored,
}
each_copy = pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)


def generators(model):
    return {id(m.generator): m.generator for m in model.modules() if hasattr(m, "generator")}


@pytest.mark.parametrize("seed", [None, 3])
@each_copy
@each_network
def test_a_copied_network_draws_and_computes_as_the_first_and_is_another(make, way, seed):
    model = seed_layers(make(), seed)
    results(model)  # moves averages and the generator
    (twin,) = way((model,), (seed_layers(make(), seed),))
    if way is restored and seed is not None:  # a state_dict has no generators
        seed_layers(model, seed)
    before = copy.deepcopy(model.state_dict())
    found = results(twin)
    assert same(model.state_dict().values(), before.values())
    assert same(found, results(model))
    (ours,), (theirs,) = generators(model).items(), generators(twin).items()
    assert (ours == theirs) == (seed is None)  # one for all layers, and not that of the first


@each_copy
@pytest.mark.parametrize("name", OPTIMIZERS.shipped)
def test_a_copied_optimizer_goes_on_bit_for_bit(name, way):
    def start():
        model = binarynet_()
        return model, make_optimizer(name, model, 0.01)

    whole, stopped = start(), start()
    train(*whole, 4)
    train(*stopped, 2)
    copied = way(stopped, start())
    train(*way(copied, start()), 1)  # a copy of a copy is another, too
    train(*copied, 2)
    assert same(copied[0].state_dict().values(), whole[0].state_dict().values())
    assert type(copied[1]).__name__ == type(whole[1]).__name__


def test_rates_are_scaled_and_clips_are_those_of_the_groups_of_which_some_have_none():
    model = binarynet_()
    optimizer = make_optimizer("SGD", model, 0.1)
    scales = [layer.lr_scale for layer in binary_layers(model)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * s for s in (*scales, 1)]
    free = nn.Parameter(torch.full((1,), 9.0))
    optimizer.add_param_group({"params": [free]})
    for p in model.parameters():
        p.data.fill_(9)
    clip_latent_weights(optimizer)
    assert {layer.weight.max().item() for layer in binary_layers(model)} == {1}
    assert {layer.bias.max().item() for layer in binary_layers(model)} == {9}
    assert free.item() == 9


# -------------------------------------------------------------------- types of number, autocast


@pytest.mark.parametrize("make", [binarynet_, random_net, every_part])
def test_autocast_computes_near_float32(make):
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            _, loss, *grads = results(make())
        found.append((loss, torch.cat([g.flatten() for g in grads])))
    (loss, grads), (expected, expected_grads) = found
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    assert torch.cosine_similarity(grads, expected_grads, dim=0) > 0.99


@pytest.mark.parametrize("name", [*OURS, "SGD"])
@each_network
def test_autocast_trains_and_keeps_parameters_averages_and_loss_in_float32(make, name):
    model = make()
    optimizer = make_optimizer(name, model, 0.01)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            _, loss, *grads = results(model)
        optimizer.step()
    tensors = [loss, *grads, *model.state_dict().values()]
    assert {t.dtype for t in tensors} == {torch.float32}
    assert all(t.isfinite().all() for t in tensors)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model.eval()(X).isfinite().all()


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [*OURS, "SGD"])
@pytest.mark.parametrize("make", [binarynet_, resnet, random_net])
def test_a_network_of_another_type_learns_in_it(make, name, kind):
    model = make().to(kind)
    optimizer = make_optimizer(name, model, 0.03)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = train(model, optimizer, 15, X.to(kind))
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    assert {t.dtype for t in model.state_dict().values()} == {kind}
    assert model.eval()(X.to(kind)).dtype == kind
    weights = torch.cat([layer.weight.abs().flatten() for layer in binary_layers(model)])
    if name in OURS:
        assert (weights == 1).all() if name == "bop" else weights.max() <= 1


@pytest.mark.parametrize("name", OURS)
def test_a_step_in_bfloat16_is_that_of_float64_rounded(name):
    moved = []
    for kind in (torch.bfloat16, torch.float64):
        layer = BinaryLinear(40, 30, generator=seeded()).bfloat16().to(kind)
        optimizer = OPTIMIZERS[name](parameter_groups(layer), lr=0.02)
        for seed in range(3):
            for i, p in enumerate(layer.parameters()):
                p.grad = numbers(*p.shape, seed=10 * seed + i).bfloat16().to(kind)
            optimizer.step()
        moved.append([p.detach().double() for p in layer.parameters()])
    for found, expected in zip(*moved, strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


FUNCTIONS = {name: make_activation(name) for name in ACTIVATIONS}
FUNCTIONS |= {name: QUANTIZERS[name] for name in QUANTIZERS if name != "stochastic"}


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_values_and_slopes_are_the_same_in_every_type(function, kind):
    least = torch.finfo(torch.float32).smallest_normal
    numbers = [0.0, -0.0, least, -least, 0.5, -0.5, 1, -1, 1.015625, -1.015625, 8]
    found = []
    for each in (kind, torch.float32):
        x = torch.tensor([numbers], dtype=torch.bfloat16).to(each).requires_grad_()
        y = function(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == each
        found.append([y.float(), x.grad.float()])
    torch.testing.assert_close(*found, rtol=2**-7, atol=0)


# --------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def compiled():
    """Compiles with a backend that traces forward and backward, and generates no code."""
    torch._dynamo.reset()
    yield lambda f, **how: torch.compile(f, **{"backend": "aot_eager", "fullgraph": True} | how)
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [short_resnet, every_part])
def test_a_compiled_network_is_one_graph_and_computes_the_same(make, compiled, kernels):
    kernels("off")  # as a compiled network; gradients are rounded otherwise with them
    model, plain = make(), make()
    graph = compiled(model)
    for found, expected in zip(results(graph, module=model), results(plain), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(results(graph.eval(), module=model), results(plain.eval()))


def test_dropout_and_random_weights_compile_after_their_generator_is_taken_away(compiled):
    model, plain = seed_layers(seed_layers(random_net(), 3), None), random_net()
    torch.testing.assert_close(results(compiled(model), module=model), results(plain))


@pytest.mark.parametrize(
    "layer", [Dropout(0.5), BinaryLinear(8, 8, quantizer=QUANTIZERS["stochastic"])]
)
def test_a_graph_with_a_generator_is_refused_and_runs_in_python_without_fullgraph(layer, compiled):
    x = torch.ones(4, 8)
    refused = pytest.raises(torch._dynamo.exc.Unsupported, match=r"seed_layers\(model, None\)")
    with refused as error:
        compiled(seed_layers(layer, 3))(x)
    assert "InvalidValue(" in str(error.value)
    found = compiled(seed_layers(layer, 3), fullgraph=False)(x)
    assert torch.equal(found, seed_layers(layer, 3)(x))


def test_a_compiled_network_is_evaluated_as_ever(noise, compiled):
    model, batches = seed_layers(with_averages(binarynet_()), 3), Batches(noise(30), 10)
    found, expected = (evaluate(m, batches) for m in (compiled(model), model))
    assert torch.equal(found.mistakes, expected.mistakes)


CXX = os.environ.get("CXX", "g++")


@pytest.mark.skipif(not shutil.which(CXX), reason=f"torch.compile needs a C++ compiler, no {CXX}")
def test_generated_code_computes_the_same(compiled):
    model, x = nn.Sequential(BinaryTanh(), BinaryLinear(7, 5, generator=seeded())), numbers(6, 7)
    values = [x.requires_grad_(), *model.parameters()]
    with torch._inductor.config.patch(compile_threads=1):
        graph = compiled(model, backend="inductor")
        found = torch.autograd.grad(graph(x).square().sum(), values)
    torch.testing.assert_close(found, torch.autograd.grad(model(x).square().sum(), values))


# ------------------------------------------------------------------------------------ torch.func


def assert_gradients_of_samples(model, x, loss):
    """Those of vmap(grad) against a loop of backward passes, one a sample; in float64."""
    model, x = model.double(), x.double()
    state = {k: v.detach() for k, v in model.state_dict().items()}
    parameters = {k: state[k] for k, _ in model.named_parameters()}

    def of_one(parameters, x, i):
        return loss(functional_call(model, state | parameters, (x.unsqueeze(0),)), i.view(1))

    found = vmap(grad(of_one), (None, 0, 0))(parameters, x, torch.arange(len(x)))
    for i in range(len(x)):
        one = loss(model(x[i : i + 1]), torch.tensor([i]))
        expected = torch.autograd.grad(one, list(model.parameters()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient)


LAYERS = {
    "linear": (
        lambda: BinaryLinear(7, 5, generator=seeded()),
        lambda: BinaryLinear(5, 3, generator=seeded(2)),
        (7,),
    ),
    "conv": (
        lambda: BinaryConv2d(4, 6, 3, 2, groups=2, pad_value=1.0, generator=seeded()),
        lambda: BinaryConv2d(6, 3, 3, generator=seeded(2)),
        (4, 6, 6),
    ),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_samples_of_a_layer_and_an_activation(kind, activation):
    layer, next_layer, size = LAYERS[kind]
    model = nn.Sequential(layer(), make_activation(activation), next_layer())
    assert_gradients_of_samples(model, numbers(5, *size), lambda y, i: y.pow(3).mean())


@each_fixed_network
def test_gradients_of_samples_of_a_network(make):
    assert_gradients_of_samples(with_averages(make()), X, squared_hinge_loss)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("training", [True, False])
@each_fixed_network
def test_networks_side_by_side_are_each_by_itself(make, training):
    models = [with_averages(make(seed=s)).double().train(training) for s in range(3)]
    stacked = stack_module_state(models)
    apart, x = copy.deepcopy(models), X.double()

    def loss(parameters, buffers):
        scores = functional_call(models[0], (parameters, buffers), (x,))
        return squared_hinge_loss(scores, LABELS), scores

    found, scores = vmap(grad(loss, has_aux=True))(*stacked)
    for i, model in enumerate(apart):
        expected, _, *grads = results(model, x)
        torch.testing.assert_close(scores[i], expected)
        torch.testing.assert_close([g[i] for g in found.values()], grads)
        torch.testing.assert_close([b[i] for b in stacked[1].values()], list(model.buffers()))


@pytest.mark.parametrize("function", [sign, *FUNCTIONS.values()])
def test_a_function_of_each_number_is_mapped_over_any_dimension(function):
    x = numbers(4, 3, 5)
    expected = torch.stack([function(x[:, i]) for i in range(3)])
    assert torch.equal(vmap(function, 1)(x), expected)


def test_what_is_drawn_under_vmap_is_drawn_as_it_says():
    layer = BinaryLinear(1, 2, bias=False, quantizer=QUANTIZERS["stochastic"], generator=seeded())
    x, n = torch.ones(4000, 1), 4000
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)
    signs = vmap(seed_layers(layer, 3), randomness="same")(x)
    assert (signs == signs[0]).all()
    signs = vmap(seed_layers(layer, 3), randomness="different")(x)
    assert torch.equal(signs, vmap(seed_layers(layer, 3), randomness="different")(x))
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    p = (layer.weight.flatten() + 1) / 2
    assert ((signs == 1).float().mean(0) - p).abs().max() < 5 * 0.5 / n**0.5
    dropped = vmap(seed_layers(Dropout(0.5), 3), randomness="different")(torch.ones(50, 40))
    assert len({tuple(row) for row in dropped.tolist()}) == 50


@pytest.mark.parametrize("seed", [None, 3])
def test_gradients_of_samples_go_straight_through_what_is_drawn(seed):
    layer = BinaryLinear(3, 2, quantizer=QUANTIZERS["stochastic"], generator=seeded())
    seed_layers(layer, seed)
    parameters, x = {k: v.detach() for k, v in layer.named_parameters()}, numbers(5, 3)

    def total(parameters, x):
        return functional_call(layer, parameters, (x,)).sum()

    found = vmap(grad(total), (None, 0), randomness="different")(parameters, x)
    torch.testing.assert_close(found["weight"], x.unsqueeze(1).expand(5, 2, 3))


# -------------------------------------------------------------------------------- export, ONNX


def in_onnx(model, x, path, **how):
    """A function of an array that runs the exported model, outside PyTorch."""
    pytest.importorskip("onnxscript")
    torch.onnx.export(model, (x,), path, input_names=["x"], dynamo=True, verbose=False, **how)
    try:
        from onnxruntime import InferenceSession as Session
    except ImportError:  # it is not built for every machine
        from onnx.reference import ReferenceEvaluator as Session
    session = Session(path)
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.filterwarnings("ignore:`isinstance.treespec")
@each_fixed_network
def test_exported_networks_and_their_onnx_score_as_the_network(make, tmp_path):
    model, batch = with_averages(make()), ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (X,), dynamic_shapes=batch).module()
    other = in_onnx(model, X, tmp_path / "net.onnx", dynamic_shapes=batch)
    for x in (X, numbers(9, 3, 8, 8, seed=2), torch.zeros(2, 3, 8, 8)):
        scores = model(x).detach()
        assert torch.equal(program(x), scores)
        assert torch.equal(other(x).argmax(1), scores.argmax(1))
        torch.testing.assert_close(other(x), scores, rtol=1e-4, atol=1e-4)


class Signs(nn.Module):
    """Every function of signs, side by side."""

    def forward(self, x):
        rounding = [name for name in ACTIVATIONS if name != "hardtanh"]  # which rounds nothing
        activations = [make_activation(name)(x) for name in rounding]
        return torch.stack([*activations, QUANTIZERS["clipped"](x)])


@pytest.mark.filterwarnings("ignore:`isinstance.treespec")
def test_signs_are_exact_in_onnx(tmp_path):
    numbers = [0.0, -0.0, 1e-38, -1e-38, 1e-45, -1e-45, 0.3, -0.3, 7, -7, inf, -inf, nan]
    x = torch.tensor(numbers)
    found = in_onnx(Signs().eval(), x, tmp_path / "signs.onnx")(x)
    assert torch.equal(found, Signs()(x))
    assert found[0].tolist() == [1, 1] + [1, -1] * 5 + [1]


def test_an_export_with_a_generator_is_refused_in_one_line():
    model = seed_layers(random_net(), 3).eval()
    with pytest.raises(InvalidValue, match=r"seed_layers\(model, None\) first$") as refused:
        torch.export.export(model, (X,))
    assert "\n" not in str(refused.value)
    torch.export.export(seed_layers(model, None), (X,))


# --------------------------------------------------- loops of others: loaders, schedules, averages


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_what_batches_gives(noise, workers):
    data = noise(20)
    found = list(DataLoader(data, batch_size=8, num_workers=workers))
    for pair, expected in zip(found, Batches(data, 8).in_order(), strict=True):
        assert same(pair, expected)
        assert [t.dtype for t in pair] == [torch.float32, torch.int64]


class Net(nn.Module):
    """As one would write it, with layers of both libraries."""

    def __init__(self):
        super().__init__()
        self.conv = BinaryConv2d(3, 32, 3, stride=2, generator=seeded())
        self.norm, self.act = nn.BatchNorm2d(32), BinaryTanh()
        self.dense = BinaryLinear(512, 10, generator=seeded())
        self.last = BatchNorm(10)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        return self.last(self.dense(x.flatten(1)))


def test_an_ordinary_loop_memorizes_a_loader(noise):
    data, model = noise(40), Net()
    loader = DataLoader(data, batch_size=20, shuffle=True, generator=seeded())
    optimizer = BinaryAdam(parameter_groups(model), lr=0.003)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(25):
        for x, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        schedule.step()
    assert evaluate(model, Batches(data, 20)).error == 0


SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
}
SHARES = {  # of the first rate, at each step
    "step": [1, 0.5, 0.25],
    "cosine": [(1 + np.cos(np.pi * i / 4)) / 2 for i in range(3)],
    "lambda": [1, 1 / 2, 1 / 3],
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", [*OURS, "SGD"])
def test_a_schedule_of_pytorch_moves_the_rate_as_set_rate_does(name, kind):
    ours, plain = binarynet_(), binarynet_()
    optimizer, by_hand = (make_optimizer(name, m, 0.01) for m in (ours, plain))
    schedule = SCHEDULES[kind](optimizer)
    for share in SHARES[kind]:
        train(ours, optimizer)
        schedule.step()
        set_rate(by_hand, 0.01 * share)
        train(plain, by_hand)
    for found, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [*OURS, "SGD"])
def test_averaged_weights_are_means_of_latent_weights_and_averages(name):
    model = binarynet_()
    optimizer, average = make_optimizer(name, model, 0.01), AveragedModel(model, use_buffers=True)
    states = []
    for _ in range(4):
        train(model, optimizer)
        average.update_parameters(model)
        states.append(copy.deepcopy(model.state_dict()))
    means = {k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]}
    torch.testing.assert_close(dict(average.module.state_dict()), means)
    expected = binarynet_()
    expected.load_state_dict(average.module.state_dict())
    assert torch.equal(average.eval()(X), expected.eval()(X))


# --------------------------------------------------------------------------- two processes


def train_half(rank, folder):
    """Two steps on half of the images: one of two processes."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(two_layers())
    optimizer = BinaryAdam(parameter_groups(model), lr=0.01)
    half, grads = slice(3 * rank, 3 * rank + 3), []
    for _ in range(2):
        optimizer.zero_grad()
        squared_hinge_loss(model(X[half]), LABELS[half]).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    torch.save((grads, list(model.state_dict().values())), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without distributed")
def test_two_processes_have_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(train_half, (str(tmp_path),), nprocs=2)
    (grads, state), (other_grads, other_state) = (torch.load(tmp_path / f"{i}.pt") for i in (0, 1))
    assert same(state, other_state)
    assert all(map(same, grads, other_grads))
    model = two_layers()
    squared_hinge_loss(model(X), LABELS).backward()
    torch.testing.assert_close(grads[0], [p.grad for p in model.parameters()])
