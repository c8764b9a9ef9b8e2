"""Drills: faults on the processes of a running installation, and how long it takes to recover."""
