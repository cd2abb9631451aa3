"""Sandboxes' images: written, sealed, kept, counted and opened again."""
