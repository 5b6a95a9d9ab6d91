"""What the property tests draw from, and how many examples they look at: always the same ones, so that CI repeats.

For longer: ``SHIPD_EXAMPLES=50 python -m pytest tests/property`` looks at fifty times as many, and at others each time.
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.support import naive
from tests.support.naive import Tensor

LEAF = 256
"""Leaf size of the models drawn here: a few hundred bytes make several chunks."""


TIMES = int(os.environ.get("SHIPD_EXAMPLES", "1"))


def examples(count: int) -> settings:
    """So many times as many as are asked for, and only then others each time; the rest is as in tests/conftest.py."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


names = st.text(
    alphabet=st.sampled_from("abcxyz.0189_-/ éÿ\U0001f600ﬀ"),
    min_size=1,
    max_size=6,
)
dtypes = st.sampled_from(sorted(naive.ITEMSIZE))
shapes = st.lists(st.sampled_from((0, 1, 1, 2, 3, 5, 8, 17, 40)), max_size=3).map(tuple)


@st.composite
def models(draw: st.DrawFn, *, most: int = 8) -> list[Tensor]:
    """Rows of a structure, some of them tied."""
    rows: list[Tensor] = []
    for name in draw(st.lists(names, unique=True, max_size=most)):
        roots = [row for row in rows if row.tied_to is None]
        tie = draw(st.sampled_from(roots)) if roots and draw(st.integers(0, 4)) == 0 else None
        if tie is not None:
            rows.append(Tensor(name, tie.dtype, tie.shape, tie.name))
        else:
            rows.append(Tensor(name, draw(dtypes), draw(shapes)))
    return draw(st.permutations(rows))


def untied(rows: list[Tensor]) -> list[Tensor]:
    """The same tensors, each with bytes of its own."""
    return [Tensor(row.name, row.dtype, row.shape) for row in rows]


mutations = st.lists(
    st.tuples(
        st.sampled_from(("flip", "set", "insert", "delete", "double")), st.integers(0, 1 << 20), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    """``data`` with a few bytes changed."""
    changed = bytearray(data)
    for kind, place, value in changes:
        at = place % (len(changed) + 1)
        if kind == "insert":
            changed.insert(at, value)
        elif kind == "double":
            changed[at:at] = changed[at : at + value]
        elif at < len(changed):
            if kind == "flip":
                changed[at] ^= 1 << value % 8
            elif kind == "set":
                changed[at] = value
            else:
                del changed[at]
    return bytes(changed)
