"""Codecs for the chunks of a version: bytes and arrays in, bytes out. No sockets, no torch, nothing of a transfer."""
