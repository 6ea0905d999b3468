"""Pixels or text to ids and back."""
