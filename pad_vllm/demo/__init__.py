"""The demo: a small world in which preferences can be seen in the text, and models trained on it in minutes."""
