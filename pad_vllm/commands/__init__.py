"""The parts of the ``pad-vllm`` command: a file each, with ``add_arguments`` and ``run``, imported when asked for."""
