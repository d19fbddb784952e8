"""The ``vllm.general_plugins`` hook: vLLM runs it in every process before an engine is configured there."""

from pad_vllm import admission, frontend, metrics


def register() -> None:
    """Make the engines' folder of announcements, and let this process refuse and count what a frontend should."""
    admission.make_folder()
    frontend.install()
    metrics.register_collector()
