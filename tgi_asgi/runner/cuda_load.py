"""Places a model on a CUDA device: detects the device, checks support, and sizes the cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.models.adapters import AdapterLoader
from tgi_asgi.models.config import ModelConfig
from tgi_asgi.models.family import Model
from tgi_asgi.models.loading.open import OpenModel, ServedModel
from tgi_asgi.models.loading.watched import Watch
from tgi_asgi.models.needs import Need, needs_of
from tgi_asgi.models.pooling import PoolingFiles
from tgi_asgi.models.shard import ModelCut
from tgi_asgi.ops.cuda_adapters import CudaAdapterLayout
from tgi_asgi.ops.cuda_attention import PromptAttention
from tgi_asgi.ops.cuda_experts import has_kernels
from tgi_asgi.ops.cuda_kv import HEAD_DIMS, MAX_GROUP, CudaKvFormat, dtype_name
from tgi_asgi.ops.cuda_modes import CudaModes
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.runner.cuda import CudaRunner
from tgi_asgi.runner.cuda_adapters import make_adapter_layout
from tgi_asgi.runner.cuda_device import CudaDevice, Device, must_fit, register_kernels
from tgi_asgi.runner.cuda_shards import CudaShards, check_cuts
from tgi_asgi.runner.cuda_steps import MAX_TOP, CudaOutputs, CudaStepSpec
from tgi_asgi.runner.drafts import speculation_of
from tgi_asgi.runner.kv import KvSize, choose_size, gpu_cure, gpu_groups_of, kv_scales_of, limits_of
from tgi_asgi.runner.load_pooling import uses_logits
from tgi_asgi.runner.memory import VISION_SHARE
from tgi_asgi.runner.placement import Placed
from tgi_asgi.runner.shard_adapters import SplitAdapterLoader
from tgi_asgi.runner.shards import cuts_of
from tgi_asgi.settings import Settings
from tgi_asgi.settings.speculation import Speculation

logger = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)  # Ampere: asynchronous copies, and bfloat16 on tensor cores
# What models may need beyond a plain decoder, as far as the GPU kernels support it.
SUPPORTED_NEEDS = frozenset(
    {
        Need.LAYER_NORM,
        Need.PLAIN_MLP,
        Need.GATES,
        Need.LEARNED_POSITIONS,
        Need.INTERLEAVED_ROPE,
        Need.CLIP,
        Need.QK_LAYER_NORM,
        Need.LATE_QK_NORM,
        Need.WINDOWS,
        Need.SOFT_CAP,
        Need.SLOPES,
        Need.SINKS,
        Need.EXPERTS,
        Need.IMAGES,
    }
)
_MAX_HIDDEN = 16384
# Of the memory free after the largest step, the cache gets this share of all but the reserve, which graphs,
# kernels' modules and libraries' workspaces need on every GPU. Larger graphs and fragmentation use the rest.
_SHARE, _RESERVE = 0.92, 1 << 30
_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device() -> Device | None:
    """Return the device for steps; None if the extension has no CUDA or no GPU is visible.

    If the GPU's compute capability or the driver is too old, log that and let the CPU compute.
    """
    register_kernels()
    if not hasattr(torch.ops.tgi_cuda, "attention_decode"):
        return None
    if not torch.cuda.is_available():
        _warn_of_old_driver()
        return None
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        logger.warning(
            "the CPU computes: %s has compute capability %d.%d, GPU kernels need %d.%d (Ampere) or later",
            torch.cuda.get_device_name(), *capability, *MIN_CAPABILITY,
        )  # fmt: skip
        return None
    torch.set_num_threads(1)  # on the host, it only copies
    return CudaDevice()


class OnCuda:
    """A `Placement` of a model on one or more GPUs.

    Args:
        max_context: Maximum number of tokens in a sequence.

    Raises:
        ModelLoadError: if a GPU cannot compute the model or what the settings ask for.
    """

    device = "cuda"
    kernels = None

    def __init__(
        self, opened: OpenModel, files: ModelFiles, settings: Settings, device: Device, max_context: int
    ) -> None:
        self._dtype = choose_dtype(settings.dtype)
        _check_prompt_precision(settings)
        if isinstance(opened.config, ModelConfig) and (reason := why_no_kernels(opened.config)):
            opened.leave_to_module(reason)
            max_context = min(max_context, opened.config.longest_context)
        # What a module may be asked for, unless loading may show that native code computes it.
        self._is_checked = opened.is_generic and not opened.may_become_native(max_context, _has_kernels)
        if self._is_checked:
            _check_module_settings(settings, opened.config.architecture)
        cuts = cuts_of(opened, settings, num_gpus=device.count())
        self.dtype = dtype_name(self._dtype)
        self.arithmetic = Repacking(self._dtype, device.device)
        self.max_context, self.settings = max_context, settings
        self._opened, self._device = opened, device
        device.limit_memory(settings.cuda_memory_fraction)
        self._kv_scales: list[tuple[float, float]] | None = None
        self._spec: CudaStepSpec | None = None  # as the other shards have it
        self.shards: CudaShards | None = None
        if cuts:
            opened.use_cut(cuts[0])
            self._spec = spec_of(settings, self._dtype, max_context, settings.speculation)
            self.shards = make_shards(files, settings, cuts, device, self._spec)

    def load(self, watch: Watch) -> ServedModel:
        """Load the model, as described in `Placement`."""
        with must_fit():
            model = self._opened.load(self.arithmetic, self.max_context, watch, _has_kernels)
        if self.shards is not None:
            self.shards.others.wait_ready()
        self._kv_scales = kv_scales_of(self._opened, self.settings)
        return model

    def place(self, model: ServedModel, pooling: PoolingFiles) -> Placed:
        """Create the model's cache and runner, as described in `Placement`."""
        if model.kind != "native":
            from tgi_asgi.runner.cuda_modules import place_module  # imports what native models do not need

            if not self._is_checked:
                _check_module_settings(self.settings, model.config.architecture)
            with must_fit():
                module, size = place_module(
                    model, self.settings, self._device, self._dtype, self.max_context, pooling.dense
                )
            return Placed(module, size, self._bits())
        settings = self.settings
        adapters: AdapterLoader[CudaAdapterLayout] | SplitAdapterLoader | None = None
        spec = self._spec
        if spec is None:
            spec = spec_of(settings, self._dtype, self.max_context, speculation_of(model, settings))
        spec = spec.with_kv_scales(self._kv_scales)
        if settings.serves_adapters:
            adapters = own = AdapterLoader(make_adapter_layout(model, settings, self._device, self._dtype))
            if self.shards is not None and self.shards.adapters is not None:
                adapters = SplitAdapterLoader(own, self.shards.adapters)
        runner = make_runner(
            model, settings, self._device, spec, pooling, shards=self.shards,
            adapters=None if adapters is None else adapters.layout,
        )  # fmt: skip
        precision = self._prompt_precision(runner.num_float8_products)
        return Placed(runner, runner.cache, self._bits(runner.prompts_by, precision), precision, adapters)

    def _prompt_precision(self, num_float8_products: int) -> str | None:
        """Return the precision of prompts if it is their own, and log what decided."""
        if num_float8_products > 0:
            logger.info("%d matrices multiply long steps in FP8", num_float8_products)
            return "fp8"
        if self.settings.prompt_precision == "fp8" and not self.settings.batch_invariant:
            logger.warning(
                "--prompt-precision fp8 changes nothing: no matrix has FP8 weights with scales per row or "
                "per 128 x 128 and the sizes such products need, or torch does not compute them on this GPU"
            )
        return None

    def _bits(self, prompts_by: str | None = None, precision: str | None = None) -> str:
        """Return what decides output bits, as described in `Placed`.

        Args:
            prompts_by: What computes the attention of prompts, if not the native kernel.
            precision: That of prompts, if it is their own.
        """
        scales = f" kv {self._kv_scales}" if self._kv_scales else ""
        which = "long prompts" if self.settings.prompt_attention == "auto" else "prompts"
        prompts = "" if prompts_by is None else f" {which} by {prompts_by}"
        own = "" if precision is None else f" prompts {precision}"
        order = " batch-invariant" if self.settings.batch_invariant else ""
        return f"{self.arithmetic}{scales}{prompts}{own}{order}"

    def is_batch_invariant(self, model: ServedModel) -> bool:
        """Return whether a sequence's bits depend on it alone, as described in `Placement`."""
        return self.settings.batch_invariant

    def abandon(self) -> None:
        """End the other shards, as described in `Placement`."""
        if self.shards is not None:
            self.shards.abandon()


