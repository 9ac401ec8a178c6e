"""What `trm_dist launch` makes of its flags."""

import pytest

from trm_dist.cli import given_settings
from trm_dist.config import CheckpointConfig, Config, DataConfig, TrainConfig
from trm_dist.errors import ConfigError
from trm_dist.launch.job import LaunchConfig, arguments_of, job_of


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"nproc_per_node": 0}, "--nproc-per-node 0 must be at least 1"),
        ({"nnodes": "many"}, "--nnodes many: give a number, or MIN:MAX"),
        ({"nnodes": "3:2", "rdzv_endpoint": "host:1"}, "--nnodes 3:2"),
        ({"nnodes": "0:2", "rdzv_endpoint": "host:1"}, "--nnodes 0:2"),
        ({"nnodes": "2"}, "needs --rdzv-endpoint HOST:PORT"),
        ({"rdzv_endpoint": "host"}, "--rdzv-endpoint host: give HOST:PORT"),
        ({"rdzv_endpoint": ":29500"}, "give HOST:PORT"),
        ({"rdzv_endpoint": "host:66000"}, "give HOST:PORT"),
        ({"health_port": 70000}, "--health-port 70000 is not a port"),
    ],
)
def test_wrong_flags_are_told(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LaunchConfig(**flags)  # type: ignore[arg-type]


def test_workers_get_the_flags_that_were_given_and_no_others() -> None:
    config = Config(
        data=DataConfig(dataset="a b.json", batch_size=8),
        train=TrainConfig(lr=3e-4),
        checkpoint=CheckpointConfig(overwrite=True, snapshot_every="auto"),
    )
    given = {"dataset", "lr", "overwrite", "snapshot_every", "allow_dataset_change"}
    arguments = arguments_of(config, given)
    assert arguments == [
        "--no-allow-dataset-change", "--dataset=a b.json", "--lr=0.0003", "--overwrite",
        "--snapshot-every=auto",
    ]  # fmt: skip
    assert given_settings(arguments) == given


def test_nodes_of_a_run_have_one_name_and_a_lone_launch_one_of_its_own() -> None:
    config = Config(checkpoint=CheckpointConfig(checkpoint_dir="s3://bucket/run"))
    other = Config(checkpoint=CheckpointConfig(checkpoint_dir="s3://bucket/other"))
    several = LaunchConfig(nnodes="1:4", rdzv_endpoint="host:29500")
    jobs = [job_of(several, config, (), {}) for _ in range(2)]
    assert jobs[0].launch_id == jobs[1].launch_id == jobs[0].member.job
    assert job_of(several, other, (), {}).member.job != jobs[0].member.job
    alone = [job_of(LaunchConfig(), config, (), {}).launch_id for _ in range(2)]
    assert alone[0] != alone[1]
    named = LaunchConfig(rdzv_id="mine")
    assert job_of(named, config, (), {}).launch_id == "mine"


def test_processes_can_be_forked_whatever_the_user_has_set() -> None:
    environment = {"OMP_NUM_THREADS": "7", "OPENBLAS_NUM_THREADS": "7"}
    job = job_of(LaunchConfig(), Config(), (), environment)
    assert job.environment["OPENBLAS_NUM_THREADS"] == "1"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in job.environment
    several = LaunchConfig(nnodes="2", rdzv_endpoint="host:1")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in job_of(several, Config(), (), {}).environment
