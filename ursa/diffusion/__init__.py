"""Mathematics on token ids and t; torch only."""
