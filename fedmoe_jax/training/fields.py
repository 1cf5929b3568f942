"""Dataclass fields from and to the outside world: TOML files, command-line flags, and errors of one line that name the field."""

import contextlib
import dataclasses
import difflib
import io
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

_LONGEST = 500  # letters of a mistake that are shown


class UsageError(ValueError):
    """A mistake on the command line: one line that names the field."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error that proposes the known name nearest to `name`; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def hints(cls: type) -> dict[str, Any]:
    """The plain type of each field of a dataclass, in order."""
    resolved = typing.get_type_hints(cls)
    return {field.name: resolved[field.name] for field in dataclasses.fields(cls)}


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, without guessing: only whole numbers become floats and lists become tuples.

    Raises:
      ValueError: "expected ..., got ...".
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if value is None else convert(value, options[0])
    origin = typing.get_origin(hint) or hint
    if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _float(value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(convert(item, typing.get_args(hint)[0]) for item in value)
    if origin is dict and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    if origin in (int, str, bool) and type(value) is origin:
        return value
    expected = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list", dict: "a table"}
    raise ValueError(f"expected {expected.get(origin, str(origin))}, got {shown(value)}")


def _float(value):
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"expected a number, got {shown(value)}, which is too large") from None


def shown(value: Any) -> str:
    """A value as errors show it, not too long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits or nesting than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST // 2 else f"{text[: _LONGEST // 2]}..."


def from_toml(path: str | Path, cls: type) -> dict[str, Any]:
    """The fields of dataclass `cls` that a TOML file sets.

    Raises:
      ValueError: in one line with the file, and the field where there is one: not readable, not TOML, an unknown field, a wrong type.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:  # not TOML or UTF-8, a number or nesting beyond what Python reads
        raise ValueError(f"{path}: not a TOML file ({' '.join(str(error).split())})") from None
    known = hints(cls)
    values = {}
    for name, value in table.items():
        if name not in known:
            raise ValueError(f"{path}: {name}: unknown field{nearest(name, known)}")
        try:
            values[name] = convert(value, known[name])
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return values


def to_toml(config: Any) -> str:
    """A dataclass as TOML that `from_toml` reads back: fields in order, tables last, None left out."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    lines = [f"{name} = {_toml_value(value)}" for name, value in values.items() if value is not None and not isinstance(value, Mapping)]
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += ["", f"[{name}]", *(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None)]
    return "\n".join(lines) + "\n"


def _toml_key(key):
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None) + "}"
    raise ValueError(f"{value!r} cannot be written to TOML: expected a text, number, truth value, list or table")


