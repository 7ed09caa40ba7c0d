"""Random orders that need no memory and are the same everywhere: no list of millions is shuffled or kept."""

from __future__ import annotations

from hashlib import blake2b

_MASK = (1 << 64) - 1
_ROUNDS = 6
_SMALL = 256


class RandomStream:
    """A generator of random numbers whose whole state is one integer (SplitMix64).

    Args:
        *key: What it depends on: texts and whole numbers.
    """

    def __init__(self, *key: str | int):
        self.state = _hash(*key)

    def below(self, limit: int) -> int:
        """A whole number from 0 below `limit`."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK
        return _mix(self.state) * limit >> 64


class Permutation:
    """A random order of `range(size)`, number by number: a Feistel network whose strays walk on until they fit.

    Args:
        size: How many numbers.
        *key: What the order depends on: texts and whole numbers.

    Example:
        >>> sorted(Permutation(5, "seed", 3)[i] for i in range(5))
        [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, *key: str | int):
        self.size = size
        self._bits = max((size - 1).bit_length() + 1, 2) // 2
        self._keys = [_hash(*key, number) for number in range(_ROUNDS)]
        self._small = _shuffled(size, RandomStream(*key)) if size <= _SMALL else None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} of {self.size}")
        if self._small is not None:
            return self._small[index]
        while True:
            index = self._walk(index)
            if index < self.size:
                return index

    def _walk(self, index: int) -> int:
        mask = (1 << self._bits) - 1
        left, right = index >> self._bits, index & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key & _MASK) & mask)
        return left << self._bits | right


def pick_spread(index: int, count: int, size: int, *key: str | int) -> int:
    """Number `index` of `count` that are drawn from `range(size)`: in order, one from each of `count` equal parts.

    Args:
        index: From 0 below `count`.
        count: At most `size`.
        size: Numbers to draw from.
        *key: What the draw depends on.
    """
    first, end = index * size // count, (index + 1) * size // count
    return first + RandomStream(*key, index).below(end - first)


def _shuffled(size: int, stream: RandomStream) -> list[int]:
    order = list(range(size))
    for last in range(size - 1, 0, -1):
        other = stream.below(last + 1)
        order[last], order[other] = order[other], order[last]
    return order


def _hash(*key: str | int) -> int:
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def _mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
