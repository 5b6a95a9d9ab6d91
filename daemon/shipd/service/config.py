"""The daemon's configuration: a TOML file, overridden by SHIPD_* environment variables.

Unknown keys are errors. The configuration is checked as a whole before any of it is used, also on reload.
"""

import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec

from shipd.address import Address, parse_address
from shipd.errors import ConfigError
from shipd.units import parse_size
from shipproto.limits import MAX_LANES, MIN_TOKEN
from shipproto.names import check_label

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]

METRICS_PORT: Final = 9747
"""Where metrics are given if only a host is named."""

ENVIRONMENT: Final = {
    "SHIPD_LISTEN": "listen",
    "SHIPD_SOCKET": "socket",
    "SHIPD_SOCKET_GROUP": "socket_group",
    "SHIPD_TOKEN_FILE": "token_file",
    "SHIPD_MEMORY_LIMIT": "memory_limit",
    "SHIPD_METRICS": "metrics",
    "SHIPD_LOG_LEVEL": "log_level",
    "SHIPD_LOG_FORMAT": "log_format",
}
"""Variables that override the file, and the keys they set."""

RELOADABLE: Final = frozenset(
    {
        "token_file",
        "memory_limit",
        "max_lanes",
        "incremental",
        "lending",
        "stall",
        "resume_window",
        "stage_timeout",
        "commit_timeout",
        "log_level",
        "models",
    }
)
"""What a SIGHUP can change; the rest needs a restart."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is said of one model, at least one thing.

    max_bytes  bounds one version of it. With it the model exists although nothing is attached; without, what stands
               here counts once something is
    policy     what may differ between a checkpoint and the model. It is what a push means that asks for nothing, and
               one that asks for more is refused. None: pushes are strict unless they ask otherwise
    cast       the same for dtypes: whether a sender may convert to those of the model
    """

    max_bytes: int | str | None = None
    policy: Literal["strict", "subset", "partial"] | None = None
    cast: bool | None = None

    @property
    def limit(self) -> int | None:
        """``max_bytes`` as a number."""
        return None if self.max_bytes is None else parse_size(self.max_bytes)


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set. Sizes are bytes, or strings such as "8GiB"; times are seconds."""

    listen: str = "127.0.0.1:7447"
    """HOST:PORT for senders. Port 0 takes any free one."""
    socket: str = "/run/shipd/shipd.sock"
    """Unix socket for serving processes and local clients."""
    socket_group: str | None = None
    """Group that may connect to it, if the daemon is allowed to give it away."""
    token_file: str | None = None
    """File with the token that senders must prove. Required to listen beyond loopback."""
    memory_limit: int | str = "8GiB"
    """All images together."""
    max_lanes: Annotated[int, msgspec.Meta(ge=1, le=MAX_LANES)] = 8
    """Connections on which one push may send at once, each received on a thread of its own."""
    incremental: bool = True
    """Whether senders may leave out what has not changed, and say the rest in fewer bytes."""
    lending: bool = True
    """Whether clients on this host may hand over the open files of a checkpoint, which the daemon then reads itself."""
    stall: _Seconds = 30.0
    """A sender that is silent for so long in the middle of a transfer is disconnected."""
    resume_window: _Seconds = 60.0
    """A transfer whose sender is gone is kept for so long."""
    stage_timeout: _Seconds = 60.0
    """A serving process must be ready to swap within this time, or it is evicted."""
    commit_timeout: _Seconds = 30.0
    """A serving process must reach a safe point and swap within this time."""
    drain_timeout: _Seconds = 60.0
    """How long pushes that are under way may go on after SIGTERM."""
    metrics: str = ""
    """HOST:PORT of /metrics, /healthz and /readyz over HTTP, on loopback only. None by default: a daemon inside a
    process opens no port that nobody asked for. Port 0 takes any free one."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    models: dict[str, ModelConfig] = {}
    """What is said of single models; those with ``max_bytes`` can be pushed to while nothing is attached."""

    def __post_init__(self) -> None:
        address = self.address
        if self.token_file is None and not _is_loopback(address.host):
            raise ConfigError(
                f"listen = {self.listen!r} is reachable from other hosts, and no token_file is set: anyone could "
                "replace your models. Set token_file, or listen on 127.0.0.1."
            )
        if not self.socket or "\0" in self.socket or len(self.socket.encode()) > 107:
            raise ConfigError(f"socket = {self.socket!r} cannot be the path of a Unix socket (1 to 107 bytes)")
        metrics = self.metrics_address
        if metrics is not None and not _is_loopback(metrics.host):
            raise ConfigError(
                f"metrics = {self.metrics!r} is reachable from other hosts, and nobody is asked who they are: anyone "
                "could see which models and versions run here. Use 127.0.0.1, and let an agent or a proxy on this host "
                "carry them further."
            )
        _size("memory_limit", self.memory_limit)
        for name, model in self.models.items():
            try:
                check_label("model name", name)
            except ValueError as error:
                raise ConfigError(f"models: {error}") from error
            if model == ModelConfig():
                raise ConfigError(f"models.{name}: nothing is said of it: set max_bytes, policy or cast")
            if model.max_bytes is not None:
                _size(f"models.{name}.max_bytes", model.max_bytes)

    @property
    def address(self) -> Address:
        """``listen``, parsed."""
        try:
            return parse_address(self.listen, listen=True)
        except ValueError as error:
            raise ConfigError(f"listen = {self.listen!r}: {error}") from error

    @property
    def metrics_address(self) -> Address | None:
        """``metrics``, parsed; None where there are to be none."""
        try:
            return parse_address(self.metrics, default_port=METRICS_PORT, listen=True) if self.metrics else None
        except ValueError as error:
            raise ConfigError(f"metrics = {self.metrics!r}: {error}") from error

    @property
    def memory_bytes(self) -> int:
        """``memory_limit`` as a number."""
        return parse_size(self.memory_limit)

    def read_token(self) -> bytes | None:
        """The token, or None where none is set. Raises ConfigError."""
        return None if self.token_file is None else read_token(Path(self.token_file))


