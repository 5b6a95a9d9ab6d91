"""``python -m tests.demo``: a real model answers questions without a break while its next versions are pushed to it.

__main__   starting, stopping and exit codes
story      the three pushes, and everything that must hold
screen     what it looks like
encoder    the model, the questions and the facts
trainer    v1, v2 and v3, and how each version must answer
serving    the process that serves: what a user of shipd would write
answers    the same process seen from here: every answer it gave, and whether it is right
"""
