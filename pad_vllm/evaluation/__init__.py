"""Measuring what guidance does to answers, beside the other ways to personalize them."""
