"""Published and own sets of selection rules as YAML, read by `ursa.video.recipes`."""
