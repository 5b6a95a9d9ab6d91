pytest_plugins = ["tests.support.serving_process"]
from tests.support.processes import push
from tests.support.serving_process import state, right_answer


def test_smoke(start_daemon, serve):
    d = start_daemon(models={})
    a = serve(d.config.socket)
    b = serve(d.config.socket, mode="flip", version=3)
    assert a.ask("answer") == right_answer(0) == b.ask("answer")
    a.ask("read", ["hold", "forward", "tasks"])
    for n in range(1, 30):
        r = push(f"127.0.0.1:{d.port}", state(n), label=f"v{n}")
        assert r.swapped == 2
    print(r)
    print(a.ask("read_stop"))


def test_two(start_daemon, serve):
    d = start_daemon(models={})
    a = serve(d.config.socket)
