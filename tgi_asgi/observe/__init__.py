"""What is measured and told of requests: metrics, the access log, traces, the lag of the event loop."""
