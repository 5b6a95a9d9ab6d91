"""The names under which peft saves adapters: those of the model without the adapter's name.

As peft 0.21 has it: ``get_peft_model_state_dict`` takes the adapter's name off where it is the last component of a name
or the last but one ("q.lora_A.default.weight", "q.lora_embedding_A.default"), "weight" off a magnitude vector, and
"modules_to_save" with the adapter's name out of the names of modules that are trained and saved as a whole. Prompts are
saved as "prompt_embeddings". What is added to base models has a prefix of its own for each method.
"""

import re
from collections.abc import Sequence
from typing import Final

_PREFIXES: Final = (
    *("adamss", "beft", "boft", "c3a", "deft", "delora", "fourierft", "frod", "glora", "gralora", "hada", "hira"),
    *("hra", "ia3", "lily", "ln_tuning", "lokr", "lora", "miss", "oft", "osf", "peanut", "poly", "psoft", "pvera"),
    *("randlora", "road", "shira", "supertuning", "tinylora", "trainable_tokens", "unilora", "vblora", "vera"),
    "waveft",
)
"""Of the parameters and modules that the methods of peft add to a model."""

MARKERS: Final = rf"(?:(?:{'|'.join(_PREFIXES)})_[^.\n]*|modules_to_save|prompt_encoder)"
"""The component after which the name of an adapter comes."""

_NAMED: Final = re.compile(rf"(?m)(?:^|\.){MARKERS}\.([^.\n]+)(?=\.|$)")

_PARAMETERS: Final = ("weight", "bias")
"""What comes after a marker in models without adapters' names, merged or written by hand."""

MOST: Final = 16
"""Adapters that are tried; nobody serves more in one process and pushes one without saying to which."""


def adapters_in(names: Sequence[str]) -> list[str]:
    """The names of the adapters in a model, sorted, at most MOST."""
    text = "\n".join(names)
    found = set(_NAMED.findall(text)) if "_" in text else set()
    return sorted(found.difference(_PARAMETERS))[:MOST]


def saved_names(names: Sequence[str], adapter: str) -> list[str]:
    """What peft calls each of ``names`` when it saves that adapter."""
    name = re.escape(adapter)
    text = "\n".join(names)
    for pattern, replacement in (
        (rf"(?m)\.modules_to_save\.{name}\.", "."),
        (rf"(?m)(^|\.)prompt_encoder\.{name}\.embedding\.weight$", r"\1prompt_embeddings"),
        (rf"(?m)(\.lora_magnitude_vector\.{name})\.weight$", r"\1"),
        (rf"(?m)(\.peanut_(?:encoders|decoders))\.{name}\.", r"\1."),
        (rf"(?m)\.{name}((?:\.[^.\n]+)?)$", r"\1"),
    ):
        text = re.sub(pattern, replacement, text)
    return text.split("\n") if names else []
