"""What a hold yields: which version the resident model has. A leaf, so that it can be named without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Version:
    """The label that a version was pushed under and its digest, 32 hex digits."""

    label: str
    digest: str
