"""Look at what a reduction does, and find thresholds."""
