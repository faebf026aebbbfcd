"""Observability of requests: metrics, the access log, traces, and event-loop lag."""
