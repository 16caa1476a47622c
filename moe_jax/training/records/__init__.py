"""Records of a run: metric_log, recorder (of steps), console, plots, and the memory plan."""
