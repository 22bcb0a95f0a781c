"""What to look at before a training: copies, damage, mixtures, labels, and too few images."""

from __future__ import annotations

import math
import shlex

from data_tools.set_facts import SetFacts
from dinoscale.convert.card import BackboneCard
from dinoscale.recipe.pixels import LEAST_STD, channels_of, readable_as

_FEW = 20_000  # images, below which released weights are the better start
_COPIES = 0.01  # share of copies in the whole set from which they are worth a warning
_UNSEEN = 0.25  # share of copies that a sample must not overlook
_BOTH = 0.05  # share of gray and of colored images, from which a set is a mixture
_BAD = 0.001  # a tenth of data.max_bad_fraction: a sample may show too few


def cautions(
    facts: SetFacts, *, card: BackboneCard | None = None, crop: int | None = None
) -> list[str]:
    """What to look at before a training.

    Args:
        facts: of the set.
        card: of the weights to go on from; None from scratch.
        crop: pixels along a global crop of those weights.
    """
    found = [] if card is None or crop is None else _cautions_on(facts, card, crop)
    if card is None and facts.images < _FEW:
        found.append(
            f"{facts.images:,} images are few to learn from scratch: released weights are the"
            " better start where they fit the images (--from WEIGHTS)."
        )
    found += _cautions_of_copies(facts)
    if facts.unreadable > _BAD * facts.sample:
        found.append(
            f"{facts.unreadable} of {facts.sample} images cannot be read: see `dinoscale data"
            f" inspect-shards {shlex.quote(facts.spec)}`, remove them, or raise"
            " data.max_bad_fraction, above which a run ends."
        )
    if flat := [number for number, value in enumerate(facts.std) if value < LEAST_STD]:
        found.append(
            f"channels {flat}, counted from 0, are nearly the same in all pixels of the sample: are"
            " these the right images, and is data.max_pixel_value their white?"
        )
    if facts.mixed_scales:
        found.append(
            f"{facts.mixed_scales}: no one number is white, so that each image is scaled by its own"
            " range, and brightness does not compare between images. Store them on one scale from"
            " 0, and set data.max_pixel_value."
        )
    return [*found, *_cautions_of_channels(facts, card), *_cautions_of_labels(facts)]


def least_share_of_copies(facts: SetFacts) -> float:
    """Share of copies that the whole set has at least, with a confidence of about 97 %.

    A copy shows only if its original is in the sample, too, so that c copies among n images are
    fewer than in the set: hardly where many are of one image, such as a placeholder, and by far
    where each has one copy. Which it is, few images do not tell. So this is c / n, with the lower
    end of the interval of a Poisson number, c + 2 - 2 sqrt(c + 1), for c.
    """
    read = max(facts.sample - facts.unreadable, 1)
    if facts.sample == facts.images:
        return facts.copies / read
    return (facts.copies + 2 - 2 * math.sqrt(facts.copies + 1)) / read


def _cautions_of_copies(facts: SetFacts) -> list[str]:
    read, whole = facts.sample - facts.unreadable, facts.images
    if facts.channels not in (1, 3) or read < 2:
        return []  # they are looked for in gray and RGB alone
    command = f"`dinoscale data deduplicate {shlex.quote(facts.spec)}`"
    # A pair of N images is with n of them with probability n (n - 1) / (N (N - 1)). The share of
    # the set that a pair of the sample stands for, if no image has more than one copy:
    each = (whole - 1) / (read * (read - 1))
    if facts.copies * each > _COPIES:
        such = f", such as {' and '.join(map(shlex.quote, facts.alike))}" if facts.alike else ""
        if facts.sample == whole:
            share = "all were looked at"
        else:
            share = (
                f"of the whole set at least {100 * least_share_of_copies(facts):.2g} % are copies"
            )
            share += ", and far more if most are of different images, as few are here together"
        return [
            f"{facts.copies} of {facts.sample} images look like another one of them{such}; {share}:"
            f" see {command}."
        ]
    # None: of a Poisson number, up to 4 may be expected.
    if facts.copies == 0 and facts.sample < whole and 4 * each > _UNSEEN:
        enough = math.ceil(math.sqrt(4 * whole / _UNSEEN) / 1000) * 1000
        enough = min(enough, whole)
        return [
            f"{facts.sample} of {whole:,} images do not show copies, of which there may be"
            f" many: look at more (--images {enough}), or see {command}."
        ]
    return []


def _cautions_of_channels(facts: SetFacts, card: BackboneCard | None) -> list[str]:
    """Files that are not as most, and colors that are dropped."""
    if facts.channels not in (1, 3) or facts.arrays:
        return [
            f"some files have other channels than {facts.channels}: those of arrays cannot be read"
            " then, and pictures lose their color where that is 1."
        ] * bool(facts.other_channels)
    read = facts.sample - facts.unreadable
    colored = round((1 - facts.colorless) * read)
    gray = f"{read - colored} of {read} images are gray, {colored} have color"
    channels = channels_of(facts) if card is None else card.backbone.in_chans
    if channels == 1 == channels_of(facts) and colored:
        return [f"{gray}, which data.channels=1 drops; 3 keeps it."]
    if min(colored, read - colored) > _BOTH * read:
        return [f"{gray}: all are read as RGB, and features may group them by that alone."]
    return []


def _cautions_of_labels(facts: SetFacts) -> list[str]:
    found = []
    if facts.classes > 1:
        found.append(
            f"there are {facts.classes} classes: set eval.train and eval.test to labelled images"
            " that are kept apart from these, and the run measures k-NN."
        )
    return found


def _cautions_on(facts: SetFacts, card: BackboneCard, crop: int) -> list[str]:
    """What going on from weights does to the images."""
    found, channels = [], card.backbone.in_chans
    if not readable_as(channels, facts):
        found.append(
            f"the weights see {channels} channels and the images have {facts.channels}: the first"
            " layer starts as the mean over the channels of the weights, so that what it knows of"
            " color is lost."
        )
    side = facts.short_side[1]
    if side * 4 < crop * 3:
        found.append(
            f"crops of {crop} px enlarge the images, {side} px in the median, {crop / side:.2g}"
            " times, so that there are 16 x 16 patches of the weights. Fewer (crops.global_size)"
            " are cheaper and coarser; from scratch, patches can be smaller."
        )
    return found
