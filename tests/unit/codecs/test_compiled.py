"""The loader of compiled loops: late, once, whatever fails; and the loops themselves with bounds checks on."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from shipd.codecs import compiled, egr
from shipd.codecs.egr import EGR
from tests.support.sparse import encoded, weights

ROOT = Path(__file__).parents[3]


def run(script: str, **environment: str) -> str:
    """What a script prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "protocol", ROOT / "daemon", ROOT)))}
        | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_a_codec_imports_no_numba() -> None:
    found = run("import sys, shipd.codecs.egr, shipd.codecs.gz, shipd.codecs.compiled; print('numba' in sys.modules)")
    assert found == "False"


FAILING = """
import builtins, sys
import numpy as np

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numba", "llvmlite"):
            raise {error}("not here")

sys.meta_path.insert(0, Refusing())
from shipd.codecs import compiled
from shipd.codecs.egr import EGR

assert compiled.why_not() == ""
assert compiled.kernels() is None
assert compiled.warm_up() is False
assert compiled.kernels() is None
base = np.arange(5000, dtype=np.uint16).tobytes()
content = np.arange(1, 5001, dtype=np.uint16).tobytes()
payload = EGR.encode(content, base, dtype=4, most=1 << 20)
out = bytearray(base)
EGR.decode(payload, out, memoryview(out))
assert out == content
print(compiled.why_not())
"""


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_where_numba_cannot_be_imported_everything_works(error: str) -> None:
    assert run(FAILING.format(error=error)) == f"{error}: not here"


FORBIDDING = """
import ctypes
# PR_SET_MDWE with PR_MDWE_REFUSE_EXEC_GAIN, which is what systemd's MemoryDenyWriteExecute does.
if ctypes.CDLL(None, use_errno=True).prctl(65, 1, 0, 0, 0):
    print("cannot")
else:
    from shipd.codecs import compiled
    print(compiled.warm_up(), compiled.why_not())
"""


def test_where_memory_may_not_be_made_executable_numpy_does_the_work() -> None:
    found = run(FORBIDDING)
    if found == "cannot":
        pytest.skip("this kernel cannot forbid it")
    assert found.startswith("False ")
    assert "executable memory" in found


def test_threads_that_ask_at_once_get_the_same() -> None:
    found = run("""
import threading
from shipd.codecs import compiled

begin, found = threading.Barrier(4), []

def ask():
    begin.wait()
    compiled.warm_up()
    found.append(compiled.kernels())

threads = [threading.Thread(target=ask) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), len({id(one) for one in found}), (found[0] is None) == (compiled.why_not() != ""))
""")
    assert found == "4 1 True"


@pytest.mark.parametrize("error", [RuntimeError("no locator available"), OSError("no space left on device")])
def test_without_a_place_for_a_cache_it_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked = []

    def njit(signature, **options):
        asked.append((signature, options))
        if options.get("cache"):
            raise error
        return lambda function: function

    monkeypatch.setitem(sys.modules, "numba", SimpleNamespace(njit=njit))
    assert compiled.kernel("a signature")(len) is len
    assert asked == [("a signature", {"nogil": True, "cache": True}), ("a signature", {"nogil": True})]


def test_nothing_is_compiled_after_the_warm_up() -> None:
    if not compiled.warm_up():
        pytest.skip("numba cannot be had here")
    from numba.core import event

    with event.install_recorder("numba:compile") as recorder:
        for size, share in ((0, 0.0), (1, 1.0), (70_000, 0.01), (5000, 0.9)):
            content, base = weights(size, share, step=300)
            EGR.decode(encoded(EGR, content, base), base.tobytes(), memoryview(bytearray(base.nbytes)))
    assert egr.engine() is compiled.kernels().egr  # type: ignore[union-attr] # it is there: see above
    assert not recorder.buffer


BOUNDS_CHECKED = """
import numpy as np
from numba import types
from shipd.codecs import compiled, egr, egr_compiled as engine
from shipd.codecs.codec import CodecError
from shipd.codecs.compiled_lanes import array
from tests.fuzz.mutator import Mutator
from tests.support.sparse import weights

@compiled.kernel(types.uint16(array(types.uint16), types.uint64))
def beyond(words, at):
    return words[at]

try:
    beyond(np.zeros(3, dtype=np.uint16), 3)
except IndexError:
    pass
else:
    raise AssertionError("bounds are not checked")

engine.warm_up()
seeds = []
for size, share, step in ((1, 1.0, 1), (200, 0.2, 300), (2049, 0.01, 1), (6000, 1.0, 3), (3000, 0.5, 40_000)):
    content, base = weights(size, share, step=step)
    payload = egr.encode(engine, content, base, 4, 1 << 30)
    egr.decode(engine, payload, base.copy(), out := np.empty_like(base))
    assert (out == content).all()
    seeds.append((payload, base))
refused = 0
for payload, base in seeds:
    mutator = Mutator([payload, *(other for other, _ in seeds)], 5)
    for _ in range(800):
        try:
            egr.decode(engine, mutator.next(), base, base.copy())
        except CodecError:
            refused += 1
assert 0 < refused < 4000
print("done")
"""


def test_no_loop_leaves_its_arrays_with_bounds_checks_on(tmp_path: Path) -> None:
    """Whatever payloads say. In a cache of its own: what is compiled with checks is kept under the same name."""
    if not compiled.warm_up():
        pytest.skip("numba cannot be had here")
    assert run(BOUNDS_CHECKED, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path)) == "done"
