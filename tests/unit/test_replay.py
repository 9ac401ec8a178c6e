"""A replayed batch is compared with the bits it gave before."""

import math
import struct

import pytest

from trm_dist.checkpoint.replay import CAPACITY, NUM_BYTES, Difference, LossLog

SUBJECT = {"run": ["run-1", 1], "config": {"lr": 1e-4}}
HERE = {"cpu_capability": "AVX2", "threads": "1"}


@pytest.fixture
def buffer() -> memoryview:
    return memoryview(bytearray(NUM_BYTES))


def filled(buffer: memoryview, last: int = 20) -> None:
    log = LossLog(buffer, SUBJECT, HERE)
    for batch_count in range(1, last + 1):
        assert log.check(batch_count, 1.0 / batch_count) is None


def next_after(value: float) -> float:
    return math.nextafter(value, math.inf)


def test_same_bits_are_no_difference(buffer: memoryview) -> None:
    filled(buffer)
    log = LossLog(buffer, SUBJECT, HERE)

    assert [log.check(number, 1.0 / number) for number in range(11, 31)] == [None] * 20


def test_last_bit_is_a_difference(buffer: memoryview) -> None:
    filled(buffer)

    found = LossLog(buffer, SUBJECT, HERE).check(7, next_after(1.0 / 7))

    assert found == Difference(1.0 / 7, is_other_environment=False)


def test_losses_are_compared_by_their_bits(buffer: memoryview) -> None:
    log = LossLog(buffer, SUBJECT, HERE)
    for number, loss in enumerate((math.nan, 0.0), 1):
        log.check(number, loss)

    assert log.check(1, math.nan) is None
    assert log.check(2, -0.0) == Difference(0.0, is_other_environment=False)


def test_other_environment_is_named_as_the_cause(buffer: memoryview) -> None:
    filled(buffer)
    log = LossLog(buffer, SUBJECT, HERE | {"cpu_capability": "AVX512"})

    assert log.check(7, 1.0 / 7) is None
    assert log.check(8, 0.5) == Difference(1.0 / 8, is_other_environment=True)


@pytest.mark.parametrize("change", [{"run": ["run-1", 2]}, {"config": {"lr": 1e-3}}])
def test_other_subjects_are_not_compared(buffer: memoryview, change: dict[str, object]) -> None:
    filled(buffer)

    assert LossLog(buffer, SUBJECT | change, HERE).check(7, 0.5) is None


def test_newest_result_is_remembered(buffer: memoryview) -> None:
    filled(buffer)
    log = LossLog(buffer, SUBJECT, HERE)
    log.check(7, 0.5)

    assert log.check(7, 0.5) is None


def test_old_batches_are_forgotten(buffer: memoryview) -> None:
    filled(buffer, CAPACITY + 3)
    log = LossLog(buffer, SUBJECT, HERE)

    assert log.check(3, 0.5) is None
    assert log.check(4, 0.7) is not None


def test_record_torn_by_a_kill_is_not_compared(buffer: memoryview) -> None:
    filled(buffer)
    struct.pack_into("<Q", buffer, 7 * 32, 0)

    assert LossLog(buffer, SUBJECT, HERE).check(7, 0.5) is None
