"""One push, on one blocking thread: connect, offer, send, wait for the commit; and again where the line breaks."""

import secrets
import threading
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from shipd.address import Address
from shipd.checkpoints.source import Source
from shipd.checkpoints.waiting import while_waiting
from shipd.client.account import Account
from shipd.client.chunks import ChunkReader
from shipd.client.conversation import Conversation
from shipd.client.incremental import Incremental, OfferAgain
from shipd.client.lanes import Outlets
from shipd.client.options import PushOptions
from shipd.client.planning import Outcome
from shipd.client.receipt import Receipt
from shipd.errors import ConnectError, Interrupted, OutcomeUnknown, ShipError, Stalled, TransferFailed
from shipd.transfer.faults import as_transfer_error, remote_error
from shipd.transfer.lane import ConnectionLost, Lane
from shipd.transfer.waker import Waker
from shipproto.errors import AbortCode, TransferError
from shipproto.limits import TRANSFER_ID_SIZE
from shipproto.messages import Committed
from shipproto.sender import Sender

CONNECT_SECONDS: Final = 10.0
"""For a connection to stand, with the handshake."""

_BACKOFF: Final = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Pauses between attempts to reconnect; the last one repeats."""
_SINGLE_AFTER: Final = 2
"""Connections that broke in a row after which a push does without further ones."""
_MAX_BREAKS: Final = 5
"""Connections in a row that broke without a single chunk getting through: the path is broken, not unlucky."""


class Push:
    """One push of one source to one daemon. ``run`` on any thread; ``cancel`` from any other."""

    def __init__(
        self,
        source: Source,
        address: Address | Path,
        options: PushOptions,
        incremental: Incremental | None = None,
        outcome: Outcome | None = None,
        *,
        lane: Lane | None = None,
        began: float | None = None,
        opened: float | None = None,
        connected_before: float = 0.0,
    ) -> None:
        """incremental       None sends everything, and as it is
        outcome           of planning: what ``source`` is in relation to the checkpoint
        lane              a connection that is there; it stays the caller's to close
        began, opened     when the checkpoint began to be opened, and when it was open (time.monotonic): what the push
                          is counted from
        connected_before  seconds that opening ``lane`` took before that
        """
        self.transfer = secrets.token_bytes(TRANSFER_ID_SIZE)
        self._source = source
        self._address = address
        self._options = options
        self._incremental = incremental or Incremental()
        self._spare = lane
        self._planning = outcome or Outcome()
        now = time.monotonic()
        self._account = Account(
            began=now if began is None else began,
            open=0.0 if began is None or opened is None else opened - began,
            plan=self._planning.seconds,
            bytes_sent=self._planning.bytes_sent,
            connected_before=connected_before,
        )
        self._sender = Sender(
            transfer=self.transfer,
            model=options.model,
            structure=source.structure,
            label=options.label,
            # The same part, sent again within a second, may come to another version.
            make_label=(lambda _: default_label(self.transfer)) if options.partial else default_label,
            metadata=options.metadata,
            incremental=incremental is not None,
            partial=options.partial,
        )
        self._lock = threading.Lock()
        """Held for every call of the sender, but to read and send a chunk, while there are lanes."""
        self._breaks = 0
        self._losses = 0
        """How often the receiver has lost what it had: it was restarted."""
        self._commit_sent = False
        self._reached = False
        self._uncertain = False
        self._established = False
        # Last: it takes descriptors, which only run() gives back.
        self._waker = Waker()

    def cancel(self) -> None:
        """End the push, unless its commit is already under way. Any thread, also a signal handler."""
        if not self._commit_sent:
            self._waker.wake()

    def run(self) -> Receipt:
        """Push. Raises ShipError; the previous version is serving then, unless it is OutcomeUnknown."""
        deadline = float("inf") if self._options.timeout is None else self._account.began + self._options.timeout
        try:
            committed = self._deliver(deadline)
            self._account.committed = time.monotonic()
            if self._sender.incremental and not self._sender.partial:
                self._incremental.keep(self._sender, ChunkReader(self._sender, self._source).read, self._account.rate)
        finally:
            self._waker.close()
        return self._account.receipt(self._sender, self._options.model, committed, self._incremental, self._planning)

    # --- connections ---------------------------------------------------------------------------------------

    def _deliver(self, deadline: float) -> Committed:
        """Over as many connections as it takes."""
        moved = time.monotonic()
        while True:
            held = self._sender.held
            try:
                return self._over_one_connection(deadline)
            except OfferAgain:
                continue
            except (ConnectError, Stalled) as error:
                if isinstance(error, ConnectError) and not isinstance(error, ConnectionLost) and not self._reached:
                    raise
                self._raise_if_over(error, deadline)
                self._losses += self._sender.held < held
                if self._sender.held > held:
                    self._breaks, moved = 0, time.monotonic()
                # What breaks before it is established, behind a proxy whose daemon restarts, is as good as refused.
                self._breaks += isinstance(error, ConnectionLost) and (self._established or not self._reached)
                if (
                    isinstance(error, Stalled)
                    or max(self._breaks, self._losses) >= _MAX_BREAKS
                    or time.monotonic() - moved > self._options.stall
                ):
                    raise self._gave_up(error) from error
                self._pause(_BACKOFF[min(self._breaks, len(_BACKOFF) - 1)])
            except TransferError as error:
                if not self._sender.revive() or time.monotonic() - moved > self._options.stall:
                    raise self._failure(error) from error
                self._pause(_BACKOFF[-1])
            except ShipError as error:
                # The peer broke the protocol, or is another one now.
                raise self._outcome(error) from error

    def _over_one_connection(self, deadline: float) -> Committed:
        self._established = False
        lane = self._spare or Lane.open(
            self._address,
            token=self._options.token,
            timeout=min(CONNECT_SECONDS, max(0.001, deadline - time.monotonic())),
            waker=self._interruptible,
        )
        self._spare = None
        self._pace(lane)
        self._established = True
        self._account.connect += lane.open_seconds
        lane.use(self._interruptible)
        self._reached = True
        # A commit that was asked for on an earlier connection may have happened, whatever is answered on this one.
        self._uncertain = self._commit_sent
        sent_before = lane.bytes_sent
        outlets = Outlets(
            self._sender,
            self._lock,
            open_lane=partial(self._open, lane.address),
            make_reader=lambda: ChunkReader(self._sender, self._source),
            stall=self._options.stall,
        )
        try:
            if self._sender.incremental:
                with while_waiting(partial(self._raise_if_unwanted, deadline)):
                    bases = self._incremental.offers(lane, self._sender)
                # Of a part no version is a base: the receiver has it among tensors that are not sent.
                self._sender.bases = () if self._sender.partial else bases
            return Conversation(
                self._sender,
                self._source,
                lane,
                outlets,
                self._options,
                self._account,
                self._incremental,
                single=isinstance(self._address, Path)
                or self._breaks >= _SINGLE_AFTER
                or self._options.limit is not None,
                # What does not get through this way does as bytes.
                lend=isinstance(self._address, Path) and not self._breaks,
                committing=partial(self._commit_leaves, lane),
            ).run(deadline)
        except (TransferError, ShipError) as error:
            if not self._commit_sent and not isinstance(error, ConnectError):
                # Of a push whose own time is over, the daemon would say that it was the daemon that took too long.
                late = isinstance(error, Stalled) and time.monotonic() >= deadline
                cause = too_late(self._options, self._address) if late else error
                self._sender.abort(cause if isinstance(cause, TransferError) else as_transfer_error(cause))
            raise
        except KeyboardInterrupt:
            self._sender.abort(TransferError(AbortCode.INTERRUPTED, "the sender was interrupted"))
            raise
        finally:
            missing = self._sender.held < self._sender.layout.chunks
            outlets.stop(discard=missing)
            lane.close(flush=True, discard=missing)
            account = self._account
            account.bytes_unchanged += lane.bytes_unchanged + outlets.bytes_unchanged
            account.bytes_sent += lane.bytes_sent - sent_before + outlets.bytes_sent
            account.frames_resent += lane.connection.frames_resent + outlets.frames_resent
            account.times.add(lane.times)
            account.times.add(outlets.times())
            account.wire_wait += outlets.times().wait
            account.lanes = max(account.lanes, 1 + outlets.lanes)

    def _pace(self, lane: Lane) -> None:
        """Raises ConnectError: a limit that cannot be kept to is not gone beyond, and trying again would not help."""
        limit = self._options.limit
        if limit is not None and not lane.pace(limit):
            lane.close()
            raise ConnectError(f"the connection to {lane.peer} cannot be kept to a rate", peer=lane.peer)

    def _open(self, where: Address | None, waker: Waker) -> Lane:
        """A lane, to the very daemon that the transfer's own connection leads to."""
        return Lane.open(where or self._address, token=self._options.token, timeout=CONNECT_SECONDS, waker=waker)

    def _commit_leaves(self, lane: Lane) -> None:
        self._commit_sent = True
        lane.use(None)

    @property
    def _interruptible(self) -> Waker | None:
        """Once COMMIT may have left, nothing interrupts: whoever cancelled too late waits for the outcome."""
        return None if self._commit_sent else self._waker

    def _pause(self, seconds: float) -> None:
        if self._commit_sent:
            time.sleep(seconds)
        elif self._waker.wait(seconds):
            raise Interrupted("interrupted while reconnecting; the previous version is serving")

    # --- errors --------------------------------------------------------------------------------------------

    def _raise_if_unwanted(self, deadline: float) -> None:
        """While a base is read, before anything is offered."""
        if self._waker.woken and not self._commit_sent:
            raise Interrupted("interrupted before anything was offered; the previous version is serving")
        if time.monotonic() >= deadline:
            raise too_late(self._options, self._address)

    def _raise_if_over(self, error: ShipError, deadline: float) -> None:
        if time.monotonic() >= deadline:
            late = too_late(self._options, self._address)
            late.transfer_id = self.transfer.hex()
            raise self._outcome(late) from error

    def _gave_up(self, error: ShipError) -> ShipError:
        if self._commit_sent:
            return self._outcome(error)
        why = ""
        if self._breaks >= _MAX_BREAKS:
            why = f"the connection to {self._address} broke {self._breaks} times without a chunk getting through"
        elif self._losses >= _MAX_BREAKS:
            why = f"{self._address} has lost {self._losses} times what it had received: its daemon keeps restarting"
        if why:
            return TransferFailed(
                f"{why}; the previous version is serving. Last: {error}",
                peer=str(self._address),
                model=self._options.model,
                transfer_id=self.transfer.hex(),
            )
        error.model, error.transfer_id = self._options.model, self.transfer.hex()
        return error

    def _outcome(self, error: ShipError) -> ShipError:
        if not self._commit_sent:
            return error
        return OutcomeUnknown(
            f"the connection to {self._address} was lost after COMMIT ({error}): the version is either live or not. "
            "Pushing it again is harmless and settles it.",
            peer=str(self._address),
            model=self._options.model,
            transfer_id=self.transfer.hex(),
        )

    def _failure(self, error: TransferError) -> ShipError:
        known = remote_error(error, str(self._address), model=self._options.model, transfer_id=self.transfer.hex())
        return self._outcome(known) if self._uncertain and error.code is not AbortCode.SWAP_FAILED else known


def too_late(options: PushOptions, address: Address | Path) -> Stalled:
    """The push has taken longer than it may."""
    return Stalled(
        f"the push took longer than its timeout of {options.timeout:g} s", peer=str(address), model=options.model
    )


def default_label(what: bytes) -> str:
    """UTC time and eight hexadecimal digits of the digest: unique enough, sortable, and it says what it is.

    Of a part ``what`` is the transfer's id instead.
    """
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{what.hex()[:8]}"
