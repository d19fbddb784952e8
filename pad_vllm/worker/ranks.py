"""Check that all tensor-parallel ranks have the same configuration. On several machines each reads its own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta

from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store
from vllm.distributed import get_tp_group

from pad_vllm.checks import shown_name
from pad_vllm.config import PADConfig

PLACES = ("reward_model", "heads", "adapter_base", "adapters")
"""Keys that name paths, which may differ between machines."""

TIMEOUT = timedelta(minutes=30)
"""Ranks of Model Runner V2 come here when they have loaded the base model, some later than others."""


def read_alike(read: Callable[[], PADConfig | None]) -> PADConfig | None:
    """The configuration, where every rank has read the same: ranks that guide unlike requests, or of which only some
    guide, would wait for each other for ever. A rank that guides nothing waits for nobody.

    Raises:
        ValueError: one could not read it, or read another, or says nothing.
    """
    config, failure = None, ""
    try:
        config = read()
    except ValueError as error:
        failure = str(error)
    group = get_tp_group()
    store = PrefixStore(f"pad/{group.ranks}", _get_default_store())
    store.set(str(group.rank_in_group), json.dumps((failure, said(config))))
    if failure:
        raise ValueError(failure)
    if config is not None:
        of_ranks = [_said_by(rank, store) for rank in range(group.world_size)]
        for rank, theirs in enumerate(of_ranks):
            check_alike(of_ranks[0], theirs, rank)
    return config


def _said_by(rank: int, store: PrefixStore) -> dict[str, str]:
    try:
        store.wait([str(rank)], TIMEOUT)
    except RuntimeError:
        raise ValueError(
            f"pad: rank {rank} has not reported its configuration within {TIMEOUT}; every machine of an engine "
            "needs the plugin and the same --logits-processors"
        ) from None
    failure, theirs = json.loads(store.get(str(rank)))
    if failure:
        raise ValueError(f"on rank {rank}: {failure}")
    return theirs


def check_alike(first: dict[str, str], theirs: dict[str, str], rank: int) -> None:
    """Raise ValueError for a setting of ``rank`` that differs from rank 0's."""
    for key in first | theirs:
        if first.get(key) != theirs.get(key):
            values = [shown_name(values.get(key, "nothing")) for values in (first, theirs)]
            raise ValueError(
                f"pad{key}: rank 0 has {values[0]}, but rank {rank} has {values[1]}; every machine of an engine "
                "needs the same additional_config and the same files"
            )


def said(config: PADConfig | None) -> dict[str, str]:
    """The settings of a rank by key: everything that decides how a request is guided."""
    if config is None:
        return {"": "nothing"}
    values = {f".{f.name}": getattr(config, f.name) for f in fields(config) if f.init and f.name not in PLACES}
    values |= {f".personas[{name!r}]": persona for name, persona in values.pop(".personas").items()}
    values |= {f".adapters[{name!r}]": "" for name in config.adapters}
    values[".reward_model"] = (config.source.is_served, config.source.is_adapter)
    return {"": "a configuration"} | {key: repr(value) for key, value in values.items()}
