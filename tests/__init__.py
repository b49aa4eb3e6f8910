"""A package, so that another one named ``tests``, which some wheels install, does not take its place."""
