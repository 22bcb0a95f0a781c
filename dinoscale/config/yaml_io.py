"""Strict YAML in and out: numbers as people write them, no key twice, no tags.

Stock PyYAML follows YAML 1.1, which reads `2e-4` as text, `on` as true and `1:30` as 90, and keeps
the last of two equal keys. Here plain scalars follow the core schema of YAML 1.2.2, section
10.3.2 (https://yaml.org/spec/1.2.2), plus `_` between digits; a key without a value has empty text,
since a value left out by mistake must not mean null.
"""

import re
from collections.abc import Iterable

import yaml

from dinoscale.errors import ConfigError

_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
# (tag, pattern, first characters), the first match wins; the writer quotes by the same table
_PLAIN_SCALARS = (
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", _INT, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789"),
)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with the table above that refuses duplicate keys and what a hostile file needs.

    That is: tags, which name constructors, and aliases, which can be circular or grow without end.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call] # so in types-PyYAML
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"line {line}: aliases (*name) are not allowed; use `defaults`")
        if event.tag is not None:
            raise ConfigError(f"line {line}: tags ({event.tag!r}) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"line {line}: a key must be text, got {key!r}")
            if key in first_line:
                raise ConfigError(
                    f"line {line}: duplicate key {key!r}, first given on line {first_line[key]}"
                )
            first_line[key] = line
        return super().construct_mapping(node, deep=deep)

    def construct_plain_null(self, node: yaml.ScalarNode) -> str | None:
        """None where it is written; an empty value is text, which no field takes for none."""
        return None if node.value else ""

    def construct_plain_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""))


class _Dumper(yaml.SafeDumper):
    """SafeDumper with the table above; lists stay on one line, shared values are repeated."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True

    def represent_flow_list(self, values: Iterable[object]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)

    def represent_text(self, text: str) -> yaml.Node:
        style = None if text.isprintable() else '"'  # escaped: PyYAML reads a plain NEL as a space
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _tag, _pattern, _first in _PLAIN_SCALARS:
    _StrictLoader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))
_StrictLoader.add_constructor("tag:yaml.org,2002:null", _StrictLoader.construct_plain_null)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_plain_int)
_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(list, _Dumper.represent_flow_list)
_Dumper.add_representer(tuple, _Dumper.represent_flow_list)


def read_yaml(text: str) -> object:
    """Parse one YAML document.

    Args:
        text: the document.

    Returns:
        Mappings, lists, text, numbers, booleans and None; None for an empty document, and for a
        value only where null is written.

    Raises:
        ConfigError: the text is not YAML, or repeats a key; the message starts with the line.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {error}") from error


def write_yaml(value: object) -> str:
    """Return the YAML that `read_yaml` reads back as the same value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
