"""Evaluation on whole data sets: suites say what is asked and what is right, the engine asks."""
