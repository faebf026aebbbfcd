"""API of Text Embeddings Inference (TEI): `/embed`, and `/rerank` with `texts`."""
