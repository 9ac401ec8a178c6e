"""Several machines under `trm_dist launch`: any of them may go, also where they meet."""

from pathlib import Path

import pytest

from tests.elastic.harness import (
    Undisturbed,
    forget_snapshots,
    kill,
    kill_everything,
    training,
)
from tests.elastic.nodes import Nodes, nodes
from tests.elastic.test_nodes import measured, wait_for_batches, wait_for_world

FLAGS = {"--epochs": "50", "--checkpoint-interval": "150"}


def assert_same_bits(machines: Nodes, undisturbed: Undisturbed) -> None:
    finished = [each for run in machines.all for each in run.events("finished")]
    assert [each["digest"] for each in finished] == [undisturbed.digest]
    for run in machines.all:
        for batch_count, losses in run.losses().items():
            assert losses == undisturbed.losses[batch_count]


@pytest.fixture(scope="module")
def long_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    with training(tmp_path_factory.mktemp("long") / "checkpoints", launch=1, flags=FLAGS) as run:
        assert run.end() == 0, run.messages()
        return Undisturbed(run.losses(), run.digest())


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_first_node_the_rendezvous_and_everything_may_go(
    tmp_path: Path, long_undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    with nodes(tmp_path / "checkpoints", 3, FLAGS, least=1, is_launch=True) as machines:

        def lose(node: int) -> None:
            kill_everything(machines.running[node])
            forget_snapshots(machines.memory[node])

        def replace_rendezvous() -> None:
            assert machines.rendezvous is not None
            kill(machines.rendezvous.process.pid)
            machines.start_rendezvous()

        took = {}
        notice = tmp_path / "notice"
        for node in range(3):
            machines.start(node, {"--preemption-file": str(notice)} if node == 2 else None)
        wait_for_world(machines, 3, 0)
        wait_for_batches(machines, 5)
        took["node 0 lost"] = measured(machines, 2, lambda: lose(0))
        wait_for_batches(machines, 5)
        took["node 0 back"] = measured(machines, 3, lambda: machines.start(0))
        wait_for_batches(machines, 5)
        took["rendezvous replaced"] = measured(machines, 3, replace_rendezvous)
        wait_for_batches(machines, 5)
        worker = machines.running[1].named("trm worker 0")
        took["worker killed"] = measured(machines, 3, lambda: kill(worker))
        wait_for_batches(machines, 5)
        agent = machines.running[1].named("trm agent")
        took["agent killed"] = measured(machines, 3, lambda: kill(agent))
        wait_for_batches(machines, 5)
        took["notice for node 2"] = measured(machines, 2, notice.touch)
        assert machines.running[2].end() == 143
        for node in range(2):
            assert machines.running[node].end() == 0, machines.running[node].messages()
        assert_same_bits(machines, long_undisturbed)
    with capsys.disabled():
        told = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in took.items())
        print(f"\nto the next start: {told}")  # noqa: T201 what the test is asked to show


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_node_that_is_cut_off_is_left_behind_and_comes_back(
    tmp_path: Path, long_undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = FLAGS | {"--hang-timeout": "5"}
    with nodes(tmp_path / "checkpoints", 3, flags, least=2, is_launch=True) as machines:
        for node in range(3):
            machines.start(node)
        wait_for_world(machines, 3, 0)
        wait_for_batches(machines, 5)
        cut_s = measured(machines, 2, lambda: machines.cut(0))
        wait_for_batches(machines, 5)
        mended_s = measured(machines, 3, lambda: machines.mend(0))
        for node in range(3):
            assert machines.running[node].end() == 0, machines.running[node].messages()
        assert_same_bits(machines, long_undisturbed)
    with capsys.disabled():
        print(  # noqa: T201 what the test is asked to show
            f"\ncut off {cut_s:.1f} s (--hang-timeout 5), plugged in again {mended_s:.1f} s"
        )


def test_wrong_usage_ends_all_nodes(tmp_path: Path) -> None:
    flags = {"--batch-size": "3000"}
    with nodes(tmp_path / "checkpoints", 2, flags, is_launch=True) as machines:
        for node in range(2):
            machines.start(node)
        assert [machines.running[node].end() for node in range(2)] == [2, 2]
        said = "".join(run.messages() for run in machines.all)
        assert said.count("is larger than the data") == 1
