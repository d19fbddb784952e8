"""What of a launch Triton must not compile in, or requests would compile kernels anew: what follows from how many rows
a step has, how they lie in memory, and what its requests ask for. For ``triton.jit``, of all kernels here."""

COUNTS = [
    *("num_keys", "num_contexts", "num_all", "num_drafts"),
    *("top_k_stride", "beta_stride", "reference_stride", "output_stride"),
    *("has_bound", "max_divergence_stride"),
]
"""Numbers: whether one is 1, or divisible by 16."""
ROW_POINTERS = [
    *("rows_ptr", "top_k_ptr", "beta_ptr", "reference_ptr", "end_ids_ptr", "contexts_ptr", "weights_ptr"),
    *("slots_ptr", "output_ptr", "output_rows_ptr", "output_begin_ptr", "output_end_ptr", "draft_ids_ptr"),
    *("key_offsets_ptr", "max_divergence_ptr", "row_positions_ptr"),
]
"""Pointers of which a program reads an element or two: how they are aligned."""
