"""Images: versions laid out in shared memory, and who may be reading which."""
