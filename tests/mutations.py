"""Damaged copies of a file, for tests that no damage gets past the checks."""

import random
from collections.abc import Iterator


def mutations(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies of `content`, the same ones for the same seed; none equals it."""
    rng = random.Random(seed)
    while count:
        damaged = content
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            damaged = rng.choice(DAMAGES)(damaged, rng)
        if damaged != content:
            count -= 1
            yield damaged


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(content) + 1)
    return (
        content[:i]
        + bytes(byte ^ 1 << rng.randrange(8) for byte in content[i : i + 1])
        + (content[i + 1 :])
    )


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def delete(content: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(content) + 1)
    return content[:i] + content[i + rng.choice((1, 4, 30)) :]


def insert(content: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(content) + 1)
    return content[:i] + rng.randbytes(rng.choice((1, 4, 30))) + content[i:]


def duplicate(content: bytes, rng: random.Random) -> bytes:
    i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:j] + content[i:j] + content[j:]


def overwrite(content: bytes, rng: random.Random) -> bytes:
    """A few bytes become 0xFF, zeros, or digits of absurd numbers in text."""
    i, width = rng.randrange(len(content) + 1), rng.choice((1, 2, 4, 8))
    return content[:i] + rng.choice((b"\xff", b"\0", b"9")) * width + content[i + width :]


DAMAGES = (flip_bit, cut, delete, insert, duplicate, overwrite)
