"""From preset or YAML file and overrides to a checked `RunConfig`, its phases, and back to YAML.

A file inherits: `defaults: [../base/dino.yaml, vit_s16, ...]`, paths relative to the file or names
of presets. A later file wins over an earlier one, the file itself over its defaults,
`section.key=value` over all. Mappings merge; scalars and lists replace. A file that several inherit
is merged once, before the first of them.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from types import NoneType

from pydantic import BaseModel, ValidationError

from dinoscale.config.layers import Layers
from dinoscale.config.mistakes import kinds, sections, sentences, show
from dinoscale.config.renamed import with_new_names
from dinoscale.config.same_network import require_same_network
from dinoscale.config.schema import RunConfig
from dinoscale.config.secrets import hide_secrets
from dinoscale.config.sections.training import PhaseConfig
from dinoscale.config.teachers import named_teachers, with_run_dir
from dinoscale.config.yaml_io import read_yaml, write_yaml
from dinoscale.errors import ConfigError
from dinoscale.runtime.outputs import PHASES

_COMMAND_LINE = "command line"
_OF_A_PHASE = "phases."
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_MORE_THAN_A_LIST = re.compile(r"\s*\[[^\[\]{}'\"]*\]\s*[^\s#]")  # a path such as [a]/x
_MARKS = ("versions.json", "job.json")  # in every run directory, and in that of a sweep's run
_IMAGES = ("data.train", "eval.train", "eval.test")
_MAX_FILES = 100  # in a chain, each in the defaults of the one before


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a run's configuration.

    Args:
        name_or_path: a preset's name such as `vit_s16`, or the path of a YAML file.
        overrides: `section.key=value`; a later one wins. The value is a YAML scalar or list; where
            a setting is a text, such as a path, the value is the text as typed, unless quoted.
            `phases.NAME.section.key=value` is of one phase, `phase=NAME` chooses it; a setting
            that a phase changes wins over one that is not of the phase.

    Returns:
        The checked configuration; with `phase=NAME` that of the phase.

    Raises:
        ConfigError: something is missing, unknown, of the wrong type or out of range; the message
            has one line per mistake.
    """
    _require_whole_patterns(overrides)
    merged = Layers()
    _put_file(_find(name_or_path), merged, chain=())
    of_phases = [override for override in overrides if override.startswith(_OF_A_PHASE)]
    others = [override for override in overrides if not override.startswith(_OF_A_PHASE)]
    merged.put(*map(_parse_override, others), origin=_COMMAND_LINE)
    for override in of_phases:
        _change_phase(merged.values.get("phases"), override)
    config = _checked(merged)
    return config if config.phase is None else phase_named(config, config.phase)


def parse_config(values: Mapping[str, object], *, origin: str = "") -> RunConfig:
    """Check a mapping that was read elsewhere, such as from a checkpoint.

    An older version may have written it: settings that were renamed are taken under their new
    names, and passwords and signatures are hidden.

    Args:
        values: sections by key, as `dump_config` writes them.
        origin: where they come from, for the messages.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: as `load_config`.
    """
    merged = Layers()
    settings = with_new_names({key: hide_secrets(value) for key, value in values.items()})
    merged.put(settings, origin=origin)
    return _checked(merged)


def dump_config(config: RunConfig) -> str:
    """Return the configuration as YAML, all fields included; loading it gives an equal one."""
    return write_yaml(config.model_dump())


def list_presets() -> list[str]:
    """Return the names `load_config` knows, sorted."""
    return sorted(_presets())


def describe_presets() -> dict[str, str]:
    """What each preset is, by name: the comment at the start of its file."""
    return {name: _first_paragraph(path) for name, path in sorted(_presets().items())}


def _first_paragraph(path: Path) -> str:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    comment = takewhile(lambda line: line.startswith("# "), lines)  # a bare # ends it
    return " ".join(line.removeprefix("# ") for line in comment)


def _presets() -> dict[str, Path]:
    package = Path(__file__).resolve().parents[1]
    for configs in (package / "configs", package.parent / "configs"):  # installed, checkout
        found = {path.stem: path for path in (configs / "pretrain").glob("*.yaml")}
        if found:
            return found
    return {}


