"""Numbers and names of codecs."""

from shipd.codecs import registry
from shipd.codecs.planes import PLANES
from shipd.codecs.xph import XPH


def test_numbers_are_those_of_the_wire() -> None:
    expected = {"xph": 2, "duh": 5, "f32d": 6, "planes": 7}
    found = {codec.name: codec.number for codec in registry.CODECS}
    assert found.items() >= expected.items()
    assert {name: number for number, name in registry.NAMES.items()}.items() >= {"raw": 0, "same": 1}.items()


def test_no_two_codecs_are_called_alike() -> None:
    assert len(registry.BY_NUMBER) == len(registry.BY_NAME) == len(registry.CODECS)
    assert len(registry.NAMES) == len(registry.CODECS) + 2
    assert len(set(registry.NAMES.values())) == len(registry.NAMES)


def test_what_can_be_decoded_is_same_and_every_codec() -> None:
    assert list(registry.DECODABLE) == sorted({registry.SAME, *registry.BY_NUMBER})
    assert registry.RAW not in registry.DECODABLE
    assert all(1 <= number <= 255 for number in registry.DECODABLE)
    assert len(registry.DECODABLE) <= 32


def test_found_by_number_and_by_name() -> None:
    assert registry.BY_NUMBER[2] is registry.BY_NAME["xph"] is XPH
    assert registry.BY_NUMBER[7] is registry.BY_NAME["planes"] is PLANES
