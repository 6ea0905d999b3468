"""Mathematics on token ids and t; torch, numpy and scipy, no model, configuration or store."""
