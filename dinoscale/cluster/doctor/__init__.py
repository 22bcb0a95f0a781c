"""Check whether this machine, or this allocation, is fit for a run. Nothing is trained.

In each module every rank looks at its own facts, which are gathered once; pure functions judge the
facts of all ranks, so that every rank reaches the same verdicts. `examine.py` holds the order.
"""
