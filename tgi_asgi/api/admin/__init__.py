"""Routes for operators and monitoring: health, metrics, model information, administration."""
