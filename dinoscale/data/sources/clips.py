"""Videos as sets of images: their frames in time order, without labels.

A video is a folder or tar of numbered frames (`videos.list_videos`), or one GIF, APNG or WebP file.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinoscale.data.decoding.decode import Animation, BadSampleError, Decoder, Picture
from dinoscale.data.sources.image_files import read_image_file
from dinoscale.data.sources.listing import COMPRESSED_TAR
from dinoscale.data.sources.videos import Video, list_videos
from dinoscale.errors import DataError, UnavailableError


class Clip:
    """The frames of a video, all of one size: a `Source`.

    Attributes:
        name: of the video.
        fps: frames per second, where the file states it.
    """

    labels: NDArray[np.int64] | None = None
    class_names: list[str] | None = None

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        read: Callable[[int], Picture],
        *,
        fps: float | None = None,
    ) -> None:
        """`paths` name the frames in messages; `read` decodes one of them."""
        self.name, self.fps = name, fps
        self._paths, self._read = paths, read
        self._size: tuple[int, int] | None = None  # of the first frame that was read

    def __len__(self) -> int:
        """Number of frames."""
        return len(self._paths)

    def path(self, index: int) -> str:
        """Where the frame is, for messages."""
        return self._paths[index]

    def picture(self, index: int) -> Picture:
        """The frame; it or its `pixels` raise BadSampleError, also if it has another size."""
        picture = self._read(index)
        width, height = self._size = self._size or (picture.width, picture.height)
        if (picture.width, picture.height) != (width, height):
            raise BadSampleError(
                self._paths[index],
                f"has {picture.width} x {picture.height} pixels, the frames before it {width} x "
                f"{height}; all frames of a video need the same size",
            )
        return picture


def open_clips(spec: str, decoder: Decoder) -> list[Clip]:
    """List videos; their frames are read later.

    Args:
        spec: a GIF, APNG or WebP file, another picture as a video of one frame, or what
            `list_videos` takes.
        decoder: decodes the frames.

    Raises:
        DataError: as of `list_videos`, or a file is a video of another format.
        UnavailableError: the file system failed for about a minute.
    """
    path = os.path.expanduser(spec)
    if os.path.isfile(path) and not path.lower().endswith((".tar", *COMPRESSED_TAR)):
        return [_clip_of_file(path, decoder)]
    return [_clip_of_frames(video, decoder) for video in list_videos(spec)]


def _clip_of_file(path: str, decoder: Decoder) -> Clip:
    try:
        animation = Animation(read_image_file(path), path, decoder)
    except UnavailableError:
        raise
    except BadSampleError as error:
        raise DataError(
            f"{error}. To use a video, unpack its frames into a folder, and name that: "
            f"mkdir frames && ffmpeg -i {shlex.quote(path)} frames/%05d.png"
        ) from None
    paths = [f"{path}, frame {index}" for index in range(len(animation))]

    def read(index: int) -> Picture:
        return Picture.of(animation.pixels(index), paths[index])

    return Clip(Path(path).stem, paths, read, fps=animation.fps)


def _clip_of_frames(video: Video, decoder: Decoder) -> Clip:
    def read(index: int) -> Picture:
        image = video.frames[index].image
        return decoder.open(image.read(), str(image))

    return Clip(video.name, [str(frame.image) for frame in video.frames], read)
