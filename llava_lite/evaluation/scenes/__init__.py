"""Drawn scenes of colored shapes: the world of the embedded model, with questions and answers."""
