"""What can go wrong, as one tree; every message says what failed, why, and what to do.

TrmDistError
|-- UserError             the user must change something; exit code 2, never retried
|   |-- ConfigError       a flag has a value that cannot work
|   |-- DataError         a data set is missing, broken, empty or does not fit the task
|   `-- ResumeError       there is no state to go on from, or it does not match the flags
|-- CorruptCheckpointError     bytes are not the checkpoint they claim to be; an older one is tried
|-- StoreError            no commit for longer than --store-deadline; exit code 1
|-- StoreAwayError        a store cannot be reached at the start; a restart may help
|-- HungError             no sign of life for longer than --hang-timeout; a restart may help
|-- NoProgressError       restarted too often without a new batch; exit code 1
|-- DeviceLostError       the GPU that a node had is gone; that node leaves, the others go on
|-- FencedError           another writer has taken over the run; exit code 1
`-- TrainingError         training itself failed, such as a loss that is not finite; exit code 1
"""

import errno

EXIT_GAVE_UP = 1
EXIT_CRASHED = 1
"""Of a worker that has failed; a restart may help."""
EXIT_USAGE = 2
EXIT_LOST = 75
"""Of a worker that has lost another one, or of an agent that has lost its rendezvous."""
EXIT_HOPELESS = 76
"""Of a worker under `trm_dist launch` whose failure a restart would meet again; becomes 1."""
EXIT_REPLACED = 77
"""Of a writer under `trm_dist launch` that another group of its own job has replaced."""
EXIT_UNFIT = 78
"""Of a worker under `trm_dist launch` whose node cannot train any more; becomes 143."""
EXIT_INTERRUPTED = 130
EXIT_PREEMPTED = 143


_LASTING = (
    FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError,
)  # fmt: skip
"""What is otherwise only after somebody has mended it."""


class TrmDistError(Exception):
    """Any failure this package raises on purpose."""


class UserError(TrmDistError, ValueError):
    """The user must change something before a retry can help."""


def is_away(error: UserError | OSError) -> bool:
    """Tell whether a store could not be reached, which may be otherwise in a moment."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and not (
        isinstance(cause, _LASTING) or cause.errno == errno.EROFS
    )


class ConfigError(UserError):
    """A flag has a value that cannot work."""


class DataError(UserError):
    """A data set is missing, broken, empty or does not fit the task."""


class ResumeError(UserError):
    """There is no state to go on from, or it does not match the flags."""


class CorruptCheckpointError(TrmDistError, ValueError):
    """The bytes of a file are not the checkpoint they claim to be."""


class StoreError(TrmDistError, OSError):
    """The store took no commit for longer than `--store-deadline`."""


class StoreAwayError(TrmDistError, OSError):
    """A store cannot be reached at the start; a restart may help."""


class NoProgressError(TrmDistError, RuntimeError):
    """The run was restarted too often without a batch being finished."""


class HungError(TrmDistError, RuntimeError):
    """Nothing has got on for longer than `--hang-timeout`; a restart may help."""


class DeviceLostError(TrmDistError, RuntimeError):
    """The GPU that a worker was to have again is gone."""


class FencedError(TrmDistError, RuntimeError):
    """Another writer has taken over the run; a restart would only fight with it."""

    def __init__(self, message: str, by: str = "") -> None:
        """Say who, by its name as a writer."""
        super().__init__(message)
        self.by = by


class TrainingError(TrmDistError, RuntimeError):
    """Training itself failed and would fail again."""
