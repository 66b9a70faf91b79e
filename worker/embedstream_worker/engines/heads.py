"""From what a model's modules computed to the tensors of its results, one head for each kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from sentence_transformers.util import select_max_active_dims

from embedstream.errors import ModelError
from embedstream.outputs import Kind
from embedstream_worker.engines.base import OutputInfo
from embedstream_worker.purpose import HEADS, Purpose

Features = dict[str, Any]

Tensors = tuple[torch.Tensor, ...]
"""Of one kind of results, as `arrays.results_of` takes them."""

SLICE = 2048
"""So much of the vocabulary is computed at once: the logits of a batch are 16 MiB then, which caches hold in part."""

MOST_LABEL_BYTES = 256 * 1024
"""Of all labels together: each shard names them."""


class Head(Protocol):
    """One kind of results."""

    kind: Kind
    info: OutputInfo

    def __call__(self, features: Features) -> Tensors:
        """Of a padded batch, from the modules' features, on their device; converters trace it.

        Raises what torch raises.
        """


def heads_of(model: Any, purpose: Purpose, folder: Path, sample: Features, normalized: bool) -> list[Head]:
    """The heads of a loaded model. `sample`: features that its modules made of some batch.

    `normalized`: whether a text's one vector has length 1.

    Raises:
        ModelError: it gives nothing that is known.
    """
    match purpose:
        case Purpose.SPARSE:
            return [SparseHead(sample["sentence_embedding"].shape[1], model.max_active_dims)]
        case Purpose.MULTIVECTOR:
            vectors = sample["token_embeddings"]
            return [TokensHead(vectors.shape[2], bool(_unit(vectors[sample["attention_mask"].bool()])))]
        case Purpose.PAIRS:
            return [ScoreHead(model)] if model.num_labels == 1 else [LabelsHead(model)]
        case Purpose.VECTORS:
            dim = model.truncate_dim or sample["sentence_embedding"].shape[1]
            width = sample["token_embeddings"].shape[2]
            weights, vectors = (_linear(folder / name, width) for name in HEADS)
            special = {getattr(model.tokenizer, f"{name}_token_id") for name in ("cls", "eos", "pad", "unk")} - {None}
            return [
                DenseHead(model, dim, normalized),
                TokenWeightsHead(weights, special, model[0].model.get_input_embeddings().num_embeddings),
                TokenVectorsHead(vectors),
            ]


class DenseHead:
    """The model's one vector of a text, with its own cut to fewer dimensions."""

    kind: Kind = "dense"

    def __init__(self, model: SentenceTransformer, dim: int, normalized: bool) -> None:
        self._cut = model.truncate_dim
        self.info = OutputInfo(dim, normalized)

    def __call__(self, features: Features) -> Tensors:
        vectors = features["sentence_embedding"]
        if self._cut is not None:
            vectors = vectors[:, : self._cut]
            if self.info.normalized:
                vectors = torch.nn.functional.normalize(vectors, dim=1)
        return (vectors,)


class SparseHead:
    """All weights above 0 of vectors as long as the vocabulary, which do not leave the device."""

    kind: Kind = "sparse"

    def __init__(self, vocabulary: int, most: int | None) -> None:
        """`most`: of a text's weights only so many of the greatest, as the folder says."""
        self._most = most
        self.info = OutputInfo(vocabulary)

    def __call__(self, features: Features) -> Tensors:
        vectors: Any = select_max_active_dims(features["sentence_embedding"], self._most)
        return above_zero(vectors)


class TokensHead:
    """The vectors of the tokens that the model's mask leaves."""

    kind: Kind = "multivector"

    def __init__(self, dim: int, normalized: bool) -> None:
        self.info = OutputInfo(dim, normalized, token_bytes=4 * dim)

    def __call__(self, features: Features) -> Tensors:
        return features["token_embeddings"], features["attention_mask"].bool()


class TokenWeightsHead:
    """BGE-M3's sparse vectors: the weights of a text's tokens; of equal ones the greatest counts."""

    kind: Kind = "sparse"

    def __init__(self, linear: torch.nn.Linear, special: set[int], vocabulary: int) -> None:
        self._linear = linear
        self._special = torch.tensor(sorted(special))
        self.info = OutputInfo(vocabulary, token_bytes=8)

    def __call__(self, features: Features) -> Tensors:
        states, ids, mask = (features[name] for name in ("token_embeddings", "input_ids", "attention_mask"))
        self._linear.to(states.device)
        weights = torch.relu(self._linear(states.float())).squeeze(-1)
        kept = mask.bool() & ~torch.isin(ids, self._special.to(ids.device)) & ~(weights <= 0)  # NaN stays, to be found
        rows, places = kept.nonzero(as_tuple=True)
        return rows, ids[rows, places], weights[rows, places]


class TokenVectorsHead:
    """BGE-M3's vectors of a text's tokens, but for the first, which stands for the whole text."""

    kind: Kind = "multivector"

    def __init__(self, linear: torch.nn.Linear) -> None:
        self._linear = linear
        self.info = OutputInfo(linear.out_features, normalized=True, token_bytes=4 * linear.out_features)

    def __call__(self, features: Features) -> Tensors:
        states, mask = features["token_embeddings"][:, 1:], features["attention_mask"][:, 1:].bool()
        self._linear.to(states.device)
        return torch.nn.functional.normalize(self._linear(states.float()), dim=-1), mask


