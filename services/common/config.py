"""Builds a process's configuration from flags, the environment and a YAML file.

A configuration is a frozen dataclass; each field is one setting. `max_running` is the flag
`--max-running`, the variable `OCTAVO_MAX_RUNNING` and the key `max_running` (or `max-running`) of
the file given by `--config`. Flags win over the environment, that over the file, that over the
field's default. Types: str, int, float, bool, Path, tuple[str, ...], and each of them `| None`.

Metadata of a field: `help`; `choices`; `positional` (a bare argument instead of a flag); `group`
(heading in the help); `metavar`; `also` (further names of the flag, a tuple); `was` (an old name of the
field, which goes on working everywhere); `hidden` (not in the help); `internal` (no setting at all: the
program sets it); `verbatim` (the items of a tuple are not split at commas); `kind`, which is "bytes"
(512MiB, 2GB, 4096) or "duration" (30s, 250ms, 5m; the
field holds seconds, or milliseconds if its name ends with `_ms`). Fields whose name ends with `_s`,
`_ms` or `_bytes`, or whose `unit` is "s", "ms" or "bytes", are of that kind anyway.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import ipaddress
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_BYTE_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_DURATION_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
# What the cluster sets for each of its services, whatever they are called.
_OF_KUBERNETES = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_(TCP|UDP)(_\w+)?)?)$")
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class ConfigError(ValueError):
    """A setting is wrong. The message is one line that says which one and what to change."""


def load(
    cls: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    env_prefix: str = "OCTAVO_",
    environ: Mapping[str, str] | None = None,
    description: str = "",
) -> T:
    """Return the `cls` that `argv` and `environ` (default: os.environ) describe.

    A wrong setting prints one line to stderr and exits with status 2; `--help` prints and exits with 0.
    """
    try:
        return parse(cls, argv, prog=prog, env_prefix=env_prefix, environ=environ, description=description)
    except ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(
    cls: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    env_prefix: str = "OCTAVO_",
    environ: Mapping[str, str] | None = None,
    description: str = "",
) -> T:
    """Do what `load` does, but raise ConfigError for a wrong setting."""
    return parse_with(cls, (), argv, prog=prog, env_prefix=env_prefix, environ=environ, description=description)[0]


def parse_with(
    cls: type[T],
    others: Sequence[Setting],
    argv: Sequence[str],
    *,
    prog: str,
    env_prefix: str = "OCTAVO_",
    environ: Mapping[str, str] | None = None,
    description: str = "",
) -> tuple[T, dict[str, object]]:
    """Do what `parse` does, and return the values that flags and file give to `others`, by name.

    Those are settings of processes that this one starts. The help is silent about them. They inherit the environment,
    so that what it sets is left to them.
    """
    own = settings_of(cls)
    settings = [*own, *others]
    environ = os.environ if environ is None else environ
    given = vars(_parser(own, prog, env_prefix, description, others).parse_args(list(argv)))
    path = given.pop("config", None)
    values = {} if path is None else _read_file(Path(path), settings)
    passed: dict[str, object] = {}
    for setting in others:
        value = values.pop(setting.name, None)
        if given.get(setting.name) is not None:
            passed[setting.name] = setting.read(given[setting.name], setting.title)
        elif value is not None and not _variable(setting, environ, env_prefix):
            passed[setting.name] = value
    for setting in own:
        if name := _variable(setting, environ, env_prefix):
            values[setting.name] = setting.read(environ[name], name)
        if given.get(setting.name) is not None:
            values[setting.name] = setting.read(given[setting.name], setting.title)
        if setting.required and setting.name not in values:
            raise ConfigError(f"{setting.title} is missing: {setting.help}")
    try:
        return cls(**values), passed
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _variable(setting: Setting, environ: Mapping[str, str], env_prefix: str) -> str:
    """Return the variable that sets a setting, its new name first; empty if there is none."""
    return next((name for each in setting.names if environ.get(name := env_prefix + each.upper())), "")


def unknown_variables(known: Collection[str], environ: Mapping[str, str], env_prefix: str = "OCTAVO_") -> list[str]:
    """Return a line for each variable that looks like a setting and is none of `known`, which are names of settings."""
    lines = []
    for variable in sorted(environ):
        name = variable.removeprefix(env_prefix).lower()
        if variable.startswith(env_prefix) and name not in known and not _OF_KUBERNETES.search(variable):
            hint = _did_you_mean(name, list(known), lambda near: env_prefix + near.upper())
            lines.append(f"{variable} in the environment is no setting{hint}")
    return lines


def flags(values: Mapping[str, object]) -> list[str]:
    """Return the command line that sets these fields, by field name; None and () are left out."""
    line = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            line.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            line += [f"{flag}={item}" for item in value]
        elif value is not None:
            line.append(f"{flag}={value}")
    return line


def parse_bytes(text: str) -> int:
    """Return a size in bytes: "4096", "512MiB", "2GB", "1.5 Gi". Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if match is None:
        raise ValueError("must be a size such as 512MiB or 2GB")
    return int(float(match[1]) * _BYTE_UNITS[match[2] or ""]) if match[2] or "." in match[1] else int(match[1])


