"""What guidance did to each request, summed on the device while it runs, and written when it is gone.

A step leaves its rows' values at their positions (:mod:`pad_vllm.kernels.tracing`). A logits processor is not told
which of its requests are gone for good, and which were only taken out of the batch: the worker's ``execute_model`` is
watched for that (:mod:`.patches`). Then the request's values are copied to the host, behind what the stream was told
to do, and a thread waits for them.
"""

from __future__ import annotations

import functools
import multiprocessing.util
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from pad_vllm.config import PADConfig
from pad_vllm.kernels import Trace
from pad_vllm.kernels.types import NUM_COUNTS, REFERENCE_BASE, REFERENCE_NONE
from pad_vllm.params import MAX_CONTEXTS, NEUTRAL, GuidanceParams
from pad_vllm.reward.device import HostCopy
from pad_vllm.stats import Stats
from pad_vllm.worker.batch import GuidedBatch, RequestSlot
from pad_vllm.worker.kept_rows import RowKeeper, row_keeper
from pad_vllm.worker.trace_files import TraceFiles, TraceWriter

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

logger = init_logger(f"vllm.{__name__}")

STEPS_KEPT = 4
"""At least this many of a request's last steps keep their rows apart: it ends in one of the last two, or three with
pipeline stages, and rows behind its end do not count."""

_all: weakref.WeakSet[Traces] = weakref.WeakSet()


class Generated(NamedTuple):
    """The last generated tokens of a request, as they are known when it is gone."""

    ids: list[int] | HostCopy
    """The last of its tokens; in a copy from the device the number of all of its tokens stands before them"""
    first: int | None
    """Position of the first of ``ids``; None: they are the last ones"""


@dataclass(eq=False)
class TraceRecord:
    """A guided request from its arrival until it is gone, in the batch or not."""

    params: GuidanceParams | None
    """None where they could not be resolved: it fails"""
    stop_ids: frozenset[int]
    max_tokens: int
    seconds_before: float
    """The engine's in guidance, when it came"""
    began: float = field(default_factory=time.monotonic)
    prompt_ids: list[int] = field(default_factory=list)
    slot: RequestSlot | None = None
    """Where its values are; None: nowhere yet, or they are parked"""
    parked: tuple[torch.Tensor, torch.Tensor] | None = None
    """Its values and positions, while another request has its slot"""
    output_ids: list[int] | None = None
    """The V1 runner's own list"""
    failed: bool = False


class Ended(NamedTuple):
    """What the thread makes a line of."""

    record: TraceRecord
    at: datetime
    seconds: float
    guidance_seconds: float
    values: HostCopy | None
    positions: HostCopy | None
    tail: Generated | None