def _find(name_or_path: str) -> Path:
    presets = _presets()
    if name_or_path in presets:
        return presets[name_or_path]
    path = Path(name_or_path)
    if os.path.isfile(path):  # unlike Path.is_file, also False for an impossible name
        return path
    if os.path.isdir(path):
        raise ConfigError(f"{name_or_path}: is a folder; name a YAML file or a preset")
    shown = hide_secrets(name_or_path)
    known = ", ".join(sorted(presets)) or "none"
    near = difflib.get_close_matches(path.stem, presets, n=1, cutoff=0.5)
    hint = f", did you mean {near[0]!r}?" if near else ""
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise ConfigError(f"{shown}: no such file{hint or '.'} Presets: {known}")
    raise ConfigError(f"{shown}: unknown preset{hint or '.'} Presets: {known}")


def _put_file(path: Path, merged: Layers, *, chain: tuple[Path, ...]) -> None:
    """Merge the defaults of a file, then the file; a file merged before is skipped."""
    if len(chain) == _MAX_FILES:
        raise ConfigError(f"{path}: more than {_MAX_FILES} files, each in the defaults of the next")
    values = read_mapping(path, wanted_by=chain[-1] if chain else None)
    real = path.resolve()
    if real in merged.files:
        return
    if real in chain:
        circle = " -> ".join(step.name for step in (*chain[chain.index(real) :], real))
        raise ConfigError(f"{path}: its defaults lead back to itself: {circle}")
    parents = values.pop("defaults", [])
    if not isinstance(parents, list) or not all(isinstance(item, str) for item in parents):
        got = show(parents) if parents else "nothing"
        raise ConfigError(f"{path}: defaults: needs a list of file paths, got {got}")
    files = [_find_default(parent, path) for parent in parents]
    if _is_of_a_run(path):
        values = with_new_names(values)
    for file in files:
        _put_file(file, merged, chain=(*chain, real))
    _require_order(files, merged, wanted_by=path)
    merged.put(values, origin=str(path))
    merged.files[real] = len(merged.files)


def _is_of_a_run(path: Path) -> bool:
    """Whether a file lies in a run directory, where a version of before may have written it."""
    return any((path.parent / name).exists() for name in _MARKS)


def _find_default(name: str, wanted_by: Path) -> Path:
    """A file beside the one that names it, or a preset, with or without `.yaml`."""
    file = wanted_by.parent / os.path.expanduser(name)
    if os.path.isfile(file):
        return file
    preset = _presets().get(name.removesuffix(".yaml"))
    if preset:
        return preset
    if os.path.exists(file):  # a pipe or a device has no end
        raise ConfigError(f"{wanted_by}: defaults: {name!r} is a folder or a device, not a file")
    return file


def _require_order(files: Sequence[Path], merged: Layers, *, wanted_by: Path) -> None:
    """Refuse a file named after one that builds on it: it was merged earlier and would not win.

    Raises:
        ConfigError: there is one.
    """
    for first, second in pairwise(files):
        if merged.files[second.resolve()] < merged.files[first.resolve()]:
            raise ConfigError(
                f"{wanted_by}: defaults: {second.name} cannot win over {first.name}, which builds"
                " on it or comes after it in other defaults; name it first, or repeat its settings"
                f" in {wanted_by.name}"
            )


