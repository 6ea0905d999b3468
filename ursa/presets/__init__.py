"""Presets: one complete YAML file each."""
