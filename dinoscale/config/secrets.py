"""Passwords and signatures in the text of a configuration.

A configuration is written to logs, checkpoints, reports and cards, so it must hold none: a URL says
`${DINOSCALE_NAME}` instead, which is replaced when it is opened (`data.remote`), and a `pipe:`
command says `$NAME`, which its shell replaces.
"""

import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

HIDDEN = "***"  # in place of a secret, in what earlier runs wrote

_URL = re.compile(r"[a-z][a-z0-9+.-]{0,20}://[^\s'\"<>]*", re.IGNORECASE)
_AUTHORITY = re.compile(r"://([^\s/?#'\"<>]*)")
_TO_LAST_AT = re.compile(r"(?:(?!://)\S)*(?=@)")  # a password may hold / ? # and @
_NO_PORT = re.compile(r"[^:@\[]*:(?!\d*$)")  # at the start of a host and what follows its colon
_PARAMETER = re.compile(r"[?&;#]([^=&;#]+)=([^&;#]+)")
_NAMES = re.compile(  # of parameters, in small letters without - and _
    r"(.*(signature|token|passw(or)?d|secret|credential|apikey|accesskey(id)?)"
    r"|sig|sas|auth|authorization|pwd|pass|hmac|jwt|key)"
)
_COMMAND = re.compile(r"\bpipe:", re.IGNORECASE)  # also within an override or a file
_IN_COMMAND = re.compile(  # no part without a bound before a word: a long text would take hours
    r"(?:"
    r"authorization:\s*(?:\w+\s+)?|(?:token|key|password|secret):\s*"  # headers
    r"|(?<![\w-])--[\w-]{0,40}(?:(?<!by)pass(?:word|wd|phrase)?|token|secret|bearer|api-?key"
    r"|(?:access|account|secret)-?key)(?![\w-]{0,40}(?:file|id|name|path|stdin)\b)(?![a-z])"
    r"(?:[-_][\w-]{0,40})?[\s=]+(?![-|&;<>])"
    r"|\bsshpass\s+-p\s*"
    r"|(?:password|passwd|passphrase|secret\w{0,40}|token|api_?key|(?:access|account)_?key"
    r"|(?:\b|_|ssh)pass)="
    r")[\\'\"]*([^\s'\"]+)"
    r"|\bcookie:\s*([^\s'\";]+(?:;\s*[^\s'\";]+)*)"
    r"|(?<![\w-])(?:-b|--cookie)[\s=]*[\\'\"]*([^\s'\"=]+=[^\s'\"]+)"
    r"|(?<![\w-])(?:-u|--(?:proxy-)?user)[\s=]*[\\'\"]*([^\s'\":]*:(?!//)[^\s'\"]+)",
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


def is_secret_name(name: str) -> bool:
    """Whether a variable or parameter of this name holds a password, a key or a signature."""
    return _NAMES.fullmatch(re.sub("[-_]", "", name.lower())) is not None


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
    command = _COMMAND.search(text)
    begin = command.end() if command else len(text)
    for url in _URL.finditer(text):
        variable = _OF_SHELL if url.start() >= begin else _IN_BRACES
        found += _user_in_url(text, url.start(), variable=variable)
        found += _parameters_of_url(url[0], offset=url.start(), variable=variable)
    for match in _IN_COMMAND.finditer(text, begin):
        group = match.lastindex or 0
        # Of a variable, or of another command.
        if not {"$", "`"} & set(match[group]) and match[group] != HIDDEN:
            found.append((*match.span(group), "a password or token"))
    end = 0
    for secret in sorted(found):
        if secret[0] >= end:
            yield secret
            end = secret[1]


def _is_secret(value: str, variable: re.Pattern[str]) -> bool:
    return variable.sub("", value) not in ("", HIDDEN)


def _user_in_url(
    text: str, start: int, *, variable: re.Pattern[str]
) -> Iterator[tuple[int, int, str]]:
    """User name and password of the URL that starts there, up to the last @ before a space.

    A path may hold an @ too: without one in the host's place, `name:` begins a password only where
    no port follows.
    """
    authority = _AUTHORITY.search(text, start)
    assert authority is not None
    all_of_it = _TO_LAST_AT.match(text, authority.start(1))
    if all_of_it is None:
        return
    user, at, _ = authority[1].rpartition("@")
    if not at:
        if not _NO_PORT.match(variable.sub("", authority[1])):
            return
        user = all_of_it[0]
    name, colon, password = user.partition(":")
    if _is_secret(password if colon else name, variable):
        what = "a user name and password" if colon else "a user name"
        yield *all_of_it.span(), f"{what} in a URL"


def _parameters_of_url(
    url: str, *, offset: int, variable: re.Pattern[str]
) -> Iterator[tuple[int, int, str]]:
    for match in _PARAMETER.finditer(url):
        name = unquote(match[1])
        if is_secret_name(name) and _is_secret(match[2], variable):
            yield offset + match.start(2), offset + match.end(2), f"the secret {name} of a URL"
