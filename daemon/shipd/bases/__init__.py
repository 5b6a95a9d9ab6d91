"""What a sender keeps of versions that a receiver has committed, so that the next push can be a delta.

    base         what a base is, and who knows some
    patch        the difference of a chunk from an older one
    history      one model's newest version and the way back to a few older ones, in memory
    store        the histories of all models of the process, within a bound
    checkpoint   a base out of a checkpoint file or a state dict
    cache        the last committed version of each model, on disk
    cache_file   one version in a file: how it is laid out, written and proved
    cache_folder the folder of such files: whose it is, and what gives way

A base is only ever an opinion about what the receiver holds. A wrong one costs its use and nothing else: what a
receiver makes of a delta is digested before it is committed.
"""
