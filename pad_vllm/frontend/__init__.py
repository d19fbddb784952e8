"""What runs in the API server's process (and in ``LLM``'s): refusing requests, and showing the engines' numbers."""
