"""Turn pydantic's report into one sentence per mistake: the key, the value, what is allowed."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Union, get_args, get_origin

from pydantic import BaseModel

from dinoscale.config import renamed
from dinoscale.config.schema import RunConfig
from dinoscale.config.secrets import hide_secrets
from dinoscale.config.sections.fields import (
    AUTO,
    LADDER,
    LIST,
    MIXTURE,
    NAMED,
    NUMBER,
    ONE_SOURCE,
    SIZE,
    WeightedSource,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_NEEDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (put it in quotes)",
    "string_unicode": "text that can be written as UTF-8",
    "string_too_short": "text that is not empty",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "of at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "of at most"),
}
_CHOICES = (
    ONE_SOURCE,
    MIXTURE,
    NUMBER,
    AUTO,
    NAMED,
    SIZE,
    LADDER,
    LIST,
)  # tags of alternatives, which are no keys
_MAX_SHOWN = 60  # characters of a wrong value in a message


def sections(root: type[BaseModel] = RunConfig) -> dict[str, type[BaseModel]]:
    """Return the section classes of a configuration by key."""
    found = {}
    for key, field in root.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found[key] = field.annotation
    return found


def sentences(
    errors: Sequence["ErrorDetails"], root: type[BaseModel] = RunConfig
) -> list[tuple[str, str]]:
    """Translate pydantic's errors.

    Args:
        errors: `ValidationError.errors()` of a `root`.
        root: class of the whole configuration.

    Returns:
        (dotted key, sentence) in the order of the errors; the key is "" for a rule that joins
        sections. A list that is too short is reported once.
    """
    told: dict[str, tuple[str, str]] = {}
    for error in errors:
        for key, sentence in _translate(error, root):
            told.setdefault(sentence, (key, sentence))
    return list(told.values())


def _translate(error: "ErrorDetails", root: type[BaseModel]) -> list[tuple[str, str]]:
    place = [part for part in error["loc"] if part not in _CHOICES]
    kind, names = error["type"], [str(part) for part in place if isinstance(part, str)]
    if MIXTURE in error["loc"] and len(place) > len(names):
        return [_about_mixture(error, place)]
    key = ".".join(names)
    item = next(
        (f"item {part + 1} of the list" for part in error["loc"] if isinstance(part, int)), ""
    )
    if kind == "value_error":
        text = f"{item}: " * bool(item) + str(error["ctx"]["error"])
        if not key:
            return [("", line) for line in text.splitlines()]
        if key in sections(root):
            return [(f"{key}.{text.partition(':')[0]}", f"{key}.{text}")]
        return [(key, f"{key}: {text}")]
    if kind == "extra_forbidden":
        return [(key, f"{key}: {unknown_key(names, root)}")]
    if kind == "missing" and isinstance(error["loc"][-1], str):
        return [(key, f"{key}: is missing")]
    needs = f"{item} needs".lstrip()
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return [(key, f"{key}: {needs} a mapping of keys to values, got {show(error['input'])}")]
    if kind in ("missing", "too_long"):  # of a list: all other fields have defaults
        return [
            (
                key,
                f"{key}: needs a list of {_list_length(names)} numbers, got {show(error['input'])}",
            )
        ]
    or_null = ", or null" if error["input"] == "" and _may_be_null(names, root) else ""
    return [(key, f"{key}: {needs} {_needs(error)}{or_null}, got {show(error['input'])}")]


def _may_be_null(names: Sequence[str], root: type[BaseModel]) -> bool:
    section = sections(root).get(names[0]) if len(names) == 2 else root
    field = section.model_fields.get(names[-1]) if section else None
    return field is not None and NoneType in kinds(field.annotation)


def kinds(annotation: object) -> set[object]:
    """The types that a value of an annotation may have; of a container, the container."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*map(kinds, get_args(annotation)))
    return {origin or annotation}


def _about_mixture(error: "ErrorDetails", place: Sequence[int | str]) -> tuple[str, str]:
    """A mistake in one source of a mixture, at (section, key, number[, name])."""
    section, name, number, *rest = place
    known = list(WeightedSource.model_fields)
    if not rest:
        what = f"needs a mapping of {' and '.join(known)}, got {show(error['input'])}"
    elif error["type"] == "extra_forbidden":
        what = f"unknown key {rest[0]!r}; known are {', '.join(known)}"
    elif error["type"] == "missing":
        what = f"{rest[0]} is missing"
    elif error["type"] == "value_error":
        what = f"{rest[0]} {error['ctx']['error']}"
    else:
        what = f"{rest[0]} needs {_needs(error)}, got {show(error['input'])}"
    key = f"{section}.{name}"
    return key, f"{key}: item {int(number) + 1} of the list: {what}"


def _needs(error: "ErrorDetails") -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"a value {words} {_number(context[name])}"
    if kind == "literal_error":
        return f"one of {context['expected']}".replace(" or ", ", ")
    if kind == "int_type" and NUMBER in error["loc"]:
        return "a whole number or auto"
    return _NEEDS.get(kind) or f"another value ({error['msg']})"


def _number(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) and bound < 1e15 else f"{bound:g}"


def _list_length(names: Sequence[str]) -> int:
    default = RunConfig()
    for name in names:
        default = getattr(default, name)
    return len(default) if isinstance(default, tuple) else 0


def show(value: object) -> str:
    """Return a value as it would be written in YAML, with its kind where that is the mistake."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    text = repr(hide_secrets(value))
    text = text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
    return f"{text} (text)" if isinstance(value, str) else text


def unknown_key(names: Sequence[str], root: type[BaseModel] = RunConfig) -> str:
    """Explain an unknown key: the nearest in its place, the same key elsewhere, or all there are.

    Args:
        names: parts of the dotted key, such as ["crops", "num_locl"].
        root: class of the whole configuration.

    Returns:
        "unknown key, did you mean 'num_local'?" or alike.
    """
    dotted = ".".join(names)
    if root is RunConfig and dotted in renamed.SETTINGS:
        return f"renamed, write {renamed.SETTINGS[dotted]}"
    parts, parents = sections(root), [root]
    for name in names[:-1]:
        places = [parent.model_fields.get(name) for parent in parents]
        parents = [part for field in places if field for part in _sections_in(field.annotation)]
    key = names[-1]
    here = [
        field.alias or name for parent in parents for name, field in parent.model_fields.items()
    ]
    everywhere = [f"{name}.{leaf}" for name, part in parts.items() for leaf in part.model_fields]
    same = [path for path in everywhere if path.partition(".")[2] == key]
    near = nearest(key, here)
    if near and not (same and len(names) == 1):  # `lr` is that of a section, not like `lora`
        return f"unknown key{near}?"
    if key in everywhere:  # a file that says `crops.num_local: 6`
        section, _, leaf = key.partition(".")
        return f"unknown key; in a file, {leaf!r} stands indented under '{section}:'"
    if key in root.model_fields:
        same.append(key)
    if same:
        return f"unknown key, did you mean {' or '.join(map(repr, same))}?"
    return f"unknown key; known are {', '.join(here)}"


def _sections_in(annotation: object) -> list[type[BaseModel]]:
    """The section that a field is, or those that it can be or list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for inner in get_args(annotation) for part in _sections_in(inner)]


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like this one, as ", did you mean 'x'"; empty if none is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}" if near else ""
