"""Computers for AI agents that wait: the public names and nothing else."""
