"""BERT's network and its heads, with Hugging Face's parameter names; published weights from a folder or a file.

Paper: Devlin, Chang, Lee, Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018,
arXiv:1810.04805.

Legend: B batch, T positions, D width, H heads, d = D/H, N layers, V vocabulary. A mask (B, T) is True where there is text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from etude.blocks.nn.affine import Linear, affine
from etude.blocks.nn.attention import attend
from etude.blocks.nn.positional import check_positions
from etude.blocks.nn.transformer import ACTIVATIONS
from etude.core.errors import UserError
from etude.language.parts.wordpiece import WordPiece

__all__ = ["Architecture", "Bert", "Linear", "PreTraining", "initialise", "load_pretrained", "read_published"]


@dataclass(frozen=True)
class Architecture:
    """What a BERT is made of; with the weights, all that is needed to run it."""

    vocabulary: int
    context: int
    layers: int
    heads: int
    width: int
    hidden: int
    types: int = 2
    activation: Literal["gelu", "relu", "gelu_tanh"] = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    epsilon: float = 1e-12


class Embeddings(nn.Module):
    """Token, position and sentence vectors are added, then normed."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(of.vocabulary, of.width)
        self.position_embeddings = nn.Embedding(of.context, of.width)
        self.token_type_embeddings = nn.Embedding(of.types, of.width)
        self.LayerNorm = nn.LayerNorm(of.width, of.epsilon)
        self.dropout = nn.Dropout(of.dropout)

    def forward(self, ids: Tensor, types: Tensor | None) -> Tensor:
        check_positions(ids.shape[1], 0, self.position_embeddings.num_embeddings)
        sentence = self.token_type_embeddings.weight[0] if types is None else self.token_type_embeddings(types)
        x = self.word_embeddings(ids) + sentence + self.position_embeddings.weight[: ids.shape[1]]
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    """Attention of every position of the text to every position of the text."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        if of.width % of.heads:
            raise UserError(f"width {of.width} is not divisible by {of.heads} heads")
        self.heads, self.chance = of.heads, of.attention_dropout
        self.query, self.key, self.value = (Linear(of.width, of.width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None, rows: Tensor | None) -> Tensor:
        """x (B, T, D), or (R, D) of the text alone, whose places in the flat (B·T) are `rows` (R,)."""
        parts = []
        for project in (self.query, self.key, self.value):
            part = project(x)
            if rows is not None and mask is not None:
                part = part.new_zeros(mask.numel(), part.shape[-1]).index_copy(0, rows, part).view(*mask.shape, -1)
            parts.append(part.unflatten(-1, (self.heads, -1)).transpose(1, 2))  # (B, H, T, d)
        seen = None if mask is None else mask[:, None, None, :]
        q, k, v = parts
        out = attend(q, k, v, seen, dropout=self.chance if self.training else 0.0).transpose(1, 2).flatten(2)
        return out if rows is None else out.flatten(0, 1).index_select(0, rows)


class Output(nn.Module):
    """LN(residual + dropout(Wx + b))."""

    def __init__(self, inputs: int, of: Architecture) -> None:
        super().__init__()
        self.dense, self.LayerNorm = Linear(inputs, of.width), nn.LayerNorm(of.width, of.epsilon)
        self.dropout = nn.Dropout(of.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Layer(nn.Module):
    """A Transformer encoder layer with its norms behind the sums."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(of), "output": Output(of.width, of)})
        self.intermediate = nn.ModuleDict({"dense": Linear(of.width, of.hidden)})
        self.output, self.activation = Output(of.hidden, of), ACTIVATIONS[of.activation]

    def forward(self, x: Tensor, mask: Tensor | None, rows: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask, rows), x)
        return self.output(self.activation(self.intermediate["dense"](x)), x)


