"""Trains the nested levels of an artifact of `nestor compress` against its full level."""
