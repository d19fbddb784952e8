"""What tensor-parallel ranks must have in common. On several machines each reads files of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from vllm.distributed import get_tp_group

from pad_vllm.checks import shown_name
from pad_vllm.config import PADConfig

PLACES = ("reward_model", "heads", "adapter_base", "adapters")
"""Keys that say where something is, which may be elsewhere on another machine."""


def read_alike(read: Callable[[], PADConfig | None]) -> PADConfig | None:
    """The configuration, where every rank has read the same: ranks that guide unlike requests, or of which only some
    guide, would wait for each other for ever.

    Raises:
        ValueError: on all ranks: one could not read it, or read another.
    """
    config, failure = None, ""
    try:
        config = read()
    except ValueError as error:
        failure = str(error)
    group = get_tp_group()
    of_ranks: list[tuple[str, dict[str, str]]] = [("", {})] * group.world_size
    torch.distributed.all_gather_object(of_ranks, (failure, said(config)), group=group.cpu_group)
    if failure:
        raise ValueError(failure)
    for rank, (failed, theirs) in enumerate(of_ranks):
        if failed:
            raise ValueError(f"on rank {rank} of {group.world_size}: {failed}")
        first = of_ranks[0][1]
        for key in first | theirs:
            values = [shown_name(values.get(key, "nothing")) for values in (first, theirs)]
            if first.get(key) != theirs.get(key):
                raise ValueError(
                    f"pad{key}: rank 0 reads {values[0]} and rank {rank} {values[1]}; all machines of an engine need "
                    "the same additional_config, and the same files"
                )
    return config


def said(config: PADConfig | None) -> dict[str, str]:
    """What a rank was told, by its key: all that decides how a request is guided."""
    if config is None:
        return {"": "nothing"}
    values = {f".{f.name}": getattr(config, f.name) for f in fields(config) if f.init and f.name not in PLACES}
    values |= {f".personas[{name!r}]": persona for name, persona in values.pop(".personas").items()}
    values |= {f".adapters[{name!r}]": "" for name in config.adapters}
    values[".reward_model"] = (config.source.is_served, config.source.is_adapter)
    return {"": "a configuration"} | {key: repr(value) for key, value in values.items()}
