"""The process and its surroundings: ranks, launchers, memory, signals, logs, output files."""
