"""What can go wrong, and whose turn it is: the user's (exit code 2) or the run's (exit code 1)."""


class DinoscaleError(Exception):
    """An error a user can act on; its text names the thing, the value and the remedy."""

    exit_code = 2


class ConfigError(DinoscaleError):
    """A key, a value or a combination in the configuration is wrong."""


class DataError(DinoscaleError):
    """Images, shards or labels cannot be read as asked."""


class CheckpointError(DinoscaleError):
    """A checkpoint or weights file is missing, damaged, or of another model."""


class LaunchError(DinoscaleError):
    """The environment of the processes (ranks, addresses, ports) is wrong."""


class RunFailedError(DinoscaleError):
    """The run started well and cannot go on."""

    exit_code = 1


class NonFiniteError(RunFailedError):
    """A loss or a gradient is not a finite number."""
