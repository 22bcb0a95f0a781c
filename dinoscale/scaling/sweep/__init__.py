"""Scaling sweeps: from one file to runs, a fitted law and the configuration to train next."""
