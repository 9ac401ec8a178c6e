"""What a worker owes the torchrun agent that started it: to die with it, and to stop it in time."""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress

from trm_dist.elastic.process import started_at

LAUNCH = "TRM_DIST_LAUNCH"
"""Variable that names the `trm_dist launch` a worker belongs to."""
LAUNCHED_AT = "TRM_DIST_LAUNCHED_AT"
"""Variable that says when that was started; seconds since the epoch."""
CAUSE = "TRM_DIST_CAUSE"
"""Variable that says why the workers before have ended, as far as this node knows."""
RESTARTS = "TRM_DIST_RESTARTS"
"""Variable that says how often it has started the worker before."""
PULSE = "TRM_DIST_PULSE"
"""Variable with the descriptor of the memory for signs of life."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Variable with which the agent says where it looks for what a worker has died of."""

SPEAK_S = 30.0
"""How long a silent worker stays; on its own node it is ended long before."""

_PR_SET_PDEATHSIG = 1
_AGENT_MARKS = (
    "torchrun",
    "torch.distributed.run",
    "torch/distributed/run",
    "torch.distributed.launch",
)


def is_under_agent(environment: Mapping[str, str]) -> bool:
    """Tell whether torchrun started this process, as far as its environment says."""
    return "TORCHELASTIC_RUN_ID" in environment


def is_under_launch(environment: Mapping[str, str]) -> bool:
    """Tell whether `trm_dist launch` keeps this worker, and acts on its exit code."""
    return LAUNCH in environment


def guardian(environment: Mapping[str, str]) -> int:
    """Return the process that may start workers again: this one's parent, or itself without any."""
    return os.getppid() if is_under_agent(environment) else os.getpid()


def launched_at(environment: Mapping[str, str]) -> float:
    """Return when whoever starts the workers was started; seconds since the epoch."""
    if LAUNCHED_AT in environment:
        return float(environment[LAUNCHED_AT])
    with suppress(OSError):  # a parent outside of this container cannot be seen
        return started_at(guardian(environment))
    return started_at(os.getpid())


def num_restarts(environment: Mapping[str, str]) -> int:
    """Return how often the workers were started before, as their launcher counts."""
    counts = (environment.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", RESTARTS))
    return max(map(int, counts))


def is_restart(environment: Mapping[str, str]) -> bool:
    """Tell whether the workers were started before."""
    return num_restarts(environment) > 0


def will_restart(environment: Mapping[str, str]) -> bool:
    """Tell whether the agent starts the workers again when they fail."""
    count = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return count < int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def die_with_agent(environment: Mapping[str, str]) -> None:
    """Let the kernel kill this worker when its agent is gone.

    A killed torchrun leaves its workers running otherwise, and they would train and write on
    beside the next run. Linux only; elsewhere this does nothing.
    """
    if not is_under_agent(environment) or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Whoever loses its parent is adopted, mostly by process 1; in a container torchrun is that one.
    if os.getppid() != parent or (parent == 1 and not _is_torchrun(parent)):
        os.write(2, b"trm_dist: torchrun was gone before this worker had started\n")
        os._exit(1)


def let_the_first_speak(environment: Mapping[str, str]) -> None:
    """Stay until the agent ends this worker, so that the one that tells the reason is not cut off.

    The first worker that exits makes the agent kill the others at once.
    """
    if is_under_agent(environment):
        time.sleep(SPEAK_S)


def end_agent(environment: Mapping[str, str]) -> None:
    """Ask the agent to stop, because the user must change something first.

    To torchrun every exit code but 0 is a reason to start the workers again; wrong usage would be
    repeated --max-restarts times. Only a parent that is really torchrun gets the signal.
    """
    if is_under_launch(environment) or not is_under_agent(environment):
        return
    if _is_torchrun(os.getppid()):
        os.kill(os.getppid(), signal.SIGTERM)


def record_error(error: BaseException) -> None:
    """Leave the error where the agent looks for a root cause, in the form that it reads.

    Source: torch/distributed/elastic/multiprocessing/errors/error_handler.py.
    """
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    callstack = "".join(traceback.format_exception(error))
    extra = {"py_callstack": callstack, "timestamp": str(int(time.time()))}
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
    with suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": message}, file)


def _is_torchrun(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return False
    return any(mark in command for mark in _AGENT_MARKS)
