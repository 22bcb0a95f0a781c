"""The READMEs of the repository, and the command lines in them."""

import re

from tests.forked import ROOT

NAMES = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.rglob("README.md")
    if not path.relative_to(ROOT).parts[0].startswith(".")
)
_LAUNCHED = re.compile(r"^(?:.* -m |.* --module |\.venv/bin/)?dinoscale (.*)$")


def text_of(name: str) -> str:
    """A README, by its path from the root."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks_of(name: str, language: str) -> list[str]:
    """Its blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text_of(name), re.DOTALL)


def lines_of(name: str) -> list[str]:
    """Its command lines for a shell, whole, with their variables, without comments."""
    found = []
    for block in blocks_of(name, "bash"):
        for variable, value in re.findall(r'^(\w+)="(.*)"$', block, re.MULTILINE):
            block = block.replace(f'{variable}="{value}"', "").replace(f"${variable}", value)
        lines = block.replace("\\\n", "").splitlines()
        found += [line.split(" #")[0].strip() for line in lines]
    return [line for line in found if line]


def arguments_in(line: str) -> str | None:
    """The arguments of `dinoscale`, under whatever launcher; None for another program."""
    match = _LAUNCHED.match(line)
    return None if match is None else match[1]


def commands_of(name: str) -> list[str]:
    """The arguments of `dinoscale` in each of its lines that start it."""
    return [found for line in lines_of(name) if (found := arguments_in(line)) is not None]
