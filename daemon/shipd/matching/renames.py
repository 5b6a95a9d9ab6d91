"""Names that the user maps: rules, and mapping files with single names.

A rule is ``regex=replacement`` in Python's syntax of regular expressions; it replaces every place where it matches in a
name, and rules are applied one after the other, each to what those before it made. A mapping file names tensors one by
one, as a JSON object or a TOML table of "name in the checkpoint" = "name in the model"; which of both is seen by its
content. What it names no rule changes.
"""

import json
import os
import re
import shlex
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shipd.errors import MappingError
from shipproto.limits import MAX_NAME, MAX_TENSORS
from shipproto.names import CONTROL, harmless

MAX_FILE: Final = 64 * 1024 * 1024
"""Bytes of a mapping file: the names of MAX_TENSORS tensors on both sides, of ordinary length."""

MAX_RULE: Final = 1024
"""Characters of a rule: twice the longest name."""

_RULES_SECONDS: Final = 10.0
"""For all rules on all names. An ordinary rule takes 0.3 s for 100,000 of them."""

_SHOWN: Final = 120


@dataclass(frozen=True, slots=True)
class Rule:
    """Every match of ``pattern`` in a name becomes ``replacement``, which may refer to groups. See ``parse_rename``."""

    pattern: str
    replacement: str

    def __str__(self) -> str:
        return f"{self.pattern}={self.replacement}"

    @property
    def option(self) -> str:
        """What says so on a command line."""
        return f"--map {shlex.quote(str(self))}"


@dataclass(frozen=True, slots=True)
class Table:
    """Single names: those of ``entries`` in the checkpoint, with those that they have in the model. ``origin`` is the
    file that says so. See ``load_renames``.
    """

    origin: str
    entries: tuple[tuple[str, str], ...]


Rename = Rule | Table


@dataclass(slots=True)
class Renamed:
    """Names after the rules.

    names    one for each tensor
    touched  rows whose names a rule or an entry has said
    counts   how many tensors each rule matched, each table named
    absent   entries whose tensor the checkpoint does not have, with their table
    """

    names: list[str]
    touched: set[int] = field(default_factory=set)
    counts: list[int] = field(default_factory=list)
    absent: list[tuple[Table, str]] = field(default_factory=list)


def apply_renames(names: Sequence[str], renames: Sequence[Rename]) -> Renamed:
    """What ``names`` are called after all ``renames``: first the tables, then the rules on what no table has named.

    Raises MappingError where a rule takes for ever.
    """
    result = Renamed(list(names), counts=[0] * len(renames))
    tables = [(at, rename) for at, rename in enumerate(renames) if isinstance(rename, Table)]
    index = dict(zip(names, range(len(names)), strict=True)) if tables else {}
    for at, table in tables:
        for name, target in table.entries:
            row = index.get(name)
            if row is None:
                result.absent.append((table, name))
            else:
                result.names[row] = target
                result.touched.add(row)
                result.counts[at] += 1
    rest = [row for row in range(len(names)) if row not in result.touched]
    deadline = time.monotonic() + _RULES_SECONDS
    for at, rule in enumerate(renames):
        if isinstance(rule, Rule):
            rows = _replace(result.names, rest, rule, deadline)
            result.touched.update(rows)
            result.counts[at] = len(rows)
    return result


def _replace(names: list[str], rows: list[int], rule: Rule, deadline: float) -> list[int]:
    # Reads what re reads, and can be given a time: re would hold the interpreter for as long as it takes.
    import regex

    substitute, replacement = regex.compile(rule.pattern).subn, rule.replacement
    matched = []
    for row in rows:
        left = max(0.001, deadline - time.monotonic())
        try:
            # Concurrent: other threads run meanwhile, so that this can be interrupted.
            names[row], times = substitute(replacement, names[row], timeout=left, concurrent=True)
        except TimeoutError as error:
            raise MappingError(
                f"the rule {_quoted(str(rule))} has not come to an end on the name {_quoted(names[row])} in "
                f"{_RULES_SECONDS:g} s: a repetition of what can match one text in several ways, such as (a|aa)+, "
                "tries all of them. Say what belongs between the repeated parts, such as the dot in (\\w+\\.)+"
            ) from error
        if times:
            matched.append(row)
    return matched


