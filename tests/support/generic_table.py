"""How each architecture of `AutoModelForCausalLM` is served, as data that `tests/models/generic` verifies.

An architecture in none of the tables is served on the generic path, with all sequences of a step batched. The
reasons are phrases from the server's messages, and `docs/generic.md` quotes them verbatim.
"""

from __future__ import annotations

from collections.abc import Mapping

_OWN_ATTENTION = "writes its attention inline"
_POSITIONS = "positions do not reach the layers"
_MORE = "keeps more of a sequence than keys and values"
_OWN_KIND = "has a cache of its own kind"
_WHOLE_TEXT = "each token computes the whole text again"
_INDEXED = ("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4", "qwen4_exp_text")

# Served by a native family, unless `transformers`' code is requested; then the other tables apply.
NATIVE: tuple[str, ...] = (
    "apertus", "arcee", "bamba", "bloom", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "dots1",
    "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon_h1", "falcon_mamba", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt-sw3", "gpt2", "gpt_neox",
    "gpt_oss", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "internlm3", "iquestcoder", "jamba", "lfm2", "lfm2_moe", "lfm3", "llama", "mamba",
    "mamba2", "minicpm3", "ministral", "ministral3", "mistral", "mixtral", "mpt", "nemotron", "nemotron_h",
    "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm",
    "starcoder2",
)  # fmt: skip

# Of the common shape: computed by a native decoder; `transformers`' code is only a check.
COMMON: tuple[str, ...] = (
    "cwm", "exaone", "gemma", "internlm3", "iquestcoder", "llama", "ministral", "ministral3", "mistral",
    "qwen2", "qwen3", "seed_oss", "smollm3",
)  # fmt: skip

# One sequence at a time, on the cache of the model's own code.
SEQUENTIAL: Mapping[str, str] = {
    **dict.fromkeys(
        ("big_bird", "gpt_neox_japanese", "megatron-bert", "mvp", "rembert", "roformer", "trocr", "xglm"),
        _OWN_ATTENTION,
    ),
    **dict.fromkeys(
        ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "plbart"),
        _POSITIONS,
    ),
    "inkling_text": "attention takes position_bias",
    **dict.fromkeys(("inkling2_loop_text", "inkling2_text"), "attention takes position_bias, sinks"),
    **dict.fromkeys(_INDEXED, _MORE),
    **dict.fromkeys(("deepseek_v4", "minimax_m3_vl_text", "rwkv", "xlnet", "xlstm"), _OWN_KIND),
    **dict.fromkeys(("blt", "openai-gpt", "xlm"), _WHOLE_TEXT),
    "doge": "a mask that its own code makes",
    "git": "does not run without weights",
}

# Refused when the model is opened, before any weights are read.
REFUSED: Mapping[str, str] = {
    "reformer": "hashes tokens into buckets that change with the length",
    "cpmant": "lets a prompt's tokens see each other both ways",
    "prophetnet": "predicts several tokens at once, by a table of positions",
}

# Explanations of reasons.
WHY: Mapping[str, str] = {
    **dict.fromkeys(_INDEXED, "an index of them"),
    **dict.fromkeys(("blt", "openai-gpt", "xlm"), "they have no cache, or none to continue from"),
}

# At least one type for each kind of layer, for `make test-all`; `make test-models` tests all.
USUAL: tuple[str, ...] = tuple(
    """
    llama qwen2 gemma2 gemma3n_text gemma4_text gpt_oss llama4_text deepseek_v3 granitemoe_swa ernie4_5_moe
    longcat_flash dbrx bloom falcon mpt gpt_neo gptj gpt2 gpt_bigcode opt roberta lfm2 jamba mamba mamba2
    falcon_h1 zamba zamba2 qwen3_next minimax hrm_text phi3 cohere2 nemotron mimo_v2_flash modernbert-decoder
    bart rembert doge openai-gpt xlnet recurrent_gemma deepseek_v4 deepseek_v32 glm_moe_dsa qwen4_exp_text
    rwkv xlstm cpmant
""".split()  # noqa: SIM905 -- a paragraph, not a page
)

# One of each kind, in every run of the tests.
FEW: tuple[str, ...] = tuple(
    "gemma3n_text gpt_oss bloom gpt2 lfm2 jamba mamba2 bart rembert rwkv cpmant".split()  # noqa: SIM905
)

TIERS = ("common", "generic", "sequential", "refused")


def tier_of(model_type: str) -> str:
    """Return the tier of `TIERS` that serves an architecture when `transformers`' code is requested."""
    tiers = {"common": COMMON, "sequential": SEQUENTIAL, "refused": REFUSED}
    return next((tier for tier, names in tiers.items() if model_type in names), "generic")
