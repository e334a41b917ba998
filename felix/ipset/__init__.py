"""The IP set driver: wanted sets in, one `ipset restore` out."""
