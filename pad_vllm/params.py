"""The arguments of a request: their types and ranges, and how they combine with a persona."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pad_vllm.checks import check_int, check_number, check_numbers, check_text, did_you_mean, shown, shown_name

if TYPE_CHECKING:
    import vllm

PREFIX = "pad_"
ADMITTED = f"{PREFIX}admitted"
"""Key of what admission itself adds to a request's arguments (:class:`pad_vllm.personas.Admitted`)."""
MAX_BETA = 100.0
MAX_DIVERGENCE = 1000.0
"""Nats. Guidance never moves a token so far, so a request with this value has no bound."""
MAX_PREFERENCES = 8
"""Of one request; and adapters."""
MAX_CONTEXTS = MAX_PREFERENCES + 1
"""That the reward model reads for one request: one for each preference, and one without."""
MAX_PREFERENCE_CHARS = 8192
"""Of all preferences of a request together. Other requests wait while these are tokenized, hence a first bound."""
MAX_PREFERENCE_TOKENS = 1024
"""Of all preferences of a request together, even if the reward model has room for more."""
REFERENCES = ("base", "neutral", "none")
"""What a reward is measured against: the base model, the reward model without the preference, or nothing."""
MAX_CACHE_SALT_CHARS = 128
"""As vLLM's own bound of ``cache_salt``."""
MAX_TRACE_CHARS = 128
"""Of an id that a client gives a request."""
MAX_LOGIT_BIAS = 1024
"""Tokens that a guided request may bias: what Model Runner V2 has room for."""


def check_one_or_more(key: str, value: Any, wanted: str, each: str) -> str | tuple[str, ...]:
    """``value`` if it is a text or a list of texts, these as a tuple; else ValueError naming ``key``.

    ``wanted`` and ``each`` are its words for the two, and for the texts of a list.
    """
    if not isinstance(value, (list, tuple)):
        if not isinstance(value, str):
            raise ValueError(f"{key}={shown(value)}: must be {wanted}, not {type(value).__name__}")
        return check_text(key, value)
    if not 0 < len(value) <= MAX_PREFERENCES:
        raise ValueError(f"{key}: a list of {len(value)} {each}; from 1 to {MAX_PREFERENCES} are allowed")
    return tuple(check_text(f"{key}[{i}]", text) for i, text in enumerate(value))


def as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Of one text, several, or none."""
    value = () if value is None else value
    return (value,) if isinstance(value, str) else value


def check_adapters(names: Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError for a name that is none of ``known``, with the closest one."""
    for name in names:
        if name not in known:
            raise ValueError(f"pad_adapter={shown(name)}: no such adapter; {did_you_mean(name, known)}")


def check_num_chars(preferences: Sequence[str]) -> None:
    """Raise ValueError for more text than a request may bring along."""
    if (num_chars := sum(map(len, preferences))) > MAX_PREFERENCE_CHARS:
        raise ValueError(
            f"pad_preference: {num_chars} characters, at most {MAX_PREFERENCE_CHARS} are allowed in a request; longer "
            "texts are for personas (pad.personas)"
        )


def check_preference_weights(weights: tuple[float, ...], num_preferences: int, what: str = "preferences") -> None:
    """Raise ValueError unless there is one weight for each preference, or adapter."""
    if num_preferences == 0:
        raise ValueError("pad_preference_weights: there is no preference to weigh; give pad_preference too")
    if len(weights) != num_preferences:
        raise ValueError(
            f"pad_preference_weights: {len(weights)} weights for {num_preferences} {what}; give one for each"
        )


def check_reference(key: str, value: Any) -> str:
    """``value`` if it is one of :data:`REFERENCES`; else ValueError naming ``key``."""
    if not isinstance(value, str) or value not in REFERENCES:
        raise ValueError(f"{key}={shown(value)}: must be one of {', '.join(REFERENCES)}")
    return value


def check_weights(weights: tuple[float, ...], head_names: tuple[str, ...]) -> None:
    """Raise ValueError unless there is one weight for each value head."""
    if not head_names:
        raise ValueError("pad_weights: the reward model has no value heads")
    if len(weights) != len(head_names):
        raise ValueError(
            f"pad_weights: {len(weights)} weights for {len(head_names)} value heads ({', '.join(head_names)}); give "
            "one for each, in this order"
        )


