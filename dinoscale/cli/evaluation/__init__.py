"""The command line of `dinoscale evaluate`: a module for each kind of task."""
