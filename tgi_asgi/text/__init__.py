"""Text to ids and back: tokenizer, chat templates, incremental detokenisation, stop strings. A leaf."""
