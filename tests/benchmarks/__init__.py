"""How fast shipd is, measured beside what else there is: ``make bench``, or ``python -m tests.benchmarks --help``.

    __main__, sections   the command line and the list of benchmarks
    side_by_side         shipd, a raw socket, gloo, torchft and Mooncake (peers/), taking turns
    small_tensors, daemon_memory, inference, growth
    codecs, codec_runs   what a step becomes, beside what others make of it (rivals/)
    steps, thin, loopback, stepping    successive steps, pushed: many of them, over a thin link, over a fast one
    workers, pair, shipd_side, payload, machine   the processes, what they ship, where they run
    rows, report, plot   what comes out: results.json, the tables, the pictures

Absolute figures of two runs are not comparable; ratios within one are.
"""
