"""What a process stands on: ranks, launchers, memory, signals, logs, and files that outlive it."""
