"""The demo: SmolLM2 answers in English for users of different tastes, and each answer is measured."""
