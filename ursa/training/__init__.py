"""Fitting the tokenizers and training the three stages."""
