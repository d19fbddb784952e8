"""What the processes of V1 engines have in common, imported once; see Worker."""

from tests.support.engine import set_environment

set_environment("v1")

import vllm.entrypoints.llm  # noqa: E402
import vllm.v1.engine.core  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401
