"""Packages of pad-vllm; everything else is in pyproject.toml.

The top-level folders ``kernels/`` and ``benchmarks/`` are installed as ``pad_vllm.kernels`` and
``pad_vllm.benchmarks``: top-level packages of those names would be other projects'.
"""

from setuptools import find_packages, setup

# The synthetic world is what tests and a benchmark train on, in a clone. The demo's reward model, larger than all of
# this, is a package of its own: demo_model/.
ours = find_packages(include=["pad_vllm", "pad_vllm.*"], exclude=["pad_vllm.synthetic"])
setup(
    packages=[*ours, "pad_vllm.kernels", "pad_vllm.benchmarks"],
    package_data={
        "pad_vllm": ["py.typed"],
        "pad_vllm.demo": ["data/*.json"],
        "pad_vllm.explain": ["page/*"],
        "pad_vllm.playground": ["page/*"],
    },
    package_dir={"pad_vllm.kernels": "kernels", "pad_vllm.benchmarks": "benchmarks"},
)
