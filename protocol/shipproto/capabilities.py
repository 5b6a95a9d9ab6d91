"""Names of the optional abilities that a side says in HELLO, each with what follows from it."""

from typing import Final

DESCRIBE: Final = "describe"
"""It answers DESCRIBE."""

LEND: Final = "lend"
"""It takes LEND. A daemon says so over its Unix socket only."""

PARTIAL: Final = "partial"
"""It takes partial offers. Who does not would take one for the offer of a whole version."""
