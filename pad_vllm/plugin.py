"""The ``vllm.general_plugins`` hook: vLLM runs it in every process before an engine is configured there."""

from pad_vllm import channel
from pad_vllm.frontend import collector, patches


def register() -> None:
    """Make the engines' folder of announcements, and let this process refuse and count what a frontend should."""
    channel.make_folder()
    patches.install()
    collector.register_collector()