class Bert(nn.Module):
    """The encoder: ids, types and mask, each (B, T), → hidden states."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        self.of = of
        self.embeddings = Embeddings(of)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(of) for _ in range(of.layers))})
        self.pooler = nn.ModuleDict({"dense": Linear(of.width, of.width)})

    def forward(self, ids: Tensor, types: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The last layer's states (B, T, D); see `states`."""
        return self.states(ids, types, mask, last=True)[-1]

    def states(
        self, ids: Tensor, types: Tensor | None = None, mask: Tensor | None = None, last: bool = False
    ) -> list[Tensor]:
        """The embeddings and the states behind each layer, N + 1 of (B, T, D); only the last one where `last`.

        types: 0 for the first sentence, 1 for the second (None: all 0). mask: bool, True where there is text (None: everywhere).
        Padding costs nothing but in the attention: all else is computed for the text alone, and is 0 behind it.
        """
        x, rows = self.embeddings(ids, types), None
        if mask is not None:
            rows = mask.flatten().nonzero()[:, 0]
            if len(rows) == mask.numel():
                mask = rows = None
            else:
                x = x.flatten(0, 1).index_select(0, rows)
        found = [x]
        for layer in self.encoder["layer"].children():
            x = layer(x, mask, rows)
            found = [x] if last else [*found, x]
        if rows is not None:
            blank = found[0].new_zeros(ids.numel(), found[0].shape[-1])
            found = [blank.index_copy(0, rows, part).view(*ids.shape, -1) for part in found]
        return found

    def pooled(self, last: Tensor) -> Tensor:
        """(B, D): tanh of a linear layer over the first token's last state."""
        return torch.tanh(self.pooler["dense"](last[:, 0]))


class PreTraining(nn.Module):
    """BERT with its two heads: the hidden token at a position, tied to the embeddings, and whether B follows A."""

    def __init__(self, of: Architecture) -> None:
        super().__init__()
        self.bert = Bert(of)
        transform = nn.ModuleDict(
            {"dense": Linear(of.width, of.width), "LayerNorm": nn.LayerNorm(of.width, of.epsilon)}
        )
        self.cls = nn.ModuleDict({
            "predictions": nn.ModuleDict({"transform": transform}),
            "seq_relationship": Linear(of.width, 2),
        })  # fmt: skip
        self.cls["predictions"].register_parameter("bias", nn.Parameter(torch.zeros(of.vocabulary)))
        initialise(self)

    def forward(
        self, ids: Tensor, types: Tensor | None = None, mask: Tensor | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of the tokens, (B, T, V), or (P, V) at `places` (P,) of the flat (B·T); and of "B follows A", "not": (B, 2)."""
        last = self.bert(ids, types, mask)
        x = last if places is None else last.flatten(0, 1).index_select(0, places)
        head: Any = self.cls["predictions"]
        x = self.bert_activation(head["transform"]["dense"](x))
        table = self.bert.embeddings.word_embeddings.weight
        tokens = affine(head["transform"]["LayerNorm"](x), table.t(), head.get_parameter("bias"))
        return tokens, self.cls["seq_relationship"](self.bert.pooled(last))

    @property
    def bert_activation(self) -> Any:
        """The encoder's activation, which the token head uses too."""
        return ACTIVATIONS[self.bert.of.activation]


def initialise(module: nn.Module) -> None:
    """Matrices and tables normal(0, 0.02), biases 0, layer norms the identity."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


# --------------------------------------------------------------------------------------------------- published weights

_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def read_published(source: str | Path) -> tuple[Architecture, dict[str, Tensor], WordPiece | None]:
    """Architecture, weights by Hugging Face's names, and tokenizer (None without vocab.txt) of a BERT.

    Args:
        source: a folder with config.json and model*.safetensors (and vocab.txt), one such file with config.json beside it, or
            an id on the Hugging Face hub such as "bert-base-uncased" (needs the package huggingface_hub and a network).

    Raises UserError when something is missing or describes another network.
    """
    folder = Path(source)
    if folder.suffix == ".safetensors" and folder.is_file():
        files, folder = [folder], folder.parent
    else:
        folder = folder if folder.exists() else _download(str(source))
        files = sorted(folder.glob("model*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise UserError(f"no BERT weights in {folder}: it needs config.json and model.safetensors")
    weights: dict[str, Tensor] = {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for file in files:
            weights |= load_file(file)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"the files in {folder} cannot be read ({error}); are they complete?") from error
    of = _architecture(config, folder)
    named = {}
    for name, value in weights.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = "bert." + name
        if not name.endswith("position_ids"):
            named[name] = value.float()
    tokens = None
    if (folder / "vocab.txt").is_file():
        tokens = WordPiece.load(folder / "vocab.txt", _is_lower(folder))
        if tokens.size > of.vocabulary:
            raise UserError(f"vocab.txt in {folder} has {tokens.size} tokens, and the weights are of {of.vocabulary}")
    return of, named, tokens


def load_pretrained(module: nn.Module, weights: dict[str, Tensor], source: str | Path) -> list[str]:
    """Fill a module that has a Bert as `bert` from published weights; the names that the file does not have are returned.

    The encoder must be whole, but its pooler may be missing. Raises UserError where it is not, or where a shape differs.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in weights]
    needed = [name for name in missing if name.startswith(("bert.embeddings.", "bert.encoder."))]
    if needed:
        raise UserError(f"{source} has no {needed[0]} ({len(needed)} of the encoder's weights are missing)")
    for name, value in own.items():
        if name in weights and weights[name].shape != value.shape:
            raise UserError(f"{name} in {source} is {tuple(weights[name].shape)}, and {tuple(value.shape)} is wanted")
    module.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
    return missing