def _check_prompt_precision(settings: Settings) -> None:
    wanted = settings.prompt_precision
    if wanted not in ("auto", "fp8"):
        raise ModelLoadError(f"--prompt-precision {wanted} is for CPUs: on a GPU it may be auto or fp8")


def _check_module_settings(settings: Settings, architecture: str) -> None:
    """Refuse or report what a GPU does only for native models.

    Raises:
        ModelLoadError: if the settings ask for something that would change what clients get.
    """
    what = f"{architecture} is computed by transformers' code on this GPU"
    if settings.batch_invariant:
        raise ModelLoadError(f"--batch-invariant: {what}, with products that depend on the whole batch")
    if settings.serves_adapters:
        raise ModelLoadError(
            f"LoRA adapters: {what}, where requests cannot choose one: name a single adapter as --model-id, "
            "or use the CPU with CUDA_VISIBLE_DEVICES="
        )
    if settings.kv_cache_dtype != "auto":
        raise ModelLoadError(f"--kv-cache-dtype {settings.kv_cache_dtype}: {what}: use auto")
    ignored = {
        "--prompt-attention": settings.prompt_attention not in ("auto", "paged"),
        "--prompt-precision": settings.prompt_precision != "auto",
        "--dependent-launches": settings.dependent_launches,
        "--quantize": settings.quantize is not None,
    }
    for name in (name for name, is_given in ignored.items() if is_given):
        logger.warning("%s is ignored: %s", name, what)


