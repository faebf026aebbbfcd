"""GGUF models that accept images: a file of the text model, and one of tower and projector (`mmproj`).

`texts` reads the text model's configuration, `projector` what all projectors share, and one module for each
kind of projector the rest. `models/loading/gguf_vision.py` opens both files.
"""
