"""Start a run on several nodes: check every node, then execute the exact command line.

hostfile.py reads the nodes, start.py chooses how to start, commands.py writes the command line,
ask_nodes.py asks each node over ssh, node_probe.py answers there, judge_nodes.py reports faults.
The training itself is `dinoscale train`.
"""
