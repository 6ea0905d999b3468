"""`ursa merge`: weights and an adapter become plain weights."""

from pathlib import Path

from ursa.cli.models import model_directory


def merge(adapter: Path, *, model: str, out: Path) -> None:
    """Merge a LoRA adapter into a copy of a model, which then needs no peft.

    Example: ursa merge adapter --model models:/ursa@champion --out merged

    Args:
        adapter: Directory with adapter_config.json and adapter_model.safetensors, such as the
            `adapter/` of a model that was trained with stages.*.lora.
        model: What the adapter was trained on: a directory, a name on the hub, or
            models:/NAME@ALIAS, as in `ursa generate`; a `transformer/` alone will do.
        out: Directory to make; it must not exist.

    Raises:
        ConfigError: If there is no model or adapter, they do not fit, or `out` exists.
    """
    from ursa.generation.files import find_directory
    from ursa.model.adapters import merge_adapter

    with model_directory(model) as directory:
        merge_adapter(find_directory(directory), adapter, out)
    print(out)
