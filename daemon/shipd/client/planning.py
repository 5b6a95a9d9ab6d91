"""How a push comes by its plan: the daemon is asked what the model consists of, before anything is offered to it.

A plan that led to a commit is remembered, so that whoever pushes a model again and again asks once. Where it leaves
tensors out, on either side, or casts some, the daemon is asked all the same, which is a short question with a short
answer: what was left out may have a place by now, casting may not be allowed any more, and nothing else would tell.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NamedTuple

from shipd.checkpoints.planned import planned
from shipd.checkpoints.source import Source
from shipd.client.questions import Questioner
from shipd.errors import MappingError, MemoryLimit, PeerError, Refused, ShipError, Stalled
from shipd.matching.diagnosis import refusal
from shipd.matching.plan import Plan, Rules, make_plan
from shipd.matching.renames import Rename, Rule, Table, parse_rename, table_of
from shipd.transfer.faults import peer_error
from shipd.units import format_bytes
from shipproto.capabilities import DESCRIBE
from shipproto.description import POLICIES, Description, decode_description
from shipproto.errors import ProtocolError
from shipproto.messages import Describe, DescriptionIs
from shipproto.structure import Structure

Policy = Literal["strict", "subset", "partial"]

Renames = str | Sequence[str | Rename] | Mapping[str, str]
"""A rule "regex=replacement" or several, or names of the model by names of the checkpoint."""

_MOST: Final = 16
"""Plans that are remembered: of as many models and daemons that are pushed to in turns."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user says of how a checkpoint and a model may differ; None leaves it to the daemon's configuration."""

    policy: Policy | None = None
    cast: bool | None = None
    renames: tuple[Rename, ...] = ()

    @property
    def any(self) -> bool:
        """Whether anything is wished for that a daemon which describes no models could not give."""
        return self.policy not in (None, "strict") or bool(self.cast) or bool(self.renames)

    def rules(self, description: Description) -> Rules:
        """What applies to a model that is described so. Raises Refused where its daemon allows less."""
        allowed = description.policy or POLICIES[-1]
        policy = self.policy or description.policy or POLICIES[0]
        if policy not in POLICIES or allowed not in POLICIES:
            raise PeerError(f"model {description.model!r} has the policy {allowed!r}, which this release does not know")
        if POLICIES.index(policy) > POLICIES.index(allowed):
            raise Refused(
                f"model {description.model!r} takes pushes of policy {allowed!r} at most, and this one is {policy!r}: "
                f"push with that policy, or have another put into {_table(description.model)} of the daemon's "
                "configuration and the daemon reloaded",
                model=description.model,
            )
        cast = bool(description.cast) if self.cast is None else self.cast
        if cast and description.cast is False:
            raise Refused(
                f"model {description.model!r} takes no casts: push a checkpoint of the model's own dtypes, or have "
                f"cast = true put into {_table(description.model)} of the daemon's configuration and the daemon "
                "reloaded",
                model=description.model,
            )
        return Rules(policy=policy, cast=cast, renames=self.renames)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What planning came to.

    plan         None where the daemon does not say what the model consists of: then it is offered as it is
    description  None as well, and where the plan is a remembered one
    remembered   the plan was made for an earlier push
    seconds      that it took, but for opening connections
    bytes_sent   of the question
    """

    plan: Plan | None = None
    rules: Rules = field(default_factory=Rules)
    transient: Structure | None = None
    description: Description | None = None
    remembered: bool = False
    seconds: float = 0.0
    bytes_sent: int = 0

    @property
    def partial(self) -> bool:
        """Whether tensors of the model keep their values."""
        return self.plan is not None and self.plan.partial

    @property
    def goes_stale(self) -> bool:
        """Whether the plan may be wrong by the next push, and the daemon would take that push all the same: it leaves
        tensors of either side out, or casts some."""
        return self.plan is not None and bool(self.plan.kept or self.plan.ignored or self.plan.casts)

    def applied_to(self, source: Source) -> Source:
        """``source`` as it is to be offered. Another one than was planned for, a base, gets a plan of its own; where
        it does not fit, it stays what it is."""
        plan = self.plan
        if plan is None:
            return source
        if plan.offered.digest != source.structure.digest:
            assert self.transient is not None
            plan = make_plan(source.structure, plan.resident, self.transient, self.rules)
        return source if plan.problems else planned(source, plan)


class _Key(NamedTuple):
    where: str
    model: str
    structure: bytes
    wishes: Wishes


_lock: Final = threading.Lock()
_remembered: Final[dict[_Key, Outcome]] = {}


class Planner:
    """Of one push to ``where``, the daemon's address; ``seconds`` are for each answer of the daemon."""

    def __init__(self, questioner: Questioner, where: str, model: str, wishes: Wishes, seconds: float) -> None:
        self._questioner = questioner
        self._where = where
        self._model = model
        self._wishes = wishes
        self._seconds = seconds

    def plan(self, source: Source) -> Outcome:
        """The plan for ``source``. Raises ShipError; TensorMismatch where it does not fit the model."""
        with _lock:
            known = _remembered.get(self._key(source))
        if known is not None and not known.goes_stale:
            return known
        outcome = self.look(source, known)
        plan = outcome.plan
        if plan is not None and plan.problems:
            served = model_class(outcome.description)
            error = refusal(plan, model=self._model, origin=source.origin, model_class=served)
            error.peer = self._where
            raise error
        return outcome

    def look(self, source: Source, known: Outcome | None = None) -> Outcome:
        """As ``plan``, but from the daemon in any case, and problems are the plan's. Raises ShipError.

        ``known`` is what planning for that source came to before.
        """
        began, sent, opening = time.monotonic(), self._questioner.bytes_sent, self._questioner.open_seconds
        outcome = self._look(source, known)
        return replace(
            outcome,
            seconds=time.monotonic() - began - (self._questioner.open_seconds - opening),
            bytes_sent=self._questioner.bytes_sent - sent,
        )

    def _look(self, source: Source, known: Outcome | None) -> Outcome:
        before = known.plan if known is not None else None
        likely = source.structure if before is None else before.resident
        description = self.describe(likely)
        if description is None:
            if self._wishes.any:
                raise PeerError(
                    f"the daemon at {self._where} is of an older release, which does not say what its models consist "
                    "of: push without a policy, casts and renames, or update it",
                    peer=self._where,
                )
            return Outcome()
        rules = self._wishes.rules(description)
        try:
            resident, transient = description.resident(likely), description.transients()
        except ProtocolError as error:
            raise peer_error(error, self._where) from error
        if resident is None:
            if self._wishes.any:
                # Without a model names would stay as they are, and a part would be taken for a whole.
                raise Refused(
                    f"nothing is known yet of what model {self._model!r} consists of, so that there is nothing to "
                    "match names with, cast to or keep: attach the process that serves it first, or push a whole "
                    "version without a policy, casts and renames",
                    model=self._model,
                    peer=self._where,
                )
            return Outcome(description=description)
        plan = before
        if plan is None or (resident, transient.digest, rules) != (plan.resident, plan.transient.digest, plan.rules):
            plan = make_plan(source.structure, resident, transient, rules)
        if plan.problems and not description.processes and not self._wishes.any:
            # Nothing serves it, so that a version of another structure may take the place of the one there is.
            return Outcome(description=description)
        if plan.partial and not plan.problems and not description.version:
            raise Refused(
                f"model {self._model!r} has no version yet whose tensors could keep their values: push a whole one "
                "first",
                model=self._model,
                peer=self._where,
            )
        return Outcome(plan, rules, transient, description)

    def check_size(self, source: Source, outcome: Outcome) -> None:
        """Raise MemoryLimit where the daemon would refuse what is to be sent, for all of its bytes."""
        plan, description = outcome.plan, outcome.description
        if description is None or (plan is not None and plan.problems):
            return
        size = source.structure.total_bytes if plan is None else plan.nbytes
        for limit, key in (
            (description.limit, f"max_bytes in {_table(self._model)}"),
            (description.memory_limit, "memory_limit"),
        ):
            if 0 < limit < size:
                raise MemoryLimit(
                    f"model {self._model!r} may have {format_bytes(limit)}, and this version has {format_bytes(size)}: "
                    f"raise {key} of the daemon's configuration, and have the daemon reloaded",
                    model=self._model,
                    peer=self._where,
                )

    def describe(self, known: Structure | None = None) -> Description | None:
        """What the daemon says of the model; None where it is of a release that says nothing. Raises ShipError.

        The structure is left out where it is ``known``.
        """
        if DESCRIBE not in self._questioner.lane.connection.peer.capabilities:
            return None
        question = Describe(model=self._model, structure=b"" if known is None else known.digest)
        try:
            body = self._questioner.ask(question, DescriptionIs, self._seconds)
        except Stalled as error:
            raise Stalled(
                f"{self._where} did not say in time what model {self._model!r} consists of ({error})",
                peer=self._where,
                model=self._model,
            ) from error
        except ShipError as error:
            error.model = self._model
            raise
        try:
            return decode_description(body)
        except ProtocolError as error:
            raise peer_error(error, self._where) from error

    def remember(self, source: Source, outcome: Outcome) -> None:
        """``outcome`` has led to a commit."""
        if outcome.plan is None or outcome.remembered:
            return
        key = self._key(source)
        with _lock:
            _remembered.pop(key, None)
            _remembered[key] = Outcome(outcome.plan, outcome.rules, outcome.transient, remembered=True)
            while len(_remembered) > _MOST:
                del _remembered[next(iter(_remembered))]

    def forget(self, source: Source) -> None:
        """The plan that is remembered for ``source`` is not right any more."""
        with _lock:
            _remembered.pop(self._key(source), None)

    def _key(self, source: Source) -> _Key:
        return _Key(self._where, self._model, source.structure.digest, self._wishes)


def as_renames(renames: Renames | None) -> tuple[Rename, ...]:
    """``renames`` as a user gives them, parsed. Raises MappingError."""
    if isinstance(renames, Mapping):
        return (table_of(renames, "renames"),) if renames else ()
    if isinstance(renames, str):
        return (parse_rename(renames),)
    found: list[Rename] = []
    for rename in renames or ():
        if not isinstance(rename, str | Rule | Table):
            raise MappingError(
                f"renames has {rename!r:.100}, which is no rule: rules are texts such as '^model\\.=', and names that "
                "are mapped one by one are a dict"
            )
        found.append(parse_rename(rename) if isinstance(rename, str) else rename)
    return tuple(found)


def _table(model: str) -> str:
    """Where the configuration says something of the model. In quotes, since names may have dots."""
    return f'[models."{model}"]'


def model_class(description: Description | None) -> str:
    """What the model is where it is served; empty where nobody says."""
    processes = description.processes if description is not None else ()
    return next((process.model_class for process in processes if process.model_class), "")
