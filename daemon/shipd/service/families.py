"""The daemon in Prometheus's terms: every metric there is, with its help, read from the daemon's state when asked for.

Labels are bounded: models are those that exist (and "" for what models that exist no longer have counted), a version
is shown while it is the current one, processes are counted by state and not named.
"""

import math
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Final, Protocol

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from shipd.release import VERSION
from shipd.service.histogram import Histogram
from shipd.service.looplag import LoopLag
from shipd.service.models import ImageStore, Model
from shipd.service.questions import held_bytes, state_of
from shipd.service.tally import FAILURES, OUTCOMES, TRANSPORTS, Tally, transport
from shipd.transfer.peer import Peer
from shipproto.limits import PROTOCOL_VERSION

STATES: Final = ("attaching", "serving", "staging", "swapping", "stale")
"""What an attached process can be doing; a stale one serves nothing until it has the current version."""


class Watched(Protocol):
    """What is told about a daemon."""

    models: dict[str, Model]
    images: ImageStore

    @property
    def draining(self) -> bool:
        """Whether it takes no new pushes."""


class Families:
    """Collects the metrics of one daemon, on its event loop's thread. ``peers`` are its open connections."""

    def __init__(self, daemon: Watched, peers: Mapping[Peer, float], tally: Tally, lag: LoopLag) -> None:
        self._daemon = daemon
        self._peers = peers
        self._tally = tally
        self._lag = lag
        self._started = time.time()

    def describe(self) -> Iterable[Metric]:
        """Asked on registration, for names that might clash; nothing else is registered beside this."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One family at a time, each of one moment, so that the loop may do other things in between."""
        yield from chain(self._service(), self._transfers(), self._models(), self._processes(), self._connections())

    # --- the daemon ----------------------------------------------------------------------------------------

    def _service(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "shipd_build",
            "This release of shipd, the Python that runs it and the version of the protocol it speaks.",
            {"version": VERSION, "python": platform.python_version(), "protocol": str(PROTOCOL_VERSION)},
        )
        yield GaugeMetricFamily("shipd_start_time_seconds", "When the daemon started, in Unix time.", self._started)
        yield GaugeMetricFamily(
            "shipd_draining", "1 where the daemon is stopping and takes no new pushes.", self._daemon.draining
        )
        budget = self._daemon.images.budget
        yield GaugeMetricFamily("shipd_image_memory_bytes", "Memory of all images together.", budget.used)
        yield GaugeMetricFamily(
            "shipd_image_memory_limit_bytes", "What all images may take (memory_limit).", budget.limit
        )
        lag = _histogram(
            "shipd_event_loop_lag_seconds",
            "How long something that is due waits for the event loop: samples of moments 50 ms apart.",
        )
        _observed(lag, [], self._lag.histogram)
        yield lag
        yield GaugeMetricFamily(
            "shipd_event_loop_lag_max_seconds", "The longest lag of the last minute.", self._lag.recent_max
        )

    # --- pushes --------------------------------------------------------------------------------------------

    def _transfers(self) -> Iterator[Metric]:
        ended = CounterMetricFamily(
            "shipd_transfers",
            'Pushes that have ended: "committed", "already" (it was the current version) or with the code of an error. '
            "Refused ones are among them.",
            labels=("model", "outcome"),
        )
        for name, tally in self._tally.each():
            for outcome in OUTCOMES:
                ended.add_metric((name, outcome), tally.outcomes[outcome])
        yield ended
        running = _gauge("shipd_transfers_in_progress", "Pushes under way.", "model")
        held = _gauge("shipd_transfer_held_bytes", "Bytes of the push under way that are here, intact.", "model")
        total = _gauge("shipd_transfer_size_bytes", "Bytes of the push under way, all of it.", "model")
        for name, model in sorted(self._daemon.models.items()):
            running.add_metric((name,), model.incoming is not None)
            if model.incoming is not None:
                receiver = model.incoming.receiver
                held.add_metric((name,), held_bytes(receiver))
                total.add_metric((name,), receiver.layout.wire_bytes if receiver.layout else receiver.offer.nbytes)
        yield from (running, held, total)
        payload = CounterMetricFamily(
            "shipd_payload_bytes",
            "Bytes of chunks and of coded runs that arrived intact, over all pushes.",
            labels=("model",),
        )
        decoded = CounterMetricFamily(
            "shipd_decoded_bytes",
            "Bytes of tensors that coded runs stood for, those included that were left out since they had not changed.",
            labels=("model",),
        )
        damaged = CounterMetricFamily(
            "shipd_frames_damaged",
            "Frames of pushes that arrived damaged and were asked for again.",
            labels=("model",),
        )
        for name, tally in self._tally.each():
            incoming = self._daemon.models[name].incoming if name else None
            payload.add_metric((name,), tally.payload_bytes + (incoming.receiver.payload_bytes if incoming else 0))
            decoded.add_metric((name,), tally.decoded_bytes + (incoming.decoded_bytes if incoming else 0))
            damaged.add_metric((name,), tally.frames_damaged + (incoming.receiver.chunks_damaged if incoming else 0))
        yield from (payload, decoded, damaged)
        yield from self._durations()

    def _durations(self) -> Iterator[Metric]:
        """Histograms, one at a time: they are most of the lines."""
        family = _histogram("shipd_transfer_seconds", "Committed pushes, from the offer to the commit.", "model")
        for name, tally in self._tally.each():
            _observed(family, [name], tally.transfer_seconds)
        yield family
        family = _histogram(
            "shipd_stage_seconds", "From the last tensor verified until every process was ready to swap.", "model"
        )
        for name, tally in self._tally.each():
            _observed(family, [name], tally.stage_seconds)
        yield family
        family = _histogram(
            "shipd_pause_seconds", "The longest that any process served nothing, of each commit.", "model"
        )
        for name, tally in self._tally.each():
            _observed(family, [name], tally.pause_seconds)
        yield family

    # --- models and processes ------------------------------------------------------------------------------

    def _models(self) -> Iterator[Metric]:
        info = InfoMetricFamily("shipd_model_version", "The version that is current.", labels=("model",))
        committed = _gauge(
            "shipd_model_version_committed_timestamp_seconds",
            "When it was committed, in Unix time; missing where it came with an attached process.",
            "model",
        )
        size = _gauge("shipd_model_version_bytes", "Bytes of one version.", "model")
        tensors = _gauge("shipd_model_version_tensors", "Tensors of one version.", "model")
        images = _gauge("shipd_model_image_bytes", "Memory of the model's images.", "model")
        for name, model in sorted(self._daemon.models.items()):
            if model.version is not None:
                info.add_metric((name,), {"label": model.version.label, "digest": model.version.digest.hex()})
                if model.version.committed_at:
                    committed.add_metric((name,), model.version.committed_at)
            if model.structure is not None:
                size.add_metric((name,), model.structure.total_bytes)
                tensors.add_metric((name,), len(model.structure))
            images.add_metric((name,), model.pool.size if model.pool else 0)
        yield from (info, committed, size, tensors, images)

    def _processes(self) -> Iterator[Metric]:
        family = _gauge(
            "shipd_processes",
            "Serving processes by what they are doing. A stale one was given up (it missed a deadline, or could not "
            "follow a commit) and serves nothing until it has attached again; attaching, it is counted as that too.",
            "model",
            "state",
        )
        for name, model in sorted(self._daemon.models.items()):
            states = Counter(state_of(session, model) for session in model.sessions if not session.lost)
            states["attaching"] += model.attaching
            states["stale"] += self._tally.of(name).stale(model)
            for state in STATES:
                family.add_metric((name, state), states[state])
        yield family
        evictions = CounterMetricFamily(
            "shipd_evictions", "Sessions that were ended because a process missed a deadline.", labels=("model",)
        )
        for name, tally in self._tally.each():
            evictions.add_metric((name,), tally.evictions)
        yield evictions

    # --- connections ---------------------------------------------------------------------------------------

    def _connections(self) -> Iterator[Metric]:
        now = _gauge("shipd_connections", "Connections that are open, but for the lanes of pushes.", "transport")
        opened = CounterMetricFamily("shipd_connections_opened", "Connections accepted.", labels=("transport",))
        received = CounterMetricFamily(
            "shipd_received_bytes", "Bytes received, of whatever kind; a lane's when it ends.", labels=("transport",)
        )
        resent = CounterMetricFamily(
            "shipd_frames_resent", "Frames sent again because the peer asked for them.", labels=("transport",)
        )
        failures = CounterMetricFamily(
            "shipd_connection_failures",
            'Connections that did not end well: "foreign" (another protocol), "auth" (token), "version", "damaged" '
            '(beyond resending), "protocol" (other violations) or "no-handshake" (gone, or cut off, before it).',
            labels=("transport", "reason"),
        )
        for kind in TRANSPORTS:
            connections = [peer.connection for peer in self._peers if transport(peer) == kind]
            over = self._tally.connections[kind]
            now.add_metric((kind,), len(connections))
            opened.add_metric((kind,), over.closed + len(connections))
            received.add_metric((kind,), over.bytes_received + sum(each.bytes_received for each in connections))
            resent.add_metric((kind,), over.frames_resent + sum(each.frames_resent for each in connections))
            for reason in FAILURES:
                failures.add_metric((kind, reason), over.failures[reason])
        yield from (now, opened, received, resent, failures)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=labels)


def _histogram(name: str, text: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, labels=labels)


def _observed(family: HistogramMetricFamily, labels: list[str], observed: Histogram) -> None:
    buckets = [("+Inf" if math.isinf(bound) else str(bound), number) for bound, number in observed.cumulative()]
    family.add_metric(labels, buckets, observed.sum)
