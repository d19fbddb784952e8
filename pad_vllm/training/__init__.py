"""Learning a personalized reward model (PAD, arXiv 2410.04070)."""
