"""Where a push reads its tensors from: checkpoint files, by path or URL, and state dicts, all as one ``Source``.

    source            what a source is, and ``open_source``, which makes one from whatever a user hands over
    chunks            the chunks of a layout, read out of a source
    opened            an open file: typed errors, and noticing that it changed
    content           what a file is, judged by its bytes and never by its name
    directory         which file of a directory is its checkpoint
    sharded           checkpoints in several files with an index
    parts             several sources as one
    mapped            tensors that lie in a mapped file as they travel
    extents           where in their files tensors lie, for whoever can read the files itself
    safetensors_file  safetensors, memory-mapped and checked here; needs no torch
    npz_file          .npz archives of numpy; needs no torch
    hdf5_file         HDF5, through h5py; needs no torch
    arrays            arrays of numpy and h5py as tensors
    torch_file        torch.save, through torch's own loader with weights_only=True
    script_file       TorchScript archives, through torch.jit.load
    nested            state dicts inside what torch.save wrote
    state_dict        tensors in memory, on any device
    planned           a source as a plan has it: renamed, selected, cast
    cast              numbers of one dtype as those of another
    remote            files by URL, fetched while they are read
    waiting           what a thread does while it waits for what is being fetched
    wording           names and lists in messages, bounded

Only ``torch_file``, ``script_file``, ``nested``, ``cast`` and ``state_dict`` with what it consists of import torch, and
they are imported only when they are needed.
"""
