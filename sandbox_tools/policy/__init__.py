"""When to pause: pure, no I/O, no clock of its own."""
