"""The ``vllm.general_plugins`` hook: vLLM runs it in every process before an engine is configured there."""

from pad_vllm import channel
from pad_vllm.frontend import collector, patches
from pad_vllm.worker import patches as worker_patches


def register() -> None:
    """Make the engines' folder of announcements; let this process refuse and count what a frontend should, and draft
    as a worker should."""
    channel.make_folder()
    patches.install()
    collector.register_collector()
    worker_patches.install()
