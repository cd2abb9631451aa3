"""Runs inside the sandbox; imports nothing of the other rooms."""
