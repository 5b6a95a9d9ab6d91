"""Every message of the protocol as a typed header, its number on the wire and the limit of its body.

    fields       what they are made of
    connection   types 1 to 5: on any connection
    transfer     types 16 to 31: a version on its way
    questions    types 32 to 37: to a daemon
    session      types 48 to 64: between a daemon and a serving process

How a header is spelled, and what is refused about it, is in ``shipproto.headers``.
"""

from typing import Final

from shipproto.messages.connection import Auth, Body, Hello, Nack, Ping
from shipproto.messages.fields import Message
from shipproto.messages.questions import Describe, DescriptionIs, StatusIs, StatusRequest, VerifyIs, VerifyRequest
from shipproto.messages.session import (
    Arriving,
    Attach,
    Attached,
    Detach,
    DigestIs,
    DigestRequest,
    Evicted,
    Fill,
    Filled,
    Images,
    ImageSlot,
    LaidOut,
    Release,
    Stage,
    StageReady,
    Swap,
    Swapped,
    Unstage,
)
from shipproto.messages.transfer import (
    SAME,
    Abort,
    Coded,
    Commit,
    Committed,
    Data,
    Finish,
    Held,
    Join,
    Joined,
    Lend,
    Offer,
    Progress,
    Staged,
    StructureIs,
    StructureWanted,
    Want,
)

__all__ = [
    "BY_TYPE", "MESSAGES", "SAME", "Abort", "Arriving", "Attach", "Attached", "Auth", "Body", "Coded", "Commit",
    "Committed", "Data", "Describe", "DescriptionIs", "Detach", "DigestIs", "DigestRequest", "Evicted", "Fill",
    "Filled", "Finish", "Held", "Hello", "ImageSlot", "Images", "Join", "Joined", "LaidOut", "Lend", "Message", "Nack",
    "Offer", "Ping", "Progress", "Release", "Stage", "StageReady", "Staged", "StatusIs", "StatusRequest", "StructureIs",
    "StructureWanted", "Swap", "Swapped", "Unstage", "VerifyIs", "VerifyRequest", "Want",
]  # fmt: skip

MESSAGES: Final[tuple[type[Message], ...]] = (
    *(Hello, Auth, Body, Nack, Ping),
    *(Offer, StructureWanted, StructureIs, Want, Data, Progress, Finish, Staged, Commit, Committed, Abort),
    *(Join, Joined, Coded, Held, Lend),
    *(StatusRequest, StatusIs, VerifyRequest, VerifyIs, Describe, DescriptionIs),
    *(Attach, Attached, Images, Fill, Filled, Arriving, Stage, StageReady, Swap, Swapped, Unstage),
    *(Release, Evicted, DigestRequest, DigestIs, Detach, LaidOut),
)
"""In the order of their numbers."""
BY_TYPE: Final = {message.TYPE: message for message in MESSAGES}
