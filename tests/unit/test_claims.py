"""Which connection takes a chunk, when several bring it."""

import threading

from shipproto.claims import Claims
from tests.support.link import handshaken

ONE, OTHER = handshaken()


def test_the_first_claim_wins_until_it_is_given_up() -> None:
    claims = Claims()
    assert claims.claim(3, ONE)
    assert not claims.claim(3, OTHER)
    assert not claims.claim(3, ONE), "not twice by the same connection either, while it arrives"
    assert claims.claim(4, OTHER)
    assert claims.give_up(ONE) == [3]
    assert claims.claim(3, OTHER)


def test_what_is_held_is_never_taken_again() -> None:
    claims = Claims()
    claims.claim(0, ONE)
    assert not claims.hold(0, OTHER), "it was not its to bring"
    assert claims.hold(0, ONE)
    assert not claims.hold(0, ONE), "and is held once"
    assert not claims.claim(0, OTHER)
    claims.damaged(0, ONE)
    assert claims.give_up(ONE) == []
    assert not claims.claim(0, OTHER)
    claims.forget(0)
    assert claims.claim(0, OTHER)


def test_a_damaged_chunk_is_anybodys() -> None:
    claims = Claims()
    claims.claim(0, ONE)
    claims.damaged(0, OTHER)
    assert not claims.claim(0, OTHER), "only whoever brought it can say that it is damaged"
    claims.damaged(0, ONE)
    assert claims.claim(0, OTHER)
    assert not claims.hold(7, ONE)
    claims.damaged(7, ONE)
    claims.forget(7)


def test_a_run_is_claimed_as_a_whole_or_not_at_all() -> None:
    claims = Claims()
    assert claims.claim(3, OTHER)
    assert claims.claim_run(range(2, 5), ONE, 7) == 2
    assert claims.claim(2, OTHER), "nothing is left of it"
    assert claims.claim_run(range(2, 4), ONE, 8) == 0
    assert claims.claim_run(range(4, 9), ONE, 9) == 5
    assert claims.give_up(ONE) == [4, 5, 6, 7, 8]


def test_a_run_that_is_being_decoded_is_nobodys() -> None:
    claims = Claims()
    run = range(3)
    assert claims.claim_run(run, ONE, 7) == 3
    for chunk, connection, sequence in ((0, OTHER, 7), (0, ONE, 8), (3, ONE, 7)):
        assert not claims.decode_run(range(chunk, chunk + 1), connection, sequence)
    claims.damaged(1, ONE)
    assert not claims.hold(1, ONE), "its chunks do not arrive one by one"
    assert claims.decode_run(run, ONE, 7)
    assert not claims.decode_run(run, ONE, 7), "once"
    assert claims.give_up(ONE) == []
    claims.drop_run(run)
    assert claims.claim_run(run, OTHER, 1) == 3
    assert claims.decode_run(run, OTHER, 1)
    claims.hold_run(run)
    assert claims.give_up(OTHER) == []
    claims.forget(1)
    assert claims.claim_run(run, ONE, 2) == 1
    assert claims.claim(1, ONE)


def test_of_many_threads_that_bring_runs_one_gets_each_chunk() -> None:
    """Or none does, where they overlap at the same time: then each has it come again."""
    claims = Claims()
    chunks, threads = 20_000, 4
    together = threading.Barrier(threads)
    won: list[list[range]] = [[] for _ in range(threads)]

    def run(at: int) -> None:
        together.wait(30)
        for first in range(at, chunks, 3):
            taken = range(first, min(first + 5, chunks))
            if claims.claim_run(taken, (ONE, OTHER)[at % 2], first * threads + at) == len(taken):
                won[at].append(taken)

    running = [threading.Thread(target=run, args=(at,)) for at in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    got = [chunk for runs in won for taken in runs for chunk in taken]
    assert got
    assert len(got) == len(set(got))
    assert len(claims._claims) == len(got), "nothing is claimed that nobody has"


def test_of_many_threads_one_gets_each_chunk() -> None:
    claims = Claims()
    chunks, threads = 20_000, 8
    together = threading.Barrier(threads)
    won: list[list[int]] = [[] for _ in range(threads)]

    def run(at: int) -> None:
        together.wait(30)
        for chunk in range(chunks):
            if claims.claim(chunk, (ONE, OTHER)[at % 2]):
                won[at].append(chunk)

    running = [threading.Thread(target=run, args=(at,)) for at in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert sorted(chunk for chunks_of in won for chunk in chunks_of) == list(range(chunks))
