"""The API of Text Embeddings Inference: `/embed`, and `/rerank` with `texts`."""
