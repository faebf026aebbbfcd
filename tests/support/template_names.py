"""Names of chat templates that llama.cpp and vLLM have, for tests that compile all of them."""

from __future__ import annotations

# Nearly the same words, in the same order, as another template of the same format.
REPEATED = frozenset({
    "GLM-4.7-Flash", "GigaChat3-10B-A1.8B", "MiMo-VL", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "deepseek-ai-DeepSeek-V4-Flash-0731",
    "ibm-granite-granite-4.1", "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.3-70B-Instruct",
    "poolside-Laguna-XS.2", "tool_chat_template_apertus", "tool_chat_template_deepseekv31",
    "tool_chat_template_gemma4", "tool_chat_template_hermes", "tool_chat_template_llama3.2_json",
    "tool_chat_template_mistral_parallel", "tool_chat_template_muse_glimmer",
    "tool_chat_template_qwen3coder",
})  # fmt: skip
