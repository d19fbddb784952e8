"""The reward model: how a preference enters it, its loading, its paged KV cache, its forward, its value heads.

Knows nothing of the PAD rule and nothing of which runner vLLM uses.
"""
