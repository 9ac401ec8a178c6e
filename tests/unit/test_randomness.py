"""Random numbers as pure functions of key and counter; golden, because every run hangs on them."""

import numpy as np
import pytest

from trm_dist.randomness import ALGORITHM, VERSION, derive_key, random_uniform, random_words

MANY = np.arange(100_000)


@pytest.mark.parametrize(
    ("purpose", "parts", "key"),
    [
        ("order", (0, 1), 0xAA302CFE9DACD3AB),
        ("weights", (0,), 0xD4B11E7259CD3C8A),
        ("a", (1, 2), 0xBFCED8BB1CA5D360),
    ],
)
def test_key_is_golden(purpose: str, parts: tuple[int, ...], key: int) -> None:
    assert derive_key(purpose, *parts) == key


@pytest.mark.parametrize(
    ("key", "counters", "words"),
    [
        (0, [0, 1, 2], [0x48218226FF3CD4BF, 0xCD73FE3DE975AC26, 0x7B476C5A5333D0EC]),
        (12345, [10**12], [0xB70492834AE1B6DC]),
        (2**64 - 1, [0, 2**63 - 1], [0xD59879A606844AD5, 0x9155F13AB11C3499]),
    ],
)
def test_words_are_golden(key: int, counters: list[int], words: list[int]) -> None:
    assert random_words(key, counters).tolist() == words


def test_uniform_is_golden() -> None:
    assert random_uniform(7, [0, 1, 2]).tolist() == [
        0.8363258505178186,
        0.5052401242267541,
        0.3011106009721297,
    ]


def test_algorithm_has_the_stored_name_and_version() -> None:
    assert (ALGORITHM, VERSION) == ("blake2b-key/splitmix64-counter", 1)


def test_keys_differ_for_other_purpose_and_parts() -> None:
    uses = [("a",), ("b",), ("a", 1), ("a", 2), ("a", 1, 2), ("a", 2, 1), ("a", 12), ("a", -1)]

    assert len({derive_key(*use) for use in uses}) == len(uses)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0,), (7,), (2, 3), (1, 2, 2)])
def test_words_have_the_shape_of_counters(shape: tuple[int, ...]) -> None:
    counters = np.arange(np.prod(shape, dtype=int)).reshape(shape)

    words = random_words(3, counters)

    assert words.shape == shape
    assert words.dtype == np.uint64


def test_word_depends_on_its_own_counter_only() -> None:
    words = random_words(99, MANY)

    some = MANY[::-997]

    assert np.array_equal(random_words(99, some), words[some])


def test_words_leave_counters_unchanged() -> None:
    counters = np.arange(5, dtype=np.uint64)

    random_words(1, counters)

    assert counters.tolist() == [0, 1, 2, 3, 4]


def test_words_of_one_key_never_repeat() -> None:
    assert len(np.unique(random_words(5, MANY))) == len(MANY)


def test_words_of_neighbouring_keys_are_unrelated() -> None:
    one, other = random_uniform(8, MANY), random_uniform(9, MANY)

    assert not np.intersect1d(random_words(8, MANY), random_words(9, MANY)).size
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02


def test_every_bit_is_set_in_half_of_the_words() -> None:
    bits = (random_words(4, MANY)[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)

    assert np.all(np.abs(bits.mean(0) - 0.5) < 0.01)


def test_uniform_lies_in_half_open_interval() -> None:
    values = random_uniform(6, MANY)

    assert values.dtype == np.float64
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1


def test_uniform_has_mean_and_variance_of_uniform() -> None:
    values = random_uniform(derive_key("test"), MANY)

    assert abs(values.mean() - 1 / 2) < 0.005
    assert abs(values.var() - 1 / 12) < 0.002


def test_neighbouring_counters_are_uncorrelated() -> None:
    values = random_uniform(11, MANY)

    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.02
