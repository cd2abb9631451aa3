"""What goes over the wire, against what the vendors' SDKs send and what their services may answer."""
