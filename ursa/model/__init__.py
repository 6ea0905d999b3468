"""The network; torch and transformers only."""