def parse_duration(text: str) -> float:
    """Return a time in seconds: "30s", "250ms", "1.5h". Raises ValueError, also without a unit."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s|m|h)", text.strip().lower())
    if match is None:
        raise ValueError("must be a time such as 30s, 250ms or 5m")
    return float(match[1]) * _DURATION_UNITS[match[2]]


def format_bytes(size: int) -> str:
    """Return a size for people, such as "512 MiB" or "98.4 MB"; what `parse_bytes` reads, near enough."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size % factor == 0 and 0 < size // factor < 1024:
            return f"{size // factor} {unit}"
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a configuration, and how its text becomes a value."""

    name: str
    type: type  # str, int, float, bool, Path or tuple
    kind: str  # "", "bytes", "s" or "ms"
    default: object  # dataclasses.MISSING if there is none
    optional: bool
    choices: tuple[str, ...]
    metadata: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, and the old one if it has one."""
        was = self.metadata.get("was")
        return (self.name, str(was)) if was else (self.name,)

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING

    @property
    def positional(self) -> bool:
        """Whether it is a bare argument instead of a flag."""
        return bool(self.metadata.get("positional"))

    @property
    def title(self) -> str:
        """How it is called on a command line."""
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")

    @property
    def help(self) -> str:
        """What it is, for people."""
        text = str(self.metadata.get("help", self.name.replace("_", " ")))
        return text + "".join(f"; its old name {old} works as well" for old in self.names[1:])

    def read(self, value: object, source: str) -> object:
        """Return the value that `value`, from a flag, variable or file, stands for; ConfigError names `source`."""
        try:
            if self.type is tuple:
                return _strings(value, split=not self.metadata.get("verbatim"))
            if value is None and self.optional:
                return None
            if value is None or isinstance(value, (list, dict)):
                raise ValueError("must be a single value")
            return self._scalar(str(value))
        except ValueError as error:
            raise ConfigError(f"{source}: {error}, not {value!r}") from None

    def _scalar(self, text: str) -> object:
        if self.choices and text not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}")
        if self.kind:
            return self._quantity(text)
        return _READERS[self.type](text)

    def _quantity(self, text: str) -> int | float:
        """Read a size or time; a bare number is in the field's own unit."""
        bare = re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", text.strip())
        if bare:
            return _number(text) if self.type is float else _integer(text)
        if self.kind == "bytes":
            return parse_bytes(text)
        amount = parse_duration(text) * (1000 if self.kind == "ms" else 1)
        if self.type is float:
            return amount
        if amount != round(amount, 6) or round(amount) != round(amount, 6):
            raise ValueError(f"must be a whole number of {self.kind}")
        return round(amount)

    def default_text(self) -> str:
        """Return how the help shows the default; empty if there is nothing to show."""
        value = self.default
        if value is None or value in ("", ()) or value is dataclasses.MISSING:
            return ""
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, tuple):
            return ",".join(str(item) for item in value)
        if self.kind == "bytes" and isinstance(value, int):
            return format_bytes(value) if value else "0"
        text = f"{value:g}" if isinstance(value, float) else str(value)
        return f"{text} {self.kind}" if self.kind else text

    @property
    def metavar(self) -> str:
        """What stands for its value in the help."""
        if "metavar" in self.metadata or self.positional:
            return str(self.metadata.get("metavar", self.name.upper()))
        if self.kind:
            return "SIZE" if self.kind == "bytes" else "TIME"
        if self.type in (int, float):
            return "N" if self.type is int else "X"
        last = self.name.rsplit("_", 1)[-1]
        return {"address": "ADDRESS", "endpoint": "ENDPOINT", "name": "NAME", "id": "ID"}.get(
            last, "PATH" if last in ("path", "dir", "file", "model") or self.type is Path else "VALUE"
        )


def settings_of(cls: type[Any]) -> list[Setting]:
    """Return the settings that a configuration class has, in order."""
    assert dataclasses.is_dataclass(cls), f"{cls} is not a dataclass"
    hints = typing.get_type_hints(cls)
    fields = (field for field in dataclasses.fields(cls) if field.init and not field.metadata.get("internal"))
    return [_setting(field, hints[field.name]) for field in fields]


def _setting(field: dataclasses.Field[Any], hint: Any) -> Setting:
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        assert len(members) == 1, f"{field.name}: unions other than `| None` are not supported"
        hint, optional = members[0], True
    choices = tuple(str(choice) for choice in field.metadata.get("choices", ()))
    if typing.get_origin(hint) is typing.Literal:
        choices, hint = tuple(str(choice) for choice in typing.get_args(hint)), str
    base = typing.get_origin(hint) or hint
    assert base in (*_READERS, tuple), f"{field.name}: settings of type {hint} are not supported"
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return Setting(
        field.name, base, _kind(field, base), default, optional, choices, types.MappingProxyType(dict(field.metadata))
    )