def _warn_of_old_driver() -> None:
    """Log a warning if torch sees no GPU because the driver is too old."""
    try:
        torch.cuda.init()
    except Exception as error:  # also raised if there is no GPU, or it is hidden
        if "too old" in str(error):
            logger.warning("the CPU computes: %s", str(error).partition(". ")[0])


def choose_dtype(name: str) -> torch.dtype:
    """Return the type that products compute in, for --dtype.

    Raises:
        ModelLoadError: if the kernels lack this dtype.
    """
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise ModelLoadError(
            f"--dtype {name} is not supported on a GPU: use {' or '.join(_DTYPES)}, or hide the GPU with "
            "CUDA_VISIBLE_DEVICES="
        )
    return dtype


def _has_kernels(config: ModelConfig) -> bool:
    return not why_no_kernels(config)


def why_no_kernels(config: ModelConfig) -> str:
    """Return why native kernels do not compute a model on a GPU; empty if they do."""
    lacking = sorted(needs_of(config) - SUPPORTED_NEEDS)
    if lacking:
        return f"{config.architecture} needs {', '.join(lacking)}, which the GPU kernels do not have yet"
    group = config.num_heads // config.num_kv_heads
    experts = [layer.experts for layer in config.layers if layer.experts is not None]
    of_experts = {spec.intermediate_size for spec in experts} | {spec.shared_size for spec in experts} - {0}
    sizes = (config.hidden_size, config.intermediate_size, *sorted(of_experts))
    rotary = sorted({layer.rope.dim for layer in config.layers if layer.rope is not None})
    if (
        config.head_dim not in HEAD_DIMS
        or group > MAX_GROUP
        or any(size % 8 for size in sizes)
        or any(size % 4 for size in rotary)
        or config.hidden_size > _MAX_HIDDEN
        or not all(
            has_kernels(each.num_experts, config.hidden_size, each.intermediate_size) for each in experts
        )
    ):
        return (
            f"the GPU kernels do not support head size {config.head_dim} with {group} queries per KV head, "
            f"rotary sizes {rotary} and hidden sizes {sizes}"
        )
    return ""


