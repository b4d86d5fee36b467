"""No run begins that cannot fit, and a process keeps the memory that a step frees."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bnnlib.assembly import build_model, model_forms
from bnnlib.catalogue import published, smoke
from bnnlib.errors import TooLarge
from bnnlib.files import in_words
from bnnlib.memory import check_memory, keep_freed_memory, memory_needed

BASE = smoke(published("svhn-random-labels"))


def test_no_memory_is_taken_to_know_what_the_widest_network_needs():
    wide = replace(published("cifar10-random-labels"), width=64.0)
    assert model_forms(wide)["dense7.weight"] == ((65_536, 524_288), torch.float32)  # 137 GB
    assert memory_needed(wide) > 16 * 65_536 * 524_288


def one_step_kept(experiment, half):
    """Bytes that autograd keeps of one batch, but for the parameters themselves; by hooks."""
    model, kept = build_model(experiment, half=half).train(), {}
    own = {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so no address recurs
        return tensor

    side = 8 if experiment.network == "dense" else 32
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(torch.zeros(experiment.batch_size, 3, side, side))
    return logits.nbytes + sum(size for size, _ in kept.values())


@pytest.mark.parametrize("half", [False, True])
def test_no_more_is_counted_for_a_batch_than_autograd_keeps_of_it(each_kind, half):
    e = replace(each_kind, dataset="mine.npz", width=0.25)  # so that no images count
    parameters = sum(p.nbytes for p in build_model(e).parameters())
    half = half and e.binary
    counted = memory_needed(e, half) - 3 * parameters  # weights, both Adam moments
    kept = one_step_kept(e, half)
    assert 0.8 * kept <= counted <= kept


def test_the_parts_of_the_original_for_cifar10_are_these():
    e = replace(published("cifar10-random-labels"), epochs=0)
    images = 60_000 * (3 * 32 * 32 + 8)
    assert memory_needed(e) == 4 * 14_033_566 + images
    float_images = replace(e, gaussian_variance=0.1, gaussian_splits=("train",))
    assert memory_needed(float_images) == memory_needed(e) + 3 * 45_000 * 3 * 32 * 32
    assert memory_needed(replace(e, n_train=1000)) == memory_needed(e) - 44_000 * 3080
    assert memory_needed(replace(e, evaluates="cifar10-random-labels")) == 0


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"network": "cifar10", "width": 64.0}, "width=64.0"),
        ({"batch_size": 1_000_000, "n_train": 1_000_000}, "batch_size=1000000"),
        ({"n_train": 100_000_000}, "n_train=100000000"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_field_to_change(changes, most, monkeypatch):
    free = SimpleNamespace(available=21 * 10**9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    experiment = replace(BASE, **changes)
    with pytest.raises(TooLarge) as caught:
        check_memory(experiment)
    text = str(caught.value)
    needed = in_words(memory_needed(experiment))
    assert text.startswith(f"svhn-random-labels needs at least {needed} of memory, ")
    assert f"most of it for {most}, and 21 GB are free; use a smaller {most.split('=')[0]}" in text


def test_what_fits_to_the_byte_is_taken(monkeypatch):
    for missing in (0, 1):
        free = SimpleNamespace(available=memory_needed(BASE) - missing)
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: free)
        if missing:
            with pytest.raises(TooLarge):
                check_memory(BASE, "cpu")
        else:
            check_memory(BASE, "cpu")


def test_on_a_gpu_its_own_memory_counts_and_what_pytorch_keeps_for_reuse(monkeypatch):
    needed = memory_needed(BASE)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (needed - 1000, 10**12))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 500)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 1500)
    check_memory(BASE, "cuda:1")
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 1499)
    with pytest.raises(TooLarge):
        check_memory(BASE, "cuda:1")


@pytest.mark.skipif(not keep_freed_memory(), reason="only glibc has this setting")
def test_the_memory_of_a_step_is_not_taken_anew_for_the_next():
    program = """
import resource, torch
from bnnlib.memory import keep_freed_memory
assert keep_freed_memory()
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.zeros(2**22) for _ in range(10)]  # of 4096 pages each
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c", program]
    pages = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert pages < 4096  # of 409,600 that the last ten steps touch
