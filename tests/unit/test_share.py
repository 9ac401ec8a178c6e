"""What workers of unlike machines are told."""

from trm_dist.share import differences

HERE = {"host": "a", "cpu_capability": "AVX2", "threads": "1"}


def test_like_workers_have_no_differences() -> None:
    assert differences([HERE, HERE | {"host": "b"}]) == []


def test_each_difference_of_a_node_is_told_once() -> None:
    other = HERE | {"host": "b", "cpu_capability": "AVX512"}

    lines = differences([HERE, HERE, other, other, HERE | {"threads": "2"}])

    assert len(lines) == 2
    assert lines[0].startswith(
        "cpu_capability is AVX512 in worker 2 on b and AVX2 in worker 0 on a"
    )
    assert lines[0].endswith("--cpu-capability makes them alike")
    assert lines[1].startswith("threads is 2 in worker 4 on a and 1 in worker 0 on a")
