"""Four models, four serving processes each, pushes without a pause, and everything killed at random: ``python -m
tests.load --seconds 300``. The suite does half a minute of it.

    versions   a model whose answers say which version each of its rows is of
    parties    what runs in the forked processes: serving with readers, and sending
    pushing    who pushes, and how every push ended
    fleet      the daemon and the serving processes: started, killed, stopped, brought back
    census     what each process has: memory, descriptors, threads, images
    running    the whole of it, and what must hold at its end
"""