def _architecture(config: Any, folder: Path) -> Architecture:
    sizes = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size")
    sizes += ("intermediate_size",)
    absent = [size for size in sizes if not isinstance(config, dict) or not isinstance(config.get(size), int)]
    if absent:
        raise UserError(f"config.json in {folder} gives no number for {', '.join(absent)}")
    if config.get("model_type", "bert") != "bert":
        raise UserError(f"{folder} holds a model of type {config['model_type']!r}; only bert is a BERT of this kind")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{folder} has {config['position_embedding_type']} positions; this BERT only has absolute ones")
    named = config.get("hidden_act", "gelu")
    if named not in _ACTIVATIONS:
        raise UserError(f"{folder} uses the activation {named!r}; known are {', '.join(_ACTIVATIONS)}")
    return Architecture(
        *(config[size] for size in sizes),
        types=config.get("type_vocab_size", 2),
        activation=_ACTIVATIONS[named],  # type: ignore[arg-type]
        dropout=config.get("hidden_dropout_prob", 0.1),
        attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
        epsilon=config.get("layer_norm_eps", 1e-12),
    )


def _is_lower(folder: Path) -> bool:
    """Whether the tokenizer makes letters small: its own file says so, else a vocabulary without capitals does."""
    path = folder / "tokenizer_config.json"
    if path.is_file():
        try:
            said = json.loads(path.read_text(encoding="utf-8")).get("do_lower_case")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error})") from error
        if isinstance(said, bool):
            return said
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return not any(word[:1].isupper() for word in words)


def _download(name: str) -> Path:
    from etude.core.extras import how

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no folder or file {name}")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise UserError(f"{name} is no folder, and to fetch it from the hub the package huggingface_hub is needed; "
                        f"{how('text')} brings it") from error  # fmt: skip
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["config.json", "*.safetensors", "vocab.txt", "tokenizer_config.json"]
            )
        )
    except Exception as error:  # the package raises many kinds: no network, no such name, no access
        first = str(error).partition("\n")[0]
        raise UserError(
            f"{name} is no folder here, and the hub did not give it ({type(error).__name__}: {first})"
        ) from error
