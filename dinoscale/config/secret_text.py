"""Passwords and signatures in the text of a configuration.

A configuration is written to logs, checkpoints, reports and cards, so it must hold none: a URL says
`${DINOSCALE_NAME}` instead, which is replaced when it is opened (`data.remote`), and a `pipe:`
command says `$NAME`, which its shell replaces.
"""

import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

HIDDEN = "***"  # in place of a secret, in what earlier runs wrote

_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]*", re.IGNORECASE)
_USER = re.compile(r"://([^/?#]*)@")
_PARAMETER = re.compile(r"[?&;#]([^=&;#]+)=([^&;#]+)")
_NAMES = re.compile(  # of parameters, in small letters without - and _
    r"(.*(signature|token|passw(or)?d|secret|credential|apikey|accesskey(id)?)"
    r"|sig|sas|auth|authorization|pwd|pass|hmac|jwt|key)"
)
_IN_COMMAND = re.compile(
    r"(?:authorization:\s*\w+\s+|[\w-]*(?:token|key|password):\s*"
    r"|\s(?:--\w*pass(?:word)?|--\w*token)[\s=]"
    r"|\b\w*(?:password|passwd|secret\w*|token|api_?key)=)([^\s'\"]+)"
    r"|\s(?:-u|--user)[\s=]*([^\s'\":]*:[^\s'\"]+)",
    re.IGNORECASE,
)
_IN_BRACES = re.compile(r"\$\{\w+\}")  # a variable of the environment
_OF_SHELL = re.compile(r"\$\{\w+\}|\$\w+")


def require_no_secrets(value: object) -> None:
    """Refuse text that holds a password or a signature.

    Args:
        value: of a setting; text in lists and mappings counts.

    Raises:
        ValueError: it does; the message names the parameter and the remedy, not the value.
    """
    for text in _texts(value):
        for _, _, what in _secrets(text):
            remedy = (
                "export it, and write $NAME in the command"
                if text.lower().startswith("pipe:")
                else "export it as DINOSCALE_NAME and write ${DINOSCALE_NAME} here, or put a "
                "password into ~/.netrc"
            )
            raise ValueError(
                f"holds {what}, and settings are written to logs, checkpoints and cards; {remedy}"
            )


def hide_secrets(value: object) -> object:
    """The same value with *** for what `require_no_secrets` refuses, in all text of it."""
    if isinstance(value, str):
        for start, end, _ in reversed(list(_secrets(value))):
            value = value[:start] + HIDDEN + value[end:]
        return value
    if isinstance(value, Mapping):
        return {key: hide_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(hide_secrets(item) for item in value)
    return value


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _secrets(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and kind of each, from left to right."""
    found: list[tuple[int, int, str]] = []
    command = text.lower().startswith("pipe:")
    for url in _URL.finditer(text):
        found += _in_url(url[0], offset=url.start(), variable=_OF_SHELL if command else _IN_BRACES)
    if command:
        for match in _IN_COMMAND.finditer(text):
            group = 1 if match[1] is not None else 2
            if "$" not in match[group] and match[group] != HIDDEN:
                found.append((*match.span(group), "a password or token"))
    end = 0
    for secret in sorted(found):
        if secret[0] >= end:
            yield secret
            end = secret[1]


def _in_url(url: str, *, offset: int, variable: re.Pattern[str]) -> Iterator[tuple[int, int, str]]:
    def is_secret(value: str) -> bool:
        return variable.sub("", value) not in ("", HIDDEN)

    user = _USER.search(url)
    if user is not None:
        name, colon, password = user[1].partition(":")
        if is_secret(password if colon else name):
            what = "a user name and password" if colon else "a user name"
            yield offset + user.start(1), offset + user.end(1), f"{what} in a URL"
    for match in _PARAMETER.finditer(url):
        name = unquote(match[1])
        if _NAMES.fullmatch(re.sub("[-_]", "", name.lower())) and is_secret(match[2]):
            yield offset + match.start(2), offset + match.end(2), f"the secret {name} of a URL"