def parse_rename(text: str) -> Rename:
    """The rule that ``regex=replacement`` says; the last = parts the two, so the replacement has none.

    Raises MappingError.
    """
    shown = _quoted(text)
    if len(text) > MAX_RULE:
        raise MappingError(f"the rule {shown} has {len(text)} characters; at most {MAX_RULE} are read")
    pattern, equals, replacement = text.rpartition("=")
    if not equals or not pattern:
        raise MappingError(
            f"the rule {shown} is not of the form regex=replacement. For example, --map '^model\\.=' takes model. off "
            r"the beginning of names, and --map '\.gamma$=.weight' renames the last part of them"
        )
    import regex

    try:
        compiled = re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise MappingError(
            f"the rule {shown} has a bad regular expression: {_reason(error, pattern)}. "
            r"A literal ( [ * or . is written \( \[ \* \."
        ) from error
    try:
        compiled.sub(replacement, "")
    except (re.error, IndexError) as error:
        groups = f"the expression has {compiled.groups} group{'' if compiled.groups == 1 else 's'}"
        raise MappingError(
            f"the rule {shown} has a bad replacement: {_reason(error, replacement)}. It may refer to groups as \\1 or "
            f"\\g<name> ({groups}), and a literal \\ is written \\\\"
        ) from error
    return Rule(pattern, replacement)


def _reason(error: Exception, text: str) -> str:
    place = getattr(error, "pos", None)
    reason = getattr(error, "msg", None) or str(error) or type(error).__name__
    return f"{reason} at {_quoted(text[place : place + 20])}" if place is not None and place < len(text) else reason


def table_of(entries: Mapping[Any, Any], origin: str) -> Table:
    """The single names of ``entries``, which are the user's own. Raises MappingError, naming ``origin``."""
    for name, target in entries.items():
        if not isinstance(name, str) or not isinstance(target, str):
            raise MappingError(
                f"{origin} maps {_quoted(str(name))} to {_quoted(str(target))}: it maps names in the checkpoint to "
                "names in the model, and both are texts"
            )
        _check_entry(name, target, origin, "a mapping")
    return Table(origin, tuple(entries.items()))


def load_renames(path: str | os.PathLike[str]) -> Rename:
    """The mapping file at ``path``. Raises MappingError where it cannot be read, is neither JSON nor TOML, or says what
    cannot be.
    """
    shown = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MappingError(f"the mapping file {_quoted(shown)} cannot be read: {reason}") from error
    return parse_table(content, shown)


def parse_table(content: bytes, origin: str) -> Table:
    """What a mapping file says. Raises MappingError, naming ``origin`` as the file."""
    file = f"the mapping file {_quoted(origin)}"
    if len(content) > MAX_FILE:
        raise MappingError(f"{file} has more than {MAX_FILE} bytes: a few rules, --map 'regex=replacement', say more")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MappingError(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    if text.lstrip()[:1] in ("{", "["):
        fields, kind = _read_json(text, file), "a JSON object"
    else:
        fields, kind = _read_toml(text, file), "a TOML table"
    if not fields:
        raise MappingError(f"{file} maps no names. {_FORM.format(kind=kind)}")
    if len(fields) > MAX_TENSORS:
        raise MappingError(f"{file} maps {len(fields)} names; at most {MAX_TENSORS} are read")
    for name, target in fields.items():
        _check_entry(name, target, file, kind)
    return Table(origin, tuple(fields.items()))


_FORM: Final = 'It must be {kind} of texts: "name in the checkpoint" and "name in the model"'


def _read_json(text: str, file: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise MappingError(
            f"{file} begins as JSON and is not: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise MappingError(f"{file} nests too deeply. {_FORM.format(kind='a JSON object')}") from error
    except ValueError as error:
        raise MappingError(f"{file} is not what it should be: {error}") from error
    if not isinstance(fields, dict):
        raise MappingError(f"{file} holds a JSON array. {_FORM.format(kind='a JSON object')}")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, target in pairs:
        if name in fields:
            raise ValueError(f"it maps {_quoted(name)} twice")
        fields[name] = target
    return fields


def _read_toml(text: str, file: str) -> Mapping[str, Any]:
    try:
        return _flat(tomllib.loads(text), "")
    except tomllib.TOMLDecodeError as error:
        # Where it is, tomllib says in what it says.
        raise MappingError(f"{file} is neither a JSON object nor TOML: {error}") from error
    except RecursionError as error:
        raise MappingError(f"{file} nests too deeply. {_FORM.format(kind='a TOML table')}") from error


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """To TOML a dot in a key without quotes makes a table, and names are full of them."""
    fields: dict[str, Any] = {}
    for key, value in table.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        if both := fields.keys() & inner.keys():
            raise tomllib.TOMLDecodeError(f"it maps {_quoted(min(both))} twice")
        fields |= inner
    return fields


def _check_entry(name: str, target: object, file: str, kind: str) -> None:
    if not isinstance(target, str):
        raise MappingError(f"{file} maps {_quoted(name)} to what is no text. {_FORM.format(kind=kind)}")
    for text in (name, target):
        if not 0 < len(text) <= MAX_NAME or CONTROL.search(text):
            raise MappingError(
                f"{file} has {_quoted(text)} where a tensor's name belongs: 1 to {MAX_NAME} characters, and no control "
                "characters among them"
            )


def _quoted(text: str) -> str:
    """``text`` as it was typed, but for control characters, cut short where it is long."""
    return f"'{harmless(text, _SHOWN)}'" + ("…" if len(text) > _SHOWN else "")
