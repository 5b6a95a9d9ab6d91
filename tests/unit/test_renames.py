"""Rules and mapping files: what they do to names, and what is said of those that are none."""

from pathlib import Path

import pytest

from shipd.errors import MappingError, ShipError
from shipd.matching import renames
from shipd.matching.renames import Rule, Table, apply_renames, load_renames, parse_rename, parse_table

# --- rules -----------------------------------------------------------------------------------------------------------


def test_the_last_equals_sign_parts_a_rule() -> None:
    assert parse_rename("^model\\.=") == Rule("^model\\.", "")
    assert parse_rename("(?<=a)b=c") == Rule("(?<=a)b", "c")
    assert str(parse_rename("a=b")) == "a=b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "weight",
            (
                "the rule 'weight' is not of the form regex=replacement. For example, --map '^model\\.=' takes model. "
                "off the beginning of names, and --map '\\.gamma$=.weight' renames the last part of them"
            ),
        ),
        ("=x", "the rule '=x' is not of the form regex=replacement. For example, --map"),
        ("", "the rule '' is not of the form regex=replacement. For example, --map"),
        (
            "layers.(0=h",
            (
                "the rule 'layers.(0=h' has a bad regular expression: missing ), unterminated subpattern at '(0'. A "
                "literal ( [ * or . is written \\( \\[ \\* \\."
            ),
        ),
        ("*.weight=x", "the rule '*.weight=x' has a bad regular expression: nothing to repeat at '*.weight'. A"),
        (
            "(a)=\\2",
            (
                "the rule '(a)=\\2' has a bad replacement: invalid group reference 2 at '2'. It may refer to groups as "
                "\\1 or \\g<name> (the expression has 1 group), and a literal \\ is written \\\\"
            ),
        ),
        ("a=\\g<n>", "the rule 'a=\\g<n>' has a bad replacement: unknown group name 'n'. It may refer to groups as"),
        ("a=b\\", "the rule 'a=b\\' has a bad replacement: bad escape (end of pattern) at '\\'. It may refer"),
        ("\x1b[2J", "the rule ' [2J' is not of the form"),
        ("a" * 1025, "has 1025 characters; at most 1024 are read"),
        ("(" * 1000 + "=", "has a bad regular expression"),
    ],
)
def test_what_is_no_rule_is_told_what_one_is(text: str, said: str) -> None:
    with pytest.raises(MappingError) as caught:
        parse_rename(text)
    assert said in str(caught.value)
    assert isinstance(caught.value, ShipError)
    assert caught.value.exit_code == 2


def test_rules_are_applied_one_after_the_other_wherever_they_match() -> None:
    rules = [Rule(r"^model\.", ""), Rule("a", "bb"), Rule("^bb", "c"), Rule("x$", "y")]
    result = apply_renames(("model.a.a", "a.model.a", "other"), rules)
    assert result.names == ["c.bb", "c.model.bb", "other"]
    assert result.counts == [1, 2, 2, 0]
    assert result.touched == {0, 1}
    assert apply_renames(("h.0.q", "h.1.k"), [Rule(r"h\.(\d)\.", r"layers.\1.attn.")]).names == [
        "layers.0.attn.q",
        "layers.1.attn.k",
    ]


def test_what_a_table_names_no_rule_changes() -> None:
    table = Table("map.json", (("a.w", "x.w"), ("gone", "y")))
    result = apply_renames(("a.w", "b.w"), [Rule("w", "v"), table])
    assert result.names == ["x.w", "b.v"]
    assert result.counts == [1, 1]
    assert result.absent == [(table, "gone")]


@pytest.mark.timeout(20)
def test_a_rule_that_would_take_for_ever_is_ended(monkeypatch) -> None:
    """And other threads run meanwhile, so that whoever waits for it can give up."""
    monkeypatch.setattr(renames, "_RULES_SECONDS", 0.2)
    rule = parse_rename("^(a|aa)+$=b")
    assert apply_renames(["aaaa"], [rule]).names == ["b"]
    with pytest.raises(MappingError, match=r"'\^\(a\|aa\)\+\$=b' has not come to an end on the name 'aaa.* in 0.2 s"):
        apply_renames(["a" * 200 + "!"], [rule])


# --- mapping files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b'{"a.b": "c.d", "e": "f"}',
        b'\xef\xbb\xbf\n {"a.b": "c.d",\n "e": "f"}\n',
        b'"a.b" = "c.d"\n# a comment\ne = "f"\n',
        b'a.b = "c.d"\ne = "f"\n',
        b'e = "f"\n[a]\nb = "c.d"\n',
    ],
)
def test_a_mapping_file_is_json_or_toml_by_its_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    table = load_renames(path)
    assert isinstance(table, Table)
    assert dict(table.entries) == {"a.b": "c.d", "e": "f"}
    assert table.origin == str(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", 'maps no names. It must be a TOML table of texts: "name in the checkpoint" and "name in the model"'),
        (b"{}", 'maps no names. It must be a JSON object of texts: "name in the checkpoint" and "name in the model"'),
        (b'["a"]', "holds a JSON array. It must be a JSON object of texts"),
        (b'{"a": "b",}', "begins as JSON and is not: "),
        (b'{"a": "b", "a": "c"}', "is not what it should be: it maps 'a' twice"),
        (b'{"a": 5}', "maps 'a' to what is no text. It must be a JSON object of texts"),
        (b'{"a": {"b": "c"}}', "maps 'a' to what is no text. It must be a JSON object of texts"),
        (b'a = "b"\na = "c"\n', "is neither a JSON object nor TOML: Cannot overwrite a value (at line 2, column 8)"),
        (b'"a.b" = "c"\n[a]\nb = "d"\n', "is neither a JSON object nor TOML: it maps 'a.b' twice"),
        (b"a -> b\n", "is neither a JSON object nor TOML: "),
        (b"a = [1]\n", "maps 'a' to what is no text. It must be a TOML table of texts"),
        (b"\x80\x81", "is not text in UTF-8: invalid start byte at byte 0"),
        (b'{"a": ""}', "has '' where a tensor's name belongs: 1 to 512 characters, and no control characters"),
        (b'{"a\\u0007": "b"}', "has 'a ' where a tensor's name belongs"),
        (b'{"' + b"a" * 513 + b'": "b"}', "where a tensor's name belongs: 1 to 512 characters"),
        (b'{"a":' * 100_000, "nests too deeply. It must be a JSON object of texts"),
    ],
)
def test_what_is_no_mapping_file_is_told_what_one_is(content: bytes, said: str) -> None:
    with pytest.raises(MappingError) as caught:
        parse_table(content, "names.map")
    assert str(caught.value).startswith("the mapping file 'names.map' ")
    assert said in str(caught.value)


def test_a_mapping_file_that_cannot_be_read_or_is_something_else(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(MappingError, match=r"names\.json' cannot be read: No such file or directory"):
        load_renames(tmp_path / "names.json")
    with pytest.raises(MappingError, match="cannot be read: Is a directory"):
        load_renames(tmp_path)
    with pytest.raises(MappingError, match=r"cannot be read: embedded null"):
        load_renames("a\0b")
    monkeypatch.setattr(renames, "MAX_FILE", 10)
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(11))
    with pytest.raises(MappingError, match="has more than 10 bytes: a few rules, --map 'regex=replacement', say more"):
        load_renames(path)
    monkeypatch.setattr(renames, "MAX_TENSORS", 1)
    with pytest.raises(MappingError, match="maps 2 names; at most 1 are read"):
        parse_table(b'a="b"\nc=""', "m")
