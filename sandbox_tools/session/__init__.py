"""Whose sandbox this is, and who is using it now."""
