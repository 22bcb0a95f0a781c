"""Images that are files of their own: keeping their names, reading what stands there by now."""

import stat
from collections.abc import Callable, Iterable

from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.shards.row_table import Index, IndexWriter
from dinoscale.data.sources.reopening_file import ReopeningFile
from dinoscale.errors import DataError
from dinoscale.runtime.retry import RetryBudget

# The largest picture that Pillow opens has 179 million pixels, of at most 8 bytes each.
MAX_IMAGE_BYTES = 2**31

# Of a process, for files that are read one by one: they fail together, and it must not wait for
# each. Sources have one of their own.
_RETRIES = RetryBudget()

NAMES_A_SIGN = 1000  # names that are listed between two signs that it goes on


def write_names(
    names: Iterable[str], *, of: str, alive: Callable[[], None] = lambda: None
) -> Index:
    """Put names into a temporary file on disk, one after another.

    Args:
        names: in the order of the images.
        of: what they were read from, for messages.
        alive: called again and again while it goes on.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        with IndexWriter("") as writer:
            for number, name in enumerate(names):
                if number % NAMES_A_SIGN == 0:
                    alive()
                writer.add(name)
            return writer.finish({})
    except OSError as error:
        raise DataError(
            f"cannot keep the names of the images of {of} in a temporary file: {error}. Set TMPDIR "
            "to a folder with room."
        ) from error


def read_image_file(path: str, retries: RetryBudget = _RETRIES) -> bytes:
    """All bytes of a file, read with the retry budget `retries`.

    Raises:
        BadSampleError: it cannot be read, though that was tried again, or is no plain file of a
            size that a picture can have.
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


def unavailable(path: str, error: OSError) -> BadSampleError:
    """What to raise where the file of an image cannot be read."""
    return BadSampleError(path, f"cannot be read: {error.strerror or error}", unavailable=True)
