"""Records of a run: metric_log, recorder (of steps), plots, and the memory plan."""
