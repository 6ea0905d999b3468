"""Pixels in, numbers out: local paths and arrays only, never an object store."""
