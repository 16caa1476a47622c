"""Tasks: data sets whose rows become questions; one file a family in `families`."""
