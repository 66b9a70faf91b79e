"""From what a model's modules computed to its results, one head for each kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from sentence_transformers.util import select_max_active_dims

from embedstream.dataset.values import Ragged, Values
from embedstream.errors import ModelError
from embedstream.outputs import Kind
from embedstream_worker.engines.base import OutputInfo
from embedstream_worker.purpose import HEADS, Purpose

Features = dict[str, Any]

LOGITS_BYTES = 64 * 1024 * 1024
"""Of the matrix of tokens and vocabulary that is held at once."""


MOST_LABEL_BYTES = 256 * 1024
"""Of all labels together: each shard names them."""


class Head(Protocol):
    """One kind of results."""

    kind: Kind
    info: OutputInfo

    def __call__(self, features: Features) -> Values:
        """Of a padded batch, from the modules' features. Raises what torch raises."""


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

    def __call__(self, features: Features) -> Values:
        vectors = features["sentence_embedding"]
        if self._cut is not None:
            vectors = vectors[:, : self._cut]
            if self.info.normalized:
                vectors = torch.nn.functional.normalize(vectors, dim=1)
        return _numpy(vectors)


class SparseHead:
    """All weights above 0 of vectors as long as the vocabulary, which do not leave the device."""

    kind: Kind = "sparse"

    def __init__(self, vocabulary: int, most: int | None) -> None:
        """`most`: as of `sparse`."""
        self._most = most
        self.info = OutputInfo(vocabulary)

    def __call__(self, features: Features) -> Values:
        return sparse(features["sentence_embedding"], self._most)


class TokensHead:
    """The vectors of the tokens that the model's mask leaves."""

    kind: Kind = "multivector"

    def __init__(self, dim: int, normalized: bool) -> None:
        self.info = OutputInfo(dim, normalized, token_bytes=4 * dim)

    def __call__(self, features: Features) -> Values:
        mask = features["attention_mask"].bool()
        return Ragged(_counts(mask), _numpy(features["token_embeddings"][mask]))


