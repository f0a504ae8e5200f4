"""POST /score on Ray Serve."""
