"""The decoder of most families: an embedding, layers, a norm and a head.

Plain Python over the operators: `forward` is called once, to be recorded. `layers.py` has the layers, and
`layer_weights.py` reads their weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from tgi_asgi import ops
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.family import ImageReader
from tgi_asgi.models.layer_tensors import read_norm
from tgi_asgi.models.layer_weights import LayerWeights
from tgi_asgi.models.layers import Layer, ParallelLayer
from tgi_asgi.models.loading import Weights
from tgi_asgi.models.rope import RopeTables
from tgi_asgi.ops.arrays import Floats


class Decoder:
    """A decoder-only transformer; a `Model`.

        model = Decoder(config, weights, ops.Packing(is_exact=True), max_positions=8192)
        recorder = record(model, pool.layers)

    Attributes:
        layer_class, parallel_class, weights_class, checkpoint: Attributes that a family may override.
        path: Module path of the layers' parent, as adapters name it.
        images: What reads images, if the model accepts any; the other shards of a model do not.
        turns_by: The rotary table of tokens whose positions have several axes; None: positions have one.
    """

    kind: ClassVar[Literal["native"]] = "native"
    layer_class: type[Layer] = Layer
    parallel_class: type[Layer] = ParallelLayer  # for models with `is_parallel`
    weights_class: type[LayerWeights] = LayerWeights
    checkpoint = CheckpointLayout()
    images: ImageReader | None = None
    turns_by: ops.RopeTable | None = None

    def __init__(
        self, config: ModelConfig, weights: Weights, arithmetic: ops.Arithmetic, max_positions: int
    ) -> None:
        self.config, self.path = config, "model"
        ropes = RopeTables(config, weights, max_positions)
        embedding = self._rows_of_tokens(weights, "model.embed_tokens.weight", config.hidden_size)
        self.embedding = ops.linear_weight(embedding, arithmetic, is_vocabulary=True)
        self.positions = self.read_positions(weights) if config.has_learned_positions else None
        self.norm = read_norm(config, weights, "model.norm")
        self.head = self._read_head(weights, embedding, arithmetic)
        # After the head, which is fully resident while it is packed, although it may be a twentieth of the
        # file.
        self.layers = [
            self._read_layer(weights, index, arithmetic, ropes) for index in range(config.num_layers)
        ]

    @property
    def products(self) -> Mapping[str, ops.LinearWeight]:
        """Products outside the layers that adapters may change, by their canonical names."""
        return {}

    def _rows_of_tokens(self, weights: Weights, name: str, *columns: int) -> ops.WeightSource:
        """Return this shard's part of a tensor that has a row, or an element, for each token."""
        cut = self.config.cut
        vocab_ids = range(self.config.vocab_size) if cut is None else cut.vocab_ids
        whole = weights.get(name, (self.config.vocab_size, *columns))
        return whole.rows(vocab_ids.start, vocab_ids.stop)

    def _read_head(
        self, weights: Weights, embedding: ops.WeightSource, arithmetic: ops.Arithmetic
    ) -> ops.LinearWeight:
        """Return the matrix of a classifier's labels, or of logits, which may be the embedding itself."""
        config = self.config
        if config.num_labels:
            labels = weights.get("score.weight", (config.num_labels, config.hidden_size))
            return ops.linear_weight(labels, arithmetic, is_vocabulary=True)
        if not config.has_head or (config.has_tied_embeddings and not config.has_head_bias):
            return self.embedding
        head, bias = embedding, None
        if not config.has_tied_embeddings:
            head = self.read_head_rows(weights)
        if config.has_head_bias:
            bias = self._rows_of_tokens(weights, "lm_head.bias")
        return ops.linear_weight(head, arithmetic, bias=bias, is_vocabulary=True)

    def read_head_rows(self, weights: Weights) -> ops.WeightSource:
        """Return the matrix of a head of its own."""
        return self._rows_of_tokens(weights, "lm_head.weight", self.config.hidden_size)

    def _read_layer(
        self, weights: Weights, index: int, arithmetic: ops.Arithmetic, ropes: RopeTables
    ) -> Layer:
        layer_class = self.parallel_class if self.config.is_parallel else self.layer_class
        config = self.config.of_layer(index)
        try:
            return layer_class(config, self.weights_class(config, weights, index, arithmetic), index, ropes)
        except ValueError as error:  # packing knows no names
            raise ValueError(f"layer {index}: {error}") from error

    def read_positions(self, weights: Weights) -> Floats:
        """Return the position embeddings that are added to the tokens': [positions, hidden] float32."""
        shape = (self.config.context_length, self.config.hidden_size)
        return ops.vector(weights.get("model.embed_positions.weight", shape)).reshape(shape)

    def forward(self, batch: ops.RecordedBatch, caches: Sequence[ops.Cache]) -> ops.Value:
        """Return the residual stream of a batch, as described in `Model.forward`."""
        x = self.embed(batch)
        rest = iter(caches)
        for index, layer in enumerate(self.layers):
            x = self.add_images(x, index)
            x = layer.forward(x, *itertools.islice(rest, layer.num_caches))
        return x

    def add_images(self, x: ops.Value, layer: int) -> ops.Value:
        """Return the residual that enters a layer, with what images add to it there."""
        images = self.config.images
        if images is None:
            return x
        if layer == 0:
            x = ops.image_rows(x)
        for level, deep in enumerate(images.deep_layers, 1):
            if deep == layer:
                x = ops.image_rows(x, level)
        return x

    def embed(self, batch: ops.RecordedBatch) -> ops.Value:
        """Return the residual stream that enters the first layer."""
        return ops.embed(batch, self.embedding, self.config.embedding_factor, self.positions)

    def logits(self, x: ops.Value) -> ops.Value:
        """Return logits [n_rows, vocab], as described in `Model.logits`."""
        if self.config.num_labels:
            return ops.head(x, self.norm, self.head)
        scale, cap = self.config.logits_scale, self.config.logits_cap
        return ops.head(x, self.norm, self.head, scale=scale, cap=cap)
