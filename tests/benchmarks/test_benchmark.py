"""The benchmark's contenders compute the same, and its harness reckons and reports rightly."""

import json
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from math import prod, sqrt
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.nn.functional as F

from benchmarks import contenders, contention, inference, records, rounds, startup, training
from benchmarks.contenders import Bnnlib, FloatTwin, HalfFloatTwin, TunedFloatTwin, forced
from benchmarks.engines import ENGINES, HalfEager, Reference
from benchmarks.limits import WORDS, Limits, Rates, convolution_gradient
from benchmarks.naive import CopyingAdam, NaiveBnn
from benchmarks.peers import Brevitas, Larq
from benchmarks.settings import Setting, forward_flops, made_up, shapes, training_flops
from benchmarks.timings import ENGINE_LISTS, contention_table, draw, draw_inference, load_timings
from benchmarks.workers import (
    CONTENDERS,
    LIMIT,
    Crew,
    Subject,
    Worker,
    WorkerDied,
    peak_memory,
    prepare,
    working,
)
from bnnlib.cli import main
from bnnlib.errors import InvalidValue
from bnnlib.files import write_json
from bnnlib.kernels.compiled import VARIABLE, library, sets_here
from bnnlib.models import binarynet, count_parameters
from bnnlib.optim import BinaryAdam, parameter_groups
from bnnlib.runs.folder import load_run

OURS = {
    "bnnlib": Bnnlib,
    "float twin": FloatTwin,
    "float twin, tuned": TunedFloatTwin,
    "naive BNN": NaiveBnn,
}
TINY = Setting("svhn", width=1 / 16, batch_size=4, steps=2, threads=1)

# -------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("network", "forward", "step"), [("cifar10", 1.234, 3.695), ("svhn", 0.316, 0.945)]
)
def test_operations_of_an_image_in_billions(network, forward, step):
    operations = forward_flops(network, 1), training_flops(network, 1)
    assert [n / 1e9 for n in operations] == pytest.approx([forward, step], abs=5e-4)


@pytest.fixture
def brief(monkeypatch):
    """The rates of the machine are measured on little."""
    monkeypatch.setattr("benchmarks.limits.COPIED", 1000)
    monkeypatch.setattr("benchmarks.limits.GEMM_SIZES", (8,))


@pytest.mark.usefixtures("brief")
def test_the_limit_has_every_product_of_a_step_once():
    products = Limits(TINY).measure()["products"]
    names = [(p["layer"], p["kind"]) for p in products]
    assert len(set(names)) == len(names) == 3 * len(shapes(TINY.network, TINY.width)) - 1
    assert ("conv1", "data gradient") not in names
    of_batch = TINY.batch_size * training_flops(TINY.network, TINY.width)
    assert sum(p["flops"] for p in products) == of_batch
    assert all(len(set(p["seconds"]) - {WORDS}) == 2 for p in products)


@pytest.mark.usefixtures("brief")
def test_every_way_of_a_product_computes_the_same_and_kernels_take_those_that_they_can():
    kernels = set()
    for product in Limits(replace(TINY, width=1 / 2)).products:
        one, other, *words = (way() for way in product.ways.values())
        if product.layer.startswith("dense") and product.kind == "weight gradient":
            other = other.t()
        for found in (other, *words):
            torch.testing.assert_close(one, found, rtol=1e-4, atol=1e-4 * one.abs().max().item())
        if words:
            kernels.add(product.kind)
            assert product.ways.keys() - {WORDS} < product.ways.keys()
    assert {"forward", "weight gradient"} <= kernels or library() is None


