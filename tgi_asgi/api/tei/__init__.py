"""API of Text Embeddings Inference (TEI): `/embed`, `/similarity`, `/predict`, `/rerank` with `texts`."""
