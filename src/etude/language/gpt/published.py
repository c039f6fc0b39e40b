"""Published GPT-2 and GPT-1 weights, in Hugging Face's format, from a folder, a file or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from etude.blocks.tokens.text import BytePairs
from etude.core.errors import UserError
from etude.language.gpt.network import GPT, Architecture

__all__ = ["load_pretrained"]

# activation names of Hugging Face's configs; its GPT-1 says "gelu" and means the tanh form
_ACTIVATIONS = {
    "gpt2": {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"},
    "openai-gpt": {"gelu": "gelu_tanh", "relu": "relu"},
}


def load_pretrained(source: str | Path) -> tuple[GPT, BytePairs | None]:
    """Published GPT-2 (or GPT-1) weights in Hugging Face's format, in float32 and eval mode, with their tokenizer.

    Args:
        source: a folder with config.json and model*.safetensors (and, for the tokenizer, tokenizer.json or vocab.json
            with merges.txt; None is returned when they are missing), one such .safetensors file with config.json beside
            it, or an id on the Hugging Face hub such as "gpt2" (needs the package huggingface_hub).

    Raises UserError when something is missing or when the file describes a network that is not a GPT of this kind.
    """
    folder = Path(source)
    if folder.suffix == ".safetensors" and folder.is_file():
        files, folder = [folder], folder.parent
    else:
        folder = folder if folder.exists() else _download(str(source))
        files = sorted(folder.glob("model*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise UserError(f"no GPT weights in {folder}: it needs config.json and model.safetensors")
    published: dict[str, Tensor] = {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for file in files:
            published.update(load_file(file))
    except (ValueError, SafetensorError) as error:
        raise UserError(f"the files in {folder} cannot be read ({error}); are they complete?") from error
    of = _architecture(config, folder)
    with torch.device("meta"):
        model = GPT(of)
    weights = _rename(published, set(model.state_dict()), folder)
    for name, expected in model.state_dict().items():
        if weights[name].shape != expected.shape:
            raise UserError(
                f"{name} in {folder} is {tuple(weights[name].shape)}, config.json says {tuple(expected.shape)}"
            )
    model.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    model.requires_grad_(True)
    has_tokens = (folder / "tokenizer.json").is_file() or (folder / "merges.txt").is_file()
    return model.eval(), BytePairs.load(folder) if has_tokens else None


def _architecture(config: dict[str, Any], folder: Path) -> Architecture:
    sizes = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    absent = [size for size in sizes if not isinstance(config, dict) or not isinstance(config.get(size), int)]
    if absent:
        raise UserError(f"config.json in {folder} gives no number for {', '.join(absent)}")
    kind = config.get("model_type", "gpt2")
    if kind not in _ACTIVATIONS:
        raise UserError(f"{folder} holds a model of type {kind!r}; only gpt2 and openai-gpt are GPTs of this kind")
    first = kind == "openai-gpt"
    named = config.get("afn" if first else "activation_function", "gelu" if first else "gelu_new")
    if named not in _ACTIVATIONS[kind]:
        raise UserError(f"{folder} uses the activation {named!r}; known are {', '.join(_ACTIVATIONS[kind])}")
    standard = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for key, value in (standard | {"tie_word_embeddings": True}).items():
        if config.get(key, value) != value:
            raise UserError(f"{folder} sets {key} to {config[key]}; this GPT only has {value}")
    return Architecture(
        vocabulary=config["vocab_size"],
        context=config["n_positions"],
        layers=config["n_layer"],
        heads=config["n_head"],
        width=config["n_embd"],
        hidden=config.get("n_inner"),
        norm_placement="post" if first else "pre",
        activation=_ACTIVATIONS[kind][named],
        epsilon=config.get("layer_norm_epsilon", 1e-5),
    )


def _rename(published: dict[str, Tensor], wanted: set[str], folder: Path) -> dict[str, Tensor]:
    """Bring the spellings in circulation to ours and refuse any other difference.

    The first GPT-2 files leave out the prefix `transformer.` and store the causal masks (`attn.bias`,
    `attn.masked_bias`) as if they were weights; GPT-1 calls its tables tokens_embed and positions_embed; some files
    repeat the tied head.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in published.items():
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias", "position_ids")):
            continue
        name = name if name.startswith("transformer.") else f"transformer.{name}"
        name = name.replace("tokens_embed", "wte").replace("positions_embed", "wpe")
        weights[name] = tensor
    table, head = weights.get("transformer.wte.weight"), published.get("lm_head.weight")
    if head is not None and table is not None and not torch.equal(head, table):
        raise UserError(f"{folder} has an output head that differs from its token table; this GPT ties the two")
    if set(weights) != wanted:
        missing, extra = sorted(wanted - set(weights)), sorted(set(weights) - wanted)
        raise UserError(f"the weights in {folder} do not fit: missing {missing[:3]}, unknown {extra[:3]}")
    return weights


def _download(name: str) -> Path:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise UserError(
            f"there is no folder {name}; to fetch {name} from the Hugging Face hub: pip install huggingface_hub"
        ) from error
    wanted = ["config.json", "model*.safetensors", "tokenizer.json", "vocab.json", "merges.txt"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises many kinds; the user needs one sentence and the cause
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"there is no folder {name}, and the Hugging Face hub gave no such model: {reason}") from error
