"""Routes for administrators and monitoring: health, metrics, model information, administration."""
