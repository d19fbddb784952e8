"""What the processes of engines have in common, imported once; see :mod:`pad_vllm.evaluation.engine`."""

import vllm.entrypoints.llm
import vllm.v1.engine.core  # noqa: F401
