"""One benchmark in a process of its own: ``python -m tests.benchmarks.alone MODULE ROUNDS FILE`` writes its rows."""

import importlib
import json
import sys
from pathlib import Path

from tests.benchmarks.rows import as_row

if __name__ == "__main__":
    rows = importlib.import_module(sys.argv[1]).measure(int(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps([as_row(row).as_dict() for row in rows]))
