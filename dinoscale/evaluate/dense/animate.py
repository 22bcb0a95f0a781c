"""Videos with what networks see beside their frames, as animations: patch features, attention.

Shape letters: T frames of a video, R, C rows and columns of patches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dinoscale.data.sources.clips import Clip, open_clips
from dinoscale.evaluate.any_size import (
    SIZE,
    FittedImage,
    FittedImages,
    NamedFolders,
    WholeImages,
    save_picture,
    writing_to,
)
from dinoscale.evaluate.dense.attention_files import (
    heat_overlay,
    of_area,
    on_scale,
    report_attention,
    scale_of,
)
from dinoscale.evaluate.dense.attention_maps import attention_maps
from dinoscale.evaluate.dense.patch_colors import color_patches
from dinoscale.evaluate.dense.pca import BASIS, report_pca
from dinoscale.evaluate.dense.side_by_side import (
    FPS,
    PANEL,
    ROWS_DRAWN,
    SHEET_PANEL,
    Place,
    Size,
    check_fps,
    common_area,
    draw_table,
    folders_of,
    images_at,
    left_out,
    load_side_by_side,
    save_animation,
    titles_of,
    usable_by_all,
    within,
)
from dinoscale.evaluate.frozen_backbone import DEFAULT_LOADING, LoadOptions
from dinoscale.evaluate.progress import bar_options
from dinoscale.runtime.outputs import atomic_write

log = logging.getLogger(__name__)

SCALE = "multiples of uniform attention, one for all frames and weights"

Maps = dict[Place, NDArray[Any]]
Draw = Callable[[Place, Image.Image, Size], list[Image.Image]]


def animate_pca(
    weights_path: str | Path,
    spec: str,
    out: str | Path,
    *,
    also: Sequence[str | Path] = (),
    size: int = SIZE,
    square: bool = False,
    foreground: bool = False,
    smooth: bool = False,
    fps: float | None = None,
    limit: int | None = None,
    options: LoadOptions = DEFAULT_LOADING,
) -> dict[str, object]:
    """Write videos with the patch features of their frames as colors beside them.

    The basis is over all frames of all videos: equal colors mean the same in every frame. Writes
    `NAME-pca.webp` of each video and a sheet of some frames; and of each network the basis and
    `NAME-pca.npz` with `components` (T, R, C, 3), `foreground` (T, R, C), `frames` (T,) their
    numbers, and `patch`.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        spec: videos, see `data.sources.clips.open_clips`. The patches of all frames, two megabytes
            a frame for ViT-S/16, are in memory together; of pictures one frame is.
        out: the folder; made if missing. Files of the same names are replaced.
        also: other weights, in the colors of the first ones, in columns beside them.
        size: short side in pixels at which the backbone sees the frames.
        square: squeeze the frames to size x size instead.
        foreground: as of `color_patches`.
        smooth: enlarge the colors bilinearly, not by nearest neighbour.
        fps: frames per second; None takes that of the video if a file states it, else 10.
        limit: number of frames of each video, the first ones; None takes all.
        options: which network, and which device.

    Returns:
        As of `evaluate_pca`; `animations` names the files, and `left_out` also the videos of which
        no frame can be used.

    Raises:
        CheckpointError: a weights file cannot be used.
        ConfigError: a setting is out of range, or a backbone has no patches.
        DataError: there is no video, no frame can be read, or the folder cannot be written.
        NonFiniteError: a feature is not a finite number.
    """
    check_fps(fps)
    networks = load_side_by_side([weights_path, *also], options, size=size, square=square)
    videos = _Videos.open(networks, spec, limit=limit)
    found = color_patches(networks, videos.sets_of, foreground=foreground)

    def draw(place: Place, frame: Image.Image, area: Size) -> list[Image.Image]:
        return [colored.picture(place, frame.size, smooth=smooth, area=area) for colored in found]

    folder = Path(out)
    with writing_to(folder):
        written = videos.write("pca", found[0].places, draw, folder, fps=fps)
        for colored, own in zip(found, folders_of(networks, folder), strict=True):
            colored.basis.save(own / BASIS)
            maps: dict[str, Maps] = {
                "components": colored.components,
                "foreground": colored.foregrounds,
            }
            videos.save("pca", colored.places, maps, own, patch=colored.network.fit.patch)
    written |= {"spec": spec, "left_out": videos.left_out(found[0].places)}
    return report_pca(found, foreground=foreground, **written)


def animate_attention(
    weights_path: str | Path,
    spec: str,
    out: str | Path,
    *,
    also: Sequence[str | Path] = (),
    size: int = SIZE,
    square: bool = False,
    fps: float | None = None,
    limit: int | None = None,
    options: LoadOptions = DEFAULT_LOADING,
) -> dict[str, object]:
    """Write videos with the attention of the class token, mean over heads, beside their frames.

    Equal colors are equal multiples of uniform attention, in every frame and for all weights, see
    `scale_of`. Writes `NAME-attention.webp` of each video and a sheet of some frames; and of each
    network `NAME-attention.npz` with `maps` (T, R, C), means over heads, `frames` (T,) their
    numbers, and `patch`.

    Args and errors: as of `animate_pca`; only the maps of all frames are in memory together.

    Returns:
        As of `write_attention`; `animations` names the files.
    """
    check_fps(fps)
    networks = load_side_by_side([weights_path, *also], options, size=size, square=square)
    videos = _Videos.open(networks, spec, limit=limit)
    found = [_attend(networks[0], usable_by_all(videos.sets_of))]
    places = list(found[0])
    for network, sets in zip(networks[1:], videos.sets_of[1:], strict=True):
        frames = images_at(sets, places, progress=network.options.progress)
        found.append(_attend(network, frames))
    high = scale_of([maps[place] for maps in found for place in places])

    def draw(place: Place, frame: Image.Image, area: Size) -> list[Image.Image]:
        shown = [
            of_area(on_scale(maps[place], high), network.fit.patch, area)
            for network, maps in zip(networks, found, strict=True)
        ]
        return [heat_overlay(frame, brightness) for brightness in shown]

    folder = Path(out)
    with writing_to(folder):
        written = videos.write("attention", places, draw, folder, fps=fps)
        folders = folders_of(networks, folder)
        for network, maps, own in zip(networks, found, folders, strict=True):
            videos.save("attention", places, {"maps": maps}, own, patch=network.fit.patch)
    written |= {"spec": spec, "left_out": videos.left_out(places)}
    return report_attention(networks, {"scale": SCALE}, **written)


def _attend(network: WholeImages, frames: Iterable[tuple[Place, FittedImage]]) -> Maps:
    """Attention of each frame, mean over heads, (R, C) float32."""
    return {
        place: attention_maps(network.backbone, network.input(frame.image))[0].mean(dim=0).numpy()
        for place, frame in frames
    }


@dataclass(frozen=True)
class _Videos:
    """Videos as several networks see them.

    Attributes:
        titles: of the columns: the frame, and each network.
        clips: the videos.
        sets_of: for each network the frames of each video.
        progress: draw bars.
    """

    titles: Sequence[str]
    clips: Sequence[Clip]
    sets_of: Sequence[Sequence[FittedImages]]
    progress: bool

    @classmethod
    def open(cls, networks: Sequence[WholeImages], spec: str, *, limit: int | None) -> _Videos:
        """List the frames; arguments and errors as of `animate_pca`."""
        clips_of = [open_clips(spec, network.decoder) for network in networks]
        sets_of = [
            [network.fit_all(clip, limit=limit) for clip in clips]
            for network, clips in zip(networks, clips_of, strict=True)
        ]
        titles = ["frame", *titles_of(networks)]
        return cls(titles, clips_of[0], sets_of, networks[0].options.progress)

    def write(
        self, task: str, places: Sequence[Place], draw: Draw, out: Path, *, fps: float | None
    ) -> dict[str, object]:
        """Write an animation of each video, and a sheet of frames at equal distances.

        Args:
            task: its name, which ends the names of the files.
            places: of the frames.
            draw: the pictures of a frame, one for each network, at the size of the frame; its
                last argument is the area in pixels as the networks see it.
            out: the folder.
            fps: None takes that of each video.

        Returns:
            Parts of the report.
        """

        def table(some: Sequence[Place], panel: Size) -> Image.Image:
            rows = []
            for place in some:
                frame, area = self._frame(place, panel)
                rows.append([frame, *draw(place, frame, area)])
            return draw_table(self.titles, rows, panel[0])

        files = self._files(places, out, f"{task}.webp")
        with tqdm(total=len(places), unit="frame", **bar_options(shown=self.progress)) as bar:
            for number, file in files.items():
                own = [place for place in places if place[0] == number]
                rate = fps or self.clips[number].fps
                _animate(own, table, self._frame(own[0], PANEL)[0].size, file, rate, bar)
        few = np.linspace(0, len(places) - 1, min(ROWS_DRAWN, len(places))).round().astype(int)
        sheet = out / f"{task}-sheet.png"
        save_picture(table([places[i] for i in few], SHEET_PANEL), sheet)
        names = {
            "folder": str(out),
            "picture": str(sheet),
            "animations": [str(x) for x in files.values()],
        }
        return {"images": len(places), **names}

    def save(
        self, task: str, places: Sequence[Place], maps: Mapping[str, Maps], out: Path, *, patch: int
    ) -> None:
        """Write the maps of the frames of each video by name, their numbers, and the patch size."""
        for number, file in self._files(places, out, f"{task}.npz").items():
            own = [place for place in places if place[0] == number]
            arrays = {name: np.stack([of[place] for place in own]) for name, of in maps.items()}
            about = {"frames": np.array([index for _, index in own]), "patch": np.array(patch)}
            with atomic_write(file) as beside:
                np.savez(beside, allow_pickle=False, **arrays, **about)

    def left_out(self, places: Sequence[Place]) -> list[str]:
        """`path: reason` of the frames, and `name: reason` of the videos, that were not used."""
        used = {number for number, _ in places}
        names = [clip.name for number, clip in enumerate(self.clips) if number not in used]
        videos = [f"{name}: none of its frames can be used" for name in names]
        for video in videos:
            log.warning("left out %s", video)
        return left_out(self.sets_of) + videos

    def _frame(self, place: Place, largest: Size) -> tuple[Image.Image, Size]:
        """What all networks see of a frame, scaled into a size, RGB, and its size before that."""
        video, index = place
        fitted = self.sets_of[0][video].read(index)
        height, width = fitted.size
        area = common_area([sets[video].fit.area(width, height) for sets in self.sets_of])
        seen = fitted.image.convert("RGB").crop((0, 0, *area))
        return seen.resize(within(area, largest)), area

    def _files(self, places: Sequence[Place], out: Path, ending: str) -> dict[int, Path]:
        """A file for each video of which there are frames."""
        names, used = NamedFolders(out), {number for number, _ in places}
        # `names` cuts an extension off, and the dots of a video's name begin none.
        files = [out / f"{names.name(f'{clip.name}.webp')}-{ending}" for clip in self.clips]
        return {number: file for number, file in enumerate(files) if number in used}


def _animate(
    places: Sequence[Place],
    table: Callable[[Sequence[Place], Size], Image.Image],
    panel: Size,
    file: Path,
    fps: float | None,
    bar: tqdm[NoReturn],
) -> None:
    """Write the animation of one video."""
    before = bar.n

    def draw(index: int) -> Image.Image:
        bar.update(max(0, before + index + 1 - bar.n))  # some frames are drawn twice
        return table(places[index : index + 1], panel)

    save_animation(draw, len(places), file, fps=fps or FPS)
