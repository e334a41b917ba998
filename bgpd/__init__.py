"""The routing daemon: decides what is advertised and installed; ExaBGP speaks the protocol."""