@pytest.mark.usefixtures("brief")
def test_the_bytes_of_a_product_are_those_of_its_three_tensors():
    products = {(p.layer, p.kind): p for p in Limits(TINY).products}
    x, w, g = 4 * TINY.batch_size * 64, 4 * 64 * 64, 4 * TINY.batch_size * 64
    product = products["dense8", "weight gradient"]
    assert product.bytes == {"floats": x + w + g, "words": x // 32 + w + g}
    assert products["dense8", "data gradient"].bytes["words"] == x + w // 32 + g


@pytest.mark.usefixtures("brief")
def test_the_rates_of_the_machine_are_positive():
    rates = Rates(TINY).measure()["rates"]
    assert set(rates) == {"floats", "bytes"} | ({"words"} if library() else set())
    assert all(rate > 0 for rate in rates.values())


def test_gradients_of_a_convolution_are_autograds(generator):
    x, w = (torch.randn(shape, generator=generator) for shape in ((2, 3, 5, 5), (4, 3, 3, 3)))
    y = F.conv2d(x.requires_grad_(), w.requires_grad_(), padding=1)
    expected = torch.autograd.grad(y.sum(), (x, w))
    for of, grad in zip(("data", "weight"), expected, strict=True):
        found = convolution_gradient(torch.ones_like(y), x.detach(), w.detach(), of)
        torch.testing.assert_close(found, grad)


# -------------------------------------------------------------------------------- contenders


@pytest.mark.parametrize("kind", OURS.values())
def test_a_contender_trains_the_same_layers(kind):
    contender = kind(TINY)
    model = binarynet(TINY.network, generator=torch.Generator(), width=TINY.width)
    own, library = (dict(m.named_parameters()) for m in (contender.model, model))
    assert {k: p.shape for k, p in own.items()} == {k: p.shape for k, p in library.items()}
    before = {name: p.detach().clone() for name, p in own.items()}
    contender.epoch()
    for name, p in own.items():
        assert p.isfinite().all()
        assert p.dim() == 1 or not torch.equal(p, before[name])
    assert 0 <= contender.evaluate(1) <= 1


def test_tuned_and_plain_float_twin_compute_the_same(generator):
    plain, tuned = FloatTwin(TINY), TunedFloatTwin(TINY)
    x = torch.rand(4, 3, 32, 32, generator=generator)
    like_tuned = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain.model(x), tuned.model(like_tuned), rtol=1e-3, atol=1e-3)
    assert tuned.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert tuned.optimizer.defaults["fused"]
    assert not plain.optimizer.defaults["fused"]


def test_the_twin_in_bfloat16_computes_nearly_the_same_and_is_skipped_where_it_is_no_use(
    generator, monkeypatch
):
    tuned, half = TunedFloatTwin(TINY), HalfFloatTwin(TINY)
    x = torch.rand(4, 3, 32, 32, generator=generator)
    one, other = tuned.scores(x), half.scores(x)
    assert other.dtype == torch.float32
    assert 0 < (one - other).abs().mean() < 0.1 * one.abs().mean()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    for kind in (HalfFloatTwin, HalfEager):
        assert "bfloat16" in kind.missing()


def test_kernels_are_forced_by_the_environment_of_the_process():
    portable, off = forced(Bnnlib, "portable"), forced(Bnnlib, "off")
    assert portable.summary.endswith("with its kernels for portable")
    assert portable.devices == off.devices == ("cpu",)
    for name, kernels in {"bnnlib, no kernels": "off", "bnnlib, avx2": "avx2"}.items():
        with closing(Worker(name, TINY)) as worker:
            process = psutil.Process(worker.process.pid)
            assert soon(lambda p=process, k=kernels: p.environ().get(VARIABLE) == k)


def test_kernels_that_would_be_measured_twice_or_cannot_be_are_skipped(monkeypatch):
    best = forced(Bnnlib, sets_here()[0])
    assert "anyway" in best.missing()
    assert Bnnlib.missing() is None
    assert forced(Bnnlib, "off").missing() is None
    monkeypatch.setattr(contenders, "sets_here", lambda: ["avx2", "portable"])
    monkeypatch.setattr(contenders, "library", lambda name: None)
    assert forced(Bnnlib, "avx512").missing() == "this processor has no avx512"
    assert "no compiler" in forced(Bnnlib, "portable").missing()


