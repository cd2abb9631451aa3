"""Programs that are run inside a root file system, by whatever Python it has; never imported here."""