def _kind(field: dataclasses.Field[Any], base: type) -> str:
    if base not in (int, float):
        return ""
    unit = str(field.metadata.get("unit", ""))
    last = field.name.rsplit("_", 1)[-1] if not field.name.endswith("_per_s") else ""
    if "bytes" in (unit, last, field.metadata.get("kind")):
        return "bytes"
    if "ms" in (unit, last):
        return "ms"
    return "s" if unit in ("s", "seconds") or last == "s" or field.metadata.get("kind") == "duration" else ""


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("must be a number")
    return value


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError("must be true or false")
    return _BOOLEANS[text.lower()]


def _path(text: str) -> Path:
    if not text:
        raise ValueError("must be a path")
    return Path(text).expanduser()


def _strings(value: object, split: bool) -> tuple[str, ...]:
    """Return the items of a list or a single one, each split at commas if `split`."""
    items = value if isinstance(value, list) else [value]
    if any(item is None or isinstance(item, (list, dict)) for item in items):
        raise ValueError("must be a list of strings")
    if not split:
        return tuple(str(item) for item in items)
    return tuple(part.strip() for item in items for part in str(item).split(",") if part.strip())


_READERS: dict[type, Callable[[str], object]] = {str: str, int: _integer, float: _number, bool: _boolean, Path: _path}


def _read_file(path: Path, settings: list[Setting]) -> dict[str, object]:
    """Return the values in a YAML file, by field name."""
    import yaml  # every process starts sooner without

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} must hold a mapping of settings, such as `log_level: info`")
    by_name = {name: setting for setting in settings for name in setting.names}
    values: dict[str, object] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in by_name:
            raise ConfigError(f"{path}: unknown setting {str(key)!r}{_did_you_mean(name, list(by_name))}")
        setting = by_name[name]
        if setting.name in values:
            raise ConfigError(f"{path}: {setting.name} is set twice")
        values[setting.name] = setting.read(value, f"{path}: {key}")
    return values


def _did_you_mean(word: str, known: Sequence[str], form: Callable[[str], str] = str) -> str:
    near = [form(each) for each in difflib.get_close_matches(word, known, n=2, cutoff=0.6)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError, and knows what was meant."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument ").replace("expected one argument", "needs a value"))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        values, rest = self.parse_known_args(args, namespace)
        if rest:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            word = rest[0].split("=")[0]
            what = "unknown option" if word.startswith("-") else "unexpected argument"
            raise ConfigError(f"{what} {word}{_did_you_mean(word, known)}")
        return values


def _parser(
    settings: list[Setting], prog: str, env_prefix: str, description: str, others: Sequence[Setting]
) -> _Parser:
    positional = [setting for setting in settings if setting.positional]
    usage = " ".join([prog, "[options]", *(s.metavar if s.required else f"[{s.metavar}]" for s in positional)])
    parser = _Parser(
        prog=prog,
        usage=usage,
        description=description,
        allow_abbrev=False,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
        epilog=f"An option can also be given in the environment ({env_prefix} and its name, for example "
        f"{env_prefix}LOG_LEVEL) or in the file that --config names; flags win, then the environment.",
    )
    groups: dict[str, Any] = {}
    for setting in [*positional, *(s for s in settings if not s.positional)]:
        title = "arguments" if setting.positional else str(setting.metadata.get("group", "options"))
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], setting)
    for setting in others:
        _add(parser, setting, is_hidden=True)
    general = parser.add_argument_group("general")
    general.add_argument("--config", metavar="FILE", help="a YAML file with these options as keys")
    general.add_argument("-h", "--help", action="help", help="show this help")
    return parser


def _add(group: Any, setting: Setting, is_hidden: bool = False) -> None:
    default = setting.default_text()
    text = (setting.help + (f" (default: {default})" if default else "")).replace("%", "%%")
    if setting.choices:
        text = f"{text.rstrip(')')}; " if default else f"{text} ("
        text += f"one of {', '.join(setting.choices)})"
    is_hidden = is_hidden or bool(setting.metadata.get("hidden"))
    options: dict[str, Any] = {"help": argparse.SUPPRESS if is_hidden else text, "default": None}
    if setting.positional:
        group.add_argument(setting.name, nargs="?", metavar=setting.metavar, **options)
    elif setting.type is bool:
        group.add_argument(setting.title, dest=setting.name, action=argparse.BooleanOptionalAction, **options)
    else:
        action = "append" if setting.type is tuple else "store"
        old = ("--" + name.replace("_", "-") for name in setting.names[1:])
        names = (setting.title, *setting.metadata.get("also", ()), *old)
        group.add_argument(*names, dest=setting.name, action=action, metavar=setting.metavar, **options)


def is_exposed_address(address: str) -> bool:
    """Return whether a server's address, host:port or unix:PATH, can be reached from other machines."""
    if not address or address.startswith("unix:"):
        return False
    host = address.rpartition(":")[0].strip("[]")
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"  # a name, an interface or *
