"""Packages of pad-vllm; everything else is in pyproject.toml.

The top-level folder ``kernels/`` is installed as ``pad_vllm.kernels``: a top-level package of that name belongs to
another project.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["pad_vllm", "pad_vllm.*"]), "pad_vllm.kernels"],
    package_dir={"pad_vllm.kernels": "kernels"},
)
