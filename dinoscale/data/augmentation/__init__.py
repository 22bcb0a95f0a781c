"""Random crops and colours."""
