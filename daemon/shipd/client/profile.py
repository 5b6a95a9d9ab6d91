"""Where the time of a push went, stage by stage, on both sides."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Seconds. The stages follow each other and, with what lies between them, make up the whole push.

    open, plan              opening the checkpoint; asking what the model consists of, and matching that with it
    connect, agree          connecting, with the handshake; from OFFER to the first chunk
    wire                    first chunk written until the last one was verified at the receiver; of it, on each side:
      read, encode, digest, check, write, wait    the sender, see ``shipd.transfer.times``
      receiver_receive, _check, _digest, _decode  the receiver; what is missing to ``wire`` it waited for bytes
    verify                  comparing digests
    stage                   serving processes making ready
    commit                  from COMMIT to COMMITTED; of it, in the process that paused longest:
      pause, hold_wait, copy                      its readers held back; of that, for the last hold; moving the weights

    total                   all of it, with the opening of a connection that was there before the push
    lanes                   connections that carried chunks. With several, the work of a side adds up over its threads
    """

    open: float
    plan: float
    connect: float
    agree: float
    wire: float
    read: float
    encode: float
    digest: float
    check: float
    write: float
    wait: float
    receiver_receive: float
    receiver_check: float
    receiver_digest: float
    receiver_decode: float
    verify: float
    stage: float
    commit: float
    pause: float
    hold_wait: float
    copy: float
    total: float
    lanes: int