def harmless(method: Callable) -> Callable:
    """A method of :class:`Traces` that may fail without a request's harm: what it was to do is lost."""

    @functools.wraps(method)
    def guarded(self: Traces, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception:
            self.num_errors += 1
            logger.exception("PAD lost a request's trace.")
            return None

    return guarded


class Traces:
    """The traces of an engine's requests.

    Args:
        config: says where to.
        vllm_config: the engine's.
        num_slots: of requests.
        rows_per_request: most in a step.
        stats: the engine's numbers.
        device: of the logits.
        decode: token ids -> text; None: lines have ids where text is asked for.
        writes: whether this rank is the one that writes. All of them add up, since they score together.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(
        self,
        config: PADConfig,
        vllm_config: VllmConfig,
        num_slots: int,
        rows_per_request: int,
        stats: Stats,
        device: torch.device,
        decode: Callable[[list[int]], str] | None,
        writes: bool,
    ) -> None:
        parallel = vllm_config.parallel_config
        num_places = rows_per_request * (STEPS_KEPT + parallel.pipeline_parallel_size - 1)
        keeper = row_keeper()
        if keeper is not None:
            num_places += keeper.max_tokens
        self.on_device = Trace(
            torch.zeros(num_slots, num_places, 2, NUM_COUNTS + MAX_CONTEXTS, device=device),
            torch.full((num_slots, num_places), -1, dtype=torch.int64, device=device),
            torch.full((num_slots,), REFERENCE_NONE, dtype=torch.int64, device=device),
            *[torch.zeros(1, dtype=torch.int64, device=device)] * 2,
            by_logits_row=bool(vllm_config.use_v2_model_runner),
        )
        self.vllm_config, self.stats = vllm_config, stats
        self.has_text = config.trace_text
        self.records: dict[str, TraceRecord] = {}  # by the engine's own id of a request
        self.owners: dict[RequestSlot, TraceRecord] = {}
        self.gone: list[str] = []
        self.runner: Callable[[], Any] = lambda: None
        self.read_tail: Callable[[TraceRecord], Generated | None] = lambda record: None
        self.num_errors = 0
        self.writer: TraceWriter | RowKeeper | None = None
        if keeper is not None:
            self.writer = keeper
            keeper.end_requests = self.end_all
            _all.add(self)
        elif writes:
            assert config.trace is not None  # there are traces
            engine = parallel.data_parallel_index
            files = TraceFiles(config.trace, engine, config.trace_file_bytes, config.trace_files)
            lines = Lines(stats, str(engine), vllm_config.model_config.max_model_len, decode, config.trace_text)
            self.writer = TraceWriter(files, lines.make)
            weakref.finalize(self, self.writer.close).atexit = False  # then what is left comes first
            multiprocessing.util.Finalize(None, _close, args=(weakref.ref(self),), exitpriority=20)
            _all.add(self)

    @property
    def num_places(self) -> int:
        """Of a request's last rows, kept apart."""
        return self.on_device.positions.shape[1]

    def attach(self, read_tail: Callable[[TraceRecord], Generated | None], show: Callable[[], None]) -> None:
        """Methods of the adapter, which knows requests' tokens, and shows the numbers. It holds this, and not the other
        way round."""
        read, shown = weakref.WeakMethod(read_tail), weakref.WeakMethod(show)
        self.read_tail = lambda record: alive(record) if (alive := read()) is not None else None
        if self.writer is not None:
            self.writer.when_idle = lambda: alive() if (alive := shown()) is not None else None

    def of_rows(self, batch: GuidedBatch) -> Trace:
        """Where a step's rows leave their values."""
        positions = batch.device_positions() if batch.logits_positions is None else batch.logits_positions
        return self.on_device._replace(slots=batch.layout.row_slots, row_positions=positions)

    @harmless
    def arrive(
        self, key: str | None, params: GuidanceParams | None, sampling_params: SamplingParams
    ) -> TraceRecord | None:
        """A request, new or back in the batch; None for one that is not traced."""
        if self.writer is None or key is None or (params is not None and not params.guides):
            return None
        if key not in self.records:
            stops = {*(sampling_params.stop_token_ids or ()), sampling_params.eos_token_id} - {None}
            self.records[key] = TraceRecord(
                params, frozenset(stops), sampling_params.max_tokens or 2**31, self.stats.step_seconds
            )
        return self.records[key]

    @harmless
    def begin(self, slot: RequestSlot, record: TraceRecord, prompt_ids: list[int]) -> None:
        """A request has a slot, with its values of before, if there are any."""
        if self.owners.get(slot) is not record:
            self.park(slot)
            where = self.on_device
            if record.slot is not None:
                self.park(record.slot)
            if record.parked is None:
                where.positions[slot] = -1
                where.values[slot] = 0.0
            else:
                where.values[slot], where.positions[slot] = record.parked
            assert record.params is not None  # it begins
            where.references[slot] = reference_of(record.params)
            self.owners[slot] = record
            record.slot, record.parked = slot, None
        record.prompt_ids = prompt_ids

    @harmless
    def park(self, slot: RequestSlot) -> None:
        """Another request takes a slot: keep the values that are there, if their request may come back."""
        record = self.owners.pop(slot, None)
        if record is not None:
            record.parked = self.on_device.values[slot].clone(), self.on_device.positions[slot].clone()
            record.slot = None

    def step_begins(self, runner: Any, finished: set[str]) -> None:
        """What the engine's worker is told of a step: which requests are gone for good."""
        self.runner = weakref.ref(runner)
        if self.records:
            self.gone += [key for key in sorted(finished) if key in self.records]

    def collect(self) -> None:
        """Have the lines of requests that are gone written. In the runner's stream, before their places are reused."""
        while self.gone:
            record = self.records.pop(self.gone.pop(0), None)
            if record is not None:
                self._end(record)

    def end_all(self) -> None:
        """As :meth:`collect`, of all requests: the engine has nothing to do, and will take no further step."""
        self.gone += list(self.records)
        self.collect()

    @harmless
    def _end(self, record: TraceRecord) -> None:
        values = positions = tail = None
        if record.slot is not None:
            where, slot = self.on_device, record.slot
            values, positions = HostCopy(where.values[slot]), HostCopy(where.positions[slot])
            tail = self.read_tail(record)
            self.owners.pop(slot, None)
        elif record.parked is not None:  # taken out of the batch before: all that it has is kept
            values, positions = (HostCopy(one) for one in record.parked)
        elif record.output_ids is not None:
            tail = Generated(list(record.output_ids), len(record.prompt_ids))
        assert self.writer is not None  # else there are no records
        seconds, guidance = time.monotonic() - record.began, self.stats.step_seconds - record.seconds_before
        self.writer.put(Ended(record, datetime.now(timezone.utc), seconds, guidance, values, positions, tail))

    def count(self) -> None:
        """Bring the engine's numbers up to date."""
        if self.writer is not None:
            self.stats.lost_traces = self.num_errors + self.writer.num_lost


def _close(traces: weakref.ref[Traces]) -> None:
    """A process ends, and what is in it."""
    alive = traces()
    if alive is not None and alive.writer is not None:
        alive.end_all()
        alive.writer.close()


def tell(runner: Any, finished: set[str]) -> None:
    """A worker's runner begins a step in which these requests are gone."""
    for traces in list(_all):
        if getattr(runner, "vllm_config", None) is traces.vllm_config:
            traces.step_begins(runner, finished)


def reference_of(params: GuidanceParams) -> int:
    """Of :attr:`~pad_vllm.kernels.Trace.references`."""
    if params.reference == "base":
        return REFERENCE_BASE
    read = list(params.contexts())
    return read.index(NEUTRAL) if params.reference == "neutral" and NEUTRAL in read else REFERENCE_NONE


class Lines:
    """JSON objects of what was summed; made by the writer's thread, which counts their totals in ``stats``."""

    def __init__(
        self,
        stats: Stats,
        engine: str,
        max_model_len: int,
        decode: Callable[[list[int]], str] | None,
        has_text: bool,
    ) -> None:
        self.stats, self.engine, self.max_model_len = stats, engine, max_model_len
        self.decode, self.has_text = decode, has_text

    def make(self, ended: Ended) -> dict[str, Any]:
        record, params = ended.record, ended.record.params
        output_ids = self._kept(ended)
        sums = self._sums(ended, None if output_ids is None else len(record.prompt_ids) + len(output_ids) - 1)
        tokens, changed, divergence = sums[:NUM_COUNTS].tolist()
        self.stats.traced_requests += 1
        self.stats.traced_tokens += tokens
        self.stats.changed_tokens += changed
        self.stats.divergence_nats += divergence
        line: dict[str, Any] = {
            "time": ended.at.isoformat(timespec="milliseconds"),
            "trace": params and params.trace,
            "engine": self.engine,
            "tokens": int(tokens),
            "changed": mean_of(changed, tokens),
            "divergence": mean_of(divergence, tokens),
            "rewards": None,
            "seconds": round(ended.seconds, 6),
            "guidance_seconds": round(ended.guidance_seconds, 6),
            "failed": record.failed,
        }
        if params is not None:
            line["rewards"] = [
                None if place is None else mean_of(float(sums[NUM_COUNTS + place]), tokens) for place in params.places()
            ]
            reference = "none" if reference_of(params) == REFERENCE_NONE else params.reference
            line |= {"persona": params.persona, "beta": params.beta, "top_k": params.top_k, "reference": reference}
            line |= {"weights": list(params.preference_weights), "heads": params.weights, "adapters": params.adapters}
        if self.has_text:
            line["preferences"] = params and list(params.preferences)
            line["prompt"] = self._text(record.prompt_ids)
            line["answer"] = None if output_ids is None else self._text([i for i in output_ids if i >= 0])
        return line

    def _text(self, ids: list[int]) -> str | list[int]:
        return ids if self.decode is None else self.decode(ids)

    def _kept(self, ended: Ended) -> list[int] | None:
        """The generated tokens that the request kept, as far as they are there: unknown ones are -1. None: nobody
        knows."""
        if ended.tail is None:
            return None
        record, (ids, first) = ended.record, ended.tail
        num_prompt = len(record.prompt_ids)
        if isinstance(ids, HostCopy):
            total, *ids = ids.tolist()
            first = total - len(ids) if first is None else first
            ids = ids[: total - first]
        assert first is not None
        before = first - num_prompt
        ids = [-1] * before + ids if before > 0 else ids[-before:] if before < 0 else ids
        ids = ids[: min(record.max_tokens, self.max_model_len - num_prompt)]
        end = next((i for i, token in enumerate(ids) if token in record.stop_ids), len(ids))
        return ids[: end + 1]

    @staticmethod
    def _sums(ended: Ended, end: int | None) -> np.ndarray:
        """[NUM_COUNTS + MAX_CONTEXTS] of the rows before position ``end``, at which the last token stands that the
        request kept; of all rows where it is not known."""
        if ended.values is None or ended.positions is None:
            return np.zeros(NUM_COUNTS + MAX_CONTEXTS)
        values, positions = np.array(ended.values.tolist()), np.array(ended.positions.tolist())
        is_kept = positions >= 0
        if end is not None:
            is_kept &= positions < end
        return values[:, 1].sum(0) + values[is_kept, 0].sum(0)


def mean_of(total: float, num: float) -> float | None:
    return round(total / num, 6) if num else None
