"""Checkpoints by URL: fetched into a temporary file without a name, and read from there as any other file is.

    location     what a URL says, and what of it may be shown
    server       what is asked of every kind of server, and the two ways in which it may fail
    web          http and https, over the standard library
    answers      what an answer of HTTP means
    connections  connections of HTTP: direct and through proxies, kept and reused
    filesystem   every other scheme, through fsspec
    spool        the temporary file
    download     of one file what is there, what is under way, and what is to be fetched next
    fetching     the threads that fetch, for all files of one push
    file         a file of a checkpoint whose bytes are still arriving
    opening      from a URL to such a file

A tensor of a safetensors file can be read as soon as its own bytes are there; every other kind is read when all are.
Only ``web`` and what is below it import http.client, and only ``filesystem`` imports fsspec; both are imported for the
URLs that need them.
"""
