"""The same protocol, served on this machine."""
