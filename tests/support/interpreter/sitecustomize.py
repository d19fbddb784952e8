"""Model Runner V2 on a CPU, in every process of a server: this folder in PYTHONPATH, and TRITON_INTERPRET=1.

vLLM asks Triton for an active back end before it takes V2; the interpreter needs none.
"""

import types

import triton.backends

triton.backends.backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True))
