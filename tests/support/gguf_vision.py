"""Tiny vision models as llama.cpp's converter writes them: a text model's file, and a projector's beside it.

    made = gguf_vision.make("gemma3", folder)
    made.files                          # for OpenModel: f32.gguf, and mmproj-f32.gguf beside it
    made.checkpoint                     # the folder of the same model as safetensors

Their image processors have the values of published models: projector files do not say all of them. The
converter reads published checkpoints, whose names and settings may differ from what transformers 5 saves.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers

from tests.support import vision_models
from tests.support.family_files import convert, converted
from tests.support.gguf_bytes import Tensor, gguf_bytes
from tests.support.llama_cpp import llama_cpp_source
from tests.support.vision_family import Family
from tests.support.vision_table import FAMILIES
from tgi_asgi.formats.gguf import GgufFile
from tgi_asgi.formats.sources import ModelFiles

# What the published settings of LLaVA 1.6's tower say, for the script that converts it.
_TILED = {
    "image_aspect_ratio": "anyres", "image_crop_resolution": 224, "image_split_resolution": 224,
    "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu",
}  # fmt: skip
Tensors = dict[str, torch.Tensor]
KIND = "f32"
_CLIP = Path(__file__).with_name("convert_llava.py")


@dataclass(frozen=True, slots=True)
class Made:
    """A model in both forms."""

    checkpoint: Path
    files: ModelFiles


@dataclass(frozen=True, slots=True)
class Case:
    """A family with the values of published models.

    Attributes:
        family: For `vision_models.make`.
        publish: Changes config.json and tensors to what the converter reads.
        edit: Changes tensors of the checkpoint, by name, before all else.
    """

    family: Family
    publish: Callable[[dict[str, Any], Tensors], tuple[dict[str, Any], Tensors]]
    edit: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor


def _rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Round Gemma 3's projection, which the converter always writes as float16."""
    return tensor.half().float() if "mm_input_projection" in name else tensor


