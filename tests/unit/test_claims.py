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
