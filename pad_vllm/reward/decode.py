"""The forward of a step in which every context is up to date: a token for each row, on buffers that stay in place.

What a step has in common with the one before it is not made again: views of the buffers, by how many rows there are,
and the rows' block tables, as long as the rows are the same and no context got another block. Where each row is one
token further, and the host knows it, a step only counts up.

Where the platform has CUDA graphs, rows are padded to one of a few sizes, and a graph of each is captured at the start,
by the pattern of vLLM's ``v1/worker/gpu/cudagraph_utils.py``. Tests run the padding, and a GPU the capture. On a CPU
nothing is padded: it would compute rows for nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import graph_capture
from vllm.logger import init_logger
from vllm.model_executor.offloader.base import get_offloader
from vllm.utils.torch_utils import current_stream
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from pad_vllm.reward.adapters import NO_ADAPTER, ContextAdapters
from pad_vllm.reward.block_manager import BlockManager
from pad_vllm.reward.pace import ALONE
from pad_vllm.reward.paged_model import ForwardBatch, PagedModel
from pad_vllm.reward.row_kernel import can_launch, write_rows
from pad_vllm.reward.rows import ContextRows

logger = init_logger(f"vllm.{__name__}")

_ONE = torch.ones((), dtype=torch.int32, device="cpu")
"""Made once: torch makes a tensor of each Python number that it adds."""


@dataclass
class DecodeRows:
    """Rows of one token each. Those behind a step's are padding: the null block's first token."""

    input_ids: torch.Tensor
    """[R] int32"""
    places: torch.Tensor
    """[2, R] int64: positions in the contexts, and slots of the KV cache (vLLM's slot mapping)"""
    seq_lens: torch.Tensor
    """[R] int32"""
    block_table: torch.Tensor
    """[R, max_num_blocks] int32"""
    block_indices: torch.Tensor
    """[R] int64: which of its context's blocks the row's token is in"""
    block_ids: torch.Tensor
    """[R] int32: that block"""
    offsets: torch.Tensor
    """[R] int64: what lies between a position and its slot"""
    bounds: torch.Tensor
    """[R] int32, on the host: at least ``seq_lens``"""

    def __post_init__(self) -> None:
        self.positions, self.slot_mapping = self.places
        # Views, as gather wants them.
        self.block_index_column, self.block_id_column = self.block_indices.unsqueeze(1), self.block_ids.unsqueeze(1)
        self.host_bounds = self.bounds.numpy()  # the same memory

    @classmethod
    def padding(cls, num_rows: int, max_num_blocks: int, device: torch.device) -> DecodeRows:
        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(num_rows, *shape, dtype=dtype, device=device)

        return cls(
            input_ids=zeros(torch.int32),
            places=torch.zeros(2, num_rows, dtype=torch.int64, device=device),
            seq_lens=zeros(torch.int32) + 1,
            block_table=zeros(torch.int32, max_num_blocks),
            block_indices=zeros(torch.int64),
            block_ids=zeros(torch.int32),
            offsets=zeros(torch.int64),
            bounds=torch.ones(num_rows, dtype=torch.int32),
        )

    def __getitem__(self, rows: slice) -> DecodeRows:
        """A view of some of them."""
        others = {field.name: getattr(self, field.name)[rows] for field in fields(self) if field.name != "places"}
        return DecodeRows(places=self.places[:, rows], **others)

    def batch(self, model: PagedModel) -> ForwardBatch:
        """Their forward, which may be run again and again."""
        num_rows = len(self.input_ids)
        batch = ForwardBatch(
            input_ids=self.input_ids,
            positions=self.positions,
            slot_mapping=self.slot_mapping,
            query_start_loc=model.arange[: num_rows + 1],
            query_start_loc_cpu=model.arange_cpu[: num_rows + 1],
            max_query_len=1,
            seq_lens=self.seq_lens,
            seq_lens_upper_bound=self.bounds,
            seq_lens_known=True,
            max_seq_len=model.max_model_len,
            block_table=self.block_table,
        )
        batch.context = model.forward_context(batch)
        return batch

    def pad_(self) -> None:
        """Make padding of them."""
        for tensor in (self.input_ids, self.places, self.block_table):
            tensor.zero_()
        self.seq_lens.fill_(1)
        self.bounds.fill_(1)


class Decoder:
    """Runs the rows of steps, one token each.

    Args:
        model: the reward model.
        blocks: who holds which of its blocks.
        max_num_rows: most rows of a step.
        adapters: which of them each context is read through, if there are any.
    """

    def __init__(
        self, model: PagedModel, blocks: BlockManager, max_num_rows: int, adapters: ContextAdapters | None = None
    ) -> None:
        self.model, self.blocks, self.max_num_rows = model, blocks, max_num_rows
        self.adapters = adapters or ContextAdapters(None, 0, model.device)
        self.sizes: Sequence[int] = [size for size in model.graph_sizes if size <= max_num_rows]
        """Ascending: how many rows a forward has, padding included. Beyond the last one nothing is padded."""
        self._all = DecodeRows.padding(max_num_rows, blocks.table.shape[1], model.device)
        self._rows: dict[int, DecodeRows] = {}  # the first so many
        self._batches: dict[int, ForwardBatch] = {}  # of so many
        self._num_rows = 0  # of the last step
        self._last: tuple[torch.Tensor | None, int] = None, 0  # row_slots of the last step, and its blocks' version
        self._step = ALONE  # that step
        self._max_seq_len = 0  # of rows in these blocks
        self._numbers: torch.Tensor | None = None  # the adapter of each
        self._hidden_states: torch.Tensor | None = None  # of padded forwards: [max_num_rows, hidden_size]
        self._graphs: dict[int, Captured] = {}
        self.pool: tuple[int, int] | None = None
        """Of the memory in which graphs compute. Nothing in it outlives a replay, so other graphs of the reward model
        may compute there too"""
        if can_launch(model.device):
            self._compile()
        if self.sizes:
            try:
                self._capture()
            except Exception as error:
                logger.warning(
                    "PAD: CUDA graphs of the reward model could not be captured, so its steps are slower: %r", error
                )
                self.sizes, self._graphs = (), {}

    def forward(self, rows: ContextRows) -> torch.Tensor:
        """Compute rows, at most ``max_num_rows``, whose contexts hold their blocks.

        Returns:
            [R, hidden_size] hidden states. Those of a padded forward are where the last step's were.
        """
        num_rows = rows.row_slots.shape[0]
        size = self._size(num_rows)
        batch = self._batch(size)
        if num_rows < self._num_rows:
            self._all[num_rows : self._num_rows].pad_()
        self._num_rows = num_rows
        self._write(self._first(num_rows), rows)
        batch.max_seq_len, batch.seq_lens_known = self._max_seq_len, rows.lengths is not None
        batch.adapters = self._numbers
        if not self.sizes:
            return self.model.forward(batch)
        if size in self._graphs:
            self.model.prepare(batch)  # back ends plan the step, in buffers of theirs that the graph reads
            replay_graph(self._graphs[size])
        else:
            self._keep(self.model.forward(batch))
        assert self._hidden_states is not None  # kept now, or when the graph was captured
        return self._hidden_states[:num_rows]

    def _write(self, first: DecodeRows, rows: ContextRows) -> None:
        version, follows = self.blocks.version, rows.step == self._step + 1
        same = self._last[0] is rows.row_slots and self._last[1] == version
        self._step = rows.step
        if same and follows:
            first.input_ids.copy_(rows.token_ids)
            first.places.add_(_ONE)
            first.seq_lens.add_(_ONE)
            if self.model.plans_by_bound:
                first.bounds.add_(_ONE)
            return
        if rows.lengths is None and can_launch(rows.row_slots.device):
            return self._write_by_kernel(first, rows, same)
        first.input_ids.copy_(rows.token_ids)
        positions = rows.device_positions()
        if not same:
            torch.index_select(self.blocks.table, 0, rows.row_slots, out=first.block_table)
            self._note_blocks(rows)
        if not same or rows.lengths is None:
            block_size = self.blocks.block_size
            torch.floor_divide(positions, block_size, out=first.block_indices)
            torch.gather(first.block_table, 1, first.block_index_column, out=first.block_id_column)
            first.offsets.copy_(first.block_ids).sub_(first.block_indices).mul_(block_size)
        torch.add(positions, first.offsets, out=first.slot_mapping)
        first.positions.copy_(positions)
        first.seq_lens.copy_(positions).add_(1)
        if rows.lengths is None:
            first.bounds.fill_(int(rows.num_tokens.array().max()))
        else:
            lengths = rows.lengths.array()
            if not self.model.plans_by_bound:  # the ends of the last blocks serve too, and are not counted up
                lengths = -(-lengths // self.blocks.block_size) * self.blocks.block_size
            first.bounds.copy_(torch.from_numpy(lengths))

    def _adapters_of(self, rows: ContextRows) -> torch.Tensor | None:
        """[R, padding included] int64. A graph has adapters in it, whether rows have some or not."""
        numbers = self.adapters.of(rows.slots, rows.row_slots)
        num_rows = rows.row_slots.shape[0]
        if not (self.sizes and self.adapters.is_there):
            return numbers
        padded = self.adapters.numbers.new_full((self._size(num_rows),), NO_ADAPTER)
        padded[:num_rows] = NO_ADAPTER if numbers is None else numbers
        return padded

    def _write_by_kernel(self, first: DecodeRows, rows: ContextRows, same: bool) -> None:
        """As :meth:`_write`, of rows whose positions only the device knows."""
        assert rows.positions is not None  # the host does not know them
        if not same:
            self._note_blocks(rows)
        out = first.input_ids, first.positions, first.slot_mapping, first.seq_lens, first.block_table
        blocks = self.blocks
        write_rows(rows.row_slots, rows.positions, rows.token_ids, blocks.table, blocks.block_size, not same, out)
        first.host_bounds[:] = rows.num_tokens.array().max()

    def _note_blocks(self, rows: ContextRows) -> None:
        """The block tables that are written are those of rows."""
        self._last = rows.row_slots, self.blocks.version
        self._numbers = self._adapters_of(rows)
        num_blocks = -(-int(rows.num_tokens.array().max()) // self.blocks.block_size)
        self._max_seq_len = min(num_blocks * self.blocks.block_size, self.model.max_model_len)

    def _size(self, num_rows: int) -> int:
        at = bisect_left(self.sizes, num_rows)
        return self.sizes[at] if at < len(self.sizes) else num_rows

    def _first(self, num_rows: int) -> DecodeRows:
        if num_rows not in self._rows:
            self._rows[num_rows] = self._all[:num_rows]
        return self._rows[num_rows]

    def _batch(self, num_rows: int) -> ForwardBatch:
        if num_rows not in self._batches:
            self._batches[num_rows] = self._first(num_rows).batch(self.model)
        return self._batches[num_rows]

    def _keep(self, hidden_states: torch.Tensor) -> None:
        if self._hidden_states is None:
            self._hidden_states = hidden_states.new_empty(self.max_num_rows, hidden_states.shape[1])
        self._hidden_states[: hidden_states.shape[0]] = hidden_states

    @torch.inference_mode()
    def _compile(self) -> None:
        """Launch what steps of rows whose positions only the device knows launch; of padding."""
        table, first = self.blocks.table, self._first(1)
        out = first.input_ids, first.positions, first.slot_mapping, first.seq_lens, first.block_table
        no_slot = torch.full_like(first.positions, len(table) - 1)
        for dtype in (torch.int32, torch.int64):  # of the runner's tokens, and of drafts
            token_ids = torch.zeros_like(no_slot, dtype=dtype)
            write_rows(no_slot, torch.zeros_like(no_slot), token_ids, table, self.blocks.block_size, True, out)

    @torch.inference_mode()
    def _capture(self) -> None:
        """Capture a forward of each size, of padding alone; the largest first, as the others fit into its memory."""
        # Not vLLM's: in that, what the base model's later graphs keep could lie where these compute.
        self.pool, config = torch.cuda.graph_pool_handle(), self.model.vllm_config
        with set_current_vllm_config(config), graph_capture(device=self.model.device):
            for size in reversed(self.sizes):
                batch = self._batch(size)  # as long as can be, so that the graph serves every length
                batch.adapters = torch.zeros_like(batch.positions) if self.adapters.is_there else None
                self._keep(self.model.run(batch, self.model.prepare(batch, for_capture=True)))  # warms up
                attn_metadata = self.model.prepare(batch, for_capture=True)

                def launch(batch: ForwardBatch = batch, known: dict[str, Any] = attn_metadata) -> None:
                    self._keep(self.model.run(batch, known))

                self._graphs[size] = capture_graph(launch, self.pool, config)
        logger.info("PAD: captured CUDA graphs of the reward model for %s rows.", ", ".join(map(str, self.sizes)))


class Captured(NamedTuple):
    """A CUDA graph, and what must live as long as it does."""

    graph: torch.cuda.CUDAGraph
    scratch: Sequence[torch.Tensor | None]
    """vLLM's workspaces, in which some kernels (of experts, of MLA) compute. When the base model needs a larger one,
    vLLM lets go of these, which the graph still writes to"""


def capture_graph(launch: Callable[[], None], pool: tuple[int, int] | None, vllm_config: VllmConfig) -> Captured:
    """A graph of what ``launch`` launches, which must hold a forward of the reward model; within ``graph_capture``."""
    graph = torch.cuda.CUDAGraph()
    get_offloader().sync_prev_onload()
    with capture_pool(pool, vllm_config) as of, torch.cuda.graph(graph, of, stream=current_stream()):
        launch()
        get_offloader().join_after_forward()
    workspaces = current_workspace_manager()._current_workspaces if is_workspace_manager_initialized() else ()
    return Captured(graph, tuple(workspaces))


def replay_graph(captured: Captured) -> None:
    """Launch all that is in a graph of :func:`capture_graph`."""
    get_offloader().sync_prev_onload()
    captured.graph.replay()
