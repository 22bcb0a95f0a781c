"""Start a run on several nodes: the exact command line, and a look at every node before it.

hostfile.py reads who takes part, commands.py writes the line, nodes.py asks each node over ssh,
probe.py answers there, verdicts.py says what is wrong. The training itself is `dinoscale train`.
"""
