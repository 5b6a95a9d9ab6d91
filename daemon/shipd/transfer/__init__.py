"""Moving frames: the shells around the sans-I/O connection, one for each kind of event loop or thread."""
