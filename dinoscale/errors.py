"""What can end a run, and whose turn it is.

The user's (exit code 2), the run's (1), that of a storage or network (69), nobody's (75).
"""

_EX_UNAVAILABLE = 69  # of sysexits.h: nothing is wrong with what was asked for


class DinoscaleError(Exception):
    """An error a user can act on; its text names the thing, the value and the remedy."""

    exit_code = 2


class ConfigError(DinoscaleError):
    """A key, a value or a combination in the configuration is wrong."""


class DataError(DinoscaleError):
    """Images, shards or labels cannot be read as asked."""


class UnavailableError(DataError):
    """Data cannot be read here and now, though nothing may be wrong with them: try again later."""

    exit_code = _EX_UNAVAILABLE


class CheckpointError(DinoscaleError):
    """A checkpoint or weights file is missing, damaged, or of another model."""


class MissingFileError(CheckpointError):
    """A file that belongs to a checkpoint is not in its folder."""


class UnreadableError(CheckpointError):
    """A checkpoint cannot be read here and now, though it may be whole: nothing was changed."""

    exit_code = _EX_UNAVAILABLE


class ConversionError(DinoscaleError):
    """Weights have no exact form in a format, or what was written gives other features."""


class LaunchError(DinoscaleError):
    """The environment of the processes (ranks, addresses, ports) is wrong."""


class RunFailedError(DinoscaleError):
    """The run started well and cannot go on."""

    exit_code = 1


class NonFiniteError(RunFailedError):
    """Too many steps in a row had a loss or a gradient that is not a finite number."""


class LostPeerError(RunFailedError):
    """Another rank ended or cannot be reached."""


class PreemptedError(DinoscaleError):
    """Asked to stop, by a signal, Ctrl-C or as the launcher is gone; the same command goes on.

    What was trained is saved; what was not yet begun, or only measured, is done again.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again
