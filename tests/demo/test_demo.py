"""The demo, as `make demo` runs it: it ends with a 0 only where everything that it claims was so."""

import sys

import pytest

from tests.support.processes import Process

SECONDS = 280.0
"""Until it is given up. Two idle cores need half a minute."""


@pytest.mark.timeout(SECONDS + 20)
def test_everything_that_the_demo_claims_holds() -> None:
    with Process([sys.executable, "-m", "tests.demo"]) as demo:
        assert demo.wait(SECONDS) == 0, demo.describe()
        assert "Everything held" in demo.out
