"""Models that cannot be served are described in one sentence, before weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import resolve
from tgi_asgi.settings import Settings


def refusal(folder: Path, files: dict[str, Any]) -> str:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(ModelLoadError) as caught:
        resolve(Settings(model_id=str(folder)), lambda *_: None)
    return str(caught.value).removeprefix(f"{folder} ")


def config_of(architecture: str, **keys: Any) -> dict[str, Any]:
    return {"config.json": {"architectures": [architecture], **keys}, "model.safetensors": ""}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"model_index.json": {}}, "is a diffusers pipeline, which generates images"),
        ({"model_index.json": {}, "config.json": {}, "model.safetensors": ""}, "is a diffusers pipeline"),
        ({"adapter_config.json": {}, "config.json": {}}, "is an adapter whose adapter_config.json names"),
        ({"config.json": {}, "pytorch_model.bin": ""}, "is a checkpoint of pickled weights"),
        ({"config.json": {}, "pytorch_model.bin.index.json": {}}, "(--revision refs/pr/N)"),
        ({"last.ckpt": ""}, "is a checkpoint of pickled weights"),
        ({"ggml-model-q4_0.bin": ""}, "is a file in GGML's format, which GGUF has replaced: use the"),
        ({"config.json": {}, "model.onnx": ""}, "is an export to ONNX"),
        ({"config.json": {}, "openvino_model.xml": ""}, "is an export to OpenVINO"),
        ({"model.mlpackage": ""}, "is an export to Core ML"),
        ({"gemma.task": ""}, "is an export to LiteRT"),
        ({"rank0.engine": ""}, "is a TensorRT engine"),
        ({"m.nemo": ""}, "is a NeMo checkpoint"),
        ({"config.json": {}, "tf_model.h5": ""}, "is a TensorFlow or Flax checkpoint"),
        ({"params.json": {}, "consolidated.safetensors": ""}, "is in its authors' own format"),
        (
            {"config.json": {"quantization": {"group_size": 64, "bits": 4}}, "model.safetensors": ""},
            "is quantised for Apple's MLX: use the original model, or one in GGUF",
        ),
        (
            {"config.json": {"quantization_config": {"quant_method": "exl3"}}, "model.safetensors": ""},
            "is quantised for ExLlama (exl3)",
        ),
        ({"config.json": {}, "output.safetensors": "", "measurement.json": {}}, "for ExLlama (exl2)"),
        (
            config_of("BartForSequenceClassification", is_encoder_decoder=True),
            "(BartForSequenceClassification) is an encoder-decoder of a kind that is not served",
        ),
        (
            config_of("WhisperForConditionalGeneration", is_encoder_decoder=True, num_mel_bins=80),
            "(WhisperForConditionalGeneration) is an encoder-decoder of a kind that is not served",
        ),
        (config_of("Wav2Vec2ForCTC"), "is an audio model"),
        (config_of("ASTForAudioClassification"), "is an audio model"),
        (config_of("ViTForImageClassification"), "reads images but writes no text"),
        (config_of("CLIPModel"), "(CLIPModel) reads images but writes no text"),
        (config_of("DetrForObjectDetection"), "reads images"),
        (config_of("Dinov2Model"), "reads images"),
        ({"README.md": ""}, "is not a model that can be served: it has no config.json"),
        ({"config.json": {}}, "is not a model that can be served: it has no .safetensors file"),
        ({"weights.safetensors": ""}, "it has no config.json"),
    ],
)
def test_each_kind_is_called_by_its_name(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    assert reason in refusal(tmp_path, files)


@pytest.mark.parametrize(
    "files",
    [
        config_of("LlamaForCausalLM"),
        config_of("BertModel"),
        config_of("T5EncoderModel", is_encoder_decoder=True),
        config_of("T5ForConditionalGeneration", is_encoder_decoder=True, model_type="t5"),
        config_of("BartModel", is_encoder_decoder=True, model_type="bart"),
        config_of("LlavaForConditionalGeneration"),
        config_of("SmolVLMForConditionalGeneration"),
        {**config_of("LlamaForCausalLM"), "pytorch_model.bin": "", "model.onnx": "", "params.json": {}},
        {**config_of("LlamaForCausalLM"), "adapter_config.json": {}},
        {"config.json": {"quantization_config": {"quant_method": "gptq"}}, "gptq_model-4bit.safetensors": ""},
        {"config.json": {"quantization": None}, "model.safetensors": ""},
    ],
)
def test_models_of_text_pass(tmp_path: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert resolve(Settings(model_id=str(tmp_path)), lambda *_: None).path == tmp_path
