"""Random numbers that depend on (seed, epoch, index) and on nothing else.

A counter-based generator (the SplitMix64 finaliser of Steele, Lea & Flood, OOPSLA 2014, applied to each word
in turn) keeps no state, so a sample is augmented alike on any rank, in any worker and in any order, and a
resumed run needs nothing but its position.
"""

import numpy as np

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)


def uniforms(seed: int, epoch: int, index: int, count: int) -> tuple[float, ...]:
    """`count` numbers in [0, 1) for one sample."""
    state = 0
    for word in (seed, epoch, index):
        state = _mix((state + _GAMMA + word) & _MASK)
    return tuple((_mix((state + (k + 1) * _GAMMA) & _MASK) >> 11) * 2.0**-53 for k in range(count))


def uniforms_of(seed: int, epochs: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """The same numbers for many samples: int (N,) epochs and indices -> float64 (N, count)."""

    def mix(words: np.ndarray) -> np.ndarray:
        words = (words ^ (words >> np.uint64(30))) * np.uint64(_FIRST)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(_SECOND)
        return words ^ (words >> np.uint64(31))

    state = np.full(len(indices), _mix((_GAMMA + seed) & _MASK), np.uint64)
    for words in (epochs, indices):
        state = mix(state + np.uint64(_GAMMA) + np.asarray(words).astype(np.int64).view(np.uint64))
    steps = np.array([((k + 1) * _GAMMA) & _MASK for k in range(count)], np.uint64)
    return (mix(state[:, None] + steps) >> np.uint64(11)) * 2.0**-53
