"""Defines a model family: its names, how its configuration and weights are read, and its model class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

from tgi_asgi import ops
from tgi_asgi.models.checkpoint import CheckpointLayout
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.loading import Weights
from tgi_asgi.models.reader import Reader


class ImageReader(Protocol):
    """What reads a native model's images (`generic/vision/native.py`)."""

    def program(
        self, model: Model, caches: Sequence[ops.Cache], states: Sequence[ops.StateLayer],
        limits: ops.StepLimits, *, adapters: ops.AdapterLayout | None, image_cache: int,
    ) -> ops.CpuProgram:  # fmt: skip
        """Return the program that runs the model's steps; `image_cache` is that of `make_program`."""


class Model(Protocol):
    """A model's code over the operators, as the runner sees it."""

    kind: ClassVar[Literal["native"]]
    config: ModelConfig

    @property
    def images(self) -> ImageReader | None:
        """What reads images, if the model accepts any."""

    @property
    def turns_by(self) -> ops.RopeTable | None:
        """The rotary table of tokens whose positions have several axes; None: positions have one."""

    def forward(self, batch: ops.RecordedBatch, caches: Sequence[ops.Cache]) -> ops.Value:
        """Return the residual stream of a batch.

        Args:
            caches: What layers use, in order: the KV cache of an attention layer, which may be another
                layer's, the state of a recurrent layer, and both in this order for a layer that has both.
        """

    def logits(self, x: ops.Value) -> ops.Value:
        """Return the logits after the tokens that a step asks for."""


class ModelClass(Protocol):
    """Creates a model from configuration, weights, arithmetic and maximum context."""

    checkpoint: CheckpointLayout

    def __call__(
        self, config: ModelConfig, weights: Weights, arithmetic: ops.Arithmetic, max_positions: int, /
    ) -> Model: ...


# llama.cpp's tensor names, by those of `transformers`, for all families that it converts.
GGUF_NAMES: Mapping[str, str] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "rope_freqs": "rope_freqs",
    "rope_factors_long": "rope_factors_long",
    "rope_factors_short": "rope_factors_short",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.k_b_proj": "attn_k_b",
    "self_attn.v_b_proj": "attn_v_b",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.correction": "exp_probs_b",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mamba.in_proj": "ssm_in",
    "mamba.conv1d": "ssm_conv1d",
    "mamba.dt": "ssm_dt",
    "mamba.A": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.norm": "ssm_norm",
    "mamba.out_proj": "ssm_out",
}


# The same where norms follow attention and MLP (`PostNormLayer`, `SandwichLayer`).
SANDWICH_NAMES: Mapping[str, str] = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One family, or several architectures that compute the same.

        FAMILIES = (Family("Qwen3ForCausalLM", "qwen3", read_config, Decoder),)

    A module of `models/families` with such a tuple is all that a family needs; `registry.py` finds it.

    Attributes:
        architecture: `architectures[0]` of config.json.
        gguf_name: `general.architecture` of a GGUF file; None: no GGUF files.
        other_gguf_names: Further ones, such as that of a model that accepts images and has this text model.
        read_config: Reads and bounds the configuration from either file; unread keys are refused if they may
            matter. Raises `NotInFamily` for models that are left to the code of `transformers`.
        model: Creates the model, and describes how its checkpoints store it.
        gguf_names: llama.cpp's tensor names that differ from `GGUF_NAMES`; None: the tensor is not read.
        is_rotary_permuted: Whether llama.cpp stores rotary pairs adjacent instead of half a head apart.
        unused: Names (`fnmatch` patterns) of tensors that a file may hold although nothing reads them;
            `{num_layers}` stands for the number of layers, for example for a further layer that only drafts.
        is_gguf_only: Whether only GGUF files are read; a checkpoint of this architecture is left to the code
            of `transformers`, or needs code of its own.
    """

    architecture: str
    gguf_name: str | None
    read_config: Callable[[Reader, str], ModelConfig]
    model: ModelClass
    other_gguf_names: Sequence[str] = ()
    gguf_names: Mapping[str, str | None] = field(default_factory=dict)
    is_rotary_permuted: bool = False
    unused: Sequence[str] = ("*.rotary_emb.inv_freq", "*.self_attn.masked_bias", "*.attn_rot_embd.weight")
    is_gguf_only: bool = False


def record(model: Model, caches: Sequence[ops.Cache], states: Sequence[ops.StateLayer] = ()) -> ops.Recorder:
    """Call a model's code once, and return the recorded operations.

    Args:
        caches: KV caches of the attention layers that have their own, in order.
        states: States of the recurrent layers, in order.
    """
    recorder = ops.Recorder()
    attending, recurrent = iter(caches), iter(states)
    used: list[ops.Cache] = []
    of_layers: dict[int, ops.Cache] = {}
    for index, layer in enumerate(model.config.layers):
        if layer.attends:
            cache = next(attending) if layer.keys_of is None else of_layers[layer.keys_of]
            of_layers[index] = cache
            used.append(cache)
        if layer.recurrent is not None:
            used.append(next(recurrent))
    model.logits(model.forward(recorder.batch, used))
    return recorder
