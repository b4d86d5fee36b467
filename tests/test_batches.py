from dataclasses import replace
from itertools import chain

import pytest
import torch

from bnnlib.batches import Batches, scale_pixels
from bnnlib.corruption import gaussian_inputs
from bnnlib.errors import InvalidValue


@pytest.fixture
def numbered(noise):
    """23 images that carry their row in the first pixel."""
    data = noise(n=23)
    data.images[:, 0, 0, 0] = torch.arange(23, dtype=torch.uint8)
    return data


def rows(batches):
    """The rows of each batch, found in its scaled pixels."""
    return [((x[:, 0, 0, 0] + 1) * 127.5).round().long().tolist() for x, _ in batches]


def joined(found):
    return list(chain.from_iterable(found))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_pixels_are_scaled_to_exactly_minus_one_and_one():
    x = scale_pixels(torch.arange(256, dtype=torch.uint8))
    assert (x[0].item(), x[255].item()) == (-1.0, 1.0)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), torch.linspace(-1, 1, 256, dtype=torch.float64))


def test_scaled_pixels_leave_the_bytes_alone(noise):
    images = noise().images
    before = images.clone()
    scale_pixels(images)
    assert torch.equal(images, before)


def test_an_epoch_has_full_batches_without_repetition(numbered):
    found = rows(Batches(numbered, 5).shuffled(seeded(0)))
    assert [len(batch) for batch in found] == [5, 5, 5, 5]  # 3 of 23 are left over
    assert len(set(joined(found))) == 20


def test_every_image_comes_once_where_the_batches_fit(numbered):
    order = joined(rows(Batches(numbered.first(20), 5).shuffled(seeded(0))))
    assert sorted(order) == list(range(20))
    assert order != list(range(20))


def test_other_images_are_left_over_in_another_epoch(numbered):
    batches, generator = Batches(numbered, 5), seeded(0)
    epochs = {frozenset(joined(rows(batches.shuffled(generator)))) for _ in range(3)}
    assert len(epochs) == 3


def test_order_is_that_of_the_generator(numbered):
    batches, generator = Batches(numbered, 5), seeded(0)
    first, second = rows(batches.shuffled(generator)), rows(batches.shuffled(generator))
    assert first != second
    assert rows(batches.shuffled(seeded(0))) == first
    assert rows(batches.shuffled(seeded(1))) != first


@pytest.mark.parametrize(
    ("size", "sizes"), [(None, [5, 5, 5, 5, 3]), (10, [10, 10, 3]), (50, [23])]
)
def test_in_order_every_image_comes_once(numbered, size, sizes):
    found = rows(Batches(numbered, 5).in_order(size))
    assert [len(batch) for batch in found] == sizes
    assert joined(found) == list(range(23))


def test_labels_go_with_their_images(numbered):
    numbered = replace(numbered, labels=torch.arange(23) % 10)
    for x, labels in Batches(numbered, 5).shuffled(seeded(0)):
        assert (labels % 10).tolist() == [row % 10 for row in rows([(x, labels)])[0]]


def test_float_images_pass_as_they_are(noise):
    data = gaussian_inputs(noise(), seed=1)
    ((x, labels),) = Batches(data, 60).in_order()
    assert torch.equal(x, data.images)
    assert torch.equal(labels, data.labels)


def test_length_and_classes_are_those_of_the_set(noise):
    batches = Batches(noise(n=7, classes=("a", "b", "c")), 5)
    assert (len(batches), batches.classes) == (7, 3)


def test_a_set_smaller_than_a_batch_cannot_be_trained_on(noise):
    batches = Batches(noise(n=7), 8)
    with pytest.raises(InvalidValue, match=r"7 images do not fill one batch of 8.* at most 7"):
        next(batches.shuffled(seeded(0)))


@pytest.mark.parametrize("size", [0, -1])
def test_batch_size_must_be_positive(noise, size):
    with pytest.raises(InvalidValue, match=f"batch_size must be .* 1 or more, got {size}"):
        Batches(noise(), size)


def test_an_empty_set_is_refused(noise):
    data = noise()
    empty = replace(data, images=data.images[:0], labels=data.labels[:0])
    with pytest.raises(InvalidValue, match="noise train: no images"):
        Batches(empty, 5)
