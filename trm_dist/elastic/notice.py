"""Notices that this machine is about to go: of AWS, GCP and Azure, and a file for everyone else.

Providers answer at a link-local address that only their machines have, so which one it is can be
found out. Everything here runs in a thread beside the training, and a metadata service that is
slow, refuses or is gone is no reason to stop.

Sources, as of 2026: AWS "Spot Instance interruption notices" and "Use IMDSv2"; GCP "Preempted
instances" and "About VM metadata"; Azure "Scheduled Events for Linux VMs".
"""

import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from trm_dist.config import SpotConfig

logger = logging.getLogger(__name__)

LINK_LOCAL = "http://169.254.169.254"
POLL_S = 5.0
"""What AWS recommends; the notice comes 120 s before the end there, 30 s on the others."""

_DETECT_EVERY_S = 60.0
_FILE_POLL_S = 0.5
_REQUEST_S = 2.0
_TOKEN_S = 21600


class Source(Protocol):
    """Where notices come from."""

    def is_here(self) -> bool:
        """Tell whether this machine has such notices."""
        ...

    def notice(self) -> str:
        """Return the notice in words; empty: there is none."""
        ...


class Aws:
    """The instance metadata service, version 2, whose requests need a token."""

    def __init__(self, url: str, *, leave_on_rebalance: bool) -> None:
        self._url, self._leave_on_rebalance = url, leave_on_rebalance
        self._token, self._has_told = "", False

    def is_here(self) -> bool:
        """Tell whether a token is given out."""
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
        self._token = _ask(f"{self._url}/latest/api/token", lifetime, method="PUT") or ""
        return bool(self._token)

    def notice(self) -> str:
        """Return the spot notice, or the rebalance recommendation if that is one."""
        if action := self._read("spot/instance-action"):
            return f"AWS takes this machine back ({' '.join(action.split())})"
        recommendation = self._read("events/recommendations/rebalance")
        if recommendation and self._leave_on_rebalance:
            return "AWS recommends to leave this machine (rebalance)"
        if recommendation and not self._has_told:
            self._has_told = True
            logger.warning(
                "AWS says that this machine is more likely than others to be taken back; what is "
                "finished is safe, and --leave-on-rebalance would leave now"
            )
        return ""

    def _read(self, path: str) -> str:
        for _ in range(2):
            try:
                header = {"X-aws-ec2-metadata-token": self._token}
                return _ask(f"{self._url}/latest/meta-data/{path}", header) or ""
            except PermissionError:  # the token is too old
                if not self.is_here():
                    break
        return ""


class Gcp:
    """The metadata server of Compute Engine."""

    _HEADER: Mapping[str, str] = {"Metadata-Flavor": "Google"}

    def __init__(self, url: str) -> None:
        self._url = f"{url}/computeMetadata/v1/instance"

    def is_here(self) -> bool:
        """Tell whether it says which machine this is."""
        return (_ask(f"{self._url}/id", self._HEADER) or "").isdecimal()

    def notice(self) -> str:
        """Return the preemption, or maintenance that ends the machine."""
        if _ask(f"{self._url}/preempted", self._HEADER) == "TRUE":
            return "GCP preempts this machine"
        event = _ask(f"{self._url}/maintenance-event", self._HEADER) or ""
        return f"GCP ends this machine ({event})" if event.startswith("TERMINATE") else ""


class Azure:
    """The scheduled events, which name the machines that they are for."""

    _HEADER: Mapping[str, str] = {"Metadata": "true"}
    _KINDS = frozenset({"Preempt", "Terminate", "Reboot", "Redeploy"})

    def __init__(self, url: str) -> None:
        self._url, self._name = f"{url}/metadata", ""

    def is_here(self) -> bool:
        """Tell whether it says what this machine is called."""
        path = "instance/compute/name?api-version=2021-02-01&format=text"
        self._name = _ask(f"{self._url}/{path}", self._HEADER) or ""
        return bool(self._name)

    def notice(self) -> str:
        """Return the first event that ends this machine, or what runs on it."""
        text = _ask(f"{self._url}/scheduledevents?api-version=2020-07-01", self._HEADER)
        for event in json.loads(text or "{}").get("Events", []):
            if event.get("EventType") in self._KINDS and self._name in event.get("Resources", []):
                return f"Azure: {event['EventType']} of this machine {event.get('NotBefore', '')}"
        return ""


class PreemptionFile:
    """A file whose appearance is the notice."""

    def __init__(self, path: str) -> None:
        self._path = path

    def is_here(self) -> bool:
        """It is where somebody says it will be."""
        return True

    def notice(self) -> str:
        """Tell whether it is there."""
        return f"{self._path} is there" if os.path.exists(self._path) else ""


def watch(config: SpotConfig, on_notice: Callable[[str], object]) -> None:
    """Call back with each source's first notice; returns at once."""
    if config.preemption_file:
        file = PreemptionFile(config.preemption_file)
        _start(lambda: on_notice(_wait_for_notice(file, _FILE_POLL_S)))
    if providers := _providers(config):
        _start(lambda: on_notice(_wait_for_notice(_find(providers), POLL_S)))


def _providers(config: SpotConfig) -> list[Source]:
    """Return whom to ask: one, all that it may be, or nobody."""
    url = config.metadata_url.rstrip("/") or LINK_LOCAL
    known: dict[str, Source] = {
        "aws": Aws(url, leave_on_rebalance=config.leave_on_rebalance),
        "gcp": Gcp(url),
        "azure": Azure(url),
    }
    wanted = known.keys() if config.spot == "auto" else {config.spot}
    return [source for name, source in known.items() if name in wanted]


def _start(function: Callable[[], object]) -> None:
    threading.Thread(target=function, name="notice", daemon=True).start()


def _find(providers: Sequence[Source]) -> Source:
    """Find out whose machine this is, trying again, as a network may not be up yet."""
    while True:
        for each in providers:
            if _quietly(each.is_here):
                logger.info("watching for notices of %s", type(each).__name__.upper())
                return each
        time.sleep(_DETECT_EVERY_S)


def _wait_for_notice(source: Source, poll_s: float) -> str:
    while not (text := _quietly(source.notice)):
        time.sleep(poll_s)
    return str(text)


def _quietly(ask: Callable[[], bool | str]) -> bool | str:
    """Ask a service that may be anything but well; then there is no answer."""
    try:
        return ask()
    except (OSError, ValueError, TypeError, AttributeError, http.client.HTTPException):
        return ""


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """Return the body of an answer; None: there is no such thing.

    Raises:
        PermissionError: Not with this token.
        OSError: There is no answer.
    """
    request = urllib.request.Request(url, headers=dict(headers), method=method)  # noqa: S310
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=_REQUEST_S) as answer:
            body: bytes = answer.read(1 << 20)
            return body.decode().strip()
    except urllib.error.HTTPError as error:
        if error.code in {401, 403}:
            raise PermissionError(str(error)) from error
        return None
