"""Scaling sweeps: design and run many trainings, fit laws, recommend the next preset."""
