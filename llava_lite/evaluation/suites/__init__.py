"""The data sets: one file for each, and the parts they share."""
