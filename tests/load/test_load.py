"""Twenty seconds of the load. Longer: ``python -m tests.load --seconds 300``."""

import pytest

from tests.load.running import MODELS, PROCESSES, Load
from tests.support.serving_process import Nursery

pytest_plugins = ["tests.support.serving_process"]

SECONDS = 20.0
SEED = 7


# What is waited for after the load has ended takes long where others want the machine, too.
@pytest.mark.timeout(600)
def test_the_load_of_four_models_with_four_processes_each(nursery: Nursery) -> None:
    assert (len(MODELS), PROCESSES) == (4, 4)
    load = Load(nursery, SECONDS, SEED)
    print(load.run())
    assert load.ledger.ends["committed"] >= 20, load.ledger.ends
    assert load.ledger.ends["killed"], "else no sender was killed"