def read_token(path: Path) -> bytes:
    """The token in a file, without surrounding white space. Raises ConfigError."""
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"cannot read the token file {path}: {error.strerror}") from error
    if len(token) < MIN_TOKEN:
        raise ConfigError(f"the token in {path} has {len(token)} characters; at least {MIN_TOKEN} are needed")
    return token


def load(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read the file (if any), apply the environment, check everything. Raises ConfigError naming the key."""
    values: dict[str, Any] = {}
    origin = "the environment"
    if path is not None:
        origin = str(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no valid TOML: {error}") from error
    for variable, key in ENVIRONMENT.items():
        if variable in environ:
            values[key] = environ[variable]
    try:
        return msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        # msgspec wraps what __post_init__ raises only where it is a ValueError; ConfigError passes through.
        raise ConfigError(f"{origin}: {_problem(values, error)}") from error


def _problem(values: dict[str, Any], error: msgspec.ValidationError) -> str:
    """What is wrong, and with which model: msgspec says `$.models[...]` of all of them."""
    models = values.get("models")
    for name, said in models.items() if isinstance(models, dict) else ():
        try:
            msgspec.convert(said, ModelConfig)
        except msgspec.ValidationError as found:
            return f"{table(name)}: {_with_choices(found, ModelConfig)}"
    return _with_choices(error, Config)


def _with_choices(error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> str:
    """msgspec's words, and where a value is none of a few those few."""
    text = str(error)
    hint = get_type_hints(kind).get(text.rpartition("`$.")[2].rstrip("`"))
    choices = [choice for part in (hint, *get_args(hint)) if get_origin(part) is Literal for choice in get_args(part)]
    return f"{text}: it is one of {', '.join(map(repr, choices))}" if choices else text


def table(name: str) -> str:
    """The table of a model, as it stands in the file."""
    return f"[models.{name if re.fullmatch('[A-Za-z0-9_-]+', name) else json.dumps(name)}]"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _size(key: str, value: int | str) -> None:
    try:
        size = parse_size(value)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    if size <= 0:
        raise ConfigError(f"{key} = {value!r}: must be more than nothing")
