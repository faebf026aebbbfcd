"""Tiny checkpoints as AutoAWQ, AutoGPTQ, compressed-tensors and FP8 recipes write them.

Packing works word by word, slow and plain like the formats' descriptions, and shares no code with the
readers. The model's own weights are set to what the codes decode to, so that `transformers` is the reference.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import Model, save
from tgi_asgi import ops
from tgi_asgi.formats.sources import ModelFiles

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column in each nibble of a word, the lowest first


@dataclass
class Codes:
    """A random matrix of weights scales[row, group] * (codes - zeros[row, group])."""

    codes: Tensor  # [rows, columns] int64
    scales: Tensor  # [rows, groups] float16
    zeros: Tensor  # [rows, groups] int64
    groups: Tensor  # [columns] int64

    def weights(self) -> Tensor:
        """Return the matrix in float32."""
        scales = self.scales.float()[:, self.groups]
        return scales * (self.codes - self.zeros[:, self.groups]).float()


def random_codes(
    rows: int,
    columns: int,
    group: int,
    *,
    bits: int = 4,
    is_centred: bool = False,
    order_seed: int | None = None,
) -> Codes:
    """Make a matrix; `is_centred` puts zero points at half the range, `order_seed` shuffles the groups."""
    num_groups = columns // group
    groups = torch.arange(columns) // group
    if order_seed is not None:
        groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(order_seed))]
    zeros = torch.randint(1, 1 << bits, (rows, num_groups))
    if is_centred:
        zeros = torch.full_like(zeros, 1 << bits - 1)
    scales = (torch.rand(rows, num_groups) * 0.04 + 0.01) * 16 / (1 << bits)
    return Codes(torch.randint(1 << bits, (rows, columns)), scales.half(), zeros, groups)


def ordered_source(matrix: Codes, *, bits: int = 4) -> ops.WeightSource:
    """Return a matrix as loaders do that keep its codes: its columns group by group."""
    order = torch.argsort(matrix.groups, stable=True)
    codes = matrix.codes[:, order].to(torch.uint8)
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    source = ops.integer_source(
        codes.contiguous().numpy(), matrix.scales.float().numpy(), matrix.zeros.to(torch.uint8).numpy(), bits,
        order.numpy(),
    )  # fmt: skip
    assert source is not None
    return source


def pack(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack [n, m] values along m into int32 words, lowest first or in the given order within each word."""
    each = 32 // bits
    order = order or tuple(range(each))
    out = torch.zeros(values.shape[0], values.shape[1] // each, dtype=torch.int64)
    for word in range(out.shape[1]):
        for place, column in enumerate(order):
            out[:, word] |= values[:, word * each + column] << bits * place
    return torch.where(out >= 1 << 31, out - (1 << 32), out).to(torch.int32)


def gptq_tensors(matrix: Codes, *, bits: int = 4, shift: int = 1) -> dict[str, Tensor]:
    """Return GPTQ's tensors: codes packed along the columns, zero points minus `shift` along the rows."""
    return {
        "qweight": pack(matrix.codes, bits).T.contiguous(),
        "qzeros": pack(matrix.zeros.T - shift, bits),
        "scales": matrix.scales.T.contiguous(),
        "g_idx": matrix.groups.to(torch.int32),
    }


def awq_tensors(matrix: Codes) -> dict[str, Tensor]:
    """Return AWQ's tensors: codes and zero points packed along the rows, in AutoAWQ's order."""
    return {
        "qweight": pack(matrix.codes.T, 4, AWQ_ORDER),
        "qzeros": pack(matrix.zeros.T, 4, AWQ_ORDER),
        "scales": matrix.scales.T.contiguous(),
    }


def compressed_tensors(matrix: Codes, *, is_centred: bool) -> dict[str, Tensor]:
    """Return compressed-tensors' tensors: codes packed along the columns, any zero points along the rows."""
    tensors = {
        "weight_packed": pack(matrix.codes, 4),
        "weight_scale": matrix.scales,
        "weight_shape": torch.tensor(matrix.codes.shape),
    }
    return tensors if is_centred else tensors | {"weight_zero_point": pack(matrix.zeros.T, 4).T.contiguous()}


def float8_tensors(weight: Tensor, kind: str, block: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    """Round a matrix to E4M3, scaled by `kind` ("tensor", "row" or a square "block"); return it, decoded."""
    rows, columns = weight.shape
    if kind == "block":
        size = (-(-rows // block), -(-columns // block))
        scales = torch.rand(size) * 0.01 + 0.001
        spread = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    else:
        scales = torch.rand(rows, 1) * 0.01 + 0.001 if kind == "row" else torch.tensor([0.004])
        spread = scales.expand(rows, columns)
    codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)  # overflow is NaN before torch 2.13
    name = "weight_scale_inv" if kind == "block" else "weight_scale"
    return {"weight": codes, name: scales}, codes.float() * spread


def save_quantised(model: Model, directory: Path, recipe: str, **options: Any) -> ModelFiles:
    """Write a checkpoint with quantised layer matrices; embedding, head and norms are float32.

    Recipes: gptq, awq, compressed, fp8. With `has_order`, matrices of one input share an order of columns;
    if it is "each", none do.
    """
    files = save(model, directory)
    tensors = load_file(directory / "model.safetensors")
    for name, parameter in model.named_parameters():
        if ".layers." not in name or parameter.dim() != 2:
            continue
        stem = name.removesuffix("weight")
        del tensors[name]
        seed = len(tensors) if options.get("has_order") == "each" else _order_seed(name)
        made, weights = _quantise(parameter.detach(), recipe, options, seed)
        tensors |= {stem + key: tensor.contiguous() for key, tensor in made.items()}
        parameter.data.copy_(weights)
    save_file(tensors, directory / "model.safetensors")
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": _config(recipe, options)}
    path.write_text(json.dumps(config))
    return files


def _order_seed(name: str) -> int:
    """Return a number for a matrix's input: AutoGPTQ orders columns by input, so matrices can share one."""
    layer, kind = name.split(".")[2], name.split(".")[-2]
    inputs = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
    return 4 * int(layer) + next(i for i, kinds in enumerate(inputs) if kind in kinds)


def _quantise(
    weight: Tensor, recipe: str, options: dict[str, Any], order_seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    if recipe == "fp8":
        return float8_tensors(weight, options["kind"], options.get("block", 32))
    bits, is_centred = options.get("bits", 4), options.get("is_centred", False)
    rows, columns = weight.shape
    matrix = random_codes(
        rows,
        columns,
        options.get("group", 32),
        bits=bits,
        is_centred=is_centred,
        order_seed=order_seed if options.get("has_order") else None,
    )
    made = {
        "gptq": lambda: gptq_tensors(matrix, bits=bits, shift=options.get("shift", 1)),
        "awq": lambda: awq_tensors(matrix),
        "compressed": lambda: compressed_tensors(matrix, is_centred=is_centred),
    }[recipe]()
    return made, matrix.weights()


def _config(recipe: str, options: dict[str, Any]) -> dict[str, Any]:
    group = options.get("group", 32)
    if recipe == "gptq":
        layout = "gptq" if options.get("shift", 1) else "gptq_v2"
        bits, has_order = options.get("bits", 4), options.get("has_order", False)
        return {
            "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": bool(has_order),
            "checkpoint_format": layout, "sym": options.get("is_centred", False),
        }  # fmt: skip
    if recipe == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    if recipe == "compressed":
        return {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    block = {"weight_block_size": [options.get("block", 32)] * 2} if options["kind"] == "block" else {}
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **block}
