"""What a run will need before it is queued: memory, time and communication, without a GPU."""
