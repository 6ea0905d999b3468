"""Looking after the data of runs: verify, repair, count, show, and try other thresholds."""
