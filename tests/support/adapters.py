"""LoRA adapters by peft on the small decoder, saved and loaded as peft does it."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.support.decoder import gpt2


@contextmanager
def _of_peft() -> Iterator[None]:
    """peft asks transformers in a way that transformers warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _config(modules_to_save: Sequence[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=4,
        target_modules=["c_attn"],
        # The adapters of an untrained LoRA change nothing; these are random as after some training.
        init_lora_weights=False,
        # GPT-2 has its weights transposed.
        fan_in_fan_out=True,
        modules_to_save=list(modules_to_save) or None,
        task_type="CAUSAL_LM",
    )


def adapted(seed: int, *, names: Sequence[str] = ("default",), modules_to_save: Sequence[str] = ()) -> Any:
    """The decoder ``gpt2(0)`` with random adapters by ``seed``; the first is in use."""
    from peft import get_peft_model

    base = gpt2(0)
    with _of_peft(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = get_peft_model(base, _config(modules_to_save), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, _config(modules_to_save))
        # What is saved beside the adapters begins as a copy of the base's; training would have moved it.
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += torch.randn_like(parameter) / 4
    return model.eval()


def loaded(folder: Path, *, name: str = "default") -> Any:
    """The decoder ``gpt2(0)`` with what is saved in ``folder``, as peft loads it."""
    from peft import PeftModel

    with _of_peft():
        return PeftModel.from_pretrained(gpt2(0), folder, adapter_name=name).eval()


def is_adapter(name: str) -> bool:
    """Whether a tensor of an adapted model is one of those that peft saves."""
    return ".lora_" in name or ".modules_to_save." in name
