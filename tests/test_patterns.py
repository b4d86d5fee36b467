"""`patterns`: nothing but coin tosses, and labels that have nothing to do with them."""

import numpy as np

from bnnlib.patterns import PATTERN_CLASSES, patterns


def test_label_and_pixels_are_the_bits_of_four_words():
    stream = np.random.SeedSequence((3, 2, 5))  # the set, the split "test", the seed
    words = np.random.PCG64(stream).random_raw(40).reshape(10, 4)
    images, labels = patterns("test", 10, seed=5)
    for (first, *others), image, label in zip(words.tolist(), images, labels, strict=True):
        assert label == 10 * (first >> 11) // 2**53
        octets = b"".join(word.to_bytes(8, "little") for word in others)
        bits = "".join(f"{octet:08b}" for octet in octets)
        assert image.ravel().tolist() == [255 * int(bit) for bit in bits]


def test_each_pixel_is_a_fair_coin():
    images, _ = patterns("train", 10_000)
    assert np.unique(images).tolist() == [0, 255]
    share = (images == 255).mean(0)
    assert share.shape == (3, 8, 8)
    assert np.abs(share - 0.5).max() < 5 * (0.25 / 10_000) ** 0.5


def test_no_pixel_says_anything_about_the_label_or_another_pixel():
    images, labels = patterns("train", 10_000)
    bits = images.reshape(10_000, 192) / 127.5 - 1
    classes = np.eye(len(PATTERN_CLASSES))[labels]
    together = np.hstack([bits, (classes - 0.1) / 0.3])  # 202 columns of mean 0 and variance 1
    products = together.T @ together / 10_000
    products[192:, 192:] = 0  # the ten classes exclude each other
    np.fill_diagonal(products, 0)
    assert np.abs(products).max() < 6 / 10_000**0.5
