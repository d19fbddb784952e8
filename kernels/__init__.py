"""The guidance step: candidate selection, reward scoring, logit reweighting. Needs torch (and triton) only.

Installed as ``pad_vllm.kernels``.
"""

from .reference import cap_and_scale, guide_, map_heads, reweight_, score_candidates, select_candidates

__all__ = ["cap_and_scale", "guide_", "map_heads", "reweight_", "score_candidates", "select_candidates"]
