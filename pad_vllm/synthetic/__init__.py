"""A language of a few hundred words whose answers can be checked exactly, and models trained on it: for tests."""
