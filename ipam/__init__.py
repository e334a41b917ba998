"""Addresses: a library that cnid, the controllers and the command line use."""
