"""The image sets that a configuration names, opened as its run opens them; imports no torch."""

from collections.abc import Callable
from functools import partial

from dinoscale.config import RunConfig
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.mixture import open_sources, require_few_left_out
from dinoscale.data.sources.source import Source, open_source

Alive = Callable[[], None]  # called from time to time while a set is being opened
Open = Callable[[Alive], Source]


def image_sets(config: RunConfig) -> dict[str, tuple[str | None, Open]]:
    """What each key of the config names, None for nothing, and a function that opens it.

    The function raises a DataError or ConfigError if the set cannot be opened, or if more than
    `data.max_bad_fraction` of it is left out.
    """
    parts = [part.source for part in config.data.sources]
    decoder = Decoder(config.data.channels, config.data.max_pixel_value)
    max_lost = config.data.max_bad_fraction

    def open_training(heartbeat: Alive) -> Source:
        return open_sources(
            parts,
            decoder,
            manifest=config.data.manifest,
            shuffle_buffer=1,  # one image after another is enough for a look
            subset_size=config.data.subset_size,
            max_lost=max_lost,
            heartbeat=heartbeat,
        )

    def open_stored(spec: str, heartbeat: Alive) -> Source:
        source = open_source(spec, decoder, heartbeat)
        require_few_left_out(source, spec, max_lost=max_lost)
        return source

    held_out = None if config.guard.every_steps is None else config.guard.images
    return {
        "data.train": (" + ".join(parts) or None, open_training),
        "eval.train": (config.eval.train, partial(open_stored, config.eval.train or "")),
        "eval.test": (config.eval.test, partial(open_stored, config.eval.test or "")),
        "guard.images": (held_out, partial(open_stored, held_out or "")),
    }
