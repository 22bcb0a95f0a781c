"""The sections of a run's configuration, and the types of their values."""
