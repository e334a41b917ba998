"""BFD (RFC 5880, 5881, 5882): notices in under a second that a peer cannot be reached."""
