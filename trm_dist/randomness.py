"""Counter-based randomness: every random number is a pure function of a key and a counter.

There is no generator whose state depends on a rank or on history, so there is nothing to save, and
any world size, restart or order of evaluation draws the same numbers. Keys come from blake2b over
the purpose and its integers; numbers come from the finalizer of splitmix64 over key and counter.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

ALGORITHM = "blake2b-key/splitmix64-counter"
VERSION = 1

Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def derive_key(purpose: str, *parts: int) -> int:
    """Return a 64-bit key for one use of randomness, such as `derive_key("order", seed, epoch)`."""
    text = ":".join([purpose, *map(str, parts)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def random_words(key: int, counters: npt.ArrayLike) -> Words:
    """Return one uniform 64-bit word per counter, of the shape of `counters`."""
    words = (np.asarray(counters).astype(np.uint64) + np.uint64(1)) * _GOLDEN
    words = _finalize(words ^ np.uint64(key))
    return _finalize(words + np.uint64(key))


def random_uniform(key: int, counters: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return one float64 in [0, 1) per counter."""
    top_bits = random_words(key, counters) >> np.uint64(11)
    return top_bits.astype(np.float64) * 2.0**-53


def _finalize(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    return words ^ (words >> np.uint64(31))