def check_logit_bias(logit_bias: Mapping[int, float] | None) -> None:
    """Raise ValueError for more biased tokens than there is room for."""
    if logit_bias and len(logit_bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"logit_bias: {len(logit_bias)} tokens; a guided request may bias at most {MAX_LOGIT_BIAS}")


def check_persona(name: str, known: Iterable[str], key: str = "pad_persona") -> str:
    """``name`` if it is one of ``known``; else ValueError with the closest one."""
    if name not in known:
        raise ValueError(f"{key}={shown(name)}: no such persona; {did_you_mean(name, known)}")
    return name


def is_ours(key: Any) -> bool:
    """Whether a request's argument was meant for PAD: it has the prefix, in any case and with any dash."""
    key = str(key)
    if not LIKE_OURS.match(key):
        return False
    name = key.strip().lower().replace("-", "_")
    return name.startswith(PREFIX) or name == "pad" or is_known(key)


def is_known(key: Any) -> bool:
    """Whether a request's argument is one of PAD's, in any case and with any separators between its words."""
    key = str(key)
    return bool(LIKE_OURS.match(key)) and _BETWEEN_WORDS.sub("", key).lower() in _KNOWN


LIKE_OURS = re.compile(r"[\W_]*p[\W_]*a[\W_]*d", re.IGNORECASE)
"""The beginning of all such names. It rules out most other names at once."""
_BETWEEN_WORDS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class PAD:
    """A request's guidance, as Python; ``extra_args`` and ``vllm_xargs`` say the same with the prefix ``pad_``.

    Args:
        preference: text for the reward model to read, or a list of up to eight texts, each read in its own context.
        persona: name of one of the server's personas; fields set here replace the persona's.
        weights: one weight for each of the reward model's value heads.
        beta: guidance strength. 0 gives the base model on its top-k; 1 lets the reward model choose among them.
        top_k: how many of the base model's most likely next tokens are candidates.
        preference_weights: one weight for each of the m preferences or adapters; by default, 1/m each. A weight below 0
            asks for less of it.
        reference: what the reward is measured against: ``base``, the base model; ``neutral``, the reward model without
            the preference; or ``none``.
        cache_salt: only requests with the same salt share blocks of the reward model's KV cache. A salt alone does not
            turn guidance on.
        adapter: name of one of the server's adapters of the reward model, or a list of up to eight. Context i reads
            preference i (or the only one, or none) through adapter i (or the only one).
        max_divergence: bound, in nats, on each token's KL divergence from the guided to the unguided distribution over
            the candidates. Guidance is then as strong as the bound allows, at most ``beta``. 0 gives the base model on
            its top-k.
        trace: the client's own id of the request, for the server's traces. An id alone does not turn guidance on.

    Raises:
        ValueError: a value has the wrong type or is out of range.

    Example:
        >>> PAD(preference="Be concise.", beta=1.2).extra_args()
        {'pad_preference': 'Be concise.', 'pad_beta': 1.2}
    """

    preference: str | tuple[str, ...] | None = None
    persona: str | None = None
    weights: tuple[float, ...] | None = None
    beta: float | None = None
    top_k: int | None = None
    preference_weights: tuple[float, ...] | None = None
    reference: str | None = None
    cache_salt: str | None = None
    adapter: str | tuple[str, ...] | None = None
    max_divergence: float | None = None
    trace: str | None = None

    def __post_init__(self) -> None:
        def normalize(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.preference is not None:
            wanted = "a string or a list of them"
            normalize("preference", check_one_or_more("pad_preference", self.preference, wanted, "texts"))
        if self.persona is not None:
            check_text("pad_persona", self.persona)
        if self.beta is not None:
            normalize("beta", check_number("pad_beta", self.beta, 0, MAX_BETA))
        if self.max_divergence is not None:
            bound = check_number("pad_max_divergence", self.max_divergence, 0, MAX_DIVERGENCE)
            normalize("max_divergence", bound)
        if self.top_k is not None:
            check_int("pad_top_k", self.top_k, 1)
        if self.weights is not None:
            normalize("weights", check_numbers("pad_weights", self.weights, "value head"))
        if self.preference_weights is not None:
            weights = check_numbers("pad_preference_weights", self.preference_weights, "preference")
            normalize("preference_weights", weights)
        if self.reference is not None:
            check_reference("pad_reference", self.reference)
        if self.cache_salt is not None:
            check_text("pad_cache_salt", self.cache_salt, MAX_CACHE_SALT_CHARS)
        if self.trace is not None:
            check_text("pad_trace", self.trace, MAX_TRACE_CHARS)
        if self.adapter is not None:
            wanted = "a name or a list of names"
            normalize("adapter", check_one_or_more("pad_adapter", self.adapter, wanted, "names"))
        if self.num_contexts and self.preference_weights is not None:  # whose lists must be of one length
            has_list = isinstance(self.preference, tuple) or isinstance(self.adapter, tuple)
            if has_list or self.persona is None:  # else the persona may have the other one
                self.check_preference_weights()

    @property
    def asks_for_guidance(self) -> bool:
        """Whether it sets anything beside ``cache_salt`` and ``trace``."""
        return self != PAD(cache_salt=self.cache_salt, trace=self.trace)

    @property
    def preferences(self) -> tuple[str, ...]:
        """However many there are."""
        return as_tuple(self.preference)

    @property
    def adapters(self) -> tuple[str, ...]:
        """However many there are."""
        return as_tuple(self.adapter)

    @property
    def read_preferences(self) -> tuple[str, ...]:
        """Those that the reward model reads: not those whose weights add up to 0."""
        num, totals = max(self.num_contexts, 1), dict[tuple[str, str], float]()
        texts, adapters = (one * num if len(one) < 2 else one for one in (self.preferences, self.adapters or ("",)))
        for text, adapter, weight in zip(texts, adapters, self.preference_weights or (1.0,) * num, strict=False):
            totals[text, adapter] = totals.get((text, adapter), 0.0) + weight
        return tuple(dict.fromkeys(text for (text, _), total in totals.items() if total))

    @property
    def num_contexts(self) -> int:
        """Contexts for its preferences and adapters: the length of a list, if one is given; 0 if neither is set.

        Raises:
            ValueError: two lists of different length.
        """
        lengths = [len(value) for value in (self.preference, self.adapter) if isinstance(value, tuple)]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"pad_adapter: {lengths[1]} adapters for {lengths[0]} preferences; give one for each, or one for all"
            )
        return lengths[0] if lengths else int(self.preference is not None or self.adapter is not None)

    def check_preference_weights(self) -> None:
        """Raise ValueError unless there is one weight, if any, for each context."""
        if self.preference_weights is not None:
            what = "preferences" if self.adapter is None else "contexts"
            check_preference_weights(self.preference_weights, self.num_contexts, what)

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> PAD | None:
        """Read the ``pad_*`` keys of a request; None when there is none. Other keys are other plugins' business.

        Raises:
            ValueError: an unknown ``pad_*`` key, or a value with the wrong type or out of range.
        """
        given = {key: value for key, value in (extra_args or {}).items() if is_ours(key) and key != ADMITTED}
        known = {PREFIX + field.name for field in fields(cls)}
        for key, value in given.items():
            if key not in known:
                raise ValueError(f"{shown_name(key)}: no such argument; {did_you_mean(str(key).lower(), known)}")
            if value is None:
                raise ValueError(f"{key}=None: leave it out instead")
        return cls(**{key.removeprefix(PREFIX): value for key, value in given.items()}) if given else None

    def extra_args(self) -> dict[str, Any]:
        """What ``vllm.SamplingParams(extra_args=...)`` or an OpenAI client's ``vllm_xargs`` takes."""
        given = {PREFIX + field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if v is not None}

    def over(self, persona: PAD) -> PAD:
        """This request's fields, and where it is silent the persona's; whose weights are of its own preferences, or of
        its own adapters.

        Raises:
            ValueError: weights for another number of preferences or adapters, or lists of different length.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if "adapter" in given or ("preference" in given and not isinstance(persona.adapter, tuple)):
            persona = replace(persona, preference_weights=None)
        merged = replace(persona, **given)
        merged.check_preference_weights()
        return merged


_KNOWN = frozenset("pad" + field.name.replace("_", "") for field in fields(PAD))


class Reading(NamedTuple):
    """What one context of a request is read with."""

    preference: str | None = None
    adapter: str | None = None


NEUTRAL = Reading()
"""Without a preference, and through no adapter."""


@dataclass(frozen=True)
class GuidanceParams:
    """A request's guidance, resolved: persona looked up, defaults filled in."""

    preferences: tuple[str, ...]
    """One for each context; or none"""
    preference_weights: tuple[float, ...]
    """One for each context; (1.0,) where there is neither preference nor adapter: of the base model's own prompt"""
    weights: tuple[float, ...] | None
    beta: float
    top_k: int
    """0: rows are left alone, and a context is there to be drafted from."""
    reference: str
    cache_salt: str | None = None
    adapters: tuple[str, ...] = ()
    """One for each context; or none"""
    max_divergence: float | None = None
    """None: no bound"""
    persona: str | None = None
    trace: str | None = None

    @property
    def guides(self) -> bool:
        return self.top_k > 0

    @property
    def readings(self) -> list[Reading]:
        """One for each of the weights, whether it is read or not."""
        nothing = (None,) * len(self.preference_weights)
        return [Reading(*one) for one in zip(self.preferences or nothing, self.adapters or nothing, strict=True)]

    def contexts(self) -> dict[Reading, float]:
        """What the reward model reads, and how much of it counts.

        The reward is their weighted sum, less :attr:`base_weight` of the base model's log probability.
        """
        contexts: dict[Reading, float] = {}
        for reading, weight in zip(self.readings, self.preference_weights, strict=True):
            contexts[reading] = contexts.get(reading, 0.0) + weight
        if self.reference == "neutral":
            contexts[NEUTRAL] = contexts.get(NEUTRAL, 0.0) - sum(self.preference_weights)
        read_at_all = {reading: weight for reading, weight in contexts.items() if weight}
        return read_at_all or {NEUTRAL: 0.0}

    def places(self) -> list[int | None]:
        """Of each of :attr:`readings` its place in :meth:`contexts`; None: it is not read."""
        read = list(self.contexts())
        return [read.index(reading) if reading in read else None for reading in self.readings]

    @property
    def base_weight(self) -> float:
        return sum(self.preference_weights) if self.reference == "base" else 0.0

    def as_read(self) -> GuidanceParams:
        """Itself; where all that it would read cancels, the same without a reward, of a context that is read and may be
        full like any other."""
        if any(self.contexts().values()):
            return self
        return replace(self, preferences=(), adapters=(), preference_weights=(1.0,), beta=0.0, reference="none")


