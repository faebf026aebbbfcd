"""Our own way of running the app: hypercorn on a socket bound first, signals, the terminal, TGI's launcher flags."""
