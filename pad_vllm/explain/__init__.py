"""One prompt under several settings, token by token: ``pad-vllm explain``."""