def _rounded_clip(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Round what LLaVA's converter always writes as float16."""
    is_rounded = "patch_embedding" in name or ("multi_modal_projector" in name and tensor.dim() == 2)
    return tensor.half().float() if is_rounded else tensor


def _clipped(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Let Gemma 4's products be clipped, and its tower's rows be scaled."""
    if name.endswith(("_min", "_max")):
        return torch.full_like(tensor, -0.7 if name.endswith("_min") else 0.8)
    if name.endswith(("std_bias", "std_scale")):
        return torch.linspace(0.2, 1.1, tensor.numel())
    return tensor


def _plain(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    return config, tensors


def _llava_next(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Name the text model's class: the converter does not know the whole model's."""
    return {
        **config,
        "text_config": {**config["text_config"], "architectures": ["LlamaForCausalLM"]},
    }, tensors


def _smolvlm(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    text = {**config["text_config"], "architectures": ["VLlama3ForCausalLM"]}
    return {**config, "text_config": text}, tensors


def _with_experts(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Store experts as published, columns first; transformers 5 turns them on loading, but not on saving."""
    return config, {
        name: each.transpose(1, 2).contiguous() if ".experts." in name else each
        for name, each in tensors.items()
    }


def _nested(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Give a tower's tensors their published names."""
    old, new = "vision_tower.", "vision_tower.vision_model."
    return config, {name.replace(old, new): tensor for name, tensor in tensors.items()}


def _lfm2_vl(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Name the class of the text model, and what it does not save of its MLP's size."""
    text = config["text_config"]
    own = {
        "architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": False,
        "block_ff_dim": text["intermediate_size"],
    }  # fmt: skip
    return _nested({**config, "text_config": {**text, **own}}, tensors)


_INTERNVL_NAMES = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
    "vision_tower.": "vision_model.",
}


def _internvl(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Return the form of OpenGVLab's own code, which the converter reads."""
    vision = config["vision_config"]
    text = {**config["text_config"], "architectures": ["Qwen2ForCausalLM"]}
    found = {
        "architectures": ["InternVLChatModel"],
        "llm_config": text,
        "vision_config": {**vision, "architectures": ["InternVisionModel"]},
        "downsample_ratio": config["downsample_ratio"],
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "tie_word_embeddings": config["tie_word_embeddings"],
    }
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in _INTERNVL_NAMES.items():
            name = name.replace(old, new)
        renamed[re.sub(r"^(language_model\.)(?!model|lm_head)", r"\1model.", name)] = tensor
    layers = [
        name.removesuffix("q_proj.weight") for name in renamed if name.endswith("attention.q_proj.weight")
    ]
    for layer in layers:
        for kind in ("weight", "bias"):
            if f"{layer}q_proj.{kind}" in renamed:
                parts = [renamed.pop(f"{layer}{part}_proj.{kind}") for part in "qkv"]
                renamed[f"{layer.replace('attention', 'attn')}qkv.{kind}"] = torch.cat(parts)
    return found, renamed


def _with(name: str, config: Mapping[str, Any], **changes: Any) -> Family:
    """Return a family with changes, those of the configuration one level deep."""
    family = FAMILIES[name]
    changed = dict(family.config)
    for key, value in config.items():
        changed[key] = {**changed[key], **value} if isinstance(value, dict) else value
    return dataclasses.replace(family, config=changed, **changes)


_QWEN = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
_QWEN2_SIZES = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, **_QWEN}
_TIED = {"tie_word_embeddings": True}

_WIDE = {"global_head_dim": 32}  # the converter needs another one
_POOLED = {"pooling_kernel_size": 3, "position_embedding_size": 840}
_GEMMA4: dict[str, Any] = {
    "preprocessor": {"patch_size": 4, "pooling_kernel_size": 3}, "processor": {},
}  # fmt: skip

_QWEN3_5 = _with(
    "qwen3_5",
    {"vision_config": {"patch_size": 16}},
    preprocessor={"size": {"shortest_edge": 65536, "longest_edge": 16777216}, **_QWEN, "patch_size": 16},
)

CASES: Mapping[str, Case] = {
    "smolvlm": Case(
        _with("smolvlm", {}, preprocessor={**FAMILIES["smolvlm"].preprocessor, "size": {"longest_edge": 84}}),
        _smolvlm,
    ),
    "gemma3": Case(
        _with(
            "gemma3",
            {
                "text_config": {
                    "num_hidden_layers": 7,
                    "layer_types": [
                        *["sliding_attention"] * 5,
                        "full_attention",
                        "sliding_attention",
                    ],
                    "rope_parameters": {
                        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    },
                },
                "vision_config": {"image_size": 56},
                "mm_tokens_per_image": 4,
            },
            preprocessor={"size": {"height": 56, "width": 56}},
            processor={"image_seq_length": 4},
        ),
        _nested,
        _rounded,
    ),
    "qwen2_vl": Case(
        _with("qwen2_vl", {"vision_config": {"patch_size": 14}}, preprocessor=_QWEN2_SIZES), _plain
    ),
    "qwen2_5_vl": Case(
        _with(
            "qwen2_5_vl",
            {
                "vision_config": {
                    "patch_size": 14, "window_size": 112, "depth": 4, "fullatt_block_indexes": [1, 3],
                }
            },
            preprocessor=_QWEN2_SIZES,
        ),
        _plain,
    ),
    "qwen3_vl": Case(
        _with(
            "qwen3_vl",
            {"vision_config": {"patch_size": 16, "deepstack_visual_indexes": [0, 2]}},
            preprocessor={
                "size": {"shortest_edge": 65536, "longest_edge": 16777216}, **_QWEN, "patch_size": 16,
            },
        ),
        _plain,
    ),
    "qwen3_vl_moe": Case(
        _with(
            "qwen3_vl",
            {
                "text_config": {
                    "model_type": "qwen3_vl_moe_text", "num_experts": 4, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1,
                    "mlp_only_layers": [],
                },
                "vision_config": {"patch_size": 16, "deepstack_visual_indexes": [1]},
            },
            preprocessor={
                "size": {"shortest_edge": 65536, "longest_edge": 16777216}, **_QWEN, "patch_size": 16,
            },
            architecture="Qwen3VLMoeForConditionalGeneration",
        ),
        _with_experts,
    ),
    "qwen3_5": Case(_QWEN3_5, _plain),
    "qwen3_5_moe": Case(
        dataclasses.replace(
            _QWEN3_5,
            config={
                **_QWEN3_5.config,
                "text_config": {
                    **_QWEN3_5.config["text_config"], "model_type": "qwen3_5_moe_text", "num_experts": 4,
                    "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                    "shared_expert_intermediate_size": 64,
                },
            },
            architecture="Qwen3_5MoeForConditionalGeneration",
        ),
        _plain,
    ),
    "pixtral": Case(FAMILIES["pixtral"], _plain),
    "mistral3": Case(FAMILIES["mistral3"], _plain),
    # Ministral 3.
    "ministral3": Case(
        _with(
            "mistral3",
            {
                "text_config": {
                    "model_type": "ministral3",
                    "rope_parameters": {
                        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0,
                        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                        "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.1,
                    },
                },
            },
        ),
        _plain,
    ),
    "internvl": Case(
        _with(
            "internvl",
            {"vision_config": {"attention_bias": True, "layer_norm_eps": 1e-5, "num_hidden_layers": 4}},
            preprocessor={**FAMILIES["internvl"].preprocessor, "max_patches": 12},
        ),
        _internvl,
    ),
    "gemma4": Case(
        _with(
            "gemma4", {"text_config": _WIDE, "vision_config": _POOLED}, **_GEMMA4
        ),
        _plain,
    ),
    "gemma4_large": Case(
        _with(
            "gemma4_large",
            {
                "text_config": _WIDE,
                "vision_config": {**_POOLED, "standardize": True, "use_clipped_linears": True},
            },
            **_GEMMA4,
        ),
        _plain,
        _clipped,
    ),
    "llava": Case(FAMILIES["llava"], _plain, _rounded_clip),
    "llava_next": Case(FAMILIES["llava_next"], _llava_next, _rounded_clip),
    "lfm2_vl": Case(
        _with(
            "lfm2_vl",
            {
                "text_config": _TIED,
                "vision_config": {"image_size": 256, "patch_size": 16, "num_patches": 256},
                **_TIED,
            },
            preprocessor={"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "return_row_col_info": True},
        ),
        _lfm2_vl,
    ),
    # InternViT-6B.
    "internvl_large": Case(
        _with(
            "internvl",
            {"vision_config": {"use_qk_norm": True, "norm_type": "rms_norm", "num_hidden_layers": 4}},
            preprocessor={**FAMILIES["internvl"].preprocessor, "max_patches": 12},
        ),
        _internvl,
    ),
}  # fmt: skip


def make(name: str, folder: Path, kinds: tuple[str, str] = (KIND, KIND)) -> Made:
    """Make a model, and convert it; the text model and its projector to these kinds of weights."""
    case = CASES[name]
    checkpoint = folder / "checkpoint"
    vision_models.make_family(name, case.family, checkpoint)
    _edit(checkpoint, case.edit)
    published = shutil.copytree(checkpoint, folder / "published")
    config = json.loads((published / "config.json").read_text())
    tensors = safetensors.torch.load_file(published / "model.safetensors")
    config, tensors = case.publish(config, tensors)
    (published / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, published / "model.safetensors", {"format": "pt"})
    options = json.loads((published / "preprocessor_config.json").read_text())
    if "image_mean" not in options:
        images = transformers.AutoImageProcessor.from_pretrained(checkpoint, backend="pil").to_dict()
        options |= {key: list(images[key]) for key in ("image_mean", "image_std")}
    (published / "preprocessor_config.json").write_text(json.dumps(options))
    names = (kinds[0], f"mmproj-{kinds[1]}")
    if name.startswith("llava"):
        convert(published, names[:1], folder)
        how = (Path(__file__), _CLIP)
        kept = converted(published, how, lambda partial: _convert_clip(published, partial))
        shutil.copyfile(kept / "mmproj-model-f32.gguf", folder / f"{names[1]}.gguf")
    else:
        convert(published, names, folder)
    text, projector = (folder / f"{name}.gguf" for name in names)
    return Made(checkpoint, ModelFiles(name, None, "gguf", text, projector, is_projector_named=True))


def _convert_clip(published: Path, folder: Path) -> None:
    """Write a LLaVA's projector file to `folder`; the script's other half takes tower and projector apart."""
    source = llama_cpp_source()
    config = json.loads((published / "config.json").read_text())
    tensors = safetensors.torch.load_file(published / "model.safetensors")
    tower = {
        name.replace("vision_tower.", "vision_model."): each
        for name, each in tensors.items()
        if name.startswith("vision_tower.")
    }
    parts = ("multi_modal_projector.", "image_newline")
    projector = {name: each for name, each in tensors.items() if name.startswith(parts)}
    grids = config.get("image_grid_pinpoints")
    more = {} if grids is None else {**_TILED, "image_grid_pinpoints": grids}
    (folder / "config.json").write_text(json.dumps({**config["vision_config"], **more}))
    safetensors.torch.save_file(tower, folder / "model.safetensors", {"format": "pt"})
    torch.save(projector, folder / "llava.projector")
    script = source / "tools" / "mtmd" / "legacy-models" / "convert_image_encoder_to_gguf.py"
    words = ["-m", folder, "--clip-model-is-vision", "--use-f32", "--llava-projector"]
    done = subprocess.run(
        [sys.executable, _CLIP, script, *map(str, words), str(folder / "llava.projector"), "-o", str(folder)],
        env={**os.environ, "PYTHONPATH": str(source / "gguf-py")}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"llama.cpp's converter failed:\n{done.stderr[-3000:]}")


def changed(
    projector: Path, target: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray | None]
) -> Path:
    """Write a projector file with other metadata and tensors (None: without it); it must be float32."""
    with GgufFile.open(projector) as file:
        kept = {
            name: file.raw(name).view(np.float16 if info.type == "F16" else np.float32).reshape(info.shape)
            for name, info in file.tensors.items()
        }
        values = {**file.metadata, **metadata}
        arrays = {name: each for name, each in {**kept, **tensors}.items() if each is not None}
        written = [
            Tensor(name, each.shape[::-1], int(each.dtype == np.float16), each.tobytes())
            for name, each in arrays.items()
        ]
        plain = {key: _plain_value(each) for key, each in values.items() if each is not None}
        target.write_bytes(gguf_bytes(plain, written))
    return target


def _plain_value(value: Any) -> Any:
    """Return a value as `gguf_bytes` takes it: numbers of arrays have types that it does not know."""
    return value.tolist() if isinstance(value, np.ndarray) and value.dtype == bool else value


def _edit(checkpoint: Path, edit: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change tensors of a checkpoint."""
    path = checkpoint / "model.safetensors"
    tensors = {name: edit(name, each) for name, each in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
