"""The daemon: it listens, receives versions into images and leads serving processes from one to the next."""
