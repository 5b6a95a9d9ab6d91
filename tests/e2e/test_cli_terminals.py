"""shipctl on a terminal and in a pipe: progress, readers that go away, a full disk."""

import json
import os
import pty
import select
import sys
from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.checkpoints import assert_installed
from tests.support.processes import Process, Shipctl, address_of, push_arguments
from tests.support.proxy import Proxy


def _on_a_terminal(arguments, while_running=lambda: None):
    """Run shipctl with stderr on a terminal; its exit code, stdout and what the terminal showed."""
    ours, theirs = pty.openpty()
    try:
        with Process(
            [sys.executable, "-m", "shipd.cli.shipctl", *map(str, arguments)],
            env={"TERM": "xterm", "NO_COLOR": None, "COLUMNS": "100"},
            stderr=theirs,
        ) as process:
            while_running()
            shown = b""
            while process.running or select.select([ours], [], [], 0)[0]:
                if select.select([ours], [], [], 0.02)[0]:
                    shown += os.read(ours, 65536)
            return process.wait(), process.out, shown.decode()
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("as_json", [False, True])
def test_progress_only_on_a_terminal_and_never_with_json(daemon, medium, as_json):
    with Proxy(daemon.port) as proxy:
        held = proxy.hold(nth=12)

        def let_it_draw():
            held.wait()
            held.release()

        arguments = ["push", medium, "--to", proxy.address, "--model", "model", *(["--json"] if as_json else [])]
        code, out, shown = _on_a_terminal(arguments, let_it_draw)
    assert code == 0, shown
    if as_json:
        assert shown == ""
        assert json.loads(out)["type"] == "receipt"
    else:
        assert "━" in shown
        assert "\x1b[?25h" in shown, "the cursor is shown again"
        assert out.startswith("model is at ")


def test_error_on_a_terminal_stands_below_the_bar(daemon, medium):
    with Proxy(daemon.port) as proxy:
        proxy.flip("payload", nth=5, every=True)
        code, out, shown = _on_a_terminal(["push", medium, "--to", proxy.address, "--model", "model"])
    assert code == 13
    assert out == ""
    assert "shipctl: chunk 5" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("command", ["status", "push", "--help"])
def test_reader_that_goes_away_is_no_error_of_ours(daemon, small, command):
    arguments: dict[str, list[str | Path]] = {
        "status": ["status", "--to", address_of(daemon)],
        "push": list(push_arguments(daemon, small)),
        "--help": ["--help"],
    }
    read, write = os.pipe()
    os.close(read)
    try:
        with Shipctl(*arguments[command], stdout=write) as process:
            assert process.wait() == 1
            assert process.err == "", process.describe()
    finally:
        os.close(write)
    if command == "push":
        assert_installed(daemon, checkpoints.tiny())


@pytest.mark.parametrize("command", ["status", "push"])
def test_output_to_a_full_disk_is_an_error_and_no_traceback(daemon, small, command):
    if not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("no /dev/full here")
    arguments = ("status", "--to", address_of(daemon)) if command == "status" else push_arguments(daemon, small)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with Shipctl(*arguments, stdout=full) as process:
            assert process.wait() == 1
            assert process.err == "shipctl: cannot write to standard output: No space left on device\n"
    finally:
        os.close(full)
    if command == "push":
        assert_installed(daemon, checkpoints.tiny())