def SamplingParams(*args: Any, logits_processors: Iterable[PAD] | None = None, **kwargs: Any) -> vllm.SamplingParams:
    """``vllm.SamplingParams``, with ``logits_processors=[PAD(...)]`` as the per-request API had it.

    Returns:
        A plain ``vllm.SamplingParams`` whose ``extra_args`` ask for the guidance.

    Raises:
        ValueError: more than one processor, one that is not a :class:`PAD`, or ``pad_*`` keys in ``extra_args`` too.

    Example:
        >>> SamplingParams(temperature=0.7, logits_processors=[PAD(preference="concise, formal")])
    """
    import vllm

    processors = [logits_processors] if isinstance(logits_processors, PAD) else list(logits_processors or ())
    if len(processors) > 1 or not all(isinstance(p, PAD) for p in processors):
        raise ValueError(
            f"logits_processors={shown(processors)}: must be one PAD(...); for several preferences, give PAD a list "
            "of them"
        )
    if processors:
        extra_args = dict(kwargs.get("extra_args") or {})
        if clash := [key for key in extra_args if is_ours(key)]:
            raise ValueError(
                f"guidance is given twice, by {shown(clash)} in extra_args and by PAD(...) in logits_processors; "
                "remove one"
            )
        asked = processors[0].extra_args()
        if not asked:
            raise ValueError("PAD() is empty: give a preference, persona, weights, beta or top_k")
        kwargs["extra_args"] = extra_args | asked
    return vllm.SamplingParams(*args, **kwargs)