def _literal(text):
    """A flag's value as TOML would read it; anything else is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _read_options(words):
    pairs = [word.partition("=") for word in words]
    wrong = next((name for name, equals, _ in pairs if not (name and equals)), None)
    if wrong is not None:
        raise ValueError(f"expected NAME=VALUE, got {wrong!r}")
    return {name: _literal(text) for name, _, text in pairs}


Options = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=_read_options,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={_toml_value(item)}" for name, item in value.items()],
    ),
]
"""A table of free options: `--field NAME=VALUE ...`, or `--field.NAME VALUE`, over what the file says."""


def parse(
    cls: type,
    argv: Sequence[str],
    prog: str,
    *,
    default: Any = None,
    options: type | None = None,
    read: Callable[[str, type], dict[str, Any]] = from_toml,
    check: Callable[[Any], None] = lambda config: None,
    description: str | None = None,
) -> tuple[Any, Any]:
    """Reads `[CONFIG.toml] [--field value ...]`; `--help` prints the fields and raises SystemExit(0).

    Args:
      cls: dataclass whose fields the file and the flags set; each needs a default.
      argv: the words after the command; hyphens and underscores in flags are the same.
      prog: the command, for the help.
      default: an instance of `cls` to start from; `cls()` if None.
      options: dataclass of flags that are not part of the configuration (such as --out) and that no file may set; each needs a default.
        Both dataclasses are frozen, and share no field.
      read: `read(path, cls)` gives the fields that a file sets.
      check: raises ValueError "field: ..." for values that cannot be.
      description: first paragraph of the help.

    Returns:
      The configuration, and an instance of `options` (None without it).

    Raises:
      UsageError: for any mistake, in one line that names the field.
    """
    default = cls() if default is None else default
    flags = hints(cls) | (hints(options) if options else {})
    try:
        path, words = _take_file(list(argv), flags)
        words, dotted = _take_dotted(words, flags)
        if path is not None:
            default = dataclasses.replace(default, **read(path, cls))
        config, chosen = _read_flags(cls, options, words, prog, default, description or cls.__doc__)
        tables = {
            name: getattr(default, name) | getattr(config, name) | dotted.get(name, {}) for name in hints(cls) if _is_table(name, flags)
        }
        config = dataclasses.replace(config, **tables)
        check(config)
    except ValueError as error:
        line = " ".join(str(error).split())
        raise UsageError(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}...") from None
    return config, chosen


def _is_table(name, flags):
    return typing.get_origin(flags[name]) is dict


def _name(word):
    return word[2:].partition("=")[0].replace("-", "_")


def _take_file(words, flags):
    """Separates the one word that is the configuration file from the flags and their values."""
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        is_value = before.startswith("--") and "=" not in before and flags.get(_name(before)) is not bool
        if not word.startswith("-") and (place == 0 or (word.endswith(".toml") and not is_value)):
            return word, words[:place] + words[place + 1 :]
    return None, words


def _take_dotted(words, flags):
    """Checks the names of all flags, and separates `--table.NAME VALUE` from the others."""
    rest: list[str] = []
    dotted: dict[str, dict[str, Any]] = {}
    stream = iter(words)
    for word in stream:
        name, _, entry = _name(word).partition(".")
        if not word.startswith("--") or word == "--help":
            rest.append(word)
        elif name not in flags:
            raise UsageError(f"{name}: unknown field{nearest(name, flags)}")
        elif not entry:
            rest.append(word)
        elif not _is_table(name, flags):
            raise UsageError(f"{name}: has no option {entry!r}")
        else:
            text = word.partition("=")[2] if "=" in word else next(stream, None)
            if text is None:
                raise UsageError(f"{name}.{entry}: expected a value")
            dotted.setdefault(name, {})[word[2:].partition("=")[0].partition(".")[2]] = _literal(text)
    return rest, dotted


def _read_flags(cls, options, words, prog, default, description):
    bases = (cls,) if options is None else (options, cls)
    arguments = dataclasses.dataclass(frozen=True)(type("Arguments", bases, {"__doc__": description}))
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            given = tyro.cli(
                arguments,
                prog=prog,
                args=words,
                default=arguments(**{name: getattr(default, name) for name in hints(cls)}),
                description=description,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as error:
        if not error.code:
            raise
        raise UsageError(_one_line(captured.getvalue())) from None
    return tuple(part and part(**{name: getattr(given, name) for name in hints(part)}) for part in (cls, options))


_REWRITES = [
    (r"Error parsing --([\w.-]+): could not convert string to float: (.*)", r"\1: expected a number, got \2"),
    (r"Error parsing --([\w.-]+): invalid literal for int\(\) with base 10: (.*)", r"\1: expected a whole number, got \2"),
    (r"Error parsing --([\w.-]+): no type matching \{None\}\|FLOAT .* \['(.*)'\]\.", r"\1: expected a number or None, got '\2'"),
    (r"Error parsing --([\w.-]+): no type matching \{None\}\|INT .* \['(.*)'\]\.", r"\1: expected a whole number or None, got '\2'"),
    (r"Error parsing --([\w.-]+): (.*)", r"\1: \2"),
    (r"Missing value for argument '--([\w.-]+)'.*", r"\1: expected a value"),
    (r"invalid choice (.*) for argument '--([\w.-]+)'\. Expected one of \((.*?),?\)\.", r"\2: \1 is none of \3"),
    (r"Unrecognized options: (.*)", r"\1: neither a flag nor the value of one"),
]


def _one_line(box):
    """The message inside the box that tyro prints for a mistake, with the field first.

    The first line is the title; the message ends at an empty line or a rule. Without box characters in the terminal's
    encoding there is no frame, and a rule follows the title.
    """
    inner = [line.strip().strip("\u2502").strip() for line in box.splitlines()[1:]]
    is_end = [not re.search(r"[^\u2500-\u257f-]", line) for line in inner]
    start = is_end.index(False) if False in is_end else len(inner)
    end = is_end.index(True, start) if True in is_end[start:] else len(inner)
    message = " ".join(" ".join(inner[start:end]).split())
    for pattern, replacement in _REWRITES:
        message, count = re.subn("^" + pattern + "$", replacement, message)
        if count:
            break
    name, colon, rest = message.partition(":")
    return name.replace("-", "_") + colon + rest if re.fullmatch(r"[\w.-]*\w", name) else message or "the command line could not be read"
