"""Asking a daemon for its metrics as Prometheus would, and reading the answer with the library's own parser."""

import http.client
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import shipd

DEADLINE = 20.0


@dataclass(frozen=True)
class Answer:
    """What an HTTP request was answered. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: str


def get(port: int, path: str, method: str = "GET") -> Answer:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read().decode())
    finally:
        connection.close()


class Scrape:
    """The metrics of one moment."""

    def __init__(self, port: int) -> None:
        answer = get(port, "/metrics")
        assert answer.status == 200, answer
        self.text = answer.body
        self.families: dict[str, Metric] = {}
        for family in text_string_to_metric_families(self.text):
            assert family.name not in self.families, f"{family.name} comes in two parts"
            self.families[family.name] = family
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        """A sample's value; None where there is no such sample."""
        return self._samples.get((name, frozenset(labels.items())))

    def labels(self, name: str) -> list[dict[str, str]]:
        """The labels of every sample of this name."""
        return [dict(labels) for sample, labels in self._samples if sample == name]

    def counted(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """By the value of ``label``, the samples that are not 0 and have the other ``labels``."""
        return dict(self._counted(name, label, labels))

    def _counted(self, name: str, label: str, labels: dict[str, str]) -> Iterator[tuple[str, float]]:
        for (sample, found), value in self._samples.items():
            if sample == name and value and labels.items() <= dict(found).items():
                yield dict(found)[label], value


def scrape(daemon: shipd.Daemon) -> Scrape:
    """The metrics of a daemon inside this process."""
    return Scrape(daemon.server.metrics.port)


def raw(port: int, *pieces: bytes, half_close: bool = False) -> bytes:
    """Everything that comes back for these bytes, until the other side closes. b"" also where it resets."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
            return receive_all(sock)
        except (ConnectionResetError, BrokenPipeError):
            return b""


def receive_all(sock: socket.socket) -> bytes:
    """Until the other side closes."""
    received = []
    while piece := sock.recv(65536):
        received.append(piece)
    return b"".join(received)
