from dataclasses import replace
from itertools import chain

import pytest
import torch

from bnnlib.batches import Batches
from bnnlib.corruption import gaussian_inputs
from bnnlib.data.images import scale_pixels
from bnnlib.errors import InvalidValue


@pytest.fixture
def numbered(noise):
    """23 images that carry their row in the first pixel, and its last digit as label."""
    data = noise(n=23)
    data.images[:, 0, 0, 0] = torch.arange(23, dtype=torch.uint8)
    return replace(data, labels=torch.arange(23) % 10)


def rows(batches):
    """The rows of each batch, found in its scaled pixels; the labels go with them."""
    found = []
    for x, labels in batches:
        found.append(((x[:, 0, 0, 0] + 1) * 127.5).round().long().tolist())
        assert labels.tolist() == [row % 10 for row in found[-1]]
    return found


def joined(found):
    return list(chain.from_iterable(found))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_pixels_are_scaled_to_exactly_minus_one_and_one_in_a_copy():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = scale_pixels(pixels)
    assert (x[0].item(), x[255].item()) == (-1.0, 1.0)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), torch.linspace(-1, 1, 256, dtype=torch.float64))
    assert torch.equal(pixels, torch.arange(256, dtype=torch.uint8))


def test_float_images_pass_as_they_are(noise):
    data = gaussian_inputs(noise(), seed=1)
    ((x, labels),) = Batches(data, 60).in_order()
    assert torch.equal(x, data.images)
    assert x.is_contiguous(memory_format=torch.channels_last)  # which the products are fast in
    assert torch.equal(labels, data.labels)


def test_an_epoch_has_full_batches_without_repetition(numbered):
    found = rows(Batches(numbered, 5).shuffled(seeded(0)))
    assert [len(batch) for batch in found] == [5, 5, 5, 5]  # 3 of 23 are left over
    assert len(set(joined(found))) == 20


def test_every_image_comes_once_where_the_batches_fit(numbered):
    order = joined(rows(Batches(numbered.first(20), 5).shuffled(seeded(0))))
    assert sorted(order) == list(range(20))
    assert order != list(range(20))


def test_order_is_that_of_the_generator_and_leaves_others_over_in_another_epoch(numbered):
    batches, generator = Batches(numbered, 5), seeded(0)
    epochs = [rows(batches.shuffled(generator)) for _ in range(3)]
    assert len({frozenset(joined(epoch)) for epoch in epochs}) == 3
    assert rows(batches.shuffled(seeded(0))) == epochs[0]
    assert rows(batches.shuffled(seeded(1))) != epochs[0]


@pytest.mark.parametrize(
    ("size", "sizes"), [(None, [5, 5, 5, 5, 3]), (10, [10, 10, 3]), (50, [23])]
)
def test_in_order_every_image_comes_once(numbered, size, sizes):
    found = rows(Batches(numbered, 5).in_order(size))
    assert [len(batch) for batch in found] == sizes
    assert joined(found) == list(range(23))


def test_length_and_classes_are_those_of_the_set(noise):
    batches = Batches(noise(n=7, classes=("a", "b", "c")), 5)
    assert (len(batches), batches.classes) == (7, 3)


def test_a_set_smaller_than_a_batch_cannot_be_trained_on(noise):
    assert next(Batches(noise(n=7), 7).shuffled(seeded(0)))
    with pytest.raises(InvalidValue, match=r"7 images do not fill one batch of 8.* at most 7"):
        next(Batches(noise(n=7), 8).shuffled(seeded(0)))


def test_an_empty_set_or_batch_is_refused(noise):
    data = noise()
    with pytest.raises(InvalidValue, match=r"batch_size must be .* 1 or more, got 0"):
        Batches(data, 0)
    with pytest.raises(InvalidValue, match="noise train: no images"):
        Batches(replace(data, images=data.images[:0], labels=data.labels[:0]), 5)