def test_a_step_of_the_naive_port_is_ours(generator):
    ours, naive = Bnnlib(TINY).model.double(), NaiveBnn(TINY).model.double()
    for name, p in naive.named_parameters():
        if name.startswith("norm"):
            p.data.uniform_(-1, 1, generator=generator)
        elif name.endswith("bias"):  # 0 leaves sums of +-1, and so the ties in the pools, exact
            p.data.zero_()
        ours.get_parameter(name).data.copy_(p)
    x = torch.rand(4, 3, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    g = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    scores = [model.train()(x) for model in (ours, naive)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-9)
    for y in scores:
        y.backward(g)
    for p, q in zip(ours.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)
        p.grad.copy_(q.grad)
    # PyTorch divides eps by the bias correction as well, sqrt(1 - 0.999) in the first step.
    BinaryAdam(parameter_groups(ours), lr=0.03, eps=1e-8 * sqrt(1 - 0.999)).step()
    CopyingAdam(naive, lr=0.03).step()
    for p, q in zip(ours.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert (naive.conv2.weight == 1).any()  # the clip took part


@pytest.mark.parametrize("kind", [Brevitas, Larq])
def test_a_peer_trains_as_many_numbers(kind):
    for name in kind.requires:
        pytest.importorskip(name)
    peer = kind(TINY)
    peer.epoch()
    assert 0 <= peer.evaluate(1) <= 1
    own = getattr(peer.model, "trainable_variables", None) or peer.model.parameters()
    assert sum(prod(p.shape) for p in own) == count_parameters(Bnnlib(TINY).model).trained


def test_made_up_images_follow_no_global_seed():
    first, _, second = made_up(3, "train"), torch.rand(1), made_up(3, "train")
    assert first.image_hash() == second.image_hash()
    assert first.label_hash() == second.label_hash()
    assert first.images.dtype == torch.uint8


# ----------------------------------------------------------------------------------- harness


def test_ratios_are_taken_within_rounds():
    twice = rounds.paired([1.0, 1.0, 10.0], [0.5, 0.5, 5.0])
    assert twice == {"low": 2, "median": 2, "high": 2}
    assert rounds.paired([2, 4, 6], [1, 2, 2]) == {"low": 2, "median": 2, "high": 2.5}


def test_a_contenders_row_on_known_numbers():
    references = {"speed_to_twin": [0.2, 0.4], "share_of_limit": [0.05, 0.05]}
    row = rounds.speed([0.1, 0.1], 50, references)
    medians = [of["median"] for name, of in row.items() if name != "rounds"]
    assert list(row) == ["milliseconds", "images_per_second", *references, "rounds"]
    assert medians == pytest.approx([100, 500, 3, 0.5])


def test_a_product_counts_in_the_layout_that_is_faster_in_the_median():
    about = {"layer": "conv1", "kind": "forward", "flops": 8, "bytes": {"floats": 4, "words": 2}}
    taken = [{**about, "seconds": {"NCHW": a, "NHWC": 2.0}} for a in (1.0, 9.0, 1.5)]
    own = {"rounds": [1.0, 9.0, 1.5], "kernel_seconds": None, "kernel_rounds": [1.0, 9.0, 1.5]}
    assert rounds.fastest(taken) == {**about, "layout": "NCHW", "seconds": 1.5, **own}


@pytest.mark.parametrize(("words", "faster"), [(0.5, 0.5), (2.0, 1.0)])
def test_kernels_count_where_they_are_faster(words, faster):
    about = {"layer": "conv2", "kind": "forward", "flops": 8, "bytes": {"floats": 4, "words": 2}}
    best = rounds.fastest([{**about, "seconds": {"NCHW": 1.0, "NHWC": 3.0, WORDS: words}}])
    assert (best["seconds"], best["kernel_seconds"]) == (1.0, words)
    assert (best["rounds"], best["kernel_rounds"]) == ([1.0], [faster])


def test_every_round_begins_with_another_and_the_first_is_not_kept(monkeypatch):
    monkeypatch.setattr(rounds, "PAUSE", 0)
    log = []

    def worker(name):
        return SimpleNamespace(ask=lambda what: log.append(name) or (what, len(log)))

    answers = rounds.turns(Crew({name: worker(name) for name in ("a", "b", LIMIT)}), rounds=2)
    assert log == ["a", "b", LIMIT, "b", LIMIT, "a", LIMIT, "a", "b"]
    assert answers == {
        "a": [("epoch", 6), ("epoch", 8)],
        "b": [("epoch", 4), ("epoch", 9)],
        LIMIT: [("measure", 5), ("measure", 7)],
    }


@contextmanager
def working_here(names, setting):
    """Workers in this process."""

    def worker(name):
        subject = Subject(name, setting)
        return SimpleNamespace(ask=lambda what: getattr(subject, what)())

    about = {name: prepare(name, setting) for name in names}
    yield Crew({name: worker(name) for name in about}, about)


@pytest.fixture
def here(monkeypatch, brief):
    """Workers live in this process, with few contenders, and nobody pauses."""
    monkeypatch.setattr(rounds, "PAUSE", 0)
    monkeypatch.setattr(rounds, "working", working_here)
    monkeypatch.setattr(inference, "working", working_here)
    monkeypatch.setattr(training, "CONTENDERS", OURS)
    monkeypatch.setattr("benchmarks.workers.TEST_IMAGES", 10)


@pytest.mark.usefixtures("here")
def test_a_whole_benchmark_is_written_and_read(monkeypatch, tmp_path, capsys):
    small = replace(TINY, test_images=10)
    growth = {"images": (small,), "width": (small,)}
    plan = training.Plan((small,), 2, small, growth, growth_rounds=2, epochs=(1, 2))
    programs = {"one": ["-c", "print(1.5)"]}
    monkeypatch.setattr(training, "startup", lambda rounds: startup.startup(rounds, programs))
    records.save(training.run(plan), tmp_path / "b" / "out.json", draw)
    results = load_timings(tmp_path / "b" / "out.json")
    for name in ("speeds", "memory"):
        assert [row["contender"] for row in results[name]] == list(OURS)
    assert {row["threads"] for row in results["speeds"] + results["limits"]} == {1}
    for row in results["memory"]:
        names = ("imports_bytes", "trained_peak_bytes", "peak_bytes")
        imported, trained, tested = (row[name]["median"] for name in names)
        assert tested >= trained > imported > 0
    assert {(row["by"], row["contender"]) for row in results["growth"]} == {
        (by, name) for by in ("images", "width", "epochs") for name in ("bnnlib", "float twin")
    }
    (row,) = results["startup"]
    assert (row["program"], row["seconds"]["high"]) == ("one", 1.5)
    assert results["machine"]["kernels"] == getattr(library(), "set", "off")
    assert (tmp_path / "b" / "out.png").stat().st_size > 1000
    assert "naive BNN" in capsys.readouterr().out


# -------------------------------------------------------------------------------- inference


NAMES = ("bnnlib, packed", "bnnlib, packed, portable", "bnnlib, not packed", "PyTorch")


@pytest.mark.usefixtures("here")
def test_a_whole_benchmark_of_inference_is_written_and_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(inference, "ENGINES", {name: ENGINES[name] for name in NAMES})
    monkeypatch.setattr("benchmarks.engines.export_onnx_where_possible", lambda *given: False)
    plan = inference.Plan((TINY, replace(TINY, batch_size=1)), 2, TINY)
    found = records.recorded(lambda: inference.measure(plan))
    records.save(found, tmp_path / "out.json", draw_inference)
    results = load_timings(tmp_path / "out.json", ENGINE_LISTS)
    rows = results["engines"]
    assert [row["batch_size"] for row in rows[:: len(NAMES)]] == [4, 1]
    assert all(row["equal"] for row in rows if row["contender"].startswith("bnnlib"))
    assert all(row["same_class"] == 1 for row in rows)  # the last is rounded otherwise, a little
    assert "speed_to_compiled" not in rows[0]
    assert [row["contender"] for row in results["memory"]] == [NAMES[0], *NAMES[2:]]
    assert "Larq Compute Engine" in results["skipped"]
    assert "equal" in capsys.readouterr().out


def test_the_share_of_the_limit_is_that_of_the_rate_of_words():
    setting = Setting("cifar10", batch_size=50)
    rate, eager = {"rates": {"floats": 1e9, "words": 1e12, "bytes": 1e9}}, [[0.0, 1.0]]
    seconds = {"PyTorch": [1.0, 1.0], "bnnlib, packed": [0.1, 0.1]}
    last = {"PyTorch": [[0.5, 0.4]], "bnnlib, packed": eager}
    found = rounds.Comparison(setting, seconds, [rate] * 2, {}, last)
    (plain, packed), rates = inference.engines(found, eager)
    assert packed["share_of_limit"]["median"] == pytest.approx(50 * 1.234e-3 / 0.1, rel=1e-3)
    assert (packed["equal"], packed["same_class"], plain["same_class"]) == (True, 1, 0)
    assert packed["speed_to_eager"]["median"] == pytest.approx(10)
    assert rates["words"]["median"] == 1e12


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A setting with the files of its network, and the network's scores."""
    setting = replace(TINY, folder=str(tmp_path_factory.mktemp("network")))
    return setting, torch.tensor(Reference(setting).scores())


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_computes_the_network(name, trained):
    kind, (setting, expected) = ENGINES[name], trained
    if "compiled" in name or kind.missing():
        pytest.skip(kind.missing() or "compiling takes long")
    for needed in kind.requires:
        pytest.importorskip(needed)
    engine = kind(setting)
    engine.epoch()
    scores = torch.tensor(engine.scores())
    assert scores.shape == expected.shape
    if name.startswith("bnnlib"):
        assert torch.equal(scores, expected)
    elif "8 bits" not in name and "bfloat16" not in name:
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_the_network_that_is_evaluated_has_negative_scales_and_knows_its_sums(trained):
    state = Reference(trained[0]).model.state_dict()
    weights = [t for name, t in state.items() if "norm" in name and name.endswith("weight")]
    assert len(weights) == len(shapes(TINY.network, TINY.width))
    assert (torch.cat(weights) < 0).any()
    assert state["norm3.running_inv_std"].max() < 1


# ------------------------------------------------------------------------------- contention


def soon(happens):
    deadline = time.monotonic() + 300
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.01)
    return happens()


def test_the_neighbour_computes_inside_the_block_only():
    with closing(contention.Neighbour()) as neighbour:
        process = psutil.Process(neighbour.process.pid)
        with neighbour.busy():
            before = process.cpu_times().user
            assert soon(lambda: process.cpu_times().user > before)
        assert soon(lambda: process.status() == psutil.STATUS_STOPPED)
    assert not process.is_running()


def test_each_way_has_its_threads_and_its_spin():
    with closing(contention.Way(1, 77).start(TINY)) as worker:
        worker.about()
        process = psutil.Process(worker.process.pid)
        assert process.environ()["GOMP_SPINCOUNT"] == "77"
        assert json.loads(process.cmdline()[-1])["threads"] == 1


class Quiet:
    """A neighbour that only says whether it would compute, and how much was closed."""

    is_busy, closed = False, 0

    @contextmanager
    def busy(self):
        self.is_busy = True
        yield
        self.is_busy = False

    def close(self):
        self.closed += 1

    def clock(self, way, setting):
        """A worker whose step takes known seconds: longer beside this one, and on one thread."""

        def ask(what):
            slower = 1 + way.spin if self.is_busy and way.threads == 2 else 1
            return setting.steps * 0.001 * (3 - way.threads) * slower

        return SimpleNamespace(about=dict, ask=ask, close=self.close)


def test_contention_is_told_by_threads_and_spin(monkeypatch, tmp_path):
    quiet = Quiet()
    monkeypatch.setattr(contention, "PAUSE", 0)
    monkeypatch.setattr(contention, "Neighbour", lambda: quiet)
    monkeypatch.setattr(contention.Way, "start", lambda *given: quiet.clock(*given))
    results = contention.run([TINY], spins=(9, 0), rounds=2)
    assert quiet.closed == 4  # three workers and the neighbour
    write_json(tmp_path / "contention.json", results)
    table = contention_table(load_timings(tmp_path / "contention.json", ["contention"]))
    columns = ("threads", "turns", "ms a step", "ms beside", "beside to alone", "to the default")
    assert [tuple(row[name] for name in columns) for row in table] == [
        (2, "9", "1", "10", "10.0", "1.00"),
        (2, "0", "1", "1", "1.0", "1.00"),
        (1, "", "2", "2", "1.0", "2.00"),
    ]


# -------------------------------------------------------------------------------------- plans


def test_the_peak_of_memory_is_more_than_what_is_held():
    held = torch.ones(50_000_000, dtype=torch.uint8)
    assert peak_memory() > held.numel()


@pytest.mark.parametrize("make", [training.quick_plan, training.full_plan])
def test_in_a_plan_one_thing_grows_at_a_time(make):
    plan = make(Setting(), (1,))
    for by, settings in plan.growth.items():
        values = [getattr(setting, by) for setting in settings]
        assert values == sorted(set(values))
        assert len({replace(s, **{"steps": 1, "images": 0, by: 1}) for s in settings}) == 1
        assert {s.threads for s in settings} == {1}
    assert all(s.images == s.epoch_images for s in plan.growth["images"])


def test_plans_compare_every_number_of_threads_once_each_setting():
    plans = [training.full_plan(Setting()), inference.full_plan()]
    plans += [training.quick_plan(Setting()), inference.quick_plan()]
    for plan in plans:
        assert {s.threads for s in plan.compared} == {2, 1}
        where = [tuple(getattr(s, n) for n in rounds.WHERE) for s in plan.compared]
        assert len(set(where)) == len(where)


def test_on_a_gpu_the_steps_of_a_turn_go_beyond_the_capture():
    plan = training.full_plan(Setting(device="cuda"))
    longer = training.for_device(plan)
    timed = [*longer.compared, *(s for settings in longer.growth.values() for s in settings)]
    assert min(s.steps for s in timed) >= 100
    assert longer.growth["images"] == plan.growth["images"]  # whole epochs stay whole epochs
    assert training.for_device(training.full_plan(Setting())) == training.full_plan(Setting())


def test_a_processor_has_a_name(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Abacus 3000\n")
    assert records.processor(tmp_path / "cpuinfo") == "Abacus 3000"
    assert records.processor(tmp_path / "none")


# ----------------------------------------------------------------------------------- workers


def test_a_missing_library_is_skipped_and_a_dead_worker_is_named(monkeypatch, tmp_path):
    (tmp_path / "brevitas.py").write_text("raise ImportError('brevitas is not for this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with working(["float twin", "Brevitas"], TINY) as crew:
        assert list(crew.workers) == ["float twin"]
        assert crew.about["Brevitas"] == {"missing": "brevitas cannot be imported"}
        worker = crew.workers["float twin"]
        assert worker.ask("epoch") > 0
        worker.process.kill()
        with pytest.raises(WorkerDied, match="float twin: its process ended"):
            worker.ask("epoch")
    assert worker.process.poll() is not None


def test_a_worker_that_cannot_be_built_says_why():
    refused = pytest.raises(WorkerDied, match=r"bnnlib: .*'svnh'; did you mean 'svhn'")
    with refused, working(["bnnlib"], replace(TINY, network="svnh")):
        pass


def test_an_unknown_contender_is_refused():
    with pytest.raises(InvalidValue, match="did you mean 'Brevitas'"), working(["Brevita"], TINY):
        pass


def test_larq_is_compared_on_a_processor_only():
    said = prepare("Larq", replace(TINY, device="cuda"))
    assert said == {"missing": "it is compared on cpu only"}


def test_each_optional_library_is_pinned():
    root, files = Path(training.__file__).parents[1], ("requirements", "requirements-bench")
    lines = "\n".join((root / f"{name}.txt").read_text() for name in files).splitlines()
    names = {line.partition("==")[0] for line in lines}
    for kind in (CONTENDERS | ENGINES).values():
        assert set(kind.requires) <= names


def test_programs_are_timed_whole_or_by_themselves_or_skipped_with_their_last_line(tmp_path):
    programs = {
        "whole": ["-c", "import time; time.sleep(0.2)"],
        "itself": ["-c", "print(7.5)"],
        "not there": ["-c", "print(1); raise OSError('no data here')"],
        "ours": ["-c", "import os, bnnlib; print(float(os.path.isabs(os.environ['BNNLIB_DATA'])))"],
    }
    rows, missing = startup.startup(2, programs)
    seconds = {row["program"]: row["seconds"]["median"] for row in rows}
    assert list(seconds) == ["whole", "itself", "ours"]
    assert seconds["whole"] >= 0.2
    assert (seconds["itself"], seconds["ours"]) == (7.5, 1.0)
    assert missing == {"not there": "OSError: no data here"}


def test_the_runs_that_are_timed_take_one_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(startup.PROGRAMS["a run of one step, drawn digits"][2:], standalone_mode=False)
    result = load_run(tmp_path / "run")
    assert result.experiment.steps == 1
    assert result.experiment.width == 1.0
