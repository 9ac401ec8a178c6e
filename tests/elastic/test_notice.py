"""Notices of AWS, GCP and Azure, asked for over real HTTP."""

from pathlib import Path

import pytest

from tests.elastic.harness import Undisturbed, training
from tests.elastic.metadata import service
from tests.elastic.test_kill import assert_same_bits
from trm_dist.elastic.notice import Aws, Azure, Gcp, Source

PROVIDERS = ["aws", "gcp", "azure"]


def source(provider: str, url: str) -> Source:
    aws = Aws(url, leave_on_rebalance=False)
    return {"aws": aws, "gcp": Gcp(url), "azure": Azure(url)}[provider]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_notice_is_there_while_the_provider_gives_it(provider: str) -> None:
    with service(provider) as there:
        asking = source(provider, there.url)
        assert asking.is_here()
        assert asking.notice() == ""
        there.is_noticed = True
        assert provider in asking.notice().lower()
        there.is_noticed = False  # it has been withdrawn
        assert asking.notice() == ""


@pytest.mark.parametrize("provider", PROVIDERS)
def test_provider_is_told_from_the_others(provider: str) -> None:
    with service(provider) as there:
        for other in PROVIDERS:
            try:
                is_here = source(other, there.url).is_here()
            except OSError:
                is_here = False
            assert is_here == (other == provider)


def test_refused_token_is_not_aws_and_no_reason_to_stop() -> None:
    with service("aws") as there:
        there.refuses_tokens = True
        with pytest.raises(PermissionError):
            source("aws", there.url).is_here()


def test_token_that_is_too_old_is_replaced() -> None:
    with service("aws") as there:
        asking = source("aws", there.url)
        assert asking.is_here()
        there.has_forgotten_tokens = there.is_noticed = True
        assert "terminate" in asking.notice()


def test_rebalance_is_told_once_and_left_for_on_demand(caplog: pytest.LogCaptureFixture) -> None:
    with service("aws") as there:
        there.is_rebalanced = True
        asking = source("aws", there.url)
        assert asking.is_here()
        assert [asking.notice() for _ in range(3)] == ["", "", ""]
        assert caplog.text.count("--leave-on-rebalance") == 1
        leaving = Aws(there.url, leave_on_rebalance=True)
        assert leaving.is_here()
        assert "rebalance" in leaving.notice()


def test_azures_events_of_other_machines_and_of_other_kinds_do_not_count() -> None:
    with service("azure") as there:
        asking = source("azure", there.url)
        assert asking.is_here()
        there.events = [
            {"EventType": "Preempt", "Resources": ["spot-pool_4"]},
            {"EventType": "Freeze", "Resources": ["spot-pool_3"]},
        ]
        assert asking.notice() == ""
        there.events[0]["Resources"] = ["spot-pool_4", "spot-pool_3"]
        assert "Preempt" in asking.notice()


@pytest.mark.parametrize(
    "provider", ["aws", *(pytest.param(each, marks=pytest.mark.soak) for each in ("gcp", "azure"))]
)
def test_node_with_a_notice_saves_and_leaves(
    directory: Path, undisturbed: Undisturbed, provider: str
) -> None:
    with service(provider) as there:
        there.delay_s = 0.5  # it is slow
        flags = {"--metadata-url": there.url, "--checkpoint-interval": "1000", "--epochs": "1000"}
        with training(directory, launch=2 if provider == "aws" else 0, flags=flags) as run:
            run.wait_for(lambda: len(there.asked) >= 3, "questions")
            there.is_noticed = True
            assert run.end() == 143, run.messages()
            assert "this node saves and leaves" in run.messages()
            told = run.told()
    with training(directory, flags={"--epochs": "8"}) as rest:
        assert rest.end() == 0
        assert rest.events("started")[0]["batch_count"] >= told


def test_service_that_is_gone_does_not_disturb(directory: Path, undisturbed: Undisturbed) -> None:
    with service("gcp") as there:
        url = there.url
    with training(directory, launch=2, flags={"--metadata-url": url, "--spot": "gcp"}) as run:
        assert run.end() == 0, run.messages()
        assert_same_bits([run], undisturbed)
