"""The services' own SDKs, unmodified, against one engine."""
