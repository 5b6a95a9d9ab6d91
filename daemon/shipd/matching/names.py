"""What wrapping a model does to the names of its tensors: components that are added, and prefixes.

Functions work on whole columns of names: twenty thousand are read several ways for one plan.
"""

import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import Final

WRAPPERS: Final = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Components that DataParallel and DistributedDataParallel, torch.compile, FSDP and checkpoint_wrapper add to names."""

UNMISTAKABLE: Final = WRAPPERS[1:]
"""Those that nobody calls a part of his own model."""

_DEEPEST: Final = 8
"""Components of the longest prefix that is looked for; more than eight may be common to all names."""


def unwrap(names: Sequence[str], wrappers: Sequence[str] = WRAPPERS) -> list[str]:
    """``names`` without those components, wherever they are; the last component of a name stays."""
    # Names have no control characters, so that all of them can be one text, and one substitution.
    text = "\n".join(names)
    if not any(wrapper in text for wrapper in wrappers):
        return list(names)
    components = "|".join(map(re.escape, wrappers))
    return re.sub(rf"(?m)(?:^|(?<=\.))(?:{components})\.", "", text).split("\n")


def wrapping(names: Sequence[str], wrappers: Sequence[str]) -> Counter[str]:
    """How many of ``names`` begin with each run of those components ("module._orig_mod."), and how many have each of
    them further inside (".module.")."""
    text = "\n".join(names)
    components = "|".join(map(re.escape, wrappers))
    leading = re.compile(rf"(?m)^(?:(?:{components})\.)+")
    inside = re.compile(rf"(?<=\.)(?:{components})\.")
    found = Counter(leading.findall(text))
    text = leading.sub("", text)
    if inside.search(text):
        for name in text.split("\n"):
            found.update({f".{component}" for component in inside.findall(name)})
    return found


def common_prefix(names: Sequence[str]) -> str:
    """The components that all names begin with, with the dot after them."""
    if not names:
        return ""
    first, last = min(names), max(names)
    end = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[: first.rfind(".", 0, end) + 1]


def likely_prefixes(longer: Iterable[str], shorter: Container[str], most: int) -> list[str]:
    """The ``most`` prefixes that make most of ``longer`` into one of ``shorter`` when they are taken off; each ends in
    a dot."""
    votes: Counter[str] = Counter()
    for name in longer:
        end = 0
        for _ in range(_DEEPEST):
            end = name.find(".", end) + 1
            if not end:
                break
            if name[end:] in shorter:
                votes[name[:end]] += 1
    return [prefix for prefix, _ in votes.most_common(most)]


def without_prefix(names: Iterable[str], prefix: str) -> list[str]:
    """``names``, those that begin with ``prefix`` without it."""
    return [name.removeprefix(prefix) for name in names]
