"""Tasks: data sets whose rows become questions; `families` has one file per task family."""
