"""Pre-flight: is this machine, or this allocation, fit for the run? Nothing is trained.

Each module looks on every rank (plain facts, gathered once) and judges the facts of all ranks with
pure functions, so that every rank comes to the same verdicts. `examine.py` holds the order.
"""