def read_mapping(path: Path, *, wanted_by: Path | None = None) -> dict[str, object]:
    """Read a YAML file of keys and values; an empty file has none.

    Args:
        path: of the file.
        wanted_by: another file that names it, for the message.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    except OSError as error:
        user = f" (in the defaults of {wanted_by})" if wanted_by else ""
        raise ConfigError(f"{path}: cannot be read: {error.strerror}{user}") from error
    except ValueError as error:
        raise ConfigError(f"{str(path)!r}: cannot be the name of a file ({error})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        found = "text" if isinstance(values, str) else show(values)  # maybe a file of passwords
        raise ConfigError(f"{path}: needs a mapping of keys to values, got {found}")
    return values


def _require_whole_patterns(overrides: Sequence[str]) -> None:
    """Refuse an x-{0..7}.tar that the shell took apart: of its shards only the last would count."""
    for before, after in pairwise(overrides):
        key, _, text = after.partition("=")
        of_one_folder = before.rpartition("/")[0] == after.rpartition("/")[0] != ""
        if key in _IMAGES and of_one_folder and before != after:
            raise ConfigError(
                f"{key}: given as {hide_secrets(before.partition('=')[2])} and as"
                f" {hide_secrets(text)}; give it once, and a pattern of shards in quotes, which"
                f" keep the shell from taking it apart: '{key}=train-{{000..099}}.tar'"
            )


def _parse_override(override: str) -> dict[str, object]:
    """Turn `section.key=value` into nested mappings."""
    key, equals, text = override.partition("=")
    shown = hide_secrets(override)
    names = key.strip().split(".")
    if not equals or not all(name.isidentifier() for name in names):
        raise ConfigError(f"override {shown!r}: needs section.key=value, such as crops.num_local=6")
    if names == ["defaults"]:
        raise ConfigError(f"override {shown!r}: defaults can be given in a file only")
    if key != key.rstrip() or text.isspace():  # `key = value`
        text = text.strip()
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes of the command line
        raise ConfigError(
            f"{'.'.join(names)}: {hide_secrets(text)!a} is not UTF-8, and a configuration is UTF-8"
            " text; rename the file or folder, or make a link to it with such a name (ln -s)"
        )
    try:
        value = text if _is_typed(names, text) else read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"override {shown!r}: the value is not YAML ({error})") from error
    if isinstance(value, Mapping):
        raise ConfigError(f"override {shown!r}: the value is a mapping; give one override per key")
    for name in reversed(names):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def _change_phase(phases: object, override: str) -> None:
    """Give one of the phases read from a file the value of `phases.NAME.section.key=value`."""
    name, _, setting = override.removeprefix(_OF_A_PHASE).partition(".")
    found = [
        phase
        for phase in (phases if isinstance(phases, list) else [])
        if isinstance(phase, dict) and phase.get("name") == name
    ]
    if not found or not setting:
        raise ConfigError(
            f"override {hide_secrets(override)!r}: needs phases.NAME.section.key=value with the "
            "name of one of the phases"
        )
    change = found[0].get("change") or {}
    if not isinstance(change, dict):
        raise ConfigError(f"phases.{name}.change: needs a mapping of sections, got {show(change)}")
    changed = Layers(change)
    changed.put(_parse_override(setting), origin=_COMMAND_LINE)
    found[0]["change"] = changed.values


def text_override(key: str, text: str) -> str:
    """The override that gives a setting this text, whatever it looks like: 2026, a #1, null."""
    quoted = text.replace("'", "''")
    return f"{key}={text}" if _is_typed(key.split("."), text) else f"{key}='{quoted}'"


def _is_typed(names: Sequence[str], text: str) -> bool:
    """Whether a value is a text as typed, whatever it looks like: 2026, 1e5, true, a #1.

    A text in quotes is not, nor a list of sources, nor null where the field may be null. There, an
    empty value is a text: it may come from an unset variable of the shell and must not mean null.
    """
    section: type[BaseModel] | None = RunConfig
    for name in names[:-1]:
        section = sections(section).get(name) if section else None
    field = section.model_fields.get(names[-1]) if section else None
    may_be = kinds(field.annotation) if field else set()
    if not text:
        return NoneType in may_be
    if str not in may_be or _QUOTED.fullmatch(text):
        return False
    if NoneType in may_be and text.strip() in ("null", "~"):
        return False
    a_list = text.lstrip().startswith("[") and not _MORE_THAN_A_LIST.match(text)
    return not (tuple in may_be and a_list)


def _checked(merged: Layers) -> RunConfig:
    merged.require_sizes()
    try:
        config = RunConfig.model_validate(merged.values)
        phases_of(config)  # a mistake in the last phase must not wait for it
    except ValidationError as error:
        lines = []
        for key, sentence in sentences(error.errors()):
            origin = merged.origins.get(key, "")
            lines.append(f"{sentence} ({origin})" if origin else sentence)
        raise ConfigError("\n".join(lines)) from None
    return config


def phases_of(config: RunConfig) -> tuple[RunConfig, ...]:
    """The runs that a configuration stands for, in the order in which they are trained.

    A phase has the settings of the file with its own changes, its own folder in run_dir, and
    another seed than the one at whose end it begins, so that it sees the images in another order.

    Returns:
        One configuration for each phase, without phases; of a run without phases, itself.

    Raises:
        ConfigError: a phase has settings that a run cannot have, a network that is not that of the
            phase at whose end it begins, no such phase, or a teacher of no earlier one.
    """
    if not config.phases:
        return (config,)
    found: dict[str, RunConfig] = {}
    for number, phase in enumerate(config.phases):
        run = _run_of(config, number, phase, before=_before(phase, found))
        _require_earlier_teacher(phase.name, run, [*found.values()])
        found[phase.name] = run
    runs = [*found.values()]
    return tuple(_keeping(run, runs[number:]) for number, run in enumerate(runs, start=1))


