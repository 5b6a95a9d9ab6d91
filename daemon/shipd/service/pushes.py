"""Which push an OFFER or a connection belongs to: a new one, one that goes on, or one that is over."""

import logging
from collections.abc import Coroutine, Mapping
from typing import Any, Final, Protocol

from shipd.service.config import Config, table
from shipd.service.host import Host
from shipd.service.incoming import Incoming
from shipd.service.metrics import Metrics
from shipd.service.models import Model
from shipd.transfer.peer import Peer
from shipd.transfer.stream import StreamPeer
from shipproto.aborts import send_abort
from shipproto.errors import AbortCode, TransferError
from shipproto.messages import Join, Offer
from shipproto.receiver import Receiver

log = logging.getLogger("shipd.service")

REMEMBERED: Final = 256
"""Outcomes kept for senders that lost their connection before they heard."""


class PushHost(Host, Protocol):
    """What this needs of the daemon around it."""

    models: dict[str, Model]
    metrics: Metrics

    @property
    def draining(self) -> bool: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...


class Pushes:
    """All pushes of one daemon: those under way, by their connections, and how the latest others ended."""

    def __init__(self, host: PushHost) -> None:
        self._host = host
        self._by_peer: dict[Peer, Incoming] = {}
        self._ended: dict[bytes, Receiver] = {}

    def all(self) -> list[Incoming]:
        """Those under way."""
        return [model.incoming for model in self._host.models.values() if model.incoming is not None]

    def of(self, peer: Peer) -> Incoming | None:
        """The push that this connection is the transfer's own of."""
        return self._by_peer.get(peer)

    def ended(self, incoming: Incoming) -> None:
        """A push is over: remember how it ended, and nothing else of it."""
        incoming.receiver.forget()
        self._ended[incoming.receiver.transfer] = incoming.receiver
        while len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def lost(self, peer: Peer) -> None:
        """A connection is gone."""
        incoming = self._by_peer.pop(peer, None)
        if incoming is not None:
            incoming.disconnected(peer)

    def offered(self, peer: Peer, offer: Offer) -> None:
        """A sender offers a version, for the first time or again."""
        try:
            self._take(peer, offer)
        except TransferError as error:
            log.warning(
                "push refused",
                extra={"peer": peer.name, "model": offer.model, "code": str(error.code), "why": str(error)},
            )
            self._refuse(peer, offer, error)

    def joined(self, peer: Peer, join: Join) -> None:
        """A further connection for a push: from here on a thread of that push reads it."""
        push = self._find(join.transfer)
        try:
            if push is None or not isinstance(peer, StreamPeer) or peer.detached or peer in self._by_peer:
                raise TransferError(AbortCode.PROTOCOL, "this connection cannot be a lane of that transfer")
            push.joined(peer, join)
        except TransferError as error:
            send_abort(peer.connection, join.transfer, error)

    def _find(self, transfer: bytes) -> Incoming | None:
        return next((push for push in self.all() if push.receiver.transfer == transfer), None)

    def _take(self, peer: Peer, offer: Offer) -> None:
        ended = self._ended.get(offer.transfer)
        if ended is not None and not _may_retry(ended):
            ended.connected(peer.connection, offer)
            ended.disconnected(peer.connection)
            return
        running = self._find(offer.transfer)
        bound = self._by_peer.get(peer)
        if bound is not None and bound is not running and not bound.receiver.ended:
            raise TransferError(AbortCode.PROTOCOL, "one connection carries one transfer at a time")
        if running is not None:
            running.connected(peer, offer)
            self._bind(peer, running)
            return
        model = self._host.models.get(offer.model)
        if self._host.draining:
            raise TransferError(AbortCode.SHUTTING_DOWN, "the daemon is shutting down")
        if model is None:
            raise unknown_model(self._host.models, self._host.config, offer.model)
        if model.incoming is not None:
            self._host.spawn(self._supersede(peer, offer, model, model.incoming))
            return
        self._ended.pop(offer.transfer, None)
        model.incoming = Incoming(self._host, model, peer, offer)
        self._bind(peer, model.incoming)

    def _bind(self, peer: Peer, incoming: Incoming) -> None:
        """``peer`` carries this push, unless it went as it was answered, when nobody could know whose it is."""
        if peer.closed:
            incoming.disconnected(peer)
        else:
            self._by_peer[peer] = incoming

    async def _supersede(self, peer: Peer, offer: Offer, model: Model, running: Incoming) -> None:
        """Another push of the model is under way: it goes on, unless its sender has gone."""
        if running.receiver.attended or running.committing:
            error = TransferError(
                AbortCode.BUSY,
                f"model {model.name!r} is being pushed by {running.peer_name} (transfer {running.transfer_id}, "
                f"{running.receiver.state.name.lower()}): try again when it is done",
            )
            self._refuse(peer, offer, error)
            peer.flush()
            return
        running.fail(TransferError(AbortCode.SUPERSEDED, f"a newer push, from {peer.name}, took its place"))
        await running.wait()
        if not peer.closed:
            self.offered(peer, offer)
            peer.flush()

    def _refuse(self, peer: Peer, offer: Offer, error: TransferError) -> None:
        self._host.metrics.tally.refused(offer.model, error)
        send_abort(peer.connection, offer.transfer, error)


def unknown_model(models: Mapping[str, Model], config: Config, name: str) -> TransferError:
    """There is no model of that name; those that there are."""
    known = ", ".join(sorted(models)) or "none"
    declared = "no configuration declares it"
    if name in config.models:
        declared = f"its configuration ({table(name)}) has no max_bytes, with which it would exist all the same"
    return TransferError(
        AbortCode.UNKNOWN_MODEL,
        f"no model {name!r} here: nothing is attached under that name and {declared} (models here: {known})",
    )


def _may_retry(ended: Receiver) -> bool:
    """Whether a repeated OFFER starts the transfer anew: it was cut off, not refused or committed."""
    return ended.error is not None and ended.error.code in (AbortCode.STALLED, AbortCode.SHUTTING_DOWN)
