"""Several machines: one lost, one cut off, both back; and what must be the same on all of them."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.elastic.harness import Undisturbed, forget_snapshots, kill_everything, training
from tests.elastic.nodes import Nodes, nodes

FLAGS = {"--epochs": "40", "--hang-timeout": "8", "--checkpoint-interval": "150"}

OLDER = {"ATEN_CPU_CAPABILITY": "default"}
"""Lets a machine pretend to be an older one, for the kernels of torch."""


def world_sizes(machines: Nodes) -> list[int]:
    """The world size of every start so far, in the order of time."""
    starts = [each for run in machines.all for each in run.events("started")]
    return [each["world_size"] for each in sorted(starts, key=lambda each: each["time"])]


def wait_for_world(machines: Nodes, size: int, since: int) -> None:
    """Wait until the workers have started as a world of some size, after so many starts."""

    def is_there() -> bool:
        return size in world_sizes(machines)[since:]

    machines.wait_for(is_there, f"a world of {size}")


def wait_for_batches(machines: Nodes, more: int) -> None:
    def count() -> int:
        return sum(len(run.events("batch")) for run in machines.all)

    goal = count() + more
    machines.wait_for(lambda: count() >= goal, f"{more} more batches")


def measured(machines: Nodes, size: int, change: Callable[[], object]) -> float:
    """Make a change and return the seconds until the workers go on as a world of some size."""
    since, started_s = len(world_sizes(machines)), time.monotonic()
    change()
    wait_for_world(machines, size, since)
    return time.monotonic() - started_s


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_node_lost_cut_off_and_back_give_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with training(tmp_path / "undisturbed", flags=FLAGS) as run:
        assert run.end() == 0, run.messages()
        undisturbed = Undisturbed(run.losses(), run.digest())

    with nodes(tmp_path / "checkpoints", 3, FLAGS, least=1) as machines:

        def lose() -> None:
            kill_everything(machines.running[2])
            forget_snapshots(machines.memory[2])

        for node in range(3):
            machines.start(node)
        wait_for_world(machines, 3, 0)
        wait_for_batches(machines, 5)
        lost_s = measured(machines, 2, lose)
        wait_for_batches(machines, 5)
        back_s = measured(machines, 3, lambda: machines.start(2))
        wait_for_batches(machines, 5)
        cut_s = measured(machines, 2, lambda: machines.cut(1))
        wait_for_batches(machines, 5)
        machines.mend(1)
        kill_everything(machines.running[1])  # as the machine's owner does
        mended_s = measured(machines, 3, lambda: machines.start(1))
        for node in range(3):
            assert machines.running[node].end() == 0, machines.running[node].messages()

        finished = [each for run in machines.all for each in run.events("finished")]
        assert [each["digest"] for each in finished] == [undisturbed.digest]
        for run in machines.all:
            for batch_count, losses in run.losses().items():
                assert losses == undisturbed.losses[batch_count]
    with capsys.disabled():
        print(  # noqa: T201 what the test is asked to show
            f"\nre-formed in {lost_s:.1f} s after a lost node, {cut_s:.1f} s after one cut off "
            f"(--hang-timeout 8); grown in {back_s:.1f} and {mended_s:.1f} s"
        )


def test_store_that_is_another_one_on_another_node_is_refused(tmp_path: Path) -> None:
    with nodes(tmp_path / "checkpoints", 2, {"--epochs": "1000"}) as machines:
        for node in range(2):
            own = tmp_path / f"disk{node}"
            machines.start(node, {"--checkpoint-dir": str(own)})
        for run in machines.all:
            assert run.end() != 0
            assert "is not shared by the nodes" in run.messages()
            assert "Use s3://" in run.messages()
            assert run.events("batch") == []
            assert run.messages().count("is not shared by the nodes") == 1


@pytest.mark.soak
def test_nodes_of_two_kinds_are_told_of(tmp_path: Path) -> None:
    with nodes(tmp_path / "checkpoints", 2, {}) as machines:
        machines.start(0)
        machines.start(1, variables=OLDER)
        for run in machines.all:
            assert run.end() == 0, run.messages()
        said = "".join(run.messages() for run in machines.all)
        assert said.count("cpu_capability is") == 1, said
        assert "--cpu-capability makes them alike" in said


@pytest.mark.soak
def test_one_capability_on_nodes_of_two_kinds_gives_the_same_bits(tmp_path: Path) -> None:
    pinned = {"--cpu-capability": "default"}
    with training(tmp_path / "undisturbed", flags=pinned) as alone:
        assert alone.end() == 0, alone.messages()
    with nodes(tmp_path / "checkpoints", 2, pinned) as machines:
        machines.start(0)
        machines.start(1, variables=OLDER)
        for run in machines.all:
            assert run.end() == 0, run.messages()
            assert "cpu_capability is" not in run.messages()
        finished = [each for run in machines.all for each in run.events("finished")]
        assert [each["digest"] for each in finished] == [alone.digest()]