def _keeping(run: RunConfig, later: Sequence[RunConfig]) -> RunConfig:
    """A run that keeps the checkpoints from which later ones take their teachers."""
    named = [teacher for other in later for teacher in named_teachers(other)]
    steps = {step for teacher in named if (step := teacher.step_in(run.run_dir))}
    if not steps:
        return run
    kept = sorted(steps.union(run.checkpoint.keep_steps))
    checkpoint = run.checkpoint.model_copy(update={"keep_steps": tuple(kept)})
    return run.model_copy(update={"checkpoint": checkpoint})


def _before(phase: PhaseConfig, earlier: Mapping[str, RunConfig]) -> RunConfig | None:
    """The run at whose end a phase begins."""
    if phase.after is None:
        return [*earlier.values()][-1] if earlier else None
    if phase.after not in earlier:
        known = f"earlier ones are {', '.join(earlier)}" if earlier else "it is the first phase"
        raise ConfigError(f"phases.{phase.name}.after: no earlier phase {phase.after!r}; {known}")
    return earlier[phase.after]


def phase_named(config: RunConfig, name: str) -> RunConfig:
    """The run that a phase stands for.

    Raises:
        ConfigError: there is no such phase.
    """
    names = [phase.name for phase in config.phases]
    if name not in names:
        known = f"phases are {', '.join(names)}" if names else "the run has no phases"
        raise ConfigError(f"phase: {name!r} is not one; {known}")
    return phases_of(config)[names.index(name)]


def _run_of(
    config: RunConfig, number: int, phase: PhaseConfig, *, before: RunConfig | None
) -> RunConfig:
    _refuse_beginnings(phase, later=before is not None)
    of_place: dict[str, object] = {
        "run_dir": str(Path(config.run_dir) / PHASES / f"{number + 1:02d}_{phase.name}"),
        "seed": config.seed if before is None else (before.seed + 1) % 2**32,
    }
    merged = Layers()
    for values in (
        config.model_dump(exclude={"phases", "phase"}),
        of_place,
        with_run_dir(phase.change, config.run_dir),
        _beginning(phase, before),
    ):
        merged.put(values, origin="")
    try:
        merged.require_sizes()
        run = RunConfig.model_validate(merged.values)
    except ConfigError as error:
        raise ConfigError(f"phases.{phase.name}.{error}") from None
    except ValidationError as error:
        lines = [f"phases.{phase.name}.{text}" for _, text in sentences(error.errors())]
        raise ConfigError("\n".join(lines)) from None
    if before is not None:
        require_same_network(phase.name, before, run)
        _require_gram_network(phase, before, run)
    return run


def _refuse_beginnings(phase: PhaseConfig, *, later: bool) -> None:
    """Refuse what a phase cannot choose: where it is written, and where it begins."""
    train = phase.change.get("train")
    given = {f"train.{key}" for key in train} if isinstance(train, dict) else set()
    given |= phase.change.keys()
    refused = ["run_dir", "phases", "phase"]
    if later:
        refused += ["train.init_from", "train.init_head", "train.continue_from"]
    for key in refused:
        if key in given:
            remedy = "begins where the one before ended" if "train." in key else "has its own"
            raise ConfigError(f"phases.{phase.name}.{key}: a phase {remedy}; leave it out")


def _beginning(phase: PhaseConfig, before: RunConfig | None) -> dict[str, dict[str, object]]:
    if before is None:
        return {}
    everything = phase.start == "everything"
    return {
        "train": {
            "continue_from": before.run_dir if everything else None,
            "init_from": None if everything else before.run_dir,
            "init_head": not everything,
        }
    }


def _require_gram_network(phase: PhaseConfig, before: RunConfig, run: RunConfig) -> None:
    """Refuse a Gram loss that would take over the Gram network of a phase that has none."""
    if not run.gram.loss_weight or run.gram.steps_without is not None or before.gram.loss_weight:
        return
    raise ConfigError(
        f"phases.{phase.name}.gram.teacher: the phase before has no Gram network to go on with "
        "(gram.loss_weight=0); give weights, or let the EMA teacher be taken over with "
        "gram.refresh_every_steps"
    )


def _require_earlier_teacher(name: str, run: RunConfig, earlier: Sequence[RunConfig]) -> None:
    """Refuse a teacher in the folder of a phase that does not come before this one."""
    for teacher in named_teachers(run):
        if not teacher.lies_in(Path(run.run_dir).parent):
            continue
        if not any(teacher.lies_in(other.run_dir) for other in earlier):
            known = ", ".join(Path(other.run_dir).name for other in earlier) or "none"
            raise ConfigError(
                f"phases.{name}.{teacher.key}: {teacher.path} is not in the folder of an earlier "
                f"phase of this run ({known}); give one of these, or other weights"
            )