class TokenWeightsHead:
    """BGE-M3's sparse vectors: of each token of the vocabulary the greatest weight it has in the text, if above 0."""

    kind: Kind = "sparse"

    def __init__(self, linear: torch.nn.Linear, special: set[int], vocabulary: int) -> None:
        self._linear = linear
        self._special = torch.tensor(sorted(special))
        self.info = OutputInfo(vocabulary, token_bytes=8)

    def __call__(self, features: Features) -> Values:
        states, ids, mask = (features[name] for name in ("token_embeddings", "input_ids", "attention_mask"))
        self._linear.to(states.device)
        weights = torch.relu(self._linear(states.float())).squeeze(-1)
        kept = mask.bool() & ~torch.isin(ids, self._special.to(ids.device))
        row = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(ids)
        # One place for each text and token of the vocabulary that is in it: a matrix of both would be large.
        places, at = torch.unique(row[kept] * self.info.dim + ids[kept], return_inverse=True)
        greatest = torch.zeros(len(places), device=ids.device)
        greatest.scatter_reduce_(0, at, weights[kept], "amax")
        above = ~(greatest <= 0)  # NaN stays, to be found
        places, greatest = places[above], greatest[above]
        counts = torch.bincount(places // self.info.dim, minlength=len(ids))
        return Ragged(counts.cpu().numpy(), _numpy(greatest), (places % self.info.dim).cpu().numpy().astype(np.uint32))


class TokenVectorsHead:
    """BGE-M3's vectors of a text's tokens, but for the first, which stands for the whole text."""

    kind: Kind = "multivector"

    def __init__(self, linear: torch.nn.Linear) -> None:
        self._linear = linear
        self.info = OutputInfo(linear.out_features, normalized=True, token_bytes=4 * linear.out_features)

    def __call__(self, features: Features) -> Values:
        states, mask = features["token_embeddings"][:, 1:], features["attention_mask"][:, 1:].bool()
        self._linear.to(states.device)
        vectors = torch.nn.functional.normalize(self._linear(states[mask].float()), dim=-1)
        return Ragged(_counts(mask), _numpy(vectors))


class ScoreHead:
    """A pair's score, by the activation that the model's settings name, as `CrossEncoder.predict` takes it."""

    kind: Kind = "score"

    def __init__(self, model: CrossEncoder) -> None:
        self._activation: Callable[[torch.Tensor], torch.Tensor] = model.activation_fn or torch.nn.Identity()
        self.info = OutputInfo(1)

    def __call__(self, features: Features) -> Values:
        return _numpy(self._activation(features["scores"].float()).reshape(-1, 1))


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

    def __call__(self, features: Features) -> Values:
        scores = features["scores"].float()
        if self._problem == "multi_label_classification":
            scores = torch.sigmoid(scores)
        elif self._problem != "regression":
            scores = torch.softmax(scores, dim=1)
        return _numpy(scores)


class FusedSplade:
    """SPLADE without padding, and without a matrix of all tokens and the vocabulary.

    `log1p` and `relu` grow with their argument, so of a text's tokens the greatest logit alone needs them. The
    transformer's last layer is run here, on real tokens, some at a time.
    """

    def __init__(self, transformer: Transformer, pooling: SpladePooling) -> None:
        """Takes the last layer out of the transformer. Raises `TypeError` where it has none like it."""
        model: Any = transformer.model
        self._decoder: torch.nn.Linear = model.get_output_embeddings()
        names = [name for name, module in model.named_modules() if module is self._decoder]
        if type(self._decoder) is not torch.nn.Linear or len(names) != 1 or pooling.pooling_strategy != "max":
            raise TypeError("its last layer or its pooling is another one")
        self._twice = pooling.activation_function == "log1p_relu"
        owner, _, self._name = names[0].rpartition(".")
        self._owner: torch.nn.Module = model.get_submodule(owner)
        self._transformer = transformer
        self.take()

    def __call__(self, features: Features) -> torch.Tensor:
        """As long as the vocabulary, [n, vocabulary]."""
        states = self._transformer({"modality": "text", **features})["token_embeddings"]
        mask = features["attention_mask"].bool()
        lengths = mask.sum(dim=1).tolist()
        tokens, vocabulary = states[mask], self._decoder.out_features
        greatest = torch.zeros(len(lengths), vocabulary, device=tokens.device)
        at_once = max(1, LOGITS_BYTES // (4 * vocabulary))
        start = 0
        for row, length in enumerate(lengths):
            for first in range(start, start + length, at_once):
                logits = self._decoder(tokens[first : min(first + at_once, start + length)]).float()
                greatest[row] = torch.maximum(greatest[row], logits.amax(dim=0))
            start += length
        weights = greatest.relu_().log1p_()
        return weights.log1p_() if self._twice else weights

    def take(self) -> None:
        """Take the last layer out of the transformer."""
        setattr(self._owner, self._name, torch.nn.Identity())

    def restore(self) -> None:
        """Put the last layer back."""
        setattr(self._owner, self._name, self._decoder)


def sparse(vectors: torch.Tensor, most: int | None = None) -> Ragged:
    """What is not 0 of vectors [n, vocabulary]. `most`: only so many of the greatest, as the folder says."""
    vectors = select_max_active_dims(vectors, most)
    kept = vectors != 0
    rows, indices = kept.nonzero(as_tuple=True)
    return Ragged(_counts(kept), _numpy(vectors[rows, indices]), indices.cpu().numpy().astype(np.uint32))


def _counts(mask: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    counts: np.ndarray[tuple[int], np.dtype[np.int64]] = mask.sum(dim=1).cpu().numpy().astype(np.int64)
    return counts


def _numpy(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    array: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = tensor.float().cpu().numpy()
    return array


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
    return made.float().eval()