def spec_of(
    settings: Settings, dtype: torch.dtype, max_context: int, speculation: Speculation | None = None
) -> CudaStepSpec:
    """Return the sizes, modes and cache format of a model's steps, without the scales from its files.

    Raises:
        ModelLoadError: if what --kv-cache-dtype or --prompt-attention asks for is not available.
    """
    kv = CudaKvFormat(settings.block_size, _choose_kv_dtype(settings.kv_cache_dtype, dtype))
    modes = CudaModes(
        dtype,
        is_batch_invariant=settings.batch_invariant,
        prompt_attention=_choose_prompt_attention(settings),
        has_float8_products=_wants_float8_products(settings),
        has_dependent_launches=settings.dependent_launches,
    )
    return CudaStepSpec(limits_of(settings, max_context), modes, kv, speculation)


def _wants_float8_products(settings: Settings) -> bool:
    is_wanted = settings.prompt_precision == "fp8"
    if is_wanted and settings.batch_invariant:
        logger.warning("--prompt-precision fp8 is ignored: --batch-invariant needs the native kernels")
    return is_wanted and not settings.batch_invariant


def _choose_prompt_attention(settings: Settings) -> PromptAttention:
    wanted = PromptAttention(settings.prompt_attention)
    if settings.batch_invariant:
        if wanted not in (PromptAttention.AUTO, PromptAttention.PAGED):
            logger.warning(
                "--prompt-attention %s is ignored: --batch-invariant needs the native kernel", wanted
            )
        return PromptAttention.PAGED
    if wanted is PromptAttention.FLASHINFER:
        try:
            import flashinfer  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            raise ModelLoadError(
                f"--prompt-attention flashinfer needs the package flashinfer-python, which could not be "
                f"imported: {error}"
            ) from error
    return wanted


def make_shards(
    files: ModelFiles, settings: Settings, cuts: Sequence[ModelCut], device: Device, spec: CudaStepSpec
) -> CudaShards:
    """Start the other shards, which begin to load their parts.

    Raises:
        ModelLoadError: if the kernels cannot compute a part.
    """
    check_cuts(cuts)
    return CudaShards(files, settings, cuts, type(device), spec)


def make_runner(
    model: Model, settings: Settings, device: Device, spec: CudaStepSpec, pooling: PoolingFiles, *,
    shards: CudaShards | None = None, adapters: CudaAdapterLayout | None = None,
) -> CudaRunner:  # fmt: skip
    """Record a model whose weights are on the device, and give the remaining memory to the cache.

    Args:
        pooling: How the model's files say that it pools.
        shards, adapters: As for `CudaRunner`.

    Raises:
        ModelLoadError: if it does not fit; the message says what to change.
    """
    is_split, kv_dtype, max_context = shards is not None, spec.kv.dtype, spec.limits.max_context
    groups = gpu_groups_of(model.config, kv_dtype.itemsize)
    outputs = CudaOutputs(
        # All shards capture the same graphs, and the others do not know how the model pools.
        has_logits=is_split or uses_logits(model.config, pooling, settings),
        max_top=max(MAX_TOP, settings.max_top_n_tokens or 0),
        dense=pooling.dense,
    )
    if settings.quantize is not None:
        logger.warning("--quantize is for the CPU: on a GPU weights keep the file's format")

    image_cache = 0 if model.images is None else settings.image_cache

    def choose(free_bytes: int) -> KvSize:
        usable, name = bytes_for_cache(max(free_bytes - image_cache, 0)), dtype_name(kv_dtype)
        share = 1.0 if model.images is None else VISION_SHARE
        return choose_size(
            model.config, settings, groups, name, max_context, usable, share=share, cure=gpu_cure(settings)
        )

    with must_fit():
        return CudaRunner(
            model, device, choose, spec, outputs, shards=shards, adapters=adapters, image_cache=image_cache
        )


def bytes_for_cache(free_bytes: int) -> int:
    """Return how much of the memory that is free after the largest step the cache may take."""
    return int(_SHARE * max(free_bytes - _RESERVE, free_bytes // 2))


def _choose_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type of keys and values, for --kv-cache-dtype."""
    if name == "auto":
        return dtype
    if name == "fp8_e4m3fn":
        return torch.float8_e4m3fn
    raise ModelLoadError(
        f"--kv-cache-dtype {name} is not supported on a GPU: use auto or fp8_e4m3fn, or hide the GPU with "
        "CUDA_VISIBLE_DEVICES="
    )