class ScoreHead:
    """A pair's score, by the activation that the model's settings name, as `CrossEncoder.predict` takes it."""

    kind: Kind = "score"

    def __init__(self, model: CrossEncoder) -> None:
        self._activation: Callable[[torch.Tensor], torch.Tensor] = model.activation_fn or torch.nn.Identity()
        self.info = OutputInfo(1)

    def __call__(self, features: Features) -> Tensors:
        return (self._activation(features["scores"].float()).reshape(-1, 1),)


class LabelsHead:
    """Scores of classes, by softmax, sigmoid or as they are, as `problem_type` of the model's configuration says."""

    kind: Kind = "labels"

    def __init__(self, model: CrossEncoder) -> None:
        config: Any = model.config
        self._problem = config.problem_type
        names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        if (size := sum(len(name.encode()) for name in names)) > MOST_LABEL_BYTES:
            raise ModelError(f"the model's labels have {size:,} bytes: shorten id2label in its config.json")
        self.info = OutputInfo(len(names), labels=names)
        if len(set(self.info.labels)) < len(self.info.labels):
            raise ModelError("two of the model's labels have one name; repair id2label in its config.json")

    def __call__(self, features: Features) -> Tensors:
        scores = features["scores"].float()
        if self._problem == "multi_label_classification":
            scores = torch.sigmoid(scores)
        elif self._problem != "regression":
            scores = torch.softmax(scores, dim=1)
        return (scores,)


class SlicedSplade:
    """SPLADE without a matrix of all tokens and the vocabulary: its last layer and its pooling, a slice at a time.

    `log1p` and `relu` grow with their argument: where the greatest weight counts, the greatest logit alone needs them.
    """

    def __init__(self, transformer: Transformer, pooling: SpladePooling, padding_side: str) -> None:
        """Takes the last layer out of the transformer. Raises `TypeError` where it has none like it."""
        model: Any = transformer.model
        self._decoder: torch.nn.Linear = model.get_output_embeddings()
        names = [name for name, module in model.named_modules() if module is self._decoder]
        if type(self._decoder) is not torch.nn.Linear or len(names) != 1:
            raise TypeError("its last layer is another one")
        self._twice = pooling.activation_function == "log1p_relu"
        self._sums = pooling.pooling_strategy == "sum"
        self._first_token = -1 if padding_side == "left" else 0
        owner, _, self._name = names[0].rpartition(".")
        self._owner: torch.nn.Module = model.get_submodule(owner)
        self._transformer = transformer
        self.take()

    def __call__(self, features: Features) -> torch.Tensor:
        """As long as the vocabulary, [n, vocabulary]."""
        states = self._transformer({"modality": "text", **features})["token_embeddings"]
        mask = features["attention_mask"].bool().unsqueeze(-1)
        if not self._sums:
            # A padding that equals a token changes no maximum, and costs less than to mask the logits.
            states = torch.where(mask, states, states[:, self._first_token].unsqueeze(1))
        weights, bias = torch.split(self._decoder.weight, SLICE), self._decoder.bias
        biases = [None] * len(weights) if bias is None else torch.split(bias, SLICE)
        slices = []
        for weight, part in zip(weights, biases, strict=True):
            logits = torch.nn.functional.linear(states, weight, part)
            slices.append((self._activate(logits) * mask).sum(dim=1) if self._sums else logits.amax(dim=1))
        vectors = torch.cat(slices, dim=1)
        return vectors if self._sums else self._activate(vectors) * mask.any(dim=1)

    def _activate(self, logits: torch.Tensor) -> torch.Tensor:
        weights = logits.relu().log1p()
        return weights.log1p() if self._twice else weights

    def take(self) -> None:
        """Take the last layer out of the transformer."""
        setattr(self._owner, self._name, torch.nn.Identity())

    def restore(self) -> None:
        """Put the last layer back."""
        setattr(self._owner, self._name, self._decoder)


def above_zero(vectors: torch.Tensor) -> Tensors:
    """Texts, tokens and weights of vectors as long as the vocabulary, [n, vocabulary]."""
    texts, tokens = (~(vectors <= 0)).nonzero(as_tuple=True)  # NaN stays, to be found
    return texts, tokens, vectors[texts, tokens]


def _unit(vectors: torch.Tensor) -> bool:
    lengths = torch.linalg.vector_norm(vectors.float(), dim=-1)
    return bool(torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3))


def _linear(path: Path, width: int) -> torch.nn.Linear:
    """A layer over vectors of this width, from a file of its weights, read as tensors alone. Raises `ModelError`."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weight = weights["weight"]
        if weight.shape[1] != width:
            raise ValueError(f"they are for vectors of {weight.shape[1]:,} dimensions, not {width:,}")
        if weight.untyped_storage().nbytes() < weight.numel() * weight.element_size():
            raise ValueError("a tensor repeats its numbers")
        made = torch.nn.Linear(width, weight.shape[0], bias="bias" in weights)
        made.load_state_dict(weights)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: not the weights of a layer ({reason}); fetch the model again") from error
    return made.float().eval().requires_grad_(False)
