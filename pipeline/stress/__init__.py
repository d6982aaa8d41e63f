"""Inputs that evaluation data does not have, and the search for the worst."""
