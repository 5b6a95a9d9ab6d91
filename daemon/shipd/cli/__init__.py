"""The command line: shipctl."""
