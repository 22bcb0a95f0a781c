"""The errors that end a command, and their exit codes.

2: bad input, which the user can correct. 1: the run failed. 69: a storage or network failed; the
input may be fine. 75: the run was asked to stop and has saved.
"""

_EX_UNAVAILABLE = 69  # of sysexits.h: nothing is wrong with the input


class DinoscaleError(Exception):
    """An error a user can act on; its text names the thing, the value and the remedy."""

    exit_code = 2


class ConfigError(DinoscaleError):
    """A key, a value or a combination in the configuration is wrong."""


class DataError(DinoscaleError):
    """Images, shards or labels cannot be read as asked."""


class UnavailableError(DataError):
    """Data cannot be read now, though they may be intact: try again later."""

    exit_code = _EX_UNAVAILABLE


class CheckpointError(DinoscaleError):
    """A checkpoint or weights file is missing, damaged, or of another model."""


class MissingFileError(CheckpointError):
    """A file that belongs to a checkpoint is not in its folder."""


class UnreadableError(CheckpointError):
    """A checkpoint cannot be read now, though it may be intact; nothing was changed."""

    exit_code = _EX_UNAVAILABLE


class ConversionError(DinoscaleError):
    """A format cannot hold the weights exactly, or the written weights give other features."""


class OutputError(DinoscaleError):
    """A file or folder is in the place of a result, and dinoscale did not write it."""


class LaunchError(DinoscaleError):
    """The environment of the processes (ranks, addresses, ports) is wrong."""


class RunFailedError(DinoscaleError):
    """The run started well and cannot go on."""

    exit_code = 1


class NonFiniteError(RunFailedError):
    """Too many steps in a row had a non-finite loss or gradient."""


class LostPeerError(RunFailedError):
    """Another rank ended or cannot be reached."""


class OutOfStepError(RunFailedError):
    """This rank failed within a collective, in which the others wait until it has ended."""


class PreemptedError(DinoscaleError):
    """A signal, Ctrl-C or the end of the launcher stopped the run; the same command continues it.

    Training progress is saved; measurements, and work that had not begun, are repeated.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again
