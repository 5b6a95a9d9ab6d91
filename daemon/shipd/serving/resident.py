"""``shipd.attach``: a model that is being served gets its next versions from the daemon on this host."""

import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from shipd.serving.swap import Swapper, Torn, make_swapper
from shipd.serving.tensors import ModelTensors

from shipd.errors import AttachError, Fenced, IntegrityError, SwapFailed
from shipd.images.memory import ImageMapping
from shipd.serving.gate import Gate
from shipd.serving.hooks import Hooks, find_calls
from shipd.serving.link import Link, SwapTimes
from shipd.serving.slot import Slot
from shipd.serving.version import Version
from shipproto.rangeset import RangeSet
from shipproto.resident import Resident as ResidentBody

log = logging.getLogger("shipd.serving")

DEFAULT_SOCKET: Final = "/run/shipd/shipd.sock"
MODES: Final = ("auto", "copy", "flip")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:+@-]{0,127}\Z")
