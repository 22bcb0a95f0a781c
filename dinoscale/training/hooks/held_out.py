"""Label-free numbers of the teacher on held-out images, and its agreement with the start."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dinoscale.checkpoint.layout import START_FILE
from dinoscale.config import RunConfig
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.mixture import require_few_left_out
from dinoscale.data.sources.source import StoredSource
from dinoscale.data.sources.subset import SubsetSource
from dinoscale.errors import DataError, NonFiniteError
from dinoscale.evaluate.features import extract_unlabelled
from dinoscale.evaluate.label_free.agreement import agreement, nearest
from dinoscale.evaluate.label_free.spectrum import lidar
from dinoscale.evaluate.label_free.view_features import extract_views, view_crops
from dinoscale.runtime import distributed
from dinoscale.runtime.opening import on_first_rank
from dinoscale.runtime.outputs import write_tensors
from dinoscale.training.hooks.online_rank import as_in_run, of_spectrum

log = logging.getLogger(__name__)

_NEIGHBOURS, _IDENTITY = "neighbours", "identity"


class HeldOut:
    """Measures a backbone on the images of the guard.

    Attributes:
        images: which ones, in words.
        identity: digest of the images, their size and normalisation, and where k-NN decides of the
            sets and the k of k-NN, where LiDAR does of its views; numbers of others do not
            compare.
    """

    def __init__(
        self,
        config: RunConfig,
        open_set: Callable[[str, Decoder], StoredSource],
        heartbeat: Callable[[], None] = lambda: None,
        *,
        labelled: Sequence[StoredSource] = (),
    ) -> None:
        """Open `guard.images`, or else `eval.train`, or else the first source of `data.train`.

        Args:
            config: of the run.
            open_set: opens a source from its specification.
            heartbeat: called while rank 0 looks at the names and sizes of the images.
            labelled: sets of k-NN, which are told apart where `guard.measure` is its accuracy.

        Raises:
            DataError: it cannot be opened or listed, or lacks more than `data.max_bad_fraction`.
        """
        spec = config.guarded_images
        assert spec is not None
        source = open_set(spec, Decoder(config.data.channels, config.data.max_pixel_value))
        require_few_left_out(source, spec, max_lost=config.data.max_bad_fraction)
        count = config.guard.num_images
        whole = len(source) <= count
        self._source = source if whole else SubsetSource(source, images=count)
        self._config, self._path = config, Path(config.run_dir) / START_FILE
        self._start: Tensor | None = None
        self._labelled = labelled if config.guard.measure == "knn_top1" else ()
        self.images = f"{len(self._source)} of {len(source)} images of {spec}"
        self.identity = distributed.broadcast_object(on_first_rank(self._identify, heartbeat)) or ""

    def _identify(self, heartbeat: Callable[[], None]) -> str:
        config = self._config
        shown = (config.eval.resize, config.eval.crop, config.data.mean, config.data.std)
        decoded = (config.data.channels, config.data.max_pixel_value)
        text = f"{self._source.identity(heartbeat)} {shown} {decoded}"
        if self._labelled:
            sets = [source.identity(heartbeat) for source in self._labelled]
            text += f" {sets} {config.eval.k}"
        if config.guard.measure == "lidar":
            text += f" {config.guard.lidar_views} views"
        return hashlib.sha256(text.encode()).hexdigest()

    def measure(
        self,
        backbone: nn.Module,
        device: torch.device,
        on_batch: Callable[[], None],
        *,
        starts: bool,
    ) -> dict[str, float]:
        """Numbers by name, the same on every rank; all ranks call it.

        RankMe, LiDAR and agreement of features that are not finite are 0.

        Args:
            backbone: ordinary weights, whole on every rank.
            device: of the backbone.
            on_batch: called after each batch; an exception on one rank ends it on all.
            starts: whether this is the start that later measurements are compared with.

        Returns:
            `rankme` in directions, and with `guard.lidar_views` also `lidar` and `lidar_views`;
            `agreement`, 0 to 1, unless the start is not known; `alpha_req`, unless the rank is too
            low.

        Raises:
            DinoscaleError: on every rank.
        """
        config = self._config
        try:
            features, numbers = extract_unlabelled(
                backbone, self._source, **as_in_run(config, device, on_batch)
            )
            views = self._views(backbone, device, on_batch)
        except NonFiniteError:  # on every rank
            if starts and distributed.rank() == 0:
                self._forget()
            num_views = float(config.guard.lidar_views)
            of_views = {"lidar": 0.0, "lidar_views": num_views} if num_views else {}
            return {"rankme": 0.0, "agreement": 0.0, **of_views}

        def values() -> dict[str, float] | None:
            # On one rank: others of another make may differ in the last bit, and decide otherwise.
            if distributed.rank() != 0:
                return None
            return self._values(features, numbers, views, starts=starts)

        found = distributed.broadcast_object(distributed.together(values))
        return cast(dict[str, float], found)

    def _views(
        self, backbone: nn.Module, device: torch.device, on_batch: Callable[[], None]
    ) -> Tensor | None:
        """Features of views as those of `dinoscale evaluate rank`, (n, q, D); None without LiDAR.

        n are the readable images, q views each, D is the width.
        """
        config, num_views = self._config, self._config.guard.lidar_views
        if not num_views:
            return None
        return extract_views(
            backbone,
            self._source,
            multi_crop=view_crops(size=config.eval.crop, channels=config.data.channels),
            num_views=num_views,
            mean=config.data.mean,
            std=config.data.std,
            batch_size=config.eval.batch_size,
            device=device,
            num_workers=config.data.num_workers,
            on_batch=on_batch,
        )

    def _values(
        self, features: Tensor, numbers: Tensor, views: Tensor | None, *, starts: bool
    ) -> dict[str, float]:
        if len(features) < 2:
            raise DataError(f"the guard compares images, and {len(features)} can be read")
        found = of_spectrum(features)
        if views is not None:
            found |= {"lidar": lidar(views), "lidar_views": float(views.shape[1])}
        neighbours = nearest(features, numbers, num_images=len(self._source)).cpu()
        if starts:
            self._start = neighbours
            self._write(neighbours)
        elif self._start is None:
            self._start = self._read()
        if self._start is not None:
            found["agreement"] = agreement(self._start, neighbours)
        return found

    def take_start(self, run_dir: Path) -> None:
        """Copy the start of the run that this one goes on from; rank 0 calls it."""
        source = run_dir / START_FILE
        part = self._path.with_name(f".{self._path.name}.part")
        try:
            shutil.copyfile(source, part)
            part.replace(self._path)
        except OSError as error:
            log.warning("no agreement with the start: cannot copy %s: %s", source, error)

    def _forget(self) -> None:
        """Leave no agreement with the start of other images, where this one has no neighbours."""
        self._start = None
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot delete %s, the start of other images: %s", self._path, error)

    def _write(self, neighbours: Tensor) -> None:
        """Keep the start for later starts of the run; a full disk costs the agreement of those."""
        part = self._path.with_name(f".{self._path.name}.part")
        try:
            write_tensors({_NEIGHBOURS: neighbours}, part, metadata={_IDENTITY: self.identity})
            part.replace(self._path)
        except (OSError, SafetensorError) as error:
            log.warning("cannot write %s: %s", self._path, error)

    def _read(self) -> Tensor | None:
        """Neighbours of the start, None with a warning if they are lost."""
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
                found: Tensor = file.get_tensor(_NEIGHBOURS)
        except (OSError, SafetensorError, KeyError) as error:
            log.warning("no agreement with the start: %s cannot be read: %s", self._path, error)
            return None
        # Older versions named the set in words.
        whole = metadata.get(_IDENTITY) == self.identity or metadata.get("images") == self.images
        whole &= found.ndim == 2 and found.shape[1] > 0 and len(found) == len(self._source)
        if not whole or found.dtype != torch.int64:
            log.warning("no agreement with the start: %s is of another set", self._path)
            return None
        return found
