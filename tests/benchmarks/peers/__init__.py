"""Rivals, each as a Sender and a Receiver that tests.benchmarks.pair leads through a transfer."""
