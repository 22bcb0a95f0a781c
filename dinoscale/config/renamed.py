"""Settings and metrics that were renamed: old name -> new name.

A user who writes an old name is told the new one. What an earlier version has stored (run
directories, checkpoints, tables of sweeps) is read under the new names.
"""

from collections.abc import Mapping

SETTINGS = {  # always within their section
    "data.colors": "data.color_ops_on",
    "data.distinct_images": "data.subset_size",
    "data.lanes": "data.stream_readers",
    "data.white": "data.max_pixel_value",
    "engine.bucket_elements": "engine.reduce_bucket_size",
    "engine.hpz_ranks": "engine.zero_hpz_partition_size",
    "engine.live_elements": "engine.stage3_max_live_parameters",
}
AXES = {"distinct_images": "subset_size", **SETTINGS}  # of a sweep
CARD = {"white": "max_pixel_value"}  # of weights
METRICS = {  # in metrics.jsonl
    "target_information": "target_mutual_information",
    "target_share": "max_prototype_prob",
}


def with_new_names(settings: Mapping[str, object]) -> dict[str, object]:
    """Stored settings, sections by key, under the names of this version."""
    return _renamed(settings, SETTINGS)


def with_first_names(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings of this version under the names that they had first, which keys of runs hash."""
    return _renamed(settings, {new: old for old, new in SETTINGS.items()})


def _renamed(settings: Mapping[str, object], names: Mapping[str, str]) -> dict[str, object]:
    pairs = [(old.split("."), new.split(".")) for old, new in names.items()]
    inner = {
        section: {old[1]: new[1] for old, new in pairs if old[0] == section} for section in settings
    }
    return {
        section: with_new_keys(values, inner[section]) if isinstance(values, Mapping) else values
        for section, values in settings.items()
    }


def with_new_keys(values: Mapping[str, object], names: Mapping[str, str]) -> dict[str, object]:
    """A flat mapping, such as a line of metrics.jsonl, under the new names of a table above.

    Where both names are given, the value under the new one counts.
    """
    return {
        names.get(key, key): value
        for key, value in values.items()
        if key not in names or names[key] not in values
    }
