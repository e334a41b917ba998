"""Placeholder of the syncer's shape; see the chapter below."""
