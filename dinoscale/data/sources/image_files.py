"""Images in files of their own: keeping their names on disk, reading their bytes."""

import stat
from collections.abc import Callable, Iterable

from dinoscale.data.decoding.decode import BadSampleError, UnavailableSampleError
from dinoscale.data.shards.row_table import RowTable, RowTableWriter
from dinoscale.data.sources.reopening_file import ReopeningFile
from dinoscale.errors import DataError
from dinoscale.runtime.retry import RetryBudget

# The largest picture that Pillow opens has 179 million pixels, of at most 8 bytes each.
MAX_IMAGE_BYTES = 2**31

# For files that a process reads one by one: they fail together, and it must not wait for each.
# Sources have a retries of their own.
_RETRIES = RetryBudget()

NAMES_PER_HEARTBEAT = 1000  # names listed between two calls of `heartbeat`


def write_names(
    names: Iterable[str], *, of: str, heartbeat: Callable[[], None] = lambda: None
) -> RowTable:
    """Write names to a temporary table on disk.

    Args:
        names: in the order of the images.
        of: what they were read from, for messages.
        heartbeat: called repeatedly meanwhile.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        with RowTableWriter("") as writer:
            for number, name in enumerate(names):
                if number % NAMES_PER_HEARTBEAT == 0:
                    heartbeat()
                writer.add(name)
            return writer.finish({})
    except OSError as error:
        raise DataError(
            f"cannot keep the names of the images of {of} in a temporary file: {error}. Set TMPDIR "
            "to a folder with room."
        ) from error


def read_image_file(path: str, retries: RetryBudget = _RETRIES) -> bytes:
    """All bytes of a file; `retries` decides how long errors of the file system are retried.

    Raises:
        UnavailableSampleError: it cannot be read after retries.
        BadSampleError: it is not a plain file, or is too large for a picture.
    """
    try:
        with ReopeningFile(path, retries) as file:
            status = file.status()
            if not stat.S_ISREG(status.st_mode):
                raise BadSampleError(path, "cannot be read: it is not a plain file")
            if status.st_size > MAX_IMAGE_BYTES:
                raise BadSampleError(path, f"{status.st_size} bytes are too many for one image")
            return file.read_at(status.st_size, 0)
    except OSError as error:
        raise unavailable(path, error) from None
    except ValueError as error:  # a name with a null byte
        raise BadSampleError(path, f"cannot be read: {error}") from None


def unavailable(path: str, error: OSError) -> UnavailableSampleError:
    """The error for an image whose file cannot be read."""
    return UnavailableSampleError(path, f"cannot be read: {error.strerror or error}")
